"""`routed_experts` in the responses of SGLang, vLLM and LMDeploy, replayed as continuous batching.

* vLLM 0.33.0: `choices[i].routed_experts`, base64 of .npy bytes [tokens, layers, top-k].
* SGLang 0.5.23: `meta_info.routed_experts` or `sglext.routed_experts`, base64 of int32 without a shape, a row for every
  decoder layer.
* LMDeploy 0.18: `choices[i].routed_experts`, nested lists [tokens, layers, top-k].

All hold logical ids for every token of the sequence but the last one, which is never fed back.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, TraceOptions, check_sizes
from gemopt.formats.files import as_array, bounded_json, size_of
from gemopt.traces import Phase, Traces
from gemopt.traces.batching import from_tokens

LINE_LIMIT = 256 << 20
MAX_EXPERTS = 8192


def read_traces(files: Sequence[Path], options: TraceOptions, *, raw_int32: bool = False) -> Traces:
    """Traces from responses: .json holds one or a list of them, .jsonl one per line.

    `--phase decode` takes the generated tokens, `prefill` those of the prompt; the responses' usage tells them apart.
    """
    pieces: list[NDArray[np.int16 | np.int32]] = []
    for path in files:
        for number, response in _responses(path):
            where = f"{path}: response {number}"
            for encoded, generated in _choices(where, response):
                ids = _decode(where, encoded, options, raw_int32=raw_int32)
                piece = _of_phase(where, ids, generated, options.phase)
                if len(piece):
                    pieces.append(_smaller(where, piece))
    if not pieces:
        phase = options.phase.name.lower()
        raise InputError("routed_experts", f"no {phase} token", "responses with routed_experts", "ask for them")
    if len({piece.shape[1:] for piece in pieces}) > 1:
        shapes = sorted({piece.shape[1:] for piece in pieces})
        raise InputError("routed_experts", shapes, "one number of layers and experts per token: one network")
    check_sizes(options, where="routed_experts", layers=pieces[0].shape[1], top_k=pieces[0].shape[2])
    layers = _moe_layers(pieces, options)
    ids = np.concatenate([piece[:, layers] for piece in pieces])
    experts = options.num_experts or int(ids.max()) + 1
    if int(ids.max()) >= experts:
        raise InputError(
            "routed_experts", int(ids.max()), f"experts 0 to {experts - 1}", "give the right --num-experts"
        )
    return from_tokens(
        ids,
        np.cumsum([0, *(len(piece) for piece in pieces)])[:-1],
        num_experts=experts,
        batch_size=options.batch_size,
        phase=options.phase,
        prefill_tokens=options.prefill_tokens,
        layer_ids=tuple(layers),
        num_hidden_layers=pieces[0].shape[1],
        model=options.model,
    )


def _responses(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".json":
        data = bounded_json(path)
        yield from enumerate(data if isinstance(data, list) else [data])
        return
    size_of(path)
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT):
            if len(line) >= LINE_LIMIT:
                raise InputError(f"{path}: line {number + 1}", f"{len(line)} bytes", f"lines below {LINE_LIMIT} bytes")
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}: line {number + 1}", str(error), "one JSON response per line") from None
            number += 1


def _choices(where: str, response: Any) -> Iterator[tuple[Any, int | None]]:
    """The encoded ids of each sequence in a response, and how many tokens it generated (None: unknown)."""
    if not isinstance(response, dict):
        raise InputError(where, type(response).__name__, "a JSON object, the body of a response")
    meta = response.get("meta_info")
    if isinstance(meta, dict):
        yield meta.get("routed_experts"), _count(where, meta.get("completion_tokens"))
        return
    choices = response.get("choices")
    usage = response.get("usage")
    generated = _count(where, usage.get("completion_tokens")) if isinstance(usage, dict) else None
    extension = response.get("sglext")
    if isinstance(extension, dict) and extension.get("routed_experts") is not None:
        yield extension["routed_experts"], generated
        return
    if not isinstance(choices, list) or not choices:
        raise InputError(f"{where}.choices", choices, "choices, or meta_info, with routed_experts")
    for choice in choices:
        encoded = choice.get("routed_experts") if isinstance(choice, dict) else None
        # Usage is a sum over the choices: it says nothing of one of several.
        yield encoded, generated if len(choices) == 1 else None


def _count(where: str, value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise InputError(f"{where}: completion_tokens", value, "a whole number >= 0")
    return value


def _decode(where: str, encoded: Any, options: TraceOptions, *, raw_int32: bool) -> IntArray:
    """[tokens, layers, K] ids of one sequence."""
    name = f"{where}: routed_experts"
    if isinstance(encoded, list):
        return as_array(encoded, name=name, ndim=3)
    if not isinstance(encoded, str):
        raise InputError(name, encoded, "base64 text or nested lists", "ask the engine to return routed experts")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(name, str(error), "base64 text") from None
    if data[:6] == b"\x93NUMPY":
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # numpy's header parser lets errors of the tokenizer through
            raise InputError(name, str(error), "a complete .npy array") from None
        return as_array(array, name=name, ndim=3)
    if not raw_int32:
        raise InputError(name, f"{len(data)} bytes that are no .npy array", "base64 of an .npy array")
    layers, top_k = options.num_hidden_layers, options.top_k
    if layers is None or top_k is None:
        raise InputError(name, "bytes without a shape", "layers and top-k", "give --num-hidden-layers and --top-k")
    if not data or len(data) % (4 * layers * top_k):
        raise InputError(name, f"{len(data)} bytes", f"a multiple of 4 x {layers} layers x {top_k} experts per token")
    return np.frombuffer(data, "<i4").reshape(-1, layers, top_k)


def _of_phase(where: str, ids: IntArray, generated: int | None, phase: Phase) -> IntArray:
    """The rows of one phase: the last `generated - 1` tokens were decoded, all before them were prompt."""
    if phase is Phase.MIXED:
        raise InputError("--phase", "mixed", "prefill or decode")
    if generated is None:
        if phase is Phase.PREFILL:
            raise InputError(f"{where}: usage", None, "completion_tokens, to tell the prompt from the answer")
        return ids
    decoded = max(generated - 1, 0)
    if decoded > len(ids):
        raise InputError(f"{where}: completion_tokens", generated, f"at most the {len(ids)} recorded tokens + 1")
    cut = len(ids) - decoded
    return ids[cut:] if phase is Phase.DECODE else ids[:cut]


def _smaller(where: str, ids: IntArray) -> NDArray[np.int16 | np.int32]:
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= MAX_EXPERTS:
        raise InputError(f"{where}: routed_experts", low if low < -1 else high, f"experts below {MAX_EXPERTS}, or -1")
    return ids.astype(np.int16 if high < 1 << 15 else np.int32)


def _moe_layers(pieces: list[Any], options: TraceOptions) -> list[int]:
    """Layers with experts: a router never picks an expert twice for a token, but the rows of dense layers repeat."""
    layers = pieces[0].shape[1]
    if options.layer_ids is not None:
        return list(options.layer_ids)
    tokens = sum(len(piece) for piece in pieces)
    repeats = sum((_repeats(piece).sum(axis=0) for piece in pieces), start=np.zeros(layers, np.int64))
    partly = (repeats > 0) & (repeats < tokens)
    if partly.any():
        layer = int(np.flatnonzero(partly)[0])
        raise InputError(
            "routed_experts",
            f"layer {layer} repeats an expert in {int(repeats[layer])} of {tokens} tokens",
            "distinct experts in a token",
            "if it is dense, give --layer-ids",
        )
    found = [int(layer) for layer in np.flatnonzero(repeats == 0)]
    if not found:
        raise InputError("routed_experts", "every layer repeats experts", "at least one MoE layer", "give --layer-ids")
    return found


def _repeats(ids: IntArray) -> NDArray[np.bool_]:
    """[tokens, layers] whether a token names an expert twice, or none at all."""
    ordered = np.sort(ids, axis=2)
    return np.asarray((np.diff(ordered, axis=2) == 0).any(axis=2) | (ordered[:, :, -1] < 0))
