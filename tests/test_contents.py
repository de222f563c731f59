"""All contents of ranks priced by pairs: a bound whatever the multipliers, and its certificate checked again."""

from __future__ import annotations

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
from gemopt.certificate import Certificate, duals_path
from gemopt.costs import fit
from gemopt.exceptions import InputError
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.solve import solve
from gemopt.solvers.exact.contents import Contents, contents_bound
from gemopt.solvers.size import paired
from gemopt.solving import schedule
from gemopt.traces import Traces
from gemopt.verify import verify
from gemopt.verify.contents import least_content

NEVER = np.zeros(1, np.uint8)


def one(experts: int, slots: object, *, tile: int = 1) -> Problem:
    cost, _ = fit(profile(tile=tile), model="staircase")
    return problems(cost, traces(experts=experts, layers=1), slots)[0]


@pytest.mark.parametrize(("experts", "slots"), [(6, [2, 2, 2]), (7, [1, 2, 4]), (5, [0, 3, 2])])
def test_every_content_is_priced(experts: int, slots: list[int]) -> None:
    problem, rng = one(experts, slots, tile=16), np.random.default_rng(0)
    programme = Programme.of(problem, step_bounds(problem))
    space, best_us = Contents.of(programme), optimum(problem)
    shape = (problem.num_steps, programme.planes_CKF.shape[1], experts)
    for size in (0.1, 1.0, 10.0):
        mu, v = feasible(programme, rng.random(shape) ** 3 * size, np.zeros((programme.num_groups, experts)))
        pi_E = rng.normal(size=experts) * best_us / experts
        priced = space.price(mu, pi_E, NEVER)
        assert priced is not None and priced[0] <= best_us
        alone_CE, pair_CEE, _ = costs(programme, mu, v)
        expected = float((programme.weights_T - mu.sum(axis=(1, 2))) @ programme.floor_T) + pi_E.sum()
        for c, factor, count in zip(programme.group_G, programme.factor_G, programme.slots_G, strict=True):
            expected += min(
                sum(factor * alone_CE[c, i] - pi_E[i] for i in some)
                + sum(factor * pair_CEE[c, i, j] for i, j in combinations(some, 2))
                for some in combinations(range(experts), int(count))
            )
        assert priced[0] == pytest.approx(expected, rel=1e-9)
        members = space.members(priced[1])
        parts = space.parts(priced[1][:1], programme.floor_T[None], 2.0)
        loads_T = programme.features_FTE[0][:, members[0, : space.size_K[0]]].sum(axis=1)
        a, b = programme.planes_CKF[space.group_K[0], 0] * space.factor_K[0]
        assert parts[0, : problem.num_steps] == pytest.approx(2 * (a + b * loads_T - programme.floor_T), rel=1e-5)
        assert all(
            len(set(row[:n].tolist())) == n for row, n in zip(members, space.size_K[space.kind(priced[1])], strict=True)
        )


def test_the_iteration_rises_to_a_bound() -> None:
    problem = one(6, [2, 2, 2])
    floor_T, best_us = step_bounds(problem), optimum(problem)
    found = contents_bound(problem, floor_T, NEVER, best_us)
    assert float(problem.weights_T @ floor_T) < found.bound_us <= best_us * (1 + 1e-9)
    assert not paired(one(6, [3, 3, 3])) and not paired(one(60, None)) and not paired(one(3, [1, 1, 1]))


def test_the_least_content_in_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    for experts, size in ((1, 1), (6, 3), (7, 2), (5, 5)):
        alone = [int(x) << 60 for x in rng.integers(-(10**6), 10**6, experts)]
        together = [[int(x) << 60 for x in row] for row in rng.integers(-(10**6), 10**6, (experts, experts))]
        expected = min(
            sum(alone[i] for i in some) + sum(together[i][j] for j, i in combinations(some, 2))
            for some in combinations(range(experts), size)
        )
        assert least_content(alone, together, size, "") == expected
    large = [(1 << 200) + 1, -(1 << 199) - 1]
    assert large[1] - (1 << 152) < least_content(large, [[], [5]], 1, "") <= large[1]
    with pytest.raises(InputError, match="contents of a rank"):
        least_content([0] * 64, [], 32, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile, Traces]:
    path = tmp_path_factory.mktemp("contents") / "cert.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "PAIRED_S", 0.0)
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
