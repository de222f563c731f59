"""Cost models: from measured samples to the latency of a rank under any load.

A cost model names its additive features and gives one `Latency` per rank. `fit` chooses among the registered
models by their cross-validated error on the profile's own points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, FloatArray, Latency, line
from gemopt.profile import Device, Profile

FOLDS = 5
MAX_PLANES = 4
MAX_STEPS = 60  # of a refinement
MAX_KINDS = 2  # devices of different names that are cross-validated
TIE = 0.03  # of two models whose errors are this close, the simpler one is taken


class CostModel(Protocol):
    """What the rest of gemopt asks of a cost model."""

    @property
    def name(self) -> str:
        """Short name, as in reports and `--cost`."""

    @property
    def features(self) -> tuple[Feature, ...]:
        """Additive per-expert features, in the order of the curves of every term."""

    @property
    def latencies(self) -> tuple[Latency, ...]:
        """Latency of each rank."""

    @property
    def measured(self) -> FloatArray:
        """[G, F, 2] smallest and largest measured load of each rank and feature; NaN where unknown."""


@dataclass(frozen=True, eq=False)
class Staircase:
    """Piecewise linear through the measured points of one feature; may be non-convex and non-monotone."""

    latencies: tuple[Latency, ...]
    measured: FloatArray
    features: tuple[Feature, ...] = (ASSIGNMENTS,)
    name: str = "staircase"

    @staticmethod
    def fit_device(table: FloatArray) -> Latency:
        """Latency through the points of one device; `table` [samples, 4] as `Device.table` gives it."""
        loads, index = np.unique(table[:, 0], return_inverse=True)
        medians = np.array([np.median(table[index == i, 2]) for i in range(len(loads))])
        if loads[0] > 0:  # an idle rank costs its smallest measured load
            loads, medians = np.append(0.0, loads), np.append(medians[0], medians)
        return Latency(((Curve(loads, medians, _secant(loads, medians)),),))


@dataclass(frozen=True, eq=False)
class Roofline:
    """Maximum of planes `a + b N + c A` over assignments and activated experts, b and c >= 0, per device.

    Max-affine regression on relative errors (Magnani and Boyd, Convex piecewise-linear fitting, Optimization and
    Engineering 10, 2009). Idle ranks cost the measured zero load, else the smallest measured load,
    but not more than the planes give for one assignment.
    """

    latencies: tuple[Latency, ...]
    measured: FloatArray
    features: tuple[Feature, ...] = (ASSIGNMENTS, ACTIVE)
    name: str = "roofline"

    @staticmethod
    def fit_device(table: FloatArray, *, planes: int = 3) -> Latency:
        """Latency of one device; `table` [samples, 4] with known active experts (or NaN: a roofline in load only)."""
        idle = table[table[:, 0] == 0]
        busy = table[table[:, 0] > 0]
        if not len(busy):
            return Latency(((line(float(np.median(idle[:, 2])), 0.0), line(0.0, 0.0)),))
        loads = np.nan_to_num(busy[:, :2], nan=0.0)
        some = _thinned(len(busy))
        fitted_K3 = _max_affine(loads[some], busy[some, 2], planes)
        if len(idle):
            return _with_idle(fitted_K3, float(np.median(idle[:, 2])))
        smallest = busy[np.lexsort((np.nan_to_num(busy[:, 1]), busy[:, 0]))[0], 2]
        one = fitted_K3 @ [1.0, 1.0, float(np.isfinite(busy[0, 1]))]  # never dearer idle than with one assignment
        floor = np.array([[min(smallest, one.max()), 0.0, 0.0]])
        return _planes(np.concatenate([floor, fitted_K3]))


def _thinned(size: int, limit: int = 512) -> NDArray[np.int64]:
    """Evenly spread indices: a handful of planes needs no more points than this."""
    return np.unique(np.linspace(0, size - 1, min(size, limit)).round().astype(np.int64))


def _planes(rows_K3: FloatArray) -> Latency:
    return Latency(tuple((line(a, b), line(0.0, c)) for a, b, c in rows_K3))


def _with_idle(rows_K3: FloatArray, idle_us: float) -> Latency:
    """Planes that drop to the measured zero load: exact as a kink between no and one assignment."""
    if idle_us >= rows_K3[:, 0].max():
        return _planes(np.concatenate([[[idle_us, 0.0, 0.0]], rows_K3]))
    kinked = [(Curve(np.array([0.0, 1.0]), np.array([idle_us, a + b]), float(b)), line(0.0, c)) for a, b, c in rows_K3]
    return Latency(tuple(kinked))


def _secant(loads: FloatArray, values: FloatArray) -> float:
    """Slope to go on with beyond the last point: secant of the upper half of the range, never below 0."""
    if len(loads) < 2:
        return 0.0
    middle = (loads[0] + loads[-1]) / 2
    below = int(np.searchsorted(loads, middle, side="right")) - 1
    below = min(below, len(loads) - 2)
    return max(0.0, float((values[-1] - values[below]) / (loads[-1] - loads[below])))


def _max_affine(loads: FloatArray, values: FloatArray, planes: int) -> FloatArray:
    """[K, 3] planes with a, b, c >= 0 of small relative error, grown one plane at a time.

    Each new plane starts on the most underestimated third of the points, or on the third where load or active experts
    weigh most against the latency; then all planes are refined together by bounded least squares.
    """
    design = np.column_stack([np.ones(len(values)), loads])
    scale = np.where(design.max(axis=0) > 0, design.max(axis=0), 1.0)
    weighted = design / scale / values.clip(1e-9)[:, None]
    rows = _nonnegative(weighted[None])
    for _ in range(1, planes):
        under = 1 - (weighted @ rows.T).max(axis=1)
        keys = [under, weighted[:, 1], weighted[:, 2]]
        subsets = [np.argsort(-key, kind="stable")[: max(3, len(values) // 3)] for key in keys]
        grown = [_refine(weighted, np.vstack([rows, _nonnegative(weighted[None, chosen])])) for chosen in subsets]
        rows = min(grown, key=lambda candidate: _squared_error(weighted, candidate))
    return np.asarray(rows / scale)


def _squared_error(weighted: FloatArray, rows: FloatArray) -> float:
    return float(np.square((weighted @ rows.T).max(axis=1) - 1).sum())


def _refine(weighted: FloatArray, rows: FloatArray) -> FloatArray:
    """Local minimum of the squared error: every point pulls on the plane that covers it, with damped steps."""
    error, damping = _squared_error(weighted, rows), 1e-3
    for _ in range(MAX_STEPS):
        covering = (weighted @ rows.T).argmax(axis=1) == np.arange(len(rows))[:, None]
        candidate = _nonnegative(weighted * covering[:, :, None], near=rows, damping=damping)
        renewed = _squared_error(weighted, candidate)
        if renewed < error:
            stalled = renewed > (1 - 1e-4) * error
            rows, error, damping = candidate, renewed, damping / 3
            if stalled:
                break
        elif damping > 1e3:
            break
        else:
            damping *= 4
    return rows


def _nonnegative(design: FloatArray, *, near: FloatArray | None = None, damping: float = 0.0) -> FloatArray:
    """[K, 3] non-negative x_k that minimise |design_k x_k - 1| for design [K, N, 3], rows of 0 left out.

    With `damping`, plus damping times the squared distance from `near` [K, 3] in units of each column's weight.
    3 columns have 7 sets of positive entries: all are tried at once.
    """
    gram, target = np.swapaxes(design, 1, 2) @ design, design.sum(axis=1)
    weight = np.einsum("kii->ki", gram)
    ridge = (1e-10 + damping) * weight + 1e-10 * (weight.sum(axis=1, keepdims=True) + 1e-300)
    if near is not None:
        target = target + damping * weight * near
    full = gram + ridge[:, None, :] * np.eye(3)
    matrices = np.where(_SUBSETS[:, :, None] & _SUBSETS[:, None, :], full[:, None], np.eye(3))
    solutions = np.linalg.solve(matrices, (target[:, None] * _SUBSETS)[..., None])[..., 0]
    gain = np.where((solutions >= 0).all(axis=2), np.einsum("ksi,ki->ks", solutions, target), -1.0)
    best = gain.argmax(axis=1)
    return np.asarray(solutions[np.arange(len(best)), best] * (gain.max(axis=1) >= 0)[:, None])


_SUBSETS = np.array([[bool(bits >> i & 1) for i in range(3)] for bits in range(1, 8)])


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cost model that `fit` may choose: how to fit one device, and whether its samples allow it."""

    name: str
    features: tuple[Feature, ...]
    fit_device: Callable[[FloatArray], Latency]
    build: Callable[[tuple[Latency, ...], FloatArray], CostModel]
    usable: Callable[[FloatArray], bool] = field(default=lambda table: True)


