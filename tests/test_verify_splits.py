"""Certificates of static, nearest and optimal splits: worth what `evaluate` says, below all, edits are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_copies_bound import cuts, freely_shared
from test_copies_bound import random_problem as few
from test_verify_copies import LAYER, SLOTS, case_of, drawn, turns
from timed import timed

from gemopt.bounds import copies_proof
from gemopt.certificate import UNIT, Certificate, Proof, duals_path
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.placement import Split
from gemopt.profile import Device, Profile, Sample
from gemopt.solve import solve
from gemopt.traces import Traces
from gemopt.traces.tokens import Tokens
from gemopt.verify import copies, verify
from gemopt.verify.case import Case
from gemopt.verify.copies import check_copies
from gemopt.verify.shares import shares

NEVER = np.zeros(1, np.uint8)
Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize("told", [2, 1 << 14], ids=["few times told apart", "all told apart"])
def test_multipliers_prove_a_bound_of_any_shares(told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all placements and all whole shares at every step; rounding takes a millionth of the solver's bound."""
    monkeypatch.setattr(copies, "MOST_TIMES", told)
    rng, raised, agreed = np.random.default_rng(told), 0, 0
    for seed in range(30):
        problem = few(rng, ("staircase", "roofline", "mixed")[seed % 3])
        problem = replace(problem, weights_T=np.ones(problem.num_steps), split=Split.OPTIMAL)
        best_us, case = freely_shared(problem), replace(case_of(problem), split="optimal")
        floor_us = case.floors_T.sum() / 1e6
        for scale in (0.0, 0.1, 0.5):
            bound_us = check_copies(case, LAYER, drawn(rng, problem, int(scale * best_us * 1e6)))
            assert bound_us <= best_us * (1 + 1e-12), (seed, bound_us, best_us)
            raised += bound_us > floor_us + 1e-3
        known = copies_proof(problem, case.floors_T / 1e6, NEVER)
        if known is not None and told > 2:
            pair_N3 = np.stack([known.step_N, known.expert_N, np.floor(known.share_N * UNIT).astype(np.int64)], axis=1)
            bound_us = check_copies(case, LAYER, {"pair.0": pair_N3, "slot.0": np.array([round(known.price * 1e6)])})
            assert (floor_us + known.above_us) * (1 - 1e-6) - 1e-5 <= bound_us <= best_us * (1 + 1e-12)
            agreed += 1
    assert raised >= 5 and (agreed >= 2 or told == 2)


def test_times_of_any_shares_are_the_least() -> None:
    """Against all ways to cut a count among all sets of ranks."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        time_GM = np.cumsum(rng.integers(0, 4, (3, 9)), axis=1)
        count_U = np.array([1, 3, 8])
        found_KU = copies._free_times(time_GM, count_U, 3)
        for k in range(1, 4):
            for n, found in zip(count_U, found_KU[k - 1], strict=True):
                parts = cuts(int(n), 3)
                parts = parts[(parts > 0).sum(axis=1) <= k]
                times = np.where(parts > 0, time_GM[np.arange(3), parts], time_GM.min())
                assert found == max(times.max(axis=1).min(), time_GM.min())


def nodes() -> Profile:
    """Three ranks, one slower, latencies with steps."""
    points = {0: 5.0, 20: 25.0, 21: 30.0, 60: 60.0, 400: 380.0}
    return timed((1.0, 1.0, 1.3), lambda n, speed: points[n] * speed, points)


def sent(seed: int = 0) -> Traces:
    """Six experts, two hot ones, twelve steps of forty tokens from three ranks."""
    rng = np.random.default_rng(seed)
    share_E = np.array([0.35, 0.25, 0.15, 0.1, 0.1, 0.05])
    step_N = np.repeat(np.arange(12), 40)
    ids = rng.choice(6, size=(480, 2, 1), p=share_E)
    counts = np.zeros((12, 2, 6), np.int64)
    for layer in range(2):
        np.add.at(counts[:, layer], (step_N, ids[:, layer, 0]), 1)
    return Traces(counts=counts, tokens=Tokens(ids=ids, step_of_token=step_N, source_rank=rng.integers(0, 3, 480)))


ASKED = {
    "static": {"split": "static"},
    "nearest, as recorded": {"split": "nearest"},
    "nearest, uniform": {"split": "nearest", "senders": "uniform"},
    "optimal": {"split": "optimal"},
    "optimal, activated": {"split": "optimal", "cost": "roofline-1"},
}


@pytest.fixture(scope="module", params=ASKED)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A certificate of a placement with copies, and what `evaluate` says it takes."""
    asked, path = ASKED[request.param], tmp_path_factory.mktemp("splits") / "cert.json"
    profile = nodes() if "cost" not in asked else active()
    found = solve(
        profile, sent(), slots_per_rank=3, solver="local-search", patience=2, time_limit=100, certificate=path, **asked
    )
    assert found.placement is not None and found.placement.has_copies
    return path, evaluate(found.placement, profile, sent(), senders=asked.get("senders")).objective_us


