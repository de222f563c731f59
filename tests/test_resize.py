"""A rank less, a rank more: what stays at home, what is lost, who serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.placement import Placement
from gemopt.profile import Device, Profile, Sample
from gemopt.resize import resize
from gemopt.solve import solve
from gemopt.traces import Tokens, Traces


def profile(ranks: int = 4, first: int = 0) -> Profile:
    samples = [[Sample(assignments=n, latency_us=20.0 + n * (1 + g / 10)) for n in (0, 8, 64)] for g in range(ranks)]
    return Profile(
        devices=[Device(rank=g, uuid=f"GPU-{first + g}", samples=samples[g], node=f"n{g // 2}") for g in range(ranks)]
    )


def placement(**fields: object) -> Placement:
    rows = [[0, 1, 0, 2, 3, 4, 5, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7, -1]]
    return Placement(**{"physical_to_logical": rows, "slots_per_rank": [2, 2, 2, 3], "num_experts": 8, **fields})  # type: ignore[arg-type]


def test_an_excluded_rank_takes_its_experts_with_it() -> None:
    resized = resize(placement(), profile(), exclude=[1])
    assert resized.old_rank.tolist() == [0, 2, 3]
    assert resized.slots_per_rank.tolist() == [2, 2, 3]
    assert [device.uuid for device in resized.profile.devices] == ["GPU-0", "GPU-2", "GPU-3"]
    assert [device.rank for device in resized.profile.devices] == [0, 1, 2]
    assert resized.lost([0, 1]) == {0: [2], 1: [2, 3]}  # expert 0 of layer 0 has another copy
    assert np.flatnonzero(resized.home_LGE[0, 1]).tolist() == [3, 4]
    assert resized.missing_slots == 1
    assert resized.changed
    assert resize(placement(), profile(), exclude=[3]).changed


def test_an_added_rank_is_empty_and_like_its_source(tmp_path: Path) -> None:
    given = profile(4)
    like = resize(placement(), given, add=[2])
    assert like.slots_per_rank.tolist() == [2, 2, 2, 3, 3] and like.old_rank.tolist() == [0, 1, 2, 3, -1]
    assert like.profile.devices[4].samples == given.devices[2].samples and like.profile.devices[4].uuid is None
    assert not like.home_LGE[:, 4].any() and like.lost([0, 1]) == {} and like.missing_slots == 0
    measured = resize(placement(), profile(5), add=[4])
    assert measured.profile.devices[4].uuid == "GPU-4"
    profile(2, first=9).save(tmp_path / "more.json")
    more = resize(placement(), given, add=[tmp_path / "more.json"], exclude=[0])
    assert [device.uuid for device in more.profile.devices] == [f"GPU-{g}" for g in (1, 2, 3, 9, 10)]
    assert more.old_rank.tolist() == [1, 2, 3, -1, -1]


def test_nothing_asked_changes_nothing() -> None:
    same = resize(placement(), profile())
    assert not same.changed and same.profile.devices == profile().devices and same.missing_slots == 0


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"exclude": [4]}, "exclude_ranks"),
        ({"exclude": [-1]}, "exclude_ranks"),
        ({"exclude": [1, 1]}, "exclude_ranks"),
        ({"exclude": [0, 1, 2, 3]}, "exclude_ranks"),
        ({"exclude": 3}, "exclude_ranks"),
        ({"exclude": np.int64(3)}, "exclude_ranks"),
        ({"exclude": "3"}, "exclude_ranks"),
        ({"exclude": None}, "exclude_ranks"),  # `solve` takes it for none
        ({"add": 0}, "add_ranks"),
        ({"add": "profile.json"}, "add_ranks"),
        ({"add": profile(1)}, "add_ranks"),
        ({"add": [4]}, "add_ranks"),
        ({"add": [profile(1)]}, "add_ranks"),  # its device serves already
    ],
)
def test_ranks_that_cannot_be_are_refused(asked: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as error:
        resize(placement(), profile(), **asked)  # type: ignore[arg-type]
    assert error.value.field == field


def test_devices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"--add-rank 4 lets device 4"):
        resize(placement(), profile(5))
    with pytest.raises(InputError, match="the profile has 3 devices"):
        resize(placement(), profile(3))
    with pytest.raises(InputError, match=r"device_uuids\[0\]"):
        resize(placement(device_uuids=["GPU-1", "GPU-0", "GPU-2", "GPU-3"]), profile())
    resize(placement(device_uuids=["GPU-0", None, "GPU-2", "GPU-3"]), profile())


def test_recorded_senders_are_refused_once_their_numbers_are_those_of_other_ranks() -> None:
    """Token 0 comes from rank 1, which is rank 0 where rank 0 left, and a new one is the last."""
    ids, sources = np.array([[[0]], [[1]], [[2]]]), np.array([1, 1, 2])
    tokens = Tokens(ids, np.zeros(3, np.int64), source_rank=sources)
    traces = Traces(counts=np.ones((1, 1, 3), np.int64), tokens=tokens)
    current = Placement(physical_to_logical=[[0, 1, 2] * 3], slots_per_rank=[3] * 3, num_experts=3, split="nearest")
    asked = {"current": current, "time_limit": 5, "patience": 0}
    with pytest.raises(InputError, match="--senders uniform"):
        solve(profile(3), traces, exclude_ranks=[0], add_ranks=[0], **asked)
    for same in ({"exclude_ranks": [0], "add_ranks": [0], "senders": "uniform"}, {"add_ranks": [0]}):
        assert solve(profile(3), traces, **same, **asked).placement is not None
