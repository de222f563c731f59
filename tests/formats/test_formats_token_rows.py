"""Rows with the experts of tokens, as loggers of routers write them; counts must equal the truth."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from cli_inputs import gemopt

from gemopt.exceptions import InputError
from gemopt.traces import Phase, Traces

EXPERTS, LAYERS, TOP_K, PROMPT = 8, 3, 2, 4
SIZES = (7, 5, 9)  # tokens of a step, or of a request
TOKENS = [
    np.random.default_rng(i).random((n, LAYERS, EXPERTS)).argsort(axis=2)[..., :TOP_K] for i, n in enumerate(SIZES)
]
COUNTS = np.array([[np.bincount(ids[:, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for ids in TOKENS])
EACH = [(t, n, i) for t, ids in enumerate(TOKENS) for n in range(len(ids)) for i in range(LAYERS)]


def rows(step="step", token="token", ids="topk_ids", first=3, **more):
    """A row for each token and layer."""
    return [
        {step: t, token: n, "layer": first + i, ids: TOKENS[t][n, i].tolist(), "topk_weights": [0.5, 0.5], **more}
        for t, n, i in EACH
    ]


def decoded(first=0):
    """[T, L, E] of requests that are all in flight."""
    counts = np.zeros((max(SIZES) - first, LAYERS, EXPERTS), int)
    for t, n, i in EACH:
        if n >= first:
            counts[n - first, i] += np.bincount(TOKENS[t][n, i], minlength=EXPERTS)
    return counts


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_steps_that_are_numbered(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"type": "meta", "top_k": TOP_K}, *rows(step="batch_id")])
    traces, notes = load(path, "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all() and traces.layer_ids == (3, 4, 5) and traces.top_k == TOP_K
    assert "1 row without experts left unread" in notes and "topk_weights" in notes
    together = [
        {"iteration": 5 * t, "layer": i, "topk_experts": ids[:, i].tolist()}
        for t, ids in enumerate(TOKENS) for i in range(LAYERS)
    ]  # fmt: skip
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write("\n".join(map(json.dumps, together)))
    assert (load(tmp_path / "b.jsonl.gz", "tokens")[0].counts == COUNTS).all()
    (tmp_path / "c.json").write_text(json.dumps({"model": "m", "routes": together}))
    assert (load(tmp_path / "c.json", "tokens")[0].counts == COUNTS).all()
    columns = {name: {str(n): row[name] for n, row in enumerate(together)} for name in together[0]}
    (tmp_path / "d.json").write_text(json.dumps(columns))  # as pandas writes them
    assert (load(tmp_path / "d.json", "tokens")[0].counts == COUNTS).all()
    for sign, pair in ((", ", "[]"), (" ", "[]"), (", ", "()")):
        cells = ["".join((pair[0], sign.join(str(ids) for ids in r["topk_experts"]), pair[1])) for r in together]
        table = [f'{r["iteration"]},{r["layer"]},"{cell}"' for r, cell in zip(together, cells, strict=True)]
        (tmp_path / "e.csv").write_text("\n".join(["step,layer,topk_ids", *table]))
        assert (load(tmp_path / "e.csv", "tokens")[0].counts == COUNTS).all()
    (tmp_path / "e.csv").write_text('step,layer,topk_ids\n0,3,"[[1 2] ... [3 4]]"')
    with pytest.raises(InputError, match=r"line 2: topk_ids: got \[\[1 2\] \.\.\."):
        load(tmp_path / "e.csv", "tokens")
    layers = [write(tmp_path / f"layer_{i}.jsonl", [r for r in together if r["layer"] == i]) for i in range(LAYERS)]
    assert (load(layers, "tokens")[0].counts == COUNTS).all()


@pytest.mark.parametrize("cell", ["{0} {1}", '"[{0}, {1}]"', '"{0},{1}"', "{0};{1}"])
def test_text_tables(load, tmp_path, cell):
    lines = [f"{t},model.layers.{i}.mlp,{cell.format(*TOKENS[t][n, i])}" for t, n, i in EACH]
    (tmp_path / "a.csv").write_text("\n".join(["Step,Layer ID,Expert IDs", *lines]))
    assert (load(tmp_path / "a.csv", "tokens")[0].counts == COUNTS).all()


def test_a_word_is_no_number_of_a_token(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "token": "the"} for row in rows()])
    assert (load(path, "tokens")[0].counts == COUNTS).all()


def test_parquet(load, tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows()).drop(columns="topk_weights").to_parquet(tmp_path / "a.parquet")
    assert (load(tmp_path / "a.parquet", "tokens")[0].counts == COUNTS).all()


def test_requests_are_replayed(load, tmp_path):
    path = write(tmp_path / "a.jsonl", rows(step="req_id", token="token_idx"))
    with pytest.raises(InputError, match=r"no phase; .*--phase all takes every token"):
        load(path, "tokens")
    traces, notes = load(path, "tokens", phase=Phase.MIXED)
    assert (traces.counts == decoded()).all() and "3 requests replayed" in notes
    alone, _ = load(path, "tokens", phase=Phase.MIXED, batch_size=1)
    assert alone.num_steps == sum(SIZES) and (alone.counts.sum(axis=0) == COUNTS.sum(axis=0)).all()
    some, _ = load(path, "tokens", phase=Phase.MIXED, layer_ids=(3, 5), num_hidden_layers=9)
    assert some.layer_ids == (3, 5) and (some.counts == decoded()[:, [0, 2]]).all()
    told = [
        {**row, "phase": "prefill" if row["token_idx"] < PROMPT else "decode"} for row in rows("req_id", "token_idx")
    ]
    path = write(tmp_path / "b.jsonl", told[::-1])  # in any order
    assert (load(path, "tokens")[0].counts == decoded(PROMPT)).all()
    prompts = [[np.bincount(ids[:PROMPT, i].ravel(), minlength=EXPERTS) for i in range(LAYERS)] for ids in TOKENS]
    prefill, _ = load(path, "tokens", phase=Phase.PREFILL, num_experts=EXPERTS)
    assert (prefill.counts == np.sum(prompts, axis=0)).all()


def test_phases_of_steps(load, tmp_path):
    told = [{**row, "phase": "prompt" if row["step"] == 0 else "decode"} for row in rows()]
    path = write(tmp_path / "a.jsonl", told)
    traces, _ = load(path, "tokens")
    assert (traces.counts == COUNTS).all() and traces.phase.tolist() == [Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    assert (load(path, "tokens", phase=Phase.DECODE, num_experts=EXPERTS)[0].counts == COUNTS[1:]).all()
    told[0]["phase"] = "decode"
    assert load(write(path, told), "tokens")[0].phase.tolist() == [Phase.MIXED, Phase.DECODE, Phase.DECODE]
    flags = [{**row, "is_prefill": row["step"] == 0} for row in rows()]
    assert load(write(path, flags), "tokens")[0].phase.tolist() == [Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    assert load(write(path, [{**row, "is_prefill": None} for row in rows()]), "tokens")[0].phase is None


def without(*names):
    return [{key: cell for key, cell in row.items() if key not in names} for row in rows()]


def test_rows_of_one_rank_and_tokens_without_experts(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [*rows(ep_rank=0, dp_rank=0), {**rows()[-1], "token": 99, "topk_ids": []}])
    with pytest.raises(InputError, match="as in the rows before"):
        load(path, "tokens")
    write(path, [*rows(ep_rank=0, dp_rank=0), {**rows(ep_rank=0, dp_rank=0)[-1], "token": 99, "topk_ids": []}])
    traces, notes = load(path, "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all()
    assert "rows of ep_rank 0 alone" in notes and "1 row without any expert (padding)" in notes


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (without("step", "token"), "which tokens are computed together; number the steps"),
        (without("layer"), "no layer"),
        (without("topk_ids"), "no row with experts; .*name the column topk_ids"),
        (rows(token="request"), "step beside request; what the number counts"),
        (rows(rank=0) + rows(rank=1), "rank: got 1; 0, tokens of all ranks"),
        (rows(physical_ids=[1, 2]), "physical_ids; logical experts"),
        (rows(experts=[1, 2]), "topk_ids and experts; one column of the ids"),
        (rows(step="req") * 2, "a token twice in a layer"),
        ([r for r in rows() for _ in range(2)], "every token once in a step and layer; ranks that saw the same tokens"),
        (rows(token="n") * 2, "steps that do not begin again; of a request"),
        (rows(step="req")[1:], "tokens without some layers"),
        ([{**rows()[0], "topk_ids": [3, 3]}], "different experts"),
        ([{**rows()[0], "topk_ids": [0.5, 3]}], "numbers of experts"),
        ([{**rows()[0], "layer": True}], "layer: got True"),
        ([*rows(), {**rows()[0], "experts": [1], "topk_ids": [1]}], "one column of the ids"),
        ([*without("token"), rows()[0]], "as in the rows before"),
        (rows(phase="7"), "phase: got 7; one of prefill"),
        ([[1, 2]], "line 1: got list; an object with a layer"),
    ],
)
def test_refused(load, tmp_path, lines, words):
    phase = Phase.MIXED if "step" not in str(lines[0]) and "token" in str(lines[0]) else None
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.jsonl", lines), "tokens", phase=phase)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "step,step,layer,topk_ids\n1,2,3,4\n", "step twice"),
        ("a.jsonl", '{"step": 0, "layer": 0, "layer": 1, "topk_ids": [1]}', "a key twice"),
        ("a.jsonl", '{"step": 0, "layer": 0, "topk_ids": [-1, -1]}', "no row that is wanted, 1 of padding"),
        ("a.jsonl.gz", "no gzip", "line 1: .*gzip"),
        ("a.json", '{"a": 1}', "one list of rows"),
    ],
)
def test_files_that_are_wrong(load, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        load(tmp_path / name, "tokens")


def test_steps_of_several_files(load, tmp_path):
    paths = [write(tmp_path / f"a_{i}.jsonl", rows()) for i in range(2)]
    with pytest.raises(InputError, match=r"not in a_0.jsonl as well; number the steps on from file to file"):
        load(paths, "tokens")


def test_the_command_and_its_hints(capsys, tmp_path):
    path, out = write(tmp_path / "routes.jsonl", rows()), tmp_path / "t.safetensors"
    code, _, err = gemopt(capsys, "trace", "import", path, "--from", "array", "-o", out)
    assert code == 2 and "--from tokens" in err
    code, said, err = gemopt(capsys, "trace", "import", path, "--from", "tokens", "-o", out)
    assert code == 0, err
    assert "3 steps, 3 MoE layers (3 to 5), 8 experts" in said and (Traces.load(out).counts == COUNTS).all()
    (tmp_path / "cut.jsonl").write_text('{"layer": 1\n')
    code, _, err = gemopt(capsys, "trace", "import", tmp_path / "cut.jsonl", "--from", "tokens", "-o", out)
    assert code == 2 and "line 1" in err and err.count("\n") == 1


def test_experts_numbered_from_1_are_told(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**r, "topk_ids": [e + 1 for e in r["topk_ids"]]} for r in rows()])
    with pytest.raises(InputError, match=f"got {EXPERTS}; experts 0 to 7; numbered from 1"):
        load(path, "tokens", num_experts=EXPERTS)


def test_rows_inside_others(load, tmp_path):
    """What is said of a pass, and of a token in it, holds for the rows inside; settings for all of them."""
    passes = [
        {
            "forward": t,
            "phase": "prefill" if t == 0 else "decode",
            "rows": [
                {"token_position": n, "layers": [{"layer": i, "expert_ids": each} for i, each in enumerate(token)]}
                for n, token in enumerate(ids.tolist())
            ],
        }
        for t, ids in enumerate(TOKENS)
    ]
    (tmp_path / "a.json").write_text(json.dumps({"num_experts": EXPERTS + 1, "forwards": passes}))
    traces, _ = load(tmp_path / "a.json", "tokens")
    assert (traces.counts[..., :EXPERTS] == COUNTS).all() and traces.num_experts == EXPERTS + 1
    assert traces.phase.tolist() == [0, 1, 1]
    traces, _ = load(write(tmp_path / "b.jsonl", passes), "tokens", num_experts=EXPERTS)
    assert (traces.counts == COUNTS).all()
    noted = [{**row, "events": [{"at": 1}, {"at": 2}]} for row in rows()]  # beside the experts they are none
    assert (load(write(tmp_path / "c.jsonl", noted), "tokens")[0].counts == COUNTS).all()


@pytest.mark.parametrize("name", ["mode", "stage"])
def test_columns_of_other_modes_and_stages_are_no_phases(load, tmp_path, name):
    found = [{**row, name: "eval" if name == "mode" else 0} for row in rows()]
    traces, notes = load(write(tmp_path / "a.jsonl", found), "tokens")
    assert (traces.counts == COUNTS).all() and traces.phase is None
    assert "mode, topk_weights left unread" in notes or name == "stage"
    if name == "stage":  # whose layers may be numbered anew
        with pytest.raises(InputError, match="stage: got 1; 0"):
            load(write(tmp_path / "a.jsonl", [*found, {**found[0], "stage": 1}]), "tokens")
    found = [{**row, name: "decode"} for row in rows()]
    assert set(load(write(tmp_path / "a.jsonl", found), "tokens")[0].phase.tolist()) == {1}


def test_ids_of_the_vocabulary_are_no_places_of_tokens(load, tmp_path):
    def renumbered(number, name="token"):
        found = [{**row, name: number[row["token_idx"]]} for row in rows("req_id", "token_idx")]
        return write(tmp_path / "a.jsonl", [{k: v for k, v in row.items() if k != "token_idx"} for row in found])

    count = len({row["token_idx"] for row in rows("req_id", "token_idx")})
    order = np.random.default_rng(0).permutation(count).tolist()
    words = [7919 * (n + 1) % 50021 for n in order]
    with pytest.raises(InputError, match="the place of each token in its request; ids of the vocabulary"):
        load(renumbered(words), "tokens", phase=Phase.MIXED)
    for places in (order, [40 + n for n in range(count)], [10 * n for n in range(count)]):
        load(renumbered(places), "tokens", phase=Phase.MIXED)
    load(renumbered([10 * n for n in order], "position"), "tokens", phase=Phase.MIXED)  # some of them, in any order
