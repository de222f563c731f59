"""Rows and arrays of tokens as loggers write them: experts in columns of their own, names of layers, lists beside."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Phase

EXPERTS, LAYERS, TOP_K, STEPS, TOKENS = 16, 3, 2, 5, 6
IDS = np.random.default_rng(0).random((STEPS, TOKENS, LAYERS, EXPERTS)).argsort(axis=3)[..., :TOP_K]
COUNTS = np.array([[np.bincount(step[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for step in IDS])
EACH = [(t, n, i) for t in range(STEPS) for n in range(TOKENS) for i in range(LAYERS)]


def rows(layer="{}", **more):
    """A row for each token and layer."""
    named = [layer.format(i) for _, _, i in EACH]
    each = [{"step": t, "layer": name, "token": n} for (t, n, _), name in zip(EACH, named, strict=True)]
    return [row | {key: tell(IDS[at]) for key, tell in more.items()} for row, at in zip(each, EACH, strict=True)]


def batches(**more):
    """A row for all tokens of a step and layer."""
    each = [(t, i) for t in range(STEPS) for i in range(LAYERS)]
    return [
        {"step": t, "layer": i, "topk_ids": IDS[t, :, i].tolist()} | {key: tell(t) for key, tell in more.items()}
        for t, i in each
    ]


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    "names",
    ["expert_0 expert_1", "expert1 expert2", "expert expert_2", "topk_ids[0] topk_ids[1]", "top1_expert top2_expert"],
)
def test_experts_of_a_token_in_columns_of_their_own(load, tmp_path, names):
    a, b = names.split()
    lines = [
        f"step,token,layer,{a},weight_0,{b}",
        *(f"{t},{n},{i},{IDS[t, n, i, 0]},0.5,{IDS[t, n, i, 1]}" for t, n, i in EACH),
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert (load(tmp_path / "a.csv", "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()
    (tmp_path / "a.csv").write_text("\n".join([f"step,layer,{a},{b}", "0,0,3,5"]))
    with pytest.raises(
        InputError, match=r"line 2: got .*; the number of the token in every row; .*--from csv reads counts"
    ):
        load(tmp_path / "a.csv", "tokens")


def test_columns_of_other_experts_are_not_left_unread(load, tmp_path):
    apart = rows(expert=lambda ids: int(ids[0]), second_expert=lambda ids: int(ids[1]))
    with pytest.raises(InputError, match="got second_expert; the experts of a token in one column; as a list"):
        load(write(tmp_path / "a.jsonl", apart), "tokens")
    gone = rows(expert_0=lambda ids: int(ids[0]), expert_1=lambda ids: "" if ids[1] == 3 else int(ids[1]))
    counted = load(write(tmp_path / "b.jsonl", gone), "tokens", num_experts=EXPERTS)[0].counts
    assert (counts_without(3) == counted).all()


def counts_without(expert):
    """Counts where the second choice of a token, if it is `expert`, is none."""
    counts = COUNTS.copy()
    for t, _, i in (at for at in EACH if IDS[at][1] == expert):
        counts[t, i, expert] -= 1
    return counts


@pytest.mark.parametrize("name", ["expert", "expert_id"])
def test_lists_in_a_column_that_names_one_expert(load, tmp_path, name):
    lines = [{"step": t, "layer": i, name: IDS[t, n, i].tolist()} for t, n, i in EACH]
    assert (load(write(tmp_path / "a.jsonl", lines), "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()
    alone = [{"step": 0, "layer": 0, name: 3}, *lines]  # of any number for each row
    counts = load(write(tmp_path / "b.jsonl", alone), "tokens", num_experts=EXPERTS)[0].counts
    assert counts.sum() == COUNTS.sum() + 1 and counts[0, 0, 3] == COUNTS[0, 0, 3] + 1


@pytest.mark.parametrize("cell", ["9" * 400, ["9" * 400], [1e300], [True, False], ["x"], [None, 1], {"a": 1}])
def test_cells_that_are_no_experts(load, tmp_path, cell):
    path = write(tmp_path / "a.jsonl", [{"step": 0, "layer": 0, "topk_ids": cell}])
    with pytest.raises(InputError, match=r"line 1: topk_ids: got .*experts"):
        load(path, "tokens")


@pytest.mark.parametrize("tell", [lambda ids: [str(e) for e in ids], lambda ids: [float(e) for e in ids]])
def test_experts_as_texts_or_with_a_point(load, tmp_path, tell):
    path = write(tmp_path / "a.jsonl", rows(topk_ids=tell))
    assert (load(path, "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()


@pytest.mark.parametrize(
    "layer",
    ["model.language_model.layers.{}.mlp.gate", "transformer.blocks.{}.ffn", "blk.{}.ffn_gate_inp", "L{}", "Layer {}"],
)
def test_names_of_layers(load, tmp_path, layer):
    traces = load(write(tmp_path / "a.jsonl", rows(layer, topk_ids=np.ndarray.tolist)), "tokens")[0]
    assert (traces.counts[..., : traces.num_experts] == COUNTS[..., : traces.num_experts]).all()
    assert traces.layer_ids == (0, 1, 2)


def test_layers_that_number_their_own_are_refused(load, tmp_path):
    both = [
        *rows("decoder.layers.{}", topk_ids=np.ndarray.tolist),
        *rows("encoder.layers.{}", topk_ids=np.ndarray.tolist),
    ]
    with pytest.raises(InputError, match=r"layer: got encoder.layers.0; layers after decoder.layers., as in the rows"):
        load(write(tmp_path / "a.jsonl", sorted(both, key=lambda row: row["step"])), "tokens")
    for name in ("mtp.layers.{}", "encoder.block.{}.layer.1"):
        with pytest.raises(InputError, match="a whole number from 0"):
            load(write(tmp_path / "a.jsonl", rows(name, topk_ids=np.ndarray.tolist)), "tokens")


@pytest.mark.parametrize("name", ["counts", "num_tokens", "tokens_per_expert", "hits", "group_sizes", "n"])
def test_lists_of_how_many_chose_each_expert_are_refused(load, tmp_path, name):
    used = [(t, i, np.flatnonzero(COUNTS[t, i])) for t in range(STEPS) for i in range(LAYERS)]
    lines = [{"step": t, "layer": i, "experts": e.tolist(), name: COUNTS[t, i, e].tolist()} for t, i, e in used]
    with pytest.raises(InputError, match=rf"line 1: {name}: got \[.*no count of each; .*--from csv"):
        load(write(tmp_path / "a.jsonl", lines), "tokens")
    texts = [f'{r["step"]},{r["layer"]},"{r["experts"]}","{r[name]}"' for r in lines]
    (tmp_path / "a.csv").write_text("\n".join([f"step,layer,experts,{name}", *texts]))
    with pytest.raises(InputError, match=rf"line 2: {name}: got \["):
        load(tmp_path / "a.csv", "tokens")


def test_lists_of_the_tokens_are_taken(load, tmp_path):
    more = {
        "tokens": lambda t: list(range(TOKENS)),
        "origin_rows": lambda t: [2] * TOKENS,
        "num_tokens": lambda t: TOKENS,
    }
    weights = {"topk_weights": lambda t: [[0.5, 0.0]] * TOKENS}
    path = write(tmp_path / "a.jsonl", batches(**more, **weights))
    assert (load(path, "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()


def test_weights_in_columns_of_their_own(load, tmp_path):
    apart = rows(expert_0=lambda ids: int(ids[0]), expert_1=lambda ids: int(ids[1]), weight_0=lambda ids: 1.0)
    lines = [row | {"weight_1": 0.0} for row in apart]  # the first expert has all
    assert (load(write(tmp_path / "a.jsonl", lines), "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()
    text = "\n".join(",".join(map(str, row.values())) for row in lines)
    (tmp_path / "a.csv").write_text(",".join(lines[0]) + "\n" + text)
    assert (load(tmp_path / "a.csv", "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()
    lines[7]["weight_0"] = 0.0
    with pytest.raises(InputError, match="line 8: weight_0 and weight_1: got a token of no weight"):
        load(write(tmp_path / "a.jsonl", lines), "tokens")
    mixed = batches(weights=lambda t: [[0.5, 0.5]] * (TOKENS - 1) + [None])
    assert (load(write(tmp_path / "b.jsonl", mixed), "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()


def test_other_numbers_beside_steps_and_texts_change_nothing(load, tmp_path):
    more = {"pass": lambda t: True, "timestep": lambda t: 0.1 * t, "text": lambda t: "slot"}
    sizes = {"batch_size": lambda t: TOKENS, "seq_len": lambda t: 1}
    path = write(tmp_path / "a.jsonl", batches(**more, **sizes))
    assert (load(path, "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()
    numbered = [{"pass" if key == "step" else key: cell for key, cell in row.items()} for row in batches()]
    assert (load(write(tmp_path / "b.jsonl", numbered), "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()
    right = [{"request": row.pop("step")} | row for row in rows(topk_ids=np.ndarray.tolist, **{"pass": lambda ids: 1})]
    replayed = load(write(tmp_path / "c.jsonl", right), "tokens", num_experts=EXPERTS, phase=Phase.MIXED)[0]
    assert len(replayed.counts) == TOKENS
    padded = batches(num_tokens=lambda t: 2, batch_size=lambda t: TOKENS // 2)
    with pytest.raises(InputError, match="num_tokens: got 2; the 6 whose experts are listed; padded"):
        load(write(tmp_path / "d.jsonl", padded), "tokens")


def test_tokens_of_no_weight_are_refused(load, tmp_path):
    with pytest.raises(InputError, match=r"line 1: topk_weights: got a token of no weight; .*padding"):
        load(
            write(tmp_path / "a.jsonl", rows(topk_ids=np.ndarray.tolist, topk_weights=lambda ids: [0.0, 0.0])), "tokens"
        )
    padded = batches(probs=lambda t: [[0.5, 0.5]] * (TOKENS - 1) + [[0.0, 0.0]])
    with pytest.raises(InputError, match="line 1: probs: got a token of no weight"):
        load(write(tmp_path / "a.jsonl", padded), "tokens")
    for row in padded:
        row["topk_ids"][-1] = [-1, -1]  # said to be none
    kept = np.array([[np.bincount(step[:-1, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for step in IDS])
    assert (load(write(tmp_path / "a.jsonl", padded), "tokens", num_experts=EXPERTS)[0].counts == kept).all()
    (tmp_path / "a.csv").write_text(
        'step,layer,token,topk_ids,w_weights\n0,0,0,"[1, 2]","[0.5, 0.5]"\n0,0,1,"[3, 4]","[0.0, 0.0]"'
    )
    with pytest.raises(InputError, match="line 3: w_weights: got a token of no weight"):
        load(tmp_path / "a.csv", "tokens")


def test_the_same_tokens_twice_in_a_step_are_refused(load, tmp_path):
    again = [row for row in batches() for _ in range(2)]
    with pytest.raises(InputError, match=r"line 2: got the experts of 6 tokens again; .*ranks that saw the same"):
        load(write(tmp_path / "a.jsonl", again), "tokens")
    made_up = [{"step": 0, "layer": 0, "topk_ids": [[1, 2]] * 8}] * 2  # a warm-up in two parts
    assert load(write(tmp_path / "b.jsonl", made_up), "tokens")[0].counts.sum() == 32


@pytest.mark.parametrize("orient", ["index", "columns"])
def test_data_frames_with_lists(load, tmp_path, orient):
    each = {str(n): row for n, row in enumerate(batches())}
    turned = {name: {n: row[name] for n, row in each.items()} for name in each["0"]}
    (tmp_path / "a.json").write_text(json.dumps(each if orient == "index" else turned))
    assert (load(tmp_path / "a.json", "tokens", num_experts=EXPERTS)[0].counts == COUNTS).all()


def test_arrays_that_cut_the_tokens_or_give_them_no_weight(load, tmp_path):
    ids, options = IDS.reshape(-1, LAYERS, TOP_K), {"num_hidden_layers": LAYERS, "phase": Phase.MIXED}
    path, sizes = tmp_path / "a.npz", np.array([6, 4, 8, 12])
    for name, array in (("query_start_loc", np.cumsum([0, *sizes])), ("splits", sizes), ("num_tokens", sizes)):
        np.savez(path, topk_ids=ids, **{name: array})
        with pytest.raises(InputError, match=f"{name}: got beside the experts; .*a file for each sequence"):
            load(path, "tokens", **options)
    weights = np.full(ids.shape, 0.5)
    np.savez(path, topk_ids=ids, topk_weights=weights, token_ids=np.arange(len(ids)) % 7, moments=np.arange(4))
    assert load(path, "tokens", **options)[0].counts.sum() == ids.size
    weights[20:] = 0
    np.savez(path, topk_ids=ids, topk_weights=weights)
    with pytest.raises(InputError, match=r"topk_weights\[20, 0\]: got a token of no weight"):
        load(path, "tokens", **options)


def test_requests_whose_tokens_repeat_at_an_end_are_named(load, tmp_path):
    ids = np.random.default_rng(1).random((20, LAYERS, EXPERTS)).argsort(axis=2)[..., :TOP_K]
    for place, told in ((slice(11, None), "at the ends of sequences 8 tokens"), (slice(9), "where sequences begin 8")):
        padded = ids.copy()
        padded[place] = [1, 2]
        lines = [{"token": n, "layer": i, "experts": padded[n, i].tolist()} for n, i in np.ndindex(20, LAYERS)]
        assert told in load(write(tmp_path / "a.jsonl", lines), "tokens", phase=Phase.MIXED)[1]
    lines = [{"token": n, "layer": i, "experts": ids[n, i].tolist()} for n, i in np.ndindex(20, LAYERS)]
    assert "padding" not in load(write(tmp_path / "a.jsonl", lines), "tokens", phase=Phase.MIXED)[1]


SIZES = (6, 3, 5)
PASSES = [np.random.default_rng(n).random((n, LAYERS, EXPERTS)).argsort(axis=2)[..., :TOP_K] for n in SIZES]
OF_PASSES = np.array([[np.bincount(ids[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for ids in PASSES])


@pytest.mark.parametrize("name", ["model.layers.{}.mlp.gate", "layer_{}", 0])
def test_lists_of_forward_passes_as_hooks_keep_them(load, tmp_path, name):
    torch = pytest.importorskip("torch")
    keys = [name.format(3 + i) if name else 3 + i for i in range(LAYERS)]
    parts = [[torch.tensor(ids[:, i]) for i in range(LAYERS)] for ids in PASSES]
    by_layer = {key: [each[i] for each in parts] for i, key in enumerate(keys)}
    by_pass = [dict(zip(keys, each, strict=True)) for each in parts]
    for data in (by_layer, by_pass):
        torch.save(data, tmp_path / "a.pt")
        traces, notes = load(tmp_path / "a.pt", "tokens", num_experts=EXPERTS)
        assert (traces.counts == OF_PASSES).all() and traces.layer_ids == (3, 4, 5) and traces.top_k == TOP_K
        assert "a list is one of forward passes" in notes
    with pytest.raises(InputError, match="--phase: got decode; does not apply to parts"):
        load(tmp_path / "a.pt", "tokens", phase=Phase.DECODE)


@pytest.mark.parametrize(("name", "told"), [("mtp_0", "mtp_0"), (None, "nothing")])
def test_forward_passes_of_other_layers_are_not_left_out(load, tmp_path, name, told):
    torch = pytest.importorskip("torch")
    passes = [{"layer_0": torch.tensor(IDS[t, :, 0])} for t in range(STEPS)]
    torch.save([*passes, {name: torch.tensor(IDS[0, :, 0])} if name else {}], tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"pass {STEPS}: got {told}; layer_0, as in the first; leave the others out"):
        load(tmp_path / "a.pt", "tokens")


def test_lists_that_nothing_tells_from_other_lists_are_refused(load, tmp_path):
    torch = pytest.importorskip("torch")
    same = {i: [torch.tensor(PASSES[0][:, i])] * 2 for i in range(LAYERS)}  # of layers for each step?
    short = {f"layer_{i}": [torch.tensor(ids[:, i]) for ids in PASSES[: 3 - i // 2]] for i in range(LAYERS)}
    mixed = {f"layer_{i}": [torch.tensor(ids[: 3 + i, i]) for ids in PASSES] for i in range(LAYERS)}
    masks = {
        f"layer_{i}": [torch.eye(EXPERTS, dtype=torch.int64)[ids[:, i, 0]] for ids in PASSES] for i in range(LAYERS)
    }
    for data, words in (
        (same, "one array called topk_ids"),
        (short, "got layers of 2 and of 3 passes"),
        (mixed, "the same tokens in all layers of a step"),
        (masks, "got an expert twice, or none"),
    ):
        torch.save(data, tmp_path / "a.pt")
        with pytest.raises(InputError, match=words):
            load(tmp_path / "a.pt", "tokens", phase=Phase.MIXED)


def test_arrays_of_layers_with_weights_beside_or_among_them(load, tmp_path):
    torch = pytest.importorskip("torch")
    ids = np.concatenate(PASSES)
    layers, weights = [torch.tensor(ids[:, i]) for i in range(LAYERS)], torch.rand(len(ids), TOP_K)
    beside = {f"layer_{i}": each for i, each in enumerate(layers)} | {
        f"layer_{i}_weights": weights for i in range(LAYERS)
    }
    among = {f"layer_{i}": {"topk_ids": each, "topk_weights": weights} for i, each in enumerate(layers)}
    for data in (beside, among):
        torch.save(data, tmp_path / "a.pt")
        traces, notes = load(tmp_path / "a.pt", "tokens", num_experts=EXPERTS, phase=Phase.MIXED)
        assert (traces.counts.sum(axis=0) == OF_PASSES.sum(axis=0)).all() and "weights left unread" in notes
    weights[7] = 0
    for data in (beside, among):
        torch.save(data, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"weights\[7\]: got a token of no weight"):
            load(tmp_path / "a.pt", "tokens", num_experts=EXPERTS, phase=Phase.MIXED)
    torch.save({name: each | {"physical_ids": weights} for name, each in among.items()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="physical_ids: got beside the experts"):
        load(tmp_path / "a.pt", "tokens", phase=Phase.MIXED)
