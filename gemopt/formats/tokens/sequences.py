"""Sequences of tokens [tokens, layers, K] of lengths of their own, as lists: in JSON, rows or .pt.

A list of them, an object by request (`{"req_0": ...}`), or rows, `{"request_id": ..., "routed_experts": [[[...]]]}`; or
rows of a token each, whose experts are a list for every layer, `{"token": 5, "experts": [[7, 1], [3, 4]]}`. JSON may
hold `{"layer_3": [[7, 1], ...]}` as well, or the same by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.counts.spread import ndim
from gemopt.formats.engine import IntArray
from gemopt.formats.files import JSON_LIMIT, bounded_json, load_torch, whole_numbers
from gemopt.formats.names import HEEDED, numbered
from gemopt.formats.tokens.beside import Beside
from gemopt.formats.tokens.cells import NAMES, columns_of, rows_of, whole
from gemopt.traces import COUNT_LIMIT
from gemopt.traces.files import ALTERING, COPIES

Part = tuple[str, IntArray, list[int] | None]  # where it is, [tokens, layers, K] or several of them, layers by name
SEQUENCE = len("NLK")  # dimensions
MOST_SETTINGS = 8  # rows before those with experts
_KEY = re.compile(r"(.*?)[_.-]?(\d{1,12})", re.ASCII)


class Found(NamedTuple):
    """The sequences of a file, none of one that holds others, the columns left unread, and numbers that it says."""

    parts: list[Part]
    unread: Sequence[str] = ()
    told: Mapping[str, int] = {}


@lru_cache(maxsize=1)
def _of(path: Path, _changed: tuple[int, int]) -> Found:
    if path.suffix == ".pt":
        data = load_torch(path)
        rows = isinstance(data, list | tuple) and bool(data) and all(isinstance(each, dict) for each in data)
        return in_rows(path, data) if rows else Found([])
    if path.suffix != ".json":
        return in_rows(path)
    data = bounded_json(path, limit_bytes=JSON_LIMIT)
    rows = isinstance(data, list) and bool(data) and isinstance(data[0], dict)
    told = {} if not isinstance(data, dict) else {name: each for name, each in data.items() if name in HEEDED}
    parts = [] if rows else in_json(path, data)
    return Found(parts, told=told) if parts else in_rows(path)


def of(path: Path) -> Found:
    """The sequences of a file of JSON or rows."""
    if path.name.endswith((".npy", ".npz", ".safetensors")):
        return Found([])
    now = path.stat()
    return _of(path, (now.st_mtime_ns, now.st_size))


def in_lists(path: Path, data: Any) -> list[Part]:
    """The sequences of a list, or of an object by request; none of anything else."""
    if isinstance(data, dict):
        numbers = _numbers(data, *NAMES["request"], "arr", "")
        flat = any(_dims(each) < SEQUENCE for each in data.values())  # of layers then: from 0 on
        data = _in_order(data) if numbers and (not flat or sorted(numbers) == list(range(len(numbers)))) else None
    if isinstance(data, list | tuple) and len(data) > 1 and all(_dims(each) == len("NK") for each in data):
        each = [_array(f"{path}: {i}", one) for i, one in enumerate(data)]
        alike = len({ids.shape for ids in each}) == 1  # an array of each layer, as routers return them
        return [(str(path), np.stack(each, axis=1), None)] if alike else []
    if not isinstance(data, list | tuple) or not data or any(_dims(each) != SEQUENCE for each in data):
        return []
    names = [f"{path}: sequence {i}" for i in range(len(data))]
    return [(name, _array(name, each), None) for name, each in zip(names, data, strict=True)]


def in_json(path: Path, data: Any) -> list[Part]:
    """The sequences of a JSON document; none where it holds others."""
    if isinstance(data, dict):
        named = [key for key in data if key.casefold() in NAMES["ids"]]
        if len(named) == 1 and _dims(data[named[0]]) in (SEQUENCE, SEQUENCE + 1):
            for key in data:
                if COPIES.search(key) or ALTERING.search(key):
                    found, limit = f"{key} beside {named[0]}", "experts of the network, every token once"
                    raise InputError(str(path), found, limit)
            data = data[named[0]]
        elif layers := _by_layer(path, data):
            return layers
    if isinstance(data, list) and _dims(data) == SEQUENCE:
        return [(str(path), _array(str(path), data), None)]
    return in_lists(path, data)


def in_rows(path: Path, data: Sequence[dict[Any, Any]] = ()) -> Found:
    """The sequences of rows that hold one each, or a token with a list for every layer; none of other rows.

    data: the rows, where they are not those of a text.
    """
    given = [(f"{path}: row {i}", {str(name): cell for name, cell in row.items()}) for i, row in enumerate(data, 1)]
    begin, first = next(_with_experts(given or rows_of(path)), (str(path), {}))
    columns = columns_of(begin, first)
    dims = _dims(first.get(columns.get("ids", "")))
    if {"layer", "step", "phase"} & columns.keys() or dims != (SEQUENCE if "token" not in columns else len("LK")):
        return Found([])
    unread = sorted({*first} - {*columns.values(), "", "Unnamed: 0"})
    beside, tokens = Beside(), dict[str, dict[int, IntArray]]()
    for number, (where, row) in enumerate(given or rows_of(path)):
        if columns["ids"] not in row and "ids" not in columns_of(where, row):  # settings, which hold for all
            beside.add(where, row, beside.watched(row, False), "")
            continue
        if row.keys() != first.keys():
            raise InputError(where, ", ".join(row)[:100], f"{', '.join(columns.values())}, as in the rows before")
        for name in (name for meaning, name in columns.items() if meaning.startswith("rank ")):
            if row[name] != first[name]:
                hint = "import one of ranks that saw the same tokens; leave the column out where each had its own"
                raise InputError(f"{where}: {name}", row[name], f"{first[name]}, tokens of all ranks, each once", hint)
        beside.add(where, row, beside.watched([name for name in row if name not in columns.values()], True), "")
        ids = _array(where, row[columns["ids"]])
        request = str(row[columns["request"]]) if "request" in columns else ("" if "token" in columns else where)
        at = whole(where, row, columns["token"], COUNT_LIMIT) if "token" in columns else number
        if at in tokens.setdefault(request, {}):
            raise InputError(where, f"token {at} twice", "every token once", "number the requests (request)")
        tokens[request][at] = ids
    beside.refuse_no_traffic()
    told = {meaning: each for meaning in beside.numbers if (each := beside.number(meaning, None)) is not None}
    parts: list[Part] = []
    for name, rows in tokens.items():
        if "token" not in columns:
            parts += [(f"{path}: row {at + 1}", ids, None) for at, ids in rows.items()]
            continue
        if len(shapes := sorted({ids.shape for ids in rows.values()})) > 1:
            raise InputError(
                str(path), f"experts of shapes {shapes[0]} and {shapes[-1]}", "as many layers in every row"
            )
        parts.append((f"{path} {name}".strip(), np.stack([rows[at] for at in sorted(rows)]), None))
    return Found(parts, unread, told)


def _with_experts(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of the first rows that hold experts."""
    return ((where, row) for where, row in islice(rows, MOST_SETTINGS) if "ids" in columns_of(where, row))


