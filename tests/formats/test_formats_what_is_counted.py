"""Arrays and lists whose names say that they hold some assignments alone, or something else than assignments."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Phase

COUNTS = np.random.default_rng(5).multinomial(60, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], size=(6, 2))
FIRST = COUNTS // 2


def written(folder, kind, **arrays):
    """The counts as arrays of a file, or as lists in the rows of one."""
    if kind == "array":
        np.savez(folder / "a.npz", **arrays)
        return folder / "a.npz"
    rows = [
        {"step": t, "layer": layer, **{name: each[t, layer].tolist() for name, each in arrays.items()}}
        for t in range(len(COUNTS))
        for layer in range(COUNTS.shape[1])
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "a.jsonl"


@pytest.mark.parametrize("kind", ["array", "csv"])
@pytest.mark.parametrize("name", ["top1_counts", "dropped_counts", "cache_miss_counts", "max_load", "predicted_load"])
def test_what_is_derived_from_counts_is_refused_alone_and_left_unread_beside_them(load, tmp_path, kind, name):
    with pytest.raises(InputError, match=f"{name}.*; counts themselves; is .* no word for it\\? rename it"):
        load(written(tmp_path, kind, **{name: FIRST}), kind)
    traces, notes = load(written(tmp_path, kind, **{name: FIRST, "expert_counts": COUNTS}), kind)
    assert (traces.counts == COUNTS).all() and f"{name} left unread" in notes


@pytest.mark.parametrize("kind", ["array", "csv"])
def test_counts_whose_name_says_more_are_doubted(load, tmp_path, kind):
    traces, notes = load(written(tmp_path, kind, remote_counts=COUNTS), kind)
    assert (traces.counts == COUNTS).all()
    assert "remote_counts taken for the assignments of experts: is it all of them?" in notes
    traces, notes = load(written(tmp_path, kind, top2_counts=COUNTS), kind)  # all, where tokens choose two
    assert (traces.counts == COUNTS).all() and "top2_counts taken for the assignments" in notes
    for name in (
        "counts",
        "counts_v2",
        "expert_counts",
        "tokens_per_expert",
        "topk_counts",
        "moe_layer_expert_load",
    ):
        assert "all of them" not in load(written(tmp_path, kind, **{name: COUNTS}), kind)[1]


@pytest.mark.parametrize("name", ["model.layers.{layer}.mlp.experts.{expert}", "blk.{layer}.ffn_gate_exps.weight"])
def test_columns_that_name_the_layer_and_expert_of_their_line_are_left_unread(load, tmp_path, name):
    def table(name):
        lines = [
            f"{t},{layer + 3},{expert},{COUNTS[t, layer, expert]},{name.format(layer=layer + 3, expert=expert)}"
            for t, layer, expert in np.ndindex(COUNTS.shape)
        ]
        (tmp_path / "a.csv").write_text("\n".join(["step,layer_id,expert_id,count,tensor", *lines]))
        return load(tmp_path / "a.csv", "csv")

    traces, notes = table(name)
    assert (traces.counts == COUNTS).all() and "times, results and names are left unread: tensor" in notes
    for other in ("blk.2{layer}.ffn_gate", "experts.{expert}7"):  # another layer, other experts
        with pytest.raises(InputError, match=r"tensor: got .* gemopt does not know the column"):
            table(other)


@pytest.mark.parametrize("kind", ["rows", "arrays"])
def test_tokens_that_name_fewer_experts_than_others_are_noted(load, tmp_path, kind):
    """As where those beyond the capacity of an expert were dropped, or lists were cut."""
    ids = np.random.default_rng(6).random((20, 2, 16)).argsort(axis=2)[..., :3]
    for few in (0, 7):
        ids[:few, :, 2] = -1
        if kind == "rows":
            rows = [{"step": 0, "layer": i, "topk_ids": ids[:, i].tolist()} for i in range(2)]
            (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
            traces, notes = load(tmp_path / "a.jsonl", "tokens", num_experts=16)
        else:
            np.save(tmp_path / "a.npy", ids)
            told = {"num_hidden_layers": 2, "num_experts": 16, "phase": Phase.MIXED}
            traces, notes = load(tmp_path / "a.npy", "tokens", **told)
        assert int(traces.counts.sum()) == 120 - 2 * few
        said = f"{2 * few} of 40 choices of tokens in a layer are of fewer than 3 experts: dropped, cut, or chosen so?"
        assert (said in notes) == (few > 0)
