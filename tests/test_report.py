"""The report page: its numbers, what it leaves out and refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("plotly")
from cli_inputs import gemopt, gemopt_json, traces
from reported import EXPERTS, FITTED, LAYERS, RANKS, STEPS
from timed import timed

from gemopt import solve
from gemopt.conflicts import conflict_graph
from gemopt.evaluate import evaluate
from gemopt.links import Exchange
from gemopt.migration import count_moves
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay import STRATEGIES, ReplayResult
from gemopt.report import Report, report
from gemopt.report.experts import layer_conflicts
from gemopt.report.numbers import intervals, moved, windows
from gemopt.report.sketch import sketch
from gemopt.report.style import BEFORE, SLOWEST
from gemopt.result import Result
from gemopt.traces import Traces


@pytest.fixture(scope="module")
def folder(report_folder: Path) -> Path:
    return report_folder


@pytest.fixture(scope="module")
def made(report_page: Report) -> Report:
    return report_page


def words(folder: Path, answer: str = "result.json", *more: object) -> tuple[object, ...]:
    given = ("--profile", folder / "profile.json", "--traces", folder / "traces.safetensors")
    return ("report", folder / answer, *given, *more)


def section(page: Report, name: str) -> Any:
    return next(each for each in page.sections if each.name == name)


def array(value: Any) -> np.ndarray:
    """An array, also where it is written as plotly takes it: type, base64 and shape."""
    if not isinstance(value, dict):
        return np.asarray(value)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    return flat.reshape([int(each) for each in value["shape"].split(",")]) if "shape" in value else flat


def test_strategies_of_a_replay_can_be_told_apart(folder: Path) -> None:
    """Two oranges with the same dashes were one: those of fitted-once and clairvoyant, the fewest and most moves."""
    kept = ReplayResult.load(folder / "replay.json")
    every = [kept.timeline[0].model_copy(update={"strategy": name}) for name in STRATEGIES]
    given = (folder / "placement.json", folder / "profile.json", folder / "traces.safetensors")
    made = section(report(*given, replay=kept.model_copy(update={"timeline": every})), "replay")
    lines = [(each.name, {SLOWEST: BEFORE}.get(each.line.color, each.line.color), each.line.dash)
             for each in made.figure.data]  # fmt: skip
    assert len(set(lines)) == len({line[1:] for line in lines}) == len(STRATEGIES)


def test_a_replay_of_other_documents_is_named(folder: Path, made: Report) -> None:
    assert "than this page" not in section(made, "replay").text
    given, replayed = (folder / "placement.json", folder / "profile.json"), folder / "replay.json"
    other = report(*given, Traces.load(folder / "traces.safetensors").steps(slice(0, FITTED)), replay=replayed)
    assert "It is of other traces than this page." in section(other, "replay").text


def test_the_headline_is_what_evaluate_finds(folder: Path, made: Report) -> None:
    routed, measured = Traces.load(folder / "traces.safetensors"), Profile.load(folder / "profile.json")
    before, after = Placement.load(folder / "other.json"), Placement.load(folder / "placement.json")
    change = [
        evaluate(after, measured, steps).objective_us / evaluate(before, measured, steps).objective_us - 1
        for steps in (routed.steps(slice(0, FITTED)), routed.steps(slice(FITTED, None)))
    ]
    said = [float(number) for number in re.findall(r"([0-9.]+) %", made.headline)]
    assert said[:2] == [round(100 * abs(each), 1) for each in change] and change[0] < 0
    assert (
        "<dt>answer: call</dt><dd>gemopt.solve(profile, traces, solver=&#x27;local-search&#x27;, patience=1)"
        in made.html
    )
    assert f"over {FITTED} steps" in made.headline and f"on {STEPS - FITTED} steps it did not see" in made.headline
    assert "than the baseline other.json" in made.headline
    said_alone = made.headline.replace("other.json", "")
    assert said_alone.count(".") - len(re.findall(r"\d\.\d", said_alone)) == 1  # one sentence


def test_what_was_cut_short_is_told_on_the_page(folder: Path) -> None:
    found = Result.load(folder / "result.json").model_copy(update={"notes": ["the bounds were cut short"]})
    page = report(found, folder / "profile.json", folder / "traces.safetensors")
    assert "To know: the bounds were cut short." in next(each for each in page.sections if each.name == "makespan").text


def test_layers_ranks_and_latencies_are_those_of_evaluate(folder: Path, made: Report) -> None:
    routed, measured = Traces.load(folder / "traces.safetensors"), Profile.load(folder / "profile.json")
    given = routed.steps(slice(0, FITTED))
    found = evaluate(Placement.load(folder / "placement.json"), measured, given)
    bars = section(made, "makespan").figure.data
    np.testing.assert_allclose(bars[1].y, found.per_layer_us / FITTED, rtol=1e-6)
    assert (np.array(bars[2].y) <= np.array(bars[1].y) * (1 + 1e-6)).all() and list(bars[1].x) == ["2", "3", "5"]
    heat = section(made, "ranks").figure.data
    np.testing.assert_allclose(array(heat[1].y), found.step_us, rtol=1e-6)  # few steps: a window each
    busy, load = array(heat[4].z), array(heat[4].customdata)
    assert busy.shape == (RANKS, FITTED) and 50 < busy.max() <= 100 and (busy.max(axis=0) > 30).all()
    assert (load.sum(axis=0) == given.counts.sum(axis=(1, 2))).all()
    held = evaluate(Placement.load(folder / "placement.json"), measured, routed.steps(slice(FITTED, None)))
    np.testing.assert_allclose(
        section(made, "latency").figure.data[3].x, [held.quantile_us(q) for q in (0.5, 0.9, 0.99)]
    )


def test_the_first_picture_stands_before_the_scripts(made: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    svg = sketch(section(made, "makespan").figure)
    assert svg.startswith("<svg") and svg.count("fill: light-dark(#0072b2, #5ab4f0)") == LAYERS + 1  # and the legend's
    assert "<style" not in svg and all(f">{text}</text>" in svg for text in ("before", "after", "bound", "2", "3", "5"))
    assert 0 < made.html.index(svg.partition("<g")[0]) < made.html.index("<script")
    assert made.html.count('class="sketch"') == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sketch(section(made, "makespan").figure) == ""


def test_moves_add_up(folder: Path, made: Report) -> None:
    before, after = Placement.load(folder / "other.json"), Placement.load(folder / "placement.json")
    sent_LGG = moved(before, after)
    rows = zip(before.physical_to_logical, after.physical_to_logical, strict=True)
    assert sent_LGG.sum(axis=(1, 2)).tolist() == [count_moves(a, b, before.slots_per_rank) for a, b in rows]
    assert (np.array(section(made, "moves").figure.data[0].z) == sent_LGG.sum(axis=0)).all()


def test_classes_and_conflicts_are_those_of_the_conflict_graph(folder: Path) -> None:
    routed = Traces.load(folder / "traces.safetensors")
    for layer in range(LAYERS):
        graph, found = conflict_graph(routed, layer), layer_conflicts(routed.counts[:, layer])
        assert [kind for _, kind in graph.nodes(data="expert_class")] == found.classes
        positive = {(i, j) for i, j, c in graph.edges(data="correlation") if c > 0}
        assert {tuple(pair) for pair in found.pairs.tolist()} == positive and found.num_pairs == len(positive)


def test_intervals_cover_the_quantiles_of_what_they_are_drawn_from() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        found = intervals(rng.normal(100, 10, 200))
        assert found is not None and (found[:, 0] <= found[:, 1]).all()
        hits += bool(found[0, 0] <= 100 <= found[0, 1])
    assert 46 <= hits <= 60  # nominally 57; blocks make it a little less
    assert intervals(np.ones(5)) is None


def test_intervals_hold_quantiles_that_the_first_and_last_steps_make() -> None:
    """Blocks that did not go round hardly ever drew both: a p99 above its own interval."""
    step_us = np.r_[121.0, np.random.default_rng(1).normal(100, 1, 118), 120.0]
    low, high = np.asarray(intervals(step_us))[-1]
    assert low <= np.quantile(step_us, 0.99) <= high


@pytest.mark.parametrize(("steps", "ranks"), [(1, 1), (7, 300), (1000, 8), (10**5, 64)])
def test_windows_cover_every_step_once(steps: int, ranks: int) -> None:
    edges = windows(steps, ranks)
    assert edges[0] == 0 and edges[-1] == steps and (np.diff(edges) > 0).all() and len(edges) <= 121


def test_a_placement_file_leaves_out_what_it_does_not_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "p.html"
    found = gemopt_json(capsys, *words(folder, "placement.json", "-o", out))
    assert set(found["left_out"]) == {"search"} and "placement file" in found["left_out"]["search"]
    assert "does not say on which of them" in out.read_text() and "did not see" not in found["headline"]
    assert "held out" not in found["key_figures"]


def test_links_are_told_beside_the_makespans(folder: Path) -> None:
    routed, measured = Traces.load(folder / "traces.safetensors"), Profile.load(folder / "profile.json")
    exchange = Exchange(dispatch_bytes=5760, once_per="assignment")
    result = solve(measured, routed, solver="local-search", patience=0, topology=f"nvlink-{RANKS}", exchange=exchange)
    assert result.links is not None and result.links.exposed_us > 0
    page = report(result, measured, routed)
    alone = evaluate(result.placement, measured, routed)
    assert page.key_figures["step, after"] == f"{alone.objective_us / STEPS / 1e3:.3f} ms"
    assert page.key_figures["links, not in the step"] == f"{result.links.exposed_us / STEPS / 1e3:.3f} ms"
    assert "links aside" in page.headline and result.links.summary(STEPS) in section(page, "makespan").text
    low = array(section(page, "makespan").figure.data[2].y).sum()
    assert 0 < low <= alone.objective_us / STEPS * (1 + 1e-6)


def test_steps_that_were_kept_apart_are_held_out(folder: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    Traces.load(folder / "traces.safetensors").steps(slice(50, None)).save(tmp_path / "kept.safetensors")
    found = gemopt_json(capsys, *words(folder, "result.json", "--holdout", tmp_path / "kept.safetensors",
                                       "-o", tmp_path / "r.html"))  # fmt: skip
    assert "on 10 steps it did not see" in found["headline"]


def other_traces(folder: Path) -> None:
    traces(STEPS, LAYERS, EXPERTS, layer_ids=(2, 3, 5)).steps(slice(1, None)).save(folder / "traces.safetensors")


def fewer_traces(folder: Path) -> None:
    traces(20, LAYERS, EXPERTS, layer_ids=(2, 3, 5)).save(folder / "traces.safetensors")


def other_profile(folder: Path) -> None:
    timed(range(RANKS), lambda n, _: 30.0 + n, (0, 40, 80)).save(folder / "profile.json")


def other_network(folder: Path) -> None:
    traces(STEPS, LAYERS, EXPERTS + 4, layer_ids=(2, 3, 5)).save(folder / "traces.safetensors")


def no_placement(folder: Path) -> None:
    document = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(document | {"placement": None}))


BAD = {
    "other traces": (other_traces, (), ("objective_us", "other traces")),
    "fewer steps": (fewer_traces, (), ("num_steps", "20 steps")),
    "another profile": (other_profile, (), ("objective_us", "other traces or profiles")),
    "another network": (other_network, (), ("num_experts",)),
    "no placement": (no_placement, (), ("placement",)),
    "no such file": (lambda folder: (folder / "result.json").unlink(), (), ("result.json", "No such file")),
    "a baseline of other ranks": (
        lambda folder: Placement.contiguous(3, 12, 2, layer_ids=[2, 3, 5]).save(folder / "b.json"),
        ("--baseline", "b.json"), ("2 ranks; 4",),
    ),
    "steps held out that were solved on": (
        lambda folder: None, ("--holdout", "traces.safetensors"), ("--holdout", "steps that the solver did not see"),
    ),
    "senders of an even split": (lambda folder: None, ("--senders", "uniform"), ("does not ask who sends",)),
    "no folder for the page": (lambda folder: None, ("-o", "none/r.html"), ("none/r.html", "no such folder")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    spoil, options, named = BAD[case]
    for name in ("result.json", "profile.json", "traces.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    spoil(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = gemopt(capsys, *words(tmp_path, "result.json", "-o", "page.html", *options))
    assert (code, out) == (2, "") and err.startswith("gemopt: ") and err.count("\n") == 1, err
    for each in named:
        assert each in err
    assert not (tmp_path / "page.html").exists()


def test_without_plotly_there_is_one_line(folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['plotly'] = None; from gemopt.cli import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", code, *map(str, words(folder, "result.json", "-o", tmp_path / "r.html"))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'gemopt[report]'" in done.stderr


def test_text_of_others_cannot_become_markup(made: Report) -> None:
    assert "gemopt report &lt;b&gt;" in made.html and "gemopt report <b>" not in made.html


def test_the_page_of_a_large_network_is_small() -> None:
    rng = np.random.default_rng(2)
    counts = rng.poisson(rng.gamma(0.8, 120, (58, 256)), (120, 58, 256))
    profile = timed(range(32), lambda n, _: 60 + 0.15 * n, range(0, 8192, 64))
    placement = Placement(
        physical_to_logical=rng.permuted(np.tile(np.arange(256), (58, 1)), axis=1),
        slots_per_rank=[8] * 32,
        num_experts=256,
    )
    page = report(placement, profile, Traces(counts=counts))
    assert len(page.html.encode()) < 8e6 and all(each.figure for each in page.sections if each.name != "search")


def test_digests_of_files_and_of_contents_are_told_apart(folder: Path, report_page: Report) -> None:
    """A result knows the contents that it was made of; what lies beside the page are files, whose digests differ."""
    told = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", report_page.html))
    origin, file = Result.load(folder / "result.json").origin, folder / "traces.safetensors"
    assert origin is not None
    assert told["answer: sha256 of the counts"] == origin.traces_sha256
    assert told["answer: sha256 of the profile&#x27;s content"] == origin.profile_sha256
    assert told[f"sha256 of the file {file} (traces)"] == hashlib.sha256(file.read_bytes()).hexdigest()
