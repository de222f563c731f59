"""Rows of tokens in other shapes: columns as arrays, lists that hooks of layers appended to, a file for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemopt.formats.files import as_numpy, load_torch, numpy_arrays, safetensors_arrays
from gemopt.formats.names import COLUMNS, numbered
from gemopt.formats.tokens.cells import NAMES, bare, columns_of, rows_of

SUFFIXES = (".npz", ".pt", ".safetensors")


def layers_of(files: Sequence[Path]) -> dict[Path, int]:
    """The layers that files are of by their names alone, `layer_02.parquet`, in order; of others nothing."""
    found = numbered({path.name.partition(".")[0]: None for path in files})
    kind, layers = found or ("", [])
    several = kind == "layer" and 1 < len(files) == len({*layers})
    pairs = sorted(zip(files, layers, strict=True), key=lambda pair: pair[1]) if several else []
    return dict(pairs)


def rows_in(path: Path, layer: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a file is, and its cells by name.

    layer: of the whole file, whose rows are the tokens in their order where no column numbers steps or tokens.
    """
    if path.suffix in SUFFIXES:
        rows: Iterable[tuple[str, dict[str, Any]]]
        rows = ((f"{path}: row {number}", row) for number, row in enumerate(in_arrays(path), 1))
    else:
        rows = rows_of(path)
    lacking: set[str] | None = None
    for number, (where, row) in enumerate(rows):
        if layer is None:
            yield where, row
            continue
        lacking = {"layer", "step", "token", "request"} - columns_of(where, row).keys() if lacking is None else lacking
        more: dict[str, Any] = {"layer": layer} if "layer" in lacking else {}
        if {"layer", "step"} <= lacking:
            more |= {"request": str(path.parent)} if "request" in lacking else {}
            more |= {"token": number} if {"token", "request"} <= lacking else {}
        yield where, {**row, **more}


def in_arrays(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table whose columns are arrays, or of a list of objects with a layer and its experts; else none."""
    if path.suffix not in SUFFIXES:
        return
    if path.suffix == ".pt":
        data = load_torch(path)
    else:
        data = safetensors_arrays(path)[0] if path.suffix == ".safetensors" else numpy_arrays(path)
    if isinstance(data, list | tuple) and data and all(isinstance(each, dict) and _of_layer(each) for each in data):
        yield from ({str(name): _plain(cell) for name, cell in row.items()} for row in data)
    elif isinstance(data, dict) and (names := _of_layer(data)):
        layer, ids = names
        rows = len(as_numpy(data[layer])) if as_numpy(data[layer]).ndim == 1 else 0
        arrays = {str(name): as_numpy(each) for name, each in data.items()}
        if rows < 2 or arrays[ids].ndim not in (1, 2) or len(arrays[ids]) != rows:
            return
        columns = {name: each.tolist() for name, each in arrays.items() if each.ndim and len(each) == rows}
        alike = {name: _plain(each) for name, each in arrays.items() if name not in columns}
        for cells in zip(*columns.values(), strict=True):
            yield {**alike, **dict(zip(columns, cells, strict=True))}


def _of_layer(row: dict[Any, Any]) -> tuple[str, str] | None:
    """The names of the layer and of the experts among those of a row; None where one of them is not there."""
    meant = NAMES["layer"], (*NAMES["ids"], *COLUMNS["expert"])
    found = [next((str(name) for name in row if bare(str(name)) in names), "") for names in meant]
    return (found[0], found[1]) if all(found) else None


def _plain(cell: Any) -> Any:
    """A number, text or list in place of an array."""
    return as_numpy(cell).tolist() if hasattr(cell, "shape") else cell
