"""Experts of tokens as an array [tokens, layers, K], as clients save `routed_experts`: .npy, .npz, .pt, .safetensors.

A file is a sequence; with four dimensions, [sequences, tokens, layers, K], as trainers that replay routing keep them,
it is several. Or it has an array [tokens, K] of each layer, `layer_3`. They are replayed as responses are.

An array [tokens, K] is what one layer chose in one step, by the name of its file, `topk_idx_layer3_idx0.pt`, as they
are saved for SGLang's `tuning_fused_moe_triton_sep.py`: those are counted. So are files [tokens, layers, K] that a step
each has, by their names, `step_7.npy`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, Loaded, Recording, TraceOptions
from gemopt.formats.files import as_numpy, load_torch, numpy_arrays, safetensors_arrays, whole_numbers
from gemopt.formats.names import HEEDED, numbered, words_of
from gemopt.formats.responses import bodies as response_bodies
from gemopt.formats.responses import replayed as responses
from gemopt.formats.responses.bodies import PROMPTS, Response, Sample
from gemopt.formats.responses.routed_ids import blank_tokens
from gemopt.formats.tokens import padding as token_padding
from gemopt.formats.tokens import passes as token_passes
from gemopt.formats.tokens import sequences as token_sequences
from gemopt.formats.tokens.array_beside import check_told, refuse_apart, refuse_no_weight, refuse_others
from gemopt.formats.tokens.beside import COMPUTED, WEIGHTED
from gemopt.formats.tokens.cells import NAMES
from gemopt.formats.tokens.columns import layers_of
from gemopt.traces import Phase
from gemopt.traces.axes import MOST_LAYERS

COUNTED = {"mask", "valid", "accepted"}  # words of arrays that tell tokens from padding, where they are true
SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
PROMPT_SIZES = (*response_bodies.PROMPT_SIZES, "prompt_len", "prompt_length")
ANSWERS = (
    "token_ids",
    *(f"{word}{ids}" for word in ("output", "completion", "response") for ids in ("_token_ids", "_ids")),
)
ANSWER_SIZES = (
    "completion_tokens",
    "num_output_tokens",
    "output_len",
    "output_length",
    "completion_len",
    "response_len",
)
NOT_COUNTED = {"pad", "padding", "padded", "dropped", "overflow", "rejected", "draft", "dummy"}  # where true
_ONE = re.compile(  # layer and step
    r".*layers?[_.-]?(\d{1,4})[_.-]?(?:idx|index|step|iter|iteration|fwd|forward|pass|call)?[_.-]?(\d{1,12})",
    re.IGNORECASE | re.ASCII,
)
MANY_LENGTHS = 2  # of sequences: no layers, of which all have as many
LIMIT = "experts of tokens [tokens, layers, top-k], or [sequences, tokens, layers, top-k]"


def read_traces(files: Sequence[Path], options: TraceOptions) -> Loaded | Recording:
    """Replay the sequences of some files as continuous batching; count what files of layers and steps hold."""
    notes: list[str] = []
    named = {path: (int(found[1]), int(found[2])) for path in files if (found := _ONE.fullmatch(path.stem))}
    first = _loaded(files[0])[0] if files[0].suffix in SUFFIXES else None
    layers = layers_of(files) if first is not None else {}
    if layers and isinstance(first, list | tuple):  # a list of passes each
        first = {f"layer_{layer}": _loaded(path)[0] for path, layer in layers.items()}
        files = [files[0].parent]
    elif layers and _is_flat(first):
        return responses.replayed(_responses(files, layers, options, notes), options, lambda: notes, all_layers=False)
    if getattr(first, "ndim", 0) == 2:
        if other := next((path for path in files if path not in named), None):
            hint = "of ranks with tokens of their own make one file; of those that saw the same, keep one"
            raise InputError(str(other), "[tokens, top-k]", "a name that says layer and step, topk_layer3_step0", hint)
        notes.append(f"{files[0].name} is layer {named[files[0]][0]} of step {named[files[0]][1]}, and so on")
        return token_passes.counted([(str(path), *at, _loaded(path)[0]) for path, at in named.items()], options, notes)
    if first is not None and (passes := _of_steps(files, options, notes)):
        notes.append(f"{len(files)} files, a step each, in the order of their numbers")
        return token_passes.counted(passes, options, notes, "part")
    if len(files) == 1 and (passes := token_passes.of_lists(files[0], first)):
        notes.append(f"{files[0].name}: a list is one of forward passes: each is a step")
        return token_passes.counted(passes, options, notes, "part")
    return responses.replayed(_responses(files, {}, options, notes), options, lambda: notes, all_layers=False)


def _of_steps(files: Sequence[Path], options: TraceOptions, notes: list[str]) -> list[token_passes.Part]:
    """The layers of files [tokens, layers, K] that a step each has, by their names; none of others."""
    kind, steps = numbered({path.stem: None for path in files}) or ("", [])
    parts: list[token_passes.Part] = []
    for path, step in zip(files, steps if kind == "step" and 1 < len(files) == len({*steps}) else (), strict=False):
        (where, ids, named), *others = _parts(path, options, notes)
        if others or ids.ndim > len("NLK"):
            return []
        _check(where, ids, options, named=named is not None)
        rows = named or _named(ids, options) or range(ids.shape[1])
        parts += [(f"{where}: layer {layer}", layer, step, ids[:, i]) for i, layer in enumerate(rows)]
    return parts


def _is_flat(data: Any) -> bool:
    """Whether a file holds an array [tokens, K], alone or under a name for experts."""
    if isinstance(data, dict):
        named = [name for name in data if str(name).casefold() in NAMES["ids"] or len(data) == 1]
        data = data[named[0]] if len(named) == 1 else None
    return bool(getattr(data, "ndim", 0) == len("NK"))


def _responses(
    files: Sequence[Path], layers: Mapping[Path, int], options: TraceOptions, notes: list[str]
) -> Iterator[Response]:
    """The sequences of files; layers: of files that hold the tokens of one each."""
    told = {} if layers or options.phase is Phase.MIXED else {path: _prompt_and_answer(path) for path in files}
    if options.phase is not Phase.MIXED and (layers or any(prompt is None for prompt, _ in told.values())):
        limit, hint = "prefill or decode, to tell prompts from answers", "--phase all takes every token"
        hint += "; responses that tell their prompts: --from vllm" if files[0].suffix not in SUFFIXES else ""
        raise InputError(str(files[0]), "no phase", limit, hint)
    for path in files[:1] if layers else files:
        found = token_sequences.of(path)
        parts = found.parts or (_joined(layers, options, notes) if layers else _parts(path, options, notes))
        notes += [f"{path.name}: {', '.join(found.unread)} left unread"] if found.unread else []
        lengths, others = ({ids.shape[at] for _, ids, _ in parts} for at in (slice(-2), slice(-2, None)))
        sequences: list[tuple[str, IntArray]] = []
        for where, ids, named in parts:
            _check(where, ids, options, named=named is not None or (len(lengths) > MANY_LENGTHS and len(others) == 1))
            for name, each in found.told.items():
                check_told(path, name, each, ids, options)
            rows = named or _named(ids, options)
            placed = ids if rows is None else _placed(ids, rows, options)
            alone = placed if placed.ndim > len("NLK") else placed[None]
            sequences += [(f"{where}: sequence {i}" if len(alone) > 1 else where, each) for i, each in enumerate(alone)]
        notes += token_padding.of_sequences(path.name, [each for _, each in sequences])
        notes += [f"{path.name}: {len(parts)} sequences, each replayed as a request"] if len(parts) > 1 else []
        if told and len(sequences) > 1:
            raise InputError(str(path), f"{len(sequences)} sequences and one prompt", "one of each", "--phase all")
        (prompt, answer), ids = told.get(path, (None, None)), sequences[0][1]
        if prompt and answer and len(ids) < prompt + answer - 1:
            limit = f"the {prompt} of the prompt + {answer} of the answer - 1"
            hint = "experts of the answer alone? --phase all; ids of the prompt as well? leave them out"
            raise InputError(str(path), f"experts of {len(ids)} tokens", limit, hint)
        if prompt and answer is None and blank_tokens(ids)[:1].any() and (ids.shape[2] > 1 or ids[0].min() < 0):
            hint = "leave them out, or give output_token_ids"
            raise InputError(str(path), "padding before the prompt", "its tokens from the first on", hint)
        samples = [Sample(where=where, encoded=[each], prompt=prompt, generated=answer) for where, each in sequences]
        yield from (Response(name=None, samples=[sample]) for sample in samples)


def _prompt_and_answer(path: Path) -> tuple[int | None, int | None]:
    """Their tokens in a file with one sequence, by ids or numbers beside it; None where none is certain."""
    data = _loaded(path)[0] if path.suffix in SUFFIXES else None
    arrays = data if isinstance(data, dict) else {}
    return _tokens(arrays, PROMPTS, PROMPT_SIZES), _tokens(arrays, ANSWERS, ANSWER_SIZES)


def _tokens(arrays: Mapping[Any, Any], ids: Sequence[str], sizes: Sequence[str]) -> int | None:
    found = set()
    for name, array in ((name, as_numpy(arrays[name])) for name in arrays if name in (*ids, *sizes)):
        if name in ids:
            found.add(array.size if array.ndim and array.size == array.shape[-1] else None)
        else:
            found.add(int(array.item()) if array.size == 1 and array.dtype.kind in "iu" and array >= 0 else None)
    return found.pop() if len(found) == 1 else None


def _named(ids: IntArray, options: TraceOptions) -> list[int] | None:
    """`--layer-ids` where it names the layers there are."""
    layers = list(options.layer_ids or ())
    return layers if len(layers) == ids.shape[-2] else None


def _joined(layers: Mapping[Path, int], options: TraceOptions, notes: list[str]) -> list[token_sequences.Part]:
    """The one sequence of files [tokens, K] of a layer each."""
    notes.append(f"{len(layers)} files, a layer of the same tokens each")
    arrays = {str(path): _ids(path, options, notes, ndims=(len("NK"),))[0] for path in layers}
    folder, numbers = next(iter(layers)).parent, list(layers.values())
    return [(str(folder), _of_layers(folder, arrays, numbers), numbers)]


def _parts(path: Path, options: TraceOptions, notes: list[str]) -> list[token_sequences.Part]:
    """The sequences of a file of arrays: of a list of them, or the one array, perhaps of several."""
    data, _ = _loaded(path)
    return token_sequences.in_lists(path, data) or [(str(path), *_ids(path, options, notes))]


def _loaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds, and its metadata."""
    if path.suffix == ".safetensors":
        return safetensors_arrays(path)
    if path.suffix == ".pt":
        return load_torch(path), {}
    arrays = numpy_arrays(path)
    return (arrays["counts"] if path.suffix == ".npy" else arrays), {}


