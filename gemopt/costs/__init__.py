"""Cost models: from measured samples to the latency of a rank under any load.

`fit` chooses among the registered models by their cross-validated error on the profile's own points.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gemopt.costs.error import believed, is_curve, left_out, middles, noise, roughest
from gemopt.costs.planes import max_affine
from gemopt.exceptions import InputError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Curve, Feature, FloatArray, Latency, line, spread_evenly
from gemopt.profile import Device, Profile

FOLDS = 5
MAX_PLANES = 4
MAX_KINDS = 2  # devices of different names that are cross-validated
FEW = 8  # points below which joining them is all that can be done
ENOUGH = 512  # points of a roofline: a handful of planes needs no more
TIE = 0.03  # of two models whose errors are this close, the simpler one is taken


@dataclass(frozen=True, eq=False)
class CostModel:
    """What ranks take under any load.

    Attributes
    ----------
    name
        Short name, as in reports and `--cost`.
    features
        Additive per-expert features, in the order of the curves of every term.
    latencies
        Of each rank.
    measured
        [G, F, 2] smallest and largest measured load of each rank and feature; NaN where unknown.
    """

    name: str
    features: tuple[Feature, ...]
    latencies: tuple[Latency, ...]
    measured: FloatArray


def staircase(table: FloatArray) -> Latency:
    """Piecewise linear through the measured loads of a device, which may fall; `table` [samples, 4]: `Device.table`."""
    loads, medians = np.unique(table[:, 0]), middles(table)
    if loads[0] > 0:  # an idle rank costs its smallest measured load
        loads, medians = np.append(0.0, loads), np.append(medians[0], medians)
    return Latency(((Curve(loads, medians, _secant(loads, medians)),),))


def roofline(table: FloatArray, *, planes: int = 3) -> Latency:
    """Maximum of planes `a + b N + c A` over assignments and activated experts of a device, b and c >= 0.

    Max-affine regression on relative errors (Magnani and Boyd, Convex piecewise-linear fitting, Optimization and
    Engineering 10, 2009). Idle ranks cost the measured zero load, else the smallest measured load, but not more than
    the planes give for one assignment. `table`: as of `staircase`; unknown active experts (NaN) make a roofline in load
    only.
    """
    idle = table[table[:, 0] == 0]
    busy = table[table[:, 0] > 0]
    if not len(busy):
        return Latency(((line(float(np.median(idle[:, 2])), 0.0), line(0.0, 0.0)),))
    loads = np.nan_to_num(busy[:, :2], nan=0.0)
    some = spread_evenly(len(busy), ENOUGH)
    fitted_K3 = max_affine(loads[some], busy[some, 2], planes)
    if len(idle):
        return _with_idle(fitted_K3, float(np.median(idle[:, 2])))
    smallest = busy[np.lexsort((np.nan_to_num(busy[:, 1]), busy[:, 0]))[0], 2]
    one = fitted_K3 @ [1.0, 1.0, float(np.isfinite(busy[0, 1]))]  # never dearer idle than with one assignment
    floor = np.array([[min(smallest, one.max()), 0.0, 0.0]])
    return _planes(np.concatenate([floor, fitted_K3]))


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


def scaled(cost: CostModel, factors_G: FloatArray) -> CostModel:
    """The cost model with the latencies of each rank times its factor; loads and their measured ranges stay."""
    latencies = tuple(latency.times(float(f)) for latency, f in zip(cost.latencies, factors_G, strict=True))
    return CostModel(cost.name, cost.features, latencies, cost.measured)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cost model that `fit` may choose: how to fit one device, and whether its samples suffice to choose it.

    Asked for by its own name it needs only `least` samples of every device.
    """

    name: str
    features: tuple[Feature, ...]
    fit_device: Callable[[FloatArray], Latency]
    usable: Callable[[FloatArray], bool] = field(default=lambda table: True)
    least: int = 1


def _roofline(planes: int) -> Candidate:
    return Candidate(
        name=f"roofline-{planes}",
        features=(ASSIGNMENTS, ACTIVE),
        fit_device=partial(roofline, planes=planes),
        usable=lambda table: len(table) >= 3 * planes,
        least=3,
    )


CANDIDATES: tuple[Candidate, ...] = (
    Candidate("staircase", (ASSIGNMENTS,), staircase),
    *(_roofline(planes) for planes in range(1, MAX_PLANES + 1)),
)


@dataclass(frozen=True)
class FitReport:
    """Which cost model was chosen, and how far all that were tried are off.

    Errors are mean relative ones, NaN where the profile cannot tell. `errors`: on points left out of the fit; of a
    curve only for the chosen model, the staircase and the smoother one that fits best. `fits`: at the measured points
    themselves, of which one device has `num_points`; of the chosen model over all devices, and `worst` on one of them.
    All else is of the devices, up to two, whose points tell least of each other.
    """

    chosen: str
    errors: dict[str, float]
    fits: dict[str, float] = field(default_factory=dict)
    num_points: int = 0
    worst: float = 0.0

    @property
    def error(self) -> float:
        """Cross-validated error of the chosen model; NaN when the profile has too few points to tell."""
        return self.errors[self.chosen]

    def summary(self) -> str:
        """One line: the model, how far it is off at its points and on points left out, and the best other one."""
        if self.chosen not in self.fits:
            return f"cost model {self.chosen}: its error is not known"
        missed = self.fits[self.chosen]
        at_points = "exact" if missed < 5e-4 else f"{_percent(missed)} off"
        if self.worst > max(2 * missed, 0.01):
            at_points += f" ({_percent(self.worst)} on one device)"
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


