"""The bound of contents of ranks where copies share evenly: against every placement, and as the verifier checks it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from brute import optimum
from timed import timed

from gemopt.bounds import step_bounds
from gemopt.certificate import UNIT, Certificate, LayerProof, Proof
from gemopt.costs import CostModel, fit
from gemopt.evaluate import objective
from gemopt.exceptions import InputError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solve import solve
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.exact import branch, share_space, share_tree
from gemopt.solvers.exact.share_space import Shares, make_contents
from gemopt.solvers.exact.share_tree import Box, ShareTree, Worked, bound_of_copies
from gemopt.solvers.size import num_shares
from gemopt.traces import Traces
from gemopt.verify import share_contents, verify
from gemopt.verify.case import Case, floor_bound_us
from gemopt.verify.columns import check_columns

STOP = np.zeros(1, np.uint8)
STAIRS = Latency(((Curve(np.array([0.0, 4, 5, 8, 9, 40]), np.array([2.0, 2, 4, 4, 6, 30]), 1.0),),))
FALLING = Latency(((Curve(np.array([0.0, 5, 6, 40]), np.array([1.0, 9, 6, 50]), 1.0),),))
LINE = Latency(((line(0, 1),),))
KINDS = {
    "equal": [LINE] * 3,
    "two equal": [STAIRS, STAIRS.times(1.25), STAIRS],
    "falling": [FALLING, STAIRS, FALLING.times(1.1)],
    "active": [Latency(((line(1, s), line(0, 2)), (line(4, 0.1), line(0, 0.5)))) for s in (1.0, 1.0, 1.2)],
}


def drawn(kind: str, slots: list[int], seed: int) -> Problem:
    rng = np.random.default_rng([seed, len(kind), *slots])
    features = (ASSIGNMENTS, ACTIVE) if kind == "active" else (ASSIGNMENTS,)
    counts_TE = rng.poisson(rng.gamma(1.0, 6.0, 4), (4, 4))
    return Problem.make(counts_TE, features, KINDS[kind], slots, weights_T=rng.choice([0.0, 1.0, 2.5], 4))


@pytest.mark.parametrize("slots", [[2, 2, 2], [3, 2, 1], [3, 3, 0]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_placement_is_below_the_bound(kind: str, slots: list[int]) -> None:
    """Of the multipliers that are found, and of any others."""
    for seed in range(2):
        problem, rng = drawn(kind, slots, seed), np.random.default_rng(seed)
        space, best = Shares.of(problem, step_bounds(problem)), optimum(problem)
        row = get("local-search").solve(problem, Options(deadline=np.inf, patience=20), None).row
        assert space is not None and row is not None
        found = bound_of_copies(problem, row, np.inf, STOP)
        assert found is not None and found.bound_us <= best * (1 + 1e-12)
        for scale in (0.1, 1.0, 10.0):
            wild = space.prove(rng.exponential(scale, (4, 4)), rng.normal(0, scale * best / 4, 4), STOP)
            assert wild is not None and wild.bound_us <= best * (1 + 1e-12)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slots", [[2, 2, 2], [3, 2, 1], [3, 3, 0], [4, 4, 4]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_copies_are_cut_until_the_optimum_is_proven(
    kind: str, slots: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any placement, with looks that prove little and searches of next to nothing before the ranges are cut."""
    for name, few in (("FIRST_LOOKS", 1), ("FIRST_ITERATIONS", 3), ("LOOKS", 1), ("ITERATIONS", 3), ("MOST_LEFT", 2)):
        monkeypatch.setattr(share_tree, name, few)
    cut = 0
    for seed in range(3):
        problem = drawn(kind, slots, seed)
        row, best = get("linear").solve(problem, Options(deadline=np.inf), None).row, optimum(problem)
        assert row is not None
        search = bound_of_copies(problem, row, np.inf, STOP, threads)
        assert search is not None and search.done
        assert search.value_us == pytest.approx(best, rel=1e-9) and search.bound_us <= best
        cut = max(cut, search.boxes)
    assert cut > 1


@pytest.mark.parametrize("kind", KINDS)
def test_contents_in_use_make_better_placements_before_any_range_is_cut(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share_tree, "MOST_LEFT", 2)
    better = 0
    for seed in range(3):
        problem = drawn(kind, [3, 3, 3], seed)
        row, best = get("linear").solve(problem, Options(deadline=np.inf), None).row, optimum(problem)
        assert row is not None
        search = bound_of_copies(problem, row, -np.inf, STOP)
        assert search is not None and search.boxes == 1
        assert best * (1 - 1e-9) <= search.value_us <= objective(problem, row)
        better += search.value_us < objective(problem, row)
    assert better


