"""What the steps of a recording say of each other: windows, averages, counters, dumps that overlap."""

from __future__ import annotations

import numpy as np
import pytest
from routed_counts import routed

SUMS = "steps follow each other as sums or means over several steps do"
EARLIER = "steps are earlier ones again"


def window(counts, length):
    return np.stack([counts[max(0, t + 1 - length) : t + 1].sum(axis=0) for t in range(len(counts))])


def averaged(counts):
    means = counts[:1].astype(float)
    for step in counts[1:]:
        means = np.concatenate([means, 0.9 * means[-1:] + 0.1 * step])
    return np.rint(100 * means).astype(np.int64)


def means_so_far(counts):
    return np.rint(100 * np.stack([counts[: t + 1].mean(axis=0) for t in range(len(counts))])).astype(np.int64)


def steps(seed=3, number=24):
    return routed(np.random.default_rng(seed), steps=number)


@pytest.mark.parametrize("smoothed", [lambda c: window(c, 2), lambda c: window(c, 7), averaged, means_so_far])
def test_sums_and_means_over_steps_are_named(load, tmp_path, smoothed):
    np.save(tmp_path / "a.npy", smoothed(steps()))
    assert SUMS in load(tmp_path / "a.npy", "array", no_pipeline=True)[1]


@pytest.mark.parametrize("seed", range(4))
def test_steps_of_their_own_are_not(load, tmp_path, seed):
    first, second = steps(seed, 12), steps(seed + 50, 12)[:, :, ::-1]  # another regime
    for name, counts in {"one": first, "two": np.concatenate([first, second]), "bursts": first * 7}.items():
        np.save(tmp_path / f"{name}.npy", counts)
        assert SUMS not in load(tmp_path / f"{name}.npy", "array")[1]


def test_steps_that_come_again_are_named(load, tmp_path):
    counts = steps()
    for name, joined in {
        "twice": [counts, counts],
        "grown": [counts[:9], counts],
        "windows": [counts[:16], counts[8:]],
    }.items():
        np.save(tmp_path / "a.npy", np.concatenate(joined))
        again = sum(map(len, joined)) - len(counts)
        assert f"{again} of {again + len(counts)} {EARLIER}" in load(tmp_path / "a.npy", "array")[1], name
    np.save(tmp_path / "a.npy", np.repeat(counts, 2, axis=0))
    notes = load(tmp_path / "a.npy", "array")[1]
    assert "24 of 48 steps are the step before again" in notes
    assert EARLIER not in notes
    np.save(tmp_path / "a.npy", np.concatenate([counts, counts[3:4], counts[9:10]]))  # small batches may meet again
    assert "again" not in load(tmp_path / "a.npy", "array")[1]
    np.save(tmp_path / "a.npy", np.repeat(counts[:1], 9, axis=0))  # a batch that is always the same
    assert "again" not in load(tmp_path / "a.npy", "array")[1]
