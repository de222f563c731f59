"""The report page of small cases that are easily drawn wrong: one layer, a rank that left, an optimum, a surface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("plotly")
from cli_inputs import profile, write_inputs

from gemopt import solve
from gemopt.exceptions import InputError
from gemopt.placement import Placement
from gemopt.profile import Device, Profile, Sample
from gemopt.report import Report, report
from gemopt.report.inputs import gather
from gemopt.report.numbers import side
from gemopt.resize import profile_after
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")
EXPERTS = 8


def drawn(page: Report, name: str) -> Any:
    return next(section for section in page.sections if section.name == name)


def test_stragglers_of_the_page_take_turns_as_those_of_the_evaluation() -> None:
    points = [Sample(assignments=n, latency_us=5.0) for n in (0, 10, 20)]
    given = Profile(devices=[Device(rank=rank, samples=points) for rank in range(2)])
    traces = Traces(counts=np.ones((8, 1, 4), int))
    inputs = gather(Placement.contiguous(1, 4, 2), given, traces)
    found = side(inputs, inputs.placement, np.array([0, 8]))
    assert found.straggler_share.tolist() == [[0.5], [0.5]]


def routed(layers: int) -> Traces:
    """The same counts in every step: nothing is hot together."""
    counts = np.broadcast_to(np.arange(1, EXPERTS + 1), (24, layers, EXPERTS))
    return Traces(counts=np.ascontiguousarray(counts))


def test_the_bound_of_one_layer_is_drawn_and_an_optimum_said() -> None:
    measured, traces = profile(2), routed(1)
    result = solve(measured, traces, solver="branch")
    page = report(result, measured, traces)
    bound = next(trace for trace in drawn(page, "makespan").figure.data if trace.name == "bound")
    assert bound.mode == "markers"  # a line through one point is none
    assert page.headline.endswith("no placement in these slots takes less, which is proven.")


def test_no_graph_without_conflicts() -> None:
    page = report(Placement.contiguous(2, EXPERTS, 2), profile(2), routed(2))
    section = drawn(page, "conflicts")
    assert section.figure is None and section.text.startswith("No two experts")


def test_a_rank_that_left(tmp_path: Path) -> None:
    before, traces, current = profile(4), routed(2), Placement.contiguous(2, EXPERTS, 4)
    result = solve(before, traces, current=current, exclude_ranks=[1], slots_per_rank=3, solver="local-search",
                   patience=0)  # fmt: skip
    left = profile_after(current, before, exclude=[1], add=[])
    text = drawn(report(result, left, traces), "moves").text
    assert text.endswith("Its ranks were numbered 0, 2, 3 there.")
    with pytest.raises(InputError, match="baseline: got 4 ranks; 3, as what the page is about"):
        report(result, left, traces, baseline=current)


def test_a_surface_is_drawn_at_the_experts_that_a_rank_can_hold() -> None:
    points = [(n, k) for k in (1, 4, 16, 64) for n in (64, 128, 256)]
    samples = [Sample(assignments=n, active_experts=k, latency_us=20.0 + 5 * k + n / 64) for n, k in points]
    measured = Profile(devices=[Device(rank=rank, name="x", samples=samples) for rank in range(2)])
    page = report(Placement.contiguous(1, EXPERTS, 2), measured, routed(1), cost="roofline")
    points = next(trace for trace in drawn(page, "devices").figure.data if trace.name == "measured")
    np.testing.assert_allclose(sorted(set(points.y)), [41, 42, 44])  # 4 experts each, not 64


def test_a_page_about_the_same_placement_says_as_much_time(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    Placement.contiguous(2, 4, 2).save(tmp_path / "p.json")
    page = report(*(tmp_path / name for name in ("p.json", "profile.json", "traces.safetensors")))
    assert page.headline.startswith("This placement takes as much time as contiguous placement over 12 steps")