def test_boxes_that_are_worked_on_together_begin_and_end_with_the_same_placement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What threads find does not depend on which of them is first: none hears of it before all have ended."""
    for name, few in (("FIRST_LOOKS", 1), ("FIRST_ITERATIONS", 3), ("LOOKS", 1), ("ITERATIONS", 3), ("MOST_LEFT", 2)):
        monkeypatch.setattr(share_tree, name, few)
    work, take, begun, taken = ShareTree._work, ShareTree._take, list[Box](), threading.Event()
    left, together = list[Box](), 0

    def held_back(self: ShareTree, box: Box) -> Worked:
        begun.append(box)
        found = work(self, box)
        if box is not begun[0]:
            taken.wait(0.05)
        begun.remove(box)
        return found

    def taking(self: ShareTree, worked: Worked) -> None:
        left.extend(begun)
        taken.set()
        take(self, worked)
        taken.clear()

    monkeypatch.setattr(ShareTree, "_work", held_back)
    monkeypatch.setattr(ShareTree, "_take", taking)
    for seed in range(3):
        problem = drawn("falling", [3, 2, 1], seed)
        row = get("linear").solve(problem, Options(deadline=np.inf), None).row
        assert row is not None
        search = bound_of_copies(problem, row, np.inf, STOP, threads=3)
        assert search is not None and search.done
        together += search.boxes > 2
    assert together and not left


def test_the_bound_rises_above_the_floors() -> None:
    counts_TE = np.random.default_rng(3).poisson(np.linspace(4, 40, 8), (6, 8))
    problem = Problem.make(counts_TE, (ASSIGNMENTS,), [LINE, LINE.times(1.1), LINE.times(0.9)], 4)
    outcome = get("branch").solve(problem, Options.lasting(600), None)
    assert outcome.row is not None
    best, floors = objective(problem, outcome.row), float(step_bounds(problem).sum())
    found = bound_of_copies(problem, outcome.row, best, STOP)
    assert found is not None and found.bound_us - floors > 0.3 * (best - floors)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_leave_out_no_content_that_may_be_the_cheapest(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever columns are near: nets by pairs are no more than those of all steps, and the least are those."""
    for most in (0, 20):
        monkeypatch.setattr(share_space, "MOST_LOOKED", most)
        for seed in range(20):
            problem, rng = drawn(kind, [3, 3, 2], seed), np.random.default_rng(seed)
            space = Shares.of(problem, step_bounds(problem))
            assert space is not None and (space.lines is None) == (kind == "active")
            scale = float(rng.choice([0.1, 1.0, 10.0]))
            mu_ET, pi_E = rng.exponential(scale, (4, 4)), rng.normal(0, 5 * scale, 4)
            near, limit_us = rng.integers(0, len(space), 3), float(rng.choice([0.0, 30.0, np.inf]))
            every, some = (space.prove(mu_ET, pi_E, STOP, near=ids, limit_us=limit_us) for ids in (None, near))
            assert every is not None and some is not None and some.bound_us <= every.bound_us * (1 + 1e-12) + 1e-9
            assert (some.net_KN <= every.net_KN + 1e-9 * (1 + np.abs(every.net_KN))).all()
            live = space.live_KN.reshape(-1)[near].all()
            if live and set(space.kind(near)) == set(range(len(space.ranks_K))):
                assert some.bound_us == pytest.approx(every.bound_us, rel=1e-9, abs=1e-6)