def _roofline(planes: int) -> Candidate:
    return Candidate(
        name=f"roofline-{planes}",
        features=(ASSIGNMENTS, ACTIVE),
        fit_device=lambda table: Roofline.fit_device(table, planes=planes),
        build=lambda latencies, measured: Roofline(latencies, measured, name=f"roofline-{planes}"),
        usable=lambda table: len(table) >= 3 * planes,
    )


CANDIDATES: tuple[Candidate, ...] = (
    Candidate("staircase", (ASSIGNMENTS,), Staircase.fit_device, Staircase),
    *(_roofline(planes) for planes in range(1, MAX_PLANES + 1)),
)


@dataclass(frozen=True)
class FitReport:
    """Which cost model was chosen, and how far all that were tried are off.

    Errors are mean relative ones, NaN where the profile cannot tell: `errors` on points left out of the fit, `fits`
    at the measured points themselves, of which one device has `num_points`.
    """

    chosen: str
    errors: dict[str, float]
    fits: dict[str, float] = field(default_factory=dict)
    num_points: int = 0

    @property
    def error(self) -> float:
        """Cross-validated error of the chosen model; NaN when the profile has too few points to tell."""
        return self.errors[self.chosen]

    def summary(self) -> str:
        """One line: the model, how far it is off at its points and on points left out, and the best other one."""
        if self.chosen not in self.fits:
            return f"cost model {self.chosen}: its error is not known"
        at_points = _exact_or(self.fits[self.chosen])
        points = f"its {self.num_points} points" if self.num_points > 1 else "its only point"
        left_out = "none could be left out" if np.isnan(self.error) else f"{_percent(self.error)} on points left out"
        line = f"cost model {self.chosen}: {at_points} at {points}, {left_out}"
        others = {name: error for name, error in self.errors.items() if name != self.chosen and not np.isnan(error)}
        if not others:
            return line
        other = min(others, key=lambda name: others[name])
        return f"{line} ({other}: {_percent(others[other])})"


