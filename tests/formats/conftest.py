"""Placements to export, and the published files of serving engines (`pytest -m engines`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemopt.formats.engine import TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.placement import Placement
from gemopt.traces import Traces

WHEELS = Path(__file__).parents[2] / "benchmarks" / "engine_wheels.py"
# layers, first dense layers, experts, ranks, slots per rank
SHAPES = [(2, 0, 8, 1, 8), (3, 1, 16, 4, 4), (4, 2, 16, 4, 5), (2, 3, 60, 6, 11), (2, 1, 64, 64, 2), (1, 0, 8, 8, 1)]


@pytest.fixture
def make_placement():
    def make(layers=3, experts=8, ranks=2, slots=None, seed=0, **fields):
        """Random placement of `slots` slots per rank: every expert somewhere, copies in the rest."""
        rng = np.random.default_rng(seed)
        slots = experts // ranks if slots is None else slots
        rows = np.full((layers, ranks, slots), -1)
        for row in rows:
            homes = rng.permutation(ranks * slots)[:experts]
            row.reshape(-1)[homes] = rng.permutation(experts)
            for held in row:
                empty = np.flatnonzero(held < 0)
                held[empty] = rng.permutation(np.setdiff1d(np.arange(experts), held))[: len(empty)]
        fields = {"layer_ids": list(range(layers)), "num_hidden_layers": layers, **fields}
        return Placement(
            physical_to_logical=rows.reshape(layers, -1), slots_per_rank=[slots] * ranks, num_experts=experts, **fields
        )

    return make


@pytest.fixture
def load(tmp_path):
    """Traces of what an engine recorded, and the notes on them."""

    def call(paths, source="sglang", **options):
        paths = paths if isinstance(paths, list) else [paths]
        target = tmp_path / "out.safetensors"
        found = import_traces(paths, source=source, destination=target, options=TraceOptions(**options))
        return Traces.load(target), " | ".join(found.notes)

    return call


@pytest.fixture
def folder(tmp_path):
    """An empty folder for dumps."""
    (tmp_path / "dumps").mkdir()
    return tmp_path / "dumps"


@pytest.fixture
def shaped(make_placement):
    """A placement of one of SHAPES."""

    def make(shape, **fields):
        layers, dense, experts, ranks, slots = shape
        ids, whole = list(range(dense, dense + layers)), dense + layers
        return make_placement(layers, experts, ranks, slots, layer_ids=ids, num_hidden_layers=whole, **fields)

    return make


@pytest.fixture(params=SHAPES, ids=str)
def placement(request, shaped):
    return shaped(request.param)


@pytest.fixture(scope="session")
def engine_files() -> Callable[[str], Path]:
    """Folder with the files of an engine's published wheel, downloaded once."""
    spec = importlib.util.spec_from_file_location("engine_wheels", WHEELS)
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)

    def files(name: str) -> Path:
        try:
            return wheels.engine_files(name)
        except OSError as error:
            pytest.skip(str(error))

    return files
