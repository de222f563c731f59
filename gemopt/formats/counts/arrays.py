"""The counts of a file of arrays, told from what else it holds: .npy, .npz, .pt, .safetensors, .json."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.counts import json_files, slot_maps
from gemopt.formats.counts.numbered_arrays import NAME_THEM, inner, joined, kind_of
from gemopt.formats.counts.told import refuse_slots, says_nothing
from gemopt.formats.engine import IntArray
from gemopt.formats.files import as_numpy, load_torch, numpy_arrays, safetensors_arrays, whole_numbers
from gemopt.formats.names import (
    COUNTED,
    MEASURED,
    NO_COUNTS,
    SCORES,
    derived,
    doubts_of,
    refuse_derived,
    words_of,
)
from gemopt.traces.arrays import NOT_IDS
from gemopt.traces.document import STEP_ARRAYS
from gemopt.traces.files import ALTERING, COPIES, NOT_ALTERED, NOT_COPIES, PLAIN, meant
from gemopt.traces.telling import refuse_telling
from gemopt.traces.tokens import ARRAYS

TRACES = ("layer_ids", *PLAIN, *STEP_ARRAYS, *ARRAYS)  # names that traces give a meaning


class Counts(NamedTuple):
    """[T, L, E] counts, and the layers of their rows where the file says so."""

    array: IntArray
    layers: tuple[int, ...] | None


def counts_of(path: Path, notes: list[str] | None = None, of: str = "") -> Counts:
    """The counts of a file; what else it holds is refused, or goes to the notes.

    of: a `step` or a `layer`, whose arrays may have two dimensions.
    """
    data, told = _loaded(path)
    found = _Found(data, [path.stem] if words_of(path.stem) & COUNTED else [], told.get("num_experts"))
    if isinstance(data, dict):
        _pick(path, data, told, found, notes)
    data, layers = found.array, found.layers
    copies = [name for name in found.names if COPIES.search(name)]
    if copies and found.mapped is None:
        raise InputError(str(path), f"an array {copies[0]}", "counts of logical experts", NOT_COPIES)
    if (ndim := _ndim(data)) == 2 and of:
        flat = whole_numbers(data, name=f"{path}: counts", ndims=(2,))
        data, ndim = flat[None] if of == "step" else flat[:, None], 3
    if ndim < 3:
        hint = "[layers, experts] of sums over the steps are one step, counts[None]; [steps, experts] are one layer, "
        hint += "counts[:, None]"
        raise InputError(f"{path}: counts", f"{ndim} dimensions", "counts [steps, layers, experts]", hint)
    if ndim > 3:
        limit, hint = "3-dimensional counts [steps, layers, experts]", f"if they are {NOT_IDS}"
        raise InputError(f"{path}: counts", f"{ndim} dimensions", limit, hint)
    counts = whole_numbers(data, name=f"{path}: counts", ndims=(3,))
    if not counts.size:
        raise InputError(f"{path}: counts", f"shape {counts.shape}", "at least one step, layer and expert")
    if found.mapped is not None and "logical" not in words_of(found.names[-1]):
        counts = slot_maps.of_experts(str(path), counts, *found.mapped, of_slots=bool(copies))
        if notes is not None:
            notes.append(slot_maps.said(path.name, found.names[-1], found.mapped[0]))
    if str(np.asarray(found.experts).tolist()).strip("[]") not in ("None", str(counts.shape[2])):
        raise InputError(f"{path}: counts", f"{counts.shape[2]} experts", f"{found.experts}, as num_experts says")
    if json_files.is_json(path):
        found.others |= json_files.read(path).beside
        if notes is not None:
            notes += json_files.read(path).notes
    others = {name: as_numpy(each) for name, each in found.others.items()}
    refuse_telling(path, others, counts, layers=layers is not None)
    return Counts(counts, layers)


@dataclass
class _Found:
    """What of a file is read, and what else it says.

    names: of the array, its file's among them; others: arrays left unread, whose numbers may tell something; mapped:
    name and array of the map of slots that the counts are of.
    """

    array: Any
    names: list[str]
    experts: Any
    layers: tuple[int, ...] | None = None
    others: dict[str, Any] = field(default_factory=dict)
    mapped: tuple[str, Any] | None = None


def _pick(path: Path, data: dict[Any, Any], told: dict[str, Any], found: _Found, notes: list[str] | None) -> None:
    """Find the counts among arrays; `InputError` where nothing tells them, or others say more of them than is read."""
    data, beside = inner(path, {str(key): value for key, value in data.items()})
    if (name := slot_maps.map_among(data)) is not None and len(data) > 1:
        found.mapped = name, data.pop(name)
    kind = kind_of(data)
    dims = {name: _ndim(each) for name, each in data.items() if words_of(name) & COUNTED}  # not num_tokens [steps]
    told_so = [name for name in dims if dims[name] == 3] or [name for name in dims if dims[name] == 2]
    named = ["counts"] if "counts" in data else [name for name in told_so if not derived(name)] or told_so
    if len(named) != 1 and len(data) != 1 and kind is None:
        limit, hint = "one array, or one called counts", f"arrays of layers or steps: {NAME_THEM}"
        raise InputError(str(path), ", ".join(data)[:200] or "no array", limit, hint)
    key = named[0] if len(named) == 1 else next(iter(data))
    known = (*(data if kind else [key]), "format", "num_experts")
    nothing = {name for name, each in data.items() if name not in known and _says_nothing(name, each)}
    names_beside = [name for name in [*data, *told, *beside] if name not in known]
    _refuse_beside(path, names_beside, nothing, notes)
    for name, each in {**data, **told}.items() if found.mapped is None else ():
        refuse_slots(str(path), name, _text(each))
    if key != "counts" and not (words := words_of(key)) & COUNTED and words & NO_COUNTS:
        hint = "" if words & MEASURED else "count the experts that were chosen" if words & SCORES else NOT_IDS
        raise InputError(str(path), f"an array {key}", "counts [steps, layers, experts]", hint)
    refuse_derived(path, key)
    if notes is not None:
        notes += doubts_of(key)
    found.names.append(key)
    found.others = {name: each for name, each in data.items() if name not in known}
    found.experts = data.get("num_experts", found.experts)
    found.array, found.layers = (data[key], None) if kind is None else joined(path, data, *kind)


def _loaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """An array, or those of the file by name; and its metadata."""
    if json_files.is_json(path):
        return json_files.arrays(path), {}
    if path.suffix == ".safetensors":
        return safetensors_arrays(path)
    return load_torch(path) if path.suffix == ".pt" else numpy_arrays(path), {}


def _ndim(data: Any) -> int:
    """Dimensions of an array, or of lists and lists of arrays that are alike."""
    if isinstance(data, list | tuple) and data:
        return 1 + _ndim(data[0])
    return int(getattr(data, "ndim", 0 if isinstance(data, int | float | str) else 3))


def says_counts(path: Path) -> bool:
    """Whether the file itself calls its array so."""
    if json_files.is_json(path):
        return json_files.read(path).named
    data, _ = _loaded(path)
    return path.suffix != ".npy" and isinstance(data, dict) and "counts" in data


def _text(value: Any) -> Any:
    """A text as such, though NumPy keeps it in an array."""
    return value.item() if isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.size == 1 else value


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a single value changes nothing, as `start_layer` 0."""
    array = as_numpy(value)
    return array.size == 1 and says_nothing(name.casefold(), str(array.ravel()[0]).casefold())


def _refuse_beside(path: Path, others: list[str], nothing: Collection[str], notes: list[str] | None) -> None:
    """Refuse what says more of the counts, by its name, than is read here; note what does not, or says `nothing`."""
    telling = [name for name in others if name not in nothing]
    if copies := [name for name in telling if COPIES.search(name)]:
        found = f"{copies[0]} beside counts"
        raise InputError(str(path), found, "counts of logical experts", f"{NOT_COPIES}; then leave it out")
    if known := [name for name in telling if name in TRACES or meant(name)]:
        found, limit = f"{', '.join(known)} beside counts", "counts alone: what they say would be lost"
        names = ", ".join(sorted({name if name in TRACES else meant(name) for name in known}))
        raise InputError(str(path), found, limit, f"an .npz of counts, {names} is traces already")
    if altering := [name for name in telling if ALTERING.search(name)]:
        raise InputError(str(path), f"{altering[0]} beside counts", "counts alone", NOT_ALTERED)
    others = others + (json_files.read(path).unread if json_files.is_json(path) else [])
    if others and notes is not None:
        notes.append(f"{path.name}: {', '.join(others)} left unread")
