"""Rows with the experts that a token chose in a layer: JSON Lines, JSON, CSV or parquet, as loggers of routers do.

`{"layer": 3, "topk_ids": [7, 1], ...}`, those of several tokens, `[[7, 1], [2, 5]]`, or a row for each expert of a
token, `{"layer": 3, "expert": 7}`. A column with the number of the step (`batch_id`, ...) says which tokens are
computed together; else `request` and `token` number them, and they are replayed as continuous batching, as responses
are. A column `phase` tells prompts from answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.counts.told import refuse_slots
from gemopt.formats.engine import Engine, IntArray, Loaded, Recording, TraceOptions
from gemopt.formats.findings import experts_of, fewer
from gemopt.formats.names import layer_doubts, phase_of
from gemopt.formats.recorded_files import files_of, left_alone
from gemopt.formats.responses.replayed import BATCH_SIZE, PREFILL_TOKENS
from gemopt.formats.tokens import arrays as token_arrays
from gemopt.formats.tokens import padding as token_padding
from gemopt.formats.tokens import sequences as token_sequences
from gemopt.formats.tokens.beside import Beside
from gemopt.formats.tokens.cells import (
    NAMES,
    bare,
    columns_of,
    experts_in,
    joined,
    names_one,
    numbers_in,
    one_each,
    whole,
)
from gemopt.formats.tokens.columns import in_arrays, layers_of, rows_in
from gemopt.formats.tokens.kept import TOGETHER, Rows
from gemopt.traces import COUNT_LIMIT, Phase
from gemopt.traces.arrays import ENOUGH_SUMS, MAX_EXPERTS
from gemopt.traces.batching import from_tokens
from gemopt.words import counted

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json", ".csv", ".tsv", ".csv.gz", ".parquet")
_BLOCK = 1 << 24  # numbers of a block of steps


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording | Loaded:
    """Count the experts of tokens, step by step; or replay requests whose tokens are numbered."""
    files = files_of(paths, *SUFFIXES, else_of=token_arrays.SUFFIXES, both_phases=True)
    lists = [path for path in files if token_sequences.of(path).parts]
    arrays = [path for path in files if path.suffix in token_arrays.SUFFIXES and not any(True for _ in in_arrays(path))]
    arrays += lists
    if arrays and len(arrays) < len(files):
        raise InputError("PATHS", arrays[0].name, "rows of tokens, or arrays of them", "import each apart")
    if arrays:
        return token_arrays.read_traces(files, options)
    rows, beside = _read(files, options)
    layers = sorted(set(rows.layers))
    notes = [*rows.notes(options.phase), *left_alone(paths, files, token_arrays.SUFFIXES)]
    told = beside.number("num_experts", options.num_experts)
    experts = experts_of("PATHS: experts", sorted(set(rows.ids)), told, notes)
    notes += layer_doubts(rows.layer, layers[0])
    top_k = beside.number("top_k", options.top_k)
    if beside.alone and not rows.by_step:
        rows.merge()
    sizes = list(Counter(key[:4] for key in rows.seen).values()) if beside.alone and rows.by_step else rows.sizes
    if not sizes:
        rows.refuse_shares(experts)
    elif min(sizes) == experts > 2 and len(sizes) >= ENOUGH_SUMS:
        hint = "those of largest weight alone are its choice"
        raise InputError("PATHS: experts", f"all {experts} of every token", "those that it chose", hint)
    elif top_k not in (None, max(sizes)):
        raise InputError("PATHS: experts", f"{max(sizes)} of a token", f"{top_k}, as top_k says")
    notes += fewer(np.array(sizes))
    top_k = sizes[0] if len(set(sizes)) == 1 else top_k
    if rows.by_step:
        return _counted(rows, layers, experts, top_k, notes)
    return _replayed(rows, layers, experts, notes, options)


def _read(files: Sequence[Path], options: TraceOptions) -> tuple[Rows, Beside]:
    """The rows that are wanted, and what columns say that are not read for experts."""
    columns, rows, beside, layers = None, Rows(by_step=True), Beside(), layers_of(files)
    names: dict[tuple[str, ...], tuple[list[str], dict[str, str], dict[str, str]]] = {}  # most rows have the same
    for path in files:
        for where, given in rows_in(path, layers.get(path)):
            row = given
            if (found := names.get(tuple(given))) is None:
                apart = one_each(given)
                row = joined(given, apart) if apart else given
                known = columns_of(where, row)
                if apart and "token" not in known:
                    limit, hint = "the number of the token in every row", "call it token; --from csv reads counts"
                    raise InputError(where, f"{apart[0]} to {apart[-1]}", limit, hint)
                beside.alone |= names_one(known) and len(numbers_in(row[known["ids"]])) < len("ab")
                used = known.values()
                others = [name for name in row if name not in used]
                for name in others:
                    refuse_slots(where, name, row[name])
                found = names[tuple(given)] = apart, known, beside.watched(others, "ids" in known)
            apart, known, watched = found
            row = joined(given, apart) if apart else given
            beside.add(where, row, watched, str(row.get(known.get("layer", ""))))
            if "ids" not in known:
                rows.other += 1
                continue
            if columns is None:
                columns = known
                rows.by_step, rows.by_file = _by_step(where, columns, options), "request" not in columns
                rows.layer, rows.token = columns["layer"], columns.get("token", "")
            if known != columns:
                shown = ", ".join(known.values())
                raise InputError(where, shown, f"{', '.join(columns.values())}, as in the rows before")
            beside.check_lists(where, row, watched, _add(rows, path, where, row, columns, options))
    if columns is None or not rows.of:
        shown = "no row with experts" if columns is None else "no row that is wanted"
        shown += f", {rows.blank} of padding" if rows.blank else ""
        hint = "--phase prefill or all takes others" if columns else f"name the column {', '.join(NAMES['ids'][:3])}"
        raise InputError("PATHS", shown, "rows with a layer and the experts of a token", hint)
    if columns.keys().isdisjoint(("step", "token")):
        rows.doubts += rows.passes.check(", ".join(columns.values()))
    beside.refuse_no_traffic()
    rows.unread -= {*beside.read, "", "Unnamed: 0"}
    return rows, beside


def _by_step(where: str, columns: dict[str, str], options: TraceOptions) -> bool:
    """Whether rows are counted by their step; else their tokens are replayed. `InputError` where nothing tells."""
    if "layer" not in columns:
        raise InputError(where, "no layer", "the layer of every row", "call it layer")
    if "step" in columns:
        options.refuse_unused("steps that are numbered", *(("phase",) if "phase" in columns else ()))
        return True
    if "token" not in columns and "request" in columns:
        raise InputError(where, ", ".join(columns.values()), "which tokens are computed together", TOGETHER)
    if "token" not in columns:
        options.refuse_unused("forward passes", "phase")
        return True
    options.refuse_unused("tokens", "batch_size", "prefill_tokens", "phase", "keep_tokens")
    if "phase" not in columns and options.phase is not Phase.MIXED:
        hint = "--phase all takes every token"
        raise InputError(where, "no phase", "prefill or decode, to tell prompts from answers", hint)
    return False


def _add(
    rows: Rows, path: Path, where: str, row: dict[str, Any], columns: dict[str, str], options: TraceOptions
) -> list[list[int]]:
    """Keep what a row says, if its phase is wanted; the experts of each of its tokens."""
    phase = None
    if "phase" in columns:
        phase, wanted = phase_of(where, columns["phase"], row[columns["phase"]], "prefill"), options.phase
        wanted = (Phase.MIXED if rows.by_step else Phase.DECODE) if wanted is None else wanted
        if wanted not in (Phase.MIXED, phase):
            return []
    for name in (name for meaning, name in columns.items() if meaning.startswith("rank ")):
        if rows.ranks.setdefault(name, str(row[name])) != str(row[name]):
            hint = "import one rank of those that saw the same tokens; leave the column out where each had its own"
            hint += ", or where it is the place of an expert among a token's" if names_one(columns) else ""
            raise InputError(f"{where}: {name}", row[name], f"{rows.ranks[name]}, tokens of all ranks, each once", hint)
    layer = rows.numbered(where, row, columns["layer"])
    each = experts_in(f"{where}: {columns['ids']}", row[columns["ids"]])
    rows.unread.update(name for name in row if name not in columns.values())
    if rows.by_step:
        of = _step(rows, path, where, row, columns, layer, each, phase)
    elif len(each) > 1:
        raise InputError(where, f"the experts of {len(each)} tokens", "those of one", "number the steps instead")
    else:
        token = _request(path, row, columns), whole(where, row, columns["token"], COUNT_LIMIT)
        of = rows.tokens.setdefault(token, len(rows.tokens))
    for ids in each:
        kept = [expert for expert in ids if expert >= 0]
        if len(set(kept)) < len(kept) or any(expert >= MAX_EXPERTS or expert < -1 for expert in ids):
            limit = f"different experts below {MAX_EXPERTS}, -1 for none"
            raise InputError(f"{where}: {columns['ids']}", str(ids)[:100], limit)
        if not kept:
            rows.blank += 1
            continue
        rows.of.append(of)
        rows.layers.append(layer)
        rows.sizes.append(len(kept))
        rows.ids.extend(kept)
    return each


def _step(
    rows: Rows,
    path: Path,
    where: str,
    row: dict[str, Any],
    columns: dict[str, str],
    layer: int,
    each: list[list[int]],
    phase: Phase | None,
) -> int:
    """The step that a row is of; `InputError` where it was before, or what the number counts is not clear."""
    if {"step", "request"} <= columns.keys() and "token" not in columns:
        step, request = (columns[meaning] for meaning in ("step", "request"))
        if str(row[step]) != str(row[request]):
            hint = f"of a batch: leave {request} out; of the request's tokens: call it token"
            raise InputError(where, f"{step} beside {request}", "what the number counts", hint)
    listed = str(row[columns["ids"]]).replace(" ", "")[:2] in ("[[", "((", "[(", "([")
    of = (
        whole(where, row, columns["step"], COUNT_LIMIT)
        if "step" in columns
        else rows.passes.of(path, layer, len(each), listed=listed)
    )
    if phase is not None:
        rows.phases.setdefault(of, set()).add(phase)
    if (first := rows.files.setdefault((of, layer), path)) != path and "step" in columns:
        hint = "number the steps on from file to file; add up ranks that had tokens of their own"
        raise InputError(f"{where}: {columns['step']}", of, f"steps that are not in {first.name} as well", hint)
    if of < rows.last.get((path, layer), 0):
        hint = "of a request? call it token, beside request; else number the steps on, and sort the rows by them"
        raise InputError(f"{where}: {columns['step']}", of, "steps that do not begin again", hint)
    rows.last[path, layer] = of
    rows.refuse_again(where, of, layer, each)
    if "token" in columns and len(each) == 1 and str(row[columns["token"]]).isdigit():
        alone = each[0][0] if each[0] and names_one(columns) else -1
        key = of, layer, _request(path, row, columns), str(row[columns["token"]]), alone
        if key in rows.seen:
            hint = (
                "ranks that saw the same tokens? keep one; ranks with tokens of their own, or ids of the vocabulary? "
            )
            limit, hint = "every token once in a step and layer", f"{hint}leave the column out"
            raise InputError(f"{where}: {columns['token']}", key[3], limit, hint)
        rows.seen.add(key)
    return of


def _request(path: Path, row: dict[str, Any], columns: dict[str, str]) -> str:
    return str(row[columns["request"]]) if "request" in columns else str(path)


def _counted(rows: Rows, layers: list[int], experts: int, top_k: int | None, notes: list[str]) -> Recording:
    """Counts by step, some steps at a time."""
    steps, step = np.unique(rows.of, return_inverse=True)
    row = np.repeat(np.arange(len(rows.of)), rows.sizes)
    key = (step * len(layers) + np.searchsorted(layers, rows.layers))[row]
    order = np.argsort(step[row], kind="stable")
    cell, of_id = (key * experts + np.frombuffer(rows.ids, np.intc))[order], step[row][order]
    if len(widths := set(rows.sizes)) == 1:
        notes += token_padding.of_steps("PATHS", _of_steps(rows, step, widths.pop()))
    size = len(layers) * experts
    at_once = max(1, _BLOCK // size)

    def blocks() -> Iterator[IntArray]:
        for first in range(0, len(steps), at_once):
            last = min(first + at_once, len(steps))
            begin, end = np.searchsorted(of_id, [first, last])
            found = np.bincount(cell[begin:end] - first * size, minlength=(last - first) * size)
            yield found.reshape(last - first, len(layers), experts)

    told = [rows.phases.get(int(number), set()) for number in steps]
    phase = np.array([int(min(each)) if len(each) == 1 else int(Phase.MIXED) for each in told])
    return Recording(
        blocks=blocks, layer_ids=tuple(layers), top_k=top_k, phase=phase if rows.phases else None, notes=notes
    )


def _of_steps(rows: Rows, step: IntArray, top_k: int) -> Iterator[IntArray]:
    """The experts of the tokens [N, L, K] of each step whose layers have as many; step: that of each row."""
    layers = np.array(rows.layers)
    order = np.lexsort((layers, step))
    ids, layers = np.frombuffer(rows.ids, np.intc).reshape(-1, top_k)[order], layers[order]
    starts = np.flatnonzero(np.diff(step[order])) + 1
    for each, of in zip(np.split(ids, starts), np.split(layers, starts), strict=True):
        sizes = np.unique(of, return_counts=True)[1]
        if (sizes == sizes[0]).all():
            yield each.reshape(len(sizes), sizes[0], top_k).swapaxes(0, 1)


def _replayed(rows: Rows, layers: list[int], experts: int, notes: list[str], options: TraceOptions) -> Loaded:
    """Requests as continuous batching: the tokens of each in the order of their numbers."""
    width, lines = max(rows.sizes), list(zip(rows.of, rows.layers, strict=True))
    if len(set(lines)) < len(lines):
        hint = f"ranks that saw the same tokens? import one; do they count anew in each step? then {TOGETHER}"
        raise InputError("PATHS: token", "a token twice in a layer", "every token once", hint)
    if len(lines) < len(rows.tokens) * len(layers):
        hint = "layers in files of their own? number the requests (request)" if rows.by_file else ""
        raise InputError("PATHS: layer", "tokens without some layers", "every token in all layers", hint)
    ids = np.full((len(rows.tokens), len(layers), width), -1, np.int16)
    row = np.repeat(np.arange(len(lines)), rows.sizes)
    column = np.arange(len(row)) - np.repeat(np.cumsum([0, *rows.sizes[:-1]]), rows.sizes)
    at = np.searchsorted(layers, rows.layers)
    ids[np.array(rows.of)[row], at[row], column] = np.frombuffer(rows.ids, np.intc)
    requests = list(dict.fromkeys(request for request, _ in rows.tokens))
    place = {request: i for i, request in enumerate(requests)}
    _refuse_vocabulary(rows)
    kept = list(options.layer_ids or layers)
    if unknown := sorted(set(kept) - set(layers)):
        raise InputError("--layer-ids", unknown[0], f"recorded layers {layers[0]} to {layers[-1]}")
    order = sorted(rows.tokens, key=lambda key: (place[key[0]], key[1]))
    ids = ids[[rows.tokens[key] for key in order]][:, np.searchsorted(layers, kept)]
    each = np.split(ids, [i for i in range(1, len(order)) if order[i][0] != order[i - 1][0]])
    first: dict[bytes, str] = {}
    for request, own in zip(requests, list(each), strict=True) if rows.by_file else ():
        if own[:, :, 0].size >= ENOUGH_SUMS and (known := first.setdefault(own.tobytes(), request)) != request:
            notes.append(f"{Path(request).name} has the tokens of {Path(known).name}: counted once")
            each = [other for other in each if other is not own]
    notes += token_padding.of_sequences("PATHS", each)
    starts = np.cumsum([0, *map(len, each[:-1])]).tolist()
    traces = from_tokens(
        np.concatenate(each),
        starts,
        num_experts=experts,
        batch_size=options.batch_size or BATCH_SIZE,
        phase=Phase.PREFILL if options.phase is Phase.PREFILL else Phase.DECODE,
        prefill_tokens=options.prefill_tokens or PREFILL_TOKENS,
        layer_ids=tuple(kept),
        num_hidden_layers=options.num_hidden_layers,
        model=options.model,
    )
    return Loaded(traces=traces, notes=(f"{counted(len(starts), 'request')} replayed", *notes))


def _refuse_vocabulary(rows: Rows) -> None:
    """Raise where a request's numbers of a column `token` neither rise from row to row nor follow each other."""
    numbers: dict[str, list[int]] = {}
    for request, token in rows.tokens if bare(rows.token) in ("token", "tok") else ():
        numbers.setdefault(request, []).append(token)
    for each in numbers.values():
        if each != sorted(each) and max(each) - min(each) >= len(each):
            limit = "the place of each token in its request"
            hint = "ids of the vocabulary? call them token_id; places? call them position"
            raise InputError(f"PATHS: {rows.token}", f"{each[:4]}, ..."[:100], limit, hint)


ENGINES = {
    "tokens": Engine(
        name="tokens",
        versions="any",
        traces=(
            "layer, topk_ids of tokens .jsonl, .csv, .parquet",
            "[tokens, layers, top-k] .npy, .npz, .pt, .safetensors",
        ),
        note="rows of tokens; placements: --to csv",
        dumps=(*SUFFIXES, *token_arrays.SUFFIXES),
        read_traces=read_traces,
    )
}
