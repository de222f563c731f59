"""The same requests in other steps: more steps to fit where few were traced, so that less is fitted to chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gemopt.exceptions import InputError, check_number
from gemopt.traces.arrays import count_assignments
from gemopt.traces.document import Traces
from gemopt.traces.files import IntArray
from gemopt.traces.tokens import Tokens, join


def regrouped(traces: Traces, times: int, *, seed: int = 0) -> Traces:
    """The given steps, and `times - 1` times as many in which their requests meet others.

    The tokens of a request in a step stay together and go to a step drawn at random, of the same phase and task. A step
    gets about as many tokens as it had; one that gets none is left out. `rank_us` is not kept.

    Raises
    ------
    InputError
        The request of every token is not recorded, or `times` is no whole number from 1.
    """
    check_number("times", times, "a whole number from 1", least=1, whole=True)
    check_number("seed", seed, "a whole number of at least 0", whole=True)
    if traces.tokens is None or traces.tokens.request is None:
        raise InputError(
            "Traces.request", None, "the request of every token is not recorded", "record or replay requests"
        )
    draws, records = np.random.default_rng(seed), [traces.tokens]
    for _ in range(times - 1):
        step_N = _dealt(traces, traces.tokens, draws)
        order = np.argsort(step_N, kind="stable")
        arrays: dict[str, Any] = {
            name: None if each is None else each[order] for name, each in vars(traces.tokens).items()
        }
        records.append(Tokens(**{**arrays, "step_of_token": step_N[order]}))
    tokens, steps = join(records, [traces.num_steps] * times), traces.num_steps * times
    found = replace(
        traces,
        counts=count_assignments(tokens.ids, tokens.step_of_token, steps, traces.num_experts),
        phase=None if traces.phase is None else np.tile(traces.phase, times),
        task=None if traces.task is None else np.tile(traces.task, times),
        rank_us=None,
        pair_counts=None,
        transitions=None,
        tokens=tokens,
        allow_idle=True,
    )
    return found.steps(np.bincount(tokens.step_of_token, minlength=steps) > 0)


def _dealt(traces: Traces, tokens: Tokens, draws: np.random.Generator) -> IntArray:
    """[N] another step of each token."""
    step_N, steps = np.asarray(tokens.step_of_token, np.int64), traces.num_steps
    tags = [np.zeros(steps) if each is None else each for each in (traces.phase, traces.task)]
    kind_T = np.unique(np.stack(tags), axis=1, return_inverse=True)[1].ravel()
    _, first_U, unit_N, size_U = np.unique(
        np.stack([step_N, np.asarray(tokens.request, np.int64)]), axis=1,
        return_index=True, return_inverse=True, return_counts=True,
    )  # fmt: skip
    size_T, dealt_U = np.bincount(step_N, minlength=steps), np.empty(len(size_U), np.int64)
    kind_U = kind_T[step_N[first_U]]
    for kind in np.unique(kind_U):
        units = draws.permutation(np.flatnonzero(kind_U == kind))
        there = draws.permutation(np.flatnonzero((kind_T == kind) & (size_T > 0)))
        middle = np.cumsum(size_U[units]) - (size_U[units] + 1) // 2
        dealt_U[units] = there[np.searchsorted(np.cumsum(size_T[there]), middle, side="right")]
    return np.asarray(dealt_U[unit_N.ravel()])
