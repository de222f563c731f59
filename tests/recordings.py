"""What tests of recordings share."""

from __future__ import annotations

import numpy as np
import pytest

from gemopt.formats.engine import TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.traces import Traces

torch = pytest.importorskip("torch")


def load(paths, source, tmp_path, **options) -> tuple[Traces, tuple[str, ...]]:
    paths = paths if isinstance(paths, list) else [paths]
    target = tmp_path / "out.safetensors"
    found = import_traces(paths, source=source, destination=target, options=TraceOptions(**options))
    traces = Traces.load(target)
    assert traces.num_steps == found.num_steps
    assert traces.counts.sum() == found.assignments
    return traces, found.notes


def sparse_counts(rng, steps=5, layers=4, experts=8, dense=1):
    """[T, layers, E] counts, none in the first `dense` layers, some in every step."""
    counts = rng.integers(0, 50, (steps, layers, experts)).astype(np.int32)
    counts[:, :dense] = 0
    counts[:, -1, -1] += 1
    return counts


def write_stat(path, counts):
    logical = torch.from_numpy(np.ascontiguousarray(counts))
    data = {"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": None}
    torch.save(data, path)


def write_passes(folder, time, rank, counts, *, first=1, table=None, **more):
    """A per_pass file of one rank from its [T, layers, P] counts. more: a value for each step, by the record's key."""
    records = [
        {
            "forward_pass_id": first + step,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.from_numpy(np.ascontiguousarray(each)),
            **{key: value(step) for key, value in more.items()},
        }
        for step, each in enumerate(counts)
    ]
    table = np.tile(np.arange(counts.shape[2]), (counts.shape[1], 1)) if table is None else table
    data = {"records": records, "last_physical_to_logical_map": torch.from_numpy(table)}
    torch.save(data, folder / f"expert_distribution_recorder_{time}_{rank}.pt")


def physical_counts(rng, ranks=3, steps=4, layers=3, experts=6, slots=8, dense=1):
    """[R, T, layers, P] counts per rank, the map [layers, P] and the true logical counts."""
    table = np.stack([rng.permutation(np.append(np.arange(experts), rng.integers(0, experts, slots - experts)))
                      for _ in range(layers)])  # fmt: skip
    counts = rng.integers(0, 30, (ranks, steps, layers, slots)).astype(np.int32)
    counts[:, :, :dense] = 0
    truth = np.zeros((steps, layers, experts), np.int64)
    for layer, row in enumerate(table):
        for slot, expert in enumerate(row):
            truth[:, layer, expert] += counts[:, :, layer, slot].sum(axis=0)
    return counts, table, truth
