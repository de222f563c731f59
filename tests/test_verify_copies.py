"""Certificates of the copies bound: below every placement whatever the multipliers, checked again, every edit found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from brute import placements, random_problem
from safetensors.numpy import load_file
from timed import timed

from gemopt.bounds import copies_proof
from gemopt.certificate import UNIT, Certificate, LayerProof, Proof, duals_path
from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.solve import solve
from gemopt.traces import Traces
from gemopt.verify import verify
from gemopt.verify.case import Case
from gemopt.verify.copies import check_copies

NEVER = np.zeros(1, np.uint8)
LAYER = LayerProof(layer_id=0, proof=Proof.DUAL, row=[], objective_us=0, bound_us=0)
Duals = dict[str, np.ndarray]


def unweighted(seed: int) -> Problem:
    """Ranks that differ, jagged and additive latencies, unequal slots, ranks without slots; steps count alike."""
    found = random_problem(seed, spare=True)
    return Problem.make(found.counts_TE, found.features, found.latencies, found.slots_per_rank)


def case_of(problem: Problem) -> Case:
    cost = SimpleNamespace(features=problem.features, latencies=problem.latencies)
    return Case(problem.counts_TE.astype(np.int64), cost, problem.slots_per_rank)


def drawn(rng: np.random.Generator, problem: Problem, price_ps: int) -> Duals:
    """Multipliers of a few pairs of every step, some pairs twice, that sum to at most one; or all on one pair."""
    steps, experts = problem.counts_TE.shape
    rows = []
    for t in range(steps):
        share_N = rng.dirichlet(np.full(rng.integers(1, 4), 0.5)) * rng.choice([1.0, 1.0, 0.4])
        rows += [(t, rng.integers(experts), int(share * UNIT)) for share in share_N]
    return {"pair.0": np.array(rows, np.int64), "slot.0": np.array([price_ps])}


def test_any_multipliers_prove_a_bound() -> None:
    """Of all placements, those with slots left empty included."""
    rng, raised = np.random.default_rng(0), 0
    for seed in range(150):
        problem = unweighted(seed)
        best_us = min(value for value, _ in placements(problem))
        case = case_of(problem)
        floor_us = case.floors_T.sum() / 1e6
        for scale in (0.0, 0.03, 0.2, 1.0):
            price_ps = int(scale * rng.random() * best_us * 1e6)
            bound_us = check_copies(case, LAYER, drawn(rng, problem, price_ps))
            assert bound_us <= best_us * (1 + 1e-12), (seed, bound_us, best_us)
            raised += bound_us > floor_us + 1e-3
    assert raised >= 100


def test_it_proves_what_the_bound_says() -> None:
    """Rounding takes a millionth. Here even shares on more ranks may take longer, so that it can be above."""
    agreed = 0
    for seed in range(200):
        problem = unweighted(seed)
        case = case_of(problem)
        known = copies_proof(problem, case.floors_T / 1e6, NEVER)
        if known is None:
            continue
        share_N = np.floor(known.share_N * UNIT).astype(np.int64)
        mine = {"pair.0": np.stack([known.step_N, known.expert_N, share_N], 1), "slot.0": [round(known.price * 1e6)]}
        bound_us = check_copies(case, LAYER, {name: np.array(each) for name, each in mine.items()})
        assert bound_us >= (case.floors_T.sum() / 1e6 + known.above_us) * (1 - 1e-6) - 1e-5
        assert bound_us <= min(value for value, _ in placements(problem)) * (1 + 1e-12)
        agreed += 1
    assert agreed >= 20


def turns() -> tuple[Profile, Traces]:
    """Ranks alike, a step for each of six experts in which it alone has work."""
    return timed(range(6), lambda n, _: 5 + n, (0, 100)), Traces(counts=12 * np.eye(6, dtype=np.int64)[:, None])


SLOTS = [1, 1, 1, 1, 1, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a placement that leaves the one spare slot empty."""
    path = tmp_path_factory.mktemp("copies") / "cert.json"
    solve(*turns(), slots_per_rank=SLOTS, solver="linear", certificate=path)
    return path


def test_the_gap_is_certified_with_copies(made: Path, tmp_path: Path) -> None:
    """One spare slot: five of the steps wait for an expert that has one copy."""
    solve(*turns(), slots_per_rank=SLOTS, solver="local-search", patience=0, certificate=tmp_path / "cert.json")
    for path, best_us in ((made, 6 * 17), (tmp_path / "cert.json", 5 * 17 + 11)):
        stated, found = Certificate.load(path), verify(path, *turns())
        assert stated.layers[0].proof is Proof.DUAL
        assert "copies" in found.layers[0].note
        assert found.objective_us == pytest.approx(best_us)
        assert found.checked_us == pytest.approx(5 * 17 + 11, rel=1e-6)
        assert found.checked_us <= found.objective_us and found.claimed_us == pytest.approx(found.checked_us, rel=1e-8)


