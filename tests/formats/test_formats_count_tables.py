"""Count tables of ranks and of all."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from gemopt.exceptions import InputError


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
    assert "4 lines are in several tables: counted once" in notes


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
        ("layer_id,expert_id,count\n0,1,-2\n", "whole number"),
        ("layer_id,expert_id,count\n0,1,2.5\n", "whole number"),
        ("layer_id,expert_id,count\n0,1,1e3\n", "whole number"),
        ("layer_id,expert_id,count\n0,1\n", "3 values"),
        ("layer_id,expert_id,count\n0,99999999,3\n", "below 65536"),
        ("layer_id,layer,expert_id,count\n0,0,1,3\n", "one column for the layer"),
        ("layer_id,expert_id,count,phase\n0,1,3,prefill\n0,2,3,decode\n", "phase: got decode; prefill"),
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
    columns["phase"] = ["prefill", "decode", "decode"]
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    with pytest.raises(InputError, match=r"line 3: phase: got decode; prefill, as in the lines before"):
        load(folder / "a.parquet", "csv")
