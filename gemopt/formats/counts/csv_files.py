"""Tables of counts, `layer_id,expert_id,count`: what SGLang's recorder wrote until May 2025, and others still do.

A line for every expert that got tokens; absent lines are zeros; or a line for every layer, with columns `expert_0`,
`expert_1`, ... A table may hold several steps (a column `step`), their phases and several ranks; files named
`..._rank0_...` hold a rank each, and the n-th files of all ranks make step n. Anything else that differs between the
lines is refused: it might be what the counts must be split by. Tables may be gzipped, or parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.counts import json_files
from gemopt.formats.counts.lines import INDEX, by_expert, by_tag, lines_of, meanings, without_ranges
from gemopt.formats.counts.told import numbers, refuse_own_layers
from gemopt.formats.engine import IntArray, Recording, TraceOptions
from gemopt.formats.findings import (
    experts_of,
    own_counts,
    ranges,
    refuse_local,
    refuse_map,
    refuse_no_counts,
    refuse_parts,
    refuse_tokens,
)
from gemopt.formats.names import COLUMNS, HEEDED, PARALLEL, TOKENS, is_result, layer_doubts, phase_of
from gemopt.formats.pipelines import refuse_named_stages, refuse_stages
from gemopt.formats.recorded_files import files_of, left_alone, names_of
from gemopt.traces import COUNT_LIMIT, Phase
from gemopt.traces.arrays import MAX_EXPERTS, refuse_totals
from gemopt.traces.files import COPIES
from gemopt.words import counted

SUFFIXES = (".csv", ".tsv", ".gz", ".parquet")
_SAVED_INDEX = re.compile(r"unnamed_0(_\d+)?")  # once more, as pandas names it
_LIMIT = {"layer": 4096, "expert": MAX_EXPERTS, "count": COUNT_LIMIT, "step": 1 << 62, "rank": 1 << 16}
_RANK = re.compile(r"(?:^|[/_.-])rank[_-]?(\d{1,5})(?=[/_.-]|$)", re.IGNORECASE)
_POWER = re.compile(r"\d(?:\.\d+)?[eE][+-]?\d\d", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}(?:\.0*)?", re.ASCII)
_NAMED = re.compile(r"([A-Za-z][A-Za-z_.\[ -]*)(\d{1,9})([\]A-Za-z_. ]*)", re.ASCII)  # layer_3, model.layers.3.mlp
Key = tuple[int, int, int]  # step, layer, expert


@dataclass
class _Table:
    """Counts of a file by rank and by step, layer and expert."""

    path: Path
    name: str  # as `names_of` tells it from the others
    ranks: dict[int, dict[Key, int]] = field(default_factory=dict)
    has_steps: bool = False
    unnamed: bool = False  # nothing in it is called count
    counted: str = ""  # the name of the column with the counts
    layer: str = ""
    phase: str = ""
    parallel: bool = False  # the column of ranks says that they are none of a pipeline
    named: dict[str, tuple[str, str]] = field(default_factory=dict)  # what is around the number, by meaning
    results: set[str] = field(
        default_factory=set
    )  # columns with times, results and names of layers, which tell no lines apart
    phases: dict[int, Phase] = field(default_factory=dict)  # of the steps
    index: dict[int, tuple[int, int]] = field(default_factory=dict)  # last line and its number, by column INDEX


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read count tables, summed over the ranks."""
    options.refuse_unused("tables of counts", "num_ranks")
    files = files_of(paths, *SUFFIXES, else_of=json_files.SUFFIXES)
    others: dict[str, str] = {}  # what the columns say that are not known
    tables = [_read(path, name, others) for path, name in zip(files, names_of(files), strict=True)]
    layers_of = [(table.name, {layer for counts in table.ranks.values() for _, layer, _ in counts}) for table in tables]
    refuse_named_stages(layers_of, options.no_pipeline)
    by_rank = any(_RANK.search(table.name) for table in tables)
    notes: list[str] = []
    steps = _steps(tables, notes, by_rank)
    ranks = sorted({rank for step in steps for rank in step})
    expected = options.num_ranks or ranks[-1] + 1
    if ranks != list(range(expected)):
        missing = sorted(set(range(expected)) - set(ranks))
        hint = f"rank {missing[0]} is missing" if missing else "give the right --ep"
        raise InputError("PATHS: ranks", ", ".join(map(str, ranks)), f"tables of each of the {expected} ranks", hint)
    if by_rank and len(ranks) == 1:
        notes.append(f"tables of rank {ranks[0]} alone: what other ranks recorded is not in them")
    keys = [key for step in steps for counts in step.values() for key in counts]
    layers = sorted({layer for _, layer, _ in keys})
    results = set().union(*(table.results for table in tables))
    told = numbers({name: cell for name, cell in others.items() if name not in results})
    refuse_own_layers(others, layers[0])
    number = told.pop("num_experts", options.num_experts)
    if options.num_experts not in (None, number):
        raise InputError("--num-experts", options.num_experts, f"{number}, as the tables say")
    experts = experts_of("PATHS: expert", sorted({expert for *_, expert in keys}), number, notes)
    notes += layer_doubts(tables[0].layer, layers[0])
    recorded = {rank: tuple(tuple(sorted(step[rank].items())) for step in steps) for rank in ranks}
    own = own_counts({rank: counts if any(counts) else None for rank, counts in recorded.items()})
    notes += [own.note] if own.note else []
    notes += json_files.said(files) + left_alone(paths, files, json_files.SUFFIXES)
    notes += _unread(tables, others)
    if len(own.ranks) > 1:
        notes.append(f"{len(own.ranks)} ranks are added up, expert by expert")
        each_RTLE = np.stack([_dense(steps, [rank], layers, experts) for rank in own.ranks])
        if any(table.unnamed for table in tables):
            refuse_map(each_RTLE.reshape(-1, *each_RTLE.shape[2:]))
        refuse_local(each_RTLE)
        no_pipeline = options.no_pipeline or all(table.parallel for table in tables)
        doubt = refuse_stages(own.ranks, each_RTLE.sum(axis=3), no_pipeline)
        notes += [doubt] if doubt else []
    total = _dense(steps, own.ranks, layers, experts)
    for name in TOKENS & {table.counted for table in tables}:
        refuse_tokens(f"PATHS: {name}", total)
    refuse_totals("PATHS: counts", total)
    refuse_no_counts(total, mapped=any(table.unnamed for table in tables), ids=options.num_experts is None)
    busy = total.any(axis=(1, 2))
    used, phase = total[busy], _phases(tables)
    return Recording(
        blocks=lambda: iter([used] if len(used) else []),
        layer_ids=tuple(layers),
        phase=None if phase is None else phase[busy],
        top_k=json_files.top_k(files) or told.get("top_k"),
        notes=notes,
    )


