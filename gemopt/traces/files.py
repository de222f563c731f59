"""Traces as files, below the document: arrays and metadata to and from safetensors, folders and `.npz`.

Nothing here knows what the arrays mean; see `docs/formats.md` for that.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import foreign, read_bytes, replacing
from gemopt.exceptions import InputError
from gemopt.traces.telling import refuse_telling

IntArray = NDArray[Any]
PLAIN = ("num_hidden_layers", "top_k", "model")  # what an .npz may say of the network, beside layer_ids
# Arrays that say where experts and their copies are, or count by slot (the last are vLLM's) or on one rank.
COPIES = re.compile(
    r"physical|phy2?log|log2phy|logcnt|(^|[\W_])(phy|p2l|l2p|local|slots?|replicas?)([\W_]|$)|redundan|"
    "expert_(map|location|ids?$|order|perm)|expert_load_(window|pass|view)",
    re.IGNORECASE,
)
NOT_COPIES = "add up the copies of an expert, and put the experts of all ranks side by side in their order"
ALTERING = re.compile(  # arrays and metadata that say what is still to be done to the counts, no setting of a network
    r"^(?!.*(capacity|rout|rope|attention|loss|grad|logit))(.*[\W_])?"
    r"(scale|scaling|factor|mask|valid|warm_?up|normali[sz]ed|step_weight|sampl(e|ing)_(rate|ratio))s?([\W_]|$)|"
    r"expert_(start|begin|offset)|first_expert|^((is|are)_)?cumulative$",
    re.IGNORECASE,
)
HEADER_BYTES = 1 << 12  # of an array, at most
PLAIN_TYPES = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}  # of safetensors
NOT_ALTERED = "do to the counts what it says, and leave it out"
_MEANT = {  # what else arrays are called that say what the counts are of
    "layer_ids": re.compile(
        r"((moe|decoder|hidden|sparse)_)?layers?(_?(ids?|idx|ind(ex|ices)|num(ber)?s?|names?|offset|freq))?|"
        r"(start|first|begin)(_moe)?_layer(_?(id|idx))?|layer_(start|begin|base)|first_k_dense_replace|num_dense_layers|"
        r"(pp|pipeline(_parallel)?)_?(rank|stage)",
        re.IGNORECASE,
    ),
    "top_k": re.compile(r"k|top_?k|(num_)?experts_per_tok(en)?|(n|num)_experts_used", re.IGNORECASE),
    "num_hidden_layers": re.compile(r"(num|n)_(hidden_)?layers", re.IGNORECASE),
}


@dataclass
class Part:
    """One file: where it came from, its arrays, the names of all that it holds, and its metadata."""

    path: Path
    arrays: dict[str, IntArray]
    names: set[str]
    metadata: dict[str, str]


def check_name(path: str | os.PathLike[str], field: str = "output") -> None:
    """Refuse to write traces under a name that `read` takes for NumPy's format."""
    if Path(path).suffix == ".npz":
        raise InputError(field, str(path), "traces are written as .safetensors", "an .npz could not be read back")