def active() -> Profile:
    """Latencies by activated experts too."""
    points = [(n, a) for n in (0, 20, 60, 400) for a in ((1, 2) if n else (0,))]
    return Profile(
        devices=[
            Device(
                rank=g,
                samples=[Sample(assignments=n, active_experts=a, latency_us=5 + 3 * a + n / slow) for n, a in points],
            )
            for g, slow in enumerate((2, 2, 1.5))
        ]
    )


def of(stated: Certificate) -> Profile:
    return active() if stated.cost.startswith("roofline") else nodes()


def test_objective_and_bound_are_checked(made: tuple[Path, float]) -> None:
    path, worth_us = made
    stated = Certificate.load(path)
    found = verify(path, of(stated), sent())
    assert found.objective_us == pytest.approx(worth_us, rel=1e-9)
    assert 0 < found.checked_us <= found.claimed_us * (1 + 1e-9) <= worth_us * (1 + 1e-9)
    if not stated.cost.startswith("roofline"):
        assert {layer.proof for layer in stated.layers} == {Proof.DUAL}
        assert found.checked_us == pytest.approx(found.claimed_us, rel=1e-6)


def of_layer(**change: Callable[[Any], Any]) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        for name, to in change.items():
            content["layers"][0][name] = to(content["layers"][0][name])

    return edit


EDITS: dict[str, Edit] = {  # of weights and senders: only where the split asks for them
    "placement": of_layer(row=lambda row: row[::-1]),
    "objective": of_layer(objective_us=lambda us: us * (1 + 1e-6)),
    "bound": of_layer(bound_us=lambda us: us * (1 + 1e-4)),
    "a search of even shares": of_layer(proof=lambda _: "tree"),
    "static weights": of_layer(weights=lambda weights: weights[::-1]),
    "static weights of less": of_layer(weights=lambda weights: [0.5 * each for each in weights]),
    "static weights below 0": of_layer(weights=lambda weights: [each - 1 for each in weights]),
    "static weights missing": of_layer(weights=lambda _: []),
    "even": lambda content: content.update(split="even"),
    "another split": lambda content: content.update(split="nearest" if content["split"] != "nearest" else "optimal"),
    "nearest senders": lambda content: content.update(
        senders={"traces": "uniform", "uniform": "traces"}[content["senders"]]
    ),
}


