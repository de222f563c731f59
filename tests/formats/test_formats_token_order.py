"""Rows of tokens without the number of a step: forward passes, by the order of their layers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gemopt.exceptions import InputError
from gemopt.traces import Phase

SIZES, LAYERS, EXPERTS = (9, 4, 1, 6), 3, 8
TOKENS = [np.random.default_rng(i).random((n, LAYERS, EXPERTS)).argsort(axis=2)[..., :2] for i, n in enumerate(SIZES)]
COUNTS = np.array([[np.bincount(ids[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for ids in TOKENS])
LISTS = [{"layer": i, "topk_ids": ids[:, i].tolist()} for ids in TOKENS for i in range(LAYERS)]
EACH = [{**row, "topk_ids": ids} for row in LISTS for ids in row["topk_ids"]]  # as llama.cpp's evaluation callback sees


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("rows", [LISTS, EACH])
@pytest.mark.parametrize("phase", [None, Phase.MIXED])
def test_passes_in_order(load, tmp_path, rows, phase):
    traces, notes = load(write(tmp_path / "a.jsonl", rows), "tokens", phase=phase)
    assert (traces.counts == COUNTS).all()
    assert "taken as what a forward pass computed, in this order" in notes
    assert "in one step" not in notes
    lines = [f"{row['layer']},{json.dumps(row['topk_ids']).replace(',', ' ')}" for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["layer_id,expert_ids", *lines]))
    assert (load(tmp_path / "a.csv", "tokens", phase=phase)[0].counts == COUNTS).all()


def test_rows_sorted_by_layer_are_doubted(load, tmp_path):
    traces, notes = load(write(tmp_path / "a.jsonl", sorted(EACH, key=lambda row: row["layer"])), "tokens")
    assert (traces.counts == COUNTS.sum(axis=0)).all()
    assert "20 tokens in one step: were the rows sorted by layer? then number the steps" in notes


def test_files_follow_each_other_or_hold_layers_of_their_own(load, tmp_path):
    for name, rows in (("a_0", LISTS[:6]), ("a_1", LISTS[6:])):
        write(tmp_path / f"{name}.jsonl", rows)
    traces, notes = load(tmp_path, "tokens")
    assert (traces.counts == COUNTS).all()
    assert "2 files, one after the other in time: a_0.jsonl to a_1.jsonl" in notes
    for layer in range(LAYERS):
        write(tmp_path / f"stage{layer}.jsonl", LISTS[layer::LAYERS])
    assert (load(sorted(tmp_path.glob("stage*")), "tokens")[0].counts == COUNTS).all()
    for rank in range(2):
        write(tmp_path / f"rank{rank}.jsonl", LISTS)
    with pytest.raises(InputError, match=r"rank0\.jsonl, rank1\.jsonl; steps that follow each other"):
        load(sorted(tmp_path.glob("rank*")), "tokens")


@pytest.mark.parametrize(
    "rows",
    [
        LISTS[:-1],
        [*LISTS, LISTS[0]],
        [{**row, "topk_ids": row["topk_ids"][i % 2 :]} for i, row in enumerate(LISTS)],
        [row for row in EACH if row["layer"] == 0],
        [{"layer": i, "topk_ids": ids[i].tolist()} for tokens in TOKENS for ids in tokens for i in range(LAYERS)],
        [{**row, "request": 3} for row in LISTS],
    ],
    ids=["cut", "begun", "other tokens", "one layer", "token after token", "of a request"],
)
def test_orders_that_do_not_tell_are_refused(load, tmp_path, rows):
    with pytest.raises(InputError, match="which tokens are computed together; number the steps"):
        load(write(tmp_path / "a.jsonl", rows), "tokens")


def test_steps_that_are_numbered_as_their_requests(load, tmp_path):
    rows = [{"batch_id": i // LAYERS, "request_id": i // LAYERS, **row} for i, row in enumerate(LISTS)]
    assert (load(write(tmp_path / "a.jsonl", rows), "tokens")[0].counts == COUNTS).all()
    rows[-1]["request_id"] = 7
    with pytest.raises(InputError, match="batch_id beside request_id; what the number counts"):
        load(write(tmp_path / "a.jsonl", rows), "tokens")


def test_tokens_at_the_ends_of_steps_that_choose_what_the_one_before_did_are_named(load, folder):
    """As those that fill a batch up to the size of its graph do; tokens that do so amid others explain few of them."""
    random = np.random.default_rng(4)
    steps = [random.random((int(n), 2, 16)).argsort(axis=2)[..., :2] for n in random.integers(5, 12, 12)]
    padded = [np.concatenate([ids, np.tile(ids[-1], (3, 1, 1))]) for ids in steps]
    mixed = [np.repeat(ids, 2, axis=0) for ids in steps]

    def notes(passes, together=True):
        rows = [
            {"step": t, "layer": layer, "topk_ids": each.tolist()}
            for t, ids in enumerate(passes)
            for layer in range(2)
            for each in (ids[None, :, layer] if together else ids[:, layer])
        ]
        (folder / "a.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
        return load(folder / "a.jsonl", "tokens", num_experts=16)[1]

    told = "at the ends of steps 36 tokens choose what the one before chose: padding, as of graphs?"
    assert told in notes(padded) and told in notes(padded, together=False)
    assert "padding" not in notes(steps) and "padding" not in notes(mixed)
    torch.save({layer: [torch.tensor(ids[:, layer]) for ids in padded] for layer in range(2)}, folder / "a.pt")
    (folder / "a.jsonl").unlink()
    assert told in load(folder / "a.pt", "tokens", num_experts=16)[1]
