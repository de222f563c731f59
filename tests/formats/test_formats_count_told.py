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
        ({"valid": False}, "do to the counts what it says"),
        ({"is_warmup": True}, "do to the counts what it says"),
        ({"cumulative": True}, "do to the counts what it says"),
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


@pytest.mark.parametrize(
    "more",
    [
        *({"num_redundant_experts": 0}, {"num_replicas": 1}, {"scale": 1.0}, {"sampling_rate": 1.0}, {"valid": True}),
        *({"is_warmup": False}, {"warmup_steps": 10}, {"num_valid_tokens": 128}, {"loss_scale": 65536}),
        *({"cumulative": False}, {"pp_rank": 0}, {"first_k_dense_replace": 0}),
    ],
)
def test_columns_that_change_nothing_are_taken(load, tmp_path, more):
    traces, _ = load(table(tmp_path / "a.csv", **more), "csv")
    assert (traces.counts == COUNTS).all()
    rows = [{"step": t, "layer": i, "counts": COUNTS[t, i].tolist(), **more} for t in range(3) for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (load(tmp_path / "a.jsonl", "array")[0].counts == COUNTS).all()


def test_numbers_beside_a_column_for_each_expert(load, tmp_path):
    """Where all lines have as many assignments, columns of one value are shares of that; these say more."""
    wide = [[t, i, *COUNTS[t, i], 16, 2] for t in range(3) for i in range(2)]
    header = ["step", "layer", *(f"expert_{e}" for e in range(8)), "num_experts", "top_k"]
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in [header, *wide]))
    traces, notes = load(tmp_path / "a.csv", "csv")
    assert traces.num_experts == 16 and traces.top_k == 2 and "num_experts" not in notes
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("top_k", "num_physical_experts"))
    with pytest.raises(InputError, match="num_physical_experts: got 2; counts of logical experts"):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize("share", ["{:.1f}", "{:.0f}%", "{:.1f} %"])
def test_shares_whose_fractions_are_zeros(load, tmp_path, share):
    sums = COUNTS.sum(axis=0)
    cells = [
        (i, e, sums[i, e], share.format(round(100 * sums[i, e] / sums[i].sum()))) for i in (0, 1) for e in range(8)
    ]
    (tmp_path / "a.csv").write_text("\n".join(["layer,expert,count,pct", *(",".join(map(str, c)) for c in cells)]))
    traces, notes = load(tmp_path / "a.csv", "csv")
    assert (traces.counts == sums).all() and "pct" in notes


def test_indices_that_pandas_saved_twice(load, tmp_path):
    lines = table(tmp_path / "a.csv").read_text().split("\n")
    twice = [",Unnamed: 0," + lines[0], *(f"{n},{2 * n}," + line for n, line in enumerate(lines[1:]))]
    (tmp_path / "a.csv").write_text("\n".join(twice))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == COUNTS).all()
    (tmp_path / "a.csv").write_text("\n".join([*twice[:3], twice[3].replace("2,4,", "2,1,", 1), *twice[4:]]))
    with pytest.raises(InputError, match="line 5: column 1: got 6; 1, as in the lines before"):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize("name", ["frequency", "freq", "Utilization"])
def test_fractions_beside_counts_are_left_unread(load, tmp_path, name):
    counts = routed(np.random.default_rng(6), steps=1)
    rows = [f"{i},{e},{n},{n / counts.sum():.6f}" for (_, i, e), n in np.ndenumerate(counts)]
    (tmp_path / "a.csv").write_text("\n".join([f"Layer,Expert,Count,{name}", *rows]))
    traces, notes = load(tmp_path / "a.csv", "csv")
    assert (traces.counts == counts).all() and f"left unread: {name.lower()}" in notes
    rows = [f"{i},{e},{n},{n % 3}" for (_, i, e), n in np.ndenumerate(counts)]
    (tmp_path / "a.csv").write_text("\n".join([f"Layer,Expert,Count,{name}", *rows]))
    with pytest.raises(InputError, match=f"{name.lower()}: got"):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize(("name", "number"), [("pp_rank", 1), ("start_layer", 4), ("first_k_dense_replace", 3)])
