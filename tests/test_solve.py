"""`gemopt.solve` as its user calls it: what is known, why it stopped, and that nothing is taken on trust."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest

import gemopt
from gemopt.evaluate import objective
from gemopt.exceptions import InputError, SolverError, UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.links import Exchange
from gemopt.placement import EMPTY, Placement
from gemopt.problem import Problem
from gemopt.profile import Device, MoeShape, Profile, Sample
from gemopt.result import Result, Status, StoppedBy
from gemopt.solvers import REGISTRY
from gemopt.solvers.base import Options, Outcome, Row, Supports, incumbent
from gemopt.solving.layers import Layer, Standing
from gemopt.traces import Traces

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"


def profile(factors: list[float], *, per_assignment: float = 0.4) -> Profile:
    loads = (0, 1, 40, 400)
    return Profile(
        devices=[
            Device(rank=rank, samples=[Sample(assignments=n, latency_us=f * (10 + per_assignment * n)) for n in loads])
            for rank, f in enumerate(factors)
        ]
    )


def traces(*, steps: int = 30, layers: int = 3, experts: int = 8, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    heat = rng.gamma(0.8, 8.0, (layers, experts))
    return Traces(counts=rng.poisson(heat * rng.uniform(0.5, 1.5, (steps, 1, 1))))


def test_result_says_what_is_known() -> None:
    given = traces()
    result = gemopt.solve(profile([1, 1.1, 1.2, 0.9]), given, solver="local-search", patience=2)
    assert result.placement is not None
    assert result.objective_us is not None
    assert result.bound_us is not None
    score = gemopt.evaluate(result.placement, profile([1, 1.1, 1.2, 0.9]), given)
    assert score.objective_us == pytest.approx(result.objective_us, rel=1e-12)
    assert 0 < result.bound_us <= result.objective_us
    assert result.gap == pytest.approx(1 - result.bound_us / result.objective_us)
    assert sum(layer.objective_us or 0 for layer in result.per_layer) == pytest.approx(result.objective_us)
    assert [layer.layer_id for layer in result.per_layer] == [0, 1, 2]
    assert result.history[-1].objective_us == pytest.approx(result.objective_us)
    assert "at most" in result.summary()


@pytest.mark.parametrize("topology", [None, "2x2-ib400"])
@pytest.mark.parametrize("solver", ["linear", "lpt", "conflict", "gem", "local-search"])
def test_history_ends_with_the_answer(solver: str, topology: str | None) -> None:
    """Of solvers that make one placement, or heed no links, that is all of it."""
    given = profile([1, 1.1, 1.2, 0.9]), traces()
    exchange = None if topology is None else Exchange(dispatch_bytes=20, combine_bytes=40, once_per="assignment")
    found = gemopt.solve(*given, solver=solver, patience=1, topology=topology, exchange=exchange)
    assert found.history[-1].objective_us == pytest.approx(found.total_us)
    assert found.history[-1].seconds <= found.seconds
    values = [point.objective_us for point in found.history]
    assert values == sorted(values, reverse=True)


def test_one_rank_and_one_expert_are_proven_at_once() -> None:
    alone = gemopt.solve(profile([1.0]), traces(), solver="lpt", allow_one_rank=True)
    assert (alone.status, alone.stopped_by) == (Status.OPTIMAL, StoppedBy.PROOF)
    assert alone.gap == pytest.approx(0.0, abs=1e-6)
    single = gemopt.solve(profile([1.0]), traces(experts=1), solver="linear", allow_one_rank=True)
    assert single.status is Status.OPTIMAL


def test_steps_without_work_cost_the_idle_latency() -> None:
    idle = Traces(counts=np.zeros((5, 1, 4), dtype=int), allow_idle=True)
    result = gemopt.solve(profile([1.0, 2.0]), idle, solver="local-search", patience=0)
    assert result.objective_us == pytest.approx(5 * 20.0)
    assert result.status is Status.OPTIMAL


def test_auto_proves_small_layers() -> None:
    result = gemopt.solve(profile([1, 1.3]), traces(experts=6, layers=2, steps=10), time_limit=20.0)
    assert result.status is Status.OPTIMAL
    assert result.stopped_by is StoppedBy.PROOF


def test_warm_start_is_never_worsened(tmp_path: Path) -> None:
    given, devices = traces(experts=12), profile([1, 1.1, 1.2, 0.9])
    best = gemopt.solve(devices, given, solver="local-search", patience=20)
    assert best.placement is not None
    best.placement.save(tmp_path / "warm.json")
    for solver in ("local-search", "gem"):
        again = gemopt.solve(devices, given, solver=solver, warm_start=tmp_path / "warm.json", patience=0)
        assert again.objective_us is not None
        assert best.objective_us is not None
        assert again.objective_us <= best.objective_us * (1 + 1e-12)


def test_paths_are_as_good_as_objects(tmp_path: Path) -> None:
    given, devices = traces(), profile([1, 1.2])
    given.save(tmp_path / "t.safetensors")
    devices.save(tmp_path / "p.json")
    by_path = gemopt.solve(tmp_path / "p.json", tmp_path / "t.safetensors", solver="lpt")
    assert by_path.objective_us == gemopt.solve(devices, given, solver="lpt").objective_us
    by_path.save(tmp_path / "r.json")
    assert Result.load(tmp_path / "r.json") == by_path


def test_more_slots_never_hurt() -> None:
    given, devices = traces(experts=8), profile([1.0, 1.0, 1.0, 1.0])
    few = gemopt.solve(devices, given, solver="local-search", patience=5)
    more = gemopt.solve(devices, given, solver="local-search", patience=5, slots_per_rank=4)
    assert more.objective_us is not None
    assert few.objective_us is not None
    assert more.objective_us <= few.objective_us * (1 + 1e-12)


def test_relabelling_equal_ranks_changes_nothing() -> None:
    """Without copies: with them the even split gives its remainders in slot order."""
    given = traces(experts=8, layers=1)
    devices = profile([1.0, 1.0, 1.5])
    result = gemopt.solve(devices, given, solver="local-search", patience=5, slots_per_rank=[3, 3, 2])
    assert result.placement is not None
    row = result.placement.physical_to_logical[0]
    swapped = np.concatenate([row[3:6], row[:3], row[6:]])
    other = Placement(physical_to_logical=swapped[None], slots_per_rank=[3, 3, 2], num_experts=8)
    assert gemopt.evaluate(other, devices, given).objective_us == pytest.approx(result.objective_us, rel=1e-12)


def test_an_interrupt_ends_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while layers are being solved: every layer still returns its incumbent."""
    import sys

    import gemopt.solving.schedule

    module = sys.modules["gemopt.solving.schedule"]
    real, fired = module.wait, threading.Event()

    def interrupted(*arguments: object, **keywords: object) -> object:
        if not fired.is_set():
            fired.set()
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, "wait", interrupted)
    begin = time.monotonic()
    result = gemopt.solve(profile([1, 1.1, 1.2, 0.9]), traces(experts=16), solver="local-search", time_limit=300.0)
    assert result.placement is not None
    assert result.stopped_by is StoppedBy.INTERRUPT
    assert time.monotonic() - begin < 250


