"""llama.cpp: the tokens of every expert in an importance matrix (`llama-imatrix -o imatrix.gguf`).

`IMatrixCollector::save_imatrix` in `tools/imatrix/imatrix.cpp` (2026-08) writes `blk.N.ffn_{gate,up,down}_exps.weight`
with `.in_sum2` and `.counts` (F32 [1, E], the tokens that chose each expert), and `general.type` imatrix. All tensors
of a layer saw the same tokens. The older `.dat` keeps one number for all experts.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import Engine, IntArray, Recording, TraceOptions
from gemopt.formats.files import size_of
from gemopt.formats.recorded_files import files_of

SUFFIXES = (".gguf", ".gguf_file", ".dat")
MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY, _F32 = 8, 9, 0
_COUNTS = re.compile(r"blk\.(\d{1,4})\.(ffn_(?:[a-z]+_)*exps)\.weight\.counts", re.ASCII)
_EXACT = 1 << 24  # whole numbers up to here are themselves in 32 bits
_HEADER = 64 << 20


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """One step for each file: the tokens of all its chunks, by layer and expert."""
    options.refuse_unused("importance matrices")
    files = files_of(paths, *SUFFIXES)
    steps = [_counts(path) for path in files]
    layers = sorted(steps[0])
    for path, step in zip(files, steps, strict=True):
        shapes = {len(row) for row in step.values()}
        if sorted(step) != layers or shapes != {len(row) for row in steps[0].values()} or len(shapes) > 1:
            found = f"{len(step)} layers of {' and '.join(map(str, sorted(shapes)))} experts"
            raise InputError(str(path), found, f"as in {files[0].name}: one network", "import networks apart")
    counts = np.array([[step[layer] for layer in layers] for step in steps])
    notes = ["counts added up over the chunks of a file: a step each, so how they vary in time is not known"]
    for later in range(1, len(files)):
        if any((counts[later] == counts[before]).all() for before in range(later)):
            raise InputError(str(files[later]), "the counts of an earlier file", "each once", "leave it out")
    return Recording(blocks=lambda: iter([counts]), layer_ids=tuple(layers), notes=notes)


def _counts(path: Path) -> dict[int, IntArray]:
    """[E] tokens of each expert by layer; `InputError` unless all tensors of a layer agree."""
    found: dict[int, tuple[str, IntArray]] = {}
    size = size_of(path)
    with path.open("rb") as stream:
        if stream.read(4) != MAGIC:
            limit = "an importance matrix in GGUF: the older format has no counts by expert"
            raise InputError(
                str(path), "no GGUF", limit, "llama-imatrix --output-format gguf -o imatrix.gguf, run again"
            )
        try:
            kind, tensors, start = _header(stream)
            for name, (elements, dtype, offset) in tensors.items():
                if (told := _COUNTS.fullmatch(name)) is None:
                    continue
                if dtype != _F32 or start + offset + 4 * elements > size:
                    raise InputError(f"{path}: {name}", f"{elements} numbers", "all of them, in 32 bits")
                stream.seek(start + offset)
                counts = np.frombuffer(stream.read(4 * elements), "<f4").astype(np.float64)
                if not np.isfinite(counts).all() or (counts < 0).any() or (counts % 1).any():
                    raise InputError(f"{path}: {name}", "fractions or negative numbers", "tokens of each expert")
                layer = int(told[1])
                first, known = found.setdefault(layer, (name, counts.astype(np.int64)))
                if not np.array_equal(known, counts):
                    raise InputError(f"{path}: {name}", f"other counts than {first}", "the same tokens", "record again")
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise InputError(str(path), str(error) or "cut", "a complete GGUF file") from None
    if not found:
        hint = "" if kind == "imatrix" else "llama-imatrix -m MODEL -f TEXT -o imatrix.gguf makes one"
        raise InputError(str(path), f"a GGUF file of {kind or 'no type'}", "counts of blk.N.ffn_..._exps", hint)
    if all(len(counts) == 1 for _, counts in found.values()):
        limit = "a number for each expert: the older format, of which this was made, has one for all"
        raise InputError(str(path), "one number in each layer", limit, "run llama-imatrix again")
    if not any(counts.any() for _, counts in found.values()):
        raise InputError(str(path), "zeros alone", "tokens of the experts")
    if max(int(counts.max()) for _, counts in found.values()) >= _EXACT:
        raise InputError(str(path), f"counts from {_EXACT} on", "numbers that 32 bits hold exactly", "use fewer chunks")
    return {layer: counts for layer, (_, counts) in found.items()}


def _header(stream: Any) -> tuple[str, dict[str, tuple[int, int, int]], int]:
    """`general.type`, elements, type and offset of the tensors by name, and where their data begin."""
    (version,) = _unpack(stream, "<I")
    if version not in (2, 3):
        raise InputError(stream.name, f"version {version} of GGUF", "version 2 or 3")
    tensors, pairs = (_unpack(stream, "<Q")[0] for _ in range(2))
    told = dict(_pair(stream) for _ in range(_bounded(stream, pairs)))
    found: dict[str, tuple[int, int, int]] = {}
    for _ in range(_bounded(stream, tensors)):
        name = _text(stream)
        shape = [_unpack(stream, "<Q")[0] for _ in range(_bounded(stream, _unpack(stream, "<I")[0]))]
        dtype, offset = _unpack(stream, "<I")[0], _unpack(stream, "<Q")[0]
        found[name] = math.prod(shape), dtype, offset
    alignment = told.get("general.alignment", 32)
    alignment = alignment if type(alignment) is int and alignment > 0 else 32
    return str(told.get("general.type", "")), found, -(-stream.tell() // alignment) * alignment


def _pair(stream: Any) -> tuple[str, Any]:
    return _text(stream), _value(stream, _unpack(stream, "<I")[0])


def _value(stream: Any, kind: int) -> Any:
    if kind == _TEXT:
        return _text(stream)
    if kind == _ARRAY:
        inner, count = _unpack(stream, "<I")[0], _unpack(stream, "<Q")[0]
        if inner == _ARRAY:
            raise struct.error("arrays in arrays")
        return [_value(stream, inner) for _ in range(_bounded(stream, count))]
    if kind not in _SCALARS:
        raise struct.error(f"a value of kind {kind}")
    return _unpack(stream, _SCALARS[kind])[0]


def _text(stream: Any) -> str:
    return bytes(stream.read(_bounded(stream, _unpack(stream, "<Q")[0]))).decode()


def _bounded(stream: Any, count: int) -> int:
    if count > _HEADER or stream.tell() > _HEADER:
        raise struct.error(f"a header of more than {_HEADER} bytes")
    return count


def _unpack(stream: Any, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


ENGINES = {
    "llama.cpp": Engine(
        name="llama.cpp",
        versions="llama.cpp 2026-08",
        traces=("imatrix .gguf",),
        dumps=SUFFIXES,
        note="it moves all experts of a layer together (-ot), never one",
        read_traces=read_traces,
    )
}
