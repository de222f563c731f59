"""Counts in JSON, as engines, recorders and data frames write them."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError
from gemopt.formats.counts import json_files
from gemopt.traces import Phase

COUNTS = routed(np.random.default_rng(3), steps=6, layers=3, experts=8, tokens=50)
STEPS, LAYERS, EXPERTS = COUNTS.shape
TOTAL = COUNTS.sum(axis=0)
ROWS = [
    {"step": t, "layer": layer, "expert": e, "count": int(COUNTS[t, layer, e])}
    for t in range(STEPS) for layer in range(LAYERS) for e in range(EXPERTS)
]  # fmt: skip


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def by_number(array, name="{}"):
    return {name.format(i): row.tolist() for i, row in enumerate(array)}


STEP_OF = {f"step_{t}": by_number(step, "layer_{}") for t, step in enumerate(COUNTS)}
WHOLE = {
    "lists": json.dumps(COUNTS.tolist()),
    "array with settings": json.dumps({"model": "m", "top_k": 2, "counts": COUNTS.tolist()}),
    "a line for each step": lines({"eplb_step": 10 + t, "experts_per_token": 2, "logical_expert_counts": c.tolist()}
                                  for t, c in enumerate(COUNTS)),
    "results beside": lines({"timestamp": 9.5 + t, "balancedness": t / 7, "num_tokens": int(c[0].sum()) // 2,
                             "counts": c.tolist()} for t, c in enumerate(COUNTS)),
    "load_history": json.dumps({"load_history": [{"logical_expert_load": c.tolist(), "physical_expert_load": c.tolist()}
                                                 for c in COUNTS]}),
    "rows": json.dumps(ROWS),
    "columns": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas index": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "pandas columns": json.dumps({name: {str(7 + i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "pandas split": json.dumps({"columns": [*ROWS[0]], "index": [9 * i for i in range(len(ROWS))],
                                "data": [[*row.values()] for row in ROWS]}),
    "pandas table": json.dumps({"schema": {"fields": []}, "data": [{"index": i, **r} for i, r in enumerate(ROWS)]}),
    "a line for each layer": lines({"step": t, "layer": layer, "expert_counts": c.tolist(), "total": int(c.sum()),
                                    "max_load": int(c.max()), "cv": 0.1 + t / 3 + layer}
                                   for t, step in enumerate(COUNTS) for layer, c in enumerate(step)),
    "sparse": lines({"step": t, "layer": layer, "counts": {str(e): int(n) for e, n in enumerate(c) if n}}
                    for t, step in enumerate(COUNTS) for layer, c in enumerate(step)),
    "by name": json.dumps(STEP_OF),
    "ids": json.dumps([{"step": r["step"], "layer_id": r["layer"], "expert_id": r["expert"], "tokens": r["count"]}
                       for r in ROWS]),
    "a key for each layer": lines({"iteration": t, "lr": 0.5 + t, **by_number(c, "moe/layer_{}/tokens_per_expert")}
                                  for t, c in enumerate(COUNTS)),
    "a key for each layer and expert": lines(
        {"_step": t, **{f"moe/layer_{i}/expert_{e}": int(n) for (i, e), n in np.ndenumerate(c)}}
        for t, c in enumerate(COUNTS)),
    "rows of layers with all steps": lines({"layer": i, "model": "m", "counts": COUNTS[:, i].tolist()}
                                           for i in range(LAYERS)),
    "a key for each layer with all steps": json.dumps(by_number(COUNTS.transpose(1, 0, 2), "layer_{}")),
    "pandas columns of lists": json.dumps({name: dict(enumerate(cells)) for name, cells in {
        "step": [t for t in range(len(COUNTS)) for _ in range(LAYERS)], "layer": [*range(LAYERS)] * len(COUNTS),
        "counts": COUNTS.reshape(-1, EXPERTS).tolist()}.items()}),
    "layers in a list": lines(
        {"step": t, "layers": [{"layer": i, "experts": {str(e): int(n) for e, n in enumerate(row)}}
                               for i, row in enumerate(c)]} for t, c in enumerate(COUNTS)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("source", ["array", "csv"])
def test_steps_in_json(load, tmp_path, kind, source):
    path = tmp_path / "load.json"
    path.write_text(WHOLE[kind])
    traces, notes = load(path, source)
    np.testing.assert_array_equal(traces.counts, COUNTS)
    beside = {"array with settings", "results beside", "load_history", "a line for each layer", "a key for each layer"}
    beside.add("rows of layers with all steps")
    assert ("left unread" in notes) == (kind in beside)
    assert traces.top_k == (2 if kind in ("array with settings", "a line for each step") else None)


BUT_ONE = TOTAL * (np.arange(EXPERTS) != np.arange(LAYERS)[:, None])
SUMS = {
    "MindSpeed-RL": {str(layer): {str(e): int(n) for e, n in enumerate(row)} for layer, row in enumerate(TOTAL)},
    "lists by layer": by_number(TOTAL),
    "named": by_number(TOTAL, "model.layers.{}.mlp.experts"),
    "both named": {f"layer_{i}": {f"expert_{e}": int(n) for e, n in enumerate(row)} for i, row in enumerate(TOTAL)},
    "named, not all": {f"layers.{layer}.mlp.experts": {str(e): int(n) for e, n in enumerate(row) if n and e != layer}
                       for layer, row in enumerate(BUT_ONE)},
    "with statistics": {f"layer_{i}": {"tokens_per_expert": row.tolist(), "cv": 0.5 + i}
                        for i, row in enumerate(TOTAL)},
    "ranks": {f"rank{r}": by_number(COUNTS[r::2].sum(axis=0), "layer_{}") for r in range(2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", SUMS)
def test_sums_by_layer(load, tmp_path, kind):
    (tmp_path / "all.json").write_text(json.dumps(SUMS[kind]))
    traces, notes = load(tmp_path / "all.json", "csv", no_pipeline=True)
    np.testing.assert_array_equal(traces.counts, (BUT_ONE if kind == "named, not all" else TOTAL)[None])
    assert "a single step" in notes


def test_packed_lines_and_layers_from_1(load, tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(lines({"layer": 1 + i, "counts": row.tolist()} for i, row in enumerate(TOTAL)))
    traces, notes = load(tmp_path / "a.jsonl.gz", "array")
    assert traces.layer_ids == (1, 2, 3) and (traces.counts == TOTAL).all() and "numbered from 1?" in notes
    with gzip.open(tmp_path / "b.json.gz", "wt") as stream:
        stream.write(WHOLE["a line for each step"])
    np.testing.assert_array_equal(load(tmp_path / "b.json.gz", "csv")[0].counts, COUNTS)


def test_a_file_for_each_step(load, folder):
    for t, step in enumerate(COUNTS):
        (folder / f"load_{t}.json").write_text(json.dumps({"step": 10 * t, "counts": step.tolist()}))
    np.testing.assert_array_equal(load(folder, "array")[0].counts, COUNTS)
    (folder / "load_9.json").write_text(json.dumps({"step": 10, "counts": (1 + COUNTS[1]).tolist()}))
    with pytest.raises(InputError, match="files of rising steps; ranks of the same steps"):
        load(folder, "array")


def test_what_lies_beside_counts_in_a_folder_is_left_alone(load, folder):
    (folder / "config.json").write_text("{}")
    np.save(folder / "counts.npy", COUNTS)
    traces, notes = load(folder, "array")
    np.testing.assert_array_equal(traces.counts, COUNTS)
    assert "left unread: config.json" in notes
    (folder / "counts.npy").unlink()
    (folder / "counts.csv").write_text(
        "\n".join(["step,layer,expert,count", *(",".join(map(str, r.values())) for r in ROWS)])
    )
    traces, notes = load(folder, "csv")
    np.testing.assert_array_equal(traces.counts, COUNTS)
    assert "left unread: config.json" in notes


@pytest.mark.parametrize("table", [False, True])
def test_every_file_is_parsed_once(load, folder, table, monkeypatch):
    parsed, parse = [], json_files.parsed
    monkeypatch.setattr(json_files, "parsed", lambda path, text: parsed.append(path) or parse(path, text))
    for t, step in enumerate(300 * COUNTS):  # above 65535: a second pass in a wider type
        rows = [{"step": t, "layer": i, "counts": row.tolist()} for i, row in enumerate(step)]
        (folder / f"load_{t}.json").write_text(json.dumps(rows if table else [(30 * step).tolist()]))
    counts = load(folder, "csv" if table else "array")[0].counts
    np.testing.assert_array_equal(counts, 300 * COUNTS * (1 if table else 30))
    assert len(parsed) == STEPS
    assert not json_files._kept  # nothing stays behind


@pytest.mark.parametrize("source", ["array", "csv"])
def test_packed_files_of_a_folder_are_read_beside_others(load, folder, source):
    (folder / "load_0.json").write_text(json.dumps({"step": 0, "top_k": 2, "counts": COUNTS[0].tolist()}))
    with gzip.open(folder / "load_1.jsonl.gz", "wt") as stream:
        stream.write(lines({"step": t, "counts": c.tolist()} for t, c in enumerate(COUNTS) if t))
    traces, _ = load(folder, source)
    np.testing.assert_array_equal(traces.counts, COUNTS)
    assert traces.top_k == 2
    (folder / "load_2.json").write_text(json.dumps({"step": 99, "top_k": 4, "counts": (1 + COUNTS[0]).tolist()}))
    with pytest.raises(InputError, match=r"2 in load_0.json, 4 in load_2.json; files of one network"):
        load(folder, source)


TURNED = {str(e): {str(layer): int(TOTAL[layer, e]) for layer in range(LAYERS)} for e in range(EXPERTS)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(TURNED), "do not add up to the same; layers.*name them layer_0"),
        (json.dumps({str(t): c.tolist() for t, c in enumerate(COUNTS)}), "keys of numbers alone.*step_0, rank_0"),
        (lines({"eplb_step": t // 2, "counts": c.tolist()} for t, c in enumerate(COUNTS)), "steps that come twice"),
        (lines({"rank": t, "counts": c.tolist()} for t, c in enumerate(COUNTS)), "rank: got 0, 1.*add up ranks"),
        (lines({"layer": 0, "counts": c.tolist()} for c in COUNTS), "layer: got 0; the same"),
        (lines({"layer": i, "gpu": i, "counts": c.tolist()} for i, c in enumerate(COUNTS)), "gpu: got 0, 1"),
        (lines({"layer": 0, "counts": c[0].tolist()} for c in COUNTS), "once; of several steps.*a column step"),
        (lines({"layer": 0, "token": t, "topk_ids": [1, 2]} for t in range(9)), "ids of tokens: .*from_tokens"),
        (json.dumps({"counts": COUNTS.tolist(), "layer_ids": [3, 4, 5]}), "layer_ids beside counts.*--layer-ids"),
        (json.dumps({"counts": COUNTS.tolist(), "scale": 2}), "scale beside counts"),
        (json.dumps([{"layer": 0, "expert_ids": [1, 0], "counts": [7, 9]}]), "expert_ids beside counts"),
        (json.dumps([{"layer": 0, "experts": [1, 0], "logical_counts": [7, 9]}]), "experts beside .*whose they are"),
        (json.dumps([{"layer": 0, "experts": [3, 3], "logical_counts": [7, 9]}]), "experts beside .*whose they are"),
        (json.dumps({"layer_ids": [3, 4, 5], "load_history": [{"counts": TOTAL.tolist()}]}), "layer_ids beside counts"),
        (json.dumps({"rank": 3, "load_history": [{"counts": TOTAL.tolist()}] * 2}), "rank: got 3"),
        (json.dumps({"scale": 3, "load_history": [{"counts": TOTAL.tolist()}] * 2}), "scale beside counts"),
        (json.dumps({"counts": TOTAL.tolist()}), r"2 dimensions.*counts\[None\]"),
        (json.dumps({"snapshots": [{"window_expert_load": TOTAL.tolist(), "physical_to_logical_map": [[0]]}]}),
         r"physical_to_logical_map \[1, 1\] beside counts; counts of logical experts"),
        (json.dumps({"a_load": TOTAL.tolist(), "b_load": TOTAL.tolist()}), "a_load, b_load; one list of counts"),
        (json.dumps(by_number(TOTAL, "layers.{}.mlp.shared_experts")), "experts that tokens choose; leave shared ones"),
        (json.dumps({"layer_0": {f"physical_expert_{e}": 7 for e in range(9)}}), "physical_expert_0 beside counts"),
        (json.dumps({"num_experts": 64, "counts": COUNTS.tolist()}), "8 experts; 64, as num_experts says"),
        (lines([{"layer": 0, "count": 3, "counts": {"expert_0": 1, "expert_1": [2]}}] * 2), "counts|count"),
        (json.dumps({"num_layers": 61, "counts": COUNTS.tolist()}), "61, as num_layers says; .*give --layer-ids"),
        (lines({"step": t, "iter": 9 * t, "counts": c.tolist()} for t, c in enumerate(COUNTS)), "step and iter; one"),
        (lines({"step": t, "weight": t / 7, "counts": c.tolist()} for t, c in enumerate(COUNTS)), "weight: .*the same"),
        (json.dumps({"load_percent": COUNTS.tolist()}), "load_percent; counts themselves"),
        (json.dumps(by_number(COUNTS, "layer_{}/load_ratio")), "layer_0/load_ratio; counts themselves"),
        (json.dumps({"counts": [[[True, 3], [1, 3]]] * 9}), "true; numbers alone in lists"),
        (json.dumps(by_number(np.tile(TOTAL, (99, 1)))), "297 keys of numbers alone; at most 256 layers"),
        ("[" * 9999 + "]" * 9999, "cut or wrong"),
        (WHOLE["rows"][:-9], "cut or wrong"),
        ("{}", "columns"),
    ],
)  # fmt: skip
def test_json_that_is_refused(load, tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.json", "array")


def test_times_and_results_beside_steps_that_are_numbered(load, tmp_path):
    path = tmp_path / "a.csv"
    names = ["step", "timestamp", "layer", "expert", "count", "share"]
    table = [[t, 9 + t, layer, e, COUNTS[t, layer, e], COUNTS[t, layer, e] / 90 + 0.001] for t in range(STEPS)
             for layer in range(LAYERS) for e in range(EXPERTS)]  # fmt: skip

    def saved(left_out=(), scale="share"):
        kept = [i for i, name in enumerate(names) if name not in left_out]
        rows = [[scale if name == "share" else name for name in names], *table]
        path.write_text("\n".join(",".join(str(row[i]) for i in kept) for row in rows))
        return path

    traces, notes = load(saved(), "csv")
    np.testing.assert_array_equal(traces.counts, COUNTS)
    assert "left unread: share, timestamp" in notes
    for left_out, scale in ((["step"], "share"), ([], "scale"), ([], "weight")):
        with pytest.raises(InputError, match=r"as in the lines before"):
            load(saved(left_out, scale), "csv")


def test_lines_of_numbers_alone_have_a_way_in(load, tmp_path):
    """MindIE's hotness: a file for each NPU, its experts as columns, the layers of every step below each other."""
    for rank, part in enumerate(np.split(COUNTS, 2, axis=2)):
        np.savetxt(tmp_path / f"decode_{rank}.csv", part.reshape(STEPS * LAYERS, -1), fmt="%d", delimiter=",")
    with pytest.raises(InputError, match=r"MindIE.*loadtxt.*reshape\(steps, layers, -1\).*concatenate\(axis=2\)"):
        load(tmp_path / "decode_0.csv", "csv")
    parts = [np.loadtxt(tmp_path / f"decode_{r}.csv", delimiter=",").reshape(STEPS, LAYERS, -1) for r in range(2)]
    np.save(tmp_path / "a.npy", np.concatenate(parts, axis=2))
    np.testing.assert_array_equal(load(tmp_path / "a.npy", "array")[0].counts, COUNTS)


