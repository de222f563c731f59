"""Rewrite a checkpoint so that contiguous expert parallelism serves it as a placement.

Slot j of a layer becomes expert j: router rows, biases and stacked tensors are reordered, tensors of single experts get
the new number, tables of expert ids are translated. Nothing is decoded, so any dtype and quantisation passes through; a
tensor is streamed, so memory stays small. Numpy only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemopt.documents import read_json, write_text
from gemopt.exceptions import InputError
from gemopt.executor.configs import INDEX, other_files, renamed_metadata
from gemopt.executor.permutation import (
    IntArray,
    Permutation,
    check_coverage,
    check_experts,
    decoder_layers,
    permutation_of,
    text_part,
)
from gemopt.models.checkpoint_names import tensor_role
from gemopt.models.families import family
from gemopt.placement import GivenPlacement, Placement

CHUNK = 1 << 24
MAX_HEADER = 1 << 27
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}


def export_checkpoint(
    placement: GivenPlacement,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a permuted copy of a safetensors checkpoint.

    Parameters
    ----------
    placement
        Every expert once, the same number of slots on every rank.
    source
        Folder with `config.json` and `*.safetensors`; those that an index does not name are left out.
    destination
        New folder. It appears complete or not at all.
    progress
        Called with (files of weights written, of how many).

    Raises
    ------
    InputError
        When source and placement disagree, the family or a tensor layout is unknown, or the destination exists.
    UnsupportedError
        For copies, empty or unequal slots, and for placements that would change group-limited routing.
    """
    placement, source, destination = Placement.of(placement), Path(source), Path(destination)
    permutation = permutation_of(placement, read_config(source))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(str(destination), "exists already", "a new or empty folder is needed")
    files = weight_files(source)
    check_coverage(permutation, (tensor for file in files for tensor in read_header(file)[0]))
    rest = other_files(source, permutation)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    except OSError as error:
        raise InputError(str(destination), error.strerror or str(error), "a folder that can be written") from None
    try:
        for number, file in enumerate(files, start=1):
            _rewrite(file, folder / file.name, permutation)
            if progress is not None:
                progress(number, len(files))
        for name, content in rest.items():
            if content is None:
                shutil.copyfile(source / name, folder / name)
            else:
                write_text(folder / name, content)
        placement.save(folder / "gemopt_placement.json")
        folder.chmod(0o755)
        if destination.exists():
            destination.rmdir()
        os.replace(folder, destination)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(str(destination), reason, "the checkpoint could not be written; nothing was left") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return destination


def unnamed_weights(source: Path) -> list[str]:
    """Names of the safetensors files that the index of a checkpoint does not name: engines read over them."""
    return sorted({file.name for file in source.glob("*.safetensors")} - {file.name for file in weight_files(source)})


