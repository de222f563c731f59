"""Rows of tokens as they are written, JSON Lines, JSON, CSV or parquet: their columns and cells."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.counts.lines import lines_of
from gemopt.formats.files import JSON_LIMIT, bounded_json
from gemopt.formats.json_rows import frame_rows, value
from gemopt.formats.names import COLUMNS, DRAFTS, FLAGS, PHASES, TRUTH, sure, words_of
from gemopt.traces.files import COPIES

NAMES: Mapping[str, Sequence[str]] = {
    "ids": (
        *("topk_ids", "topk_idx", "topk_indices", "topk_experts", "top_k_ids", "top_k_indices", "top_k_experts"),
        *("selected_experts", "chosen_experts", "routed_experts", "expert_ids", "expert_indices", "experts", "indices"),
        "rollout_routed_experts",
    ),
    "layer": COLUMNS["layer"],
    "step": COLUMNS["step"],
    "request": (
        *("request", "request_id", "request_idx", "req", "req_id", "rid", "sequence", "sequence_id", "seq_id", "seq"),
        *("sample", "sample_id", "prompt_id", "prompt_idx", "problem_id", "question_id"),
    ),
    "token": ("token", "tok", "token_idx", "token_index", "token_pos", "token_position", "position", "pos"),
    "phase": COLUMNS["phase"],
}
OTHER_WORDS = ("stage", "mode")  # that may name others than phases: the stage of a pipeline, "eval"
RANKS = (*COLUMNS["rank"], "local_rank", "global_rank", "world_rank")
STEMS = {  # of columns with one expert of a token each, expert_0, expert_1, ...
    *(*NAMES["ids"], *COLUMNS["expert"], "topk_id", "topk_expert", "top_k_id", "top_k_expert", "top_expert"),
    *("selected_expert", "chosen_expert", "routed_expert"),
}
OTHERS = {"second", "secondary", "third", "fourth", "other"}  # words of another expert of the token
MOST_LAYERS = 4096
MOST_COLUMNS = 64  # with experts of one token
_EXPERT = re.compile(r"-?\d{1,12}(?:\.0*)?", re.ASCII)
_LIST = re.compile(rf"[\[(]?\s*{_EXPERT.pattern}(?:[\s,;|]+{_EXPERT.pattern})*\s*[\])]?", re.ASCII)
_ZEROS = re.compile(
    r"[\[(]?\s*-?0+(?:\.0*)?(?:e[+-]?\d+)?(?:[\s,;|]+-?0+(?:\.0*)?(?:e[+-]?\d+)?)*\s*[\])]?", re.I | re.A
)
_LAYER = re.compile(r"((?:.*[\W_])?(?:layers?|blocks?|blk|h|l)[._ -]*)(\d+)((?:[\W_].*)?)", re.I | re.A)
_AGAIN = re.compile(r"(?:layers?|blocks?|blk)[._ -]*\d", re.I)
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
                        yield from flattened(*_object(f"{path}: line {number}", value(line)))
            except InputError:
                raise
            except (ValueError, RecursionError, EOFError, OSError) as error:
                raise InputError(f"{path}: line {max(1, number)}", str(error), "one JSON object a line") from None
    elif path.suffix == ".json":
        data = frame_rows(bounded_json(path, limit_bytes=JSON_LIMIT))
        rows = [data] if isinstance(data, dict) and _inside(data) else data
        if not isinstance(rows, list):
            lists = len([each for each in data.values() if isinstance(each, list)]) if isinstance(data, dict) else 0
            raise InputError(str(path), f"{lists} lists", "one list of rows")
        for number, row in enumerate(rows, 1):
            yield from flattened(*_object(f"{path}: row {number}", row))
    else:
        lines = lines_of(path)
        header = [name.strip() for name in next(lines, (0, [""]))[1]]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise InputError(f"{path}: columns", f"{twice[0]} twice", "every column once")
        for number, cells in lines:
            if len(cells) != len(header):
                raise InputError(f"{path}: line {number}", f"{len(cells)} values", f"{len(header)}, as in the header")
            yield f"{path}: line {number}", dict(zip(header, cells, strict=True))


def _inside(row: dict[str, Any]) -> str:
    """The name of the one list of objects in an object without experts; empty for none or several."""
    names = [name for name, each in row.items() if isinstance(each, list) and each and isinstance(each[0], dict)]
    experts = any(bare(name) in NAMES["ids"] for name in row if name not in names)
    return names[0] if len(names) == 1 and not experts else ""


def flattened(where: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows inside a row, each with what is said of all of them: of the tokens of a pass, the layers of a token."""
    if not (name := _inside(row)):
        yield where, row
        return
    others = {key: cell for key, cell in row.items() if key != name}
    for number, each in enumerate(row[name], 1):
        inner = f"{where}: {name} {number}"
        yield from flattened(inner, {**others, **_object(inner, each)[1]})


def _object(where: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise InputError(where, type(row).__name__, "an object with a layer and the experts of a token")
    return where, row


def whole(where: str, row: dict[str, Any], name: str, limit: int) -> int:
    cell = row[name]
    text = re.sub(r"\.0$", "", str(cell)) if not isinstance(cell, bool) else "a flag"
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) >= limit:
        raise InputError(f"{where}: {name}", cell, f"a whole number from 0 below {limit}")
    return int(text)


def layer_in(where: str, row: dict[str, Any], name: str) -> tuple[str, int]:
    """What comes before the number in the name of a layer, `model.layers.` of `model.layers.3.mlp`, and the number."""
    found = _LAYER.fullmatch(row[name].strip()) if isinstance(row[name], str) else None
    if found is None or _AGAIN.search(found[1]) or words_of(found[1]) & DRAFTS:
        return "", whole(where, row, name, MOST_LAYERS)
    return found[1], whole(where, {name: found[2]}, name, MOST_LAYERS)