def test_layers_that_a_stage_or_the_layers_with_experts_number_for_themselves(load, tmp_path, name, number):
    path = table(tmp_path / "a.csv", **{name: number})
    with pytest.raises(InputError, match=f"{name}: got {number}, but layer 0 is there; layers numbered through"):
        load(path, "csv")
    through = [line.split(",") for line in path.read_text().split("\n")]
    moved = [through[0], *([step, str(int(layer) + 4), *rest] for step, layer, *rest in through[1:])]
    path.write_text("\n".join(map(",".join, moved)))
    assert load(path, "csv")[0].layer_ids == (4, 5)
    (tmp_path / "a.json").write_text(json.dumps({name: number, "counts": COUNTS.tolist()}))
    with pytest.raises(InputError, match=f"{name} beside counts; .*give --layer-ids"):
        load(tmp_path / "a.json", "array")


@pytest.mark.parametrize("name", ["num_tokens", "tokens"])
def test_tokens_of_the_step_beside_shares_are_no_counts(load, tmp_path, name):
    """The same number for every expert, as analyses of routing write it; what the experts get is in the share."""
    lines = [f"{t},{i},{e},{n / COUNTS[t, i].sum():.4f},{40 + t}" for (t, i, e), n in np.ndenumerate(COUNTS)]
    for kept in (lines, [line for line in lines if ",0.0000," not in line]):
        more = [line.replace(f"{t},", f"{t + 3},", 1) for t in range(3) for line in kept if line.startswith(f"{t},")]
        (tmp_path / "a.csv").write_text("\n".join([f"step,layer,expert,share,{name}", *kept, *more]))
        with pytest.raises(InputError, match=f"{name}: got as many for all experts of a layer; the tokens of each"):
            load(tmp_path / "a.csv", "csv")
    (tmp_path / "a.csv").write_text("\n".join([f"step,layer,expert,share,{name}", *lines]).replace(name, "count"))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == [[[40]], [[41]], [[42]]]).all()  # as it says


def test_lists_of_the_fullest_experts_are_noted(load, tmp_path):
    counts = routed(np.random.default_rng(9))
    rows = [
        {"step": t, "layer": i, "counts": {str(e): int(counts[t, i, e]) for e in np.argsort(-counts[t, i])[:4]}}
        for t in range(12) for i in range(5)
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        "4 of 16 experts have counts in every layer and step" in load(tmp_path / "a.jsonl", "array", num_experts=16)[1]
    )
    np.save(tmp_path / "a.npy", counts)
    assert "fullest" not in load(tmp_path / "a.npy", "array")[1]


@pytest.mark.parametrize("name", ["moe_layer", "moe_layer_idx"])
def test_numbers_of_the_layers_with_experts_are_doubted(load, tmp_path, name):
    text = table(tmp_path / "a.csv").read_text()
    assert "call it layer" not in load(tmp_path / "a.csv", "csv")[1]
    (tmp_path / "a.csv").write_text(text.replace("layer", name))
    traces, notes = load(tmp_path / "a.csv", "csv")
    assert traces.layer_ids == (0, 1) and f"{name} begins with 0: if dense layers come before" in notes
    rows = [{"step": t, name: i, "topk_ids": [[e, 7 - e] for e in range(3)]} for t in range(3) for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert f"{name} begins with 0" in load(tmp_path / "a.jsonl", "tokens")[1]
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace(f'"{name}": ', f'"{name}": 3'))
    assert f"{name} begins with 0" not in load(tmp_path / "a.jsonl", "tokens")[1]


@pytest.mark.parametrize("long", [True, False])
def test_a_line_of_settings_before_the_others_holds_for_all(load, tmp_path, long):
    """As loggers write one: {"type": "meta", ...}; those in between say nothing of the counts."""
    rows = [{"step": t, "layer": i, "counts": COUNTS[t, i].tolist()} for t in range(3) for i in range(2)]
    if long:
        rows = [{**row, "expert": e, "count": int(n)} for row in rows for e, n in enumerate(row.pop("counts"))]
    head = {"type": "meta", "model_id": "m", "num_experts": 8, "top_k": 2, "layers_logged": [0, 1]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [head, *rows[:2], {"type": "flush"}, *rows[2:]])))
    traces, notes = load(tmp_path / "a.jsonl", "array")
    assert (traces.counts == COUNTS).all() and traces.top_k == 2 and traces.num_experts == 8
    assert "2 rows without counts left unread" in notes
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [{**head, "scale": 4}, *rows])))
    with pytest.raises(InputError, match="scale"):
        load(tmp_path / "a.jsonl", "array")
    for key, said in (("scale", 4), ("model_id", "n"), ("rank", 1)):  # of the rows that follow
        given = [head, *rows[:2], {key: said}, *rows[2:]]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, given)))
        with pytest.raises(InputError, match=f"{key}: got {said} between rows of counts" if not long else key):
            load(tmp_path / "a.jsonl", "array")


