"""Counts that are already an array [steps, layers, experts]: .npy, .npz, .pt, .safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats import count_csv, count_json
from gemopt.formats.count_arrays import counts_of, says_counts
from gemopt.formats.count_names import numbered
from gemopt.formats.engine import Engine, IntArray, Recording, TraceOptions
from gemopt.formats.findings import refuse_parts
from gemopt.formats.pipelines import refuse_parts_of_steps, refuse_stages_in_time
from gemopt.formats.recorded_files import files_of, left_alone
from gemopt.formats.succession import MANY_COUNTS
from gemopt.traces.arrays import (
    LOOKED_AT,
    NOT_IDS,
    as_ids,
    is_map,
    refuse_narrow,
    refuse_totals,
)
from gemopt.traces.axes import IN_ORDER, MOST_LAYERS, axis_of_layers, other_order
from gemopt.words import counted

ARRAYS_ALONE = (".npy", ".npz", ".pt", ".safetensors")
SUFFIXES = (*ARRAYS_ALONE, *count_json.SUFFIXES)
SIDE_BY_SIDE = "put layers and stages side by side in one array; if these are later steps: --no-pipeline"
NUMBERS_TELL = "give --num-experts and --num-hidden-layers"
_ROWS = 64 << 20  # bytes handed on at once


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read arrays one after the other; a file with several needs one called `counts`."""
    if all(path.suffix in count_csv.SUFFIXES and not count_json.is_json(path) for path in paths) or _tables(paths):
        return count_csv.read_traces(paths, options)
    options.refuse_unused("arrays of counts")
    given = files_of(paths, *ARRAYS_ALONE, else_of=count_json.SUFFIXES)
    if together := _together(given, options):
        return together
    files, notes = _distinct(given, options)
    notes += left_alone(paths, given, count_json.SUFFIXES)
    refuse_parts(files)
    numbers = [count_json.read(path).steps for path in files if count_json.is_json(path)]
    told = [each for each in numbers if each is not None]
    if len({bool(count_json.is_json(path) and count_json.read(path).phases) for path in files}) > 1:
        notes.append("phases that some files lack are left unread")
    if any(later[0] <= before[1] for before, later in pairwise(told)):
        found = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in told)[:100]
        raise InputError("PATHS: step", found, "files of rising steps", "ranks of the same steps are to be added up")
    if len(files) > 1:
        notes.append(f"{len(files)} files, one after the other in time: {files[0].name} to {files[-1].name}")

    notes += _doubts(*counts_of(files[0]), options)

    def blocks() -> Iterator[IntArray]:
        for path in files:
            counts, _ = counts_of(path)
            step = max(1, _ROWS // max(1, counts[:1].nbytes))
            for start in range(0, len(counts), step):
                block = counts[start : start + step]
                used = np.asarray(block).reshape(len(block), -1).any(axis=1)
                if used.any():
                    yield block if used.all() else block[used]

    first, named = counts_of(files[0])
    ids = named or _chosen(first, options)
    return Recording(blocks=blocks, layer_ids=ids, top_k=count_json.top_k(files), phase=_phases(files), notes=notes)


def _together(files: list[Path], options: TraceOptions) -> Recording | None:
    """Files of [layers, experts] that a step each has, or of [steps, experts] of layers, by their names; else None."""
    named = numbered({path.stem: None for path in files})
    kind, numbers = named or ("", [])
    axis = int(kind == "layer")
    known = files if kind in ("step", "layer") else []
    flat = [path for path in known if counts_of(path, of=kind).array.shape[axis] == 1]
    if len(flat) < max(2, len(files)) or len(set(numbers)) < len(files):
        return None
    notes = [f"{len(files)} files, a {kind} each, in the order of their numbers"]
    found = [counts_of(path, notes, of=kind).array for path in files]
    if len(shapes := sorted({each.squeeze(axis).shape for each in found})) > 1:
        raise InputError("PATHS", f"arrays of shapes {shapes[0]} and {shapes[-1]}", "one shape for all of them")
    order = sorted(range(len(files)), key=numbers.__getitem__)
    counts = np.concatenate([found[i] for i in order], axis=axis)
    _check_axes(files[0], counts, options)
    refuse_narrow(f"{files[0]}: counts", counts)
    ids = tuple(sorted(numbers)) if kind == "layer" else _chosen(counts, options)
    notes += _doubts(counts, ids, options)
    used = counts.any(axis=(1, 2))
    return Recording(blocks=lambda: iter([counts[used]] if used.any() else []), layer_ids=ids, notes=notes)


def _phases(files: list[Path]) -> IntArray | None:
    """[T] the phases of the steps with assignments, None where not all files tell them."""
    if not all(count_json.is_json(path) and count_json.read(path).phases for path in files):
        return None
    told = [np.array(count_json.read(path).phases) for path in files]
    used = [np.asarray(counts_of(path).array).any(axis=(1, 2)) for path in files]
    return np.concatenate(told)[np.concatenate(used)]


def _tables(paths: Sequence[Path]) -> bool:
    """Whether files, or those of folders, are tables in JSON: what each holds tells."""
    inside = [list(path.iterdir()) if path.is_dir() else [path] for path in paths]
    files = [path for part in inside for path in part if not path.name.startswith(".")]
    found = sorted(path for path in files if count_json.is_json(path))  # the first one is read first again
    others = any(path.suffix in ARRAYS_ALONE for path in files)
    return bool(found) and not others and not count_json.read(found[0]).arrays


def _distinct(files: list[Path], options: TraceOptions) -> tuple[list[Path], list[str]]:
    """The files without those whose counts came before, and a note on each of these."""
    kept: dict[bytes, Path] = {}
    sums: list[tuple[str, IntArray]] = []
    notes: list[str] = []
    layers = counts_of(files[0]).layers
    for path in files:
        counts, named = counts_of(path, notes)
        if named != layers:
            raise InputError(f"{path}: layers", named, f"{layers}, as in {files[0].name}", "import networks apart")
        _check_axes(path, counts, options)
        refuse_narrow(f"{path}: counts", counts)
        sums_TL = counts.sum(axis=2, dtype=np.int64)
        few = sums_TL.sum() < MANY_COUNTS  # so that steps of their own may be the same
        digest = hashlib.sha256(f"{counts.shape} {path if few else ''}".encode())
        for step in counts:
            digest.update(np.ascontiguousarray(step, dtype=np.int64).data)
        first = kept.setdefault(digest.digest(), path)
        if first is not path:
            notes.append(f"{path.name} is {first.name} again: counted once")
        elif not few:
            sums.append((path.name, sums_TL))
    refuse_parts_of_steps(sums)
    if not options.no_pipeline:
        refuse_stages_in_time(sums, SIDE_BY_SIDE)
    return list(kept.values()), notes


def _chosen(counts: IntArray, options: TraceOptions) -> tuple[int, ...] | None:
    """`--layer-ids` where it names the rows there are, rather than picks some of them."""
    ids = options.layer_ids
    return ids if ids is not None and len(ids) == counts.shape[1] else None


def _doubts(counts: IntArray, named: tuple[int, ...] | None, options: TraceOptions) -> list[str]:
    """Notes on which axis is of layers, and on which these are, where neither the file nor an option says it."""
    if options.layer_ids is not None or options.num_hidden_layers is not None:
        return []
    rows = named is None and np.asarray(counts.any(axis=(0, 2))).all()
    said = [
        (rows, f"rows are layers 0 to {counts.shape[1] - 1}: if dense layers were left out, give --layer-ids"),
        (
            axis_of_layers(counts) == 0,
            "steps differ more than layers do: are the axes [layers, steps, experts]?",
        ),
    ]
    return [text for wanted, text in said if wanted]


def _check_axes(path: Path, counts: IntArray, options: TraceOptions) -> None:
    """Refuse an array whose numbers say that it holds other things, unless options tell the lengths of its axes."""
    refuse_totals(f"{path}: counts", counts)
    if counts.shape[2] == 1 or (is_map(counts) and not says_counts(path)):
        kind = "ids of tokens, or a map of experts" if counts.shape[2] == 1 else "a map of experts, by the numbers"
        other = NOT_IDS if counts.shape[2] == 1 else "counts: save them under that name, np.savez(PATH, counts=array)"
        hint = f"gemopt placement import reads maps; {other}"
        raise InputError(f"{path}: counts", kind, "assignments [steps, layers, experts]", hint)
    ids = as_ids(counts) if options.num_experts is None else None
    if ids is not None:
        shown = f"{ids.shape[2]} experts of each token, by the numbers, in an array {[*counts.shape]}"
        raise InputError(f"{path}: counts", shown, "[steps, layers, experts]", NOT_IDS)
    if (lowest := int(counts[:LOOKED_AT].min())) < 0:
        raise InputError(f"{path}: counts", lowest, "counts from 0", "give layers without experts zeros, or no row")
    told = options.layer_ids is not None or options.num_hidden_layers is not None
    found = other_order(counts)
    alike = found is not None and _as_long(found, counts.shape)
    if (told and options.num_experts is not None and not alike) or (
        found is None and (told or counts.shape[1] <= MOST_LAYERS)
    ):
        return
    way_out = "if it is, an .npz of counts and layer_ids needs no import" if alike else NUMBERS_TELL
    shown = found or counted(counts.shape[1], "layer")
    raise InputError(f"{path}: counts", shown, "[steps, layers, experts]", f"{IN_ORDER}, or {way_out}")


def _as_long(order: str, shape: tuple[int, ...]) -> bool:
    """Whether layers and experts are as many in an order of `other_order` as in the right one: numbers tell nothing."""
    names = order.partition("[")[2].rstrip("]").split(", ")
    lengths = dict(zip(names, shape, strict=False))
    return (lengths.get("layers"), lengths.get("experts")) == shape[1:]


ENGINES = {
    "array": Engine(
        name="array",
        versions="any",
        traces=("[steps, layers, experts] .npy, .npz, .pt, .safetensors, .json", "layer_id,expert_id,count .csv"),
        note="counts only; placements: --to csv",
        dumps=SUFFIXES,
        rank_files=True,
        read_traces=read_traces,
    )
}
