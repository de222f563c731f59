"""What tests of the tracer share."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.profiling.tracing import Tracer  # noqa: E402
from gemopt.traces import Traces  # noqa: E402


def traced(model, folder, run, **options):
    with Tracer(model, folder, **options), torch.no_grad():
        run()
    return Traces.load(folder)
