"""All contents of ranks priced by pairs: a bound whatever the multipliers, and its certificate checked again."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from brute import optimum
from safetensors.numpy import load_file
from test_verify import profile, traces

from gemopt.bounds import step_bounds
from gemopt.bounds.colocation import Programme
from gemopt.bounds.dual_bound import costs, feasible
from gemopt.certificate import UNIT, Certificate, duals_path
from gemopt.costs import fit
from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS, Curve, FloatArray, Latency
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.solve import solve
from gemopt.solvers.exact.contents import Contents, ContentsSearch
from gemopt.solvers.size import paired
from gemopt.solving import turns
from gemopt.traces import Traces
from gemopt.verify import verify
from gemopt.verify.case import Case
from gemopt.verify.contents import Above, least_content, pairs_of

NEVER = np.zeros(1, np.uint8)


def one(experts: int, slots: object, *, tile: int = 1) -> Problem:
    cost, _ = fit(profile(tile=tile), model="staircase")
    return problems(cost, traces(experts=experts, layers=1), slots)[0]


@pytest.mark.parametrize(("experts", "slots"), [(6, [2, 2, 2]), (7, [1, 2, 4]), (5, [0, 3, 2])])
@pytest.mark.parametrize("cut", [False, True])
def test_every_content_is_priced(experts: int, slots: list[int], cut: bool) -> None:
    problem, rng = one(experts, slots, tile=16), np.random.default_rng(0)
    programme = Programme.of(problem, step_bounds(problem))
    space, best_us = Contents.of(programme), optimum(problem)
    shape = (problem.num_steps, programme.planes_CKF.shape[1], experts)
    if cut:
        space = replace(space, part_TKE=np.ones(shape))
    never = np.full(len(space.size_K), np.inf)
    for size in (0.1, 1.0, 10.0):
        mu, v = feasible(programme, rng.random(shape) ** 3 * size, np.zeros((programme.num_groups, experts)))
        pi_E = rng.normal(size=experts) * best_us / experts
        priced = space.price(mu, pi_E, never, NEVER)
        assert priced is not None and priced[0] <= best_us
        alone_CE, pair_CEE, _ = costs(programme, mu, v)
        least = []
        for c, factor, count in zip(programme.group_G, programme.factor_G, programme.slots_G, strict=True):
            least.append(
                min(
                    sum(factor * alone_CE[c, i] - pi_E[i] for i in some)
                    + sum(factor * pair_CEE[c, i, j] for i, j in combinations(some, 2))
                    + cut * above(programme, mu, programme.planes_CKF[c] * factor, list(some))
                    for some in combinations(range(experts), int(count))
                )
            )
        expected = float((programme.weights_T - mu.sum(axis=(1, 2))) @ programme.floor_T) + pi_E.sum() + sum(least)
        assert priced[0] == pytest.approx(expected, rel=1e-9)
        asked = space.price(mu, pi_E, np.full(len(space.size_K), min(least) - 1.0), NEVER)
        assert asked is not None and asked[0] < priced[0] and not len(asked[1])
        members = space.members(priced[1])
        parts = space.parts(priced[1][:1], programme.floor_T[None], 2.0)
        loads_T = programme.features_FTE[0][:, members[0, : space.size_K[0]]].sum(axis=1)
        a_KF = programme.planes_CKF[space.group_K[0]] * space.factor_K[0]
        over_KT = a_KF[:, :1] + a_KF[:, 1:] * loads_T - programme.floor_T
        expected_M = over_KT.max(axis=0).clip(0) if cut else over_KT.ravel()
        assert parts[0] == pytest.approx(2 * expected_M, rel=1e-5, abs=1e-5)
        kind = space.kind(priced[1])
        assert all(len(set(row[:n].tolist())) == n for row, n in zip(members, space.size_K[kind], strict=True))
        for k, n in enumerate(space.size_K):
            assert space.ids(k, members[kind == k][:, :n]).tolist() == priced[1][kind == k].tolist()


def above(programme: Programme, mu_TKE: FloatArray, planes_KF: FloatArray, some: list[int]) -> float:
    """What a content takes above the planes that its multipliers chose."""
    loads_FT = programme.features_FTE[:, :, some].sum(axis=2)
    planes_KT = planes_KF[:, :1] + planes_KF[:, 1:] @ loads_FT
    top_T = np.maximum(planes_KT.max(axis=0), programme.floor_T)
    return float((mu_TKE[:, :, some].sum(axis=2) * (top_T - planes_KT).T).sum())


def test_the_iteration_rises_to_a_bound() -> None:
    problem = one(8, [3, 3, 2])
    floor_T, best_us = step_bounds(problem), optimum(problem)
    search = ContentsSearch(problem, floor_T, best_us)
    assert search.run(NEVER, 0.0).iterations == 0 and not search.ended
    found = search.run(NEVER)
    assert float(problem.weights_T @ floor_T) < found.bound_us <= best_us * (1 + 1e-9)
    assert search.ended and search.space.part_TKE is not None
    assert not paired(one(6, [3, 3, 3])) and not paired(one(60, None)) and not paired(one(3, [1, 1, 1]))


def test_the_least_content_in_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    cost, _ = fit(profile(tile=16), model="staircase")
    for experts, size in ((1, 1), (6, 3), (7, 2), (5, 5)):
        alone = [int(x) << 68 for x in rng.integers(-(10**6), 10**6, experts)]
        together = [[int(x) << 68 for x in row] for row in rng.integers(-(10**6), 10**6, (experts, experts))]
        case = Case(rng.integers(0, 60, (40, experts)), cost, np.array([experts]))
        mu_TKE = rng.integers(0, UNIT // experts, (40, 1, experts)) * rng.integers(0, 2, (40, 1, 1))
        stepwise = Above(case, 0, [[0, 0]], UNIT, mu_TKE)
        expected, plain = [], []
        for some in combinations(range(experts), size):
            pairs = sum(alone[i] for i in some) + sum(together[i][j] for j, i in combinations(some, 2))
            loads_FT = case.loads_FTE[:, :, list(some)].sum(axis=2)
            times_T = np.maximum(case.floor_ps(case.times_us(0, loads_FT)), case.floors_T)
            mass_T = mu_TKE[:, 0, list(some)].sum(axis=1)
            plain.append(pairs)
            expected.append(pairs + (int((times_T * mass_T).sum()) << 48))
        found = least_content(pairs_of(alone, together, size, ""), stepwise)
        assert min(plain) < found <= min(expected) and min(expected) - found < 1 << 60
    large = pairs_of([(1 << 200) + 1, -(1 << 199) - 1], [[], [5]], 1, "")
    two = Case(case.counts_TE[:, :2], cost, np.array([2]))
    none = Above(two, 0, [[0, 0]], UNIT, np.zeros((40, 1, 2), np.int64))
    assert -(1 << 199) - 1 - (1 << 152) < least_content(large, none) <= -(1 << 199) - 1
    with pytest.raises(InputError, match="contents of a rank"):
        pairs_of([0] * 64, [], 32, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile, Traces]:
    path = tmp_path_factory.mktemp("contents") / "cert.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "LEAST_S", (0.0, 0.0))
        solve(profile(), traces(experts=6), solver="local-search", patience=3, time_limit=60, certificate=path)
    return path, profile(), traces(experts=6)


def test_a_bound_of_contents_is_checked_again(made: tuple[Path, Profile, Traces], tmp_path: Path) -> None:
    path, measured, counts = made
    stated, duals = Certificate.load(path), load_file(duals_path(path))
    assert "pi.0" in duals
    found = verify(path, measured, counts)
    assert found.checked_us == pytest.approx(stated.bound_us, rel=1e-6)
    moved = duals["pi.0"].copy()
    moved[0] += 10**15
    for pi, said in ((moved, "from the multipliers"), (duals["pi.0"][:-1], "a price of each"), (None, "from the mult")):
        rest = {key: value for key, value in duals.items() if key != "pi.0"}
        stated.write(tmp_path / "c.json", rest if pi is None else rest | {"pi.0": np.ascontiguousarray(pi)})
        with pytest.raises(InputError, match=said):
            verify(tmp_path / "c.json", measured, counts)


@pytest.mark.filterwarnings("error")
def test_contents_that_are_nothing_beside_the_floors_end_without_a_warning() -> None:
    """One expert is nearly all of the load: no content is worth holding."""
    counts = [[1397, 0, 4, 4, 2], [1397, 3, 3, 1, 3], [1394, 0, 1, 0, 1]]
    loads = np.array([0.0, 1.0, 107.0, 118.0, 135.0, 139.0, 261.0, 434.0, 454.0])
    times = np.array([10.0, 17.0, 199.0, 220.0, 248.0, 255.0, 472.0, 773.0, 808.0])
    latency = Latency(((Curve(loads, times, 79 / 45),),))
    problem = Problem.make(counts, (ASSIGNMENTS,), [latency] * 2, [3, 2])
    best_us = optimum(problem)
    found = ContentsSearch(problem, step_bounds(problem), best_us).run(NEVER)
    assert found.bound_us <= best_us * (1 + 1e-12)


def test_step_sizes_are_those_of_rows_that_fall_as_well() -> None:
    """Planes below the floors have negative entries; a norm without them is too small, and the iteration swings."""
    problem = one(12, [4, 4, 4])
    floor_T = step_bounds(problem)
    search, below = ContentsSearch(problem, floor_T, 1.3 * float(problem.weights_T @ floor_T)), False
    for _ in range(6):
        cheap, master = search._look(NEVER), search.master
        assert cheap is not None
        master.hold(np.concatenate([master.used, cheap]))
        rows = np.zeros((len(master.ids), problem.num_experts, master.columns.parts.shape[1]))
        for n, (members, size) in enumerate(zip(master.columns.items, master.columns.size, strict=True)):
            rows[n, members[:size]] = master.columns.parts[n]
        below |= bool((master.columns.parts < 0).any())
        assert master.norm == pytest.approx(np.linalg.norm(rows.reshape(len(rows), -1), 2), rel=0.05)
        master.iterate(40, NEVER)
    assert below