@pytest.mark.parametrize("other", [{"event": "end", "total_tokens": 9}, {"step": 0, "loss": 0.5}])
def test_lines_without_counts_between_and_after_them_are_left_unread(load, tmp_path, other):
    rows = [{"step": t, "layer": i, "counts": COUNTS[t, i].tolist()} for t in range(3) for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows[:3], other, *rows[3:], other])))
    traces, notes = load(tmp_path / "a.jsonl", "array")
    assert (traces.counts == COUNTS).all() and "2 rows without counts left unread" in notes
    long = [{"step": t, "layer": i, "expert": e, "count": int(n)} for (t, i, e), n in np.ndenumerate(COUNTS)]
    total = {"expert_load": COUNTS.sum(axis=0).tolist()}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*long, total])))
    with pytest.raises(InputError, match="one list of counts in every row"):
        load(tmp_path / "a.jsonl", "array")


@pytest.mark.parametrize("name", ["phase", "stage", "mode", "forward_mode"])
def test_columns_that_name_phases(load, tmp_path, name):
    rows = [{"step": t, name: "prefill" if t == 0 else "decode", "counts": COUNTS[t].tolist()} for t in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(tmp_path / "a.jsonl", "array")[0].phase.tolist() == [0, 1, 1]
    cells = [[t, rows[t][name], i, e, COUNTS[t, i, e]] for t in range(3) for i in range(2) for e in range(8)]
    lines = [",".join(map(str, line)) for line in [["step", name, "layer", "expert", "count"], *cells]]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert load(tmp_path / "a.csv", "csv")[0].phase.tolist() == [0, 1, 1]
    if name == "phase":  # another column beside it is none
        (tmp_path / "a.csv").write_text("\n".join([f"{lines[0]},mode", *(f"{line},eager" for line in lines[1:])]))
        traces, notes = load(tmp_path / "a.csv", "csv")
        assert traces.phase.tolist() == [0, 1, 1] and "left unread: mode" in notes
    (tmp_path / "a.csv").write_text("\n".join(lines).replace("decode", "fast"))
    with pytest.raises(InputError, match=f"{name}: got fast; one of prefill"):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize(
    "name,cells", [("is_prefill", [True, False, False]), ("is_decode", [0, 1, 1]), ("is_prompt", ["T", "F", "F"])]
)
def test_flags_that_tell_phases(load, tmp_path, name, cells):
    rows = [{"step": t, name: cell, "counts": COUNTS[t].tolist()} for t, cell in enumerate(cells)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(tmp_path / "a.jsonl", "array")[0].phase.tolist() == [0, 1, 1]
    table = [[t, cells[t], i, e, COUNTS[t, i, e]] for t in range(3) for i in range(2) for e in range(8)]
    lines = [",".join(map(str, line)) for line in [["step", name, "layer", "expert", "count"], *table]]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert load(tmp_path / "a.csv", "csv")[0].phase.tolist() == [0, 1, 1]
    (tmp_path / "a.csv").write_text("\n".join([*lines[:-1], lines[-1].replace(f",{cells[2]},", ",maybe,", 1)]))
    with pytest.raises(InputError, match=f"{name}: got maybe; one of true, 1"):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize("cells", [[0, 0, 0], [0.5, 1.25, 0.75]])
def test_a_column_forward_beside_steps_does_not_number_them(load, tmp_path, cells):
    rows = [{"step": t, "forward": cell, "counts": COUNTS[t].tolist()} for t, cell in enumerate(cells)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (load(tmp_path / "a.jsonl", "array")[0].counts == COUNTS).all()


def test_a_rank_in_the_name_and_in_a_column(load, folder):
    def tables(rank_of):
        for rank in range(2):
            cells = [[t, rank_of(rank), i, e, COUNTS[t, i, e]] for t in range(3) for i in range(2) for e in range(8)]
            lines = [["step", "rank", "layer", "expert", "count"], *(row for row in cells if row[3] // 4 == rank)]
            (folder / f"load_rank{rank}.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
        return load(folder, "csv")[0].counts

    assert (tables(lambda rank: rank) == COUNTS).all()
    with pytest.raises(InputError, match="rank: got 1 in the name and 0 in a column; one of the two"):
        tables(lambda rank: 0)
