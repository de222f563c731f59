"""Pictures of the objective: makespan by layer, ranks over time, search, step latency, moves, replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemopt.latency import FloatArray, IntArray
from gemopt.replay.result import ReplayResult
from gemopt.report import numbers
from gemopt.report.inputs import Inputs
from gemopt.report.numbers import Bounds, Side
from gemopt.report.style import (
    AFTER,
    ALL_LAYERS,
    BEFORE,
    BOUND,
    DASHES,
    LAYERS,
    MANY,
    SCALE,
    SLOWEST,
    WHOLE,
    Section,
    Table,
    changes,
    figure,
    graph_objects,
    microseconds,
    small,
)
from gemopt.result import MovesReport
from gemopt.traces import Traces
from gemopt.words import short

COLOURED = 0.02, 0.95  # quantiles of the busy shares between which colours differ: stragglers are all near 100 %
MOST_PAIRS = 400_000  # of ranks, over all layers: what the page has room for


def layer_names(inputs: Inputs) -> list[str]:
    """`layer 3`, ... as the picker shows them."""
    return [f"layer {layer_id}" for layer_id in inputs.fitted.layer_ids]


def makespan(inputs: Inputs, before: Side, after: Side, bound: Bounds) -> Section:
    """Mean makespan of every layer before and after, and the bound."""
    go = graph_objects()
    steps, names = inputs.fitted.num_steps, [str(i) for i in inputs.fitted.layer_ids]
    old, new = before.evaluation.per_layer_us / steps, after.evaluation.per_layer_us / steps
    low = bound.per_layer_us / steps
    hover = "%{y:.1f} us<extra>%{fullData.name}</extra>"
    hatch = {"shape": "/", "fillmode": "overlay", "solidity": 0.25, "size": 6}
    traces = [
        go.Bar(x=names, y=small(old), name="before", width=0.9, marker={"color": BEFORE, "pattern": hatch}),
        go.Bar(x=names, y=small(new), name="after", width=0.5, marker={"color": AFTER}),
        go.Scatter(x=names, y=small(low), name="bound", mode="lines" if len(names) > 1 else "markers",
                   line={"color": BOUND, "shape": "hvh", "width": 2.5},
                   marker={"symbol": "line-ew", "size": 120, "line": {"color": BOUND, "width": 2.5}}),
    ]  # fmt: skip
    for trace in traces:
        trace.update(hovertemplate=hover)
    shown = figure(
        *traces, barmode="overlay", hovermode="x unified", xaxis=LAYERS,
        yaxis={"title": "makespan, us per step", "rangemode": "tozero"},
    )  # fmt: skip
    rows = [
        (name, microseconds(a), microseconds(b), f"{100 * (b / a - 1):+z.1f} %" if a else "", microseconds(c),
         f"{100 * (1 - c / b):.1f} %" if b else "")
        for name, a, b, c in zip(names, old, new, low, strict=True)
    ]  # fmt: skip
    text = (
        f"Time of the slowest rank, mean over {steps} steps. Before: {inputs.before_name}. No placement can be below "
        f"the bound ({bound.said})."
    )
    if inputs.result is not None and inputs.result.notes:
        text += f" To know: {'; '.join(inputs.result.notes)}."
    if inputs.result is not None and inputs.result.links is not None:
        text += f" Beside it, in no picture of makespans: {inputs.result.links.summary(inputs.result.num_steps)}."
    head = ("layer", "before, us", "after, us", "change", "bound, us", "gap")
    return Section("makespan", "Makespan by layer", text, shown, table=Table(head, rows))


def ranks(inputs: Inputs, before: Side, after: Side, edges: IntArray) -> Section:
    """Makespan over time, and below it what share of it each rank works, before and after."""
    busy = np.concatenate([before.busy.ravel(), after.busy.ravel()])
    low, high = (100 * float(np.quantile(busy, q)) for q in COLOURED)
    shown = _empty_heat_maps(inputs, edges, 5 * np.floor(low / 5), max(5 * np.ceil(high / 5), low + 10))
    names = [ALL_LAYERS, *layer_names(inputs)]
    choices = {name: _of_layer(before, after, index) for index, name in enumerate(names)}
    for trace, update in zip(shown.data, _of_layer(before, after, 0), strict=True):
        trace.update(update)
    often = np.bincount(after.evaluation.straggler_TL.ravel(), minlength=inputs.placement.num_ranks)
    worst = int(often.argmax())
    text = (
        "Above: latency of the slowest rank. Below: for each rank the share of that time in which it works; dark ranks "
        "wait. A dot marks the rank that is the straggler most often. After, over all layers and steps, rank "
        f"{worst} is it most often ({100 * often[worst] / often.sum():.0f} %), and ranks wait "
        f"{100 * after.evaluation.idle_share:.1f} % of the time (before: {100 * before.evaluation.idle_share:.1f} %)."
    )
    return Section("ranks", "Ranks over time", text, shown, choices, "layer")


def _empty_heat_maps(inputs: Inputs, edges: IntArray, low: float, high: float) -> Any:
    go = graph_objects()
    middle = (edges[:-1] + edges[1:] - 1) / 2
    every = np.arange(inputs.placement.num_ranks)
    traces = [
        go.Scatter(x=middle, mode="lines", name="before", line={"color": BEFORE, "dash": "dash"}),
        go.Scatter(x=middle, mode="lines", name="after", line={"color": AFTER}),
    ]
    for trace in traces:
        trace.update(hovertemplate="step %{x:.0f}: %{y:.1f} us<extra>%{fullData.name}</extra>", xaxis="x", yaxis="y")
    for axis, name in (("y2", "before"), ("y3", "after")):
        told = f"{name}, step %{{x:.0f}}, rank %{{y}}: works %{{z}} % of the makespan, %{{customdata}} assignments"
        traces += [
            go.Heatmap(x=middle, y=every, zmin=low, zmax=min(high, 100.0), colorscale=SCALE,
                       hovertemplate=told + "<extra></extra>", xaxis="x", yaxis=axis, showscale=axis == "y2",
                       colorbar={"title": {"text": "% busy", "side": "top"}, "len": 0.7, "y": 0.35, "thickness": 12}),
            go.Scatter(x=middle, mode="markers", marker={"size": 4, "color": "#000000",
                       "line": {"color": "#ffffff", "width": 1}}, showlegend=False, xaxis="x", yaxis=axis,
                       hovertemplate=name + ", step %{x:.0f}: rank %{y} is the straggler in %{customdata} %"
                       "<extra></extra>"),
        ]  # fmt: skip
    height = int(np.clip(460 + 5 * len(every), 520, 900))
    rank = {"range": [len(every) - 0.5, -0.5], "dtick": max(1, len(every) // 8), "title": "rank"}
    return figure(
        *traces, height=height, margin={"l": 64, "r": 8, "t": 28, "b": 48},
        xaxis={"title": "step", "anchor": "y3"}, yaxis={**WHOLE, "title": "us per step", "domain": [0.74, 1.0]},
        yaxis2={**rank, "title": "before: rank", "domain": [0.37, 0.69]},
        yaxis3={**rank, "title": "after: rank", "domain": [0.0, 0.32]},
    )  # fmt: skip


def _of_layer(before: Side, after: Side, index: int) -> list[dict[str, Any]]:
    go = graph_objects()
    traces = [go.Scatter(y=small(each.makespan_us[index])) for each in (before, after)]
    for each in (before, after):
        percent = np.rint(100 * each.busy[index].T).astype(np.int64)
        load = small(np.rint(each.load[index].T).astype(np.int64))
        share = np.rint(100 * each.straggler_share[index]).astype(np.int64)
        traces += [
            go.Heatmap(z=small(percent), customdata=load),
            go.Scatter(y=small(each.straggler[index]), customdata=small(share)),
        ]
    return changes(*traces)


def search(inputs: Inputs) -> Section:
    """The best placement so far (incumbent) and the bound over the seconds of the search."""
    name, title, result = "search", "The search over time", inputs.result
    if result is None or not result.history:
        why = "A placement file does not hold the search that found it: report the result (gemopt solve --result)."
        if result is not None:
            why = f"The solver {result.solver} found no placement."
        return Section(name, title, why)
    go = graph_objects()
    per_step = 1e3 * result.num_steps
    seconds = np.array([point.seconds for point in result.history] + [result.seconds])
    value = np.array([point.objective_us for point in result.history] + [result.history[-1].objective_us]) / per_step
    traces = [
        go.Scatter(x=seconds, y=value, name="best so far", line={"color": AFTER, "shape": "hv"}, mode="lines+markers",
                   marker={"size": 4}, hovertemplate="%{x:.2f} s: %{y:.4f} ms per step<extra>best so far</extra>"),
    ]  # fmt: skip
    known = [(point.seconds, point.bound_us) for point in result.history if point.bound_us is not None]
    if result.bound_us is not None:
        begun = known or [(float(seconds[0]), result.bound_us)]
        x, y = np.array([*begun, (result.seconds, result.bound_us)]).T
        traces.append(go.Scatter(x=x, y=y / per_step, name="bound", line={"color": BOUND, "dash": "dot", "shape": "hv"},
                                 mode="lines", hovertemplate="%{y:.4f} ms per step<extra>bound</extra>"))  # fmt: skip
    shown = figure(*traces, xaxis={"title": "seconds"}, yaxis={"title": "ms per step"}, height=340)
    gap = "" if result.gap is None else f" At the end no placement can be better by more than {100 * result.gap:.2f} %."
    gap += "" if result.ceiling is None else f" What is {result.ceiling.summary()}."
    stopped = result.stopped_by.value.replace("_", " ")
    text = (
        f"{result.solver}: {result.status.value}, stopped by {stopped} after {result.seconds:.1f} s."
        f"{gap} The curve begins when every layer has a placement"
        + ("." if known or result.bound_us is None else "; the bound is the final one.")
        + (" Both are of makespans and links together." if result.links is not None else "")
    )
    return Section(name, title, text, shown)


def latency(inputs: Inputs, old_us: FloatArray, new_us: FloatArray) -> Section:
    """Distribution of the step latency on the steps that count, with intervals of its quantiles."""
    traces, rows = [], []
    for name, step_us, colour, dash in (("before", old_us, BEFORE, "dash"), ("after", new_us, AFTER, "solid")):
        values, spread = np.quantile(step_us, numbers.QUANTILES), numbers.intervals(step_us)
        traces += _distribution(name, step_us, values, spread, {"color": colour, "dash": dash})
        between = [""] * len(values)
        if spread is not None:
            between = [f"{microseconds(low)} to {microseconds(high)}" for low, high in spread]
        for q, value, interval in zip(numbers.QUANTILES, values, between, strict=True):
            rows.append((name, f"p{100 * q:.0f}", microseconds(value), interval))
    shown = figure(*traces, xaxis={**WHOLE, "title": "latency of a step, all MoE layers, us"},
                   yaxis={"title": "share of the steps", "tickvals": [0, 0.25, 0.5, 0.75, 0.9, 0.99]})  # fmt: skip
    if inputs.held is not None:
        of = f"{len(new_us)} steps that the solver did not see"
    elif inputs.known:
        of = f"the {len(new_us)} steps that the placement was made for; none were held out"
    else:
        of = f"all {len(new_us)} steps; the file does not say on which of them it was made"
    how = "bars are 95 % intervals (circular block bootstrap)"
    if len(new_us) < numbers.LEAST_STEPS:
        how = f"below {numbers.LEAST_STEPS} steps there are no intervals"
    text = f"Of {of}. Points are p50, p90 and p99; {how}."
    head = ("placement", "quantile", "us", "95 % interval, us")
    return Section("latency", "Latency of a step", text, shown, table=Table(head, rows))


def _distribution(
    name: str, step_us: FloatArray, values: FloatArray, spread: FloatArray | None, line: dict[str, str]
) -> list[Any]:
    """The cumulative distribution as a line, and its quantiles as points with bars."""
    go, bars = graph_objects(), None
    at = np.linspace(0, 1, min(400, len(step_us)))
    if spread is not None:
        bars = {"type": "data", "symmetric": False, "array": spread[:, 1] - values, "arrayminus": values - spread[:, 0],
                "color": line["color"], "thickness": 2.5, "width": 6}  # fmt: skip
    told = "%{y:.3f} of the steps take at most %{x:.0f} us<extra></extra>"
    return [
        go.Scatter(x=small(np.quantile(step_us, at)), y=small(at), name=name, mode="lines", line=line,
                   hovertemplate=told),
        go.Scatter(x=values, y=numbers.QUANTILES, mode="markers", marker={"color": line["color"], "size": 8},
                   error_x=bars, showlegend=False, text=[f"p{100 * q:.0f}" for q in numbers.QUANTILES],
                   hovertemplate=name + " %{text}: %{x:.0f} us<extra></extra>"),
    ]  # fmt: skip


def moves(inputs: Inputs) -> Section:
    """How many experts each rank sends to each other one."""
    name, title = "moves", "Moves by pair of ranks"
    go = graph_objects()
    sent_LGG = numbers.moved(inputs.before, inputs.placement, np.array(inputs.profile.node_of_rank))
    total, size = int(sent_LGG.sum()), inputs.profile.model.expert_bytes
    told = "" if inputs.result is None or inputs.result.moves is None else _told(inputs.result.moves, inputs.fitted)
    if not total:
        return Section(name, title, f"Nothing moves: the ranks hold the experts of {inputs.before_name}.{told}")
    layers = {ALL_LAYERS: sent_LGG.sum(axis=0)}
    if each_layer := sent_LGG.size <= MOST_PAIRS:
        layers |= dict(zip(layer_names(inputs), sent_LGG, strict=True))
    pair = "rank %{y} to rank %{x}: %{z} experts<extra></extra>"
    every = np.arange(sent_LGG.shape[1])
    heat = go.Heatmap(z=small(layers[ALL_LAYERS]), x=every, y=every, colorscale=SCALE, reversescale=True, zmin=0,
                      hovertemplate=pair, xgap=1, ygap=1,
                      colorbar={"title": {"text": "experts", "side": "right"}, "thickness": 12,
                                "dtick": -(-int(layers[ALL_LAYERS].max()) // 8)})  # fmt: skip
    tick = {"dtick": max(1, len(every) // 8), "constrain": "domain"}
    across, down = [-0.5, len(every) - 0.5], [len(every) - 0.5, -0.5]
    shown = figure(heat, height=460, xaxis={**tick, "title": "to rank", "scaleanchor": "y", "range": across},
                   yaxis={**tick, "title": "from rank", "range": down})  # fmt: skip
    weight = "" if size is None else f", {short(total * size / 1e9)} GB"
    text = (
        f"From {inputs.before_name} to this placement {total} experts move over all layers{weight}; each comes from "
        "the nearest rank that holds it, and slots keep what they can."
    )
    text += told
    if not each_layer:
        return Section(name, title, f"{text} With so many ranks only all layers together are shown.", shown)
    choices = {each: changes(go.Heatmap(z=small(sent))) for each, sent in layers.items()}
    return Section(name, title, text, shown, choices, "layer")


def _told(moves: MovesReport, fitted: Traces) -> str:
    """What moved against the placement in force when it was solved, whose ranks may have had other numbers."""
    said = moves.summary(fitted.num_steps).replace("\n", "; ")
    said = f" Against the placement in force when it was solved: {said}."
    if moves.old_rank in ([], list(range(len(moves.old_rank)))):
        return said
    was = ", ".join("new" if rank < 0 else str(rank) for rank in moves.old_rank)
    return f"{said} Its ranks were numbered {was} there."


def replay(result: ReplayResult, of_others: Sequence[str] = ()) -> Section:
    """Change of the makespan against contiguous placement and moves over time, by strategy.

    of_others: see `Inputs.replay_of`.
    """
    shown = figure(*_tracks(result), height=520, xaxis={"title": "step", "anchor": "y2"},
                   yaxis={"title": "change, %", "domain": [0.4, 1.0]},
                   yaxis2={"title": "experts moved", "domain": [0.0, 0.32], "rangemode": "tozero"})  # fmt: skip
    events = [str(event) for event in result.schedule.events]
    at = {step for event in result.schedule.events for step in (event.start, event.stop) if step is not None}
    for step in sorted(each for each in at if each >= result.first_step):
        shown.add_shape(type="line", x0=step, x1=step, y0=0, y1=1, yref="paper",
                        line={"color": SLOWEST, "width": 1, "dash": "dash"})  # fmt: skip
    rows = [(row.strategy, f"{row.makespan_us / 1e3:,.1f}", "" if row.change is None else f"{100 * row.change:+z.1f}",
             str(row.moves), *(f"{q:.0f}" for q in (row.p50_us, row.p90_us, row.p99_us)))
            for row in result.rows]  # fmt: skip
    text = (
        f"Recorded traffic replayed step by step: fitted on the first {result.first_step} steps, scored on the "
        f"{result.num_steps - result.first_step} after them, in windows of {result.window}. Above: change of the "
        "makespan against contiguous placement. "
        + (f"It is of {' and '.join(of_others)} than this page. " if of_others else "")
        + ("clairvoyant knows the future. " if any(row.strategy == "clairvoyant" for row in result.rows) else "")
        + ("Dashed lines: " + "; ".join(events) + "." if events else "")
    )
    head = ("strategy", "makespan, ms", "change, %", "moves", "p50, us", "p90, us", "p99, us")
    return Section("replay", "Following the traffic", text.rstrip(), shown, table=Table(head, rows))


def _tracks(result: ReplayResult) -> list[Any]:
    """Two curves per strategy, window by window; the last window ends with the traces."""
    go = graph_objects()
    traces = []
    for number, track in enumerate(result.timeline):
        style = {"color": MANY[number % len(MANY)], "dash": DASHES[number % len(DASHES)],
                 "width": 3 if track.strategy == "controller" else 1.5, "shape": "hv"}  # fmt: skip
        edges, change = result.changes(track)
        kind = {"x": edges, "name": track.strategy, "legendgroup": track.strategy, "line": style, "mode": "lines"}
        moved = np.add.reduceat(np.array(track.moves), edges[:-1] - result.first_step).cumsum()
        traces.append(go.Scatter(y=small(100 * np.append(change, change[-1])), **kind,
                                 hovertemplate="from step %{x}: %{y:.1f} %<extra>%{fullData.name}</extra>",
                                 ))  # fmt: skip
        traces.append(go.Scatter(y=small(np.append(moved, moved[-1])), **kind, yaxis="y2", showlegend=False,
                                 hovertemplate="from step %{x}: %{y} moved<extra>%{fullData.name}</extra>",
                                 ))  # fmt: skip
    return traces