def test_steps_come_by_their_numbers_and_keys_of_numbers_alone_are_noted(load, tmp_path):
    path, many = tmp_path / "a.json", np.concatenate([COUNTS, COUNTS[::-1]])
    for text in (
        json.dumps({f"step_{t}": c.tolist() for t, c in enumerate(many)}, sort_keys=True),  # 0, 1, 10, 11, 2
        lines({"step": t, "num_experts": EXPERTS, "note": "a\u2028b", "counts": c.tolist()}
              for t, c in list(enumerate(many))[::-1]).replace("\\u2028", "\u2028"),
    ):  # fmt: skip
        path.write_text(text)
        np.testing.assert_array_equal(load(path, "array")[0].counts, many)
    path.write_text(json.dumps(SUMS["MindSpeed-RL"]))
    assert "taken as layers and experts: of steps? then name them step_0" in load(path, "array")[1]
    path.write_text(json.dumps(SUMS["named"]))
    assert "of numbers alone" not in load(path, "array")[1]


def test_files_whose_steps_overlap(load, folder):
    for name, first in (("a", 0), ("b", 3)):
        (folder / f"{name}.jsonl").write_text(lines({"step": first + t, "counts": (c + first).tolist()}
                                                    for t, c in enumerate(COUNTS)))  # fmt: skip
    with pytest.raises(InputError, match="0 to 5, 3 to 8; files of rising steps"):
        load(folder, "array")