def _unread(tables: list[_Table], others: dict[str, str]) -> list[str]:
    """Notes on the columns left unread; others: those that say the same in all lines."""
    results = sorted(set().union(*(table.results for table in tables)))
    told = {bool(table.phases) for table in tables}
    phases = sorted({table.phase for table in tables} - {""})
    known = [*results, *(phases if True in told else ())]
    said = (
        ("times, results and names", results),
        ("columns that say the same in all lines", [n for n in others if n not in known and n not in HEEDED]),
        ("columns that some tables lack", phases if len(told) > 1 else ()),
    )
    return [f"{which} are left unread: {', '.join(names)}" for which, names in said if names]


def _phases(tables: list[_Table]) -> IntArray | None:
    """[T] the phases of all steps, None where not all tables tell them."""
    told: dict[int, Phase] = {}
    for table in tables:
        for step, phase in table.phases.items():
            if told.setdefault(step, phase) != phase:
                raise InputError(f"{table.path}: phase", f"{phase.name} in step {step}", "that of other tables")
    return np.array([int(told[step]) for step in sorted(told)]) if all(table.phases for table in tables) else None


def _dense(steps: list[dict[int, dict[Key, int]]], ranks: list[int], layers: list[int], experts: int) -> IntArray:
    total = np.zeros((len(steps), len(layers), experts), np.int64)
    row = {layer: i for i, layer in enumerate(layers)}
    for i, step in enumerate(steps):
        for rank in ranks:
            for (_, layer, expert), count in step[rank].items():
                total[i, row[layer], expert] += count
    return total


