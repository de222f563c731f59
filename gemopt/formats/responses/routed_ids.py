"""From the encoded `routed_experts` of a sample to the ids of its tokens, and which of those are routing.

Layers without experts and tokens that were padded have rows too, usually of zeros. Where a token has two or more
experts, such a row names an expert twice, which no router does. With one expert per token a zero can be either: then
the user must say which layers have experts, and more zero tokens than chance explains are refused.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, TraceOptions
from gemopt.formats.files import as_array
from gemopt.formats.findings import as_option, ranges
from gemopt.formats.responses.bodies import Sample
from gemopt.traces.arrays import LOOKED_AT, MAX_EXPERTS, MOST_CHOSEN, are_ids

_DTYPES = {
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "int64": "<i8",
}
MANY_TOKENS = 16  # that do not choose the same experts


def decode(sample: Sample, options: TraceOptions, *, raw_int32: bool) -> IntArray:
    """[tokens, layers, K] ids of a sample, its prompt first.

    A stream that sent them more than once must have gone on with them.
    """
    name = f"{sample.where}: routed_experts"
    arrays = [_decode(name, encoded, sample, options, raw_int32=raw_int32) for encoded in sample.encoded]
    last = arrays[-1]
    for earlier in arrays[:-1]:
        if earlier.shape[1:] != last.shape[1:] or not np.array_equal(earlier, last[: len(earlier)]):
            raise InputError(name, f"{len(arrays)} chunks that differ", "each chunk to begin with the one before")
    if (options.num_experts or 0) > np.iinfo(last.dtype).max + 1:
        raise InputError(
            name, f"ids in {last.dtype}", f"a type that holds {options.num_experts} experts", "they wrapped"
        )
    if sample.before is None:
        return last
    prompt = _decode(f"{sample.where}: prompt_routed_experts", sample.before, sample, options, raw_int32=raw_int32)
    if prompt.shape[1:] != last.shape[1:]:
        raise InputError(name, f"shape {last.shape}", f"that of prompt_routed_experts, {prompt.shape}")
    return np.concatenate([prompt, last])


def has_shape(encoded: Any) -> bool:
    """Whether the shape of the ids comes with them."""
    return not isinstance(encoded, str) or encoded.startswith("k05VTVBZ")  # base64 of an .npy header


def _decode(name: str, encoded: Any, sample: Sample, options: TraceOptions, *, raw_int32: bool) -> IntArray:
    if isinstance(encoded, (list, np.ndarray)):
        return as_array(encoded, name=name, ndim=3)
    if isinstance(encoded, dict):
        return _described(name, encoded, sample)
    if not isinstance(encoded, str):
        raise InputError(name, encoded, "base64 text or nested lists", "ask the engine to return routed experts")
    data = _bytes(name, encoded, base64.b64decode)
    if data[:6] == b"\x93NUMPY":
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # numpy's header parser lets errors of the tokenizer through
            raise InputError(name, str(error), "a complete .npy array") from None
        return as_array(array, name=name, ndim=3)
    if not raw_int32 and sample.dtype is None:
        raise InputError(name, f"{len(data)} bytes that are no .npy array", "base64 of an .npy array")
    layers, top_k, kind = options.num_hidden_layers, options.top_k, _dtype(name, sample.dtype or "int32")
    if layers is None or top_k is None:
        raise InputError(name, "bytes without a shape", "layers and top-k", "give --num-hidden-layers and --top-k")
    size = kind.itemsize
    if not data or len(data) % (size * layers * top_k):
        limit = f"a multiple of {size} x {layers} layers x {top_k} experts per token"
        raise InputError(name, f"{len(data)} bytes", limit, "give the right --num-hidden-layers and --top-k")
    return np.frombuffer(data, kind).reshape(-1, layers, top_k)


def _dtype(name: str, text: Any) -> np.dtype[Any]:
    bare = str(text).removeprefix("torch.")
    if bare not in _DTYPES:
        raise InputError(f"{name}_dtype", text, "one of " + ", ".join(_DTYPES))
    return np.dtype(_DTYPES[bare])


def _bytes(name: str, text: Any, reader: Callable[..., bytes]) -> bytes:
    try:
        return reader(text, validate=True) if reader is base64.b64decode else reader(text)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(name, str(error), "base64 text") from None


def _described(name: str, given: dict[str, Any], sample: Sample) -> IntArray:
    """Bytes with their shape beside them (Dynamo: data, shape, dtype, start); `start` goes to the sample."""
    shape, start = given.get("shape"), given.get("start")
    if not (
        isinstance(given.get("data"), str)
        and isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    ):
        raise InputError(f"{name}.shape", shape, "data, and its shape [tokens, layers, experts per token]")
    if start is not None and (type(start) is not int or start < 0):
        raise InputError(f"{name}.start", start, "a token >= 0")
    sample.start = start if start is not None else sample.start
    dtype = given.get("dtype", sample.dtype)
    if dtype is None:
        raise InputError(f"{name}.dtype", None, "the type of its numbers, one of " + ", ".join(_DTYPES))
    kind, text = _dtype(name, dtype), given["data"]
    size = math.prod(shape) * kind.itemsize
    # The two texts of one array never have the same length: 4 characters for 3 bytes, or 5 for 4.
    plain = len(text) == 4 * ((size + 2) // 3)
    data = _bytes(name, text, base64.b64decode if plain else base64.b85decode)
    if len(data) != size:
        raise InputError(f"{name}.data", f"{len(data)} bytes", f"{size} bytes, as shape and dtype say")
    return np.frombuffer(data, kind).reshape(shape)


def narrowed(where: str, ids: IntArray) -> NDArray[np.int16]:
    """The ids in a small signed type; `InputError` for ids that no network has."""
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < -1 or high >= MAX_EXPERTS:
        found, limit = low if low < -1 else high, f"experts below {MAX_EXPERTS}, or -1"
        raise InputError(f"{where}: routed_experts", found, limit, "of a dense layer? give --layer-ids")
    return ids.astype(np.int16)


def blank_tokens(ids: IntArray) -> NDArray[np.bool_]:
    """[N] tokens whose rows say nothing in any layer: all zeros or all -1."""
    return np.asarray(((ids == 0).all(axis=2) | (ids < 0).all(axis=2)).all(axis=1))


def moe_layers(pieces: Sequence[IntArray], options: TraceOptions) -> list[int]:
    """Layers with experts of pieces [tokens, layers, K] without blank tokens; `InputError` where that is a guess."""
    layers, top_k = pieces[0].shape[1:]
    tokens = sum(len(piece) for piece in pieces)
    zero = np.zeros(layers, np.int64)
    repeats = sum((_repeats(piece).sum(axis=0) for piece in pieces), start=zero)
    asked = list(options.layer_ids or ())
    partly = [layer for layer in asked or range(layers) if 0 < repeats[layer] < tokens]
    whole = [layer for layer in asked if repeats[layer] == tokens]
    if partly or whole:
        layer = (partly + whole)[0]
        found = f"layer {layer} names an expert twice, or none, in {int(repeats[layer])} of {tokens} tokens"
        hint = "leave the layer out of --layer-ids if it has no experts, else leave out the responses that lack it"
        if len(partly) == layers > 1:
            hint = (
                "so do all layers: did the ids wrap in a small type, or is it another --num-hidden-layers and --top-k?"
            )
        raise InputError("routed_experts", found, "distinct experts in every token", hint)
    kept = asked or [layer for layer in range(layers) if not repeats[layer]]
    if not kept:
        hint = "give the right --num-hidden-layers and --top-k, or --layer-ids"
        raise InputError("routed_experts", "every layer repeats experts", "at least one MoE layer", hint)
    if top_k == 1 and not asked:
        _refuse_zero_layers(pieces, kept)
    if top_k > 1 and not asked and tokens >= MANY_TOKENS:
        _refuse_unvaried(pieces, kept)
    return kept


def refuse_split(pieces: Sequence[IntArray]) -> None:
    """Raise where layers side by side of pieces [tokens, layers, K] never share an expert: one's choice, cut up."""
    ids = np.concatenate([piece[:LOOKED_AT] for piece in pieces[:LOOKED_AT]])
    tokens, layers, top_k = ids.shape
    each = [n for n in range(2, min(layers, MOST_CHOSEN // top_k) + 1) if layers % n == 0]
    cut = [n for n in each if are_ids(ids.reshape(tokens, layers // n, n * top_k))]
    if cut:
        found = f"{layers} layers, of which {cut[-1]} side by side never name the same expert for a token"
        hint = f"give --num-hidden-layers {layers // cut[-1]} --top-k {cut[-1] * top_k}"
        raise InputError("routed_experts", found, "layers that choose each for itself", hint)


def _refuse_zero_layers(pieces: Sequence[IntArray], found: list[int]) -> None:
    used = np.logical_or.reduce([piece.any(axis=(0, 2)) for piece in pieces])
    idle = [layer for layer in found if not used[layer]]
    if idle:
        others = as_option(set(found) - set(idle))
        raise InputError(
            "routed_experts",
            f"layers {ranges(idle)} name expert 0 in every token",
            "with one expert per token that is a layer without experts, or a router that always takes expert 0",
            f"give --layer-ids, for example {others}" if others else "give --layer-ids",
        )


def _refuse_unvaried(pieces: Sequence[IntArray], found: list[int]) -> None:
    first = np.sort(pieces[0][0, found], axis=1)
    same = np.all([(np.sort(piece[:, found], axis=2) == first).all(axis=(0, 2)) for piece in pieces], axis=0)
    layers = [layer for layer, unvaried in zip(found, same, strict=True) if unvaried]
    if layers and len(layers) < len(found):
        raise InputError(
            "routed_experts",
            f"layers {ranges(layers)} name the same experts in every token",
            "a choice for each token: layers without experts have such rows",
            f"give --layer-ids, for example {as_option(set(found) - set(layers))}",
        )


def _repeats(ids: IntArray) -> NDArray[np.bool_]:
    """[tokens, layers] whether a token names an expert twice, or none at all."""
    ordered = np.sort(ids, axis=2)
    twice = (np.diff(ordered, axis=2) == 0) & (ordered[:, :, 1:] >= 0)
    return np.asarray(twice.any(axis=2) | (ordered[:, :, -1] < 0))


def check_zero_tokens(ids: IntArray) -> list[str]:
    """With one expert per token: a note on the tokens [N, L, 1] with expert 0 in every layer.

    Raises
    ------
    InputError
        More of them than chance explains, given how often the other tokens choose expert 0: they look like padding.
    """
    layers = ids.shape[1]
    zero = (ids == 0).all(axis=(1, 2))
    count = int(zero.sum())
    if layers == 1 or not count or count == len(ids):
        return []
    from scipy.special import gammainc

    expected = len(ids) * float(np.prod((ids[~zero] == 0).mean(axis=0)))
    if expected == 0 or gammainc(count, expected) < 1e-3:  # Poisson: the probability of so many or more
        raise InputError(
            "routed_experts",
            f"{count} of {len(ids)} tokens name expert 0 in all of {layers} layers",
            f"about {expected:.2g} such tokens",
            "they look like padding: cut the rows off in the responses",
        )
    return [f"{count} of {len(ids)} tokens name expert 0 in every layer: taken as routing, not as padding"]
