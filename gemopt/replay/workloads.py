"""Traffic with known regimes: A B A B C A, drift, bursts, day and night; from recorded tokens or tagged steps.

A workload is the share of each task at each step. From a token-level record every task is an endless stream of
`batch_size` sequences, each going through that task's requests in a seeded order; a step takes as many sequences of a
task as its share says, and each gives one token. From tagged steps alone (counts without tokens), a step is one task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents.arrays import integer_array
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.traces import Phase, Tokens, Traces, concatenate, count_assignments

IntArray = NDArray[Any]
_PART = re.compile(r"(.+):(\d{1,9})")
LONGEST = 10_000_000


def parse_plan(text: str, names: Sequence[str]) -> list[tuple[str, int]]:
    """`maths:256 code:256 ...` as (task, steps); single letters A, B, C stand for the first, second, third task."""
    plan = []
    for word in text.split():
        match = _PART.fullmatch(word)
        if match is None or not int(match[2]):
            raise InputError("--plan", word, "TASK:STEPS, for example A:256 B:256 A:256")
        name = match[1]
        if name not in names and len(name) == 1 and 0 <= ord(name) - ord("A") < len(names):
            name = names[ord(name) - ord("A")]
        if name not in names:
            raise InputError("--plan", match[1], f"tasks of these traces: {', '.join(names) or 'none'}")
        plan.append((name, int(match[2])))
    if not plan or sum(steps for _, steps in plan) > LONGEST:
        raise InputError("--plan", text, f"at least one TASK:STEPS, at most {LONGEST} steps in all")
    return plan


def regimes(plan: Sequence[tuple[str, int]], names: Sequence[str]) -> FloatArray:
    """[T, tasks] one task at a time, as in (task, steps)."""
    shares = np.zeros((sum(steps for _, steps in plan), len(names)))
    step = 0
    for name, steps in plan:
        shares[step : step + steps, _index(name, names)] = 1.0
        step += steps
    return shares


def drift(first: str, last: str, steps: int, names: Sequence[str]) -> FloatArray:
    """[T, tasks] from all of one task to all of another, linearly."""
    return _between(np.linspace(0.0, 1.0, steps), first, last, names)


def burst(usual: str, other: str, steps: int, names: Sequence[str], *, every: int, length: int) -> FloatArray:
    """[T, tasks] one task, and `length` steps of another at the end of every `every` steps."""
    if not 0 < length < every:
        raise InputError("length", length, f"from 1 to below every = {every}")
    return _between((np.arange(steps) % every >= every - length).astype(float), usual, other, names)


def diurnal(day: str, night: str, steps: int, names: Sequence[str], *, period: int) -> FloatArray:
    """[T, tasks] a cosine between two tasks, with `period` steps from day to day."""
    return _between((1 - np.cos(2 * math.pi * np.arange(steps) / period)) / 2, day, night, names)


def _between(share_T: FloatArray, first: str, other: str, names: Sequence[str]) -> FloatArray:
    shares = np.zeros((len(share_T), len(names)))
    shares[:, _index(first, names)] += 1 - share_T
    shares[:, _index(other, names)] += share_T
    return shares


def _index(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise InputError("task", name, f"tasks: {', '.join(names) or 'none'}")
    return list(names).index(name)


def from_requests(
    ids: IntArray,
    request_starts: Sequence[int] | IntArray,
    request_tasks: Sequence[str],
    shares: FloatArray,
    *,
    names: Sequence[str],
    num_experts: int,
    batch_size: int,
    seed: int = 0,
    **fields: Any,
) -> Traces:
    """Decode steps of a workload from recorded requests.

    Parameters
    ----------
    ids
        [N, L, K] logical experts of every token, requests one after the other; `request_starts` and `request_tasks`
        as for `gemopt.traces.from_tokens`.
    shares
        [T, tasks] share of each task of `names` at each step, summing to 1.
    batch_size
        Sequences in every step.

    Returns
    -------
    Traces
        With token ids; a step is tagged when all of its tokens are of one task.
    """
    starts = integer_array(request_starts, name="request_starts", ndim=1, by_row=True)
    bounds = np.append(starts, len(ids)) if not len(starts) or starts[-1] != len(ids) else starts
    if not len(ids) or bounds[0] != 0 or (np.diff(bounds) <= 0).any() or len(bounds) - 1 != len(request_tasks):
        raise InputError("request_starts", bounds, f"increasing indices from 0 below {len(ids)}, one per task given")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "at least 1")
    sizes_TK = _sequences(np.asarray(shares, dtype=np.float64), len(names), batch_size)
    rng = np.random.default_rng(seed)
    rows, steps = [], []
    for k, name in enumerate(names):
        requests = [i for i, task in enumerate(request_tasks) if task == name]
        if not sizes_TK[:, k].any():
            continue
        if not requests:
            raise InputError(
                "shares", name, "a task without a request", f"tasks: {', '.join(sorted(set(request_tasks)))}"
            )
        for lane in range(int(sizes_TK[:, k].max())):
            order = rng.permutation(requests)
            tokens = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in order])
            when = np.flatnonzero(sizes_TK[:, k] > lane)
            rows.append(tokens[(int(rng.integers(len(tokens))) + np.arange(len(when))) % len(tokens)])
            steps.append(when)
    step = np.concatenate(steps)
    by_step = np.argsort(step, kind="stable")
    chosen, step = np.concatenate(rows)[by_step], step[by_step]
    record = Tokens(ids=ids[chosen], step_of_token=step, request=np.searchsorted(bounds, chosen, side="right") - 1)
    pure = (sizes_TK > 0).sum(axis=1) == 1
    return Traces(
        counts=count_assignments(record.ids, step, len(sizes_TK), num_experts),
        top_k=ids.shape[2],
        phase=np.full(len(sizes_TK), int(Phase.DECODE)),
        task=np.where(pure, sizes_TK.argmax(axis=1), -1),
        task_names=tuple(names),
        tokens=record,
        **fields,
    )


def _sequences(shares_TK: FloatArray, tasks: int, batch_size: int) -> NDArray[np.int64]:
    """[T, tasks] whole numbers of sequences that sum to the batch, by largest remainders."""
    if shares_TK.ndim != 2 or shares_TK.shape[1] != tasks or not len(shares_TK) or len(shares_TK) > LONGEST:
        raise InputError("shares", f"shape {shares_TK.shape}", f"[steps, {tasks}], one column per task")
    if not np.isfinite(shares_TK).all() or (shares_TK < 0).any() or np.abs(shares_TK.sum(axis=1) - 1).max() > 1e-9:
        raise InputError("shares", shares_TK, "shares >= 0 that sum to 1 in every step")
    exact = shares_TK * batch_size
    sizes = np.floor(exact + 1e-9).astype(np.int64)
    ranked = np.argsort(-(exact - sizes), axis=1, kind="stable")
    extra = np.arange(tasks)[None] < (batch_size - sizes.sum(axis=1))[:, None]
    np.put_along_axis(sizes, ranked, np.take_along_axis(sizes, ranked, axis=1) + extra, axis=1)
    return sizes


def from_steps(traces: Traces, plan: Sequence[tuple[str, int]]) -> Traces:
    """Tagged steps in the order of a plan: each task goes on where it left off, and from its beginning at its end."""
    if traces.task is None:
        raise InputError("--plan", None, "the traces do not tag their steps with tasks", "import or trace with a task")
    steps_of = {name: np.flatnonzero(traces.task == k) for k, name in enumerate(traces.task_names)}
    position = dict.fromkeys(steps_of, 0)
    chosen = []
    for name, steps in plan:
        known = steps_of.get(name, np.zeros(0, dtype=np.int64))
        if not len(known):
            raise InputError("--plan", name, f"tasks with steps: {', '.join(n for n, s in steps_of.items() if len(s))}")
        chosen.append(known[(position[name] + np.arange(steps)) % len(known)])
        position[name] += steps
    at = np.concatenate(chosen)
    return Traces(
        counts=traces.counts[at],
        layer_ids=traces.layer_ids,
        num_hidden_layers=traces.num_hidden_layers,
        top_k=traces.top_k,
        model=traces.model,
        phase=None if traces.phase is None else traces.phase[at],
        task=traces.task[at],
        task_names=traces.task_names,
    )


def joined(parts: Mapping[str, Traces]) -> Traces:
    """Traces of several kinds, one after the other, each step tagged with the name of its kind."""
    names = list(parts)
    if not names:
        raise InputError("parts", "none", "at least one kind of traffic")
    tagged = [
        Traces(counts=part.counts, layer_ids=part.layer_ids, num_hidden_layers=part.num_hidden_layers, top_k=part.top_k,
               model=part.model, phase=part.phase, task=np.zeros(part.num_steps, np.int64), task_names=(name,))
        for name, part in parts.items()
    ]  # fmt: skip
    return concatenate(tagged)
