"""What tests of the tracer share."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import OlmoeForCausalLM  # noqa: E402

from gemopt.profiling.tracing import Tracer  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

# What the installed transformers calls a cache; the older name warns in a later one.
CACHE = "cache" if "cache" in inspect.signature(OlmoeForCausalLM.forward).parameters else "past_key_values"


def traced(model, folder, run, **options):
    with Tracer(model, folder, **options), torch.no_grad():
        run()
    return Traces.load(folder)
