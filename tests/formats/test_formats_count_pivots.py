"""Count tables that go across: by any number, as pandas crosses or labels them, as others export and print them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError

PIVOTS = {  # which columns the lines name, and how those of the counts are called
    "experts and layers": ("layer", "layer_{}"),
    "as plots name them": ("layer", "Layer {}"),
    "of all three": ("step", "step_{}"),
    "iterations": ("step", "iter{}"),
    "ranks": ("rank", "rank_{}"),
}


@pytest.mark.parametrize("case", PIVOTS)
def test_pivoted_tables(load, tmp_path, case):
    across, name = PIVOTS[case]
    counts = routed(np.random.default_rng(8), steps=3)
    by_rank = np.stack([counts, counts[::-1]], axis=-1)  # [T, L, E, ranks]
    long = [{"step": t, "layer": i, "expert": e, "rank": r, "count": n} for (t, i, e, r), n in np.ndenumerate(by_rank)]
    long = [row for row in long if across == "rank" or row.pop("rank") == 0]
    others = [key for key in long[0] if key not in (across, "count")]
    lines = {}
    for row in long:
        lines.setdefault(tuple(row[key] for key in others), {})[row[across]] = row["count"]
    head = [*others, *(name.format(i) for i in lines[next(iter(lines))])]
    text = [",".join(map(str, [*key, *cells.values()])) for key, cells in lines.items()]
    (tmp_path / "t.csv").write_text("\n".join([",".join(head), *text, ""]))
    traces, _ = load(tmp_path / "t.csv", "csv", no_pipeline=True)
    assert (traces.counts == (by_rank.sum(axis=-1) if across == "rank" else counts)).all()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("layer,expert,gsm8k,mmlu\n0,0,5,6\n", "layer_id, expert_id, count"),  # of tasks
        ("layer,expert,batch_1,batch_64\n0,0,5,6\n", "layer_id, expert_id, count"),  # of batches of this size?
        ("expert,step_0,step_1\n0,5,6\n1,5,6\n", "layer_id, expert_id, count"),  # of which layer?
        ("expert,layer_0,layer_1\n0,0.5,0.25\n1,0.5,0.75\n", "got 0.5; a whole number"),
        ("expert,0,1\n0,5,6\n1,6,5\n", "columns are named by what they number: expert_0, layer_0 or step_0"),
    ],
)
def test_pivoted_tables_that_do_not_say_what_they_count(load, tmp_path, text, line):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=line):
        load(tmp_path / "t.csv", "csv")


@pytest.mark.parametrize("across", ["expert", "layer"])
def test_labels_of_rows_say_what_they_are(load, tmp_path, across):
    """As pandas saves a frame whose index is named by its labels alone."""
    counts = routed(np.random.default_rng(9), steps=1)[0]
    table = counts if across == "expert" else counts.T
    down = "layer" if across == "expert" else "expert"
    head = ["", *(f"{across}_{i}" for i in range(table.shape[1]))]
    lines = [head, *([f"{down}_{i}", *row] for i, row in enumerate(table.tolist()))]
    (tmp_path / "t.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    assert (load(tmp_path / "t.csv", "csv")[0].counts == counts).all()
    lines[1:] = [[i, *row[1:]] for i, row in enumerate(lines[1:])]
    (tmp_path / "t.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    hint = "which column is the layer" if across == "expert" else "layer_id, expert_id, count"
    with pytest.raises(InputError, match=hint):
        load(tmp_path / "t.csv", "csv")


def test_what_weights_and_biases_exports_beside_each_column(load, tmp_path):
    counts = routed(np.random.default_rng(3), steps=4, layers=2, experts=4)
    names = [f"run - moe/layer_{i}/expert_{e}" for i in range(2) for e in range(4)]
    head = ",".join(f'"{name}","{name}__MIN","{name}__MAX"' for name in names)
    rows = [f"{10 * t}," + ",".join(f"{n},{n},{n}" for n in counts[t].reshape(-1)) for t in range(4)]
    (tmp_path / "a.csv").write_text("\n".join([f'"Step",{head}', *rows]))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()
    apart = rows[2].replace(",", ",9", 1)
    (tmp_path / "a.csv").write_text("\n".join([f'"Step",{head}', *rows[:2], apart]))
    with pytest.raises(InputError, match=r"line 4: run_moe_layer_0_expert_0__min: got .*; 9\d+, as .*means of several"):
        load(tmp_path / "a.csv", "csv")


def test_tables_that_pandas_crosses(load, tmp_path):
    """Columns of numbers alone are experts where all layers have as many assignments, and are not alike."""
    order = np.random.default_rng(4).random((5, 60, 8)).argsort(axis=2)[..., :2]
    counts = np.stack([np.bincount(chosen.reshape(-1), minlength=8) for chosen in order])
    for rows, label in ((counts, "layer"), (counts.T, "expert")):
        lines = [[label, *range(rows.shape[1])], *([i, *row] for i, row in enumerate(rows.tolist()))]
        (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
        assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()
    for other in (np.tile([120, 96, 112, 80], (5, 1)), counts + np.arange(5)[:, None], counts[:2]):
        lines = [["layer", *range(other.shape[1])], *([i, *row] for i, row in enumerate(other.tolist()))]
        (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
        with pytest.raises(InputError, match="columns are named by what they number"):
            load(tmp_path / "a.csv", "csv")
    lines = ["layer,expert,0", *(f"{i},{e},{n}" for (i, e), n in np.ndenumerate(counts))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="if 0 is the count, call it count"):
        load(tmp_path / "a.csv", "csv")


def test_percentages_of_few_layers_are_noted(load, tmp_path):
    lines = ["layer,expert,load", *(f"{i},{e},{(12, 13)[(e + i) % 3 == 0]}" for i in range(4) for e in range(8))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert "all layers add up to about 100: shares that were rounded?" in load(tmp_path / "a.csv", "csv")[1]


def test_tables_of_markdown(load, tmp_path):
    counts = routed(np.random.default_rng(5), steps=2, layers=3, experts=8)
    long = ["| step | layer | expert | count |", "|-----:|:-----:|--------|:---|"]
    long += [f"| {t} | {i} | {e} | {n} |" for (t, i, e), n in np.ndenumerate(counts)]
    wide = ["| step | layer | " + " | ".join(f"expert_{e}" for e in range(8)) + " |", "|" + "---|" * 10]
    wide += [f"| {t} | {i} | " + " | ".join(map(str, counts[t, i])) + " |" for t in range(2) for i in range(3)]
    for lines in (long, wide):
        (tmp_path / "a.csv").write_text("\n".join(lines))
        assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()
    (tmp_path / "a.csv").write_text("\n".join([*long[:5], "| 0 | 1 |"]))
    with pytest.raises(InputError, match="line 6: got 0,1; 4 values"):
        load(tmp_path / "a.csv", "csv")


def exported(tmp_path, rows):
    """A table with the columns that the first of these rows has."""
    text = [",".join(map(str, row.values())) for row in rows]
    (tmp_path / "t.csv").write_text("\n".join([",".join(rows[0]), *text, ""]))
    return tmp_path / "t.csv"


def test_what_training_logged_beside_the_counts_of_each_step(load, tmp_path):
    """As the history of a run of Weights & Biases, which has lines between that hold no counts."""
    counts = routed(np.random.default_rng(8), steps=4)
    rows = []
    for t in range(8):
        named = {f"moe/layer_{i}/expert_{e}": n if t % 2 else "" for (i, e), n in np.ndenumerate(counts[t // 2])}
        times = {"_runtime": 2 * t, "_timestamp": 1_700_000_000 + 3 * t, "train/global_step": 10 * t, "epoch": t // 3}
        rows.append({"_step": t, **times, "train/loss": t / 4, "train/learning_rate": f"{t + 1}e-05", **named})
    traces, notes = load(exported(tmp_path, rows), "csv")
    assert (traces.counts == counts).all()
    assert "left unread: _runtime, _timestamp, epoch, train_global_step" in notes
    told = [{key: cell for key, cell in row.items() if cell != ""} for row in rows]
    for each in (told, [{key: row.get(key) for key in rows[0]} for row in told]):  # as scan_history() gives them
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row, default=int) for row in each))
        assert (load(tmp_path / "t.jsonl", "csv")[0].counts == counts).all()
    twice = [{**row, "val/layer_0/expert_0": 5} for row in rows]
    with pytest.raises(InputError, match="columns: got moe_layer_4_expert_15, val_layer_0_expert_0; one kind"):
        load(exported(tmp_path, twice), "csv")
    rows[1].popitem()
    rows[1]["lacking"] = ""
    with pytest.raises(InputError, match=r"count: got nothing; a whole number"):
        load(exported(tmp_path, rows), "csv")


@pytest.mark.parametrize("tag", ["moe/layer_{}/expert_{}", "expert_load.l{}.e{}"])
def test_a_line_for_each_step_and_tag(load, tmp_path, tag):
    """As TensorBoard and MLflow export what they plot."""
    counts = routed(np.random.default_rng(8), steps=3)
    long = [
        {"wall_time": 1.7e9 + t, "step": t, "tag": tag.format(i, e), "value": float(n)}
        for (t, i, e), n in np.ndenumerate(counts)
    ]
    traces, _ = load(exported(tmp_path, long), "csv")
    assert (traces.counts == counts).all()
    loss = {"wall_time": 1.7e9, "step": 0, "tag": "train/loss", "value": 2.5}
    traces, notes = load(exported(tmp_path, [loss, *long]), "csv")
    assert (traces.counts == counts).all()
    assert "left unread: tag, wall_time" in notes


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("moe/layer_{}/expert_{}_frac", "is frac no word for it"),
        ("rank0/layer_{}/expert_{}", "of one rank"),
        ("moe/layer_{}/top1/expert_{}", "is top1 no word for it"),
        ("layer_{}/physical_expert_{}", "counts of logical experts"),
    ],
)
def test_tags_of_something_else_than_counts_are_refused(load, tmp_path, tag, said):
    rows = [{"step": 0, "tag": tag.format(i, e), "value": 5} for i in range(2) for e in range(4)]
    with pytest.raises(InputError, match=said):
        load(exported(tmp_path, rows), "csv")
    both = [{**row, "tag": row["tag"].replace("_frac", "") + more} for row in rows for more in ("", "_dropped")]
    with pytest.raises(InputError, match="_dropped; one kind; leave out the others"):
        load(exported(tmp_path, both), "csv")


def test_tags_that_a_step_lacks_are_no_zeros(load, tmp_path):
    """TensorBoard keeps a sample of the steps, of each tag its own."""
    rows = [{"step": t, "tag": f"moe/layer_0/expert_{e}", "value": 5 + e} for t in range(2) for e in range(4)]
    loss = {"step": 2, "tag": "loss", "value": 2.5}
    assert load(exported(tmp_path, [*rows, loss]), "csv")[0].num_steps == 2
    del rows[6]
    with pytest.raises(InputError, match="step 1: got no moe/layer_0/expert_2; a line for each tag at each step"):
        load(exported(tmp_path, [*rows, loss]), "csv")


def test_a_layer_without_counts_in_a_step_is_not_left_out(load, tmp_path):
    rows = [{"step": t, "layer": i, "expert_0": 5, "expert_1": 7} for t in range(2) for i in range(2)]
    rows[3] |= {"expert_0": "", "expert_1": ""}
    with pytest.raises(InputError, match="line 5: count: got nothing"):
        load(exported(tmp_path, rows), "csv")
