"""Routing traces: how many assignments every expert got at every step and MoE layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import foreign
from gemopt.documents.arrays import integer_array, plain_array
from gemopt.exceptions import ABOVE_0, BELOW_1, InputError, check_kind, check_number, naming
from gemopt.placement import check_layer_ids
from gemopt.traces.arrays import (
    COUNT_LIMIT,
    FloatArray,
    check_counted,
    checked_counts,
    checked_times,
    one_hot,
    refuse_misread,
    refuse_turned,
    stretch,
    widened,
)
from gemopt.traces.files import IntArray, Part, parsed, read, refuse_unread, write
from gemopt.traces.joining import concatenate
from gemopt.traces.tokens import ARRAYS, Tokens
from gemopt.words import counted

SCHEMA_VERSION, TOKEN_BLOCK = 1, 4096
STEP_ARRAYS = ("phase", "task", "rank_us", "pair_counts", "transitions")


class Phase(IntEnum):
    """What a step computes: prompts, next tokens, or both."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2

    @classmethod
    def named(cls, name: str | None, field: str) -> Phase | None:
        """The phase of that name, None for None; `InputError` about `field` where there is none."""
        known = {each.name.lower(): each for each in cls}
        if name is not None and name not in known:
            raise InputError(field, name, f"one of {', '.join(known)}")
        return None if name is None else known[name]


