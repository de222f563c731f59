"""Counts that are already an array [steps, layers, experts]: .npy, .npz, .pt, .safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.counts import csv_files, json_files
from gemopt.formats.counts.arrays import counts_of, says_counts
from gemopt.formats.engine import Engine, IntArray, Recording, TraceOptions
from gemopt.formats.findings import refuse_parts
from gemopt.formats.names import numbered
from gemopt.formats.pipelines import refuse_parts_of_steps, refuse_stages_in_time
from gemopt.formats.recorded_files import files_of, left_alone
from gemopt.formats.succession import MANY_COUNTS
from gemopt.traces.arrays import LOOKED_AT, NOT_IDS, as_ids, is_map, refuse_narrow, refuse_totals
from gemopt.traces.axes import IN_ORDER, MOST_LAYERS, axis_of_layers, other_order
from gemopt.words import counted

ARRAYS_ALONE = (".npy", ".npz", ".pt", ".safetensors")
SUFFIXES = (*ARRAYS_ALONE, *json_files.SUFFIXES)
SIDE_BY_SIDE = "put layers and stages side by side in one array; if these are later steps: --no-pipeline"
NUMBERS_TELL = "give --num-experts and --num-hidden-layers"
_ROWS = 64 << 20  # bytes handed on at once


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read arrays one after the other; a file with several needs one called `counts`."""
    if all(path.suffix in csv_files.SUFFIXES and not json_files.is_json(path) for path in paths) or _tables(paths):
        return csv_files.read_traces(paths, options)
    options.refuse_unused("arrays of counts")
    given = files_of(paths, *ARRAYS_ALONE, else_of=json_files.SUFFIXES)
    beside = left_alone(paths, given, json_files.SUFFIXES)
    if together := _together(given, options, beside):
        return together
    files, notes = _distinct(given, options)
    notes += beside
    refuse_parts(files)
    _check_told(files, notes)
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
    ids, phases = named or _chosen(first, options), _phases(files)
    if phases is not None:  # of the steps with assignments
        phases = phases[np.concatenate([counts_of(path).array.any(axis=(1, 2)) for path in files])]
    return Recording(blocks=blocks, layer_ids=ids, top_k=json_files.top_k(files), phase=phases, notes=notes)


def _together(files: list[Path], options: TraceOptions, notes: list[str]) -> Recording | None:
    """Files of [layers, experts] that a step each has, or of [steps, experts] of layers, by their names; else None."""
    kind, numbers = numbered({path.stem: None for path in files}) or ("", [])
    if kind not in ("step", "layer") or not 1 < len(files) == len({*numbers}):
        return None
    axis = int(kind == "layer")
    if not all(counts_of(path, of=kind).array.shape[axis] == 1 for path in files):
        return None
    numbers, files = map(list, zip(*sorted(zip(numbers, files, strict=True)), strict=True))
    notes = [f"{len(files)} files, a {kind} each, in the order of their numbers", *notes]
    arrays, layers = map(list, zip(*(counts_of(path, notes, of=kind) for path in files), strict=True))
    if len(shapes := sorted({each.squeeze(axis).shape for each in arrays})) > 1:
        raise InputError("PATHS", f"arrays of shapes {shapes[0]} and {shapes[-1]}", "one shape for all of them")
    for path, number, named in zip(files, numbers, layers, strict=True):
        _refuse_other_layers(path, named, (number,) if kind == "layer" and named else layers[0], files[0])
    counts = np.concatenate(arrays, axis=axis)
    _check_axes(files[0], counts, options)
    refuse_narrow(f"{files[0]}: counts", counts)
    ids = tuple(numbers) if kind == "layer" else layers[0] or _chosen(counts, options)
    notes += _doubts(counts, ids, options)
    used = counts.any(axis=(1, 2))
    told = {tuple(json_files.read(path).phases) if json_files.is_json(path) else () for path in files}
    if kind == "step":
        _check_told(files, notes)
    elif len(told) > 1:
        raise InputError("PATHS: phase", "others in some layers", "one phase of a step in all layers")
    phases = _phases(files if kind == "step" else files[:1])
    return Recording(
        blocks=lambda: iter([counts[used]] if used.any() else []),
        layer_ids=ids,
        top_k=json_files.top_k(files),
        phase=None if phases is None else phases[used],
        notes=notes,
    )


def _check_told(files: Sequence[Path], notes: list[str]) -> None:
    """Refuse files whose steps do not rise from one to the next, as they number them; note phases that some lack."""
    found = [json_files.read(path) for path in files if json_files.is_json(path)]
    told = [each.steps for each in found if each.steps is not None]
    if len({*(bool(each.phases) for each in found), *([False] if len(found) < len(files) else ())}) > 1:
        notes.append("phases that some files lack are left unread")
    if any(later[0] <= before[1] for before, later in pairwise(told)):
        shown = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in told)[:100]
        raise InputError("PATHS: step", shown, "files of rising steps", "ranks of the same steps are to be added up")


def _refuse_other_layers(path: Path, named: tuple[int, ...] | None, known: tuple[int, ...] | None, first: Path) -> None:
    """Raise where a file names other layers than the first one, or than its own name."""
    if named != known:
        raise InputError(f"{path}: layers", named, f"{known}, as in {first.name}", "import networks apart")


def _phases(files: Sequence[Path]) -> IntArray | None:
    """[T] the phases of the steps of files, None where not all files tell them."""
    if not all(json_files.is_json(path) and json_files.read(path).phases for path in files):
        return None
    return np.concatenate([json_files.read(path).phases for path in files])


def _tables(paths: Sequence[Path]) -> bool:
    """Whether files, or those of folders, are tables in JSON: what each holds tells."""
    inside = [list(path.iterdir()) if path.is_dir() else [path] for path in paths]
    files = [path for part in inside for path in part if not path.name.startswith(".")]
    found = sorted(path for path in files if json_files.is_json(path))  # the first one is read first again
    others = any(path.suffix in ARRAYS_ALONE for path in files)
    return bool(found) and not others and not json_files.read(found[0]).arrays


def _distinct(files: list[Path], options: TraceOptions) -> tuple[list[Path], list[str]]:
    """The files without those whose counts came before, and a note on each of these."""
    kept: dict[bytes, Path] = {}
    sums: list[tuple[str, IntArray]] = []
    notes: list[str] = []
    layers = counts_of(files[0]).layers
    for path in files:
        counts, named = counts_of(path, notes)
        _refuse_other_layers(path, named, layers, files[0])
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
