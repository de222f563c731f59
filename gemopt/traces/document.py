"""Routing traces: how many assignments every expert got at every step and MoE layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import integer_array
from gemopt.exceptions import InputError
from gemopt.placement import check_layer_ids
from gemopt.traces.files import IntArray, Part, read, write

SCHEMA_VERSION = 1
COUNT_LIMIT = 2**31 - 1
TOKEN_BLOCK = 4096
STEP_ARRAYS = ("phase", "task", "pair_counts", "transitions")
TOKEN_ARRAYS = ("ids", "step_of_token", "source_rank", "token_ids", "request")


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
        given = integer_array(self.layer_ids, name="Traces.layer_ids", ndim=1) if len(self.layer_ids) else ()
        layer_ids = tuple(int(i) for i in given) or tuple(range(counts.shape[1]))
        object.__setattr__(self, "layer_ids", layer_ids)
        check_layer_ids(layer_ids, counts.shape[1], self.num_hidden_layers)
        self._check_tags()
        self._check_tokens()
        self._check_pairs()

    def _check_tags(self) -> None:
        names = self.task_names
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise InputError("Traces.task_names", list(names), "different texts, one per task")
        for name, low, high in (("phase", 0, len(Phase) - 1), ("task", -1, len(self.task_names) - 1)):
            value = getattr(self, name)
            if value is None:
                continue
            array = integer_array(value, name=f"Traces.{name}", ndim=1)
            if array.shape != (self.num_steps,):
                raise InputError(f"Traces.{name}", f"shape {array.shape}", f"one per step, ({self.num_steps},)")
            wrong = array[(array < low) | (array > high)]
            if len(wrong):
                raise InputError(f"Traces.{name}", int(wrong[0]), f"values from {low} to {high}")
            object.__setattr__(self, name, array)
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise InputError("Traces.top_k", self.top_k, f"from 1 to the number of experts, {self.num_experts}")

    def _check_tokens(self) -> None:
        if self.tokens is None:
            return
        ids, steps = self.tokens.ids, self.tokens.step_of_token
        if ids.ndim != 3 or ids.shape[1] != self.num_layers or ids.dtype.kind not in "iu":
            raise InputError("Traces.ids", f"{ids.dtype} {ids.shape}", f"integers [tokens, {self.num_layers}, K]")
        _check_ids(ids, self.num_experts)
        for name in ("step_of_token", "source_rank", "token_ids", "request"):
            array = getattr(self.tokens, name)
            if array is not None and (array.shape != (len(ids),) or array.dtype.kind not in "iu"):
                raise InputError(f"Traces.{name}", f"{array.dtype} {array.shape}", f"integers ({len(ids)},)")
        wrong = steps[(steps < 0) | (steps >= self.num_steps)]
        if len(wrong):
            raise InputError("Traces.step_of_token", int(wrong[0]), f"steps 0 to {self.num_steps - 1}")
        if (steps[1:] < steps[:-1]).any():
            raise InputError(
                "Traces.step_of_token", "steps out of order", "the tokens of step 0 first, then step 1, ..."
            )

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
        try:
            chosen = np.arange(self.num_steps)[selection]
        except IndexError as error:
            raise InputError("steps", str(error), f"indices or a mask of the {self.num_steps} steps") from None
        if not len(chosen) or (np.diff(chosen) <= 0).any():
            raise InputError("steps", chosen, f"at least one of the {self.num_steps} steps, increasing")
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
        if not mask.any():
            asked = " in ".join([phase.name.lower() if phase is not None else "any phase", task or "any task"])
            raise InputError("phase and task", asked, f"none of the {self.num_steps} steps is of it")
        return self.steps(mask)

    def split(self, holdout: float) -> tuple[Traces, Traces]:
        """The first steps to fit on and the last `holdout` share (between 0 and 1) to score on."""
        if not 0 < holdout < 1:
            raise InputError("holdout", holdout, "a share strictly between 0 and 1", "for example 0.5")
        cut = self.num_steps - round(self.num_steps * holdout)
        if not 0 < cut < self.num_steps:
            raise InputError(
                "holdout", holdout, f"{self.num_steps} steps cannot be split so", "give more steps, or hold none out"
            )
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
        sums_LEE = np.zeros((self.num_layers, self.num_experts, self.num_experts), np.int64)
        for hot_LNE in self._chosen("within-token pairs"):
            sums_LEE += (hot_LNE.transpose(0, 2, 1) @ hot_LNE).astype(np.int64)
        return sums_LEE

    def transition_counts(self) -> IntArray:
        """[L-1, E, E] tokens that went from expert i of a layer to expert j of the next MoE layer."""
        if self.transitions is not None:
            return self.transitions
        sums_LEE = np.zeros((self.num_layers - 1, self.num_experts, self.num_experts), np.int64)
        for hot_LNE in self._chosen("layer-to-layer transitions"):
            sums_LEE += (hot_LNE[:-1].transpose(0, 2, 1) @ hot_LNE[1:]).astype(np.int64)
        return sums_LEE

    def _chosen(self, what: str) -> Iterator[NDArray[np.float32]]:
        """Blocks [L, N, E] of 1 where a token chose the expert; their products are exact in float32."""
        if self.tokens is None:
            raise InputError("Traces.ids", None, f"{what} need the token-level record", "trace with token ids")
        for start in range(0, len(self.tokens.ids), TOKEN_BLOCK):
            ids = self.tokens.ids[start : start + TOKEN_BLOCK]
            yield np.stack([one_hot(ids[:, layer], self.num_experts) for layer in range(self.num_layers)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically."""
        arrays = {"counts": self.counts} | {name: getattr(self, name) for name in STEP_ARRAYS}
        if self.tokens is not None:
            arrays |= {name: getattr(self.tokens, name) for name in TOKEN_ARRAYS}
        write(path, {name: array for name, array in arrays.items() if array is not None}, _metadata(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Traces:
        """Read a safetensors file, a folder of numbered ones, or an `.npz` with `counts`.

        Raises
        ------
        InputError
            One line naming the file and the array that is wrong.
        """
        parts = []
        for part in read(path, ("counts", *STEP_ARRAYS, *TOKEN_ARRAYS)):
            try:
                parts.append(_from_part(part))
            except InputError as error:
                if not str(error).startswith(str(part.path)):
                    error.args = (f"{part.path}: {error}",)
                raise
        return concatenate(parts)


def one_hot(ids: IntArray, num_experts: int) -> NDArray[np.float32]:
    """[N, E] 1 where a token chose the expert; ids [N, K], -1 is skipped."""
    hot = np.zeros((len(ids), num_experts), dtype=np.float32)
    rows, cols = np.nonzero(ids >= 0)
    hot[rows, ids[rows, cols].astype(np.int64)] = 1
    return hot


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
    widths = {t.ids.shape[2] for t in tokens}
    if len(widths) > 1:
        raise InputError("Traces.ids", f"{sorted(widths)} experts per token", "the parts must be of one network")
    arrays: dict[str, Any] = {}
    for name in ("source_rank", "token_ids", "request"):
        values = [getattr(t, name) for t in tokens]
        arrays[name] = None if any(v is None for v in values) else np.concatenate(values)
    return Tokens(ids=np.concatenate([t.ids for t in tokens]), step_of_token=np.concatenate(steps), **arrays)


def count_assignments(ids: IntArray, step: IntArray, num_steps: int, num_experts: int) -> IntArray:
    """[T, L, E] assignments from token-level `ids` [N, L, K] and the step [N] of each token; -1 is skipped."""
    _check_ids(ids, num_experts)
    counts = np.empty((num_steps, ids.shape[1], num_experts), dtype=np.int32)
    for layer in range(ids.shape[1]):
        experts = ids[:, layer].astype(np.int64)
        keys = (step[:, None] * num_experts + experts)[experts >= 0]
        counts[:, layer] = np.bincount(keys, minlength=num_steps * num_experts).reshape(num_steps, num_experts)
    return counts


def _check_ids(ids: IntArray, num_experts: int) -> None:
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < -1 or high >= num_experts:
        raise InputError("Traces.ids", low if low < -1 else high, f"experts 0 to {num_experts - 1}, -1 for none")


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
    largest = float(array.sum(axis=2, dtype=np.float64).max())
    if largest > COUNT_LIMIT:
        raise InputError("Traces.counts", largest, f"at most {COUNT_LIMIT} assignments per step and layer")
    result = np.array(array, dtype=np.int32, order="C")
    result.setflags(write=False)
    return result


def _metadata(traces: Traces) -> dict[str, str]:
    known = {
        "num_hidden_layers": traces.num_hidden_layers,
        "top_k": traces.top_k,
        "model": traces.model,
        "task_names": json.dumps(traces.task_names) if traces.task_names else None,
    }
    return {
        **traces.extra,
        "gemopt_traces": str(SCHEMA_VERSION),
        "layer_ids": json.dumps(traces.layer_ids),
        **{key: str(value) for key, value in known.items() if value is not None},
    }


def _from_part(part: Part) -> Traces:
    arrays, metadata = part.arrays, dict(part.metadata)
    version = metadata.pop("gemopt_traces", str(SCHEMA_VERSION))
    if version != str(SCHEMA_VERSION):
        raise InputError("gemopt_traces", version, f"this gemopt reads version {SCHEMA_VERSION}")
    if "counts" not in arrays:
        raise InputError("Traces.counts", f"arrays {', '.join(sorted(part.names))}", "an array named counts is needed")
    tokens = None
    if "ids" in arrays:
        if "step_of_token" not in arrays:
            raise InputError("Traces.step_of_token", None, "token-level ids need the step of each token")
        tokens = Tokens(**{name: arrays[name] for name in TOKEN_ARRAYS if name in arrays})
    traces = Traces(
        counts=arrays["counts"],
        layer_ids=tuple(_parse(metadata, "layer_ids", list) or ()),
        num_hidden_layers=_parse(metadata, "num_hidden_layers", int),
        top_k=_parse(metadata, "top_k", int),
        model=metadata.pop("model", None),
        task_names=tuple(_parse(metadata, "task_names", list) or ()),
        tokens=tokens,
        extra=metadata,
        **{name: arrays[name] for name in STEP_ARRAYS if name in arrays},
    )
    _check_consistent(traces)
    return traces


def _check_consistent(traces: Traces) -> None:
    if traces.tokens is None:
        return
    counted = count_assignments(traces.tokens.ids, traces.tokens.step_of_token, traces.num_steps, traces.num_experts)
    wrong = np.argwhere(counted != traces.counts)
    if len(wrong):
        step, layer, expert = map(int, wrong[0])
        raise InputError(
            "Traces.counts",
            int(traces.counts[step, layer, expert]),
            f"the token-level ids make {counted[step, layer, expert]} at step {step}, layer {layer}, expert {expert}",
            "leave the ids out, or count them again",
        )


def _parse(metadata: dict[str, str], key: str, kind: type) -> Any:
    text = metadata.pop(key, None)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise InputError(f"Traces.{key}", text, f"a JSON {kind.__name__} is needed")
    return value