def test_a_phase_beside_an_array_is_that_of_all_its_steps(load, tmp_path):
    for phase in Phase:
        (tmp_path / "a.json").write_text(json.dumps({"phase": phase.name.lower(), "counts": COUNTS.tolist()}))
        traces = load(tmp_path / "a.json", "array")[0]
        assert (traces.counts == COUNTS).all() and (traces.phase == int(phase)).all()


@pytest.mark.parametrize("name", ["layer_idx", "block_ids", "decoder_layers"])
def test_numbers_of_the_layers_beside_an_array_are_not_left_unread(load, tmp_path, name):
    (tmp_path / "a.json").write_text(json.dumps({name: [3, 4, 5], "counts": COUNTS.tolist()}))
    with pytest.raises(InputError, match=f"{name} beside counts; .*give --layer-ids"):
        load(tmp_path / "a.json", "array")


@pytest.mark.parametrize("text", ["physical", "Physical experts", "local_ids", "slot"])
def test_texts_that_say_that_experts_are_slots(load, tmp_path, text):
    table = [f"{t},{i},{e},{COUNTS[t, i, e]},{text}" for t, i, e in np.ndindex(*COUNTS.shape)]
    (tmp_path / "a.csv").write_text("\n".join(["step,layer,expert,count,kind", *table]))
    (tmp_path / "a.json").write_text(json.dumps({"kind": text, "counts": COUNTS.tolist()}))
    np.savez(tmp_path / "a.npz", counts=COUNTS, kind=text)
    for name in ("a.csv", "a.json", "a.npz"):
        with pytest.raises(InputError, match=f"kind: got {text}; .*logical experts"):
            load(tmp_path / name, "csv" if name == "a.csv" else "array")
    np.savez(tmp_path / "a.npz", counts=COUNTS, backend="local", domain="physical sciences", kind="logical")
    assert (load(tmp_path / "a.npz", "array")[0].counts == COUNTS).all()


