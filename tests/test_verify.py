"""Certificates: what is proved is checked again from the documents, and every edit is found."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json
from safetensors.numpy import load_file, save_file

from gemopt.certificate import UNIT, Certificate, duals_path
from gemopt.costs import fit
from gemopt.exceptions import InputError
from gemopt.profile import Device, Profile, Sample
from gemopt.solve import solve
from gemopt.traces import Traces
from gemopt.verify import case as case_module
from gemopt.verify import tree, verify
from gemopt.verify.case import Case, floor_bound_us, objective_us
from gemopt.verify.contents import Above

ROOT = Path(__file__).resolve().parents[1]


def profile(*, active: bool = False, tile: int = 1) -> Profile:
    devices = []
    for rank, speed in enumerate((1.0, 1.0, 1.07)):
        points = [(n, a) for n in (0, 40, 41, 80, 400) for a in ((1, 4, 8) if active and n else (0,)) if a <= n]
        samples = [
            Sample(
                assignments=n,
                active_experts=a if active else None,
                latency_us=(5 + tile * -(-n // tile) + 3 * a) * speed,
            )
            for n, a in points
        ]
        devices.append(Device(rank=rank, samples=samples))
    return Profile(devices=devices)


def traces(*, steps: int = 24, experts: int = 9, layers: int = 2, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    mean = rng.gamma(1.0, 8.0, (layers, experts))
    return Traces(counts=rng.poisson(mean * rng.gamma(2.0, 0.5, (steps, 1, experts))).astype(np.int64))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile, Traces]:
    """A certificate with multipliers, of a search that is not a proof of its own."""
    path = tmp_path_factory.mktemp("certificate") / "cert.json"
    solve(profile(), traces(), solver="local-search", certificate=path)
    return path, profile(), traces()


def test_a_dual_proof_is_checked_in_full(made: tuple[Path, Profile, Traces]) -> None:
    path, measured, counts = made
    stated, found = Certificate.load(path), verify(path, measured, counts)
    assert {layer.proof.value for layer in stated.layers} == {"dual"}
    assert any(layer.dual_us for layer in stated.layers)
    assert found.checked_us == pytest.approx(stated.bound_us, rel=1e-6)
    assert found.checked_us <= found.objective_us == pytest.approx(stated.objective_us, rel=1e-9)


def test_multipliers_too_large_for_a_certificate_are_left_out(tmp_path: Path) -> None:
    """Ranks that take half a second a step, and the bound of the floors is left."""
    content, path = profile().model_dump(), tmp_path / "cert.json"
    for sample in (sample for device in content["devices"] for sample in device["samples"]):
        sample["latency_us"] *= 1e4
    slow, counts = Profile(**content), traces(steps=30)
    solve(slow, counts, solver="local-search", patience=1, certificate=path)
    assert {layer.dual_us for layer in Certificate.load(path).layers} == {None}
    assert verify(path, slow, counts).checked_us > 0


def test_times_that_64_bits_do_not_hold_bound_nothing_too_high() -> None:
    """Picoseconds of eleven days a step: each counts as less, and no sum of steps becomes negative or too large."""
    samples = [Sample(assignments=n, latency_us=(10.0 + n) * 9e9) for n in (0, 1, 100)]
    slow = Profile(devices=[Device(rank=g, samples=samples) for g in range(3)])
    counts, cost = traces(layers=1).counts[:, 0].astype(np.int64), fit(slow, model="staircase")[0]
    case = Case(counts, cost, np.array([3, 3, 3]))
    row_P = np.arange(9)
    assert 0 < floor_bound_us(case) <= objective_us(case, row_P, counts[:, row_P])
    above = Above(case, 0, [[0, UNIT**4]], UNIT, np.zeros((24, 1, 9), np.int64))
    times_N, planes = above._computed(np.arange(100)[None])
    assert (times_N > 0).all() and (planes[0][1:] >= times_N[1:]).all()


@pytest.mark.parametrize("kind", ["staircase", "tiles", "roofline"])
def test_a_tree_proof_is_searched_again(tmp_path: Path, kind: str) -> None:
    measured = profile(active=kind == "roofline", tile=16 if kind == "tiles" else 1)
    cost, counts = "roofline-1" if kind == "roofline" else "staircase", traces(experts=6, layers=1)
    result = solve(measured, counts, solver="branch", certificate=tmp_path / "c.json", cost=cost)
    assert result.status.value == "optimal"
    found = verify(tmp_path / "c.json", measured, counts)
    assert found.layers[0].proof.value == "tree" and "searched again" in found.layers[0].note
    assert found.checked_us == pytest.approx(found.objective_us, rel=1e-6)
    given_up = verify(tmp_path / "c.json", measured, counts, most_nodes=1)
    assert given_up.checked_us < found.checked_us == pytest.approx(given_up.claimed_us, rel=1e-6)


@pytest.mark.parametrize("kind", ["staircase", "tiles", "roofline"])
def test_a_search_looks_at_the_same_however_many_at_once(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    measured = profile(active=kind == "roofline", tile=16 if kind == "tiles" else 1)
    cost, counts = "roofline-1" if kind == "roofline" else "staircase", traces(experts=6, layers=1)
    best_us = solve(measured, counts, solver="branch", cost=cost).objective_us
    case = Case(counts.counts[:, 0].astype(np.int64), fit(measured, model=cost)[0], np.array([2, 2, 2]))
    monkeypatch.setattr(tree, "PER_NODE", 1)
    found = []
    for entries in (1, 1 << 19):
        monkeypatch.setattr(tree, "BATCH", entries)
        found.append(tree.no_better(case, best_us, 10**6))
        nodes, better = tree.no_better(case, 1.01 * best_us, 10**6)
        assert nodes < 10**6 and better is not None and best_us * (1 - 1e-9) <= better < 1.01 * best_us
    assert found[0] == found[1] and found[0][1] is None


def test_a_search_of_many_experts_over_few_steps_stays_small() -> None:
    """What is looked at together holds the ranks of all experts, too."""
    counts, cost = traces(steps=1, experts=240, layers=1), fit(profile(), model="staircase")[0]
    search = tree._Search(Case(counts.counts[:, 0].astype(np.int64), cost, np.array([80, 80, 80])), 1.0)
    assert 1 < search.together * 240 * 3 <= tree.BATCH


@pytest.mark.parametrize("tabled", [0, 1 << 16])
@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0), (1.0, 1.3, 1.0), (1.0, 1.1, 1.2)], ids=str)
def test_ranks_that_are_alike_share_their_tables(
    monkeypatch: pytest.MonkeyPatch, speeds: tuple[float, ...], tabled: int
) -> None:
    """64 of them near 2^24 assignments took 8 GB. A step's floor is the n-th time of one unit more on any rank."""
    monkeypatch.setattr(case_module, "TABLED", tabled)  # steps of a million assignments are not looked up in tables
    samples = [(0, 5), (16, 8), (17, 9), (32, 9), (33, 7), (90, 30), (110, 20), (400, 80)]
    devices = [
        Device(rank=g, samples=[Sample(assignments=n, latency_us=y * s) for n, y in samples])
        for g, s in enumerate(speeds)
    ]
    cost, counts = fit(Profile(devices=devices), model="staircase")[0], traces(experts=8, layers=1).counts[:, 0]
    case = Case(counts.astype(np.int64), cost, np.array([3, 3, 3]))
    for low in (False, True):
        shared = {id(case.terms(g, low=low)) for g in range(3)}
        assert len(shared) == len(set(speeds))
    loads = np.arange(int(case.most_F[0]) + 1)
    times_GN = np.array([case.floor_ps(latency.low([loads])) for latency in cost.latencies])
    one_more = np.append(0, np.sort(times_GN[:, 1:], axis=None))
    expected = np.maximum(one_more[counts.sum(axis=1)], times_GN[:, 0].max())
    assert np.abs(case.floors_T - expected).max() <= 1


