"""Counts that are already an array [steps, layers, experts]: .npy, .npz, .pt, .safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats import count_csv, count_json
from gemopt.formats.count_names import COUNTED, DERIVED, MEASURED, NO_COUNTS, SCORES, words_of
from gemopt.formats.count_told import refuse_slots, says_nothing
from gemopt.formats.engine import Engine, IntArray, Recording, TraceOptions
from gemopt.formats.files import as_numpy, load_torch, numpy_arrays, safetensors_arrays, whole_numbers
from gemopt.formats.findings import refuse_parts
from gemopt.formats.numbered_arrays import NAME_THEM, inner, joined, kind_of
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
from gemopt.traces.document import STEP_ARRAYS
from gemopt.traces.files import ALTERING, COPIES, NOT_ALTERED, NOT_COPIES, PLAIN, meant
from gemopt.traces.telling import refuse_telling
from gemopt.traces.tokens import ARRAYS
from gemopt.words import counted

ARRAYS_ALONE = (".npy", ".npz", ".pt", ".safetensors")
SUFFIXES = (*ARRAYS_ALONE, *count_json.SUFFIXES)
TRACES = ("layer_ids", *PLAIN, *STEP_ARRAYS, *ARRAYS)  # names that traces give a meaning
SIDE_BY_SIDE = "put layers and stages side by side in one array; if these are later steps: --no-pipeline"
NUMBERS_TELL = "give --num-experts and --num-hidden-layers"
_ROWS = 64 << 20  # bytes handed on at once


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read arrays one after the other; a file with several needs one called `counts`."""
    if all(path.suffix in count_csv.SUFFIXES and not count_json.is_json(path) for path in paths) or _tables(paths):
        return count_csv.read_traces(paths, options)
    options.refuse_unused("arrays of counts")
    given = files_of(paths, *ARRAYS_ALONE, else_of=count_json.SUFFIXES)
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

    if options.layer_ids is None and options.num_hidden_layers is None:
        first, named = _counts(files[0])
        if named is None and np.asarray(first.any(axis=(0, 2))).all():
            notes.append(f"rows are layers 0 to {first.shape[1] - 1}: if dense layers were left out, give --layer-ids")
        if axis_of_layers(first) == 0:
            notes.append("steps differ more than layers do: are the axes [layers, steps, experts]?")

    def blocks() -> Iterator[IntArray]:
        for path in files:
            counts, _ = _counts(path)
            step = max(1, _ROWS // max(1, counts[:1].nbytes))
            for start in range(0, len(counts), step):
                block = counts[start : start + step]
                used = np.asarray(block).reshape(len(block), -1).any(axis=1)
                if used.any():
                    yield block if used.all() else block[used]

    ids = _counts(files[0]).layers or (options.layer_ids if _already_chosen(files, options) else None)
    return Recording(blocks=blocks, layer_ids=ids, top_k=count_json.top_k(files), phase=_phases(files), notes=notes)


def _phases(files: list[Path]) -> IntArray | None:
    """[T] the phases of the steps with assignments, None where not all files tell them."""
    if not all(count_json.is_json(path) and count_json.read(path).phases for path in files):
        return None
    told = [np.array(count_json.read(path).phases) for path in files]
    used = [np.asarray(_counts(path).array).any(axis=(1, 2)) for path in files]
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
    layers = _counts(files[0]).layers
    for path in files:
        counts, named = _counts(path, notes)
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


def _already_chosen(files: list[Path], options: TraceOptions) -> bool:
    """Whether `--layer-ids` names the rows there are, rather than picks some of them."""
    ids = options.layer_ids
    return ids is not None and len(ids) == _counts(files[0]).array.shape[1]


class _Counts(NamedTuple):
    """[T, L, E] counts, and the layers of their rows where the file says so."""

    array: IntArray
    layers: tuple[int, ...] | None


def _counts(path: Path, notes: list[str] | None = None) -> _Counts:
    """The counts of a file; what else it holds is refused, or goes to the notes."""
    data, told = _loaded(path)
    layers, others = None, dict[str, Any]()
    names, experts = [path.stem] if words_of(path.stem) & COUNTED else [], told.get("num_experts")
    if isinstance(data, dict):
        data, beside = inner(path, {str(key): value for key, value in data.items()})
        kind = kind_of(data)
        dims = {name: _ndim(each) for name, each in data.items() if words_of(name) & COUNTED}  # not num_tokens [steps]
        told_so = [name for name in dims if dims[name] == 3] or [name for name in dims if dims[name] == 2]
        named = ["counts"] if "counts" in data else told_so
        if len(named) != 1 and len(data) != 1 and kind is None:
            limit, hint = "one array, or one called counts", f"arrays of layers or steps: {NAME_THEM}"
            raise InputError(str(path), ", ".join(data)[:200] or "no array", limit, hint)
        key = named[0] if len(named) == 1 else next(iter(data))
        known = (*(data if kind else [key]), "format", "num_experts")
        nothing = {name for name, each in data.items() if name not in known and _says_nothing(name, each)}
        names_beside = [name for name in [*data, *told, *beside] if name not in known]
        _refuse_beside(path, names_beside, nothing, notes)
        for name, each in {**data, **told}.items():
            refuse_slots(str(path), name, _text(each))
        if key != "counts" and not (words := words_of(key)) & COUNTED and words & NO_COUNTS:
            hint = "" if words & MEASURED else "count the experts that were chosen" if words & SCORES else NOT_IDS
            raise InputError(str(path), f"an array {key}", "counts [steps, layers, experts]", hint)
        if derived := words_of(key) & DERIVED:
            raise InputError(
                str(path), f"an array {key}", "counts themselves", f"is {min(derived)} no word for it? rename it"
            )
        names.append(key)
        others = {name: each for name, each in data.items() if name not in known}
        experts = data.get("num_experts", experts)
        data, layers = (data[key], None) if kind is None else joined(path, data, *kind)
    if copies := [name for name in names if COPIES.search(name)]:
        raise InputError(str(path), f"an array {copies[0]}", "counts of logical experts", NOT_COPIES)
    if (ndim := _ndim(data)) < 3:
        hint = "[layers, experts] of sums over the steps are one step, counts[None]; [steps, experts] are one layer, "
        hint += "counts[:, None]"
        raise InputError(f"{path}: counts", f"{ndim} dimensions", "counts [steps, layers, experts]", hint)
    if ndim > 3:
        limit, hint = "3-dimensional counts [steps, layers, experts]", f"if they are {NOT_IDS}"
        raise InputError(f"{path}: counts", f"{ndim} dimensions", limit, hint)
    counts = whole_numbers(data, name=f"{path}: counts", ndims=(3,))
    if not counts.size:
        raise InputError(f"{path}: counts", f"shape {counts.shape}", "at least one step, layer and expert")
    if str(np.asarray(experts).tolist()).strip("[]") not in ("None", str(counts.shape[2])):
        raise InputError(f"{path}: counts", f"{counts.shape[2]} experts", f"{experts}, as num_experts says")
    others |= count_json.read(path).beside if count_json.is_json(path) else {}
    refuse_telling(path, {name: as_numpy(each) for name, each in others.items()}, counts, layers=layers is not None)
    return _Counts(counts, layers)


def _loaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """An array, or those of the file by name; and its metadata."""
    if count_json.is_json(path):
        return count_json.arrays(path), {}
    if path.suffix == ".safetensors":
        return safetensors_arrays(path)
    return load_torch(path) if path.suffix == ".pt" else numpy_arrays(path), {}


def _ndim(data: Any) -> int:
    """Dimensions of an array, or of lists and lists of arrays that are alike."""
    if isinstance(data, list | tuple) and data:
        return 1 + _ndim(data[0])
    return int(getattr(data, "ndim", 0 if isinstance(data, int | float) else 3))


def _says_counts(path: Path) -> bool:
    """Whether the file itself calls its array so."""
    if count_json.is_json(path):
        return count_json.read(path).named
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
    others = others + (count_json.read(path).unread if count_json.is_json(path) else [])
    if others and notes is not None:
        notes.append(f"{path.name}: {', '.join(others)} left unread")


def _check_axes(path: Path, counts: IntArray, options: TraceOptions) -> None:
    """Refuse an array whose numbers say that it holds other things, unless options tell the lengths of its axes."""
    refuse_totals(f"{path}: counts", counts)
    if counts.shape[2] == 1 or (is_map(counts) and not _says_counts(path)):
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
