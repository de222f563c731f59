"""Reading foreign files that may be truncated, huge or hostile: JSON, YAML, npy, npz, safetensors and .pt.

Whatever is wrong ends as an `InputError` that names the file; nothing is ever unpickled beyond plain tensors.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import read_bytes, read_json
from gemopt.documents.arrays import integer_array
from gemopt.exceptions import InputError, missing

JSON_LIMIT = 256 << 20
SMALLER = "split it, its steps numbered on; arrays (.npy) and rows of tokens in .jsonl may be larger"
YAML_LIMIT = 1 << 24
HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself
ARRAY_LIMIT = 1 << 36
NOT_WHOLE = "two bytes round numbers above 2048, or 256: keep counts in 32 bits"
NOT_SHARES = "shares, weights and logits are no counts: count the experts that were chosen"
PT = "torch.save of torch 1.6 or later writes it; NumPy arrays in it are not read, torch.from_numpy(array) is"
_WHOLE = re.compile(r"\s*\d{1,18}\s*", re.ASCII)
_DTYPES = {
    **{"U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"},
    **{"F32": "<f4", "F64": "<f8"},
}


def size_of(path: Path) -> int:
    """Bytes of a file; `InputError` when it is missing or unreadable."""
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), "a readable file is needed") from None


def bounded_json(path: Path, *, limit_bytes: int = JSON_LIMIT) -> Any:
    """Parse a JSON file of at most `limit_bytes`."""
    if size_of(path) > limit_bytes:
        raise InputError(str(path), f"{size_of(path)} bytes", f"at most {limit_bytes} bytes of JSON", SMALLER)
    return read_json(path)


def text_of(path: Path) -> TextIO:
    """The text of a file in UTF-8 or UTF-16, unpacked if its name ends in .gz; at most `JSON_LIMIT` bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            data = stream.read(JSON_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or str(error)
        limit = "a complete .gz file" if path.suffix == ".gz" else "a readable file is needed"
        raise InputError(str(path), found, limit) from None
    if len(data) > JSON_LIMIT:
        found = f"more than {JSON_LIMIT} bytes when unpacked"
        raise InputError(str(path), found, f"at most {JSON_LIMIT} bytes", SMALLER)
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return io.TextIOWrapper(io.BytesIO(data), encoding, newline="")


AMBIGUOUS = re.compile(r"[-+]?(?:0[0-9_]+$|[0-9_]+:)")
"""Numbers that YAML 1.1 reads in base 8 or 60."""


def bounded_yaml(path: Path) -> Any:
    """Parse a YAML file of plain data. Anchors may stand for lists, but not for more than `YAML_LIMIT` values."""
    try:
        import yaml
    except ImportError as error:
        raise missing(error, f"reading {path}") from None
    text = read_bytes(path, limit_bytes=64 << 20)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _yaml_size(path, node, {})
        return loader.construct_document(node)
    except InputError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(str(path), str(error), "a complete YAML document is needed") from None
    finally:
        loader.dispose()


def _yaml_size(path: Path, node: Any, known: dict[int, int | None]) -> int:
    """Values of a node with all anchors written out; `InputError` for too many, and for what would be lost."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise InputError(str(path), "an anchor inside itself", "plain lists and numbers")
        return size
    known[id(node)] = None
    size = 1
    if node.tag.endswith((":int", ":float")) and AMBIGUOUS.match(node.value):
        hint = "010 is 8 in YAML, and 1:30 is 90: write the number meant, or a text in quotes"
        raise InputError(f"{path}: line {node.start_mark.line + 1}", node.value, "a plain number", hint)
    if isinstance(node.value, list):
        keys = [child[0].value for child in node.value if isinstance(child, tuple)]
        if "<<" in keys:
            raise InputError(str(path), "a merge key <<", "plain lists and numbers", "write the keys out")
        names = [key for key in keys if isinstance(key, str)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(str(path), twice, "every key once")
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                size += _yaml_size(path, part, known)
    if size > YAML_LIMIT:
        raise InputError(str(path), "anchors that stand for too much", f"at most {YAML_LIMIT} values")
    known[id(node)] = size
    return size


def torch_module(purpose: str) -> Any:
    """PyTorch, which only .pt files need."""
    try:
        import torch
    except ImportError as error:
        raise missing(error, purpose) from None
    return torch


def load_torch(path: Path) -> Any:
    """Load a .pt file: tensors and plain containers only, on the CPU, mapped rather than read.

    A tensor is refused when it claims more elements than the file holds (a view with stride 0 would).
    """
    size = size_of(path)
    torch = torch_module("reading .pt files")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:
            raise InputError(str(path), f"{unpacked} bytes in {size}", "an uncompressed .pt file, as torch.save writes")
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". This file can still")[0]
        raise InputError(
            str(path), reason, "a complete .pt file of tensors and plain containers is needed", PT
        ) from None
    _check_tensors(path, data, size)
    return data


def _check_tensors(path: Path, data: Any, size: int) -> None:
    pending = [data]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            # A list of numbers (token ids) can be long; its first element speaks for it.
            pending += value if value and not isinstance(value[0], int | float) else ()
        elif hasattr(value, "numel") and value.numel() * value.element_size() > size:
            raise InputError(
                str(path), f"tensor of shape {tuple(value.shape)}", f"at most the {size} bytes of the file"
            )


def as_array(value: Any, *, name: str, ndim: int) -> NDArray[Any]:
    """An integer tensor, array or list as an array of `ndim` dimensions; shares memory with a tensor."""
    if hasattr(value, "numpy"):
        if value.is_sparse or value.is_floating_point() or value.is_complex():
            narrow = value.is_floating_point() and value.element_size() <= 2
            raise InputError(name, str(value.dtype), "whole numbers", NOT_WHOLE if narrow else "")
        value = value.numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(name, value, f"whole numbers in {ndim} dimensions") from None
    if array.ndim != ndim or array.dtype.kind not in "iu":
        hint = NOT_WHOLE if array.dtype == np.float16 else ""
        raise InputError(
            name, f"{array.dtype} array of shape {array.shape}", f"whole numbers in {ndim} dimensions", hint
        )
    return array


def whole_numbers(value: Any, *, name: str, ndims: tuple[int, ...]) -> NDArray[Any]:
    """Whole numbers, as integers or as floats without a fraction, in one of some numbers of dimensions.

    Floats of two bytes are refused: they round numbers above 256 or 2048.
    """
    if hasattr(value, "numpy") and not value.is_sparse and value.is_floating_point() and value.element_size() > 2:
        value = value.detach().double().numpy()
    array = value if hasattr(value, "numpy") else _array(value, name, ndims)
    ndim = next((n for n in ndims if n == array.ndim), ndims[-1])
    if not hasattr(value, "numpy") and array.dtype.kind == "U" and all(map(_WHOLE.fullmatch, array.ravel())):
        array = array.astype(np.int64)  # numbers in quotes
    if not hasattr(value, "numpy") and array.dtype.kind == "f" and array.dtype.itemsize > 2:
        if np.isfinite(array).all() and (parts := array[array % 1 > 0]).size:
            raise InputError(name, float(parts[0]), f"whole numbers in {ndim} dimensions", NOT_SHARES)
        return np.asarray(integer_array(array, name=name, ndim=ndim))
    return as_array(array, name=name, ndim=ndim)


def _array(value: Any, name: str, ndims: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(
            name, value, f"whole numbers, rectangular in {' or '.join(map(str, ndims))} dimensions"
        ) from None


def safetensors_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a safetensors file, mapped, and its metadata; every offset is checked against the file."""
    header, body = _safetensors(path)
    told = header.pop("__metadata__", None)
    metadata = told if isinstance(told, dict) else {}
    if "gemopt_traces" in metadata:
        raise InputError(str(path), "traces of gemopt", "an engine's counts", "every command reads it as it is")
    try:
        return {name: _mapped(body, name, entry) for name, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(str(path), str(error), "a complete safetensors file of whole numbers") from None


def safetensors_rows(path: Path, width: int) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Names, row of each name, and rows [N, width] of a safetensors file of int64 vectors of one length; mapped.

    Many thousand small arrays are common: they are checked together and can be taken in one gather.
    """
    header, body = _safetensors(path)
    header.pop("__metadata__", None)
    size = 8 * width
    try:
        wrong = [name for name, entry in header.items() if entry["dtype"] != "I64" or entry["shape"] != [width]]
        offsets = np.array([entry["data_offsets"] for entry in header.values()], np.int64).reshape(-1, 2)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(str(path), str(error), "a complete safetensors file of whole numbers") from None
    if wrong:
        found = f"{header[wrong[0]]['dtype']} {header[wrong[0]]['shape']}"
        raise InputError(f"{path}: {wrong[0]}", found, f"I64 [{width}], as num_experts in meta_info.json says")
    begin, end = offsets.T
    if ((begin % size != 0) | (end - begin != size) | (begin < 0) | (end > len(body))).any():
        raise InputError(f"{path}: data_offsets", "rows outside the file, or apart", "a complete safetensors file")
    return list(header), begin // size, body[: len(body) // size * size].view("<i8").reshape(-1, width)


def _safetensors(path: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    size = size_of(path)
    data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little") if size >= 8 else HEADER_LIMIT + 1
    if length > min(HEADER_LIMIT, size - 8):
        raise InputError(str(path), f"header of {length} bytes in a file of {size}", "a complete safetensors file")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), str(error), "a complete safetensors file") from None
    if not isinstance(header, dict):
        raise InputError(str(path), type(header).__name__, "a safetensors file, whose header is an object")
    return header, data[8 + length :]


def _mapped(body: NDArray[np.uint8], name: str, entry: dict[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}")
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or not begin <= end <= len(body):
        raise ValueError(f"{name} lies outside the file")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
    return np.frombuffer(body, dtype, math.prod(shape), begin).reshape(shape)


def numpy_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npy (mapped, named `counts`) or .npz file; no pickles."""
    size = size_of(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if (rest := size - array.offset - array.nbytes) > 0:
                found = f"{rest} bytes after the array of shape {array.shape}"
                raise InputError(
                    str(path), found, "one array in a file", "several were saved into it? read all of them"
                )
            return {"counts": array}
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max(1 << 26, 200 * size) or unpacked > ARRAY_LIMIT:
            raise InputError(str(path), f"{unpacked} bytes in {size}", "at most 200 times the size of the file")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except InputError:
        raise
    except Exception as error:
        raise InputError(str(path), str(error), "a complete .npy or .npz file of plain arrays is needed") from None


def as_numpy(value: Any) -> NDArray[Any]:
    """What lies beside the arrays that are read, a tensor of PyTorch perhaps; empty where NumPy has no such array."""
    try:
        return np.asarray(value.detach() if hasattr(value, "detach") else value)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return np.empty(0)
