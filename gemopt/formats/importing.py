"""From an engine's recording to a traces file, with the memory of one recorded file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import replacing
from gemopt.documents.foreign import telling
from gemopt.exceptions import InputError
from gemopt.formats import findings
from gemopt.formats.counts import json_files
from gemopt.formats.engine import IntArray, Loaded, Recording, TraceOptions
from gemopt.formats.findings import MANY_CELLS, Shares, check_loads, check_steps, fullest, made_up, ranges, same_for_all
from gemopt.formats.registry import recorder
from gemopt.formats.succession import Succession
from gemopt.placement import check_layer_ids
from gemopt.traces import COUNT_LIMIT, SCHEMA_VERSION
from gemopt.traces.arrays import ENOUGH_SUMS, FEWEST_SLOTS
from gemopt.traces.files import check_name

_HEADER_BYTES = 1 << 16
MANY_STEPS = 4
SHARES = (100, 1000, 10_000, 1_000_000)  # what shares in whole numbers add up to
ROUNDED = 2  # what rounding numbers changes in their sum, times the root of how many there are, at most
_PIECE = 1 << 24  # bytes converted at once


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was imported: sizes, total assignments, and notes for the user."""

    num_steps: int
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int | None
    assignments: int
    notes: tuple[str, ...]


def import_traces(
    paths: Sequence[Path],
    *,
    source: str,
    destination: str | os.PathLike[str],
    options: TraceOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Read what the engine `source` recorded into one traces file.

    Layers without experts are dropped; `options.layer_ids` says which rows to keep where the counts do not.
    `progress` is called with the steps read so far; how many there are is known at the end only.

    Raises
    ------
    InputError
        One line naming the file and the field that is wrong; the destination is then untouched.
    """
    options = options or TraceOptions()
    engine = recorder(source, options.num_ranks)
    check_name(destination)
    assert engine.read_traces is not None
    try:
        with telling(f"what {engine.name} records", *paths):
            found = _import(engine.read_traces(paths, options), destination, options, progress)
            return replace(found, notes=findings.merged(found.notes))
    finally:
        json_files.forget()


def _import(
    found: Loaded | Recording,
    destination: Any,
    options: TraceOptions,
    progress: Callable[[int], None] | None,
) -> Imported:
    if isinstance(found, Loaded):
        traces = found.traces
        shares = Shares(traces.num_experts)
        shares.add(traces.counts, traces.counts.sum(axis=2, dtype=np.int64))
        notes = check_loads(traces.counts.sum(axis=0, dtype=np.int64), traces.layer_ids) + shares.notes()
        traces.save(destination)
        return Imported(
            num_steps=traces.num_steps,
            layer_ids=traces.layer_ids,
            num_experts=traces.num_experts,
            top_k=traces.top_k,
            assignments=int(traces.counts.sum(dtype=np.int64)),
            notes=(*found.notes, *notes),
        )
    for dtype in (np.uint16, np.int32):
        try:
            return _stream(found, destination, options, np.dtype(dtype), progress)
        except _TooNarrowError:
            continue
    raise AssertionError("int32 holds every count that passed the checks")


class _TooNarrowError(Exception):
    """A count does not fit the chosen type; start again with a wider one."""


def _stream(
    found: Recording,
    destination: Any,
    options: TraceOptions,
    dtype: np.dtype[Any],
    progress: Callable[[int], None] | None,
) -> Imported:
    writer: _Writer | None = None
    with replacing(destination) as stream:
        for block in found.blocks():
            writer = writer or _Writer(stream, _rows(block, found, options), found, block.shape, dtype, options.top_k)
            writer.append(block)
            if progress is not None:
                progress(writer.steps)
        if writer is None:
            raise InputError("PATHS", "no step with any assignment", "a recording of at least one step")
        if options.layer_ids is None and writer.succession.adds_up():
            hint = "subtract from each step the one before; if they do rise so: --layer-ids"
            raise InputError("counts", "counters that add up, by the numbers", "assignments of each step", hint)
        metadata = _metadata(writer, found, options)
        notes = [*found.notes, *_dropped(writer, found, options), *writer.notes()]
        writer.finish(metadata, found.phase)
    return Imported(
        num_steps=writer.steps,
        layer_ids=writer.layer_ids,
        num_experts=writer.experts,
        top_k=found.top_k or options.top_k,
        assignments=writer.assignments,
        notes=tuple(notes),
    )


def _dropped(writer: _Writer, found: Recording, options: TraceOptions) -> list[str]:
    """The note on decoder layers without counts; of a file that names its layers, those in between."""
    ids = writer.layer_ids
    without = set(range(writer.recorded) if found.layer_ids is None else range(ids[0], ids[-1])) - set(ids)
    if options.layer_ids is not None or not without:
        return []
    return [f"layers {ranges(without)} have no counts: taken as layers without experts"]


def _rows(block: IntArray, found: Recording, options: TraceOptions) -> tuple[list[int], tuple[int, ...]]:
    """Rows of the recording to keep, and the decoder layers they are."""
    layers = found.layer_ids or tuple(range(block.shape[1]))
    if options.layer_ids is not None:
        unknown = sorted(set(options.layer_ids) - set(layers))
        if unknown:
            raise InputError("--layer-ids", unknown[0], f"recorded layers {layers[0]} to {layers[-1]}")
        kept = [layers.index(layer) for layer in options.layer_ids]
    elif found.layer_ids is not None:
        kept = list(range(len(layers)))
    else:
        kept = [int(row) for row in np.flatnonzero(block.any(axis=(0, 2)))]
    hidden = options.num_hidden_layers
    if hidden is not None and found.layer_ids is None and hidden != block.shape[1]:
        raise InputError("layers", block.shape[1], f"--num-hidden-layers is {hidden}")
    ids = tuple(layers[row] for row in kept)
    check_layer_ids(ids, len(ids), hidden)
    return kept, ids


def _ordered(counts: IntArray) -> bool:
    """Whether the experts of all layers and steps come in the order of their counts."""
    return bool((counts[:, :, 1:] <= counts[:, :, :-1]).all() or (counts[:, :, 1:] >= counts[:, :, :-1]).all())


class _Writer:
    """Appends counts to a safetensors file whose header is written last, into room left for it."""

    def __init__(
        self,
        stream: BinaryIO,
        rows: tuple[list[int], tuple[int, ...]],
        found: Recording,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        top_k: int | None,
    ) -> None:
        self.stream, self.found, self.dtype, self.top_k = stream, found, dtype, top_k or found.top_k or 1
        self.uneven = 0  # steps whose assignments are no multiple of top_k
        if self.top_k > shape[2]:
            raise InputError("--top-k", self.top_k, f"at most the {shape[2]} experts")
        self.kept, self.layer_ids = rows
        self.recorded, self.experts = shape[1], shape[2]
        self.steps = self.assignments = self.even = self.apart = self.common = self.largest = self.same = 0
        self.shares = Shares(self.experts)
        self.load_LE, self.same_LE = np.zeros((2, len(self.kept), self.experts), np.int64)
        self.totals: list[IntArray] = []
        self.first: IntArray | None = None
        self.last: IntArray | None = None
        self.succession = Succession()
        self.doubts: list[str] = []
        self.ordered = True  # by load, all the experts of every layer and step
        stream.write(bytes(8 + _HEADER_BYTES))

    def append(self, block: IntArray) -> None:
        """Check and write [steps, rows, E] counts."""
        if block.shape[1:] != (self.recorded, self.experts):
            raise InputError(
                "counts",
                f"{block.shape[1]} layers of {block.shape[2]} experts",
                f"{self.recorded} layers of {self.experts} experts, as in the first file",
                "the files are of different networks: import them apart",
            )
        step = max(1, _PIECE // max(1, block[:1].nbytes))
        for start in range(0, len(block), step):
            self._write(block[start : start + step])
        self.steps += len(block)

    def _write(self, piece: IntArray) -> None:
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high > COUNT_LIMIT // self.experts:
            raise InputError("counts", low if low < 0 else high, f"counts from 0 to {COUNT_LIMIT // self.experts}")
        if high > np.iinfo(self.dtype).max:
            raise _TooNarrowError
        whole = len(self.kept) == self.recorded
        narrow = np.ascontiguousarray(piece if whole else piece[:, self.kept], dtype=self.dtype)
        kept = int(narrow.sum(dtype=np.int64))
        if not whole and kept != int(piece.sum(dtype=np.int64)):
            row = int(np.setdiff1d(np.flatnonzero(piece.any(axis=(0, 2))), self.kept)[0])
            layer = row if self.found.layer_ids is None else self.found.layer_ids[row]
            raise InputError(
                "counts",
                f"assignments in layer {layer}, which had none before or is not in --layer-ids",
                "all MoE layers",
                "give --layer-ids with every MoE layer",
            )
        self.assignments += kept
        self.load_LE += narrow.sum(axis=0, dtype=np.int64)
        total_TL = narrow.sum(axis=2, dtype=np.int64)
        self.succession.add(narrow, total_TL)
        self.ordered = self.ordered and _ordered(narrow[:1]) and _ordered(narrow)
        if self.first is None:
            self.first, self.doubts = narrow[:1].copy(), fullest(narrow, total_TL)
        self.last = narrow[-1:].copy()
        self.totals.append(total_TL)
        self.uneven += int((total_TL % self.top_k).any(axis=1).sum())
        most_TL = narrow.max(axis=2).astype(np.int64)
        apart_TL = most_TL - narrow.min(axis=2)
        same = same_for_all(narrow, most_TL, total_TL)
        self.same += len(same)
        self.same_LE += narrow[same].sum(axis=0, dtype=np.int64)
        self.apart = max(self.apart, int(apart_TL.max()))
        self.even += int((~apart_TL.any(axis=1) & total_TL.any(axis=1)).sum())
        self.shares.add(narrow, total_TL)
        self.largest = max(self.largest, high)
        if self.common != 1:  # the greatest common divisor of all counts
            self.common = int(np.gcd.reduce(narrow, axis=None, initial=self.common))
        self.stream.write(narrow.data)

    def notes(self) -> list[str]:
        """What the counts say about the recording; `InputError` for a layer without any."""
        for place, step in (("first", self.first), ("last", self.last)):
            assert step is not None
            enough = self.steps > 2 and np.count_nonzero(step) >= ENOUGH_SUMS
            if enough and (2 * step[0].astype(np.int64) == self.load_LE).all():
                total = f"a {place} step that is the sum of the others"
                raise InputError("counts", total, "counts alone", "leave it out")
        total_TL = np.concatenate(self.totals)
        found = check_loads(self.load_LE, self.layer_ids) + check_steps(total_TL, self.layer_ids)
        found += self.shares.notes() + self.succession.notes() + self.doubts
        return found + [text for wanted, text in self._said(total_TL) if wanted]

    def _said(self, total_TL: IntArray) -> list[tuple[bool, str]]:
        """What may be wrong with the counts, whether it seems so first."""
        steps, many = self.steps, self.shares.cells >= MANY_CELLS
        padded = bool(((total_TL > 0) & (total_TL < total_TL.max(axis=1, keepdims=True))).any())
        ranks = f"counted by {self.common} ranks that saw the same tokens? then they are that much too large"
        why = "padded to them, as by DeepEP? then they are too large, small ones most" if padded else ranks
        only = int(total_TL[0, 0]) if (total_TL == total_TL[0, 0]).all() else 0  # all layers of all steps have so many
        apart = 2 * int((total_TL != total_TL[:, :1]).any(axis=1).sum()) > steps  # layers of most steps
        few = ROUNDED * np.sqrt(self.experts)
        near = next((n for n in SHARES if apart and (abs(total_TL - n) <= few).all()), 0)
        left = "tokens that chose fewer, ranks that did not record, or another --top-k"
        return [
            (many and 1 < self.common < self.largest, f"all counts are multiples of {self.common}: {why}"),
            (
                self.ordered and self.apart > 1 and total_TL.size > 1 and self.experts >= FEWEST_SLOTS,
                "experts come in the order of their load in every layer and step: sorted? then which is which is lost",
            ),
            (
                self.largest == 1 and only > 0 and steps >= MANY_STEPS,
                "every step is of a single token: rows of tokens? then add up those that are computed together",
            ),
            (many and only in SHARES, f"all layers of all steps add up to {only}: shares instead of counts?"),
            (total_TL.size >= MANY_STEPS and near > 0, f"all layers add up to about {near}: shares that were rounded?"),
            (many and self.largest == 1 and apart, "no count is above 1: marks of experts in use instead of counts?"),
            (
                0 < self.even < steps and self.experts > 1,
                f"{self.even} of {steps} steps give every expert as much: warm-up?",
            ),
            (
                0 < self.same < steps and made_up(self.same_LE, self.load_LE),
                f"in {self.same} of {steps} steps all tokens choose the same experts: dummy runs of a start?",
            ),
            (
                self.uneven > 0,
                f"{self.uneven} of {steps} steps are no multiple of {self.top_k} experts per token: {left}",
            ),
        ]

    def finish(self, metadata: dict[str, str], phase: NDArray[Any] | None) -> None:
        """Write the phases, then the header at the start."""
        shape = [self.steps, len(self.layer_ids), self.experts]
        size = int(np.prod(shape)) * self.dtype.itemsize
        kind = {"uint16": "U16", "int32": "I32"}[self.dtype.name]
        header: dict[str, Any] = {"__metadata__": metadata}
        header["counts"] = {"dtype": kind, "shape": shape, "data_offsets": [0, size]}
        if phase is not None:
            codes = phase.astype(np.uint8)
            self.stream.write(codes.data)
            header["phase"] = {"dtype": "U8", "shape": [len(codes)], "data_offsets": [size, size + len(codes)]}
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > _HEADER_BYTES:
            raise InputError("layer_ids", f"{len(self.layer_ids)} layers", "fewer layers")
        self.stream.seek(0)
        self.stream.write(_HEADER_BYTES.to_bytes(8, "little") + text.ljust(_HEADER_BYTES))


def _metadata(writer: _Writer, found: Recording, options: TraceOptions) -> dict[str, str]:
    hidden = options.num_hidden_layers or found.num_hidden_layers
    if hidden is None and found.layer_ids is None:
        hidden = writer.recorded
    top_k = found.top_k or options.top_k
    if options.top_k not in (None, top_k):
        raise InputError("--top-k", options.top_k, f"{top_k} experts per token, as the files say", "leave it out")
    known = {"num_hidden_layers": hidden, "top_k": top_k, "model": options.model}
    if options.num_experts is not None and options.num_experts != writer.experts:
        raise InputError("experts", writer.experts, f"--num-experts is {options.num_experts}")
    return {
        "gemopt_traces": str(SCHEMA_VERSION),
        "layer_ids": json.dumps(writer.layer_ids),
        **{key: str(value) for key, value in known.items() if value is not None},
    }
