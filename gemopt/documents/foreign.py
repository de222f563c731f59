"""What was given instead of what was asked for: its name, what it seems to be, and what reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from gemopt.exceptions import InputError

HEAD_BYTES = 1 << 20
MOST_KNOWN = 16  # keys that fit into a line
SWAPPED = "were arguments swapped?"
IMPORT_TRACES = "gemopt trace import reads what engines record (--from array for plain arrays)"
IMPORT_PLACEMENT = "gemopt placement import reads the placements of engines"
IMPORT_TABLE = "gemopt profile import reads kernel tables"

RESULT = "a result of gemopt"

# Keys that tell a JSON object, most telling first, what it is then, and the way out.
_OBJECTS = (
    ({"physical_to_logical", "slots_per_rank"}, "a placement of gemopt", SWAPPED),
    ({"solver", "stopped_by", "per_layer"}, RESULT, SWAPPED),
    ({"solver", "stopped_by", "cost_summary"}, "what solve --json prints", "solve -o writes its placement"),
    ({"devices", "schema_version"}, "a profile of gemopt", SWAPPED),
    ({"layers", "duals_sha256"}, "a certificate of gemopt", SWAPPED),
    ({"node_of_rank", "within_node"}, "a topology of gemopt", SWAPPED),
    ({"pinned", "kept_off", "apart"}, "rules of gemopt", SWAPPED),
    ({"timeline", "baseline_us"}, "a replay result of gemopt", SWAPPED),
    ({"recommended", "strategies"}, "an advice of gemopt", SWAPPED),
    ({"profile", "traces", "solver"}, "a job of gemopt", "gemopt run reads it"),
    ({"physical_to_logical_map"}, "a placement of SGLang", IMPORT_PLACEMENT),
    ({"moe_layer_count", "layer_list"}, "a placement of vllm-ascend", IMPORT_PLACEMENT),
    ({"logical_count"}, "statistics of SGLang", IMPORT_TRACES),
    ({"load_history"}, "counts in JSON", IMPORT_TRACES),
    ({"counts"}, "counts in JSON", IMPORT_TRACES),
    ({"choices"}, "a response of a serving engine", IMPORT_TRACES),
    ({"rank_cost_matrix"}, "SGLang's costs between ranks", "gemopt topology FILE --like NAME -o topology.json"),
    ({"config", "results", "nccl_version"}, "the JSON of nccl-tests", "gemopt topology FILE -o topology.json"),
    ({"server_list", "server_count"}, "a rank table of HCCL", "it tells where ranks are, not how fast they are linked"),
    ({"nvbandwidth"}, "copies between pairs, one at a time", "gemopt profile links measures exchanges"),
    ({"model_type"}, "the config.json of a network", "--model takes its folder"),
)

OURS, PLACED = " of gemopt", "a placement of "
# What pydantic says of its own classes.
_NEEDED = {
    "model_type": "keys and values are needed", "model_attributes_type": "keys and values are needed",
    "path_type": "a path is needed", "dict_type": "keys and values are needed", "list_type": "a list is needed",
}  # fmt: skip
_TAG = re.compile(
    r"(?:int|float|str|bool)$|(?:list|literal|function-\w+|nullable)\["
)  # of unions, in pydantic's places
_UNITS = {"s", "ms", "us", "ns", "gbs", "gbps", "tbs", "mbs", "gb", "mb", "bytes"}
_OWN = {name for _, name, _ in _OBJECTS if name.endswith(OURS)}


def kind(found: str) -> str:
    """The bare word of what was found: "placement" of "a placement of gemopt"."""
    return found.removesuffix(OURS).removeprefix("an ").removeprefix("a ")


def of_object(data: Mapping[Any, Any]) -> tuple[str, str]:
    """What a JSON object seems to be, and the way out; empty when nothing is known of it."""
    for keys, name, way_out in _OBJECTS:
        if keys <= data.keys():
            return name, way_out
    return "", ""


@contextmanager
def telling(needed: str, *paths: str | os.PathLike[str]) -> Iterator[None]:
    """Where files cannot be read in the block, and one is of gemopt or a placement of another engine: say that."""
    try:
        yield
    except InputError:
        for path in paths:
            found = of_file(path)[0]
            if found in _OWN:
                raise InputError(str(path), found, f"{needed} is needed") from None
            if found.startswith(PLACED) and found.casefold() != needed:
                way_out = f"gemopt placement import --from {found.removeprefix(PLACED).casefold()}"
                raise InputError(str(path), found, f"{needed} is needed", way_out) from None
        raise


def of_file(path: str | os.PathLike[str]) -> tuple[str, str]:
    """What a file seems to be by its first bytes, and the way out; empty when nothing is known of it."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return "", ""
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return "", ""
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array (.npy)", IMPORT_TRACES
    if head.startswith(b"PK\x03\x04"):
        archive = "an archive of NumPy arrays (.npz)" if b".npy" in head else "a file of torch (.pt)"
        return archive, IMPORT_TRACES
    if head[:2] == b"\x80\x02" or Path(path).suffix in (".pt", ".pkl"):
        return "a pickled file", IMPORT_TRACES
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return ("traces of gemopt", SWAPPED) if b'"counts"' in head else ("a safetensors file", "")
    return _of_text(path, head)


