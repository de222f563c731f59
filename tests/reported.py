"""What the tests of the report page are about: files of a small case, and the page made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cli_inputs import profile, traces

from gemopt import solve
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay import replay
from gemopt.report import Report, report
from gemopt.traces import Traces

RANKS, LAYERS, EXPERTS, STEPS, FITTED = 4, 3, 12, 60, 40
LONG_NAME = "NVIDIA H100 80GB HBM3, as fast as one of a measured fleet"


def write_folder(path: Path) -> None:
    """Profile, traces, a result on the first of their steps, another placement, and a replay."""
    counts = traces(STEPS, LAYERS, EXPERTS).counts.copy()
    counts[::5, 1, :2] += 20  # two experts that are hot together
    routed = Traces(counts=counts, layer_ids=(2, 3, 5))
    devices = [each.model_copy(update={"name": LONG_NAME}) for each in profile(RANKS).devices]
    measured = Profile(devices=devices)
    result = solve(measured, routed.steps(slice(0, FITTED)), solver="local-search", patience=1)
    assert result.placement is not None
    measured.save(path / "profile.json")
    routed.save(path / "traces.safetensors")
    result.save(path / "result.json")
    result.placement.save(path / "placement.json")
    rows = np.random.default_rng(5).permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    other = Placement(physical_to_logical=rows, slots_per_rank=[3] * RANKS, num_experts=EXPERTS, layer_ids=[2, 3, 5])
    other.save(path / "other.json")
    replay(measured, routed, ["contiguous", "fitted-once"], window=10).save(path / "replay.json")


def page_of(folder: Path) -> Report:
    """The page of the result."""
    given = [folder / name for name in ("result.json", "profile.json", "traces.safetensors")]
    return report(*given, baseline=folder / "other.json", replay=folder / "replay.json", command="gemopt report <b>")
