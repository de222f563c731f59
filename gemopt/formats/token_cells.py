"""Rows of tokens as they are written, JSON Lines, JSON, CSV or parquet: their columns and cells."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.count_lines import lines_of
from gemopt.formats.count_names import COLUMNS
from gemopt.formats.files import JSON_LIMIT, bounded_json
from gemopt.formats.json_rows import frame_rows, value
from gemopt.traces.files import COPIES

NAMES: Mapping[str, Sequence[str]] = {
    "ids": (
        *("topk_ids", "topk_idx", "topk_indices", "topk_experts", "top_k_ids", "top_k_indices", "top_k_experts"),
        *("selected_experts", "chosen_experts", "routed_experts", "expert_ids", "expert_indices", "experts", "indices"),
    ),
    "layer": COLUMNS["layer"],
    "step": COLUMNS["step"],
    "request": (
        *("request", "request_id", "request_idx", "req", "req_id", "rid", "sequence", "sequence_id", "seq_id", "seq"),
        *("sample", "sample_id", "prompt_id", "prompt_idx", "problem_id", "question_id"),
    ),
    "token": ("token", "token_idx", "token_index", "token_pos", "token_position", "position", "pos"),
    "phase": ("phase", "stage", "forward_mode"),
}
RANKS = (*COLUMNS["rank"], "local_rank", "global_rank", "world_rank")
_LIST = re.compile(r"[\[(]?\s*-?\d+(?:[\s,;|]+-?\d+)*\s*[\])]?", re.ASCII)
_INSIDE = re.compile(r"[\[(][^\[\]()]*[\])]")
_SEVERAL = re.compile(rf"[\[(]\s*(?:{_INSIDE.pattern}[\s,;]*)+[\])]")  # tokens


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row is, and its cells by name."""
    if path.name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
        number = 0
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as stream:
            try:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _object(f"{path}: line {number}", value(line))
            except InputError:
                raise
            except (ValueError, RecursionError, EOFError, OSError) as error:
                raise InputError(f"{path}: line {max(1, number)}", str(error), "one JSON object a line") from None
    elif path.suffix == ".json":
        data = frame_rows(bounded_json(path, limit_bytes=JSON_LIMIT))
        lists = [each for each in data.values() if isinstance(each, list)] if isinstance(data, dict) else [data]
        if len(lists) != 1 or not isinstance(lists[0], list):
            raise InputError(str(path), f"{len(lists)} lists", "one list of rows")
        yield from (_object(f"{path}: row {number}", row) for number, row in enumerate(lists[0], 1))
    else:
        lines = lines_of(path)
        header = [name.strip() for name in next(lines, (0, [""]))[1]]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise InputError(f"{path}: columns", f"{twice[0]} twice", "every column once")
        for number, cells in lines:
            if len(cells) != len(header):
                raise InputError(f"{path}: line {number}", f"{len(cells)} values", f"{len(header)}, as in the header")
            yield f"{path}: line {number}", dict(zip(header, cells, strict=True))


def _object(where: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise InputError(where, type(row).__name__, "an object with a layer and the experts of a token")
    return where, row


def whole(where: str, row: dict[str, Any], name: str, limit: int) -> int:
    cell = row[name]
    text = re.sub(r"\.0$", "", str(cell)) if not isinstance(cell, bool) else "a flag"
    text = re.sub(r"(?:model\.)?layers?[._]?(\d+).*", r"\1", text)
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) >= limit:
        raise InputError(f"{where}: {name}", cell, f"a whole number from 0 below {limit}")
    return int(text)


def experts_in(name: str, cell: Any) -> list[list[int]]:
    """The experts of each token of a cell: a list, lists of lists, a number, or a text such as `[7, 1]` or `7 1`."""
    if isinstance(cell, str):
        if cell.strip() in ("[]", "()"):
            return [[]]
        if _SEVERAL.fullmatch(cell.strip()):
            return [ids for part in _INSIDE.findall(cell) for ids in experts_in(name, part)]
        if not _LIST.fullmatch(cell.strip()):
            raise InputError(name, cell[:100], "numbers of experts")
        return [[int(text) for text in re.findall(r"-?\d+", cell)]]
    if isinstance(cell, list) and cell and all(isinstance(part, list) for part in cell):
        return [ids for part in cell for ids in experts_in(name, part)]
    cell = [cell] if type(cell) is int else cell
    if not isinstance(cell, list) or not all(type(expert) is int for expert in cell):
        raise InputError(name, str(cell)[:100], "numbers of experts")
    return [cell]


def columns_of(where: str, row: dict[str, Any]) -> dict[str, str]:
    """The columns of a row by what they mean; `InputError` for two of one meaning, and for slots."""
    found: dict[str, str] = {}
    lists = any(_bare(name) in NAMES["ids"] for name in row)
    for name in row:
        bare = _bare(name)
        meaning = next((each for each, names in NAMES.items() if bare in names), None)
        meaning = "ids" if not lists and bare in COLUMNS["expert"] else meaning
        if meaning in found:
            both = f"{found[meaning]} and {name}"
            raise InputError(where, both, f"one column of the {meaning}", "leave the other out")
        if meaning is not None:
            found[meaning] = name
        elif bare in RANKS:
            found[f"rank {name}"] = name  # of several kinds
        elif COPIES.search(bare):
            raise InputError(where, name, "logical experts", "make slots logical experts, and leave it out")
    return found


def names_one(columns: Mapping[str, str]) -> bool:
    """Whether the column of the experts is called as one that names a single expert."""
    return _bare(columns.get("ids", "")) in COLUMNS["expert"]


def _bare(name: str) -> str:
    return re.sub(r"\W+", "_", name.casefold()).strip("_")