def _of_text(path: str | os.PathLike[str], head: bytes) -> tuple[str, str]:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # not just a letter that the end cut in two
            return "", ""
        text = head[: error.start].decode()
    if text.lstrip()[:1] in ("{", "["):
        try:
            data = json.loads(Path(path).read_bytes())
        except (ValueError, OSError, RecursionError):
            return _of_lines(text)
        name, way_out = of_object(data) if isinstance(data, dict) else ("", "")
        return name or "a JSON document", way_out
    first = text.split("\n", 1)[0]
    if {"layer", "rank", "slot", "expert"} <= {cell.strip().casefold() for cell in first.split(",")}:
        return f"{PLACED}csv", IMPORT_PLACEMENT
    if "initial_global_assignments:" in text:
        return f"{PLACED}TensorRT-LLM", IMPORT_PLACEMENT
    if "," in first and any(word in first.lower() for word in ("latency", "time", "_us", "_ms")):
        return "a table of latencies", IMPORT_TABLE
    if "," in first:
        return "a table (.csv)", IMPORT_TRACES
    return "", ""


def _of_lines(text: str) -> tuple[str, str]:
    """What a text is that begins like JSON and is none as a whole."""
    try:
        json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return "a text that begins like JSON", "it may be cut short"
    return "lines of JSON", IMPORT_TRACES


def not_a(kind: str, value: object, name: str) -> InputError:
    """The error for an argument that is neither a document of that kind nor a path."""
    found = type(value).__name__
    if isinstance(value, dict):
        hint = f"gemopt.{kind}(**...) makes one of a dict"
    elif kind == "Traces" and hasattr(value, "__array__"):
        hint = "gemopt.Traces(counts=array) makes them of an array [steps, layers, experts]"
    else:
        hint = SWAPPED if hasattr(value, "save") else ""
    return InputError(
        name, f"{'an' if found[0] in 'AEIOUaeiou' else 'a'} {found}", f"a {kind} or the path of one", hint
    )


def one_line(error: ValidationError, document: type[BaseModel]) -> InputError:
    """The first fault of a document as one line."""
    faults = error.errors()
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    first = (unknown or faults)[0]  # a misspelt key is also missing: its name says more
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        inner, rest = _document_at(document, first["loc"]), cause.field.partition(".")[2]
        if inner is None or inner is document or not cause.field.startswith(f"{inner.__name__}."):
            return cause
        return cause.about(".".join([document.__name__, *(str(part) for part in first["loc"]), rest]))
    where = ".".join([document.__name__, *(str(part) for part in first["loc"] if not _TAG.match(str(part)))])
    rest = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    if unknown:
        inner = _document_at(document, first["loc"][:-1])
        known = [] if inner is None else list(inner.model_fields)
        key = str(first["loc"][-1])
        close = get_close_matches(key, known, n=1)
        apart = close and {key.rpartition("_")[2], close[0].rpartition("_")[2]} <= _UNITS  # latency_ms
        hint = f"{'in another unit? ' if apart else ''}did you mean {close[0]}?" if close else ""
        if not close and (home := _home(document, key)):
            hint = f"it belongs into {'.'.join(home)}"
        hint = hint or (f"known here: {', '.join(known)}" if len(known) <= MOST_KNOWN else "")
        return InputError(where, first["input"], "no such key" + rest, hint)
    found = "nothing" if first["type"] == "missing" else first["input"]
    if isinstance(found, str) and first["type"] in ("int_type", "float_type", "number"):
        found = repr(found)  # '3' is none
    limit = _NEEDED.get(first["type"], first["msg"].lower())
    return InputError(where, found, limit + rest)


def _document_at(document: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The part of a document at a place; None where there is none."""
    inner: type[BaseModel] | None = document
    for part in path:
        if inner is not None and isinstance(part, str) and part in inner.model_fields:
            inner = _model_in(inner.model_fields[part].annotation)
    return inner


def _home(document: type[BaseModel], key: str) -> list[str]:
    """Names on the way to the part of a document that has a key; empty where no part does."""
    for name, field in document.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None or inner is document:
            continue
        if key in inner.model_fields:
            return [name]
        if found := _home(inner, key):
            return [name, *found]
    return []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
