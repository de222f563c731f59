"""Counts of slots beside the expert in each of them become counts of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError
from gemopt.traces import Traces

COUNTS = routed(np.random.default_rng(3), steps=6, layers=4)
REDUNDANT = np.tile([*range(16), 5, 2, 9, 5], (4, 1))  # [L, P]
REDUNDANT[1] = REDUNDANT[1, ::-1]


def slots(counts, table):
    """[T, L, P] counts of slots, those of an expert shared out among its copies; table [T, L, P]."""
    found = np.zeros(table.shape, int)
    for at in np.ndindex(counts.shape):
        copies = np.flatnonzero(table[at[:2]] == at[2])
        found[(*at[:2], copies)] = [len(part) for part in np.array_split(np.arange(counts[at]), len(copies))]
    return found


@pytest.mark.parametrize("names", [("counts", "physical_to_logical_map"), ("expert_load_pass", "phy2log")])
def test_arrays(load, tmp_path, names):
    table = np.tile(REDUNDANT, (6, 1, 1))
    table[3:] = REDUNDANT[:, ::-1]  # experts moved
    for given in (REDUNDANT, table, REDUNDANT[0]):
        loads = slots(COUNTS, np.broadcast_to(given, table.shape))
        np.savez(tmp_path / "a.npz", **{names[0]: loads, names[1]: given})
        traces, notes = load(tmp_path / "a.npz", "array")
        assert (traces.counts == COUNTS).all()
        assert f"a.npz: {names[0]} of slots became those of experts by {names[1]}, copies added up" in notes


def test_load_statistics_of_vllm_forks(load, tmp_path):
    """vLLM's pull request 41141: a line with the network, then the loads of slots and the expert in each, by step."""
    table = np.stack([REDUNDANT if t < 3 else REDUNDANT[:, ::-1] for t in range(6)])
    head = {"record_type": "eplb_load_meta", "version": 1, "model": "m", "num_ranks": 2, "num_layers": 4}
    rows = [
        {"record_type": "eplb_load_stats", "version": 1, "step": 5 * t, "num_ranks": 2, "expert_load": load.tolist()}
        | {"p2l_map": at.tolist()}
        for t, (load, at) in enumerate(zip(slots(COUNTS, table), table, strict=True))
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [head, *rows])))
    traces, notes = load(tmp_path / "a.jsonl", "array")
    assert (traces.counts == COUNTS).all() and "1 row without counts left unread" in notes
    order = np.random.default_rng(0).permutation(16)
    for row, counts in zip(rows, COUNTS, strict=True):  # without copies, but moved: of this record it is known
        row.update(expert_load=counts[:, order].tolist(), p2l_map=[order.tolist()] * 4)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (load(tmp_path / "a.jsonl", "array")[0].counts == COUNTS).all()


def test_one_map_beside_all_rows(load, tmp_path):
    loads = slots(COUNTS, np.tile(REDUNDANT, (6, 1, 1)))
    rows = [{"step": t, "window_expert_load": each.tolist()} for t, each in enumerate(loads)]
    document = {"physical_to_logical_map": REDUNDANT.tolist(), "load_history": rows}
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert (load(tmp_path / "a.json", "array")[0].counts == COUNTS).all()


def test_counts_that_are_said_to_be_of_experts_stay(load, tmp_path):
    np.savez(tmp_path / "a.npz", logical_count=COUNTS, physical_to_logical_map=REDUNDANT)
    assert (load(tmp_path / "a.npz", "array")[0].counts == COUNTS).all()
    np.savez(tmp_path / "a.npz", expert_load=COUNTS, p2l=np.arange(16))
    assert (load(tmp_path / "a.npz", "array")[0].counts == COUNTS).all()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.arange(16)[::-1], "p2l beside counts.*counts of slots.*call them physical_count"),
        (np.arange(20), r"p2l \[20\] beside counts"),
        (np.full((4, 16), 0), "every layer needs every expert"),
        (np.append(np.arange(15), -1), "every layer needs every expert"),
        (np.arange(16) // 2 * 2, "every layer needs every expert"),
    ],
)
def test_maps_that_do_not_tell_are_refused(load, tmp_path, table, words):
    np.savez(tmp_path / "a.npz", expert_load=COUNTS, p2l=table)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.npz", "array")


@pytest.mark.parametrize("name", ["experts", "expert_placement", "slot_map"])
def test_maps_under_other_names_are_told_by_their_numbers(load, tmp_path, name):
    table = np.tile(REDUNDANT, (6, 1, 1))
    for each in (REDUNDANT, REDUNDANT[0]):
        np.savez(tmp_path / "a.npz", counts=slots(COUNTS, table), **{name: each})
        for read in (lambda: load(tmp_path / "a.npz", "array"), lambda: Traces.load(tmp_path / "a.npz")):
            with pytest.raises(InputError, match=f"{name} beside counts"):
                read()
    np.savez(tmp_path / "a.npz", counts=COUNTS, expert_device=np.arange(16) // 4, expert_cluster=[*range(15), 3])
    assert (load(tmp_path / "a.npz", "array")[0].counts == COUNTS).all()
