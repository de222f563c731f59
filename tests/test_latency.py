"""Curves and latencies: values, lower envelopes and planes against brute force on a grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemopt.exceptions import InputError
from gemopt.kernels import rank_latencies
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Latency, line, pack, tiles

GRID = np.arange(0, 61, 0.5)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Any points, rising and falling, some collinear; the tail never falls."""
    x = sorted({0, *draw(st.lists(st.integers(1, 40), max_size=6))})
    y = draw(st.lists(st.integers(0, 20), min_size=len(x), max_size=len(x)))
    return Curve(np.array(x), np.array(y), draw(st.integers(0, 4)))


def by_hand(curve: Curve, load: float) -> float:
    points = list(zip(curve.x, curve.y, strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= load <= x1:
            return float(y0 + (y1 - y0) * (load - x0) / (x1 - x0))
    return float(points[-1][1] + curve.slope * (load - points[-1][0]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=6), st.integers(0, 2**32), st.integers(0, 4))
def test_a_curve_goes_through_its_points_and_on_with_its_slope(loads: list[int], seed: int, slope: int) -> None:
    x = np.array(sorted({0, *loads}), float)
    y = np.random.default_rng(seed).integers(0, 5, len(x)).astype(float)
    curve = Curve(x, y, slope)
    np.testing.assert_allclose(curve(x), y, atol=1e-9)
    assert curve(x[-1] + 10) == pytest.approx(y[-1] + 10 * slope)
    np.testing.assert_allclose(curve(GRID), [by_hand(curve, load) for load in GRID], atol=1e-9)
    assert len(curve.x) <= len(x)


@settings(max_examples=300, deadline=None)
@given(curves())
def test_low_is_the_smallest_value_from_here_on(curve: Curve) -> None:
    far = np.unique(np.concatenate([GRID, curve.x, curve.low.x]))
    values = curve(far)
    expected = np.minimum.accumulate(values[::-1])[::-1]
    np.testing.assert_allclose(curve.low(far), expected, atol=1e-9)


@settings(max_examples=300, deadline=None)
@given(curves())
def test_hull_is_convex_below_and_touches(curve: Curve) -> None:
    hull = curve.hull
    assert (hull(GRID) <= curve(GRID) + 1e-9).all()
    slopes = [slope for _, slope in hull.pieces()]
    assert slopes == sorted(slopes) and slopes[-1] == curve.slope
    np.testing.assert_allclose(hull(hull.x), curve(hull.x), atol=1e-9)  # its corners are points of the curve
    np.testing.assert_allclose(np.max([a + b * GRID for a, b in hull.pieces()], axis=0), hull(GRID), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(curves(), curves()), min_size=1, max_size=3))
def test_planes_of_a_latency_are_a_minorant_and_low_does_not_fall(terms: list[tuple[Curve, Curve]]) -> None:
    latency = Latency(tuple(terms))
    n, a = (m.ravel() for m in np.meshgrid(np.arange(0, 50, 2.0), np.arange(0, 50, 5.0)))
    values, low = latency([n, a]), latency.low([n, a])
    planes = latency.planes()
    minorant = (planes[:, :1] + planes[:, 1:] @ np.stack([n, a])).max(axis=0)
    assert (minorant <= values + 1e-9).all() and (low <= values + 1e-9).all()
    table = low.reshape(10, 25)
    assert (np.diff(table, axis=0) >= -1e-9).all() and (np.diff(table, axis=1) >= -1e-9).all()


def test_a_roofline_is_its_planes() -> None:
    latency = Latency(((line(5, 1), line(0, 2)), (line(1, 3), line(0, 0))))
    assert latency.max_affine and latency.num_features == 2
    np.testing.assert_array_equal(latency.planes(), [[5, 1, 2], [1, 3, 0]])
    assert latency([2, 1]) == 9 and latency([10, 0]) == 31
    assert not Latency(((Curve(np.array([0, 1]), np.array([0, 5]), 1.0), line(0, 2)),)).max_affine


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(curves(), curves()), min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_compiled_latency_equals_the_plain_one(ranks: list[list[tuple[Curve, Curve]]]) -> None:
    latencies = [Latency(tuple(terms)) for terms in ranks]
    packed = pack(latencies)
    loads_TGF = np.random.default_rng(0).integers(0, 60, (20, len(latencies), 2)).astype(float)
    times = rank_latencies(loads_TGF, packed)
    for g, latency in enumerate(latencies):
        np.testing.assert_allclose(times[:, g], latency(list(loads_TGF[:, g].T)), atol=1e-9)


def test_features() -> None:
    n = np.array([0, 1, 16, 17])
    assert ASSIGNMENTS.of(n).tolist() == [0, 1, 16, 17]
    assert ACTIVE.of(n).tolist() == [0, 1, 1, 1]
    assert tiles(16).of(n).tolist() == [0, 1, 1, 2] and tiles(16).name == "tiles@16"
    with pytest.raises(InputError, match="tile_tokens"):
        tiles(0)


@pytest.mark.parametrize(
    ("x", "y", "slope"),
    [([1], [1], 0), ([0, 0], [1, 2], 0), ([0, 2, 1], [1, 1, 1], 0), ([], [], 0), ([0], [1, 2], 0), ([0], [1], np.inf)],
)
def test_curves_that_are_none(x: list[float], y: list[float], slope: float) -> None:
    with pytest.raises(InputError, match="Curve"):
        Curve(np.array(x, float), np.array(y, float), slope)


def test_a_curve_that_falls_for_ever_has_no_low() -> None:
    with pytest.raises(InputError, match="falls for ever"):
        _ = line(3, -1).low


def test_latencies_need_one_curve_per_feature() -> None:
    for terms in ((), ((line(0, 1),), (line(0, 1), line(0, 1))), ((),)):
        with pytest.raises(InputError, match="terms"):
            Latency(terms)