def _steps(tables: list[_Table], notes: list[str], named: bool) -> list[dict[int, dict[Key, int]]]:
    """For each step the counts by rank; named: by the names of the files."""
    if any(table.has_steps for table in tables):
        return _steps_of_column(tables, notes, named)
    if not named:
        refuse_parts([table.path for table in tables])
    by_rank: dict[int, list[tuple[_Table, dict[Key, int]]]] = {}
    for table in sorted(tables, key=_order):
        for rank, counts in table.ranks.items():
            earlier = [other.path.name for other, known in by_rank.get(rank, []) if known == counts]
            if earlier:
                notes.append(f"{table.path.name} is {earlier[0]} again: counted once")
            else:
                by_rank.setdefault(rank, []).append((table, counts))
    lengths = {len(found) for found in by_rank.values()}
    if len(lengths) > 1:
        found = ", ".join(f"{len(found)} of rank {rank}" for rank, found in sorted(by_rank.items()))
        raise InputError("PATHS", found, "as many tables of every rank", "a table is missing")
    count = lengths.pop()
    for given in by_rank.values():
        layers = [{layer for _, layer, _ in counts} for _, counts in given]
        if count > 1 and sum(map(len, layers)) == len(set.union(*layers)):
            parts = "; ".join(map(ranges, layers))
            raise InputError("PATHS", f"layers {parts}", "all layers in the table of a step", "make it one table")
    notes.append(
        f"{counted(count, 'step')}, one for each table of a rank, in the order of their names"
        if count > 1
        else "counts added up: a single step, so how they vary in time is not known"
    )
    return [{rank: found[i][1] for rank, found in by_rank.items()} for i in range(count)]


def _steps_of_column(tables: list[_Table], notes: list[str], named: bool) -> list[dict[int, dict[Key, int]]]:
    merged: dict[int, dict[int, dict[Key, int]]] = {}
    again = 0
    for table in tables:
        if not table.has_steps:
            raise InputError(f"{table.path}: columns", "no step", "a column step in every table, or in none")
        for rank, counts in table.ranks.items():
            for key, count in counts.items():
                known = merged.setdefault(key[0], {}).setdefault(rank, {})
                again += key in known
                if known.get(key, count) != count:
                    refuse_parts([table.path for table in tables])
                    where = f"step {key[0]}, layer {key[1]}, expert {key[2]} of rank {rank}"
                    raise InputError(f"{table.path}: {where}", "twice, with other counts", "each once")
                known[key] = count
    if again:
        if not named:
            refuse_parts([table.path for table in tables])
        notes.append(f"{counted(again, 'line')} in several tables: counted once")
    ranks = sorted({rank for step in merged.values() for rank in step})
    if partly := sum(len(step) < len(ranks) for step in merged.values()):
        notes.append(f"in {partly} of {len(merged)} steps some ranks have no line: taken as no tokens")
    return [{rank: step.get(rank, {}) for rank in ranks} for _, step in sorted(merged.items())]


def _order(table: _Table) -> tuple[list[float], str]:
    """Tables in the order of the numbers in their names, the rank left out."""
    name = _RANK.sub("", table.name)
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", name)], table.path.name


def _read(path: Path, name: str, others: dict[str, str]) -> _Table:
    table = _Table(path, name)
    named = _RANK.search(name)
    lines = lines_of(path)
    header = [re.sub(r"\W+", "_", cell.strip().casefold()) for cell in next(lines, (1, []))[1]]
    header = [name or f"column {i}" for i, name in enumerate(header, start=1)]
    header = [INDEX if _SAVED_INDEX.fullmatch(name) else name for name in header]
    header, lines = without_ranges(path, header, lines)
    given = header
    header, lines = by_tag(path, header, lines, table.results)
    header, lines = by_expert(path, header, lines, COLUMNS, table.results)
    table.unnamed = not json_files.read(path).named if json_files.is_json(path) else header is not given
    columns = meanings(path, header)
    table.has_steps, table.counted, table.layer = "step" in columns, *(header[columns[m]] for m in ("count", "layer"))
    table.parallel = "rank" in columns and header[columns["rank"]] in PARALLEL
    for number, row in lines:
        if any(row):
            _add(table, number, row, header, columns, others, int(named[1]) if named else 0)
    if not table.ranks:
        raise InputError(str(path), "no line with counts", "at least one line")
    if named and {*table.ranks} != {int(named[1])}:
        found = f"{named[1]} in the name and {', '.join(map(str, sorted(table.ranks)[:4]))} in a column"
        raise InputError(f"{path}: rank", found, "one of the two, or the same rank in both")
    return table


