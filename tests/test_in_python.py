"""Pictures, tables and checks from Python: for notebooks and for the tests of others."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import profile, traces

import gemopt
from gemopt import evaluate, solve
from gemopt.advise import advise
from gemopt.cli import main
from gemopt.conflicts import conflict_graph
from gemopt.costs import fit
from gemopt.evaluate import Evaluation
from gemopt.exceptions import InputError
from gemopt.formats.registry import export, import_placement
from gemopt.formats.tables.kernel import read_table
from gemopt.links import Exchange
from gemopt.migration import relabel
from gemopt.online import Controller, Policy
from gemopt.placement import Placement
from gemopt.profile import Device, Profile, Sample
from gemopt.replay import replay
from gemopt.report import report
from gemopt.result import Result, Status
from gemopt.rules import Apart, Rules
from gemopt.testing import assert_bound_holds, assert_feasible
from gemopt.topology import Level, Topology
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")


@pytest.fixture(scope="module")
def solved() -> tuple[Profile, Traces, Result, Evaluation]:
    measured, routed = profile(), traces()
    result = solve(measured, routed, solver="local-search", patience=2)
    assert result.placement is not None
    return measured, routed, result, evaluate(result.placement, measured, routed)


def test_pictures_are_drawn_on_the_axes_given(solved: tuple[Profile, Traces, Result, Evaluation]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    *_, result, evaluation = solved
    figure, axes = pyplot.subplots(2, 2)
    drawn = [result.plot_history(ax=axes[0, 0]), result.plot_layers(ax=axes[0, 1])]
    drawn += [evaluation.plot_steps(ax=axes[1, 0]), evaluation.plot_stragglers(num_ranks=2, ax=axes[1, 1])]
    assert drawn == list(axes.flat)
    heights = [patch.get_height() for patch in drawn[1].patches]
    np.testing.assert_allclose(heights, [layer.objective_us / result.num_steps for layer in result.per_layer])
    np.testing.assert_allclose(drawn[1].lines[0].get_ydata(), [x.bound_us / result.num_steps for x in result.per_layer])
    np.testing.assert_allclose(drawn[2].lines[0].get_ydata(), evaluation.step_us)
    assert drawn[3].images[0].get_array().shape == (2, 2)
    pyplot.close(figure)
    alone = result.plot_layers()
    assert alone.figure is not figure
    pyplot.close("all")


def test_tables_hold_what_the_documents_hold(
    solved: tuple[Profile, Traces, Result, Evaluation], tmp_path: Path
) -> None:
    pytest.importorskip("pandas")
    measured, _, result, evaluation = solved
    assert result.placement is not None
    layers = result.to_dataframe()
    assert layers["objective_us"].sum() == pytest.approx(result.objective_us)
    assert list(layers["layer_id"]) == [layer.layer_id for layer in result.per_layer]
    steps = evaluation.to_dataframe()
    assert steps["makespan_us"].sum() == pytest.approx(evaluation.objective_us)
    last = (evaluation.makespan_TL[-1, -1], evaluation.straggler_TL[-1, -1])
    assert tuple(steps.iloc[-1][["makespan_us", "straggler"]]) == last
    assert list(replace(evaluation, layer_ids=(3, 7)).to_dataframe().layer_id[:3]) == [3, 7, 3]
    slots = result.placement.to_dataframe()
    assert sorted(slots[(slots.layer_id == 1) & (slots["rank"] == 1)].expert) == sorted(
        result.placement.physical_to_logical[1, 2:]
    )
    slots.to_csv(tmp_path / "slots.csv")
    assert (
        import_placement(tmp_path / "slots.csv", source="csv").physical_to_logical
        == result.placement.physical_to_logical
    ).all()
    samples = measured.to_dataframe()
    of_one = samples[samples["rank"] == 1]
    assert list(of_one.latency_us) == [sample.latency_us for sample in measured.devices[1].samples]
    samples.to_csv(tmp_path / "samples.csv")
    again = read_table(tmp_path / "samples.csv").to_dataframe()
    known = ["rank", "assignments", "active_experts", "latency_us"]
    assert again[known].equals(samples[known])


def test_notebooks_show_a_table_without_markup_of_the_user(solved: tuple[Profile, Traces, Result, Evaluation]) -> None:
    *_, result, evaluation = solved
    shown = result.model_copy(update={"cost_summary": "<script>"})._repr_html_()
    assert f"{result.objective_us / result.num_steps:.1f} us" in shown and "<script>" not in shown
    assert f"{evaluation.quantile_us(0.99):.0f}" in evaluation._repr_html_()


def test_a_comparison_is_a_list_that_is_a_table(solved: tuple[Profile, Traces, Result, Evaluation]) -> None:
    pytest.importorskip("pandas")
    measured, routed, *_ = solved
    rows = pickle.loads(
        pickle.dumps(gemopt.compare(measured, routed, solvers=["linear", "lpt", "branch"], time_limit=1))
    )
    assert isinstance(rows, list) and rows == list(rows)
    table = rows.to_dataframe()
    assert list(table.solver) == ["linear", "lpt", "branch"] and table.status[0] == "feasible"
    assert table.objective_us[1] == rows[1].objective_us
    assert table["ceiling.spread_us"][1] == rows[1].ceiling.spread_us
    shown = rows._repr_html_()
    assert shown.count("<tr>") == 4 and f"<td>{100 * rows[1].change:+z.1f}</td>" in shown and "held out %" in shown


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_dataframe()"), ("matplotlib", "plot_layers()")])
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, package: str, call: str,
                                             solved: tuple[Profile, Traces, Result, Evaluation]) -> None:  # fmt: skip
    solved[2].save(tmp_path / "result.json")
    code = (
        f"import sys; sys.modules[{package!r}] = None\nfrom gemopt import Result\n"
        "from gemopt.exceptions import InputError\n"
        f"try: Result.load({str(tmp_path / 'result.json')!r}).{call}\nexcept InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "pip install" in done.stdout and package in done.stdout


def test_right_answers_pass(solved: tuple[Profile, Traces, Result, Evaluation], tmp_path: Path) -> None:
    measured, routed, result, _ = solved
    assert result.placement is not None
    assert_feasible(result.placement, measured, routed)
    assert_bound_holds(result, measured, routed)
    result.save(tmp_path / "r.json")
    result.placement.save(tmp_path / "p.json")
    measured.save(tmp_path / "m.json")
    routed.save(tmp_path / "t.safetensors")
    assert_feasible(tmp_path / "p.json", tmp_path / "m.json", tmp_path / "t.safetensors")
    assert_bound_holds(tmp_path / "r.json", tmp_path / "m.json", tmp_path / "t.safetensors")


def test_wrong_answers_fail(solved: tuple[Profile, Traces, Result, Evaluation]) -> None:
    measured, routed, result, evaluation = solved
    other = Placement.contiguous(2, 4, 4)
    with pytest.raises(AssertionError, match="has 2"):
        assert_feasible(other, measured)
    with pytest.raises(AssertionError, match="experts"):
        assert_feasible(Placement.contiguous(2, 6, 2), measured, routed)
    spoilt = Placement.contiguous(2, 4, 2)
    twice = np.array(spoilt.physical_to_logical)
    twice[1] = [0, 0, 1, 2]
    object.__setattr__(spoilt, "physical_to_logical", twice)  # past the checks of the constructor
    with pytest.raises(AssertionError, match="no slot for expert 3"):
        assert_feasible(spoilt)
    with pytest.raises(AssertionError, match="bound"):
        assert_bound_holds(result.model_copy(update={"bound_us": 2 * evaluation.objective_us}), measured, routed)
    layers = [result.per_layer[0].model_copy(update={"bound_us": result.per_layer[0].objective_us * 1.2}),
              *result.per_layer[1:]]  # fmt: skip
    with pytest.raises(AssertionError, match="layer 0"):
        assert_bound_holds(result.model_copy(update={"per_layer": layers}), measured, routed)
    with pytest.raises(AssertionError, match="objective"):
        assert_bound_holds(result.model_copy(update={"objective_us": 1.0}), measured, routed)
    with pytest.raises(AssertionError, match="steps"):
        assert_bound_holds(result, measured, routed.steps(slice(0, 5)))


def test_an_answer_says_how_to_make_it_again(
    solved: tuple[Profile, Traces, Result, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, routed, *_ = solved
    made = solve(measured, routed, solver="lpt", slots_per_rank=[3, 4], notice=print, gap=0)
    assert made.origin is not None
    assert made.origin.call == "gemopt.solve(profile, traces, slots_per_rank=[3, 4], solver='lpt')"
    again = eval(made.origin.call, {"gemopt": gemopt, "profile": measured, "traces": routed})
    assert again.placement == made.placement and again.origin.traces_sha256 == made.origin.traces_sha256
    assert solve(measured, routed.steps(slice(1)), solver="lpt").origin.traces_sha256 != made.origin.traces_sha256
    measured.save(tmp_path / "p.json")
    routed.save(tmp_path / "t.safetensors")
    words = ["solve", str(tmp_path / "p.json"), str(tmp_path / "t.safetensors"), "--solver", "lpt", "--result"]
    monkeypatch.setattr("sys.argv", ["/somewhere/gemopt", *words, "a file.json"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*words, "a file.json"])
    read = Result.load("a file.json").origin
    assert read is not None and read.call == f"gemopt {' '.join(words)} 'a file.json'"
    assert read.profile_sha256 == measured.digest() and f"gemopt {gemopt.__version__}" in read.versions


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p, t, _: gemopt.compare(p, t, solvers=[]), "solvers"),
        (lambda p, t, _: gemopt.compare(p, t, threads="2"), "threads: got '2'"),
        (lambda p, t, _: gemopt.compare(p, t, holdout="half"), "holdout"),
        (lambda p, t, _: solve(p, t, gap=np.float32(1)), "gap: got"),
        (lambda p, t, _: solve(p, t, time_limit=np.float32(0)), "time_limit: got"),
        (lambda p, t, _: solve(p, t, time_limit="3"), "time_limit: got '3'; seconds above 0"),
        (lambda p, t, _: solve(p, t, seed=1.5), "seed: got 1.5; a whole number of at least 0"),
        (lambda p, t, _: replay(p, t, window=4.0), "--window: got 4.0"),
        (lambda p, t, _: replay(p, t, throttle="1:1.3@4-8"), "throttle: got 1:1.3@4-8; a Schedule of gemopt"),
        (lambda p, t, _: replay(p, t, migration=3), "migration: got 3; a Migration of gemopt"),
        (lambda p, t, x: gemopt.evaluate(x, p, t, cost=3), "cost: got 3"),
        (lambda p, t, x: gemopt.evaluate(x, None, t, cost="staircase"), "profile: got nothing"),
        (lambda p, t, x: gemopt.evaluate(x, p, t).quantile_us(99), "q: got 99"),
        (lambda p, t, x: Controller(p, x, {"threads": 1}), "policy: got {'threads': 1}"),
        (lambda p, t, x: Policy(thread=1), "Policy.thread: got 1; no such key; did you mean threads?"),
        (lambda p, t, x: Traces(counts=[[[1, 2], [3]]]), "Traces.counts"),
        (lambda p, t, x: advise(p, t, seed=1.5), "--seed: got 1.5"),
        (lambda p, t, x: advise(p, t, model=3), "--model: got 3; a ModelShape of gemopt or the path of one"),
        (lambda p, t, x: report(p, p, t), "answer: got Profile("),
        (lambda p, t, x: relabel(x, Placement.contiguous(1, 2, 2)), "wanted."),
        (lambda p, t, x: fit(t), "profile: got a Traces"),
        (lambda p, t, x: conflict_graph(t, "0"), "layer: got '0'; an index"),
        (lambda p, t, x: assert_bound_holds(x, p, t), "result: got a Placement"),
        (lambda p, t, x: Traces(counts=np.ma.masked_greater(t.counts, 5)), "Traces.counts: got masked values"),
        (lambda p, t, x: gemopt.evaluate(x, p, t, exchange=Exchange()), "says how tokens go over links; give a"),
        (lambda p, t, x: solve(p, t, topology="nvlink-2", exchange={"once_per": "rank"}), "exchange: got {'once_per'"),
        (lambda p, t, x: solve(p, t, topology=8), "topology: got an int; a Topology or the path of one"),
        (lambda p, t, x: solve(p, t, current=x, exclude_ranks=1), "exclude_ranks: got 1; a list of ranks; as in [3]"),
        (lambda p, t, x: solve(p, t, current=x, exclude_ranks="1"), "exclude_ranks: got 1; a list of ranks"),
        (lambda p, t, x: solve(p, t, current=x, exclude_ranks=[True]), "exclude_ranks: got True; ranks 0 to 1"),
        (lambda p, t, x: solve(p, t, current=x, add_ranks=[True]), "add_ranks: got"),
        (lambda p, t, x: solve(p, t, full_slots="no"), "full_slots: got no; True or False"),
        (lambda p, t, x: solve(p, t, allow_one_rank="no"), "allow_one_rank: got no; True or False"),
        (lambda p, t, x: t.select(phase="decode"), "phase: got decode; a Phase of gemopt"),
        (lambda p, t, x: Sample(assignments=True, latency_us=5), "Sample.assignments: got True; a whole number"),
        (lambda p, t, x: Sample(assignments=4, latency_us="5"), "Sample.latency_us: got 5; a number; without quotes"),
        (lambda p, t, x: Sample(assignments=-1, latency_us=5), "Sample.assignments: got -1"),
        (lambda p, t, x: Device(rank=0, samples=[]), "Device.samples: got []"),
        (lambda p, t, x: Profile(devices=[{"rank": 0, "samples": [{"assignments": 1, "latency_us": True}]}]),
         "Profile.devices.0.samples.0.latency_us: got True; a number"),
        (lambda p, t, x: Exchange(dispatch_bytes=True), "Exchange.dispatch_bytes: got True; a whole number"),
        (lambda p, t, x: Topology(node_of_rank=[0, 0], within_node={"bandwith_gbs": 5}),
         "Topology.within_node.bandwith_gbs: got 5; no such key"),
        (lambda p, t, x: Level(bandwidth_gbs="5"), "Level.bandwidth_gbs: got 5; a number; without quotes"),
        (lambda p, t, x: Rules(pinned=[{"experts": [0], "rank": [1]}]), "Rules.pinned.0.rank: got [1]; no such key"),
        (lambda p, t, x: Apart(experts=[1]), "Apart.experts: got [1]"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_one_line(
    call: Callable[[Profile, Traces, Placement], object], said: str, solved: tuple[Profile, Traces, Result, Evaluation]
) -> None:
    measured, routed, result, _ = solved
    assert result.placement is not None
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        call(measured, routed, result.placement)
    assert "\n" not in str(caught.value)


def test_a_result_stands_for_its_placement(solved: tuple[Profile, Traces, Result, Evaluation], tmp_path: Path) -> None:
    measured, routed, result, _ = solved
    assert result.placement is not None
    assert gemopt.evaluate(result, measured, routed).objective_us == result.objective_us
    again = solve(measured, routed, solver="local-search", patience=0, warm_start=result, current=result)
    assert again.objective_us is not None and result.objective_us is not None
    assert again.objective_us <= result.objective_us
    controller = Controller(measured, Placement.contiguous(2, 4, 2))
    controller.confirm(result)
    assert controller.placement == Controller(measured, result).placement == relabel(result, result) == result.placement
    export(result, to="csv", path=tmp_path / "map.csv")
    lost = result.model_copy(update={"placement": None, "status": Status.INFEASIBLE})
    for call in (lambda: gemopt.evaluate(lost, measured, routed), lambda: solve(measured, routed, current=lost)):
        with pytest.raises(InputError, match="a result without one, infeasible; a placement is needed"):
            call()


def test_one_name_is_a_list_of_one(solved: tuple[Profile, Traces, Result, Evaluation]) -> None:
    measured, routed, *_ = solved
    assert [row.solver for row in gemopt.compare(measured, routed, solvers="lpt")] == ["lpt"]
    assert [row.strategy for row in replay(measured, routed, "fitted-once", window=4).rows] == ["fitted-once"]


def test_a_cost_model_by_name(solved: tuple[Profile, Traces, Result, Evaluation]) -> None:
    measured, routed, result, _ = solved
    named = evaluate(result.placement, measured, routed, cost="staircase")
    fitted = evaluate(result.placement, None, routed, cost=fit(measured, model="staircase")[0])
    assert named.objective_us == fitted.objective_us
