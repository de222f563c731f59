"""Routing traces: how many assignments every expert got at every step and MoE layer.

The file is safetensors (see `docs/formats.md`), or a folder of numbered ones, which is how a running tracer
grows a trace and survives being killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import integer_array, read_bytes, replacing
from gemopt.exceptions import InputError
from gemopt.placement import check_layer_ids

SCHEMA_VERSION = 1
COUNT_LIMIT = 2**31 - 1

IntArray = NDArray[Any]


class Phase(IntEnum):
    """What a step computes: prompts, next tokens, or both."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token-level record behind the counts. N tokens, L layers, K experts per token.

    Attributes
    ----------
    ids
        [N, L, K] logical expert of each assignment; -1 where a token made fewer than K.
    step_of_token
        [N] step in which the token was computed, not decreasing.
    source_rank, token_ids, request
        [N] rank that held the token, vocabulary id, request it belongs to; None when not recorded.
    """

    ids: IntArray
    step_of_token: IntArray
    source_rank: IntArray | None = None
    token_ids: IntArray | None = None
    request: IntArray | None = None


@dataclass(frozen=True, eq=False)
class Traces:
    """Routing of T steps through L MoE layers of E experts each.

    Attributes
    ----------
    counts
        [T, L, E] int32 assignments (rows of an expert's GEMM; a token makes top-k of them).
    layer_ids, num_hidden_layers
        Index of each MoE layer among the decoder layers (default 0..L-1), and how many of those there are.
    top_k, model
        Experts per token and name of the network, when known.
    phase, task, task_names
        [T] `Phase` of each step; [T] index into `task_names`, -1 for none; None when not recorded.
    pair_counts
        [L, E, E] tokens that chose both experts in a layer; diagonal: tokens that chose the expert.
    transitions
        [L-1, E, E] tokens that chose expert i in a layer and expert j in the next MoE layer.
    tokens
        The token-level record, when kept.
    """

    counts: IntArray
    layer_ids: tuple[int, ...] = ()
    num_hidden_layers: int | None = None
    top_k: int | None = None
    model: str | None = None
    phase: IntArray | None = None
    task: IntArray | None = None
    task_names: tuple[str, ...] = ()
    pair_counts: IntArray | None = None
    transitions: IntArray | None = None
    tokens: Tokens | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = _counts(self.counts)
        object.__setattr__(self, "counts", counts)
        layer_ids = tuple(int(i) for i in self.layer_ids) or tuple(range(counts.shape[1]))
        object.__setattr__(self, "layer_ids", layer_ids)
        check_layer_ids(layer_ids, counts.shape[1], self.num_hidden_layers)
        self._check_tags()
        self._check_tokens()
        self._check_pairs()

    def _check_tags(self) -> None:
        for name, low, high in (("phase", 0, len(Phase) - 1), ("task", -1, len(self.task_names) - 1)):
            value = getattr(self, name)
            if value is None:
                continue
            array = integer_array(value, name=f"Traces.{name}", ndim=1)
            if array.shape != (self.num_steps,):
                raise InputError(f"Traces.{name}", f"shape {array.shape}", f"one per step, ({self.num_steps},)")
            if array.size and (array.min() < low or array.max() > high):
                raise InputError(f"Traces.{name}", int(array.max()), f"values from {low} to {high}")
            object.__setattr__(self, name, array)
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise InputError("Traces.top_k", self.top_k, f"from 1 to the number of experts, {self.num_experts}")

    def _check_tokens(self) -> None:
        if self.tokens is None:
            return
        ids, steps = self.tokens.ids, self.tokens.step_of_token
        if ids.ndim != 3 or ids.shape[1] != self.num_layers or ids.dtype.kind not in "iu":
            raise InputError("Traces.ids", f"{ids.dtype} {ids.shape}", f"integers [tokens, {self.num_layers}, K]")
        if ids.size and (int(ids.max()) >= self.num_experts or int(ids.min()) < -1):
            raise InputError("Traces.ids", int(ids.max()), f"experts 0 to {self.num_experts - 1}, -1 for none")
        for name in ("step_of_token", "source_rank", "token_ids", "request"):
            array = getattr(self.tokens, name)
            if array is not None and (array.shape != (len(ids),) or array.dtype.kind not in "iu"):
                raise InputError(f"Traces.{name}", f"{array.dtype} {array.shape}", f"integers ({len(ids)},)")
        if len(steps) and (int(steps.min()) < 0 or int(steps.max()) >= self.num_steps):
            raise InputError("Traces.step_of_token", int(steps.max()), f"steps 0 to {self.num_steps - 1}")

    def _check_pairs(self) -> None:
        experts = self.num_experts
        for name, layers in (("pair_counts", self.num_layers), ("transitions", self.num_layers - 1)):
            array = getattr(self, name)
            if array is not None and (array.shape != (layers, experts, experts) or array.dtype.kind not in "iu"):
                raise InputError(
                    f"Traces.{name}",
                    f"{array.dtype} {array.shape}",
                    f"integers ({layers}, {experts}, {experts})",
                )

    @property
    def num_steps(self) -> int:
        """T, steps."""
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        """L, MoE layers."""
        return int(self.counts.shape[1])

    @property
    def num_experts(self) -> int:
        """E, logical experts of a layer."""
        return int(self.counts.shape[2])

    def steps(self, selection: slice | Sequence[int] | NDArray[Any]) -> Traces:
        """Traces of some of the steps (a slice, a mask or indices, increasing).

        Pair counts and transitions recorded without their tokens cannot be divided and are left out.
        """
        chosen = np.arange(self.num_steps)[selection]
        if not len(chosen):
            raise InputError("steps", str(selection), f"at least one of the {self.num_steps} steps")
        tokens = None
        if self.tokens is not None:
            position = np.full(self.num_steps, -1)
            position[chosen] = np.arange(len(chosen))
            keep = position[self.tokens.step_of_token] >= 0
            parts: dict[str, Any] = {
                name: None if getattr(self.tokens, name) is None else getattr(self.tokens, name)[keep]
                for name in ("ids", "source_rank", "token_ids", "request")
            }
            tokens = Tokens(step_of_token=position[self.tokens.step_of_token[keep]], **parts)
        return replace(
            self,
            counts=self.counts[chosen],
            phase=None if self.phase is None else self.phase[chosen],
            task=None if self.task is None else self.task[chosen],
            pair_counts=None,
            transitions=None,
            tokens=tokens,
        )

    def select(self, *, task: str | None = None, phase: Phase | None = None) -> Traces:
        """Only the steps of one task, of one phase, or of both."""
        mask = np.ones(self.num_steps, dtype=bool)
        if task is not None:
            if self.task is None or task not in self.task_names:
                raise InputError("task", task, f"tasks of these traces: {', '.join(self.task_names) or 'none'}")
            mask &= self.task == self.task_names.index(task)
        if phase is not None:
            if self.phase is None:
                raise InputError("phase", phase.name.lower(), "these traces do not record the phase of a step")
            mask &= self.phase == phase
        return self.steps(mask)

    def split(self, holdout: float) -> tuple[Traces, Traces]:
        """The first steps to fit on and the last `holdout` share (between 0 and 1) to score on."""
        if not 0 < holdout < 1:
            raise InputError("holdout", holdout, "a share strictly between 0 and 1", "for example 0.5")
        cut = self.num_steps - round(self.num_steps * holdout)
        if not 0 < cut < self.num_steps:
            raise InputError("holdout", holdout, f"{self.num_steps} steps cannot be split so", "give more steps")
        return self.steps(slice(0, cut)), self.steps(slice(cut, None))

    def windows(self, length: int) -> list[Traces]:
        """Consecutive windows of `length` steps; a shorter rest is left out."""
        if not 1 <= length <= self.num_steps:
            raise InputError("length", length, f"from 1 to the number of steps, {self.num_steps}")
        return [self.steps(slice(i, i + length)) for i in range(0, self.num_steps - length + 1, length)]

    def pairs(self) -> IntArray:
        """[L, E, E] tokens that chose both experts of a layer (diagonal: tokens that chose the expert)."""
        if self.pair_counts is not None:
            return self.pair_counts
        chosen = self._chosen("within-token pairs")
        return np.stack([(hot.T @ hot).astype(np.int64) for hot in chosen])

    def transition_counts(self) -> IntArray:
        """[L-1, E, E] tokens that went from expert i of a layer to expert j of the next MoE layer."""
        if self.transitions is not None:
            return self.transitions
        chosen = self._chosen("layer-to-layer transitions")
        pairs = [(a.T @ b).astype(np.int64) for a, b in zip(chosen, chosen[1:], strict=False)]
        return np.stack(pairs) if pairs else np.zeros((0, self.num_experts, self.num_experts), np.int64)

    def _chosen(self, what: str) -> list[NDArray[np.float32]]:
        if self.tokens is None:
            raise InputError("Traces.ids", None, f"{what} need the token-level record", "trace with token ids")
        return [one_hot(self.tokens.ids[:, layer], self.num_experts) for layer in range(self.num_layers)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically."""
        from safetensors.numpy import save

        arrays = {"counts": _smallest(self.counts)}
        for name in ("phase", "task", "pair_counts", "transitions"):
            if getattr(self, name) is not None:
                arrays[name] = _smallest(getattr(self, name))
        if self.tokens is not None:
            for name in ("ids", "step_of_token", "source_rank", "token_ids", "request"):
                if getattr(self.tokens, name) is not None:
                    arrays[name] = _smallest(getattr(self.tokens, name))
        with replacing(path) as stream:
            stream.write(save(arrays, metadata=self._metadata()))

    def _metadata(self) -> dict[str, str]:
        known = {
            "num_hidden_layers": self.num_hidden_layers,
            "top_k": self.top_k,
            "model": self.model,
            "task_names": json.dumps(self.task_names) if self.task_names else None,
        }
        return {
            **self.extra,
            "gemopt_traces": str(SCHEMA_VERSION),
            "layer_ids": json.dumps(self.layer_ids),
            **{key: str(value) for key, value in known.items() if value is not None},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Traces:
        """Read a safetensors file, a folder of numbered ones, or an `.npz` with `counts`.

        Raises
        ------
        InputError
            One line naming the file and the array that is wrong.
        """
        source = Path(path)
        if source.is_dir():
            parts = numbered_files(source)
            return concatenate([cls.load(part) for part in parts])
        try:
            if source.suffix == ".npz":
                return _load_npz(source)
            return _load_safetensors(source)
        except InputError as error:
            if not str(error).startswith(str(path)):
                error.args = (f"{path}: {error}",)
            raise


def one_hot(ids: IntArray, num_experts: int) -> NDArray[np.float32]:
    """[N, E] 1 where a token chose the expert; ids [N, K], -1 is skipped."""
    hot = np.zeros((len(ids), num_experts), dtype=np.float32)
    rows, cols = np.nonzero(ids >= 0)
    hot[rows, ids[rows, cols].astype(np.int64)] = 1
    return hot


def numbered_files(folder: Path) -> list[Path]:
    """The complete parts of a trace folder in order; files still being written are hidden and skipped."""
    parts = sorted(folder.glob("[0-9]*.safetensors"))
    if not parts:
        raise InputError(str(folder), "no numbered .safetensors file", "a trace folder holds 000000.safetensors, ...")
    for number, part in enumerate(parts):
        if not part.stem.isdigit() or int(part.stem) != number:
            raise InputError(str(folder), part.name, f"part {number:06d}.safetensors is missing", "restore it")
    return parts


def concatenate(parts: Sequence[Traces]) -> Traces:
    """Join traces of one network along the steps; what only some parts recorded is left out."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for name in ("layer_ids", "num_experts", "top_k", "num_hidden_layers", "model"):
        values = {getattr(part, name) for part in parts}
        if len(values) > 1:
            raise InputError(f"Traces.{name}", sorted(map(str, values)), "the parts must be of one network")
    names = tuple(dict.fromkeys(name for part in parts for name in part.task_names))
    joined: dict[str, Any] = {}
    if all(part.phase is not None for part in parts):
        joined["phase"] = np.concatenate([part.phase for part in parts if part.phase is not None])
    if all(part.task is not None for part in parts):
        maps = [np.array([*(names.index(n) for n in part.task_names), -1]) for part in parts]
        joined["task"] = np.concatenate([m[p.task] for m, p in zip(maps, parts, strict=True) if p.task is not None])
    for name in ("pair_counts", "transitions"):
        arrays = [getattr(part, name) for part in parts]
        joined[name] = None if any(a is None for a in arrays) else np.sum(arrays, axis=0, dtype=np.int64)
    return replace(
        first,
        counts=np.concatenate([part.counts for part in parts]),
        task_names=names,
        tokens=_join_tokens(parts),
        **{"phase": None, "task": None, **joined},
    )


def _join_tokens(parts: Sequence[Traces]) -> Tokens | None:
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if len(tokens) < len(parts):
        return None
    offsets = np.cumsum([0, *(part.num_steps for part in parts)])
    steps = [t.step_of_token.astype(np.int64) + o for t, o in zip(tokens, offsets, strict=False)]
    arrays: dict[str, Any] = {}
    for name in ("source_rank", "token_ids", "request"):
        values = [getattr(t, name) for t in tokens]
        arrays[name] = None if any(v is None for v in values) else np.concatenate(values)
    return Tokens(ids=np.concatenate([t.ids for t in tokens]), step_of_token=np.concatenate(steps), **arrays)


def from_tokens(
    ids: IntArray,
    request_starts: Sequence[int] | IntArray,
    *,
    num_experts: int,
    batch_size: int,
    phase: Phase = Phase.DECODE,
    request_tasks: Sequence[str] | None = None,
    prefill_tokens: int = 4096,
    **fields: Any,
) -> Traces:
    """Replay recorded requests as continuous batching.

    Parameters
    ----------
    ids
        [N, L, K] logical experts of every token, requests one after the other.
    request_starts
        [R] or [R + 1] index of the first token of each request (and N).
    batch_size
        Sequences in flight. Decode: each gives one token per step, and a finished one is replaced by the next
        request at once. Prefill: whole prompts, at most `batch_size` of them and `prefill_tokens` tokens per step.
    request_tasks
        Task of each request; a step is tagged when all of its tokens are of one task.

    Returns
    -------
    Traces
        With the token-level record kept.
    """
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not len(ids):
        raise InputError("ids", f"{ids.dtype} {ids.shape}", "integers [tokens, layers, K], at least one token")
    starts = integer_array(request_starts, name="request_starts", ndim=1)
    bounds = np.append(starts, len(ids)) if not len(starts) or starts[-1] != len(ids) else starts
    lengths = np.diff(bounds)
    if bounds[0] != 0 or not len(lengths) or (lengths <= 0).any():
        raise InputError("request_starts", bounds, f"increasing indices from 0 below {len(ids)}")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "at least 1")
    if phase is Phase.MIXED:
        raise InputError("phase", "mixed", "prefill or decode")
    if request_tasks is not None and len(request_tasks) != len(lengths):
        raise InputError("request_tasks", len(request_tasks), f"one per request, {len(lengths)}")
    first_step = (_decode_steps if phase is Phase.DECODE else _prefill_steps)(lengths, batch_size, prefill_tokens)
    request = np.repeat(np.arange(len(lengths)), lengths)
    step = first_step[request]
    if phase is Phase.DECODE:
        step = step + np.arange(len(ids)) - bounds[:-1][request]
    order = np.argsort(step, kind="stable")
    tokens = Tokens(ids=ids[order], step_of_token=step[order], request=request[order])
    counts = count_assignments(tokens.ids, tokens.step_of_token, int(step.max()) + 1, num_experts)
    names = tuple(dict.fromkeys(request_tasks or ()))
    task = None
    if request_tasks is not None:
        of_token = np.array([names.index(name) for name in request_tasks])[tokens.request]
        task = _uniform_tag(of_token, tokens.step_of_token, len(counts))
    return Traces(
        counts=counts,
        top_k=ids.shape[2],
        phase=np.full(len(counts), int(phase)),
        task=task,
        task_names=names,
        tokens=tokens,
        **fields,
    )


def _decode_steps(lengths: IntArray, batch_size: int, _: int) -> IntArray:
    free = np.zeros(batch_size, dtype=np.int64)
    first = np.empty(len(lengths), dtype=np.int64)
    for request, length in enumerate(lengths):
        sequence = int(free.argmin())
        first[request] = free[sequence]
        free[sequence] += length
    return first


def _prefill_steps(lengths: IntArray, batch_size: int, prefill_tokens: int) -> IntArray:
    first = np.empty(len(lengths), dtype=np.int64)
    step, requests, tokens = 0, 0, 0
    for request, length in enumerate(lengths):
        if requests and (requests == batch_size or tokens + length > prefill_tokens):
            step, requests, tokens = step + 1, 0, 0
        first[request] = step
        requests, tokens = requests + 1, tokens + int(length)
    return first


def _uniform_tag(tag: IntArray, step: IntArray, num_steps: int) -> IntArray:
    low = np.full(num_steps, COUNT_LIMIT)
    high = np.full(num_steps, -1)
    np.minimum.at(low, step, tag)
    np.maximum.at(high, step, tag)
    return np.where(low == high, low, -1)


def count_assignments(ids: IntArray, step: IntArray, num_steps: int, num_experts: int) -> IntArray:
    """[T, L, E] assignments from token-level `ids` [N, L, K] and the step [N] of each token; -1 is skipped."""
    if ids.size and (int(ids.max()) >= num_experts or int(ids.min()) < -1):
        raise InputError("ids", int(ids.max()), f"experts 0 to {num_experts - 1}, -1 for none")
    counts = np.empty((num_steps, ids.shape[1], num_experts), dtype=np.int32)
    for layer in range(ids.shape[1]):
        experts = ids[:, layer].astype(np.int64)
        keys = (step[:, None] * num_experts + experts)[experts >= 0]
        counts[:, layer] = np.bincount(keys, minlength=num_steps * num_experts).reshape(num_steps, num_experts)
    return counts


def _counts(value: object) -> IntArray:
    array = np.asarray(value)
    limit = "whole numbers >= 0 [steps, layers, experts]"
    if array.ndim != 3 or array.dtype.kind not in "iuf":
        raise InputError("Traces.counts", f"{array.dtype} array of shape {array.shape}", limit)
    if not array.size:
        raise InputError("Traces.counts", f"shape {array.shape}", "at least one step, layer and expert")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise InputError("Traces.counts", "fractions or NaN", limit, "give assignments, not shares")
    if array.min() < 0:
        raise InputError("Traces.counts", int(array.min()), limit)
    if int(array.max()) > COUNT_LIMIT or int(array.sum(axis=2, dtype=np.float64).max()) > COUNT_LIMIT:
        raise InputError("Traces.counts", int(array.max()), f"at most {COUNT_LIMIT} assignments per step and layer")
    result = np.array(array, dtype=np.int32, order="C")
    result.setflags(write=False)
    return result


def _smallest(array: IntArray) -> IntArray:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    kinds = (np.uint8, np.uint16, np.int32) if low >= 0 else (np.int8, np.int16, np.int32)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.ascontiguousarray(array, dtype=kind)
    return np.ascontiguousarray(array, dtype=np.int64)


def _load_npz(path: Path) -> Traces:
    import io

    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
            if "counts" not in arrays.files:
                raise InputError(str(path), ", ".join(arrays.files), "an array named counts is needed")
            return Traces(counts=arrays["counts"])
    except InputError:
        raise
    except Exception as error:
        raise InputError(str(path), str(error), "a complete .npz file is needed") from None


def _load_safetensors(path: Path) -> Traces:
    from safetensors import SafetensorError, safe_open

    read_bytes(path, limit_bytes=0) if path.is_dir() else _must_exist(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        raise InputError(str(path), str(error), "a complete safetensors file is needed") from None
    return _from_arrays(arrays, metadata)


def _must_exist(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), "a readable file is needed") from None


def _from_arrays(arrays: dict[str, IntArray], metadata: dict[str, str]) -> Traces:
    version = metadata.pop("gemopt_traces", str(SCHEMA_VERSION))
    if version != str(SCHEMA_VERSION):
        raise InputError("gemopt_traces", version, f"this gemopt reads version {SCHEMA_VERSION}")
    if "counts" not in arrays:
        raise InputError("Traces.counts", ", ".join(arrays), "an array named counts is needed")
    tokens = None
    if "ids" in arrays:
        if "step_of_token" not in arrays:
            raise InputError("Traces.step_of_token", None, "token-level ids need the step of each token")
        names = ("ids", "step_of_token", "source_rank", "token_ids", "request")
        tokens = Tokens(**{name: arrays[name] for name in names if name in arrays})
    return Traces(
        counts=arrays["counts"],
        layer_ids=tuple(_parse(metadata, "layer_ids", list) or ()),
        num_hidden_layers=_parse(metadata, "num_hidden_layers", int),
        top_k=_parse(metadata, "top_k", int),
        model=metadata.pop("model", None),
        task_names=tuple(_parse(metadata, "task_names", list) or ()),
        tokens=tokens,
        extra=metadata,
        **{name: arrays[name] for name in ("phase", "task", "pair_counts", "transitions") if name in arrays},
    )


def _parse(metadata: dict[str, str], key: str, kind: type) -> Any:
    text = metadata.pop(key, None)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise InputError(f"Traces.{key}", text, f"a JSON {kind.__name__} is needed")
    return value
