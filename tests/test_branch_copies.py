"""Branch and bound with spare slots: against every placement, and what its certificate says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from brute import optimum
from timed import timed

from gemopt.certificate import Certificate
from gemopt.evaluate import objective
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solve import solve
from gemopt.solvers import get
from gemopt.solvers.base import Options, Outcome, Row
from gemopt.solvers.exact.share_tree import ShareTree
from gemopt.solvers.exact.tree import has_room
from gemopt.solvers.size import prover
from gemopt.traces import Traces
from gemopt.verify import verify

STAIRS = Latency(((Curve(np.array([0.0, 4, 5, 8, 9, 40]), np.array([2.0, 2, 4, 4, 6, 30]), 1.0),),))
FALLING = Latency(((Curve(np.array([0.0, 5, 6, 40]), np.array([1.0, 9, 6, 50]), 1.0),),))


def branched(problem: Problem) -> Outcome:
    return get("branch").solve(problem, Options.lasting(600), None)


@pytest.mark.parametrize("slots", [[3, 3, 3], [4, 2, 2], [4, 3, 0], [5, 5, 5]], ids=str)
@pytest.mark.parametrize("kind", ["equal", "two equal", "falling", "active"])
def test_the_optimum_is_found_and_proven(kind: str, slots: list[int]) -> None:
    """Odd counts: which copy has one assignment more matters, also between ranks that are alike."""
    rng = np.random.default_rng([len(kind), *slots])
    features = (ASSIGNMENTS, ACTIVE) if kind == "active" else (ASSIGNMENTS,)
    latencies = {
        "equal": [STAIRS] * 3,
        "two equal": [STAIRS, STAIRS.times(1.25), STAIRS],
        "falling": [FALLING, STAIRS, FALLING.times(1.1)],
        "active": [Latency(((line(1, s), line(0, 2)), (line(4, 0.1), line(0, 0.5)))) for s in (1.0, 1.0, 1.2)],
    }[kind]
    problem = Problem.make(
        rng.poisson(rng.gamma(1.0, 4.0, 5), (4, 5)), features, latencies, slots, weights_T=[1.0, 2.5, 0.0, 1.0]
    )
    found, best = branched(problem), optimum(problem)
    assert found.stopped_by is StoppedBy.PROOF and found.row is not None and found.bound_us is not None
    assert objective(problem, found.row) == pytest.approx(best, rel=1e-9)
    assert best * (1 - 1e-8) <= found.bound_us <= best


def test_equal_ranks_are_tried_in_every_order() -> None:
    """The best placement has the copy with one assignment less beside the heaviest expert: 31 in the other order."""
    counts_TE = [[3, 6, 7, 2], [0, 4, 5, 6], [5, 5, 7, 7]]
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), [Latency(((line(0, 1),),))] * 2, 3)
    row = branched(problem).row
    assert row is not None and objective(problem, row) == optimum(problem) == 29


def test_copies_are_used_where_they_pay_and_slots_stay_empty_where_not() -> None:
    hot = Problem.make([[9, 1, 1]], (ASSIGNMENTS,), [Latency(((line(0, 1),),))] * 2, [3, 3])
    assert (branched(hot).row == 0).sum() == 2
    dear = Latency(((line(0, 0.001), line(0, 5)),))
    active = Problem.make([[4, 4]], (ASSIGNMENTS, ACTIVE), [dear] * 2, [2, 2])
    assert sorted(branched(active).row.tolist()) == [-1, -1, 0, 1]


def test_what_shares_otherwise_or_is_too_large_is_refused_or_said() -> None:
    latencies = [Latency(((line(1, s),),)) for s in np.linspace(1, 2, 7)]
    problem = Problem.make([[3, 2, 1]] * 2, (ASSIGNMENTS,), latencies[:2], [3, 3])
    for other in (replace(problem, split=Split.OPTIMAL), replace(problem, full=True)):
        with pytest.raises(UnsupportedError, match="share evenly"):
            branched(other)
        assert prover(other) is None
    wide = Problem.make([[3, 2, 1, 4, 5, 6, 7, 8]], (ASSIGNMENTS,), latencies, 2)
    found = branched(wide)
    assert not found.reached and "too large" in found.note and found.row is not None
    assert prover(wide) is None and prover(problem) == "branch"


@pytest.fixture(scope="module")
def measured() -> Profile:
    return timed(range(3), lambda n, _: 5 + 3 * -(-n // 16), (0, 16, 17, 32, 33, 400))


@pytest.fixture(scope="module")
def counts() -> Traces:
    rng = np.random.default_rng(1)
    return Traces(counts=rng.poisson(rng.gamma(1.0, 12.0, 6) * rng.gamma(2.0, 0.5, (12, 1, 6))).astype(np.int64))


def test_a_proof_with_copies_is_repeated_and_a_false_one_found(
    measured: Profile, counts: Traces, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    result = solve(measured, counts, solver="auto", certificate=path, slots_per_rank=3, time_limit=60)
    assert result.status.value == "optimal"
    (layer,), found = Certificate.load(path).layers, verify(path, measured, counts)
    assert layer.proof.value == "tree" and "searched again" in found.layers[0].note
    assert found.checked_us == pytest.approx(found.objective_us, rel=1e-6)
    given_up = verify(path, measured, counts, most_nodes=3)
    assert given_up.checked_us < 0.999 * found.checked_us
    worse = solve(measured, counts, solver="linear", slots_per_rank=3)
    assert worse.placement is not None and worse.objective_us > 1.001 * result.objective_us
    edited = layer.model_copy(
        update={
            "row": worse.placement.physical_to_logical[0].tolist(),
            "objective_us": worse.objective_us,
            "bound_us": worse.objective_us,
        }
    )
    content = Certificate.load(path).model_copy(
        update={"layers": [edited], "objective_us": worse.objective_us, "bound_us": worse.objective_us, "gap": 0.0}
    )
    content.model_copy(update={"own_sha256": content.own_digest()}).save(path)
    with pytest.raises(InputError, match="a placement of"):
        verify(path, measured, counts)


@pytest.mark.parametrize("seed", [1, 3])
def test_the_search_changes_which_experts_have_copies(seed: int) -> None:
    """Swaps alone end 1.5 and 0.1 % above the optimum, whatever their number."""
    rng = np.random.default_rng(seed)
    counts_TE = rng.multinomial(256, rng.dirichlet(np.full(8, 4.0)), size=60)
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), [Latency(((line(0, 1),),))] * 4, 3)
    best, found = branched(problem), get("local-search").solve(problem, Options(deadline=np.inf, patience=1000), None)
    assert best.stopped_by is StoppedBy.PROOF and best.row is not None and found.row is not None
    assert objective(problem, found.row) <= 1.001 * objective(problem, best.row)


@pytest.mark.parametrize("ranks", [62, 63, 64, 65, 90])
def test_more_ranks_than_a_word_has_bits(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """The better placement that a search finds is written down whole: experts on ranks beyond 63 had no slot."""
    counts = np.arange(ranks, 0, -1)[None]
    latencies = [Latency(((line(0.0, 1.0 + g),),)) for g in range(ranks)]
    problem = Problem.make(counts, [ASSIGNMENTS], latencies)
    worst = objective(problem, np.arange(ranks)[::-1])  # most load on the slowest rank

    def found_at_once(tree: object, value: float, rank_E: Row, stop: object) -> tuple[float, int, bool]:
        rank_E[:] = np.arange(ranks)  # heaviest first
        return objective(problem, np.arange(ranks)), 7, False

    monkeypatch.setattr("gemopt.solvers.exact.branch.search_tree", found_at_once)
    found = get("branch").solve(problem, Options.lasting(600), np.arange(ranks)[::-1])
    assert found.row is not None and (found.row == np.arange(ranks)).all()
    assert found.history[-1].objective_us == objective(problem, np.arange(ranks)) < worst
    assert found.note == "7 nodes of the search did not prove the optimum"


def test_copies_on_ranks_beyond_a_word_of_bits_are_left_to_others() -> None:
    slots = np.zeros(70, np.int64)
    slots[[0, 69]] = 2
    problem = Problem.make([[3, 2, 1]], [ASSIGNMENTS], [Latency(((line(1.0, 1.0),),))] * 70, slots)
    found = branched(problem)
    assert not found.reached and "too large" in found.note and found.row is not None


def test_trees_that_cannot_end_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 experts on 128 ranks: what pairs save on each is 33 million numbers, whatever the time."""
    counts = np.random.default_rng(1).poisson(9, (2, 512))
    problem = Problem.make(counts, [ASSIGNMENTS], [Latency(((line(1.0, 1.0),),))] * 128)
    assert not has_room(problem) and has_room(replace(problem.select(np.arange(1)), latencies=problem.latencies[:16]))
    monkeypatch.setattr("gemopt.solvers.exact.branch.pair_costs", None)  # not to be called
    found = get("branch").solve(problem, Options.lasting(0.5), None)
    assert not found.reached and "too large" in found.note and found.row is not None
    assert found.bound_us is not None and found.bound_us <= objective(problem, found.row)


def test_an_interrupt_while_ranges_of_copies_are_cut_is_no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemopt.solvers.exact.branch.FEW_COLUMNS", 0)  # no search of all placements before
    stopped = [False]

    def go(search: ShareTree, _: float) -> None:
        stopped[0] = True

    monkeypatch.setattr(ShareTree, "go", go)
    problem = Problem.make(np.full((2, 4), 5), (ASSIGNMENTS,), [STAIRS] * 3, [2, 2, 2])
    outcome = get("branch").solve(problem, Options.lasting(600, stop=lambda: stopped[0]), None)
    assert outcome.row is not None and outcome.stopped_by is StoppedBy.INTERRUPT