EDITS = {
    "row": lambda c: c["layers"][0]["row"].reverse(),
    "missing expert": lambda c: c["layers"][1]["row"].__setitem__(0, c["layers"][1]["row"][1]),
    "objective": lambda c: c["layers"][0].update(objective_us=0.999 * c["layers"][0]["objective_us"]),
    "bound": lambda c: c["layers"][0].update(bound_us=1.00001 * c["layers"][0]["bound_us"]),
    "dual": lambda c: c["layers"][0].update(dual_us=1.00001 * (c["layers"][0]["dual_us"] or 1.0)),
    "total": lambda c: c.update(objective_us=1.001 * c["objective_us"]),
    "total bound": lambda c: c.update(bound_us=1.001 * c["bound_us"]),
    "gap": lambda c: c.update(gap=0.5 * c["gap"]),
    "plane": lambda c: c["layers"][0]["planes"][0][0].__setitem__(0, c["layers"][0]["planes"][0][0][0] + (1 << 44)),
    "factor": lambda c: c["layers"][0]["factor"].__setitem__(0, 2 * c["layers"][0]["factor"][0]),
    "cost": lambda c: c.update(cost="roofline-1"),
    "huge slots": lambda c: c["slots_per_rank"].__setitem__(0, 10**18),
    "slots below 0": lambda c: c.update(slots_per_rank=[*c["slots_per_rank"], 3, -3]),
    "slots of one layer": lambda c: c["layers"][1]["row"].append(0),
    "huge expert": lambda c: c["layers"][0]["row"].__setitem__(0, 10**30),
}