def _by_layer(path: Path, data: dict[str, Any]) -> list[Part]:
    """The one sequence of lists or objects of tokens for each layer, or of layers for each token; none of others."""
    each: Sequence[Any] = list(data.values())
    tokens = "token", "token_idx", "token_id", "pos", "position", ""
    if each and _numbers(data, *tokens) and all(_numbers(layers, "layer") for layers in each):
        data = {layer: [token.get(layer) for token in _in_order(data)] for layer in each[0]}
    elif each and all(_numbers(one, *tokens) for one in each):
        data = {layer: _in_order(one) for layer, one in data.items()}
    layers = _numbers(data, "layer")
    if not layers or any(_dims(one) != len("NK") for one in data.values()):
        return []
    each = [_array(f"{path}: {name}", one) for name, one in data.items()]
    if len(shapes := sorted({ids.shape for ids in each})) > 1:
        raise InputError(str(path), f"arrays of shapes {shapes[0]} and {shapes[-1]}", "the same tokens in each layer")
    return [(str(path), np.stack([each[i] for i in np.argsort(layers)], axis=1), sorted(layers))]


def _numbers(value: Any, *names: str) -> list[int]:
    """The numbers of the keys of an object, each once, where one of these names, `layer`, `layer_3`, comes before."""
    keys = [str(key).casefold() for key in value] if isinstance(value, dict) else []
    if names == ("layer",):
        found = numbered(dict.fromkeys(keys)) if keys else None
        return found[1] if found is not None and found[0] == "layer" and len({*found[1]}) == len(value) else []
    parts = [_KEY.fullmatch(key) for key in keys]
    numbers = [int(part[2]) for part in parts if part and part[1] in names]
    return numbers if len({*numbers}) == len(keys) else []


def _in_order(value: dict[str, Any]) -> list[Any]:
    """The values of an object by the last numbers of its keys."""
    return [value[key] for key in sorted(value, key=lambda key: int(re.findall(r"\d+", str(key))[-1]))]


def _dims(value: Any) -> int:
    """Dimensions of an array, of lists, or of a text that is one."""
    if isinstance(value, str):
        bare = value.replace(" ", "")
        return len(bare) - len(bare.lstrip("["))
    return int(getattr(value, "ndim", 0)) if hasattr(value, "ndim") else ndim(value)


def _array(where: str, value: Any) -> IntArray:
    """[tokens, layers, K], or a list of [tokens or layers, K], as an array."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(where, str(error), "lists of experts") from None
    return whole_numbers(value, name=f"{where}: experts of tokens", ndims=(2, 3))
