"""Count tables and arrays of ranks and of all, their parts in time, and what their counts tell."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError
from gemopt.traces import Traces


def table(path, rows, header="layer_id,expert_id,count"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows), ""]))
    return path


def rows_of(counts, layers=(3, 4)):
    return [(layer, e, n) for layer, row in zip(layers, counts, strict=True) for e, n in enumerate(row) if n]


@pytest.mark.parametrize("source", ["sglang", "csv", "array"])
def test_count_tables_of_ranks(load, folder, source):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (2, 3, 2, 8)) * rng.integers(1, 30, (2, 3, 2, 8))  # [dumps, ranks, layers, experts]
    for dump, ranks in enumerate(counts):
        for rank, each in enumerate(ranks):
            table(folder / f"expert_distribution_rank{rank}_timestamp{dump + 1}.{9 - rank}.csv", rows_of(each))
    traces, notes = load(folder if source != "array" else sorted(folder.iterdir()), source, num_experts=8)
    assert (traces.counts == counts.sum(axis=1)).all()
    assert traces.layer_ids == (3, 4)
    assert "2 steps, one for each table of a rank" in notes
    sorted(folder.glob("*rank1*"))[0].unlink()
    with pytest.raises(InputError, match="as many tables of every rank"):
        load(folder, "csv")
    for path in folder.glob("*rank1*"):
        path.unlink()
    with pytest.raises(InputError, match="rank 1 is missing"):
        load(folder, "csv")


def test_count_tables_say_what_they_lack(load, folder):
    path = table(folder / "a.csv", [(3, 0, 5), (3, 5, 7), (4, 1, 9)])
    traces, notes = load(path, "csv")
    assert traces.counts.tolist() == [[[5, 0, 0, 0, 0, 7], [0, 9, 0, 0, 0, 0]]]
    for word in ("6 experts, the highest id seen + 1", "a single step", "never chosen in any layer (2-4)"):
        assert word in notes
    with pytest.raises(InputError, match=r"experts 0 to 3.*slots of copies, make them logical experts"):
        load(path, "csv", num_experts=4)
    gaps = table(folder / "gaps.csv", [(3, 0, 5), (3, 1, 7), (6, 1, 9), (8, 0, 1)])
    assert "layers 4-5, 7 have no counts: taken as layers without experts" in load(gaps, "csv")[1]
    same = [table(folder / f"x_rank{rank}.csv", [(0, 0, 5), (0, 1, 6)]) for rank in range(3)]
    traces, notes = load(same, "csv")
    assert traces.counts.tolist() == [[[5, 6]]]
    assert "all 3 ranks recorded the same counts" in notes
    _, notes = load(same[0], "csv")
    assert "rank 0 alone" in notes
    traces, notes = load([path, table(folder / "b.csv", [(3, 0, 5), (3, 5, 7), (4, 1, 9)])], "csv")
    assert traces.num_steps == 1
    assert "b.csv is a.csv again: counted once" in notes


def test_count_tables_with_steps_and_ranks(load, folder):
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, (3, 2, 2, 4))  # [steps, ranks, layers, experts]
    rows = [
        (step + 7, rank, layer, expert, f"{counts[step, rank, layer, expert]}.0", "m")
        for step in range(3)
        for rank in range(2)
        for layer in range(2)
        for expert in range(4)
    ]
    rng.shuffle(rows)
    head = "iteration, Rank ,layer,expert,num_tokens,model"
    path = table(folder / "t.csv", rows, head)
    traces, _ = load(path, "csv")
    assert (traces.counts == counts.sum(axis=1)).all()
    part = [row for row in rows if row[:2] != (8, 1)]
    assert "in 1 of 3 steps some ranks have no line" in load(table(folder / "u.csv", part, head), "csv")[1]
    half = [table(folder / f"{name}.csv", part, head) for name, part in (("p", rows[:20]), ("q", rows[16:]))]
    traces, notes = load(half, "csv")
    assert (traces.counts == counts.sum(axis=1)).all()
    assert "4 lines in several tables: counted once" in notes


def test_tables_of_layers_and_totals(load, folder):
    counts = np.random.default_rng(2).integers(1, 30, (4, 3, 8))
    rows = [(*key, n) for key, n in np.ndenumerate(counts)]
    head = "step;layer;expert;count"
    for layer in range(3):
        own = [";".join(map(str, row)) for row in rows if row[1] == layer]
        (folder / f"layer_{layer}.csv").write_text("\n".join([head, *own]))
    assert (load(folder, "csv")[0].counts == counts).all()
    apart = [table(folder / f"{name}.csv", [(layer, 0, 5)]) for layer, name in enumerate("abc")]
    with pytest.raises(InputError, match="layers 0; 1; 2; all layers in the table of a step"):
        load(apart, "csv")
    total = [(step, 3, e, n) for step in range(4) for e, n in enumerate(counts[step].sum(axis=0))]
    path = table(folder / "t.csv", rows + total, "step,layer,expert,count")
    with pytest.raises(InputError, match="a last layer that is the sum of the others"):
        load(path, "csv")
    path = table(folder / "t.csv", [(0, *row) for row in rows[1:]] + [(1, *rows[0])], ",step,layer,expert,count")
    with pytest.raises(InputError, match="column 1: got 1; 0, as in the lines before"):
        load(path, "csv")


def test_tables_as_programs_write_them(load, folder):
    counts = np.random.default_rng(3).integers(1, 30, (4, 3, 8))
    rows = [(*key, n) for key, n in np.ndenumerate(counts)]
    for name, head, lines in (
        ("a.csv", ",Step,Layer ID,Expert ID,Num Tokens", [(2 * i, *row) for i, row in enumerate(rows)]),  # pandas'
        ("b.csv", "iteration,layer,expert,activation_count", rows),
        ("c.tsv", "step\tlayer\texpert\thits", [("\t".join(map(str, row)),) for row in rows]),
    ):
        assert (load(table(folder / name, lines, head), "csv")[0].counts == counts).all()
    (folder / "c.npy.gz").write_bytes(gzip.compress(bytes(99)))
    with pytest.raises(InputError, match=r"c\.npy\.gz: got binary data; a CSV table, perhaps gzipped"):
        load(folder / "c.npy.gz", "array")


@pytest.mark.parametrize(
    "text,word",
    [
        ("", "layer_id, expert_id, count"),
        ("layer_id,expert_id\n0,1\n", "layer_id, expert_id, count"),
        ("layer_id,physical_expert_id,count\n0,1,2\n", "layer_id, expert_id, count"),
        ("layer_id,expert_id,count\n", "at least one line"),
        ("layer_id,expert_id,count\n0,1,2\n0,1,2\n", "line 3: got 0,1,2; each layer and expert once"),
        ("step,layer,expert,count\n0,0,1,2\n0,0,1,3\n", "each layer and expert once; of a run that began again?"),
        ("layer_id,expert_id,count\n0,1,-2\n", "whole number"),
        ("layer_id,expert_id,count\n0,1,2.5\n", "whole number"),
        ("layer_id,expert_id,count\n0,1,1e-03\n", "whole number"),
        ("layer_id,expert_id,count\n0,1\n", "3 values"),
        ("layer_id,expert_id,count\n0,99999999,3\n", "below 8192"),
        ("layer_id,layer,expert_id,count\n0,0,1,3\n", "one column for the layer"),
        ("layer_id,expert_id,count,task\n0,1,3,maths\n0,2,3,code\n", "task: got code; maths"),
        ("layer_id,expert_id,count\n0,1,0\n", "no step"),
        ("layer_id,expert_id,count\n0,1,0\n1,1,4\n", "if 0 have no experts, give --layer-ids 1"),
        ("layer_id,expert_id,count\n\x00", "3 values"),
    ],
)
def test_tables_that_are_refused(load, folder, text, word):
    (folder / "t.csv").write_text(text)
    with pytest.raises(InputError, match=word) as caught:
        load(folder / "t.csv", "csv")
    assert "\n" not in str(caught.value)


def test_columns_that_tell_tables_apart_are_refused(load, folder):
    for gpu in range(2):
        table(
            folder / f"{'ab'[gpu]}.csv",
            [(0, 0, 5, gpu, "x"), (0, 1, 6 + gpu, gpu, "x")],
            "layer,expert,count,gpu,model",
        )
    with pytest.raises(InputError, match=r"b\.csv: line 2: gpu: got 1; 0, as in the lines before.*apart what it tells"):
        load(folder, "csv")
    assert "the same in all lines are left unread: gpu, model" in load(folder / "a.csv", "csv")[1]


def test_packed_tables(load, folder):
    text = "step,layer,expert,count\n0,3,0,5\n0,3,1,2\n1,3,0,1\n"
    (folder / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert load(folder, "csv")[0].counts.tolist() == [[[5, 2]], [[1, 0]]]
    (folder / "a.csv.gz").write_bytes(gzip.compress(text.encode())[:30])
    with pytest.raises(InputError, match=r"a\.csv\.gz: got Compressed file ended"):
        load(folder, "csv")
    (folder / "a.csv.gz").unlink()
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"step": [0, 0, 1], "layer": [3, 3, 3], "expert": [0, 1, 0], "count": [5.0, 2.0, 1.0]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    assert load(folder / "a.parquet", "array")[0].counts.tolist() == [[[5, 2]], [[1, 0]]]
    columns["task"] = ["maths", "code", "code"]
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    with pytest.raises(InputError, match=r"line 3: task: got code; maths, as in the lines before"):
        load(folder / "a.parquet", "csv")


def test_parts_of_the_same_steps_are_not_joined_in_time(load, tmp_path):
    rng = np.random.default_rng(7)
    for rank in range(2):
        np.save(tmp_path / f"load_rank{rank}.npy", routed(rng))
    with pytest.raises(InputError, match=r"load_rank0\.npy, load_rank1\.npy; steps that follow each other"):
        load(tmp_path, "array")
    for rank in range(2):
        (tmp_path / f"ep{rank}.csv").write_text("layer,expert,count\n0,1,2\n")
    with pytest.raises(InputError, match=r"ep0\.csv, ep1\.csv; steps that follow each other"):
        load(tmp_path, "csv")
    for path in (tmp_path / "rank_0", tmp_path / "rank_1", tmp_path / "stages"):
        path.mkdir()
    for rank in range(2):
        np.save(tmp_path / f"rank_{rank}" / "load.npy", routed(rng))
        np.save(tmp_path / "stages" / f"stage{rank}.npy", routed(rng))
    np.save(tmp_path / "stages" / "all.npy", routed(rng))
    with pytest.raises(InputError, match=r"rank_0/load\.npy, rank_1/load\.npy; steps that follow each other"):
        load(sorted(tmp_path.glob("rank_*/*")), "array")
    with pytest.raises(InputError, match=r"all\.npy, stage0\.npy, stage1\.npy; steps that follow each other"):
        load(tmp_path / "stages", "array")
    np.savez(tmp_path / "a.npz", counts=routed(rng), physical_to_logical_map=np.zeros((5, 16), int))
    with pytest.raises(InputError, match="physical_to_logical_map beside counts; counts of logical experts"):
        load(tmp_path / "a.npz", "array")
    Traces(counts=routed(rng), layer_ids=range(3, 8)).save(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="got traces of gemopt"):
        load(tmp_path / "t.safetensors", "array")
    for name, said in (("topk_ids", "an array topk_ids"), ("physical_count", "counts of logical experts")):
        np.savez(tmp_path / "a.npz", **{name: routed(rng)})
        with pytest.raises(InputError, match=said):
            load(tmp_path / "a.npz", "array")


def test_files_follow_each_other_by_the_numbers_in_their_names(load, tmp_path):
    counts = routed(np.random.default_rng(11))
    (tmp_path / "one").mkdir()
    for step, each in enumerate(counts):
        np.save(tmp_path / "one" / f"node0_{step}.npy", each[None].astype(float))
    for paths in (tmp_path / "one", sorted((tmp_path / "one").iterdir())):
        traces, notes = load(paths, "array")
        assert (traces.counts == counts).all()
        assert "12 files, one after the other in time: node0_0.npy to node0_11.npy" in notes
    traces, _ = load([tmp_path / "one" / f"node0_{step}.npy" for step in (3, 0)], "array")  # as they were given
    assert (traces.counts == counts[[3, 0]]).all()
    np.save(tmp_path / "one" / "sum.npy", counts.sum(axis=0, keepdims=True))
    with pytest.raises(InputError, match="a last step that is the sum of the others"):
        load(tmp_path / "one", "array")


def test_layers_with_other_sums_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(12))
    np.save(tmp_path / "a.npy", counts)
    assert "another sum" not in load(tmp_path / "a.npy", "array")[1]
    draft = routed(np.random.default_rng(13), layers=1, tokens=11)
    draft[0] *= 2
    np.save(tmp_path / "a.npy", np.concatenate([counts, draft], axis=1))
    assert (
        "in 12 of 12 steps layers 5 have another sum than others: draft layers" in load(tmp_path / "a.npy", "array")[1]
    )


def test_experts_that_every_rank_numbers_anew_are_refused(load, tmp_path):
    counts = routed(np.random.default_rng(8), steps=1)[0]
    lines = [(layer, expert, int(n)) for (layer, expert), n in np.ndenumerate(counts)]
    local = "".join(f"{layer},{expert // 4},{expert % 4},{n}\n" for layer, expert, n in lines)
    owned = "".join(f"{layer},{expert // 4},{expert},{n}\n" for layer, expert, n in lines)
    (tmp_path / "a.csv").write_text("layer,rank,expert,count\n" + local)
    with pytest.raises(InputError, match="4 experts that are others on every rank"):
        load(tmp_path / "a.csv", "array")
    (tmp_path / "a.csv").write_text("layer,rank,expert,count\n" + owned)
    assert (load(tmp_path / "a.csv", "array")[0].counts[0] == counts).all()
    copied = "".join(f"{layer},{rank},{expert},{n // 2}\n" for layer, expert, n in lines for rank in {expert // 4, 3})
    (tmp_path / "a.csv").write_text("layer,rank,expert,count\n" + copied)
    assert load(tmp_path / "a.csv", "array")[0].num_experts == 16  # copies of all on the last rank
    from_1 = "".join(f"{layer},{expert + 1},{n}\n" for layer, expert, n in lines)
    (tmp_path / "a.csv").write_text("layer,expert,count\n" + from_1)
    assert "none is 0: are they numbered from 1?" in load(tmp_path / "a.csv", "array")[1]
    with pytest.raises(InputError, match="numbered from 1"):
        load(tmp_path / "a.csv", "array", num_experts=16)


def spelt(counts, cell=str, separator=",", comment=""):
    """A table of every count."""
    lines = [separator.join([comment + "step", "layer_id", "expert_id", "count"])]
    lines += [separator.join(map(cell, (*where, counts[where]))) for where in np.ndindex(counts.shape)]
    return "\n".join([*lines, ""])


@pytest.mark.parametrize(
    "content",
    [
        lambda c: spelt(c).encode("utf-16"),  # as PowerShell redirects
        lambda c: gzip.compress(spelt(c, separator="\t").encode("utf-16")),
        lambda c: spelt(c, separator="|").encode(),
        lambda c: ("# model: x\n\n" + spelt(c)).encode().replace(b"\n\n", b"\n"),
        lambda c: ("#\n" + spelt(c, comment="# ")).encode(),  # as numpy.savetxt writes a header
        lambda c: spelt(c, cell=lambda n: f"{n:.18e}", comment="# ").encode(),
        lambda c: spelt(c, cell=lambda n: f"{n:.9E}").encode(),
    ],
)
def test_tables_as_other_programmes_write_them(load, folder, content):
    counts = routed(np.random.default_rng(2), steps=3)
    data = content(counts)
    path = folder / ("a.csv.gz" if data[:2] == b"\x1f\x8b" else "a.csv")
    path.write_bytes(data)
    assert (load(path, "csv", num_experts=16)[0].counts == counts).all()


def test_lines_are_counted_with_the_comments(load, folder):
    (folder / "a.csv").write_text("# made on a Monday\n#layer,expert,count\n0,0,4\n0,1,x\n")
    with pytest.raises(InputError, match="line 4: count: got x"):
        load(folder / "a.csv", "csv")


def test_dots_between_thousands_are_refused(load, folder):
    (folder / "a.csv").write_text("layer;expert;count\n0;0;1.000\n0;1;2.000\n")
    with pytest.raises(InputError, match=r"line 2: got 1.000; a fraction, or thousands"):
        load(folder / "a.csv", "csv")


@pytest.mark.parametrize("header", ["layer_id,expert_ids", "token,layer,expert,weight", "layer,expert"])
def test_tables_of_tokens_are_told_how_to_count(load, folder, header):
    (folder / "a.csv").write_text(header + "\n" + ",".join("1" * (header.count(",") + 1)) + "\n")
    with pytest.raises(InputError, match="from_tokens counts "):
        load(folder / "a.csv", "csv")


def test_a_number_that_stands_for_no_expert(load, folder):
    counts = routed(np.random.default_rng(5), steps=2)
    rows = [(layer, e, 1 + int(n)) for (layer, e), n in np.ndenumerate(counts.sum(axis=0))]
    path = table(folder / "a.csv", [*rows, (0, 255, 9)], header="layer,expert,count")
    with pytest.raises(InputError, match=r"expert: got 255, and no other above 15; .*give --num-experts"):
        load(path, "csv")
    assert load(path, "csv", num_experts=256)[0].num_experts == 256
    few = table(folder / "b.csv", [(0, 3, 5), (0, 200, 7)], header="layer,expert,count")
    assert load(few, "csv")[0].num_experts == 201


def test_a_column_of_other_names_may_number_the_steps(load, folder):
    rows = [(t, layer, e, 1 + t * t) for t in range(3) for layer in range(2) for e in range(4)]
    path = table(folder / "a.csv", rows, header="batch,layer,expert,count")
    with pytest.raises(InputError, match=r"batch: got 1; 0, .*call it step if it numbers the steps"):
        load(path, "csv")
    table(path, rows, header="step,layer,expert,count")
    assert load(path, "csv")[0].counts[:, 1, 2].tolist() == [1, 2, 5]


def test_sizes_of_numbered_steps_are_left_unread(load, tmp_path):
    counts = np.random.default_rng(3).integers(0, 30, (4, 2, 8))
    rows = [
        {"step": t, "batch_size": 64 - t // 2, "layer": i, "expert": e, "count": int(counts[t, i, e])}
        for t in range(4) for i in range(2) for e in range(8)
    ]  # fmt: skip
    text = "\n".join(",".join(map(str, row.values())) for row in rows)
    (tmp_path / "a.csv").write_text(",".join(rows[0]) + "\n" + text)
    steps = [{"step": t, "batch_size": 64 - t // 2, "counts": counts[t].tolist()} for t in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, steps)))
    for name in ("a.csv", "a.jsonl"):
        traces, notes = load(tmp_path / name, "csv" if name == "a.csv" else "array")
        assert (traces.counts == counts).all() and "batch_size" in notes
    (tmp_path / "a.csv").write_text((",".join(rows[0]) + "\n" + text).replace("step", "moment"))
    with pytest.raises(InputError, match="call it step if it numbers the steps"):
        load(tmp_path / "a.csv", "csv")