def read_config(source: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint."""
    config = read_json(source / "config.json")
    if not isinstance(config, dict):
        raise InputError(str(source / "config.json"), type(config).__name__, "a JSON object is needed")
    return config


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all those its index names."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(str(source), "no *.safetensors file", "a checkpoint in safetensors format is needed")
    index = source / INDEX
    if index.exists():
        named = {str(name) for name in dict(read_json(index).get("weight_map", {})).values()}
        missing = named - {file.name for file in files}
        if missing:
            raise InputError(str(index), min(missing), "every file that the index names is needed")
        files = [file for file in files if file.name in named]
    return files


@dataclass(frozen=True)
class Tensor:
    """Entry of a safetensors header; offsets count from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> tuple[list[Tensor], dict[str, str], int]:
    """(tensors in the order of their data, metadata, where the data begins) of a safetensors file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= MAX_HEADER:
                raise ValueError("header length")
            raw = json.loads(stream.read(length))
            metadata = raw.pop("__metadata__", {})
            tensors = [
                Tensor(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in raw.items()
            ]
            size = stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise InputError(str(file), error.strerror or str(error), "a readable file is needed") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(str(file), "no safetensors header", "a complete safetensors file is needed") from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    ends = [0, *(tensor.end for tensor in tensors)]
    if size != 8 + length + ends[-1] or [tensor.begin for tensor in tensors] != ends[:-1]:
        raise InputError(str(file), f"{size} bytes", f"{8 + length + ends[-1]} bytes without gaps, by its header")
    return tensors, metadata, 8 + length


def expert_sizes(source: str | os.PathLike[str], placement: Placement) -> list[int]:
    """[L] bytes of one expert of each layer, from the headers of a checkpoint.

    Raises
    ------
    InputError
        When the placement is not for all MoE layers and all experts of the checkpoint.
    """
    config = read_config(Path(source))
    text = text_part(config)
    row = family(str(text.get("model_type", "")))
    check_experts(placement, text, row)
    sizes, layers = dict[int, int](), decoder_layers(text)
    for tensor in (tensor for file in weight_files(Path(source)) for tensor in read_header(file)[0]):
        role = tensor_role(row, tensor.name)
        if role is None or role.kind not in ("expert", "stacked") or (layers is not None and role.layer >= layers):
            continue
        if role.expert < placement.num_experts:  # identity experts come after the real ones
            sizes[role.layer] = sizes.get(role.layer, 0) + tensor.end - tensor.begin
    if sorted(sizes) != list(placement.layer_ids):
        raise InputError("Placement.layer_ids", placement.layer_ids, f"the checkpoint has MoE layers {sorted(sizes)}")
    return [sizes[layer] // placement.num_experts for layer in placement.layer_ids]


def _rewrite(source: Path, target: Path, permutation: Permutation) -> None:
    """Copy one safetensors file; every tensor keeps its place in the file."""
    tensors, metadata, start = read_header(source)
    told = renamed_metadata(metadata, f"{source}: metadata", permutation)
    header: dict[str, Any] = {"__metadata__": told} if told else {}
    for tensor in tensors:
        header[permutation.new_name(tensor.name)] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for part in _data(reader, tensor, start, permutation):
                writer.write(part)
        writer.flush()
        os.fsync(writer.fileno())


def _data(reader: BinaryIO, tensor: Tensor, start: int, permutation: Permutation) -> Iterator[bytes]:
    """New bytes of a tensor, piece by piece."""
    role = permutation.role(tensor.name)
    axis = None if role is None else permutation.axis(role, tensor)
    size = tensor.end - tensor.begin
    if role is not None and role.kind == "hash":
        yield _translate(b"".join(_read(reader, start + tensor.begin, size)), tensor, permutation.slot_of(role.layer))
    elif role is None or axis is None or not size:
        yield from _read(reader, start + tensor.begin, size)
    else:
        outer = int(np.prod(tensor.shape[:axis], dtype=np.int64))
        width = tensor.shape[axis]
        row, rest = divmod(size, outer * width)
        if rest:
            raise InputError(tensor.name, f"{size} bytes", f"whole bytes for each of {width} experts")
        for block in range(outer):
            for expert in permutation.order(role.layer, width).tolist():
                yield from _read(reader, start + tensor.begin + (block * width + expert) * row, row)


def _read(reader: BinaryIO, begin: int, size: int) -> Iterator[bytes]:
    reader.seek(begin)
    while size > 0:
        part = reader.read(min(size, CHUNK))
        if not part:
            raise OSError("the file ended early")
        size -= len(part)
        yield part


def _translate(data: bytes, tensor: Tensor, slot_of_E: IntArray) -> bytes:
    if tensor.dtype not in INTEGERS:
        raise InputError(tensor.name, tensor.dtype, "a table of expert ids in whole numbers")
    ids = np.frombuffer(data, dtype=INTEGERS[tensor.dtype]).copy()
    known = (ids >= 0) & (ids < len(slot_of_E))
    ids[known] = slot_of_E[ids[known]]
    return ids.tobytes()
