"""Arrays whose names number layers or steps, as hooks of a network and `numpy.savez(path, *arrays)` keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray
from gemopt.formats.files import whole_numbers
from gemopt.formats.names import COUNTED, numbered, words_of
from gemopt.traces.axes import FEWEST_LAYERS

SHAPES = {"layer": ("[experts] of all steps, or [steps, experts]", (1, 2)), "step": ("[layers, experts]", (2,))}
NAME_THEM = "name them layer_0, ... or step_0, ..."


def kind_of(data: dict[str, Any]) -> tuple[str, list[int]] | None:
    """What the names number, `layer`, `step` or nothing that they say, and the numbers; None for other names."""
    found = numbered({name.removeprefix("arr_"): None for name in data}) if len(data) > 1 else None
    return found if found is not None and found[0] in ("layer", "step", "") else None


def inner(path: Path, data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arrays of counts of layers that hold several arrays each, as REAP's observer does; and the others' names."""
    parts = list(data.values())
    if len(parts) < 2 or numbered(data) is None or not all(isinstance(each, dict) and each for each in parts):
        return data, []
    names = [str(name) for name in parts[0]]
    if any([str(name) for name in each] != names for each in parts):
        raise InputError(str(path), "layers that hold other arrays than the first", "the same arrays in all of them")
    counts = [name for name in parts[0] if words_of(str(name)) & (COUNTED | {"frequency"}) and _whole(parts[0][name])]
    if len(counts) != 1:
        found = ", ".join(map(str, counts)) or ", ".join(names)[:200]
        raise InputError(str(path), found, "one array of counts [experts] for each layer", "leave the others out")
    return {key: each[counts[0]] for key, each in data.items()}, [name for name in names if name != str(counts[0])]


def _whole(array: Any) -> bool:
    return getattr(array, "ndim", 0) == 1 and "int" in str(array.dtype)


def joined(path: Path, data: dict[str, Any], kind: str, numbers: list[int]) -> tuple[IntArray, tuple[int, ...] | None]:
    """[T, L, E] counts of all arrays, and their layers where the names say them.

    Raises
    ------
    InputError
        Arrays of several shapes, or names of numbers alone whose sums do not tell layers from steps.
    """
    arrays = {name: whole_numbers(each, name=f"{path}: {name}", ndims=(1, 2)) for name, each in data.items()}
    if len(shapes := sorted({each.shape for each in arrays.values()})) > 1:
        raise InputError(str(path), f"arrays of shapes {shapes[0]} and {shapes[-1]}", "one shape for all of them")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    together = np.stack([list(arrays.values())[i] for i in order])
    kind = kind or _by_sums(path, together)
    limit, ndims = SHAPES[kind]
    if together.ndim - 1 not in ndims:
        raise InputError(f"{path}: {next(iter(data))}", f"shape {together.shape[1:]}", f"counts of a {kind}, {limit}")
    if kind == "step":
        return together, None
    return together.transpose(1, 0, 2) if together.ndim == 3 else together[None], tuple(sorted(numbers))


def _by_sums(path: Path, together: IntArray) -> str:
    """Whether arrays are of layers or of steps: all layers of a step have as many assignments, and steps differ."""
    sums_KM = together.sum(axis=-1, dtype=np.int64).reshape(len(together), -1)
    sums_KM = sums_KM[np.ix_(sums_KM.any(axis=1), sums_KM.any(axis=0))]
    layers = bool((sums_KM == sums_KM[:1]).all())
    steps = sums_KM.shape[1] > 1 and bool((sums_KM == sums_KM[:, :1]).all())
    if layers == steps or sums_KM.size < FEWEST_LAYERS:
        found = "names of numbers alone, whose sums do not tell layers from steps"
        raise InputError(str(path), found, "arrays of layers, or of steps", NAME_THEM)
    return "layer" if layers else "step"