@pytest.mark.parametrize("kind", ["object", "list", "reversed", "of a rank"])
def test_experts_named_in_a_list_beside_their_counts(load, tmp_path, kind):
    """Loggers of cold experts write those alone that tokens chose; ranks, those that they hold."""
    rows = []
    for step, layer in np.ndindex(COUNTS.shape[:2]):
        counts = COUNTS[step, layer]
        chosen = np.split(np.arange(EXPERTS), 2) if kind == "of a rank" else [np.flatnonzero(counts)]
        for given in chosen:
            ids = given[::-1] if kind == "reversed" else given
            told = counts[ids].tolist()
            told = dict(zip(map(str, ids.tolist()), told, strict=True)) if kind == "object" else told
            rows.append({"step": step, "layer": layer, "active_experts": ids.tolist(), "token_counts": told})
            if kind == "object":
                rows[-1]["num_tokens"] = int(counts.sum())
    rows[0] |= {"active_experts": [0], "token_counts": {"0": 5} if kind == "object" else [5]}
    if kind == "object":
        rows[0]["num_tokens"] = 5
    truth = COUNTS.copy()
    truth[0, 0, : EXPERTS // 2 if kind == "of a rank" else EXPERTS] = 0
    truth[0, 0, 0] = 5
    (tmp_path / "a.jsonl").write_text(lines(rows))
    for source in ("array", "csv"):
        assert (load(tmp_path / "a.jsonl", source, num_experts=EXPERTS)[0].counts == truth).all()


def test_numbers_in_quotes(load, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COUNTS.astype(str).tolist()))
    assert (load(tmp_path / "a.json", "array")[0].counts == COUNTS).all()
    for given, words in (((COUNTS / 2).astype(str), "whole numbers"), (COUNTS[0].astype(str), "2 dimensions")):
        (tmp_path / "a.json").write_text(json.dumps(given.tolist()))
        with pytest.raises(InputError, match=words):
            load(tmp_path / "a.json", "array")
