"""Count tables as people lay them out: a column for each expert, names around numbers, tables below each other."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError
from gemopt.traces import Phase


@pytest.mark.parametrize("name", ["expert_{}", "Expert {}", "expert{}"])
def test_a_column_for_each_expert(load, tmp_path, name):
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    head = ",".join(["", "step", "model", "layer", *(name.format(e) for e in range(8))])
    rows = [f"{t},m,{layer}," + ",".join(map(str, counts[t, layer])) for t in range(3) for layer in range(2)]
    lines = [f"{i},{row}" for i, row in enumerate(rows)]  # as pandas saves them
    (tmp_path / "a.csv").write_text("\n".join([head, *lines[:4], ",,,,,,,,,,,", head, *lines[4:], ""]))
    traces, notes = load(tmp_path / "a.csv", "csv")
    assert (traces.counts == counts).all() and "model" in notes
    (tmp_path / "a.csv").write_text("\n".join([head, *lines, lines[0].replace("0,0,m,0", "6,0,m,1"), ""]))
    with pytest.raises(InputError, match=r"line 8: .*each layer and expert once"):
        load(tmp_path / "a.csv", "csv")
    (tmp_path / "a.csv").write_text("\n".join([head, lines[0] + ",7", ""]))
    with pytest.raises(InputError, match=r"line 2: .*12 values"):
        load(tmp_path / "a.csv", "csv")


def test_layers_and_experts_with_their_names_around_the_number(load, tmp_path):
    counts = routed(np.random.default_rng(4), steps=1, layers=2, experts=8)
    cells = [(f"model.layers.{3 + i}.mlp", f"expert_{e}", counts[0, i, e]) for i in range(2) for e in range(8)]
    table = ["layer,expert,count", *(",".join(map(str, each)) for each in cells)]
    (tmp_path / "a.csv").write_text("\n".join(table))
    traces, _ = load(tmp_path / "a.csv", "csv")
    assert traces.layer_ids == (3, 4) and (traces.counts == counts).all()
    for other in ("shared_expert_0", "slot_3", "physical_3", "draft_3", "-3", "expert_-3", "expert_3_replica"):
        (tmp_path / "a.csv").write_text("\n".join([*table[:-1], f"model.layers.4.mlp,{other},5"]))
        with pytest.raises(InputError, match=f"line 17: expert: got {other}"):
            load(tmp_path / "a.csv", "csv")


def test_names_of_copies_are_no_experts(load, tmp_path):
    lines = [f"0,expert_{e}_replica,{e * e % 7 + 1}" for e in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["layer,expert,count", *lines]))
    with pytest.raises(InputError, match="expert: got expert_0_replica"):
        load(tmp_path / "a.csv", "csv")


def test_comments_below_the_header(load, tmp_path):
    counts = routed(np.random.default_rng(4), steps=1, layers=2, experts=8)
    lines = [f"{i},{e},{counts[0, i, e]}" for i in range(2) for e in range(8)]
    table = [
        "# model=m",
        "layer,expert,count",
        *lines[:5],
        '# half,"so to say',
        *lines[5:],
        f"# total,{counts.sum()}",
        "",
    ]
    (tmp_path / "a.csv").write_text("\n".join(table))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()


@pytest.mark.parametrize(("step", "count"), [("pass", "selection_count"), ("step_idx", "hit_count")])
def test_more_names_of_steps_and_counts(load, tmp_path, step, count):
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    lines = [f"{t},{i},{e},{counts[t, i, e]}" for t, i, e in np.ndindex(*counts.shape)]
    (tmp_path / "a.csv").write_text("\n".join([f"{step},layer_id,expert_id,{count}", *lines]))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()


@pytest.mark.parametrize("column", ["pass,ok", "num_selected,2"])
def test_such_names_beside_others_that_say_it(load, tmp_path, column):
    counts, (name, cell) = routed(np.random.default_rng(4), steps=3, layers=2, experts=8), column.split(",")
    lines = [f"{t},{i},{e},{counts[t, i, e]},{cell}" for t, i, e in np.ndindex(*counts.shape)]
    (tmp_path / "a.csv").write_text("\n".join([f"step,layer_id,expert_id,count,{name}", *lines]))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()


@pytest.mark.parametrize("name", ["usage", "freq", "count_all_topk"])
def test_counts_by_another_name_are_asked_for(load, tmp_path, name):
    counts = routed(np.random.default_rng(4), steps=1, layers=2, experts=8)
    lines = [f"{i},{e},{counts[0, i, e]}" for i in range(2) for e in range(8)]
    (tmp_path / "a.csv").write_text("\n".join([f"layer_id,expert_id,{name}", *lines]))
    with pytest.raises(InputError, match=f"if {name} is the count, call it count"):
        load(tmp_path / "a.csv", "csv")
    (tmp_path / "a.csv").write_text("\n".join(["layer_id,expert_id,count", *lines]))
    assert (load(tmp_path / "a.csv", "csv")[0].counts == counts).all()


@pytest.mark.parametrize("name", ["moe/layer_{}/expert_{}", "L{} E{}", "model.layers.{}.mlp.experts.{}.tokens"])
def test_a_column_for_each_layer_and_expert(load, tmp_path, name):
    """As loggers of training keep what they plot."""
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    head = ["_step", "_runtime", *(name.format(3 + i, e) for i, e in np.ndindex(2, 8))]
    rows = [[10 * t, 0.5 + t, *step.ravel()] for t, step in enumerate(counts)]
    table = [head, *rows]
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, row)) for row in table))
    traces, notes = load(tmp_path / "a.csv", "csv")
    assert traces.layer_ids == (3, 4) and (traces.counts == counts).all() and "_runtime" in notes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer_{}/expert_{}_ratio", "ratio no word for it"),
        ("layer_{}/expert_{}/latency_ms", "latency no word for it"),
        ("layer_{}/shared_expert_{}", "counts of logical experts"),
        ("layer_{}/local_expert_{}", "counts of logical experts"),
        ("layer_{}/ep_rank_0/expert_{}", "of one rank; counts of all ranks"),
        ("mtp/layer_{}/expert_{}", "of one mtp; counts of all ranks and decoder layers"),
    ],
)
def test_columns_of_layers_and_experts_with_something_else(load, tmp_path, name, words):
    head = [name.format(i, e) for i, e in np.ndindex(2, 8)]
    (tmp_path / "a.csv").write_text("\n".join([",".join(head), ",".join(map(str, range(16)))]))
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize("layout", ["rows", "columns", "json", "json rows"])
def test_phases_of_steps(load, tmp_path, layout):
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    names, wanted = ("prefill", "decode", "mixed"), [Phase.PREFILL, Phase.DECODE, Phase.MIXED]
    cells = [(t, names[t], i, e, n) for (t, i, e), n in np.ndenumerate(counts)]
    wide = [[t, names[t], *step.ravel()] for t, step in enumerate(counts)]
    head = ["step", "phase", *(f"layer_{i}_expert_{e}" for i, e in np.ndindex(2, 8))]
    each = [{"step": t, "phase": names[t], "counts": step.tolist()} for t, step in enumerate(counts)]
    texts = {
        "rows": "\n".join(["step,phase,layer,expert,count", *(",".join(map(str, row)) for row in cells)]),
        "columns": "\n".join(",".join(map(str, row)) for row in [head, *wide]),
        "json": "\n".join(map(json.dumps, each[::-1])),  # by their numbers, not as they come
        "json rows": json.dumps([dict(zip(("step", "phase", "layer", "expert", "count"), row, strict=True))
                                 for row in ((t, p, i, e, int(n)) for t, p, i, e, n in cells)]),
    }  # fmt: skip
    path = tmp_path / ("a.json" if layout.startswith("json") else "a.csv")
    path.write_text(texts[layout])
    traces, notes = load(path, "csv")
    assert (traces.counts == counts).all() and traces.phase.tolist() == wanted
    assert "phase" not in notes
    path.write_text(texts[layout].replace("mixed", "warm-up"))
    with pytest.raises(InputError, match=r"phase: got (warm-up; one of|prefill; warm-up)"):
        load(path, "csv")
    for name in names:
        texts[layout] = texts[layout].replace(name, "train")
    path.write_text(texts[layout])  # the same in all
    traces, notes = load(path, "csv")
    assert traces.phase is None and "phase" in notes


def test_a_phase_without_steps_is_a_step(load, tmp_path):
    counts = routed(np.random.default_rng(4), steps=2, layers=2, experts=8)
    cells = [f"{('prefill', 'decode')[t]},{i},{e},{n}" for (t, i, e), n in np.ndenumerate(counts)]
    (tmp_path / "a.csv").write_text("\n".join(["phase,layer,expert,count", *cells]))
    traces, _ = load(tmp_path / "a.csv", "csv")
    assert (traces.counts == counts).all() and traces.phase.tolist() == [Phase.PREFILL, Phase.DECODE]
    (tmp_path / "b.csv").write_text("\n".join(["step,phase,layer,expert,count", *(f"0,{cell}" for cell in cells)]))
    with pytest.raises(InputError, match="phase: got decode; one phase of a step"):
        load(tmp_path / "b.csv", "csv")


@pytest.mark.parametrize("source", ["csv", "array"])
def test_a_phase_that_one_file_lacks_is_noted(load, tmp_path, source):
    counts = routed(np.random.default_rng(4), steps=2, layers=2, experts=8)
    for t, phase in ((0, {"phase": "decode"}), (1, {})):
        rows = [
            {"step": t, **phase, "layer": i, "expert": e, "count": int(n)} for (i, e), n in np.ndenumerate(counts[t])
        ]
        found = rows if source == "csv" else {"step": t, **phase, "counts": counts[t].tolist()}
        (tmp_path / f"{t}.json").write_text(json.dumps(found))
    traces, notes = load([tmp_path / "0.json", tmp_path / "1.json"], source)
    assert (traces.counts == counts).all() and traces.phase is None and "lack are left unread" in notes


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_cell_for_all_experts(load, tmp_path, suffix):
    """As data frames hold lists: of each layer and step."""
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    cells = [(t, i, counts[t, i].tolist()) for t, i in np.ndindex(3, 2)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("\n".join(["step,layer_idx,expert_counts", *(f'{t},{i},"{row}"' for t, i, row in cells)]))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = dict(zip(("step", "layer", "counts"), map(list, zip(*cells, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), path)
    assert (load(path, "csv")[0].counts == counts).all()
    if suffix == ".csv":
        for text, words in (
            ('step,layer,counts\n0,0,"[1, 2]"\n0,1,"[1, 2, 3]"', "line 3: .*2 counts in counts"),
            ('layer,expert_load_ratio\n0,"[1, 2]"', "ratio no word for it"),
            ('layer,tokens\n0,"[1, 2]"', "columns"),
            ('layer,counts,expert_load\n0,"[1, 2]","[1, 2]"', "columns"),
        ):
            path.write_text(text)
            with pytest.raises(InputError, match=words):
                load(path, "csv")


def test_what_follows_from_the_counts_beside_it(load, tmp_path):
    """Tokens and totals of a line, which were taken for counts of experts, or for what tells lines apart."""
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    counts[2, 0] = 0  # a share of nothing is nothing
    cells = [(t, i, int(row.sum()) // 2, row.max(), 2 * int(row.sum()), row) for t in range(3) for i in range(2)
             for row in [counts[t, i]]]  # fmt: skip
    head = "step,layer,num_tokens,peak,total"
    wide = [f"{head},{','.join(f'expert_{e}' for e in range(8))}"]
    wide += [",".join(map(str, [*cell[:5], *cell[5]])) for cell in cells]
    lists = [f"{head},expert_counts", *(",".join(map(str, cell[:5])) + f',"{cell[5].tolist()}"' for cell in cells)]
    floats = [wide[0], *(",".join(f"{cell}.0" for cell in line.split(",")) for line in wide[1:])]  # as pandas has them
    for table in (wide, lists, floats):
        (tmp_path / "a.csv").write_text("\n".join(table))
        traces, notes = load(tmp_path / "a.csv", "csv")
        assert (traces.counts == counts).all() and "left unread: num_tokens, peak, total" in notes
        for name, words in (("num_tokens", "num_tokens beside counts"), ("weight", "weight: got"), ("gpu", "gpu: got")):
            cut = re.sub(r"^(2(?:\.0)?,1(?:\.0)?,)", r"\g<1>1", table[-1])
            other = [table[0].replace("num_tokens", name), *table[1:-1], cut]
            (tmp_path / "a.csv").write_text("\n".join(other))
            with pytest.raises(InputError, match=words):
                load(tmp_path / "a.csv", "csv")


def test_a_first_line_that_is_longer_is_not_left_out(load, tmp_path):
    (tmp_path / "a.csv").write_text('step,layer,counts\n0,0,"[1, 2]",7\n1,0,"[1, 3]"')
    with pytest.raises(InputError, match=r"line 2: .*3 values, and 2 counts in counts"):
        load(tmp_path / "a.csv", "csv")


@pytest.mark.parametrize("name", ["percentage", "fraction", "load_ratio"])
def test_shares_beside_counts_tell_no_lines_apart(load, tmp_path, name):
    counts = routed(np.random.default_rng(4), steps=1, layers=2, experts=8)
    lines = [f"{i},{e},{n},{n / counts[0, i].sum():.4f}" for i in range(2) for e, n in enumerate(counts[0, i])]
    path = tmp_path / "a.csv"
    path.write_text("\n".join([f"layer,expert,count,{name}", *lines]))
    traces, notes = load(path, "csv")
    assert (traces.counts == counts).all() and f"left unread: {name}" in notes
    path.write_text(path.read_text().replace(name, "temperature"))
    with pytest.raises(InputError, match="line 3: temperature"):
        load(path, "csv")


def test_numbers_of_rows_as_pandas_saves_them(load, tmp_path):
    """Of a frame of which rows were taken: in parquet a column of its own, in CSV without a name, or saved again."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    counts = routed(np.random.default_rng(4), steps=3, layers=2, experts=8)
    cells = [(t, i, e, counts[t, i, e]) for t in range(3) for i in range(2) for e in range(8)]
    frame = pandas.DataFrame(cells, columns=["step", "layer", "expert", "count"])
    frame = frame[frame["count"] > 0]
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv")
    pandas.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "b.csv", index=False)
    for name in ("a.parquet", "a.csv", "b.csv"):
        traces, notes = load(tmp_path / name, "csv", num_experts=8)
        assert (traces.counts == counts).all() and "index" not in notes and "nnamed" not in notes
