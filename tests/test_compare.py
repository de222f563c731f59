"""Rows of a comparison: baseline, shared bound, held-out steps, and what must never be hidden."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_inputs import gemopt_json, write_inputs
from timed import timed

from gemopt.compare import compare
from gemopt.costs import fit
from gemopt.evaluate import evaluate, objective
from gemopt.exceptions import InputError, SolverError
from gemopt.placement import Placement
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import Result, Status, StoppedBy, relative_gap
from gemopt.solvers.base import Options, Outcome, Row, Supports
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")


@pytest.fixture(scope="module")
def inputs() -> tuple[Profile, Traces]:
    rng = np.random.default_rng(7)
    measured = timed(range(2), lambda n, g: (9.0 + n) * (1 + g / 5), (0, 8, 40, 90))
    return measured, Traces(counts=rng.integers(0, 30, (20, 2, 6)))


def test_without_the_baseline_changes_are_still_against_it(inputs: tuple[Profile, Traces]) -> None:
    profile, traces = inputs
    rows = compare(profile, traces, solvers=("lpt", "local-search"), holdout=0.25, time_limit=5, patience=2)
    given, held = traces.split(0.25)
    contiguous = Placement.contiguous(2, 6, 2)
    for row in rows:
        base = evaluate(contiguous, profile, given).objective_us
        assert row.objective_us is not None and row.change == pytest.approx(row.objective_us / base - 1)
        base = evaluate(contiguous, profile, held).objective_us
        assert row.holdout_us is not None and row.holdout_change == pytest.approx(row.holdout_us / base - 1)
        assert row.p50_us is not None and row.p99_us is not None and row.p50_us <= row.p99_us


def test_contiguous_with_spare_slots_keeps_its_slots(inputs: tuple[Profile, Traces]) -> None:
    rows = compare(*inputs, solvers=("linear",), slots_per_rank=4, time_limit=2)
    assert rows[0].change == 0 and rows[0].holdout_change == 0


def test_a_fitted_cost_model_may_be_given(inputs: tuple[Profile, Traces]) -> None:
    cost, _report = fit(inputs[0], model="staircase")
    a = compare(*inputs, solvers=("lpt",), cost=cost, time_limit=2)
    b = compare(*inputs, solvers=("lpt",), cost="staircase", time_limit=2)
    assert a[0].objective_us == b[0].objective_us


def test_every_result_is_told_as_it_comes(inputs: tuple[Profile, Traces]) -> None:
    seen: list[tuple[str, Any]] = []
    compare(*inputs, solvers=("linear", "lpt"), time_limit=2, on_result=lambda row, r: seen.append((row.solver, r)))
    assert [name for name, _result in seen] == ["linear", "lpt"] and all(isinstance(r, Result) for _name, r in seen)


def test_unknown_solvers_and_impossible_splits(inputs: tuple[Profile, Traces]) -> None:
    with pytest.raises(InputError, match="known solvers"):
        compare(*inputs, solvers=("magic",))
    with pytest.raises(InputError, match="holdout"):
        compare(*inputs, holdout=1.0)


def test_a_bound_above_an_objective_is_a_defect(
    inputs: tuple[Profile, Traces], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["gemopt.compare"]  # `gemopt.compare` is the function
    honest = module.solve

    def lying(*arguments: Any, **options: Any) -> Result:
        result = honest(*arguments, **options)
        if options["solver"] == "lpt" and result.objective_us is not None:
            return result.model_copy(update={"bound_us": 2 * result.objective_us})
        return result

    monkeypatch.setattr(module, "solve", lying)
    with pytest.raises(SolverError, match=r"bound .* of lpt is above linear's objective"):
        compare(*inputs, solvers=("linear", "lpt"), time_limit=2)


@pytest.mark.parametrize(
    ("value", "bound", "gap"),
    [(10.0, 9.0, 0.1), (10.0, 10.0, 0.0), (10.0, 11.0, 0.0), (0.0, 0.0, 0.0), (10.0, -5.0, 1.0), (None, 1.0, None)],
)
def test_gaps(value: float | None, bound: float | None, gap: float | None) -> None:
    assert relative_gap(value, bound) == (None if gap is None else pytest.approx(gap))
    assert relative_gap(bound, None) is None


def test_summaries() -> None:
    fields: dict[str, Any] = {"solver": "milp", "stopped_by": StoppedBy.TIME_LIMIT, "seconds": 1.5, "num_steps": 4}
    nothing = {"objective_us": None, "bound_us": None, "gap": None, "placement": None}
    assert (
        Result(status=Status.UNKNOWN, **fields, **nothing).summary() == "milp: unknown, stopped by time_limit, 1.50 s"
    )
    found = Result(status=Status.FEASIBLE, **fields, **{**nothing, "objective_us": 40.0, "gap": 0.05, "bound_us": 38.0})
    assert "10.0 us per step" in found.summary() and "5.00 %" in found.summary()


def test_pictures_show_every_solver(inputs: tuple[Profile, Traces]) -> None:
    pytest.importorskip("matplotlib")
    from gemopt.plotting import plot_comparison, plot_history, plot_stragglers
    from gemopt.solve import solve

    rows = compare(*inputs, solvers=("linear", "lpt", "eplb"), time_limit=2)
    axes = plot_comparison(rows)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lpt", "eplb"]  # against contiguous
    widths = sorted(round(patch.get_width(), 6) for patch in axes.patches)
    assert widths == sorted(round(100 * (v or 0.0), 6) for row in rows[1:] for v in (row.change, row.holdout_change))
    result = solve(*inputs, solver="local-search", patience=2)
    assert len(plot_history(result).lines) == 2
    empty = result.model_copy(update={"history": [], "bound_us": None})
    assert not plot_history(empty).lines
    assert result.placement is not None
    evaluation = evaluate(result.placement, *inputs)
    axes = plot_stragglers(replace(evaluation, layer_ids=(4, 7)), 2)
    np.testing.assert_allclose(axes.images[0].get_array().sum(axis=1), 1.0)
    assert axes.yaxis.get_major_formatter().format_ticks([0, 0.5, 1]) == ["4", "", "7"]
    assert evaluation.layer_ids == inputs[1].layer_ids


class Partly:
    """Stands in for an exact solver: reaches some of the layers."""

    name = "partly"
    supports = Supports(proves=True, improves=True)
    reached: tuple[bool, ...] = ()

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def solve(self, problem: Problem, options: Options, warm_start: Row | None) -> Outcome:
        assert warm_start is not None
        number = self.numbers.setdefault(id(problem), len(self.numbers))  # those that were cut are searched once more
        start, reached = objective(problem, warm_start), self.reached[number]
        return Outcome(
            warm_start, StoppedBy.TIME_LIMIT, start_us=start, own_bound_us=0.5 * start if reached else None,
            stated_steps=5, distinct_steps=10, reached=reached, note="" if reached else "no time",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("reached", "words"),
    [
        ((False,) * 4, "did not run: its time was over before it began"),
        ((True, False, True, False), "ran on 2 of 4 layers, on 10 of 20 distinct steps, added nothing to its start"),
        ((True,) * 4, "ran on 4 of 4 layers, on 20 of 40 distinct steps, added nothing to its start, own bound"),
    ],
)
def test_a_row_says_who_earned_it(
    inputs: tuple[Profile, Traces], monkeypatch: pytest.MonkeyPatch, reached: tuple[bool, ...], words: str
) -> None:
    from gemopt.cli.tables import comparison_table

    traces = Traces(counts=np.random.default_rng(7).integers(0, 30, (20, 4, 9)))

    asked: Any = sys.modules["gemopt.solving.options"]
    real = asked.get
    monkeypatch.setattr(Partly, "reached", reached)
    monkeypatch.setattr(
        sys.modules["gemopt.solving.options"], "get", lambda name: Partly() if name == "partly" else real(name)
    )
    rows = compare(inputs[0], traces, solvers=["lpt", "partly"], holdout=0, time_limit=60, patience=0, threads=1)
    assert rows[0].ran and not rows[0].earned() and words in rows[1].earned()
    assert rows[1].ran is any(reached)
    table = comparison_table(rows)
    names = [str(cell) for cell in table.columns[0].cells]
    totals = [str(cell) for cell in table.columns[1].cells]
    assert names == ["lpt", "partly *" if any(reached) else "partly"]
    assert (totals[1] == "-") is not any(reached)
    assert f"partly: {words[:11]}" in str(table.caption)


def test_a_row_that_nothing_was_left_for_says_so(inputs: tuple[Profile, Traces]) -> None:
    """No time limit would help a solver that had nothing left to do; a refusal tells the way out."""
    same, level = timed(range(2), lambda n, g: 9.0 + n, (0, 8, 40, 90)), Traces(counts=np.full((6, 2, 6), 4))
    rows = compare(same, level, solvers=["cpsat"], holdout=0, time_limit=30)
    assert all(row.status is Status.OPTIMAL and not row.ran for row in rows)
    assert all(row.earned() == "did not run: the placement that it begins with is proven optimal" for row in rows)
    assert not any("time-limit" in row.note for row in rows)
    refused = compare(*inputs, solvers=["linear", "columns"], holdout=0, slots_per_rank=4, time_limit=5)[1]
    assert refused.note.startswith("columns cannot use spare slots; use linear, round-robin, eplb, ")


def test_compare_within_what_an_engine_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", *write_inputs(tmp_path), "--slots-per-rank", 3, "--patience", 2, "--time-limit", 60)
    rows = gemopt_json(capsys, *words, "--engine", "sglang", "--solvers", "local-search,branch")
    assert rows[0]["objective_us"] > 0
    assert rows[1]["objective_us"] is None and "branch" in rows[1]["note"], "which leaves slots empty"
    assert gemopt_json(capsys, *words, "--solvers", "branch")[0]["objective_us"] > 0