def changed(duals: Duals, name: str, column: int, more: int) -> Duals:
    array = duals[name].copy()
    array.reshape(len(array), -1)[0, column] += more
    return duals | {name: array}


EDITS: dict[str, tuple[Callable[[Duals], Duals], str]] = {
    "multiplier lower": (lambda d: changed(d, "pair.0", 2, -(1 << 20)), "it was edited"),
    "multiplier higher": (lambda d: changed(d, "pair.0", 2, UNIT), "multipliers"),
    "multiplier negative": (lambda d: changed(d, "pair.0", 2, -2 * UNIT), "multipliers"),
    "multipliers sum to more": (lambda d: d | {"pair.0": np.concatenate([d["pair.0"], d["pair.0"]])}, "sum to at most"),
    "no such step": (lambda d: changed(d, "pair.0", 0, 6), "steps"),
    "negative step": (lambda d: changed(d, "pair.0", 0, -6), "steps"),
    "no such expert": (lambda d: changed(d, "pair.0", 1, 6), "experts"),
    "another expert": (lambda d: changed(d, "pair.0", 1, 1 - 2 * (d["pair.0"][0, 1] == 5)), "it was edited"),
    "price higher": (lambda d: changed(d, "slot.0", 0, 10**6), "it was edited"),
    "price lower": (lambda d: changed(d, "slot.0", 0, -(10**6)), "it was edited"),
    "price negative": (lambda d: d | {"slot.0": np.array([-1])}, "price >= 0"),
    "price negative, nothing else": (lambda d: {"pair.0": d["pair.0"][:0], "slot.0": np.array([-1])}, "price >= 0"),
    "two prices": (lambda d: d | {"slot.0": np.zeros(2, np.int64)}, "a price"),
    "no multipliers": (lambda d: {"slot.0": d["slot.0"]}, "must have them"),
    "no price": (lambda d: {"pair.0": d["pair.0"]}, "must have them"),
    "one column": (lambda d: d | {"pair.0": d["pair.0"][:, 2]}, "step, expert, multiplier"),
    "empty": (lambda d: d | {"pair.0": d["pair.0"][:0]}, "it was edited"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_multipliers_are_found(made: Path, tmp_path: Path, edit: str) -> None:
    """Signed anew with them; with the old digest any other file is refused."""
    duals, copy = load_file(duals_path(made)), tmp_path / "cert.json"
    change, said = EDITS[edit]
    Certificate.load(made).write(copy, change(duals))
    with pytest.raises(InputError, match=said):
        verify(copy, *turns())
    Certificate.load(made).save(copy)
    with pytest.raises(InputError, match="sha256"):
        verify(copy, *turns())


@pytest.mark.parametrize("field", ["bound_us", "copies_us", "objective_us", "gone"])
def test_edited_values_are_found(made: Path, tmp_path: Path, field: str) -> None:
    stated, duals = Certificate.load(made), load_file(duals_path(made))
    for factor in (1 - 1e-5, 1 + 1e-5):
        layer = stated.layers[0]
        values = {"copies_us": None} if field == "gone" else {field: factor * getattr(layer, field)}
        edited = stated.model_copy(update={"layers": [layer.model_copy(update=values)]})
        edited.write(tmp_path / "cert.json", duals)
        with pytest.raises(InputError, match="Certificate"):
            verify(tmp_path / "cert.json", *turns())


def test_a_raised_bound_is_found_whatever_else_is_raised(made: Path, tmp_path: Path) -> None:
    """Totals and gap to match it; what the multipliers prove is less."""
    stated, duals = Certificate.load(made), load_file(duals_path(made))
    layer = stated.layers[0]
    bound_us = 1.001 * layer.bound_us
    layer = layer.model_copy(update={"bound_us": bound_us, "copies_us": bound_us})
    edited = {"layers": [layer], "bound_us": bound_us, "gap": 1 - bound_us / stated.objective_us}
    stated.model_copy(update=edited).write(tmp_path / "cert.json", duals)
    with pytest.raises(InputError, match="copies_us"):
        verify(tmp_path / "cert.json", *turns())


def test_times_with_so_many_copies() -> None:
    """Seven at 4, 1 and 2 us each, floor 4 us: alone 7 us; as 4 and 3 on two ranks 6; as 3, 2 and 2 on three 8."""
    latencies = [Latency(((line(0, slope),),)) for slope in (4, 1, 2)]
    case = case_of(Problem.make(np.array([[7, 0]]), [ASSIGNMENTS], latencies, [1, 1, 2]))
    for price_ps, bound_us in ((0, 6.0), (500_000, 5.5), (1_000_000, 5.0), (2_000_000, 3.0)):
        duals = {"pair.0": np.array([[0, 0, UNIT]]), "slot.0": np.array([price_ps])}
        assert check_copies(case, LAYER, duals) == pytest.approx(bound_us, abs=1e-5)