@pytest.mark.parametrize(
    ("made", "edit"),
    [
        (asked, edit)
        for asked in ASKED
        for edit in EDITS
        if edit.split()[0] not in ("static", "nearest") or asked.startswith(edit.split()[0])
    ],
    indirect=["made"],
)
def test_edits_are_found(made: tuple[Path, float], tmp_path: Path, edit: str) -> None:
    """Signed anew, multipliers and shares as they were."""
    path, _ = made
    stated = Certificate.load(path)
    content = stated.model_dump()
    EDITS[edit](content)
    duals = load_file(duals_path(path)) if stated.duals_sha256 else {}
    Certificate(**content).write(tmp_path / "cert.json", duals)
    with pytest.raises(InputError):
        verify(tmp_path / "cert.json", of(stated), sent())


@pytest.mark.parametrize("made", ["optimal", "optimal, activated"], indirect=True)
@pytest.mark.parametrize("change", ["one more", "from one to another", "of another step", "negative", "none"])
def test_edited_shares_are_found(made: tuple[Path, float], tmp_path: Path, change: str) -> None:
    path, _ = made
    stated = Certificate.load(path)
    duals = load_file(duals_path(path))
    part_TC = duals["part.0"].copy()
    row = np.array(stated.layers[0].row)
    shared = row[[slot for slot, expert in enumerate(row) if (row == expert).sum() > 1]]
    pair = np.flatnonzero(shared == shared[0])[:2]
    step = int(part_TC[:, pair[0]].argmax())
    if change == "one more":
        part_TC[0, 0] += 1
    elif change == "from one to another":  # adds up, and takes another time
        part_TC[:, pair[1]] += part_TC[:, pair[0]]
        part_TC[:, pair[0]] = 0
    elif change == "of another step":
        part_TC = np.roll(part_TC, 1, axis=0)
    elif change == "negative":
        part_TC[step, pair[1]] += 2 * part_TC[step, pair[0]]
        part_TC[step, pair[0]] *= -1
    duals = duals | {"part.0": part_TC} if change != "none" else {k: v for k, v in duals.items() if k != "part.0"}
    stated.write(tmp_path / "cert.json", duals)
    with pytest.raises(InputError, match=r"Certificate|part\.0"):
        verify(tmp_path / "cert.json", of(stated), sent())


def test_shares_that_add_up_only_in_64_bits_are_refused() -> None:
    case = Case(np.array([[5, 1]]), None, np.array([2, 1, 1]), "optimal")  # type: ignore[arg-type]
    layer, part_TC = LAYER.model_copy(update={"row": [0, 1, 0, 0]}), np.array([[2, 0, 3]])
    assert shares(case, layer, {"part.0": part_TC}).tolist() == [[2, 1, 0, 3]]
    largest = np.iinfo(np.int64).max
    with pytest.raises(InputError, match="whole parts"):
        shares(case, layer, {"part.0": np.array([[largest, largest, 7]])})


def test_other_senders_are_another_problem(made: tuple[Path, float]) -> None:
    path, _ = made
    stated, traces = Certificate.load(path), sent()
    assert traces.tokens is not None and traces.tokens.source_rank is not None
    elsewhere = replace(traces.tokens, source_rank=(traces.tokens.source_rank + 1) % 3)
    other = Traces(counts=traces.counts, tokens=elsewhere)
    if stated.senders == "traces":
        for given in (other, Traces(counts=traces.counts)):
            with pytest.raises(InputError, match="traces_sha256"):
                verify(path, of(stated), given)
    else:
        assert verify(path, of(stated), other).objective_us == pytest.approx(made[1], rel=1e-9)


@pytest.mark.parametrize("split", ["static", "optimal"])
def test_the_gap_of_scarce_copies_is_certified(split: str, tmp_path: Path) -> None:
    """One spare slot for six experts that are hot in turn: the floors would place a copy anew at every step."""
    path = tmp_path / "cert.json"
    solve(
        *turns(), slots_per_rank=SLOTS, solver="local-search", patience=0, time_limit=100, split=split, certificate=path
    )
    found = verify(path, *turns())
    assert "copies" in found.layers[0].note
    assert found.objective_us == pytest.approx(5 * 17 + 11) == pytest.approx(found.checked_us, rel=1e-6)