def test_layers_are_told_of_while_they_get_better() -> None:
    told: list[list[Standing]] = []
    threads: set[int] = set()

    def on_layers(layers: list[Standing]) -> None:
        told.append(layers)
        threads.add(threading.get_ident())

    given = traces(experts=16, layers=3)
    result = gemopt.solve(profile([1, 1.1, 1.2, 0.9]), given, patience=3, time_limit=60, on_layers=on_layers)
    assert threads == {threading.get_ident()} and {len(each) for each in told} == {3}
    for before, after in zip(told, told[1:], strict=False):
        for old, new in zip(before, after, strict=True):
            assert old.bound_us <= new.bound_us
            assert old.objective_us is None or (new.objective_us or 0) <= old.objective_us
    assert sum(each.objective_us or 0 for each in told[-1]) == pytest.approx(result.objective_us)
    assert sum(each.bound_us for each in told[-1]) == pytest.approx(result.bound_us)


class _Liar:
    """A solver that returns what it is told to."""

    name = "liar"
    supports = Supports()
    row: Row = np.array([0])
    bound = 0.0

    def solve(self, problem: object, options: Options, warm_start: Row | None) -> Outcome:
        return Outcome(self.row, StoppedBy.ITERATIONS, bound_us=self.bound)


@pytest.mark.parametrize(
    ("row", "bound", "complaint"),
    [([0, 0], 0.0, "infeasible row"), ([0, 1], 1e9, "bound"), ([0, 1, -1], 0.0, "infeasible row")],
)
def test_a_solver_that_lies_is_caught(
    monkeypatch: pytest.MonkeyPatch, row: list[int], bound: float, complaint: str
) -> None:
    import sys

    import gemopt.solve

    monkeypatch.setattr(_Liar, "row", np.array(row))
    monkeypatch.setattr(_Liar, "bound", bound)
    monkeypatch.setattr(sys.modules["gemopt.solving.options"], "get", lambda name: _Liar())
    with pytest.raises(SolverError, match=complaint):
        gemopt.solve(profile([1, 1]), traces(experts=2, layers=1), solver="liar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_limit": 0.0}, "time_limit"),
        ({"time_limit": float("nan")}, "time_limit"),
        ({"gap": 1.0}, "gap"),
        ({"gap": -0.1}, "gap"),
        ({"threads": 0}, "threads"),
        ({"patience": -1}, "patience"),
        ({"seed": -1}, "seed: got -1; a whole number of at least 0"),
        ({"time_limit": "5"}, "time_limit"),
        ({"time_limit": 10**400}, "time_limit"),
        ({"gap": None}, "gap"),
        ({"threads": 2.5}, "threads"),
        ({"threads": True}, "threads"),
        ({"patience": 1.5}, "patience"),
        ({"seed": None}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"move_price": "5us"}, "move_price"),
        ({"max_moves": 1.5}, "max_moves: got 1.5; a whole number"),
        ({"cost": 3}, "cost: got 3"),
        ({"solver": ["gem"]}, "known solvers"),
        ({"slots_per_rank": 1}, "slots_per_rank"),
        ({"slots_per_rank": 9}, "slots_per_rank"),
        ({"slots_per_rank": [4, 4]}, "slots_per_rank"),
        ({"solver": "magic"}, "known solvers"),
        ({"cost": "cubic"}, "cost model"),
        ({"solver": "eplb", "slots_per_rank": [3, 3, 2, 2]}, "use .*local-search"),
    ],
)
def test_bad_options_name_themselves(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        gemopt.solve(profile([1, 1, 1, 1]), traces(), **changes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_refusals_are_their_own_kind() -> None:
    with pytest.raises(UnsupportedError):
        gemopt.solve(profile([1, 1]), traces(experts=5), solver="eplb")


def test_a_profile_of_another_network_is_named() -> None:
    def notes(**model: int) -> list[str]:
        measured = profile([1, 2]).model_copy(update={"model": MoeShape(**model)})
        return gemopt.solve(measured, traces(experts=4), solver="linear").notes

    assert any("experts: 64, not 4" in note for note in notes(num_experts=64))
    assert not any("another network" in note for note in [*notes(num_experts=4, top_k=2), *notes()])


def test_real_traces_on_real_latencies() -> None:
    """The demo's promise in small: on one slow GPU, knowing speeds beats counting tokens, also on unseen steps."""
    from gemopt.compare import compare
    from gemopt.formats.tables.kernel import Unit, read_fleet, read_table, slow_down, what_if

    table = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    cluster = what_if(table, read_fleet(DATA / "gpu_variability.csv", "longhorn_sgemm"), ranks=8)
    given = Traces.load(DATA / "gptoss20b_trace_mixed_b64.npz")
    some = Traces(counts=given.counts[:200, :4])
    rows = {
        row.solver: row
        for row in compare(slow_down(cluster, 3, 1.3), some, solvers=["linear", "eplb", "local-search"], patience=5)
    }
    ours, eplb = rows["local-search"], rows["eplb"]
    assert ours.holdout_change is not None
    assert eplb.holdout_change is not None
    assert ours.holdout_change < eplb.holdout_change - 0.04
    assert ours.objective_us is not None
    assert all(row.bound_us is not None and row.bound_us <= ours.objective_us for row in rows.values())


def test_every_registered_solver_answers() -> None:
    given, devices = traces(experts=6, layers=1, steps=8), profile([1, 1.2])
    values = {}
    for name in REGISTRY:
        result = gemopt.solve(devices, given, solver=name, time_limit=20.0, patience=5)
        assert result.placement is not None, name
        values[name] = result.objective_us
    best = min(value for value in values.values() if value is not None)
    for exact in ("cpsat", "milp", "auto"):
        assert values[exact] == pytest.approx(best, rel=1e-6)


def test_where_all_slots_must_be_full_answers_are_held_against_experts_in_order_with_copies() -> None:
    problem = Problem.make([[1, 1, 90, 90]], (ASSIGNMENTS,), [Latency(((line(0.0, 1.0),),))] * 2, 3, full=True)
    layer, row = Layer(problem, None, 0), np.array([0, 1, EMPTY, 2, 3, EMPTY])
    layer.compare_with(row)
    told = Outcome(np.array([2, 3, 0, 1, 2, 0]), StoppedBy.TIME_LIMIT, history=[incumbent(1e9)], reached=False)
    found = layer.no_worse(told).row
    assert found is not None and (found != EMPTY).all() and (found[row != EMPTY] == row[row != EMPTY]).all()
    assert layer.no_worse(told).history[-1].objective_us == objective(problem, found)


def test_threads_may_be_a_number_of_numpy() -> None:
    threads = cast(int, np.int64(2))
    result = gemopt.solve(profile([1, 2]), traces(experts=4, layers=1, steps=2), threads=threads, time_limit=5.0)
    assert result.placement is not None