def _percent(error: float) -> str:
    return f"{100 * error:.1f} %"


def _exact_or(error: float) -> str:
    return "exact" if error < 5e-4 else f"{_percent(error)} off"


def fit(
    profile: Profile, *, model: str = "auto", candidates: Sequence[Candidate] = CANDIDATES
) -> tuple[CostModel, FitReport]:
    """Turn a profile into a cost model.

    Parameters
    ----------
    model
        `auto` (smallest cross-validated error), `staircase`, `roofline` (best number of planes) or a candidate's
        own name, e.g. `roofline-2`.

    Raises
    ------
    InputError
        When no candidate has that name or the profile has too few points for it.
    """
    tables = [device.table() for device in profile.devices]
    named = [c for c in candidates if model in ("auto", c.name, c.name.split("-")[0])]
    usable = [c for c in named if all(c.usable(table) for table in tables)]
    if not usable:
        names = sorted({"auto", *(c.name.split("-")[0] for c in candidates)})
        reason = "the profile has too few samples for it" if named else f"known: {', '.join(names)}"
        raise InputError("cost model", model, reason)
    kinds = list({device.name: table for device, table in zip(profile.devices, tables, strict=True)}.values())
    errors = {c.name: _cross_validated(c, kinds[:: -(-len(kinds) // MAX_KINDS)]) for c in usable}
    limit = (1 + TIE) * min((error for error in errors.values() if not np.isnan(error)), default=np.inf)
    chosen = next((c for c in usable if errors[c.name] <= limit), usable[0])
    latencies = tuple(chosen.fit_device(table) for table in tables)
    cost = chosen.build(latencies, _measured(profile.devices, chosen.features))
    fits = {c.name: float(np.mean([_miss(c.fit_device(table), table) for table in kinds[:1]])) for c in usable}
    return cost, FitReport(chosen.name, errors, fits, len(tables[0]))


def _miss(latency: Latency, table: FloatArray) -> float:
    """Mean relative error at the points of a table."""
    loads = [table[:, 0], np.nan_to_num(table[:, 1])][: latency.num_features]
    return float(np.abs(latency(loads) / table[:, 2].clip(1e-9) - 1).mean())


def _cross_validated(candidate: Candidate, tables: list[FloatArray]) -> float:
    """Mean relative error over the held-out samples of some devices; NaN below four samples."""
    misses: list[FloatArray] = []
    for unsorted in tables:
        table = unsorted[np.lexsort((np.nan_to_num(unsorted[:, 1]), unsorted[:, 0]))]
        fold = np.arange(len(table)) % FOLDS
        if len(table) < 4:
            return float("nan")
        for i in range(min(FOLDS, len(table))):
            latency = candidate.fit_device(table[fold != i])
            held = table[fold == i]
            loads = [held[:, 0], np.nan_to_num(held[:, 1])][: latency.num_features]
            misses.append(np.abs(latency(loads) / held[:, 2].clip(1e-9) - 1))
    return float(np.concatenate(misses).mean())


def _measured(devices: Sequence[Device], features: Sequence[Feature]) -> FloatArray:
    ranges = np.full((len(devices), len(features), 2), np.nan)
    for g, device in enumerate(devices):
        table = device.table()
        for f, feature in enumerate(features):
            column: Any = {ASSIGNMENTS.name: table[:, 0], ACTIVE.name: table[:, 1]}.get(feature.name)
            if column is not None and not np.isnan(column).any():
                ranges[g, f] = column.min(), column.max()
    return ranges