def _ids(
    path: Path, options: TraceOptions, notes: list[str], ndims: tuple[int, ...] = (3, 4)
) -> tuple[IntArray, list[int] | None]:
    """The array of a file, and the layers of its rows where it has an array of each, which are put together."""
    data, told = _loaded(path)
    if not isinstance(data, dict):
        return _whole(path, data, ndims), None
    arrays = _without_weights(path, {str(name): each for name, each in data.items()}, notes)
    kind = numbered(arrays)
    if kind is not None and kind[0] == "layer":
        refuse_others(path, told)
        return _of_layers(path, arrays, kind[1]), kind[1]
    named = [name for name in arrays if name.casefold() in NAMES["ids"]] if len(arrays) > 1 else list(arrays)
    if len(named) != 1:
        limit = f"one array called {', '.join(NAMES['ids'][:3])} or the like, or layer_0, ..."
        raise InputError(str(path), ", ".join(arrays)[:200] or "no array", limit)
    read = {name for name in PROMPT_SIZES if name in arrays and as_numpy(arrays[name]).size == 1}.union(
        PROMPTS, ANSWERS
    )
    others = [name for name in (*arrays, *told) if name not in (*named, *read, "format")]
    ids = _whole(path, arrays[named[0]], ndims)
    if (mask := next((name for name in others if name.casefold() == "attention_mask"), None)) in arrays:
        ids = _masked(f"{path}: {mask}", as_numpy(arrays[mask]), ids)
        others.remove(mask)
    flags = {name for name in others if words_of(name) & (COUNTED | NOT_COUNTED) and not words_of(name) & COMPUTED}
    for name, array in ((name, as_numpy(arrays[name])) for name in sorted(flags & arrays.keys())):
        out = bool(words_of(name) & NOT_COUNTED and "mask" not in words_of(name))  # what leaves a token out
        if array.size > 1 and array.dtype.kind in "biuf" and (array.astype(bool) == out).any():
            limit = "experts of tokens, each once"
            hint = "leave them out; were they computed? leave the array out"
            raise InputError(f"{path}: {name}", "tokens that it leaves out", limit, hint)
    refuse_others(path, [name for name in others if not words_of(name) & (COUNTED | NOT_COUNTED)])
    beside = {name: as_numpy(arrays[name]) for name in others if name in arrays}
    refuse_apart(path, beside, options, ids.shape[-3] if ids.ndim > len("NK") else len(ids))
    for name, array in beside.items():
        refuse_no_weight(path, name, array, ids)
    for name in (name for name in others if name in HEEDED):
        check_told(path, name, arrays.get(name, told.get(name)), ids, options)
    notes += [f"{path.name}: {', '.join(others)} left unread"] if others else []
    return ids, None


