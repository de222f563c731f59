"""Workloads with known regimes, from tokens and from tagged steps."""

from __future__ import annotations

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.replay.judge import regimes as regimes_of
from gemopt.replay.workloads import burst, diurnal, drift, from_requests, from_steps, joined, parse_plan, regimes
from gemopt.traces import Traces

NAMES = ("maths", "code", "law")
LAYERS, EXPERTS, BATCH = 2, 6, 4


def record() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Task k only uses experts 2 k and 2 k + 1."""
    rng = np.random.default_rng(0)
    tasks = [NAMES[i % 3] for i in range(12)]
    lengths = rng.integers(3, 9, len(tasks))
    starts = np.cumsum(lengths) - lengths
    of_token = np.repeat([NAMES.index(task) for task in tasks], lengths)
    ids = 2 * of_token[:, None, None] + rng.permuted(np.tile([0, 1], (len(of_token), LAYERS, 1)), axis=2)
    return ids, starts, tasks


def workload(shares: np.ndarray, **fields: object) -> Traces:
    ids, starts, tasks = record()
    return from_requests(ids, starts, tasks, shares, names=NAMES, num_experts=EXPERTS, batch_size=BATCH, **fields)  # type: ignore[arg-type]


def test_regimes_are_of_the_task_they_say() -> None:
    plan = parse_plan("A:5 code:7 A:3 C:2", NAMES)
    assert plan == [("maths", 5), ("code", 7), ("maths", 3), ("law", 2)]
    traces = workload(regimes(plan, NAMES))
    assert [(r.name, r.start, r.stop) for r in regimes_of(traces)] == [
        ("maths", 0, 5),
        ("code", 5, 12),
        ("maths", 12, 15),
        ("law", 15, 17),
    ]
    by_task = traces.counts.reshape(17, LAYERS, 3, 2).sum(axis=3)
    expected = np.zeros((17, 3), int)
    for regime in regimes_of(traces):
        expected[regime.start : regime.stop, NAMES.index(regime.name)] = 2 * BATCH
    assert (by_task == expected[:, None]).all()


def test_every_step_has_the_whole_batch_whatever_the_mix() -> None:
    for shares in (
        drift("maths", "law", 30, NAMES),
        burst("maths", "code", 30, NAMES, every=10, length=3),
        diurnal("code", "law", 30, NAMES, period=12),
    ):
        traces = workload(shares)
        assert (traces.counts.sum(axis=2) == 2 * BATCH).all()
        by_task = traces.counts.reshape(30, LAYERS, 3, 2).sum(axis=(1, 3)) / (2 * BATCH * LAYERS)
        assert np.abs(by_task - shares).max() <= 0.5 / BATCH + 1e-9
    mixed = workload(drift("maths", "law", 30, NAMES))
    assert mixed.task is not None and mixed.task[0] == 0 and mixed.task[-1] == 2 and mixed.task[15] == -1


def test_sequences_go_through_requests_in_order() -> None:
    """One sequence: its tokens are those of whole requests, one token a step, each request to its end."""
    ids, starts, tasks = record()
    shares = regimes([("code", 40)], NAMES)
    traces = from_requests(ids, starts, tasks, shares, names=NAMES, num_experts=EXPERTS, batch_size=1)
    assert traces.tokens is not None and traces.tokens.request is not None
    request = traces.tokens.request
    assert {tasks[int(r)] for r in request} == {"code"}
    runs = np.split(request, np.flatnonzero(np.diff(request)) + 1)
    lengths = np.diff([*starts, len(ids)])
    assert [len(run) for run in runs[1:-1]] == [lengths[int(run[0])] for run in runs[1:-1]]


def test_seeds_differ_and_repeat() -> None:
    shares = regimes([("code", 20), ("law", 20)], NAMES)
    records = [workload(shares, seed=seed).tokens for seed in (1, 1, 2)]
    first, again, other = (record.request for record in records if record is not None)
    assert first is not None
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_tagged_steps_go_on_where_they_left_off() -> None:
    parts = {
        name: Traces(counts=np.full((5, 1, 4), 10 * k) + np.arange(5)[:, None, None]) for k, name in enumerate("xy")
    }
    spliced = from_steps(joined(parts), parse_plan("x:3 y:2 x:4", ["x", "y"]))
    assert spliced.counts[:, 0, 0].tolist() == [0, 1, 2, 10, 11, 3, 4, 0, 1]
    assert spliced.task is not None and spliced.task.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("text", ["", "maths", "maths:0", "maths:-3", "physics:5", "D:5", "maths:99999999"])
def test_plans_that_mean_nothing(text: str) -> None:
    with pytest.raises(InputError, match="--plan"):
        parse_plan(text, NAMES)


def test_what_workloads_refuse() -> None:
    with pytest.raises(InputError, match="sum to 1"):
        workload(np.full((3, 3), 0.5))
    with pytest.raises(InputError, match="one column per task"):
        workload(np.ones((3, 1)))
    with pytest.raises(InputError, match="below every"):
        burst("maths", "law", 9, NAMES, every=3, length=3)
    with pytest.raises(InputError, match="tasks: maths"):
        drift("maths", "physics", 9, NAMES)
    with pytest.raises(InputError, match="do not tag"):
        from_steps(Traces(counts=np.ones((3, 1, 4), int)), [("x", 2)])
    ids, starts, tasks = record()
    with pytest.raises(InputError, match="without a request"):
        from_requests(
            ids, starts, ["maths"] * 12, regimes([("law", 3)], NAMES), names=NAMES, num_experts=6, batch_size=2
        )
    with pytest.raises(InputError, match="request_starts"):
        from_requests(ids, starts[:-1], tasks, regimes([("law", 3)], NAMES), names=NAMES, num_experts=6, batch_size=2)
