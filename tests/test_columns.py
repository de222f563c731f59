"""Columns: placements proven over all contents of ranks, and certificates of them that are checked again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from brute import optimum
from numba import typeof
from safetensors.numpy import load_file
from test_verify import profile, traces

from gemopt.bounds import step_bounds
from gemopt.certificate import UNIT, Certificate, LayerProof, Proof, duals_path
from gemopt.costs import fit
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.result import StoppedBy
from gemopt.solve import solve
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.exact.column_master import Master
from gemopt.solvers.exact.column_space import LEVELS, Space
from gemopt.solvers.size import prover
from gemopt.traces import Traces
from gemopt.verify import verify
from gemopt.verify.case import Case
from gemopt.verify.columns import check_columns

NEVER = np.zeros(1, np.uint8)


def one(experts: int, slots: object = None, *, tile: int = 1) -> Problem:
    cost, _ = fit(profile(tile=tile), model="staircase")
    return problems(cost, traces(experts=experts, layers=1), slots)[0]


@pytest.mark.parametrize(("experts", "slots", "tile"), [(6, None, 1), (7, [2, 2, 3], 16), (5, [0, 3, 2], 1)])
def test_the_optimum_is_found_and_proven(experts: int, slots: object, tile: int) -> None:
    problem = one(experts, slots, tile=tile)
    best_us = optimum(problem)
    outcome = get("columns").solve(problem, Options(deadline=np.inf), None)
    assert outcome.stopped_by is StoppedBy.PROOF
    assert outcome.history[-1].objective_us == pytest.approx(best_us, rel=1e-9)
    assert outcome.bound_us is not None and best_us * (1 - 1e-8) <= outcome.bound_us <= best_us


def test_equal_steps_are_counted_as_one() -> None:
    problem = one(6).select(np.array([0, 1, 0, 2, 1]))
    outcome = get("columns").solve(problem, Options(deadline=np.inf), None)
    assert outcome.stated_steps == outcome.distinct_steps == 3
    assert outcome.history[-1].objective_us == pytest.approx(optimum(problem), rel=1e-9)


@pytest.mark.parametrize("slots", [[2, 2, 2], [2, 2, 3], [0, 3, 3]])
def test_looks_at_a_part_of_the_columns_end_in_the_same_proof(
    slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = one(sum(slots), slots, tile=16)
    monkeypatch.setattr("gemopt.solvers.exact.columns.MANY_COLUMNS", 1)
    monkeypatch.setattr("gemopt.solvers.exact.columns.HELD", 4)
    outcome = get("columns").solve(problem, Options(deadline=np.inf), None)
    assert outcome.stopped_by is StoppedBy.PROOF
    assert outcome.history[-1].objective_us == pytest.approx(optimum(problem), rel=1e-9)


def test_columns_priced_alone_cost_what_they_cost_among_all() -> None:
    problem = one(7, [2, 2, 3], tile=16)
    space, rng = Space.of(problem, step_bounds(problem)), np.random.default_rng(0)
    assert space is not None
    levels = space.levels(optimum(problem), 1)
    mu, pi = rng.random((3, 7, problem.num_steps)), rng.normal(size=7) * 100
    every, found = space.prove(levels, mu, pi, NEVER), space.among(np.arange(0, len(space), 3), levels, mu, pi, NEVER)
    assert every is not None and found is not None
    ids, extra_N = found
    assert len(np.unique(ids)) == len(ids) and np.isin(np.arange(0, len(space), 3), ids).all()
    for k in range(len(space.ranks_K)):
        mine = space.kind(ids) == k
        there_N = every.extra_N[ids[mine]]
        assert extra_N[mine] == pytest.approx(there_N - there_N.min(), abs=1e-9 * float(np.abs(pi).sum()))
    stopped = np.ones(1, np.uint8)
    assert space.prove(levels, mu, pi, stopped) is None and space.among(ids, levels, mu, pi, stopped) is None


def test_step_sizes_follow_the_norms_of_the_rows() -> None:
    problem = one(6, [2, 2, 2], tile=16)
    space = Space.of(problem, step_bounds(problem))
    assert space is not None
    master, rng = Master(space, optimum(problem)), np.random.default_rng(0)
    master.hold(np.zeros(0, np.int64))
    master.iterate(5, np.zeros(1, np.uint8))
    assert master.iterations == 0
    for _ in range(5):
        master.hold(rng.choice(len(space), 20, replace=False))
        held_EN = np.zeros((6, len(master.ids)))
        held_EN[master.columns.items.T, np.arange(len(master.ids))] = 1.0
        costs = (held_EN[:, None] * master.columns.parts.T).reshape(-1, len(master.ids))
        counted = np.vstack([held_EN, np.eye(len(space.count_K))[master.columns.kind].T])
        norms = [np.linalg.norm(rows, 2) for rows in (costs, counted)]
        assert [master.norm, master.norm / master.ratio] == pytest.approx(norms, rel=0.05)


def test_any_multipliers_prove_a_bound() -> None:
    problem = one(6, [2, 2, 2], tile=16)
    space, best_us = Space.of(problem, step_bounds(problem)), optimum(problem)
    assert space is not None
    rng = np.random.default_rng(0)
    for fineness, size in ((0, 0.0), (1, 0.1), (1, 1.0), (2, 100.0)):
        levels = space.levels(best_us * rng.uniform(0.9, 1.5), fineness)
        mu = rng.random((len(levels), 6, problem.num_steps)) ** 3 * size
        found = space.prove(levels, mu, rng.normal(size=6) * size * best_us / 6, NEVER)
        assert found is not None and found.bound_us <= best_us


def test_finer_levels_begin_where_coarser_ones_ended() -> None:
    problem = one(6, [2, 2, 2], tile=16)
    space, best_us = Space.of(problem, step_bounds(problem)), optimum(problem)
    assert space is not None
    master, bounds, levels = Master(space, best_us), [], []
    every = np.arange(len(space))
    master.hold(every)
    for fineness in range(len(LEVELS)):
        master.iterate(20, NEVER)
        for again in (fineness, min(fineness + 1, len(LEVELS) - 1)):
            master.cut(space.levels(best_us * 1.1, again))
            master.hold(every)
            found = space.prove(master.levels_LT, *master.multipliers(), NEVER)
            assert found is not None and found.bound_us <= best_us
            bounds.append(found.bound_us)
            levels.append(len(found.levels_LT))
    assert bounds[::2] == pytest.approx(bounds[1::2], rel=1e-6) and levels[::2] == [1, 3, 12]
    assert bounds[-1] > bounds[0] > 0


def test_columns_and_rows_are_one_placement() -> None:
    problem = one(7, [2, 2, 3])
    space = Space.of(problem, step_bounds(problem))
    assert space is not None
    row = get("lpt").solve(problem, Options(deadline=np.inf), None).row
    assert row is not None
    back = space.row(space.ids(row))
    for group in problem.equal_ranks:
        sets = [{frozenset(r[problem.rank_of_slot == g].tolist()) for g in group} for r in (row, back)]
        assert sets[0] == sets[1]


def test_one_step_needs_no_other_kernels() -> None:
    """Kernels are compiled for one on first use."""
    problem = one(6)
    some = [Space.of(each, step_bounds(each)) for each in (problem, problem.select(np.arange(1)))]
    assert len({typeof(space.features_EFT) for space in some if space is not None}) == 1


def test_what_columns_cannot_do_is_refused_or_said() -> None:
    with pytest.raises(UnsupportedError, match="spare slots"):
        get("columns").solve(one(6, [3, 3, 3]), Options(deadline=np.inf), None)
    wide = one(60)
    assert prover(wide) is None
    outcome = get("columns").solve(wide, Options(deadline=np.inf), None)
    assert "too many contents" in outcome.note and outcome.bound_us is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile, Traces]:
    path = tmp_path_factory.mktemp("columns") / "cert.json"
    result = solve(profile(tile=16), traces(experts=6), solver="columns", certificate=path)
    assert result.status.value == "optimal"
    return path, profile(tile=16), traces(experts=6)


def test_a_columns_proof_is_repeated(made: tuple[Path, Profile, Traces]) -> None:
    path, measured, counts = made
    found = verify(path, measured, counts)
    assert {layer.proof.value for layer in found.layers} == {"columns"}
    assert found.checked_us == pytest.approx(found.objective_us, rel=1e-6)
    given_up = verify(path, measured, counts, most_nodes=1)
    assert given_up.checked_us <= found.checked_us <= found.objective_us
    said = [layer.columns_us or 0.0 for layer in Certificate.load(path).layers]
    assert given_up.checked_us >= sum(said) * (1 - 1e-9)


def test_edited_multipliers_of_contents_are_found(made: tuple[Path, Profile, Traces], tmp_path: Path) -> None:
    path, measured, counts = made
    stated, duals = Certificate.load(path), load_file(duals_path(path))
    higher = duals["price.0"].copy()
    higher[0] += 10**10
    edits = {
        "share.0": ((duals["share.0"] + (1 << 24), "sum to at most"), (-duals["share.0"] - 1, ">= 0")),
        "level.0": ((duals["level.0"] + 10**9, "floor of each step"), (duals["level.0"][:, :-1], "levels and one for")),
        "price.0": ((higher, "from the multipliers"), (duals["price.0"] + (1 << 60), "price: got")),
    }
    falling = np.vstack([duals["level.0"], duals["level.0"][-1:] - 1])
    more = np.vstack([duals["share.0"], duals["share.0"][-1:]])
    stated.write(tmp_path / "c.json", duals | {"level.0": falling, "share.0": more})
    with pytest.raises(InputError, match="levels that rise"):
        verify(tmp_path / "c.json", measured, counts)
    for name, tries in edits.items():
        for values, said in tries:
            stated.write(tmp_path / "c.json", duals | {name: np.ascontiguousarray(values)})
            with pytest.raises(InputError, match=said):
                verify(tmp_path / "c.json", measured, counts)
        stated.write(tmp_path / "c.json", {key: value for key, value in duals.items() if key != name})
        with pytest.raises(InputError, match="must have them"):
            verify(tmp_path / "c.json", measured, counts)


@pytest.mark.parametrize(("slots", "tile"), [([2, 2, 2], 1), ([2, 1, 3], 16), ([0, 4, 2], 16)])
def test_any_whole_multipliers_prove_a_bound(slots: list[int], tile: int) -> None:
    counts, rng = traces(experts=6, layers=1), np.random.default_rng(1)
    cost, _ = fit(profile(tile=tile), model="staircase")
    case = Case(counts.counts[:, 0].astype(np.int64), cost, np.array(slots))
    best_us = optimum(problems(cost, counts, slots)[0])
    layer = LayerProof(layer_id=0, proof=Proof.COLUMNS, row=list(range(6)), objective_us=best_us, bound_us=0.0)
    highest = 0.0
    for size in (0.0, 0.02, 0.2, 2.0) * 5:
        share = rng.dirichlet(np.full(6, 0.3), (2, len(case.counts_TE))).transpose(0, 2, 1)
        rise = rng.integers(0, 10**8, len(case.counts_TE))
        duals = {
            "level.0": np.stack([case.floors_T, case.floors_T + rise]),
            "share.0": np.floor(share * UNIT).astype(np.int64),
            "price.0": np.round(rng.normal(size=6) * size * best_us * 1e6 * 2**12 / 6).astype(np.int64),
        }
        highest = max(highest, check_columns(case, layer, duals).bound_us / best_us)
    assert 0.5 < highest <= 1


def test_a_false_bound_over_contents_is_found(made: tuple[Path, Profile, Traces], tmp_path: Path) -> None:
    """The placement of another solver, called optimal with the multipliers of the best one."""
    path, measured, counts = made
    stated, duals = Certificate.load(path), load_file(duals_path(path))
    solve(measured, counts, solver="linear", certificate=tmp_path / "w.json")
    poor = Certificate.load(tmp_path / "w.json").layers
    assert poor[0].objective_us > 1.01 * stated.layers[0].objective_us
    layers = [
        good.model_copy(update={"row": bad.row, "objective_us": bad.objective_us, "bound_us": bad.objective_us})
        for good, bad in zip(stated.layers, poor, strict=True)
    ]
    total = sum(layer.objective_us for layer in layers)
    lie = stated.model_copy(update={"layers": layers, "objective_us": total, "bound_us": total, "gap": 0.0})
    lie.write(tmp_path / "lie.json", duals)
    with pytest.raises(InputError, match="a placement of"):
        verify(tmp_path / "lie.json", measured, counts)
