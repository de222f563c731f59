"""What tests of the tracer share."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.profiling.tracing import Tracer  # noqa: E402
from gemopt.traces import Traces  # noqa: E402


def counts_of(ids_NLK, num_experts=8):
    return np.stack(
        [np.bincount(ids_NLK[:, layer].ravel(), minlength=num_experts) for layer in range(ids_NLK.shape[1])]
    )


def traced(model, folder, run, **options):
    with Tracer(model, folder, **options), torch.no_grad():
        run()
    return Traces.load(folder)
