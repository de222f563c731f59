"""Rows of tokens: what columns beside the experts say, and a row for each expert of a token."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Phase

EXPERTS, LAYERS, TOP_K, STEPS, TOKENS = 16, 3, 2, 5, 4
IDS = np.random.default_rng(0).random((STEPS, TOKENS, LAYERS, EXPERTS)).argsort(axis=3)[..., :TOP_K]
COUNTS = np.array([[np.bincount(step[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for step in IDS])
EACH = [(t, n, i) for t in range(STEPS) for n in range(TOKENS) for i in range(LAYERS)]


def rows(**more):
    return [
        {"step": t, "layer": i, "topk_ids": IDS[t, n, i].tolist()}
        | {k: v(t, n) if callable(v) else v for k, v in more.items()}
        for t, n, i in EACH
    ]


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"is_padding": lambda t, n: n == 3}, "got is_padding false, true; .*leave out the rows that do not count"),
        ({"valid": lambda t, n: int(n < 3)}, "got valid 0, 1"),
        ({"is_warmup": lambda t, n: t < 2}, "got is_warmup"),
        ({"is_draft": lambda t, n: n > 1}, "got is_draft false, true"),
        ({"model": lambda t, n: f"m{n % 2}"}, "got model m0, m1; .*import each network apart"),
        ({"pid": lambda t, n: 4000 + n}, "got pid 4000, 4001, 4002, 4003; .*every token once; import one of those"),
        ({"dropped": lambda t, n: n == 0}, "got dropped"),
        ({"count": lambda t, n: n + 1}, "line 4: count: got 2; rows that count once"),
        ({"num_experts": 8}, "experts 0 to 7"),
        ({"num_experts": lambda t, n: 16 + 16 * t}, "num_experts: got 16, 32, 48, 64, 80; one number"),
        ({"top_k": 8}, "experts: got 2 of a token; 8, as top_k says"),
        ({"id_space": "physical"}, "line 1: id_space: got physical; logical experts"),
    ],
)
def test_columns_that_say_that_rows_count_otherwise_are_refused(load, tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.jsonl", rows(**more)), "tokens")


def test_columns_that_change_nothing_are_taken(load, tmp_path):
    more = {
        "is_padding": False,
        "valid": 1,
        "loss_mask": lambda t, n: n % 2,
        "count": 1,
        "num_tokens": TOKENS,
        "model": "m",
        "pid": 4000,
        "num_accepted": lambda t, n: n,
        "topk_scale": [0.5, 0.5],
    }
    path = write(tmp_path / "a.jsonl", rows(num_experts=32, num_experts_per_tok=2, **more))
    traces, notes = load(path, "tokens")
    assert traces.num_experts == 32 and (traces.counts[..., :EXPERTS] == COUNTS).all() and traces.top_k == 2
    assert "is_padding" in notes and "num_experts" not in notes and "highest id" not in notes
    with pytest.raises(InputError, match="num_experts: got 32, 64; one number; --num-experts is 64"):
        load(path, "tokens", num_experts=64)


def test_a_row_for_each_expert_of_a_token(load, tmp_path):
    lines = [f"{n},{t},{i},{e},0.5" for t, n, i in EACH for e in IDS[t, n, i]]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["token_idx,step,layer_idx,expert_id,weight", *lines]))
    traces, notes = load(path, "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all() and traces.top_k == TOP_K and "weight left unread" in notes
    path.write_text("\n".join(["step,layer,expert", *(line[2:].removesuffix(",0.5") for line in lines)]))
    traces, _ = load(path, "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all() and traces.top_k is None
    single = [
        {"request": t, "token": n, "layer": i, "expert": int(e)} for k in range(TOP_K) for t, n, i in EACH
        for e in IDS[t, n, i, k : k + 1]
    ]  # fmt: skip
    traces, _ = load(write(tmp_path / "b.jsonl", single), "tokens", phase=Phase.MIXED, num_experts=EXPERTS)
    together = IDS.transpose(1, 0, 2, 3)  # the n-th tokens of all requests are computed together
    counts = [[np.bincount(step[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for step in together]
    assert (traces.counts == counts).all() and traces.top_k == TOP_K
    with pytest.raises(InputError, match="one twice for a token in a layer"):
        load(write(tmp_path / "b.jsonl", [*single, single[0]]), "tokens", phase=Phase.MIXED)


def test_rows_by_expert_that_are_no_choices_are_refused(load, tmp_path):
    cells = [{"step": t, "layer": i, "expert": e} for t in range(STEPS) for i in range(LAYERS) for e in range(EXPERTS)]
    shares = [{**cell, "prob": 0.25} for cell in cells]
    with pytest.raises(InputError, match=r"each once in a step and layer; .*number the tokens"):
        load(write(tmp_path / "a.jsonl", shares), "tokens")
    tokens = [{**cell, "token": 0, "prob": 0.25} for cell in cells]
    with pytest.raises(InputError, match="all 16 of every token"):
        load(write(tmp_path / "a.jsonl", tokens), "tokens")
    counted = [{**cell, "hits": 3} for cell in cells]
    with pytest.raises(InputError, match=r"hits: got 3; rows that count once; .*--from csv"):
        load(write(tmp_path / "a.jsonl", counted), "tokens")
    events = [{**row, "event": "miss" if row["expert"] < 3 else "hit"} for row in tokens]
    with pytest.raises(InputError, match="got event hit, miss"):
        load(write(tmp_path / "a.jsonl", events), "tokens")
    ranked = [{**row, "topk_ids": [*range(EXPERTS)]} for row in rows()]
    with pytest.raises(InputError, match="all 16 of every token"):
        load(write(tmp_path / "a.jsonl", ranked), "tokens")


def test_files_of_ranks_that_saw_the_same_tokens_count_once(load, tmp_path):
    """Files are requests where no column numbers these; the same tokens in two files are those of one."""
    own = [
        [{"token": n, "layer": i, "topk_ids": IDS[t, n, i].tolist()} for n in range(TOKENS) for i in range(LAYERS)]
        for t in (0, 1)
    ]
    files = [write(tmp_path / f"rank{r}.jsonl", own[0]) for r in range(2)]
    one = [[np.bincount(IDS[0, n, i], minlength=EXPERTS) for i in range(LAYERS)] for n in range(TOKENS)]
    traces, notes = load(files, "tokens", phase=Phase.MIXED, num_experts=EXPERTS)
    assert (traces.counts == one).all() and "rank1.jsonl has the tokens of rank0.jsonl: counted once" in notes
    write(files[1], own[1])
    both = COUNTS[:2].sum(axis=0)
    traces, notes = load(files, "tokens", phase=Phase.MIXED, num_experts=EXPERTS)
    assert (traces.counts.sum(axis=0) == both).all() and "2 requests replayed" in notes
    asked = [write(tmp_path / f"rank{r}.jsonl", [{"request": 0, **row} for row in own[0]]) for r in range(2)]
    with pytest.raises(InputError, match=r"token twice in a layer; .*ranks that saw the same tokens\? import one"):
        load(asked, "tokens", phase=Phase.MIXED)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mask": [1.0, 1.0, 1.0, 0.0]}, "got mask 0, 1"),
        ({"is_padding": "[False, False, False, True]"}, "got is_padding false, true"),
        ({"expert_offset": 8}, "expert_offset: got 8; .*add it to the experts"),
        (
            {"num_tokens": lambda t: TOKENS - t // 4},
            "line 13: num_tokens: got 3; the 4 whose experts are listed; padded",
        ),
        ({"num_actual_tokens": 2}, "line 1: num_actual_tokens: got 2; the 4 whose experts"),
        ({"global_rank": lambda t: t % 2}, "global_rank: got 1; 0, tokens of all ranks"),
    ],
)
def test_rows_of_several_tokens_of_which_some_do_not_count_are_refused(load, tmp_path, more, words):
    lines = [
        {"step": t, "layer": i, "topk_ids": IDS[t, :, i].tolist()}
        | {name: value(t) if callable(value) else value for name, value in more.items()}
        for t in range(STEPS) for i in range(LAYERS)
    ]  # fmt: skip
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.jsonl", lines), "tokens")


def test_lengths_settings_and_lines_without_experts_are_no_flags(load, tmp_path):
    more = {
        "pad_len": lambda t, n: n, "ignore_eos": lambda t, n: n == 1, "local_rank": 0, "num_experts": "32.0",
        "mask": [1, 1],
    }  # fmt: skip
    lines = [{"padding": True, "top_k": 2}, *rows(padding=False, **more), {"summary": "all", "count": 500}]
    traces, notes = load(write(tmp_path / "a.jsonl", lines), "tokens")
    assert (traces.counts[..., :EXPERTS] == COUNTS).all() and traces.num_experts == 32
    assert "rows of local_rank 0 alone" in notes and "2 rows without experts" in notes
    each = [
        {"step": t, "token": n, "layer": i, "expert": int(e), "type": "decode" if n else "prefill", "event": "routed"}
        for t, n, i in EACH for e in IDS[t, n, i]
    ]  # fmt: skip
    traces, _ = load(write(tmp_path / "a.jsonl", [*each, {"event": "end"}]), "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all()


def test_devices_that_hold_layers_of_their_own_are_no_several_processes(load, tmp_path):
    """As accelerate's device_map puts them."""
    lines = [{**row, "device": f"cuda:{row['layer'] // 2}"} for row in rows()]
    traces, notes = load(write(tmp_path / "a.jsonl", lines), "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all() and "device left unread" in notes
