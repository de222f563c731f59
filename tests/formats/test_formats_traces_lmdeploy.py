"""Dumps of LMDeploy's recorder: counts since the recording began, of all ranks together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError

COUNTS = routed(np.random.default_rng(2), steps=4, layers=3, experts=16)  # between one dump and the next
PASSES = (90, 100, 1000, 1020)  # as texts they come in another order


def dump(folder, kind, counts=COUNTS, rank=0):
    for step, total in zip(PASSES, counts.cumsum(axis=0), strict=True):
        if kind == "json":
            (folder / f"rank{rank}_step{step}_experts_counts.json").write_text(json.dumps(total.tolist(), indent=2))
            continue
        import torch

        found = torch.from_numpy(total)
        told = {"balancedness": found.float().mean(1) / found.max(), "total_tokens": found.sum(1)}
        path = folder / f"rank{rank}_step{step}_expert_counts.pt"
        torch.save({"counts": found, **told, "step": step, "rank": rank}, path)
    return folder


@pytest.mark.parametrize("kind", ["json", "pt"])
def test_dumps_are_what_came_since_the_one_before(load, folder, kind):
    if kind == "pt":
        pytest.importorskip("torch")
    traces, notes = load(dump(folder, kind), "lmdeploy", layer_ids=(1, 2, 3), num_hidden_layers=4)
    assert (traces.counts == COUNTS).all() and traces.layer_ids == (1, 2, 3)
    assert "from one dump to the next (forward passes 90, 100, 1000, 1020)" in notes
    assert "of a server with --enable-eplb these are physical experts" in notes
    _, notes = load(folder, "lmdeploy")
    assert "rows are MoE layers, read as layers 0 to 2: with dense layers, --layer-ids" in notes


def test_a_dump_alone_is_a_single_step(load, folder):
    dump(folder, "json")
    traces, _ = load(folder / "rank0_step1020_experts_counts.json", "lmdeploy")
    assert (traces.counts == COUNTS.sum(axis=0)).all() and traces.num_steps == 1


def test_the_first_dump_of_layers_that_had_begun_is_left_out(load, folder):
    dump(folder, "json")
    first = folder / "rank0_step1_experts_counts.json"
    first.write_text(json.dumps(COUNTS[0, :1].tolist()))
    traces, notes = load(folder, "lmdeploy")
    assert (traces.counts == COUNTS).all() and "(forward passes 90, 100, 1000, 1020)" in notes
    assert "rank0_step1_experts_counts.json holds 1 of 3 layers, within the first forward pass: left out" in notes
    first.rename(folder / "rank0_step2_experts_counts.json")
    with pytest.raises(InputError, match="import networks apart"):
        load(folder, "lmdeploy")


def test_dumps_that_are_not_of_one_recording(load, folder):
    dump(folder, "json")
    path = folder / "rank0_step1000_experts_counts.json"
    known = path.read_text()
    path.write_text(json.dumps(COUNTS[2].tolist()))
    with pytest.raises(InputError, match=r"counts below those of rank0_step100_.*import each recording apart"):
        load(folder, "lmdeploy")
    path.write_text(json.dumps(COUNTS[2, :2].tolist()))
    with pytest.raises(InputError, match=r"2 layers of 16 experts; 3 of 16, as in rank0_step90_"):
        load(folder, "lmdeploy")
    path.write_text(known)
    dump(folder, "json", rank=1)
    with pytest.raises(InputError, match="ranks 0, 1; dumps of one rank"):
        load(folder, "lmdeploy")
    with pytest.raises(InputError, match="--batch-size"):
        load(path, "lmdeploy", batch_size=8)
