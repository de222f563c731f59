"""A profile in which one device is in another unit, as happens where it is edited by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from one_liners import one_line

from gemopt.exceptions import InputError
from gemopt.formats.tables.fleet import slow_down
from gemopt.profile import Device, Profile, Sample

LOADS = (0, 4, 8, 16, 32)


def devices(factors: list[float], **fields: Any) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "samples": [{"assignments": n, "latency_us": (20.0 + n) * by} for n in LOADS], **fields}
        for rank, by in enumerate(factors)
    ]


@pytest.mark.parametrize(
    ("factors", "slow", "fast"),
    [([1, 1, 1e-3, 1], 0, 2), ([1, 1.1, 1, 0.9e3], 3, 0), ([1e-3, 1], 1, 0), ([1, 1e6], 1, 0), ([1, 2.5e3], 1, 0)],
)
def test_a_device_in_another_unit_is_refused(tmp_path: Path, factors: list[float], slow: int, fast: int) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"devices": devices(factors)}))
    with pytest.raises(InputError) as error:
        Profile.load(path)
    line = one_line(error)
    assert f"devices[rank {slow}].samples" in line and f"what rank {fast} takes at" in line
    assert "names of their own" in line


@pytest.mark.parametrize("factors", [[1, 1.2, 0.8], [1, 40], [1, 200], [1, 1e4], [1, 1, 1]])
def test_devices_of_other_speeds_are_taken(factors: list[float]) -> None:
    assert Profile(devices=devices(factors)).num_ranks == len(factors)


def test_a_device_that_was_made_slower_may_be_so_by_any_factor(tmp_path: Path) -> None:
    made = slow_down(slow_down(Profile(devices=devices([1, 1])), 1, 20.0), 1, 50.0)
    made.save(tmp_path / "profile.json")
    found = Profile.load(tmp_path / "profile.json")
    assert found.devices[1].state["slower"] == 1e3 and found.devices[1].samples[1].latency_us == 24e3


def test_devices_with_names_of_their_own_may_differ_as_they_do() -> None:
    fast, slow = devices([1, 1e3])
    assert Profile(devices=[fast, {**slow, "name": "Xeon"}]).num_ranks == 2


def test_devices_are_compared_within_the_range_of_both() -> None:
    short = Device(rank=0, samples=[Sample(assignments=n, latency_us=10.0 + n) for n in (1, 2)])
    other = Device(rank=1, samples=[Sample(assignments=n, latency_us=1e4) for n in (1000, 2000)])
    assert Profile(devices=[short, other]).num_ranks == 2
    crossing = Device(rank=1, samples=[Sample(assignments=n, latency_us=us) for n, us in ((1, 12.0), (2000, 1e4))])
    assert Profile(devices=[short, crossing]).num_ranks == 2
