"""JSON as people keep tables in it: one value, or one on each line; data frames however pandas turned them."""

from __future__ import annotations

import json
import re
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.names import COUNTED, TABLES, numbered, words_of

JSON = re.compile(r'\s*(?:\{|\[\s*(?:-?\d|[\[{"]))')
SETTINGS = {
    "config", "configuration", "params", "parameters", "settings", "args", "shape", "problem", "workload", "test",
}  # fmt: skip
LABEL = ""  # of rows, as pandas saves them in a CSV file
LIMIT = "one JSON document, or one on each line"


def parsed(path: str, text: str) -> Any:
    """What a text holds: a value, or a list of those on its lines; `InputError` for keys given twice."""
    try:
        try:
            return value(text)
        except json.JSONDecodeError:
            lines = [line for line in text.split("\n") if line.strip()]  # not at U+2028, which texts may hold
            if len(lines) < 2:
                raise
            return [value(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"JSON that is cut or wrong: {error}", LIMIT) from None


def value(text: str) -> Any:
    """The JSON of a text; `ValueError` where an object has a key twice, None for NaN."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice in one object")
    return dict(pairs)


def _constant(token: str) -> str | None:
    """None for NaN, which pandas writes where a cell is missing; infinity is no number, but may be a result."""
    return None if token == "NaN" else token


def is_flat(row: Any) -> bool:
    """Whether a value is an object of plain values."""
    return isinstance(row, dict) and bool(row) and not any(isinstance(each, (dict, list)) for each in row.values())


def frame_rows(found: Any) -> Any:
    """The rows of a data frame that pandas wrote in any of its orders, or of columns of one length; else as it is.

    Labels of rows are a first column without a name, unless they only number them from 0.
    """
    if not isinstance(found, dict) or not found:
        return found
    if set(found) >= {"columns", "data"} and set(found) <= {"columns", "data", "index", "index_names", "column_names"}:
        return _split(found)
    if set(found) == {"schema", "data"} and isinstance(found["data"], list):
        rows = found["data"]
        if not all(isinstance(row, dict) for row in rows):
            return found
        return _without_numbers([{LABEL if name == "index" else name: cell for name, cell in r.items()} for r in rows])
    columns = list(found.values())
    if all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
        nested = any(isinstance(cell, (list, dict)) for each in columns for cell in each)
        return found if nested else [dict(zip(found, cells, strict=True)) for cells in zip(*columns, strict=True)]
    of_rows = _all_numbers(found) and all(isinstance(each, dict) and not _all_numbers(each) for each in columns)
    of_layers = of_rows and any(TABLES.get(name.casefold()) == "layer" for name in columns[0])  # with lists in some
    flat = of_layers or all(map(is_flat, columns))
    named = any(TABLES.get(name.casefold()) in ("layer", "step") and is_flat(found[name]) for name in found)
    lists = named and all(isinstance(each, dict) and _all_numbers(each) for each in columns)  # in some cells
    if not (flat or lists) or not all(each.keys() == columns[0].keys() for each in columns):
        return found
    if _all_numbers(columns[0]) and _all_numbers(found):
        return found  # which are rows and which are columns, nothing tells
    if _all_numbers(found):  # an object for each row
        return _without_numbers([{LABEL: label, **row} for label, row in found.items()])
    labels = list(columns[0])
    return _without_numbers([{LABEL: at, **{name: found[name][at] for name in found}} for at in labels])


def beside_rows(found: Any) -> Any:
    """Rows with what an object says beside its one list of them, as of all rows; else as it is.

    `{"gpu": "H200", "config": {"top_k": 8}, "results": [{...}, ...]}`, or `{"gpu": "H200", "tokens": [...], "us":
    [...]}`. A name that rows have too is left as it is, but for a list, as of the values that were tried.
    """
    if not isinstance(found, dict):
        return found
    tables = {key: rows for key, each in found.items() if (rows := _rows(each))}
    lists = {key: each for key, each in found.items() if isinstance(each, list) and len(each) > 1 and _is_plain(each)}
    if not tables and len(lists) > 1 and len({*map(len, lists.values())}) == 1:
        tables = {
            key: [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)] for key in lists
        }
    elif len(tables) != 1:
        return found
    rows = next(iter(tables.values()))
    names = {name for row in rows for name in row}
    told = _told("", {key: value for key, value in found.items() if key not in tables})
    told = [(name, v) for name, v in told if not (isinstance(v, list) and (name in names or not v))]
    told = [(name, str(v) if isinstance(v, list) else v) for name, v in told]
    told = [(name, v) for name, v in told if not all(row.get(name, not v) == v for row in rows)]  # said again
    if len({*names, *dict(told)}) < len(names) + len(told):
        return found
    return [{**row, **dict(told)} for row in rows]


def _rows(found: Any) -> list[dict[str, Any]]:
    """Flat rows in a list, or by numbers that label them; else none."""
    if isinstance(found, dict) and found and _all_numbers(found) and all(map(is_flat, found.values())):
        return [{LABEL: label, **row} for label, row in found.items()]
    return found if isinstance(found, list) and found and all(map(is_flat, found)) else []


def _is_plain(cells: list[Any]) -> bool:
    return not any(isinstance(each, (dict, list)) for each in cells)


def _told(name: str, found: Any) -> list[tuple[str, Any]]:
    """What is said under a name: a value, or those within it by their own names, or where these come twice by both."""
    if not isinstance(found, dict):
        return [(name, found)]
    parts = [(key, _told(key, each)) for key, each in found.items()]
    names = [inner for _, each in parts for inner, _ in each]
    return [
        (f"{key}.{inner}" if names.count(inner) > 1 and inner != key else inner, value)
        for key, each in parts
        for inner, value in each
    ]


def unnested(found: Any) -> Any:
    """Rows of objects within objects as flat ones, `{"timing": {"mean_us": 5}}` as `timing.mean_us`; else as it is.

    Settings go by their own names: `{"config": {"num_tokens": 8}}` is `num_tokens`. Lists of plain values are texts. So
    are rows in the one list of objects of an object.
    """
    if isinstance(found, dict):
        lists = [
            key for key, each in found.items() if isinstance(each, list) and any(isinstance(e, dict) for e in each)
        ]
        return {**found, lists[0]: unnested(found[lists[0]])} if len(lists) == 1 else found
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        return found
    rows = []
    for row in found:
        cells = _cells(row)
        if len(dict(cells)) < len(cells):
            return found
        rows.append({name: str(v) if isinstance(v, list) and _is_plain(v) else v for name, v in cells})
    return rows


def _cells(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """The values of an object and of those in it, however deep, but for objects within those by number."""
    cells: list[tuple[str, Any]] = []
    for key, each in row.items():
        inner = _cells(each) if is_flat(each) or (isinstance(each, dict) and not _all_numbers(each)) else []
        named = words_of(key) <= SETTINGS
        cells += [(name if named else f"{key}.{name}", value) for name, value in inner] or [(key, each)]
    return cells


def inside(value: dict[str, Any]) -> Any:
    """The one list of rows, or object by numbers, of an object that only holds settings beside; else None."""
    nested = [each for each in value.values() if isinstance(each, (list, dict)) and each]
    rows = [
        each
        for each in nested
        if (isinstance(each, list) and isinstance(each[0], dict))
        or (isinstance(each, dict) and numbered(each) and any(isinstance(v, (list, dict)) for v in each.values()))
    ]
    lists = [key for key, each in value.items() if isinstance(each, list) and words_of(key) & COUNTED]
    return rows[0] if len(rows) == 1 and (not lists or value[lists[0]] is rows[0]) else None


def _split(found: dict[str, Any]) -> Any:
    names, rows, labels = found["columns"], found["data"], found.get("index")
    if not isinstance(names, list) or not isinstance(rows, list) or len({*map(str, names)}) < len(names):
        return found
    if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return found
    table: list[dict[str, Any]] = [dict(zip(map(str, names), row, strict=True)) for row in rows]
    if isinstance(labels, list) and len(labels) == len(rows) and LABEL not in names:
        table = [{LABEL: label, **row} for label, row in zip(labels, table, strict=True)]
    return _without_numbers(table)


def _without_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without labels that count them from 0."""
    if [str(row.get(LABEL)) for row in rows] != [str(i) for i in range(len(rows))]:
        return rows
    return [{name: cell for name, cell in row.items() if name != LABEL} for row in rows]


def _all_numbers(keys: Any) -> bool:
    return all(str(key).isascii() and str(key).isdigit() for key in keys)