def test_contents_are_all_sets_of_experts_and_copies() -> None:
    contents = make_contents(4, 3, 3, 2)
    problem = Problem.make([[1, 2, 3, 4]], (ASSIGNMENTS,), [LINE] * 3, [3, 2, 1])
    assert num_shares(problem) == len(contents.pairs)
    found = {tuple((x // 3, x % 3 + 1) for x in pairs if x < 12) for pairs in contents.pairs.tolist()}
    assert len(found) == len(contents.pairs) == 1 + 4 * 3 + 6 * 6 + 4 * 10  # by size: sets, times ways to have copies
    for n, pairs in enumerate(contents.pairs.tolist()):
        assert contents.size[n] == sum(x < 12 for x in pairs) and contents.copies[n] == sum(
            x % 3 for x in pairs if x < 12
        )


def case_of(problem: Problem) -> Case:
    cost = CostModel("", problem.features, problem.latencies, np.zeros(0))
    return Case(problem.counts_TE.astype(np.int64), cost, problem.slots_per_rank)


def certified(problem: Problem, mu_ET: np.ndarray, price_E: np.ndarray) -> float:
    """What the verifier makes of these multipliers."""
    case = case_of(problem)
    duals = {"level.0": case.floors_T[None], "share.0": mu_ET[None], "price.0": price_E[None]}
    duals["copies.0"] = np.tile(np.array([[1], [3]]), (1, 1, 4))
    layer = LayerProof(layer_id=0, proof=Proof.COLUMNS, row=[], objective_us=0, bound_us=0)
    return check_columns(case, layer, duals).bound_us


@pytest.mark.parametrize("slots", [[2, 2, 2], [3, 2, 1], [3, 3, 0]], ids=str)
@pytest.mark.parametrize("kind", ["equal", "two equal", "falling"])
def test_the_verifier_proves_as_much_and_no_more_than_holds(kind: str, slots: list[int]) -> None:
    for seed in range(2):
        problem, rng = drawn(kind, slots, seed), np.random.default_rng(seed)
        problem = Problem.make(problem.counts_TE, problem.features, problem.latencies, slots)
        space, best = Shares.of(problem, case_of(problem).floors_T / 1e6), optimum(problem)
        for scale in (0.05, 0.5):
            mu_ET = rng.exponential(scale, (4, 4))
            mu_ET /= np.maximum(1.0, mu_ET.sum(axis=0))
            price_E = rng.normal(0.2, scale, 4) * best
            here = certified(
                problem, np.floor(mu_ET * UNIT).astype(np.int64), np.round(price_E * 1e6 * (1 << 12)).astype(np.int64)
            )
            assert space is not None and here <= best
            there = space.prove(mu_ET, price_E, STOP)
            assert there is not None and here <= there.bound_us + 1e-9 * best
            assert 0 in slots or here == pytest.approx(there.bound_us, abs=1e-6 * best)


@pytest.mark.parametrize("slots", [[3, 3, 2], [4, 2, 1], [3, 3, 0]], ids=str)
@pytest.mark.parametrize("kind", ["equal", "two equal", "falling"])
def test_the_verifier_finds_the_same_with_and_without_pairs(
    kind: str, slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least and all that cost little, in every range: a content is only passed over where it costs too much."""
    by_pairs, looked = share_contents._by_pairs, 0
    for seed in range(6):
        case, rng = case_of(drawn(kind, slots, seed)), np.random.default_rng(seed)
        mu_ET = rng.exponential(1.0, (4, 4))
        mu_ET = np.floor(mu_ET / np.maximum(1.0, mu_ET.sum(axis=0)) * UNIT).astype(np.int64)
        price_E = np.round(rng.normal(3, 5, 4) * 1e6 * (1 << 12)).astype(np.int64)
        within, found = share_contents.Range(rng.integers(1, 3, 4), rng.integers(1, 4, 4)), []
        for screened in (True, False):
            pairs = by_pairs if screened else (lambda *given: unknown(by_pairs(*given)))
            monkeypatch.setattr(share_contents, "_by_pairs", pairs)
            for ranges in (share_contents.everything(case), within):
                given = (case, 0, case.floors_T, mu_ET, price_E, 12, ranges)
                least, _ = share_contents._scanned(*given, None, np.zeros((0, 0), np.int64))
                left = share_contents.shares_left(*given, least + (1 << 34), 400)
                assert left is not None
                found.append((least, [each.tolist() for each in left]))
        assert found[:2] == found[2:]
        looked += len(found[0][1][1])
    assert looked > 6


def unknown(parts: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that say nothing."""
    return np.full_like(parts[0], -1e300), np.zeros_like(parts[1])


def test_experts_with_too_many_copies_are_not_listed() -> None:
    """Tables of pairs would take gigabytes, whatever a certificate says."""
    problem = Problem.make(np.ones((1, 256), np.int64), (ASSIGNMENTS,), [LINE] * 192, 2)
    assert not share_contents.shared(case_of(problem)) and num_shares(problem) is None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile, Traces]:
    """A certificate of a layer whose search was cut at once."""
    profile = timed(range(3), lambda n, _: 5 + 3 * -(-n // 16), (0, 16, 17, 32, 33, 400))
    rng = np.random.default_rng(1)
    traces = Traces(counts=rng.poisson(rng.gamma(1.0, 12.0, 6) * rng.gamma(2.0, 0.5, (12, 1, 6))).astype(np.int64))
    path = tmp_path_factory.mktemp("cut") / "c.json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(branch, "search_copies", lambda tree, best, best_E, stop: (best, 3, False))
        solve(profile, traces, solver="branch", certificate=path, slots_per_rank=3, time_limit=60, cost="staircase")
    return path, profile, traces


def test_a_search_that_is_cut_leaves_a_bound_that_anyone_can_check(written: tuple[Path, Profile, Traces]) -> None:
    path, profile, traces = written
    certificate, found = Certificate.load(path), verify(*written)
    cost, slots_G = fit(profile, model="staircase")[0], np.array(certificate.slots_per_rank)
    case = Case(traces.counts[:, 0].astype(np.int64), cost, slots_G)
    (layer,) = certificate.layers
    assert layer.proof is Proof.COLUMNS and layer.columns_us is not None
    assert found.checked_us == pytest.approx(layer.bound_us) and layer.bound_us > 1.01 * floor_bound_us(case)
    assert found.checked_us == pytest.approx(found.objective_us, rel=1e-6) and "searched again" in found.layers[0].note
    given_up = verify(*written, most_nodes=0)
    assert layer.columns_us <= given_up.checked_us < 0.9999 * found.checked_us


def test_ranges_that_were_searched_are_searched_again_where_others_are_open(
    written: tuple[Path, Profile, Traces], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut where there is no room for more ranges: the least of the open ones is claimed, and can be checked."""
    rng, profile, above = np.random.default_rng(2), written[1], 0.0
    traces = Traces(counts=rng.poisson(rng.gamma(1.0, 12.0, 6) * rng.gamma(2.0, 0.5, (12, 1, 6))).astype(np.int64))
    monkeypatch.setattr(branch, "search_copies", lambda tree, best, best_E, stop: (best, 3, False))
    for few, names in ((1, ("FIRST_LOOKS", "LOOKS")), (20, ("FIRST_ITERATIONS", "ITERATIONS")), (40, ("MOST_LEFT",))):
        for name in names:
            monkeypatch.setattr(share_tree, name, few)
    for boxes in (18, 22, 24):
        monkeypatch.setattr(share_tree, "MOST_ENTRIES", boxes * traces.counts.size)
        path = tmp_path / f"{boxes}.json"
        result = solve(
            profile, traces, solver="branch", certificate=path, slots_per_rank=3, time_limit=60, cost="staircase",
            threads=1,
        )  # fmt: skip
        (layer,) = Certificate.load(path).layers
        assert result.stopped_by is StoppedBy.ITERATIONS and layer.bound_us == pytest.approx(result.bound_us)
        assert verify(path, profile, traces).checked_us == pytest.approx(layer.bound_us, rel=1e-6)
        above = max(above, layer.bound_us / (layer.columns_us or layer.bound_us))
    assert above > 1.001


@pytest.mark.parametrize(
    ("name", "more"), [("price.0", 1 << 40), ("share.0", UNIT), ("level.0", 10**9), ("copies.0", 1)]
)
def test_edited_multipliers_are_found(
    written: tuple[Path, Profile, Traces], name: str, more: int, tmp_path: Path
) -> None:
    path, profile, traces = written
    certificate = Certificate.load(path)
    duals = certificate.duals(path)
    duals[name] = duals[name] + more
    certificate.write(tmp_path / "c.json", duals)
    with pytest.raises(InputError):
        verify(tmp_path / "c.json", profile, traces)


def test_prices_that_overflow_are_refused(written: tuple[Path, Profile, Traces], tmp_path: Path) -> None:
    path, profile, traces = written
    certificate = Certificate.load(path)
    duals = certificate.duals(path)
    duals["price.0"][0, 0] = np.iinfo(np.int64).min
    certificate.write(tmp_path / "c.json", duals)
    with pytest.raises(InputError, match="price"):
        verify(tmp_path / "c.json", profile, traces)


def test_a_bound_above_a_placement_is_found_by_searching_again(
    written: tuple[Path, Profile, Traces], tmp_path: Path
) -> None:
    path, profile, traces = written
    certificate = Certificate.load(path)
    worse = solve(profile, traces, solver="linear", slots_per_rank=3, cost="staircase")
    assert worse.placement is not None and worse.objective_us > 1.001 * certificate.objective_us
    row, value = worse.placement.physical_to_logical[0].tolist(), worse.objective_us
    layer = certificate.layers[0].model_copy(update={"row": row, "objective_us": value, "bound_us": value})
    forged = certificate.model_copy(update={"layers": [layer], "objective_us": value, "bound_us": value, "gap": 0.0})
    forged.write(tmp_path / "c.json", certificate.duals(path))
    with pytest.raises(InputError, match="a placement of"):
        verify(tmp_path / "c.json", profile, traces)
