"""A wrong document gives one line that says what and where; a right one survives a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_liners import one_line

from gemopt.documents import read_json
from gemopt.exceptions import InputError
from gemopt.placement import Placement
from gemopt.profile import Device, Profile, Sample
from gemopt.result import Incumbent, Result, Status, StoppedBy

PLACEMENT = {"physical_to_logical": [[0, 1, 2, 3]], "slots_per_rank": [2, 2], "num_experts": 4}
PROFILE = {"devices": [{"rank": 0, "uuid": "a", "samples": [{"assignments": 1, "latency_us": 2.0}]}]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": 1',
        "[1, 2",
        '{"a": NaN}',
        '{"a": -Infinity}',
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"a": ' + "9" * 5000 + "}",
        '{"a": 1, "a": 2}',
        "\udcff",
        "nothing",
    ],
    ids=range(12),
)
def test_text_that_is_not_a_json_document(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as error:
        read_json(path)
    assert "a.json" in one_line(error)


HUGE = 10**400
COPIED = {"physical_to_logical": [[0, 1, 2, 0]], "slots_per_rank": [2, 2], "num_experts": 3}
BAD_PLACEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"physical_to_logical": [[0, 1, 2, HUGE]]}, "physical_to_logical"),
    ({"physical_to_logical": [[0, 1, 2, 2**40]]}, "physical_to_logical"),
    ({"physical_to_logical": [[0, 1, 2, 0.5]]}, "physical_to_logical"),
    ({"physical_to_logical": [[0, 1, 2, "3"]]}, "physical_to_logical"),
    ({"physical_to_logical": [[0, 1, 2], [0]]}, "physical_to_logical"),
    ({"physical_to_logical": [0, 1, 2, 3]}, "physical_to_logical"),
    ({"physical_to_logical": []}, "physical_to_logical"),
    ({"physical_to_logical": None}, "physical_to_logical"),
    ({"physical_to_logical": {"a": 1}}, "physical_to_logical"),
    ({"physical_to_logical": [[0, 1, 2, 4]]}, "experts 0 to 3"),
    ({"physical_to_logical": [[0, 1, 2, -2]]}, "experts 0 to 3"),
    ({"physical_to_logical": [[0, 1, 2, -1]]}, "expert 3"),
    ({"physical_to_logical": [[0, 1, 2, 3, 3]]}, "needs 4 slots"),
    ({"physical_to_logical": [[0, 0, 1, 2, 3]], "slots_per_rank": [3, 2]}, "expert 0 twice on rank 0"),
    ({"slots_per_rank": [1, 1]}, "slots_per_rank"),
    ({"slots_per_rank": [5, -1]}, "slots_per_rank"),
    ({"slots_per_rank": []}, "slots_per_rank"),
    ({"slots_per_rank": [4.0, 0.5]}, "slots_per_rank"),
    ({"slots_per_rank": [2**31 - 1, 2**31 - 1], "num_experts": 2**31 - 1}, "physical_to_logical"),
    ({"num_experts": 0}, "num_experts"),
    ({"num_experts": HUGE}, "num_experts"),
    ({"num_experts": "four"}, "num_experts"),
    ({"layer_ids": [1, 2]}, "layer_ids"),
    ({"layer_ids": [-1]}, "layer_ids"),
    ({"layer_ids": ["a"]}, "layer_ids"),
    ({"layer_ids": 5}, "layer_ids"),
    ({"layer_ids": [3], "num_hidden_layers": 3}, "num_hidden_layers"),
    ({"split": "fair"}, "split"),
    ({"split": "static"}, "split_weights"),
    ({"split_weights": [[1, 1, 1]]}, "split_weights"),
    ({"split_weights": [[1, 1, 1, HUGE]]}, "split_weights"),
    ({"split_weights": [[1, 1, 1, "1"]]}, "split_weights"),
    ({"split_weights": [[1, 1, 1, 0.5]]}, "copies of expert 3 must sum to 1"),
    ({"split_weights": [[1, 1, 1, -1]]}, "split_weights: got -1.0; weights >= 0"),
    ({**COPIED, "physical_to_logical": [[0, 1, 2, -1]], "split_weights": [[1, 1, 1, 0.5]]}, "weight of an empty slot"),
    ({**COPIED, "split_weights": [[0.1, 1, 1, 0.9]]}, "split_weights: got given; none: the even split"),
    ({**COPIED, "split_weights": [[0.5, 1, 1, 0.5]], "split": "optimal"}, "none: the optimal split"),
    ({**COPIED, "split_weights": [[0.5, 1, 1, 0.5]], "split": "nearest"}, 'give "split": "static"'),
    ({"device_uuids": ["a"]}, "device_uuids"),
    ({"nonsense": 1}, "nonsense"),
    ({"self": 1}, "self"),
    ({"schema_version": 2, "new_key": 1}, "schema_version: got 2"),
    ({"schema_version": "one"}, "schema_version"),
]


@pytest.mark.parametrize(("change", "named"), BAD_PLACEMENTS, ids=range(len(BAD_PLACEMENTS)))
def test_a_wrong_placement_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({**PLACEMENT, **change}))
    with pytest.raises(InputError) as error:
        Placement.load(path)
    assert named in one_line(error) and str(error.value).startswith(str(path))


@pytest.mark.parametrize("change", [
    {**COPIED, "split_weights": [[0.5, 1, 1, 0.5]]},
    {"split_weights": [[1, 1, 1, 1]], "split": "optimal"},
    {**COPIED, "split_weights": [[0.1, 1, 1, 0.9]], "split": "static"},
])  # fmt: skip
def test_weights_that_say_what_the_split_does_are_welcome(change: dict[str, Any]) -> None:
    assert Placement(**{**PLACEMENT, **change}).split_weights is not None


def sample(**change: Any) -> dict[str, Any]:
    return {"devices": [{"rank": 0, "samples": [{"assignments": 4, "latency_us": 2.0, **change}]}]}


def samples(*loads: tuple[int, int | None]) -> dict[str, Any]:
    points = [{"assignments": n, "active_experts": a, "latency_us": 1.0} for n, a in loads]
    return {"devices": [{"rank": 0, "samples": points}]}


ONE = [{"assignments": 1, "latency_us": 1}]
BAD_PROFILES: list[tuple[dict[str, Any], str]] = [
    ({"devices": []}, "devices"),
    ({"devices": None}, "devices"),
    ({"devices": [{"rank": 0, "samples": []}]}, "samples"),
    ({"devices": [{"rank": 1, "samples": ONE}]}, "rank"),
    ({"devices": [{"rank": 0, "samples": ONE}, {"rank": 0, "samples": ONE}]}, "rank"),
    ({"devices": [{"rank": 0, "uuid": "a", "samples": ONE}, {"rank": 1, "uuid": "a", "samples": ONE}]}, "uuid"),
    (sample(latency_us="slow"), "latency_us"),
    (sample(latency_us=0), "work takes time"),
    (sample(latency_us=-1), "latency_us"),
    (sample(latency_us=None), "latency_us"),
    (sample(latency_us=1e13), "latency_us"),
    (sample(assignments=-1), "assignments"),
    (sample(assignments=1.5), "assignments"),
    (sample(assignments=2**31), "assignments"),
    (sample(assignments=HUGE), "assignments"),
    (sample(active_experts=5), "active"),
    (sample(active_experts=0), "active"),
    (sample(repeats=0), "repeats"),
    (sample(colour="red"), "colour"),
    (samples((4, 2), (4, 2)), "(4, 2) measured twice"),
    (samples((4, 2), (5, None)), "active_experts"),
    ({"software": {"torch": 2}}, "software"),
    ({"schema_version": 7}, "schema_version"),
]


@pytest.mark.parametrize(("change", "named"), BAD_PROFILES, ids=range(len(BAD_PROFILES)))
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**PROFILE, **change}))
    with pytest.raises(InputError) as error:
        Profile.load(path)
    assert named in one_line(error)


def test_a_latency_that_overflows_to_infinity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"devices": [{"rank": 0, "samples": [{"assignments": 1, "latency_us": 1e999}]}]}')
    with pytest.raises(InputError, match="latency_us"):
        Profile.load(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}"])
def test_json_of_another_kind(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    for kind in (Profile, Placement, Result):
        with pytest.raises(InputError) as error:
            kind.load(path)
        assert str(path) in one_line(error)


def test_samples_out_of_order_and_devices_out_of_order_are_fine() -> None:
    profile = Profile(
        devices=[
            Device(rank=1, samples=[Sample(assignments=8, latency_us=2.0), Sample(assignments=1, latency_us=1.0)]),
            Device(rank=0, samples=[Sample(assignments=1, latency_us=3.0)]),
        ]
    )
    assert [device.rank for device in profile.devices] == [0, 1]
    assert profile.devices[1].table()[:, 0].tolist() == [8, 1]


names = st.none() | st.text(max_size=8)
micros = st.floats(0, 1e9, allow_nan=False)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    devices = []
    for rank in range(draw(st.integers(1, 3))):
        loads = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True))
        known = draw(st.booleans())
        points = [
            Sample(
                assignments=n,
                active_experts=min(n, 3) if known else None,
                latency_us=draw(micros) + (n > 0),
                spread_us=draw(st.none() | micros),
                repeats=draw(st.none() | st.integers(1, 99)),
            )
            for n in loads
        ]
        apart = f"device {rank}"  # of one name they would have to be of one unit
        devices.append(Device(rank=rank, name=apart, uuid=f"gpu-{rank}", node=draw(names), samples=points))
    return Profile(devices=devices, kernel=draw(names), source=draw(names), software={"numpy": draw(st.text())})


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    experts, ranks, layers = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    least = -(-experts // ranks)
    slots = draw(st.integers(least, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(layers):
        table = np.full((ranks, slots), -1)
        for place, expert in enumerate(rng.permutation(experts)):
            table[place % ranks, place // ranks] = expert
        for rank in range(ranks):
            spare = int((table[rank] == -1).sum())
            others = rng.permutation(np.setdiff1d(np.arange(experts), table[rank]))[: rng.integers(0, spare + 1)]
            table[rank, slots - spare : slots - spare + len(others)] = others
        rows.append(table.ravel())
    ids = sorted(draw(st.lists(st.integers(0, 99), min_size=layers, max_size=layers, unique=True)))
    return Placement(
        physical_to_logical=rows,
        slots_per_rank=[slots] * ranks,
        num_experts=experts,
        layer_ids=ids,
        model=draw(names),
        device_uuids=draw(st.none() | st.just([None] * ranks)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(profiles())
def test_profiles_survive_a_round_trip(tmp_path: Path, profile: Profile) -> None:
    profile.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    assert again == profile and again.digest() == profile.digest() and hash(again) == hash(profile)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(placements(), st.none() | st.floats(0, 1e12), st.sampled_from(Status))
def test_placements_and_results_survive_a_round_trip(
    tmp_path: Path, placement: Placement, value: float | None, status: Status
) -> None:
    placement.save(tmp_path / "p.json")
    again = Placement.load(tmp_path / "p.json")
    assert again == placement
    assert (again.physical_to_logical == placement.physical_to_logical).all()
    assert again.copies().sum() == (placement.physical_to_logical >= 0).sum()
    result = Result(
        solver="lpt",
        status=status,
        stopped_by=StoppedBy.TIME_LIMIT,
        objective_us=value,
        bound_us=value,
        gap=None,
        seconds=0.25,
        num_steps=3,
        placement=placement,
        history=[Incumbent(seconds=0.1, objective_us=3.0)],
    )
    result.save(tmp_path / "r.json")
    assert Result.load(tmp_path / "r.json") == result


def test_documents_are_frozen() -> None:
    placement = Placement(**PLACEMENT)
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical[0, 0] = 1
    with pytest.raises(Exception, match="frozen"):
        placement.num_experts = 5  # type: ignore[misc]
    assert placement != PLACEMENT


def test_results_never_hold_nan() -> None:
    with pytest.raises(ValueError, match="finite"):
        Incumbent(seconds=float("nan"), objective_us=1.0)


def test_one_device_is_no_two_ranks_however_its_uuid_is_written() -> None:
    samples = [Sample(assignments=1, latency_us=5.0)]
    pair = [Device(rank=rank, uuid=uuid, samples=samples) for rank, uuid in enumerate(("GPU-1A", "1a"))]
    with pytest.raises(InputError, match="every device is measured as one rank only"):
        Profile(devices=pair)
