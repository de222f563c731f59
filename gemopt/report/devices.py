"""Picture of the devices: measured points and the fitted cost model that everything else is computed with."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemopt.latency import FloatArray, Latency, spread_evenly
from gemopt.profile import Device
from gemopt.report.inputs import Inputs
from gemopt.report.style import AFTER, DASHES, GREEN, MANY, SKY, SLOWEST, Section, changes, figure, graph_objects, small
from gemopt.words import counted

ALL = "all ranks"
POINTS = 1500  # of one device
LEVELS = 5  # numbers of active experts that have a curve
POINT = {"size": 5, "color": AFTER, "symbol": "circle-open"}
ROOM = 1.5  # what is shown, times the largest load
FEW = 12  # ranks that have a colour each
ON_CURVE, ON_CURVES = 240, 16_000  # points of one curve, and of those of all ranks


def devices(inputs: Inputs, most: float) -> Section:
    """Latency against assignments: the fit of every rank, or one rank's fit with all its points. most: assignments."""
    held = int(inputs.placement.slots_per_rank.max())
    tables = [device.table() for device in inputs.profile.devices]
    pairs = list(zip(inputs.profile.devices, inputs.cost.latencies, tables, strict=True))
    everyone = _every(pairs, held)
    choices: dict[str, list[dict[str, Any]]] = {ALL: changes(*everyone)}
    for device, latency, table in pairs:
        alone = _one(latency, table)
        hidden = [graph_objects().Scatter(visible=False)] * (len(everyone) - len(alone))
        choices[f"rank {device.rank}: {device.name}"] = changes(*alone, *hidden)
    across, up = _view(pairs, most, held)
    shown = figure(*everyone, height=440, xaxis={"title": "assignments on the rank", **across},
                   yaxis={"title": "latency, us", **up})  # fmt: skip
    surface = np.isfinite(tables[0][:, 1]).all()
    text = (
        f"{counted(len(pairs), 'device')}, {sum(map(len, tables))} measured points"
        f"{', ' + inputs.profile.kernel if inputs.profile.kernel else ''}; {inputs.cost_summary}. "
        + ("Latency depends on the active experts too: curves of all ranks are at about as many as one can hold here. "
           if surface else "")
        + "Choose one rank for all its points. "
        + _outside(inputs)
        + (f" No rank gets more than {most:.0f} assignments here; zoom out for what was measured beyond."
           if "range" in across else "")
    )  # fmt: skip
    if max(map(len, tables)) > POINTS:
        text += f" Of each rank {POINTS} points, evenly spread, are drawn."
    return Section("devices", "Devices: measured and fitted", text, shown, choices, "devices")