def _masked(where: str, mask: Any, ids: IntArray) -> IntArray:
    """Experts of tokens without those that an attention mask says are padding: -1 in their places."""
    if mask.shape != ids.shape[:-2] or mask.dtype.kind not in "biuf":
        raise InputError(where, f"shape {[*mask.shape]}", f"a number for each token, {[*ids.shape[:-2]]}")
    return np.where(mask.astype(bool)[..., None, None], ids.astype(np.int64), -1)


def _without_weights(path: Path, arrays: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The experts of layers beside or among whose arrays are weights; anything else as it is."""
    inner = [set(map(str, each)) for each in arrays.values() if isinstance(each, dict)]
    if inner and len(inner) == len(arrays) and all(names == inner[0] for names in inner):
        named = [name for name in inner[0] if name.casefold() in NAMES["ids"]]
        kept = {layer: each[named[0]] for layer, each in arrays.items()} if len(named) == 1 else {}
        others = {f"{layer}: {name}": each[name] for layer, each in arrays.items() for name in inner[0] - {*named}}
        names, of = inner[0] - {*named}, {other: other.partition(": ")[0] for other in others}
    else:
        others = {name: each for name, each in arrays.items() if words_of(name) & WEIGHTED}
        kept = {name: each for name, each in arrays.items() if name not in others}
        names, told, own = set(others), numbered(others) if others else None, numbered(kept) if kept else None
        layers = dict(zip(own[1], kept, strict=True)) if own else {}
        of = {other: layers.get(layer, "") for other, layer in zip(others, told[1], strict=True)} if told else {}
    kind = numbered(kept) if kept and others else None
    if kind is None or kind[0] != "layer":
        return arrays
    refuse_others(path, names)
    for other, layer in of.items():
        if layer in kept:
            refuse_no_weight(path, other, as_numpy(others[other]), as_numpy(kept[layer]))
    notes.append(f"{path.name}: {', '.join(sorted(names))[:100]} left unread")
    return kept


def _whole(path: Path, array: Any, ndims: tuple[int, ...]) -> IntArray:
    if not hasattr(array, "ndim"):
        raise InputError(str(path), type(array).__name__, LIMIT, "stack lists of arrays: numpy.stack")
    return whole_numbers(array, name=f"{path}: experts of tokens", ndims=ndims)


def _of_layers(path: Path, arrays: dict[str, Any], layers: list[int]) -> IntArray:
    """[tokens, layers, K] of arrays of each layer."""
    found = [whole_numbers(each, name=f"{path}: {name}", ndims=(2,)) for name, each in arrays.items()]
    if len(shapes := sorted({each.shape for each in found})) > 1 or len(set(layers)) < len(layers):
        raise InputError(str(path), f"arrays of shapes {shapes[0]} and {shapes[-1]}", "the same tokens in each layer")
    if max(layers) >= MOST_LAYERS:
        raise InputError(str(path), max(layers), f"layers below {MOST_LAYERS}")
    return np.stack(found, axis=1)


def _placed(ids: IntArray, layers: list[int], options: TraceOptions) -> IntArray:
    """The rows as those of all decoder layers, -1 in the others."""
    count = max(*layers, (options.num_hidden_layers or 0) - 1) + 1
    if layers == list(range(count)):
        return ids
    dtype = np.int64 if ids.dtype.itemsize == 8 else np.result_type(ids.dtype, np.int8)  # holds -1 too
    placed = np.full((*ids.shape[:-2], count, ids.shape[-1]), -1, dtype)
    placed[..., layers, :] = ids
    return placed


def _check(path: str, ids: IntArray, options: TraceOptions, *, named: bool) -> None:
    """Raise where numbers are those of all experts, or neither options nor names say which axis is the layers'."""
    layers, top_k = ids.shape[-2:]
    where, shape = f"{path}: experts of tokens", f"shape {[*ids.shape]}"
    if not ids.size or top_k > (options.num_experts or int(ids.max()) + 1) - 1:
        raise InputError(where, shape, f"fewer than all experts of each token: {LIMIT}")
    hidden = options.num_hidden_layers
    if not named and options.layer_ids is None and hidden != layers and hidden in ids.shape:
        raise InputError(where, shape, f"{LIMIT}: --num-hidden-layers is {hidden}", "swap the axes: numpy.swapaxes")
    told = named or hidden is not None or options.layer_ids is not None
    if layers > MOST_LAYERS or not told:
        hint = f"give --num-hidden-layers {layers}; if not, swap the axes" if layers <= MOST_LAYERS else "swap the axes"
        raise InputError(where, shape, f"{LIMIT}: are there {layers} layers?", f"{hint}: numpy.swapaxes")