def write(path: str | os.PathLike[str], arrays: dict[str, IntArray], metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically, every array in the smallest integer type that holds it."""
    from safetensors.numpy import save as serialised

    check_name(path)
    small = {name: smallest(array) for name, array in arrays.items()}
    with replacing(path) as stream:
        stream.write(serialised(small, metadata=metadata))


def smallest(array: IntArray) -> IntArray:
    """The same numbers in the smallest integer type that holds them; floats in 32 bits."""
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    kinds = (np.uint8, np.uint16, np.int32) if low >= 0 else (np.int8, np.int16, np.int32)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.ascontiguousarray(array, dtype=kind)
    return np.ascontiguousarray(array, dtype=np.int64)


def read(path: str | os.PathLike[str], wanted: tuple[str, ...]) -> list[Part]:
    """Read the wanted arrays of a file, or of every numbered file of a folder; `InputError` naming the file."""
    source = Path(path)
    if source.is_dir():
        return [part for each in numbered_files(source) for part in read(each, wanted)]
    return [_read_npz(source, wanted) if source.suffix == ".npz" else _read_safetensors(source, wanted)]


def numbered_files(folder: Path) -> list[Path]:
    """The complete parts of a trace folder in order; files still being written are hidden and skipped."""
    named = [part for part in folder.glob("[0-9]*.safetensors") if part.stem.isdecimal()]
    parts = sorted(named, key=lambda part: int(part.stem))
    if not parts:
        hint = "gemopt trace import reads what an engine recorded" if any(folder.iterdir()) else ""
        if any(folder.glob("rank-*")):
            hint = "gemopt.profiling.tracing.load_ranks adds up the ranks"
        raise InputError(
            str(folder), "no numbered .safetensors file", "a trace folder holds 000000.safetensors, ...", hint
        )
    for number, part in enumerate(parts):
        if int(part.stem) != number:
            raise InputError(str(folder), part.name, f"part {number:06d}.safetensors is missing", "restore it")
    return parts


def _read_npz(path: Path, wanted: tuple[str, ...]) -> Part:
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = arrays.files
            kept = {name: arrays[name] for name in wanted if name in found}
            shape = kept["counts"].shape if "counts" in kept else ()
            most = max(*shape, math.prod(shape[1:]), 0)
            short = [name for name in _short(arrays.zip, most) if _is_beside(name, wanted)]
            beside = {name: each for name in short if (each := _plain(arrays, name)) is not None}
            metadata = {name: str(arrays[name]) for name in (*PLAIN, "num_experts") if name in found}
            if "layer_ids" in found:
                metadata["layer_ids"] = json.dumps(arrays["layer_ids"].tolist())
    except Exception as error:  # zipfile, zlib, numpy and struct each have their own
        _refuse_foreign(path, ".npz")
        raise InputError(str(path), str(error), "a complete .npz file of plain arrays is needed") from None
    if "counts" not in kept:
        hint = foreign.IMPORT_TRACES
        raise InputError(str(path), ", ".join(found)[:200], "an array named counts is needed", hint)
    if kept["counts"].ndim == len("TLE"):
        refuse_telling(path, beside, kept["counts"], layers="layer_ids" in metadata)
    return Part(path, kept, set(found), metadata)


def _short(archive: zipfile.ZipFile, most: int) -> list[str]:
    """The names of arrays that may be of so few numbers."""
    files = [each.filename for each in archive.infolist() if each.file_size <= HEADER_BYTES + 8 * most]
    return [name.removesuffix(".npy") for name in files if name.endswith(".npy")]


def _plain(arrays: Any, name: str) -> IntArray | None:
    """An array; None where it holds objects."""
    try:
        return np.asarray(arrays[name])
    except ValueError:
        return None


def _is_beside(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether an array of this name has no meaning to the reader."""
    return name not in ("layer_ids", "num_experts", *PLAIN, *wanted) and not meant(name)


def _read_safetensors(path: Path, wanted: tuple[str, ...]) -> Part:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"):  # for the system's own words about a file that cannot be read
            pass
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = set(file.keys())
            arrays = {name: file.get_tensor(name) for name in wanted if name in names}
            for name in names & {"layer_ids", *PLAIN} - set(metadata):
                metadata[name] = json.dumps(file.get_tensor(name).tolist())
            others = {name: file.get_slice(name) for name in names if _is_beside(name, wanted)}
            maps = list(arrays["counts"].shape[1:]) if "counts" in arrays else []
            short = [
                name
                for name, each in others.items()
                if (len(each.get_shape()) == 1 or each.get_shape() == maps) and each.get_dtype() in PLAIN_TYPES
            ]
            beside = {name: file.get_tensor(name) for name in short}
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), "a readable safetensors file is needed") from None
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        _refuse_foreign(path, "safetensors")
        raise InputError(str(path), str(error), "a complete safetensors file of integers is needed") from None
    if "counts" in arrays and arrays["counts"].ndim == len("TLE"):
        refuse_telling(path, beside, arrays["counts"], layers="layer_ids" in metadata)
    return Part(path, arrays, names, metadata)


def _refuse_foreign(path: Path, kind: str) -> None:
    """Name what a file is that is no traces at all."""
    found, way_out = foreign.of_file(path)
    if found and kind not in found and not found.startswith("traces"):
        raise InputError(str(path), found, "traces are needed: .safetensors, a folder of them, or .npz", way_out)


def unread(path: Path, wanted: tuple[str, ...]) -> list[str]:
    """Arrays of an `.npz` beside the wanted ones that change nothing by their names, and are read over."""
    if path.suffix != ".npz":
        return []
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return [name for name in names if name not in ("layer_ids", "num_experts", *PLAIN, *wanted)]


def refuse_unread(names: set[str]) -> None:
    """Refuse arrays that would change what the counts mean, and are not read."""
    for name in sorted(names):
        if COPIES.search(name):
            raise InputError(f"Traces.{name}", "beside counts", "counts of logical experts", NOT_COPIES)
        if ALTERING.search(name):
            raise InputError(f"Traces.{name}", "beside counts", "counts that nothing is to be done to", NOT_ALTERED)
        if name not in ("layer_ids", *PLAIN) and (other := meant(name)):
            raise InputError(f"Traces.{name}", "no such array", f"{other}, if that is meant", "rename it")


def meant(name: str) -> str:
    """What traces call that which an array of this name says; empty when it says nothing of the counts."""
    return next((own for own, known in _MEANT.items() if known.fullmatch(name)), "")


def parsed(metadata: dict[str, str], key: str, kind: type) -> Any:
    """Take a value out of the metadata, None when it is not there; `InputError` unless it is JSON of that kind."""
    text = metadata.pop(key, None)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise InputError(f"Traces.{key}", text, f"a JSON {kind.__name__} is needed")
    return value
