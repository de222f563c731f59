"""Counts in JSON: as a table, or as an array [steps, layers, experts], whichever the file holds.

A file is one document or one on each line, perhaps gzipped. It holds nested lists; rows `{"layer": 3, "expert": 7,
"count": 12}`, or data frames of them; rows with a list of all experts (`{"step": 5, "layer": 3, "counts": [...]}`) or
of all layers and experts (`{"step": 5, "logical_expert_counts": [[...], ...]}`), alone or in one list beside settings;
or objects by layer and expert (MindSpeed-RL's `token_collects_all.json`, `{"0": {"0": 123, ...}, ...}`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.counts import slot_maps
from gemopt.formats.counts.spread import Content, Rows, by_key, compact, is_whole, ndim, spread
from gemopt.formats.counts.told import refuse_slots, says_nothing
from gemopt.formats.files import text_of
from gemopt.formats.json_rows import frame_rows, inside, parsed
from gemopt.formats.names import COUNTED, NO_COUNTS, TABLES, derived, doubts_of, numbered, refuse_derived, words_of
from gemopt.traces.arrays import NOT_IDS
from gemopt.traces.axes import MOST_LAYERS
from gemopt.traces.files import ALTERING, COPIES, NOT_ALTERED, NOT_COPIES, meant
from gemopt.traces.telling import NETWORKS, PROCESSES
from gemopt.words import counted

SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
COPIED = f"{NOT_COPIES}; then leave it out"
_kept: dict[tuple[Path, tuple[int, ...]], Content] = {}
_NAME_THEM = "name them layer_0, step_0, rank_0 and so on"
LISTED = {"expert", "experts", "id", "ids", "idx", "index", "indices", "layer", "layers"}  # whose numbers a list holds


def is_json(path: Path) -> bool:
    """Whether a file is JSON by its name."""
    return path.name.endswith(SUFFIXES)


def read(path: Path) -> Content:
    """What a file holds, without its rows: parsed once, until `forget`; `InputError` where nothing tells its counts."""
    return _kept.get((path, _stamp(path))) or _light(path)


def forget() -> None:
    """Let go of the files that were read."""
    _kept.clear()
    _read.cache_clear()


def _stamp(path: Path) -> tuple[int, ...]:
    now = path.stat() if path.exists() else None
    return (now.st_mtime_ns, now.st_size, now.st_ino) if now else ()


def _light(path: Path) -> Content:
    found = _read(path, _stamp(path))
    arrays = {name: compact(array) for name, array in found.arrays.items()}
    return _kept.setdefault((path, _stamp(path)), replace(found, rows=[], arrays=arrays))


@lru_cache(maxsize=1)
def _read(path: Path, _changed: tuple[int, ...]) -> Content:
    try:
        text = text_of(path).read()
    except UnicodeError as error:
        raise InputError(str(path), str(error), "JSON in UTF-8") from None
    found = parsed(str(path), text)
    found = found if _is_keyed(found) else frame_rows(found)
    if isinstance(found, list) and not any(isinstance(each, dict) for each in found):
        _refuse_flags(path, found, text)
        return Content(arrays={"counts": found}, named=False)
    told = Content()
    rows = list(_rows(path, found, {}, told))
    if not rows:
        raise InputError(str(path), "no counts", "at least one")
    rows = _named(path, slot_maps.applied(path, _without_headers(path, rows, told), told.notes), told)
    name = _counts_of(path, rows, told)
    if name is None:
        told.rows = rows
        return told
    told = spread(path, rows, name, told)
    _refuse_flags(path, list(told.arrays.values()), text)
    return told


def _rows(
    path: Path, value: Any, known: dict[Any, Any], told: Content, *, named: bool = False
) -> Iterator[dict[Any, Any]]:
    """Rows of what is inside objects and lists.

    known: the keys on the way, those of numbers alone by their depth; named: whether one of them says counts.
    """
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        for each in value:
            yield from _rows(path, frame_rows(each) if len(value) == 1 else each, known, told, named=named)
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        raise InputError(str(path), "a list of objects and others", "rows that are alike")
    elif not isinstance(value, dict):
        told.named &= named
        yield {**known, "counts" if isinstance(value, list) else "count": value}
    elif keys := numbered(value):
        first = next(iter(value))
        _refuse_telling(path, [first])
        if "shared" in words_of(first):
            raise InputError(str(path), first, "experts that tokens choose", "leave shared ones out")
        refuse_derived(path, first)
        for number, each in zip(keys[1], value.values(), strict=True):
            name = keys[0] or sum(isinstance(key, int) for key in known)
            yield from _rows(path, each, {**known, name: number}, told, named=named)
    elif (inner := inside(value)) is not None:
        beside = {key: each for key, each in value.items() if each is not inner}
        lists = [key for key, each in beside.items() if isinstance(each, (list, dict)) and not slot_maps.MAP.match(key)]
        _refuse_telling(path, lists)
        told.unread += lists
        told.beside |= {key: each for key, each in beside.items() if isinstance(each, list)}
        plain = {key: each for key, each in beside.items() if key not in told.unread}
        named |= any(each is inner and bool(words_of(key) & COUNTED) for key, each in value.items())
        yield from _rows(path, inner, {**plain, **known}, told, named=named)
    else:
        nested = {key: each for key, each in value.items() if isinstance(each, (list, dict))}
        if len(nested) < 2 or not numbered(nested):
            yield {**known, **value}
            return
        plain = {key: each for key, each in value.items() if key not in nested}  # the step of all its layers
        yield from _rows(path, nested, {**plain, **known}, told, named=named)


def _without_headers(path: Path, rows: Rows, told: Content) -> Rows:
    """The rows without those that hold no counts, as loggers write one before all others, which then holds for all.

    `InputError` where one in between says of the counts after it what it does not say of those before.
    """
    known = [any(str(key).casefold() in TABLES or words_of(str(key)) & COUNTED for key in row) for row in rows]
    nested = [[str(key) for key, cell in row.items() if isinstance(cell, (list, dict))] for row in rows]
    lists = [any(words_of(key) & COUNTED for key in keys) for keys in nested]
    if 2 * sum(lists) >= len(rows):  # few may be of totals
        first = lists.index(True)
        known = [has or (number > first and bool(nested[number])) for number, has in enumerate(lists)]
    if all(known) or not any(known):
        return rows
    told.notes.append(f"{counted(known.count(False), 'row')} without counts left unread")
    begin, end = known.index(True), len(known) - known[::-1].index(True)
    before = [item for row in rows[:begin] for item in row.items()]
    head = {key: cell for key, cell in before if not isinstance(cell, (list, dict))}
    kept = [row for row, is_known in zip(rows, known, strict=True) if is_known]
    others = [row for row, is_known in zip(rows[:end], known, strict=False) if not is_known]
    for key, cell in (item for row in others for item in row.items()):
        name = str(key).casefold()
        says = name in {*TABLES, *NETWORKS, *PROCESSES} or meant(name) or ALTERING.search(name)
        if says and head.get(key) != cell and any(key not in row for row in kept):
            limit, hint = "the same for all rows", "say it in each row of counts, or import apart what it tells apart"
            raise InputError(f"{path}: {key}", f"{cell} between rows of counts", limit, hint)
    return [{**head, **row} for row in kept]


def _refuse_flags(path: Path, value: Any, text: str) -> None:
    """Raise for a flag among counts, which numpy would take as 0 or 1; text: of the whole file."""
    if isinstance(value, bool):
        raise InputError(str(path), str(value).lower(), "numbers alone in lists of counts")
    if isinstance(value, list) and ("true" in text or "false" in text):
        for each in value:
            _refuse_flags(path, each, text)


def _is_keyed(found: Any) -> bool:
    """Whether keys with numbers hold lists, or layers their experts by number, and no columns of a data frame."""
    keys = numbered(found) if isinstance(found, dict) else None
    if keys is None or any(isinstance(each, list) for each in found.values()):
        return keys is not None
    inner = [numbered(each) if isinstance(each, dict) else None for each in found.values()]
    return keys[0] == "layer" and all(each is not None and each[0] in ("", "expert") for each in inner)


def _named(path: Path, rows: list[dict[Any, Any]], told: Content) -> Rows:
    """The rows with names for keys of numbers alone: layer and expert, where the sums bear that out."""
    unnamed = sorted({key for row in rows for key in row if isinstance(key, int)})
    if not unnamed:
        return rows
    alone = "count" in rows[0]
    lists = [key for key in rows[0] if ndim(rows[0][key]) and words_of(str(key)) & COUNTED]
    free = [name for name in ("layer", "expert")[: 2 if alone else 1] if name not in rows[0]]
    matrices = not alone and [ndim(rows[0][key]) for key in lists] != [1]
    if len(unnamed) != len(free) or matrices or any(set(row) != set(rows[0]) for row in rows):
        limit = "keys that say what they number"
        raise InputError(str(path), "keys of numbers alone", limit, _NAME_THEM)
    names = dict(zip(unnamed, free, strict=True))
    rows = [{names.get(key, key): cell for key, cell in row.items()} for row in rows]
    sums: Counter[int] = Counter()
    for row in rows if "layer" in free else ():
        cells = row["count" if alone else lists[0]]
        sums[row["layer"]] += sum(each for each in (cells if isinstance(cells, list) else [cells]) if is_whole(each))
    if "layer" in free and "step" not in rows[0]:
        told.notes.append(f"keys of numbers alone are taken as {'s and '.join(free)}s: of steps? then name them step_0")
    if len(sums) > MOST_LAYERS:
        raise InputError(str(path), f"{len(sums)} keys of numbers alone", f"at most {MOST_LAYERS} layers", _NAME_THEM)
    if len(sums) > 1 and 2 * max(Counter(sums.values()).values()) <= len(sums):
        found = "keys of numbers alone, whose counts do not add up to the same"
        limit = "layers, each with the assignments of all tokens"
        raise InputError(str(path), found, limit, "name them layer_0, expert_0 and so on")
    return rows


def _counts_of(path: Path, rows: Rows, told: Content) -> str | None:
    """The key with lists or objects of counts; None where all cells are plain. What else is nested is left unread."""
    nested = list(dict.fromkeys(key for row in rows for key in row if isinstance(row[key], (list, dict))))
    counts = [key for key in nested if words_of(key) & COUNTED and not COPIES.search(key)]
    counts = [key for key in counts if not derived(key)] or counts
    counts = [key for key in counts if "logical" in words_of(key)] or _deepest(rows, counts)
    counts = counts or [key for key in nested if words_of(key) <= {"expert", "experts"} and by_key(rows, key)]
    logical = bool(counts) and "logical" in words_of(counts[0])
    whose = _by_expert(rows, counts[0]) if len(counts) == 1 else None
    nested = [key for key in nested if key != whose]
    _refuse_telling(path, [key for key in nested if key not in counts], logical=logical)
    plain = dict.fromkeys(key for row in rows for key in row if key not in nested)
    for key, cell in rows[0].items():
        refuse_slots(str(path), key, cell)
    cells = [(key, str(row.get(key)).casefold()) for row in rows for key in plain]
    telling = dict.fromkeys(key for key, cell in cells if not says_nothing(key.casefold(), cell))
    _refuse_telling(path, telling, logical=logical)
    if not nested:
        return None
    if len(counts) != 1 or any(counts[0] not in row for row in rows):
        ids = not counts and any(words_of(key) & NO_COUNTS for key in nested)
        hint = NOT_IDS if ids else "call them counts, and leave out other lists"
        raise InputError(str(path), ", ".join(nested)[:200], "one list of counts in every row", hint)
    lists = [key for key in nested if key != counts[0]]
    named = [key for key in lists if words_of(key) & LISTED and not words_of(key) & COUNTED]
    if which := next((key for key in named if any(_names_experts(row.get(key), row[counts[0]]) for row in rows)), None):
        hint = f"does {which} say whose they are? then write all; else leave it out"
        raise InputError(str(path), f"{which} beside {counts[0]}", "counts of all experts, in order", hint)
    refuse_derived(path, counts[0])
    told.notes += doubts_of(counts[0])
    told.unread += lists
    told.beside |= {key: rows[0][key] for key in lists} if len(rows) == 1 else {}
    for key in [key for key in rows[0] if meant(key) == "top_k" and len({str(row.get(key)) for row in rows}) == 1]:
        if type(rows[0][key]) is int and rows[0][key] > 0:
            told.top_k = rows[0][key]
            nested.append(key)
    for row in rows:
        for key in nested:
            if key != counts[0]:
                row.pop(key, None)
    return counts[0]


def _by_expert(rows: Rows, name: str) -> str | None:
    """The key, taken out, of lists that name the experts whose counts the cell `name` lists, or keys of an object do.

    Counts in lists become objects by expert then. All experts in some order may be an order of loads, and are left.
    """
    for key in [key for key in rows[0] if words_of(key) & {"expert", "experts"} and not words_of(key) & COUNTED]:
        each = [row.get(key) for row in rows]
        if not all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in each):
            continue
        cells: list[Any] = [row.get(name) for row in rows]
        pairs = [(ids or [], cell) for ids, cell in zip(each, cells, strict=True)]
        if any(
            len({*ids}) < len(ids) or len(ids) != (len(c) if isinstance(c, (list, dict)) else -1) for ids, c in pairs
        ):
            continue
        same = all(isinstance(cell, dict) and {*map(str, ids)} == {*cell} for ids, cell in pairs)
        some = any({*ids} != {*range(len(ids))} for ids, _ in pairs)
        if same or (some and all(isinstance(cell, list) and ndim(cell) == 1 for cell in cells)):
            for row, (ids, cell) in zip(rows, pairs, strict=True):
                row.pop(key)
                row[name] = cell if same else {str(i): count for i, count in zip(ids, cell, strict=True)}
            return key
    return None


def _deepest(rows: Rows, keys: list[str]) -> list[str]:
    """Of lists that may be counts the one that is called so, where the others hold numbers of steps; else none."""
    if len(keys) < 2:
        return keys
    depths = {key: max(ndim(row.get(key)) for row in rows) for key in keys}
    counts = [key for key in keys if depths[key] > 1 and words_of(key) & {"count", "counts"}]
    beside = all(depths[key] == 1 and not words_of(key) & {"count", "counts"} for key in keys if key not in counts)
    return counts if len(counts) == 1 and beside else []


def _names_experts(value: Any, counts: Any) -> bool:
    """Whether a list may name the experts of counts beside it: as many as there are, and not all in order."""
    while isinstance(counts, list) and counts and isinstance(counts[0], list):
        counts = counts[0]
    plain = isinstance(value, list) and isinstance(counts, list) and ndim(value) == 1
    return not plain or (len(value) == len(counts) and value != [*range(len(value))])


def _refuse_telling(path: Path, keys: Collection[str], *, logical: bool = False) -> None:
    """Raise for what says more of the counts, by its name, than is read; logical: they are said to be of experts."""
    for key in keys:
        if COPIES.search(key) and not logical and TABLES.get(key.casefold()) != "expert":
            raise InputError(str(path), f"{key} beside counts", "counts of logical experts", COPIED)
        if meant(key) == "layer_ids" and key.casefold() not in TABLES:
            raise InputError(str(path), f"{key} beside counts", "counts alone", "leave it out, and give --layer-ids")
        if ALTERING.search(key):
            raise InputError(str(path), f"{key} beside counts", "counts alone", NOT_ALTERED)


def said(files: Sequence[Path]) -> list[str]:
    """What there is to say of the files that are JSON."""
    documents = [read(path) for path in files if is_json(path)]
    unread = sorted({name for each in documents for name in each.unread})
    notes = dict.fromkeys(note for each in documents for note in each.notes)
    return [*notes, *([f"{', '.join(unread)} left unread"] if unread else [])]


def top_k(files: Sequence[Path]) -> int | None:
    """The experts of a token as the files say it that are JSON; `InputError` where they differ."""
    told = {read(path).top_k: path for path in files if is_json(path)}
    told.pop(None, None)
    if len(told) > 1:
        found = ", ".join(f"{number} in {path.name}" for number, path in sorted(told.items()))
        raise InputError("PATHS: top_k", found, "files of one network", "import them apart")
    return next(iter(told), None)


def arrays(path: Path) -> dict[str, Any]:
    """The arrays of a file by name; `InputError` where it is a table."""
    found = read(path)
    if not found.arrays:
        raise InputError(str(path), "a table", "arrays, as the other files", "import each kind apart")
    return found.arrays


def lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every row of a table as those of a text, the header first."""
    rows = _read(path, _stamp(path)).rows
    read(path)  # what else it says is asked for later, when another file has been read
    if not rows:
        raise InputError(str(path), "an array", "a table, as the other files", "import each kind apart")
    header = list(dict.fromkeys(key for row in rows for key in row))
    yield 0, header
    for number, row in enumerate(rows, 1):
        yield number, ["" if row.get(key) is None else str(row[key]) for key in header]