def _view(
    pairs: list[tuple[Device, Latency, FloatArray]], most: float, held: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ranges of both axes: the loads that occur where far more was measured, otherwise everything."""
    if not 0 < ROOM * most < max(table[:, 0].max() for *_, table in pairs):
        return {"rangemode": "tozero"}, {"rangemode": "tozero"}
    loads = np.linspace(0.0, ROOM * most, ON_CURVE)
    top = max(float(latency(_features(latency, loads, _most(table, held))).max()) for _, latency, table in pairs)
    return {"range": [0, ROOM * most]}, {"range": [0, 1.1 * top]}


def _outside(inputs: Inputs) -> str:
    share = inputs.evaluate(inputs.placement, inputs.fitted).outside
    return f"{100 * share:.1f} % of the loads of this placement lie outside the measured range."


def _every(pairs: list[tuple[Device, Latency, FloatArray]], held: int) -> list[Any]:
    """One curve per rank, at as many active experts as it can hold, and the points there while they are few."""
    go = graph_objects()
    found = []
    at_mean = [float(latency(_features(latency, table[:, :1].mean(axis=0), _most(table, held)))[0])
               for _, latency, table in pairs]  # fmt: skip
    marked = {int(np.argmax(at_mean)): ("slowest", SLOWEST), int(np.argmin(at_mean)): ("fastest", GREEN)}
    few = len(pairs) <= FEW
    for number, (device, latency, table) in enumerate(pairs):
        loads, name = _grid(table, ON_CURVES // len(pairs)), f"rank {device.rank}"
        style = {"color": MANY[number % len(MANY)] if few else SKY, "width": 1.5 if few else 1.0,
                 "dash": DASHES[number // len(MANY) % len(DASHES)] if few else "solid"}  # fmt: skip
        if number in marked and not few:
            name, style = f"{name} ({marked[number][0]})", {"color": marked[number][1], "width": 3, "dash": "solid"}
        times = latency(_features(latency, loads, _most(table, held)))
        found.append(go.Scatter(x=small(loads), y=small(times), mode="lines", name=name, line=style,
                                visible=True, showlegend=few or number in marked,
                                hovertemplate=name + ": %{x:.0f} assignments, %{y:.1f} us<extra></extra>"))  # fmt: skip
    full = np.concatenate(
        [table[np.isnan(table[:, 1]) | (table[:, 1] == _most(table, held)), :3:2] for _, _, table in pairs]
    )
    points = full if len(full) <= POINTS else full[:0]
    found.append(go.Scatter(x=small(points[:, 0]), y=small(points[:, 1]), mode="markers", name="measured",
                            visible=True, showlegend=bool(len(points)), marker=POINT,
                            hovertemplate="%{x:.0f} assignments: %{y:.1f} us<extra>measured</extra>"))  # fmt: skip
    empty = [go.Scatter(x=[], y=[], visible=False)] * max(0, LEVELS + 1 - len(found))
    return found + empty  # as many traces as one rank needs


def _most(table: FloatArray, held: int) -> float:
    """The fewest measured active experts of which there are `held`, else the most; 0 where they are not known."""
    active = table[:, 1]
    if not np.isfinite(active).all():
        return 0.0
    return float(min(active[active >= held], default=active.max()))


def _one(latency: Latency, table: FloatArray) -> list[Any]:
    """The points of one rank, and a curve for each of some numbers of active experts."""
    go = graph_objects()
    surface = np.isfinite(table[:, 1]).all()
    some = table[spread_evenly(len(table), POINTS)]
    levels = np.unique(table[:, 1]) if surface else np.zeros(1)
    levels = levels[levels > 0] if surface and (levels > 0).any() else levels
    levels = levels[spread_evenly(len(levels), LEVELS)]
    told = "%{x:.0f} assignments: %{y:.1f} us" + (", %{customdata:.0f} active experts" if surface else "")
    found = [go.Scatter(x=small(some[:, 0]), y=small(some[:, 2]), customdata=small(np.nan_to_num(some[:, 1])),
                        mode="markers", name="measured", marker=POINT,
                        visible=True, showlegend=True, hovertemplate=told + "<extra>measured</extra>",
                        error_y=_spread(some))]  # fmt: skip
    loads = _grid(table)
    for number, active in enumerate(levels):
        name = f"fit, {active:.0f} active" if surface else "fit"
        found.append(go.Scatter(x=small(loads), y=small(latency(_features(latency, loads, float(active)))), name=name,
                                mode="lines", line={"color": MANY[(number + 1) % len(MANY)], "width": 2,
                                                    "dash": DASHES[number % len(DASHES)]},
                                visible=True, showlegend=True,
                                hovertemplate="%{x:.0f} assignments: %{y:.1f} us<extra>%{fullData.name}</extra>",
                                ))  # fmt: skip
    return found


def _spread(table: FloatArray) -> dict[str, Any] | None:
    """Bars of the measured spread, where it was."""
    if not np.isfinite(table[:, 3]).all() or not table[:, 3].any():
        return None
    return {"type": "data", "array": small(table[:, 3]), "thickness": 1, "width": 0}


def _grid(table: FloatArray, most: int = ON_CURVE) -> FloatArray:
    """Loads of a curve: the measured ones and evenly spread ones between."""
    loads = np.unique(np.append(table[:, 0], np.linspace(0.0, table[:, 0].max(), ON_CURVE // 2)))
    return np.asarray(loads[spread_evenly(len(loads), min(most, ON_CURVE))])


def _features(latency: Latency, loads: FloatArray, active: float) -> list[FloatArray]:
    return [loads, np.minimum(loads, active)][: latency.num_features]
