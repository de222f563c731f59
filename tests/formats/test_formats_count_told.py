"""Columns of count tables that have one value: heeded, or refused where they say that the counts are others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError

COUNTS = routed(np.random.default_rng(7), steps=3, layers=2, experts=8)


def table(path, **more):
    cells = [(t, i, e, COUNTS[t, i, e]) for t in range(3) for i in range(2) for e in range(8)]
    lines = [",".join(map(str, (*cell, *more.values()))) for cell in cells]
    path.write_text("\n".join([",".join(["step,layer,expert,count", *more]), *lines]))
    return path


def test_the_number_of_experts_and_of_those_of_a_token(load, tmp_path):
    path = table(tmp_path / "a.csv", num_experts=12, topk="2.0")
    traces, notes = load(path, "csv")
    assert traces.num_experts == 12 and (traces.counts[..., :8] == COUNTS).all() and traces.top_k == 2
    assert "highest id" not in notes and "topk" not in notes
    with pytest.raises(InputError, match="--num-experts: got 8; 12, as the tables say"):
        load(path, "csv", num_experts=8)
    with pytest.raises(InputError, match="experts 0 to 5"):
        load(table(tmp_path / "a.csv", num_experts=6), "csv")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_physical_experts": 10}, "counts of logical experts"),
        ({"replica_id": 1}, "counts of logical experts"),
        ({"scale": 0.5}, "do to the counts what it says"),
        ({"sampling_rate": 0.1}, "do to the counts what it says"),
        ({"is_warmup": True}, "do to the counts what it says"),
    ],
)
def test_columns_that_say_that_counts_are_others(load, tmp_path, more, words):
    (name,) = more
    with pytest.raises(InputError, match=f"{name}: got .*{words}"):
        load(table(tmp_path / "a.csv", **more), "csv")
    rows = [{"step": t, "layer": i, "counts": COUNTS[t, i].tolist(), **more} for t in range(3) for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=f"{name} beside counts"):
        load(tmp_path / "a.jsonl", "csv")


@pytest.mark.parametrize("more", [{"num_redundant_experts": 0}, {"scale": 1.0}, {"valid": True}, {"is_warmup": False}])
def test_columns_that_change_nothing_are_taken(load, tmp_path, more):
    traces, _ = load(table(tmp_path / "a.csv", **more), "csv")
    assert (traces.counts == COUNTS).all()


def test_loads_of_slots_with_their_map(load, tmp_path):
    """vLLM's pull request 41141: `p2l_map` says which expert each slot holds."""
    rows = [{"step": t, "expert_load": [[*row, row[0]] for row in COUNTS[t].tolist()], "p2l_map": [[*range(8), 0]] * 2}
            for t in range(3)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="p2l_map beside counts; counts of logical experts"):
        load(tmp_path / "a.jsonl", "array")