def _add(
    table: _Table,
    number: int,
    row: list[str],
    header: list[str],
    columns: dict[str, int],
    others: dict[str, str],
    rank: int,
) -> None:
    where = f"{table.path}: line {number}"
    if len(row) != len(header):
        raise InputError(where, ",".join(row)[:200], f"{len(header)} values: {','.join(header)[:200]}")
    used = columns.values()
    for i, text in enumerate(row) if len(used) < len(row) else ():
        if header[i] == INDEX:
            line, last = table.index.get(i, (0, -1))
            if text.isdigit() and (int(text) > last or number == line):  # of a line for each expert in one
                table.index[i] = number, int(text)
                continue
            table.index[i] = 0, COUNT_LIMIT
        if i not in used and (first := others.setdefault(header[i], text)) != text:
            own = (row[columns[meaning]] for meaning in ("layer", "expert") if meaning in columns)
            result = header[i] in table.results and bool(re.fullmatch(r"-?[\d.]+", text))  # 1.0 among fractions
            if result or is_result(header[i], first, text, table.has_steps) or _names(first, text, own):
                table.results.add(header[i])
                continue
            raise InputError(
                f"{where}: {header[i]}",
                text,
                f"{first or 'nothing'}, as in the lines before: gemopt does not know the column",
                "import apart what it tells apart, call it step if it numbers the steps, or remove it if the counts do "
                "not depend on it",
            )
    value = {}
    for meaning, i in columns.items():
        text = row[i]
        if meaning == "phase":
            continue
        if len(text) < 10 and text.isascii() and text.isdigit() and int(text) < _LIMIT[meaning]:  # most are so
            value[meaning] = int(text)
            continue
        text = _bare(table, where, meaning, text.strip())
        whole = float(text) if _POWER.fullmatch(text) else -1.0  # as numpy.savetxt writes numbers
        text = str(int(whole)) if 0 <= whole < 1 << 53 and whole.is_integer() else text
        if not _NUMBER.fullmatch(text) or int(text.split(".")[0]) >= _LIMIT[meaning]:
            hint = "nothing between thousands" if re.search(r"\d,\d", row[i]) else ""
            raise InputError(f"{where}: {header[i]}", row[i], f"a whole number from 0 below {_LIMIT[meaning]}", hint)
        value[meaning] = int(text.split(".")[0])
    key = (value.get("step", 0), value["layer"], value["expert"])
    if "phase" in columns:
        cell = row[columns["phase"]]
        table.phase = header[columns["phase"]]
        if (phase := phase_of(where, table.phase, cell, others.setdefault(table.phase, cell))) is not None:
            table.has_steps, key = True, (value.get("step", int(phase)), *key[1:])
            if table.phases.setdefault(key[0], phase) != phase:
                raise InputError(f"{where}: phase", cell, "one phase of a step", "number the steps apart")
    counts = table.ranks.setdefault(value.get("rank", rank), {})
    if key in counts:
        hint = "of a run that began again? number its steps on" if table.has_steps else ""
        hint = hint or "of several steps? number them in a column step"
        raise InputError(where, ",".join(row)[:200], "each layer and expert once", hint)
    counts[key] = value["count"]


def _names(first: str, text: str, own: Iterable[str]) -> bool:
    """Whether a text is the first one but for numbers that are those of its own layer or expert: `blk.3.ffn_gate`."""
    around, words = (re.split(r"(\d+)", each) for each in (first, text))
    numbers = {number for each in own for number in re.findall(r"\d+", each)}
    named = all(one in (other, *numbers) for one, other in zip(words[1::2], around[1::2], strict=False))
    return any(map(str.isalpha, text)) and words[::2] == around[::2] and named


def _bare(table: _Table, where: str, meaning: str, text: str) -> str:
    """`3` of `layer_3`, where all lines of the column have the same around their number; else the text as it is."""
    found = _NAMED.fullmatch(text)
    if found is None or meaning not in ("layer", "expert") or COPIES.search(text) or "shared" in found[1].lower():
        return text
    around = found[1], found[3]
    if table.named.setdefault(meaning, around) != around:
        limit = f"{table.named[meaning][0]}N{table.named[meaning][1]}, as in the lines before"
        raise InputError(f"{where}: {meaning}", text, limit, "write the number alone")
    return found[2]