def experts_in(name: str, cell: Any) -> list[list[int]]:
    """The experts of each token of a cell: a list, lists of lists, a number, or a text such as `[7, 1]` or `7 1`."""
    if isinstance(cell, str):
        if cell.strip() in ("[]", "()"):
            return [[]]
        if _SEVERAL.fullmatch(cell.strip()):
            return [ids for part in _INSIDE.findall(cell) for ids in experts_in(name, part)]
        if not _LIST.fullmatch(cell.strip()):
            raise InputError(name, cell[:100], "numbers of experts")
        return [[int(float(text)) for text in _EXPERT.findall(cell)]]
    if isinstance(cell, list) and cell and all(isinstance(part, list) for part in cell):
        return [ids for part in cell for ids in experts_in(name, part)]
    cell = [cell] if type(cell) is int else cell
    if not isinstance(cell, list):
        raise InputError(name, str(cell)[:100], "numbers of experts")
    if all(type(expert) is int for expert in cell):
        return [cell]
    texts = [str(expert).strip() for expert in cell]  # numbers as texts, or with a point
    if not all(map(_EXPERT.fullmatch, texts)):
        raise InputError(name, str(cell)[:100], "numbers of experts")
    return [[int(float(text)) for text in texts]]


def numbers_in(cell: Any) -> list[int]:
    """The whole numbers of a list, or of a text that is one; none of anything else."""
    if isinstance(cell, str):
        return [int(float(text)) for text in _EXPERT.findall(cell)] if _LIST.fullmatch(cell.strip()) else []
    return cell if isinstance(cell, list) and all(type(each) is int for each in cell) else []


def without_weight(cell: Any, each: Sequence[Sequence[int]]) -> bool:
    """Whether the weights of a token that chose experts are all 0; each: the experts of every token."""
    if isinstance(cell, str):
        texts = _INSIDE.findall(cell) or [cell]
        zeros = [len(re.findall(r"[^\s,;|\[\]()]+", text)) if _ZEROS.fullmatch(text) else 0 for text in texts]
    elif isinstance(cell, list):
        parts = cell if cell and isinstance(cell[0], list) else [cell]
        zeros = [len(part) if isinstance(part, list) and not any(part) else 0 for part in parts]
    else:
        return False
    return len(zeros) == len(each) and any(
        0 < count == len(ids) and max(ids) >= 0 for count, ids in zip(zeros, each, strict=True)
    )


def one_each(row: Iterable[str]) -> list[str]:
    """The columns with one expert of the token each, `expert_0`, `expert_1`, ... or from 1 on, in order."""
    found: dict[str, dict[int, str]] = {}
    for name in row:
        word = bare(name)
        if word in NAMES["ids"]:
            return []
        parts = re.split(r"_?(\d+)", word)
        stem = "_".join(filter(None, (part.strip("_") for part in parts[::2])))
        if stem in STEMS and len(parts) <= len("aNb"):
            found.setdefault(stem, {})[int(parts[1]) if len(parts) > 1 else -1] = name
    found = {stem: each for stem, each in found.items() if {*each} != {-1}}
    if len(found) != 1 or len(each := next(iter(found.values()))) > MOST_COLUMNS:
        return []
    numbers = sorted(each)
    first = numbers[1] - 1 if numbers[0] < 0 else numbers[0]  # expert, expert_2
    in_row = numbers[1:] == [*range(first + 1, first + len(numbers))] and first in (0, 1)
    return [each[number] for number in numbers] if in_row else []


def joined(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The row with the experts of such columns as a list; -1 where one is empty."""
    others = {name: cell for name, cell in row.items() if name not in names}
    return {**others, NAMES["ids"][-2]: [-1 if row[name] in (None, "") else row[name] for name in names]}


def columns_of(where: str, row: dict[str, Any]) -> dict[str, str]:
    """The columns of a row by what they mean; `InputError` for two of one meaning, and for slots."""
    found: dict[str, str] = {}
    lists = any(bare(name) in NAMES["ids"] for name in row)
    for name, cell in row.items():
        word = bare(name)
        meaning = next((each for each, names in NAMES.items() if word in names), None)
        meaning = "ids" if not lists and word in COLUMNS["expert"] else meaning
        text = str(cell).strip().casefold()
        if (word in OTHER_WORDS and text not in PHASES) or (word in FLAGS and text not in TRUTH):
            meaning = None
        if meaning is not None:
            known = sure([*filter(None, [found.get(meaning)]), name])
            if len(known) > 1:
                raise InputError(where, " and ".join(known), f"one column of the {meaning}", "leave the other out")
            found[meaning] = known[0]
        elif word in (*RANKS, "stage"):
            found[f"rank {name}"] = name  # of several kinds
        elif words_of(word) & OTHERS and words_of(word) & {"expert", "experts"}:
            raise InputError(where, name, "the experts of a token in one column", "as a list, [7, 1], called topk_ids")
        elif COPIES.search(word):
            raise InputError(where, name, "logical experts", "make slots logical experts, and leave it out")
    if {"request", "token"} <= found.keys() and bare(found.get("step", "")) == "pass":  # that its answer is right
        del found["step"]
    return found


def names_one(columns: Mapping[str, str]) -> bool:
    """Whether the column of the experts is called as one that names a single expert."""
    return bare(columns.get("ids", "")) in COLUMNS["expert"]


def bare(name: str) -> str:
    """A name in small letters, without blanks and signs."""
    return re.sub(r"\W+", "_", name.casefold()).strip("_")