@dataclass(frozen=True, eq=False)
class Traces:
    """Routing of T steps through L MoE layers of E experts each.

    Attributes
    ----------
    counts
        [T, L, E] int32 assignments (rows of an expert's GEMM; a token makes top-k of them).
    layer_ids, num_hidden_layers
        Index of each MoE layer among the decoder layers (default 0..L-1), and how many of those there are. Without them
        counts are refused whose numbers say that their axes are in another order, or that they are ids of tokens.
    top_k, model
        Experts per token and name of the network, when known.
    phase, task, task_names
        [T] `Phase` of each step; [T] index into `task_names`, -1 for none; None when not recorded.
    rank_us
        [T, G] measured microseconds of each rank's experts, over all MoE layers; NaN where a rank said nothing.
    pair_counts
        [L, E, E] tokens that chose both experts in a layer; diagonal: tokens that chose the expert.
    transitions
        [L-1, E, E] tokens that chose expert i in a layer and expert j in the next MoE layer.
    tokens
        The token-level record, when kept.
    allow_idle
        Whether there may be no assignment at all, as in a stretch of a longer recording; `InputError` otherwise.
    """

    counts: IntArray
    layer_ids: tuple[int, ...] = ()
    num_hidden_layers: int | None = None
    top_k: int | None = None
    model: str | None = None
    phase: IntArray | None = None
    task: IntArray | None = None
    task_names: tuple[str, ...] = ()
    rank_us: FloatArray | None = None
    pair_counts: IntArray | None = None
    transitions: IntArray | None = None
    tokens: Tokens | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    allow_idle: InitVar[bool] = False

    def __post_init__(self, allow_idle: bool) -> None:
        counts = checked_counts(self.counts)
        object.__setattr__(self, "counts", counts)
        for name, most in (("top_k", self.num_experts), ("num_hidden_layers", COUNT_LIMIT)):
            if (value := getattr(self, name)) is not None:
                limit = f"a whole number from 1 to {most}"
                check_number(f"Traces.{name}", value, limit, least=1, most=most, whole=True)
        if not (known := len(self.layer_ids) > 0) and self.tokens is None:
            refuse_turned(counts)
        given = integer_array(self.layer_ids, name="Traces.layer_ids", ndim=1, by_row=True) if known else ()
        object.__setattr__(self, "layer_ids", tuple(map(int, given)) or tuple(range(counts.shape[1])))
        check_layer_ids(self.layer_ids, counts.shape[1], self.num_hidden_layers)
        self._check_tags()
        object.__setattr__(self, "rank_us", checked_times(self.rank_us, self.num_steps))
        if self.tokens is not None:
            self.tokens.check(num_steps=self.num_steps, num_layers=self.num_layers, num_experts=self.num_experts)
        self._check_pairs()
        if not allow_idle:
            self._check_busy()

    def _check_busy(self) -> None:
        """A recorder that recorded nothing must not become an answer."""
        if not self.counts.any():
            found, hint = f"no assignments in {counted(self.num_steps, 'step')}", "the recorder recorded nothing"
            raise InputError("Traces.counts", found, "at least one assignment", hint)

    def _check_tags(self) -> None:
        names = self.task_names
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise InputError("Traces.task_names", list(names), "different texts, one per task")
        for name, low, high in (("phase", 0, len(Phase) - 1), ("task", -1, len(self.task_names) - 1)):
            value = getattr(self, name)
            if value is None:
                continue
            array = integer_array(value, name=f"Traces.{name}", ndim=1, by_row=True)
            if array.shape != (self.num_steps,):
                raise InputError(f"Traces.{name}", f"shape {array.shape}", f"one per step, ({self.num_steps},)")
            wrong = array[(array < low) | (array > high)]
            if len(wrong):
                raise InputError(f"Traces.{name}", int(wrong[0]), f"values from {low} to {high}")
            object.__setattr__(self, name, array)

    def _check_pairs(self) -> None:
        experts = self.num_experts
        for name, layers in (("pair_counts", self.num_layers), ("transitions", self.num_layers - 1)):
            if getattr(self, name) is None:
                continue
            array = widened(plain_array(f"Traces.{name}", getattr(self, name), "integers [layers, experts, experts]"))
            object.__setattr__(self, name, array)
            if array.shape != (layers, experts, experts) or array.dtype.kind not in "iu":
                raise InputError(
                    f"Traces.{name}", f"{array.dtype} {array.shape}", f"integers ({layers}, {experts}, {experts})"
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

    def __repr__(self) -> str:
        top = "" if self.top_k is None else f", top-{self.top_k}"
        model = "" if self.model is None else f" of {self.model}"
        total = int(self.counts.sum(dtype=np.int64))
        steps, layers = counted(self.num_steps, "step"), counted(self.num_layers, "layer")
        return f"Traces({steps}, {layers}, {self.num_experts} experts{top}, {total:,} assignments{model})"

    def steps(self, selection: slice | Sequence[int] | NDArray[Any]) -> Traces:
        """Traces of some of the steps (a slice, a mask or indices, increasing).

        Pair counts and transitions recorded without their tokens cannot be divided and are left out. Some of the steps
        may have no assignments at all.
        """
        try:
            chosen = np.arange(self.num_steps)[selection]
        except IndexError as error:
            raise InputError("steps", str(error), f"indices or a mask of the {self.num_steps} steps") from None
        if np.ndim(chosen) != 1 or not len(chosen) or (np.diff(chosen) <= 0).any():
            raise InputError("steps", chosen, f"at least one of the {self.num_steps} steps in a list, increasing")
        return replace(
            self,
            counts=self.counts[stretch(chosen)],
            phase=None if self.phase is None else self.phase[chosen],
            task=None if self.task is None else self.task[chosen],
            rank_us=None if self.rank_us is None else self.rank_us[chosen],
            pair_counts=None,
            transitions=None,
            tokens=None if self.tokens is None else self.tokens.of_steps(chosen, self.num_steps),
            allow_idle=True,
        )

    def select(self, *, task: str | None = None, phase: Phase | None = None) -> Traces:
        """Only the steps of one task, of one phase, or of both; all where neither is given."""
        if task is None and phase is None:
            return self
        mask = np.ones(self.num_steps, dtype=bool)
        if task is not None:
            if self.task is None or task not in self.task_names:
                raise InputError("task", task, f"tasks of these traces: {', '.join(self.task_names) or 'none'}")
            mask &= self.task == self.task_names.index(task)
        if phase is not None:
            check_kind("phase", phase, Phase)
            if self.phase is None:
                raise InputError("phase", phase.name.lower(), "these traces do not record the phase of a step")
            mask &= self.phase == phase
        if not mask.any():
            asked = " in ".join([phase.name.lower() if phase is not None else "any phase", task or "any task"])
            raise InputError("phase and task", asked, f"none of the {self.num_steps} steps is of it")
        found = self.steps(mask)
        found._check_busy()
        return found

    def split(self, holdout: float) -> tuple[Traces, Traces]:
        """The first steps to fit on and the last `holdout` share (between 0 and 1) to score on."""
        limit = "a share strictly between 0 and 1"
        check_number("holdout", holdout, limit, "for example 0.5", least=ABOVE_0, most=BELOW_1)
        cut = self.num_steps - round(self.num_steps * holdout)
        if not 0 < cut < self.num_steps:
            found = f"{counted(self.num_steps, 'step')} cannot be split so"
            raise InputError("holdout", holdout, found, "give more steps, or hold none out")
        parts = self.steps(slice(0, cut)), self.steps(slice(cut, None))
        for part in parts:
            part._check_busy()
        return parts

    def windows(self, length: int) -> list[Traces]:
        """Consecutive windows of `length` steps; a shorter rest is left out."""
        limit = f"from 1 to the number of steps, {self.num_steps}"
        check_number("length", length, limit, least=1, most=self.num_steps, whole=True)
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
            arrays |= {name: getattr(self.tokens, name) for name in ARRAYS}
        write(path, {name: array for name, array in arrays.items() if array is not None}, _metadata(self))

    @classmethod
    def of(cls, value: object, name: str = "traces") -> Traces:
        """The traces themselves, or those at a path; `InputError` for anything else."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, os.PathLike)):
            return cls.load(value)
        raise foreign.not_a("Traces", value, name)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_idle: bool = False) -> Traces:
        """Read a safetensors file, a folder of numbered ones, or an `.npz` with `counts`. allow_idle: as of the class.

        Raises
        ------
        InputError
            One line naming the file and the array that is wrong.
        """
        parts = []
        for part in read(path, ("counts", *STEP_ARRAYS, *ARRAYS)):
            with naming(part.path):
                parts.append(_from_part(part))
        found = concatenate(parts)
        if not allow_idle:
            with naming(path):
                found._check_busy()
        return found


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
    foreign_keys = set() if "gemopt_traces" in metadata else set(metadata)
    version = metadata.pop("gemopt_traces", str(SCHEMA_VERSION))
    if version != str(SCHEMA_VERSION):
        raise InputError("gemopt_traces", version, f"this gemopt reads version {SCHEMA_VERSION}")
    if "counts" not in arrays:
        found = f"arrays {', '.join(sorted(part.names))}"[:200]
        raise InputError("Traces.counts", found, "an array named counts is needed", foreign.IMPORT_TRACES)
    counts = np.asarray(arrays["counts"])
    refuse_unread(part.names | foreign_keys)
    if "layer_ids" not in metadata and counts.size and counts.ndim == 3 and counts.dtype.kind in "iuf":
        refuse_misread(checked_counts(counts))
    experts = metadata.get("num_experts")
    if counts.ndim == 3 and str(experts).strip("[]") not in ("None", str(counts.shape[2])):
        raise InputError("Traces.counts", f"{counts.shape[2]} experts", f"{experts}, as num_experts says")
    tokens = None
    if "ids" in arrays:
        if "step_of_token" not in arrays:
            raise InputError("Traces.step_of_token", None, "token-level ids need the step of each token")
        tokens = Tokens(**{name: arrays[name] for name in ARRAYS if name in arrays})
    traces = Traces(
        counts=arrays["counts"],
        layer_ids=tuple(parsed(metadata, "layer_ids", list) or ()),
        num_hidden_layers=parsed(metadata, "num_hidden_layers", int),
        top_k=parsed(metadata, "top_k", int),
        model=metadata.pop("model", None),
        task_names=tuple(parsed(metadata, "task_names", list) or ()),
        tokens=tokens,
        extra=metadata,
        allow_idle=True,  # a part may be: the whole is looked at when it is joined
        **{name: arrays[name] for name in STEP_ARRAYS if name in arrays},
    )
    if tokens is not None:
        check_counted(traces.counts, tokens.ids, tokens.step_of_token)
    return traces
