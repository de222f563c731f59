"""The exact objective against a plain reference that shares no code with it, and what cannot be scored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemopt.costs import fit
from gemopt.evaluate import check, evaluate, objective, rank_times
from gemopt.exceptions import InputError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line, tiles
from gemopt.links import Exchange
from gemopt.online.controller import Controller
from gemopt.placement import Placement
from gemopt.problem import Problem, slot_counts
from gemopt.profile import Device, Profile, Sample
from gemopt.report import report
from gemopt.resize import resize
from gemopt.splits import even_shares, static_shares
from gemopt.traces import Traces

FEATURES = (ASSIGNMENTS, ACTIVE, tiles(4))


def feature_by_hand(name: str, n: int) -> int:
    return {"assignments": n, "active": int(n > 0), "tiles@4": math.ceil(n / 4)}[name]


def time_by_hand(latency: Latency, loads: list[int]) -> float:
    best = -math.inf
    for term in latency.terms:
        total = 0.0
        for curve, load in zip(term, loads, strict=True):
            if load > curve.x[-1]:
                total += curve.y[-1] + curve.slope * (load - curve.x[-1])
            else:
                total += float(np.interp(load, curve.x, curve.y))
        best = max(best, total)
    return best


def makespans_by_hand(problem: Problem, row: list[int], weights: list[float] | None = None) -> np.ndarray:
    """[T, G] rank times, slot by slot in Python integers."""
    times = np.zeros((problem.num_steps, problem.num_ranks))
    ranks = [rank for rank, slots in enumerate(problem.slots_per_rank) for _ in range(slots)]
    for step, counts in enumerate(problem.counts_TE.tolist()):
        loads = [[0] * len(problem.features) for _ in range(problem.num_ranks)]
        for slot, expert in enumerate(row):
            if expert < 0:
                continue
            copies = [s for s, e in enumerate(row) if e == expert]
            index, n, r = copies.index(slot), counts[expert], len(copies)
            if weights is None:
                share = (n + r - 1 - index) // r
            else:
                ends = [sum(weights[s] for s in copies[:i]) for i in range(r)] + [1.0]
                share = math.floor(n * ends[index + 1] + 0.5) - math.floor(n * ends[index] + 0.5)
            for f, feature in enumerate(problem.features):
                loads[ranks[slot]][f] += feature_by_hand(feature.name, share)
        times[step] = [time_by_hand(lat, load) for lat, load in zip(problem.latencies, loads, strict=True)]
    return times


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, list[int]]:
    """Copies, empty slots, unequal slots and ranks without any slot; jagged latencies over several features."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    slots = rng.integers(0, experts + 1, ranks)
    while slots.sum() < experts:
        slots[rng.integers(ranks)] = experts
    row = np.full(int(slots.sum()), -1)
    owner = np.repeat(np.arange(ranks), slots)
    free = list(rng.permutation(len(row)))
    for expert in rng.permutation(experts):
        row[free.pop()] = expert
    for slot in free:
        others = np.setdiff1d(np.arange(experts), row[owner == owner[slot]])
        if len(others) and rng.random() < 0.7:
            row[slot] = rng.choice(others)
    features = tuple(f for f in FEATURES if rng.random() < 0.6) or (ASSIGNMENTS,)
    latencies = []
    for _ in range(ranks):
        terms = []
        for _ in range(rng.integers(1, 4)):
            x = np.unique(np.append(0, rng.integers(1, 30, 3)))
            terms.append(tuple(Curve(x, rng.uniform(0, 9, len(x)), rng.uniform(0, 2)) for _ in features))
        latencies.append(Latency(tuple(terms)))
    counts = rng.integers(0, draw(st.sampled_from([1, 3, 40])) + 1, (draw(st.integers(1, 4)), experts))
    problem = Problem.make(counts, features, latencies, slots, weights_T=rng.uniform(0, 3, len(counts)))
    return problem, row.tolist()


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_objective_equals_a_plain_reference(case: tuple[Problem, list[int]]) -> None:
    problem, row = case
    expected = makespans_by_hand(problem, row)
    array = np.array(row)
    check(problem, array)
    np.testing.assert_allclose(rank_times(problem, array), expected, rtol=1e-12)
    total = math.fsum(w * max(times) for w, times in zip(problem.weights_T, expected.tolist(), strict=True))
    assert objective(problem, array) == pytest.approx(total, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_static_shares_follow_their_weights(case: tuple[Problem, list[int]], seed: int) -> None:
    problem, row = case
    rng, array = np.random.default_rng(seed), np.array(row)
    weights = np.where(array >= 0, rng.integers(0, 5, len(row)), 0).astype(float)
    for expert in range(problem.num_experts):
        mine = array == expert
        weights[mine] = weights[mine] / weights[mine].sum() if weights[mine].sum() else 1 / mine.sum()
    shares = static_shares(problem.counts_TE, array, weights)
    for expert in range(problem.num_experts):
        np.testing.assert_array_equal(shares[:, array == expert].sum(axis=1), problem.counts_TE[:, expert])
        ideal = problem.counts_TE[:, expert, None] * weights[array == expert]
        assert (np.abs(shares[:, array == expert] - ideal) <= 1).all()
    np.testing.assert_allclose(
        rank_times(problem, array, weights), makespans_by_hand(problem, row, weights.tolist()), rtol=1e-12
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_even_shares_add_up_and_differ_by_one_at_most(case: tuple[Problem, list[int]]) -> None:
    problem, row = case
    shares, array = even_shares(problem.counts_TE, np.array(row)), np.array(row)
    for expert in range(problem.num_experts):
        mine = shares[:, array == expert]
        np.testing.assert_array_equal(mine.sum(axis=1), problem.counts_TE[:, expert])
        assert (mine.max(axis=1) - mine.min(axis=1) <= 1).all()
        assert (np.diff(mine, axis=1) <= 0).all()  # the first copies get the remainder
    assert (shares[:, array < 0] == 0).all()


def test_a_copy_without_assignments_is_not_active() -> None:
    latencies = [Latency(((line(0, 0), line(0, 10)),))] * 2
    problem = Problem.make([[1], [2]], (ASSIGNMENTS, ACTIVE), latencies, [1, 1])
    assert rank_times(problem, np.array([0, 0])).tolist() == [[10, 0], [10, 10]]


def flat_profile(ranks: int, **fields: Any) -> Profile:
    points = [Sample(assignments=n, latency_us=10.0 + n) for n in (0, 10, 100)]
    return Profile(devices=[Device(rank=rank, samples=points, **fields) for rank in range(ranks)])


def test_ranks_that_end_together_take_turns() -> None:
    """On a staircase most do: the first of them would be called the straggler always."""
    traces = Traces(counts=np.tile([3, 3, 2, 3], (6, 2, 1)))
    found = evaluate(Placement.contiguous(2, 4, 4), flat_profile(4), traces)
    assert found.straggler_TL.T.tolist() == [[0, 1, 3, 0, 1, 3], [1, 3, 0, 1, 3, 0]]


def test_ranks_that_end_together_every_other_step_take_turns_too() -> None:
    traces = Traces(counts=np.tile([[[3, 3]], [[3, 2]]], (3, 1, 1)))
    found = evaluate(Placement.contiguous(1, 2, 2), flat_profile(2), traces)
    assert found.straggler_TL[::2, 0].tolist() == [0, 1, 0] and not found.straggler_TL[1::2].any()


def test_the_fields_of_an_evaluation() -> None:
    counts = np.zeros((3, 2, 4), int)
    counts[0, 0], counts[1, 0], counts[2, 1] = [5, 0, 0, 1], [0, 0, 3, 4], [200, 0, 0, 0]
    traces = Traces(counts=counts, layer_ids=(4, 9))
    placement = Placement.contiguous(2, 4, 2, layer_ids=[4, 9])
    found = evaluate(placement, flat_profile(2), traces)
    expected = np.array([[15, 10], [17, 10], [10, 210]], float)
    np.testing.assert_allclose(found.makespan_TL, expected)
    assert found.straggler_TL[:2, 0].tolist() == [0, 1] and found.straggler_TL[2, 1] == 0
    assert found.objective_us == pytest.approx(expected.sum())
    np.testing.assert_allclose(found.per_layer_us, expected.sum(axis=0))
    np.testing.assert_allclose(found.step_us, expected.sum(axis=1))
    assert found.quantile_us(0.5) == pytest.approx(27.0)
    assert found.outside == pytest.approx(1 / 4)  # busy loads beyond 100: none of 3, the one of 1
    busy = (15 + 11 + 10 + 17 + 10 + 10) + (4 * 10 + 210 + 10)  # of both layers, which are not alike
    assert found.idle_share == pytest.approx(1 - busy / 2 / (42 + 230))


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_one_expert_one_step_and_all_zero_steps(ranks: int, experts: int) -> None:
    for counts in (np.zeros((1, 1, experts), int), np.full((1, 1, experts), 3)):
        placement = Placement.contiguous(1, experts, ranks)
        found = evaluate(placement, flat_profile(ranks), Traces(counts=counts, allow_idle=True))
        busiest = counts[0, 0, : -(-experts // ranks)].sum()
        assert found.objective_us == pytest.approx(10.0 + busiest)
        assert 0 <= found.idle_share < 1 and found.outside == 0


@pytest.mark.parametrize(
    ("placement", "named"),
    [
        (Placement.contiguous(1, 5, 2), "num_experts"),
        (Placement.contiguous(2, 4, 2), "layer_ids"),
        (Placement.contiguous(1, 4, 2, layer_ids=[3]), "layer_ids"),
        (Placement.contiguous(1, 4, 4), "2 devices"),
    ],
)
def test_what_disagrees_is_refused(placement: Placement, named: str) -> None:
    traces = Traces(counts=np.ones((2, 1, 4), int))
    with pytest.raises(InputError, match=named):
        evaluate(placement, flat_profile(2), traces)
    with pytest.raises(InputError, match="fitted cost model"):
        evaluate(Placement.contiguous(1, 4, 2), None, traces)


def test_a_placement_of_the_same_devices_in_another_order_is_refused() -> None:
    traces, flat = Traces(counts=np.ones((2, 1, 4), int)), flat_profile(2)
    devices = [device.model_copy(update={"uuid": f"GPU-{device.rank}"}) for device in flat.devices]
    measured = Profile(devices=devices)
    there = Placement.contiguous(1, 4, 2)
    turned = there.changed(device_uuids=["gpu-1", "gpu-0"])
    told = r"device_uuids\[0\]: got gpu-1; by the profile, measured as rank 1; profile the devices in the order"
    for score in (evaluate, Controller, report):
        with pytest.raises(InputError, match=told):
            score(*((measured, turned) if score is Controller else (turned, measured, traces)))  # type: ignore[operator]
    with pytest.raises(InputError, match=told):
        report(there, measured, traces, baseline=turned)
    for names in (["0", "1"], ["GPU-a", "GPU-b"], [None, "GPU-1"]):  # others: what would they do on these?
        evaluate(there.changed(device_uuids=names), measured, traces)
    with pytest.raises(InputError, match="got GPU-a; by the profile, rank 0 is GPU-0"):  # in force on others
        resize(there.changed(device_uuids=["GPU-a", "GPU-1"]), measured)


def test_a_split_that_needs_senders_says_so() -> None:
    traces, profile = Traces(counts=np.ones((2, 1, 2), int)), flat_profile(2)
    table = {"slots_per_rank": [2, 2], "num_experts": 2, "split": "nearest"}
    copies = Placement(physical_to_logical=[[0, 1, 1, 0]], **table)
    with pytest.raises(InputError, match="token-level record"):
        evaluate(copies, profile, traces)
    with pytest.raises(InputError, match="node of every rank"):
        evaluate(copies, None, traces, cost=fit(profile)[0], senders="uniform")
    with pytest.raises(InputError, match="one of traces, uniform"):
        evaluate(copies, profile, traces, senders="everybody")
    even = Placement.contiguous(1, 2, 2)  # several placements, one call: senders change nothing
    assert evaluate(even, profile, traces, senders="uniform").objective_us == pytest.approx(22.0)
    assert evaluate(copies, profile, traces, senders="uniform").objective_us > 0
    without = Placement(**{**table, "physical_to_logical": [[0, 1]], "slots_per_rank": [1, 1]})
    assert evaluate(without, profile, traces).objective_us == pytest.approx(22.0)


def test_how_tokens_are_exchanged_needs_links() -> None:
    traces = Traces(counts=np.ones((2, 1, 2), int))
    with pytest.raises(InputError, match="says how tokens go over links; give a topology"):
        evaluate(Placement.contiguous(1, 2, 2), flat_profile(2), traces, exchange=Exchange(overlap=True))


def test_a_static_placement_uses_its_weights() -> None:
    traces = Traces(counts=np.array([[[100, 0]]]))
    weights = [[0.9, 1.0, 0.1, 0.0]]
    table = {"physical_to_logical": [[0, 1, 0, -1]], "slots_per_rank": [2, 2], "num_experts": 2}
    static = Placement(**table, split="static", split_weights=weights)
    even = Placement(**table)
    assert evaluate(static, flat_profile(2), traces).objective_us == pytest.approx(100.0)
    assert evaluate(even, flat_profile(2), traces).objective_us == pytest.approx(60.0)


def test_large_loads_are_exact() -> None:
    latencies = [Latency(((line(0, 1),),))] * 2
    problem = Problem.make([[2**30, 1, 2**30 - 3, 0]], (ASSIGNMENTS,), latencies)
    assert objective(problem, np.array([0, 1, 2, 3])) == 2**30 + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"counts_TE": [[1.5]]}, "counts_TE"),
        ({"counts_TE": [[-1]]}, "counts_TE"),
        ({"counts_TE": [1]}, "counts_TE"),
        ({"counts_TE": np.zeros((0, 2), int)}, "counts_TE"),
        ({"counts_TE": [[2**31 - 1, 1]]}, "counts_TE"),
        ({"features": (ASSIGNMENTS, ACTIVE)}, "latencies"),
        ({"weights_T": [1.0, 2.0]}, "weights_T"),
        ({"weights_T": [-1.0]}, "weights_T"),
        ({"weights_T": [np.nan]}, "weights_T"),
        ({"node_of_rank": [0]}, "node_of_rank"),
        ({"slots_per_rank": [1, 0]}, "slots_per_rank"),
        ({"slots_per_rank": [1.5, 1]}, "slots_per_rank"),
        ({"slots_per_rank": [2, 2, 2]}, "slots_per_rank"),
        ({"slots_per_rank": 3}, "at most 2"),
        ({"slots_per_rank": -1}, "slots_per_rank"),
    ],
)
def test_problems_that_are_none(change: dict[str, Any], named: str) -> None:
    fields = {"counts_TE": [[1, 2]], "features": (ASSIGNMENTS,), "latencies": [Latency(((line(0, 1),),))] * 2, **change}
    with pytest.raises(InputError, match=named):
        Problem.make(**fields)


def test_slots() -> None:
    assert slot_counts(None, 7, 3).tolist() == [3, 2, 2]
    assert slot_counts(3, 7, 3).tolist() == [3, 3, 3]
    assert slot_counts([7, 0, 0], 7, 3).tolist() == [7, 0, 0]


def test_equal_ranks_are_those_with_equal_latency_and_slots() -> None:
    a, b = Latency(((line(1, 1),),)), Latency(((line(1, 1),), (line(0, 2),)))
    problem = Problem.make([[1] * 4], (ASSIGNMENTS,), [a, b, a, Latency(((line(1, 1),),))], [2, 2, 2, 1])
    assert sorted(problem.equal_ranks) == [[0, 2], [1], [3]]


def test_relabelling_equal_ranks_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    latency = Latency(((Curve(np.array([0, 8, 9]), np.array([1, 1, 5.0]), 0.3),),))
    problem = Problem.make(rng.integers(0, 20, (50, 8)), (ASSIGNMENTS,), [latency] * 4)
    row = rng.permutation(8)
    for _ in range(5):
        assert objective(problem, rng.permuted(row.reshape(4, 2), axis=1)[rng.permutation(4)].ravel()) == (
            pytest.approx(objective(problem, row), rel=1e-12)
        )