@pytest.mark.parametrize("signed", [False, True], ids=["digest kept", "digest made anew"])
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_found(made: tuple[Path, Profile, Traces], tmp_path: Path, edit: str, signed: bool) -> None:
    path, measured, counts = made
    content = json.loads(path.read_text())
    EDITS[edit](content)
    copy = tmp_path / "cert.json"
    duals_path(copy).write_bytes(duals_path(path).read_bytes())
    changed = Certificate(**content)
    if signed:
        changed = changed.model_copy(update={"own_sha256": changed.own_digest()})
    changed.save(copy)
    with pytest.raises(InputError, match="Certificate"):
        verify(copy, measured, counts)


def test_edited_multipliers_are_found(made: tuple[Path, Profile, Traces], tmp_path: Path) -> None:
    path, measured, counts = made
    copy = tmp_path / "cert.json"
    copy.write_bytes(path.read_bytes())
    duals = load_file(duals_path(path))
    name = next(name for name in duals if name.startswith("mu"))
    changed = {key: value.copy() for key, value in duals.items()}
    changed[name].ravel()[changed[name].argmax()] -= 1
    save_file(changed, duals_path(copy))
    with pytest.raises(InputError, match="sha256"):
        verify(copy, measured, counts)
    for values, said in ((changed[name] + (1 << 24), "sum to at most"), (-changed[name] - 1, ">= 0")):
        Certificate.load(path).write(copy, changed | {name: values})
        with pytest.raises(InputError, match=said):
            verify(copy, measured, counts)
    Certificate.load(path).write(copy, {key: value for key, value in duals.items() if key != name})
    with pytest.raises(InputError, match="must have them"):
        verify(copy, measured, counts)
    not_numbers = {key: value.astype(np.float64) * np.nan for key, value in duals.items()}
    Certificate.load(path).write(copy, not_numbers)
    with pytest.raises(InputError, match="int64"):
        verify(copy, measured, counts)


def test_truncated_files_and_other_problems_are_refused(made: tuple[Path, Profile, Traces], tmp_path: Path) -> None:
    path, measured, counts = made
    copy = tmp_path / "cert.json"
    copy.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="complete JSON"):
        verify(copy, measured, counts)
    copy.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="copy or rename both"):
        verify(copy, measured, counts)
    duals_path(copy).write_bytes(duals_path(path).read_bytes()[:-8])
    with pytest.raises(InputError, match="sha256"):
        verify(copy, measured, counts)
    with pytest.raises(InputError, match="traces_sha256"):
        verify(path, measured, traces(seed=1))
    with pytest.raises(InputError, match="profile_sha256"):
        verify(path, profile(tile=16), counts)


def test_a_false_bound_of_a_search_is_found(tmp_path: Path) -> None:
    """A tree proof whose placement is not the best: the search again finds a better one."""
    counts = traces(experts=6, layers=1)
    solve(profile(), counts, solver="branch", certificate=tmp_path / "c.json")
    stated = Certificate.load(tmp_path / "c.json")
    worse = solve(profile(), counts, solver="linear", certificate=tmp_path / "w.json")
    poor = Certificate.load(tmp_path / "w.json").layers[0]
    assert worse.objective_us is not None and poor.objective_us > 1.01 * stated.objective_us
    layer = poor.model_copy(update={"proof": stated.layers[0].proof, "bound_us": poor.objective_us, "dual_us": None})
    lie = stated.model_copy(
        update={"layers": [layer], "objective_us": layer.objective_us, "bound_us": layer.bound_us, "gap": 0.0}
    )
    lie.write(tmp_path / "lie.json", {})
    with pytest.raises(InputError, match="a placement of"):
        verify(tmp_path / "lie.json", profile(), counts)


def test_the_command_prints_both_bounds_and_exits_2_on_a_fault(
    made: tuple[Path, Profile, Traces], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, measured, counts = made
    measured.save(tmp_path / "p.json")
    counts.save(tmp_path / "t.safetensors")
    words = ("--profile", tmp_path / "p.json", "--traces", tmp_path / "t.safetensors")
    said = gemopt_json(capsys, "verify", path, *words)
    assert said["checked_us"] <= said["objective_us"] and len(said["layers"]) == 2
    code, out, _ = gemopt(capsys, "verify", path, *words)
    assert code == 0 and "total  certified  claimed" in out  # a table of 80 columns, not a stack
    broken = tmp_path / "broken.json"
    broken.write_bytes(path.read_bytes()[:50])
    code, _, err = gemopt(capsys, "verify", broken, *words)
    assert code == 2 and err.count("\n") == 1


def test_the_verifier_knows_no_solver() -> None:
    """It shares only documents, the compiler, the features and the fit of the cost model with what it checks."""
    allowed = {"certificate", "compiling", "costs", "documents", "exceptions", "latency", "profile", "traces"}
    paths = [*sorted((ROOT / "gemopt" / "verify").glob("*.py")), ROOT / "gemopt" / "certificate.py"]
    assert len(paths) == 13
    for path in paths:
        tree = ast.parse(path.read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        rooms = {module.split(".")[1] for module in modules if module.startswith("gemopt.")}
        assert rooms <= allowed | {"verify"}, (path, rooms)