def fit(
    profile: Profile | str | os.PathLike[str], *, model: str = "auto", candidates: Sequence[Candidate] = CANDIDATES
) -> tuple[CostModel, FitReport]:
    """Turn a profile, or the one at a path, into a cost model.

    Parameters
    ----------
    model
        `auto`, `staircase`, `roofline` (best number of planes) or a candidate's own name, e.g. `roofline-2`. Where
        load alone may tell the latency, `auto` joins the points unless a smoother model explains them to 1 % or
        within their noise at every size of load; of a surface it takes the smallest cross-validated error.

    Raises
    ------
    InputError
        When no candidate has that name or the profile has too few points for it.
    """
    profile = Profile.of(profile)
    tables = [_in_order(device.table()) for device in profile.devices]
    usable = _usable(model, candidates, tables)
    some = roughest([device.name for device in profile.devices], tables)[:MAX_KINDS]
    kinds = [tables[i] for i in some]
    latencies: list[Latency] = []
    misses = {c.name: [_relative(c.fit_device(table), table) for table in kinds] for c in usable}
    fits = {name: float(np.mean([each.mean() for each in of_kinds])) for name, of_kinds in misses.items()}
    if "staircase" in fits and all(is_curve(table) for table in tables):
        noises = [noise(device.samples) for device in profile.devices]
        smooth = [c for c in usable if c.name != "staircase"]
        chosen = usable[0]
        for candidate in smooth:
            if _explains(misses[candidate.name], kinds, [noises[i] for i in some]):
                fitted = [candidate.fit_device(table) for table in tables]
                if _explains(map(_relative, fitted, tables), tables, noises):
                    chosen, latencies = candidate, fitted
                    break
        judged = {chosen.name, *sorted((c.name for c in smooth), key=lambda name: fits[name])[:1]}
        errors = {c.name: _left_out(c, kinds) for c in usable if c.name in judged or c.name == "staircase"}
    else:
        errors = {c.name: _left_out(c, kinds) for c in usable}
        limit = (1 + TIE) * min((error for error in errors.values() if not np.isnan(error)), default=np.inf)
        chosen = next((c for c in usable if errors[c.name] <= limit), usable[0])
    latencies = latencies or [chosen.fit_device(table) for table in tables]
    measured = _measured(profile.devices, chosen.features)
    missed = [float(_relative(latency, table).mean()) for latency, table in zip(latencies, tables, strict=True)]
    fits[chosen.name] = float(np.mean(missed))
    cost = CostModel(chosen.name, chosen.features, tuple(latencies), measured)
    return cost, FitReport(chosen.name, errors, fits, len(tables[0]), max(missed))


def known(model: str, candidates: Sequence[Candidate] = CANDIDATES) -> list[Candidate]:
    """The candidates that the name stands for; `InputError` where there are none."""
    named = [c for c in candidates if model in ("auto", c.name, c.name.split("-")[0])]
    if not named:
        names = sorted({"auto", *(c.name.split("-")[0] for c in candidates)})
        raise InputError("cost model", model, f"known: {', '.join(names)}")
    return named


def cost_of(given: str | CostModel, profile: Profile | None) -> CostModel:
    """A fitted cost model as it is, or the one of that name fitted to the profile; `InputError` for anything else."""
    if isinstance(given, str):
        if profile is None:
            raise InputError("profile", None, "a profile or a fitted cost model is needed")
        return fit(profile, model=given)[0]
    if not hasattr(given, "latencies"):
        raise InputError("cost", given, "the name of a cost model, or a fitted one")
    return given


def _in_order(table: FloatArray) -> FloatArray:
    return table[np.lexsort((np.nan_to_num(table[:, 1]), table[:, 0]))]


def _usable(model: str, candidates: Sequence[Candidate], tables: list[FloatArray]) -> list[Candidate]:
    """The candidates that the name stands for and the samples suffice for."""
    named = known(model, candidates)
    usable = [c for c in named if all(c.usable(table) for table in tables)]
    usable = usable or [c for c in named if c.name == model and all(len(table) >= c.least for table in tables)]
    if not usable:
        fewest = min(range(len(tables)), key=lambda g: len(tables[g]))
        limit = f"too few samples for it: rank {fewest} has {len(tables[fewest])}, {named[0].least} are needed"
        raise InputError("cost model", model, limit, "measure more loads, or use --cost auto")
    return usable


def _relative(latency: Latency, table: FloatArray) -> FloatArray:
    """[samples] relative error of a latency at samples; 0 where an idle rank took no time."""
    loads = [table[:, 0], np.nan_to_num(table[:, 1])][: latency.num_features]
    measured = table[:, 2]
    return np.divide(np.abs(latency(loads) - measured), measured, out=np.zeros(len(table)), where=measured > 0)


def _explains(misses: Iterable[FloatArray], tables: list[FloatArray], noises: list[float]) -> bool:
    """Whether a model that smooths is as good as joining the points of curves."""
    return all(
        len(table) >= FEW and believed(missed, table[:, 0], sigma)
        for missed, table, sigma in zip(misses, tables, noises, strict=True)
    )


def _left_out(candidate: Candidate, tables: list[FloatArray]) -> float:
    """Error on points that were left out of the fit; NaN where none can be."""
    if candidate.name == "staircase" and all(is_curve(table) for table in tables):
        return float(np.mean([left_out(table) for table in tables]))
    return _cross_validated(candidate, tables)


def _cross_validated(candidate: Candidate, tables: list[FloatArray]) -> float:
    """Mean relative error over the held-out samples of some devices; NaN below four samples."""
    misses: list[FloatArray] = []
    for table in tables:
        fold = np.arange(len(table)) % FOLDS
        if len(table) < 4:
            return float("nan")
        for i in range(min(FOLDS, len(table))):
            latency = candidate.fit_device(table[fold != i])
            misses.append(_relative(latency, table[fold == i]))
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
