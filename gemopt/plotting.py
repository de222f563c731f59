"""Pictures of results. Every function takes an optional `ax` and returns the axes it drew on."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemopt.advise.document import Advice
from gemopt.compare import BASELINE, Comparison
from gemopt.documents import check_writable, replacing
from gemopt.evaluate import Evaluation
from gemopt.exceptions import InputError, missing
from gemopt.replay.result import ReplayResult
from gemopt.result import Result
from gemopt.solving.fronts import SWAPS, FrontPoint

WIDE = 20  # largest over smallest number from which a scale is logarithmic
ACCENT, MUTED = "#d1495b", "#8d99ae"
STRATEGY_COLOURS = {
    "contiguous": "black",
    "fitted-once": MUTED,
    "eplb-vllm": "#2a9d8f",
    "eplb-sglang": "#bc8a00",
    "free": "#457b9d",
    "controller": ACCENT,
    "clairvoyant": "black",
}


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing(error, "drawing") from None
    if "matplotlib.pyplot" not in sys.modules and "MPLBACKEND" not in os.environ:
        mpl.use("Agg")  # nobody has asked for windows
    from matplotlib import pyplot

    return pyplot


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    return subplots(size=size)[1] if ax is None else ax


def subplots(rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, off any screen."""
    figure, axes = _pyplot().subplots(rows, columns, figsize=size, layout="constrained")
    return figure, axes


def _below(ax: Any, points: float) -> Any:
    """Axes coordinates, shifted down by so many points."""
    from matplotlib.transforms import ScaledTranslation

    return ax.transAxes + ScaledTranslation(0, -points / 72, ax.figure.dpi_scale_trans)


def check_picture(path: str | os.PathLike[str]) -> str:
    """The format a picture's ending asks for; `InputError` when it is unknown or the file could not be written."""
    kind = os.path.splitext(path)[1].lstrip(".") or "png"
    known = _pyplot().Figure().canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError("--plot", str(path), f"endings {', '.join(sorted(known))}")
    check_writable(path)
    return kind


def save(ax: Any, path: str | os.PathLike[str]) -> None:
    """Write the whole figure of these axes (one, several, or a figure) atomically; the format follows the ending."""
    kind = check_picture(path)
    buffer = io.BytesIO()
    first = np.ravel(ax)[0]
    getattr(first, "figure", first).savefig(buffer, dpi=150, format=kind)
    with replacing(path) as stream:
        stream.write(buffer.getvalue())


def plot_comparison(rows: Sequence[Comparison], *, title: str = "", ax: Any = None) -> Any:
    """Change of the summed step latency against contiguous placement, on fitted and on held-out steps."""
    shown = [row for row in rows if row.change is not None and row.ran and row.solver != BASELINE]
    ax = _axes(ax, (8, 0.5 * len(shown) + 1.9))
    if not shown:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "only contiguous placement: nothing to compare", ha="center", transform=ax.transAxes)
        return ax
    places = np.arange(len(shown))
    held = any(row.holdout_change is not None for row in shown)
    bars = [("fitted on", [row.change for row in shown], MUTED)]
    if held:
        bars.append(("held out", [row.holdout_change for row in shown], ACCENT))
    height = 0.8 / len(bars)
    for index, (label, values, colour) in enumerate(bars):
        percent = [100 * (value or 0.0) for value in values]
        hatch = "//" if index else None  # tells the bars apart in grey print
        drawn = ax.barh(places + index * height, percent, height, label=label, color=colour, hatch=hatch, ec="white")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a bound must not strike a number out
        ax.bar_label(drawn, fmt="{:+z.1f}", padding=3, fontsize=8, bbox=behind, zorder=4)
    known = [row for row in rows if row.bound_us and row.objective_us is not None]
    if known:
        best = max(known, key=lambda row: row.bound_us or 0.0)
        base = (best.objective_us or 0.0) / (1 + (best.change or 0.0))
        ax.axvline(
            100 * ((best.bound_us or 0.0) / base - 1), color="black", linestyle=":", label="proven bound (fitted)"
        )
    ax.set_yticks(places + height * (len(bars) - 1) / 2, [row.solver for row in shown])
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("summed step latency against contiguous placement, %")
    ax.set_title(title or "Placements compared", fontsize=10)
    below = {"bbox_to_anchor": (0.5, 0), "bbox_transform": _below(ax, 34)}  # of the x label, whatever the height
    ax.legend(fontsize=8, loc="upper center", ncols=3, frameon=False, **below)
    return ax


def plot_front(points: Sequence[FrontPoint], *, ax: Any = None) -> Any:
    """Latency of a step against experts moved; solvers that heed no moves as single points."""
    ax = _axes(ax, (7, 4))
    swaps = [point for point in points if point.source == SWAPS]
    ax.plot([p.moves for p in swaps], [p.step_us for p in swaps], "o-", color=MUTED, label="fitted on")
    if all(point.holdout_us is not None for point in points):
        ax.plot([p.moves for p in swaps], [p.holdout_us for p in swaps], "o-", color=ACCENT, label="held out")
    for point in points:
        if point.source != SWAPS:
            value = point.step_us if point.holdout_us is None else point.holdout_us
            ax.plot([point.moves], [value], "x", color="black")
            ax.annotate(f" {point.source}", (point.moves, value), fontsize=8)
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("experts moved from the placement in force, log scale")
    ax.set_ylabel("latency of a step, us")
    ax.set_title("What moves gain", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_history(result: Result, *, ax: Any = None) -> Any:
    """Best objective over time, with the proven bound: milliseconds per step."""
    ax = _axes(ax, (7, 4))
    per_step = 1e3 * max(1, result.num_steps)
    points = [(point.seconds, point.objective_us / per_step) for point in result.history]
    if points:
        seconds, values = zip(*points, (result.seconds, points[-1][1]), strict=True)
        ax.step(seconds, values, where="post", color=ACCENT, label="incumbent")
    if result.bound_us is not None:
        ax.axhline(result.bound_us / per_step, color="black", linestyle=":", label="bound")
    ax.set_xlabel("seconds")
    ax.set_ylabel("objective, ms per step")
    ax.set_title(result.solver, loc="left")
    _legend_above(ax)
    return ax


def plot_layers(result: Result, *, ax: Any = None) -> Any:
    """Makespan of every layer, mean per step, with the proven bound."""
    ax = _axes(ax, (8, 4))
    names = [str(layer.layer_id) for layer in result.per_layer]
    nan = float("nan")
    value, bound = (
        np.array([nan if each is None else each / result.num_steps for each in column])
        for column in zip(*((layer.objective_us, layer.bound_us) for layer in result.per_layer), strict=True)
    )
    ax.bar(names, value, color=MUTED, label=result.solver)
    ax.plot(names, bound, "_", color="black", markersize=min(14, 300 / len(names)), label="bound")
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("makespan, us per step")
    _thin_labels(ax, names)
    _legend_above(ax)
    return ax


def _thin_labels(ax: Any, names: Sequence[str]) -> None:
    """Leave out names that would run into each other: a digit takes 0.09 inches."""
    inches = ax.get_window_extent().width / ax.figure.dpi
    most = max(1, int(inches / (0.09 * (1 + max(map(len, names), default=1)))))
    ax.set_xticks(range(0, len(names), -(-len(names) // most)))


def _legend_above(ax: Any) -> None:
    """A legend in one line above the axes, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        ax.legend(handles, labels, fontsize=8, frameon=False, ncols=len(labels), loc="lower right",
                  bbox_to_anchor=(1, 1), borderaxespad=0.1, columnspacing=1.2)  # fmt: skip


def plot_steps(evaluation: Evaluation, *, ax: Any = None) -> Any:
    """Latency of every step over time, with p50, p90 and p99."""
    ax = _axes(ax, (8, 4))
    ax.plot(evaluation.step_us, color=MUTED, linewidth=1)
    for q, style in ((0.5, ":"), (0.9, "--"), (0.99, "-")):
        ax.axhline(evaluation.quantile_us(q), color=ACCENT, linestyle=style, label=f"p{100 * q:.0f}")
    ax.set_xlabel("step")
    ax.set_ylabel("latency of all MoE layers, us")
    _legend_above(ax)
    return ax


def plot_stragglers(evaluation: Evaluation, num_ranks: int | None = None, *, ax: Any = None) -> Any:
    """How often each rank is the one the others wait for, per layer."""
    ax, layers = _axes(ax, (7, 4)), evaluation.straggler_TL.shape[1]
    names = dict(enumerate(evaluation.layer_ids or range(layers)))
    num_ranks = int(evaluation.straggler_TL.max()) + 1 if num_ranks is None else num_ranks
    share_LG = np.stack(
        [np.bincount(column, minlength=num_ranks) / len(column) for column in evaluation.straggler_TL.T]
    )
    drawn = ax.imshow(share_LG, aspect="auto", cmap="magma_r", vmin=0, vmax=share_LG.max())
    ax.set_xlabel("rank")
    ax.set_ylabel("MoE layer")
    ax.set_title("Share of steps in which a rank is the slowest")
    ax.locator_params(integer=True)
    ax.yaxis.set_major_formatter(lambda at, _: str(names.get(at, "")))
    ax.figure.colorbar(drawn, ax=ax)
    return ax


def plot_replay(result: ReplayResult, *, axes: Any = None) -> Any:
    """Makespan against contiguous placement and moves over time, window by window; decisions ticked, regimes shaded."""
    if axes is None:
        _, axes = _pyplot().subplots(2, 1, figsize=(10, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained")
    upper, lower = axes
    steps = np.arange(result.first_step, result.num_steps)
    others = itertools.cycle(("#f4a261", "#6a4c93", "#606c38", "#b56576", "#00509d"))
    for track in result.timeline:
        ours, bound = track.strategy == "controller", track.strategy == "clairvoyant"
        colour = STRATEGY_COLOURS.get(track.strategy) or next(others)
        style = {"color": colour, "linestyle": ":" if bound else "-", "linewidth": 2.2 if ours else 1.3,
                 "zorder": 3 if ours else 2}  # fmt: skip
        edges, change = result.changes(track)
        upper.stairs(100 * change, edges, baseline=None, label=track.strategy, **style)
        lower.step(steps, np.cumsum(track.moves), where="post", **style)
        at = [decision.step for decision in track.decisions]
        moved = np.cumsum(track.moves)[np.array(at, int) - result.first_step]
        lower.plot(at, moved, "|", color=colour, markersize=7, zorder=style["zorder"])
    _shade(axes, result)
    upper.set_ylabel("step latency\nagainst contiguous, %")
    lower.set_ylabel("experts moved")
    totals = [total for track in result.timeline if (total := sum(track.moves))]
    if totals and max(totals) > WIDE * min(totals):
        lower.set_yscale("symlog", linthresh=10, subs=[2, 5])
        lower.set_ylabel("experts moved,\nlog scale")
        lower.yaxis.set_minor_formatter("{x:,.0f}")
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("step")
    lower.set_xlim(result.first_step, result.num_steps)
    upper.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=4, frameon=False)
    return axes


def _shade(axes: Any, result: ReplayResult) -> None:
    """A tint per task, its name at the top, and a line where something happens to a device."""
    names = sorted({regime.name for regime in result.regimes})
    tints = _pyplot().get_cmap("Pastel1")
    for regime in result.regimes:
        start, stop = max(regime.start, result.first_step), regime.stop
        if stop <= result.first_step:
            continue
        for ax in axes:
            ax.axvspan(start, stop, color=tints(names.index(regime.name) % 9), alpha=0.35, linewidth=0)
        if stop - start > 0.03 * (result.num_steps - result.first_step):
            axes[0].annotate(regime.name, ((start + stop) / 2, 0.98), xycoords=("data", "axes fraction"),
                             ha="center", va="top", fontsize=8)  # fmt: skip
    for event in result.schedule.events:
        for step in (event.start, event.stop):
            if step is not None and step >= result.first_step:
                for ax in axes:
                    ax.axvline(step, color="black", linewidth=0.8, linestyle="--")


def plot_strategy_map(advice: Advice, *, ax: Any = None) -> Any:
    """Best strategy by skewness and bandwidth, with what it changes against contiguous placement."""
    drawn = advice.map
    if drawn is None:
        raise InputError("--plot", "advice without a map", "advice from a sweep", "advise without --no-sweep")
    ax = _axes(ax, (7, 4))
    names = sorted({name for row in drawn.best for name in row})
    colours = _pyplot().get_cmap("Set2")
    ax.imshow([[names.index(name) for name in row] for row in drawn.best], cmap=colours, vmin=0, vmax=7,
              aspect="auto", origin="lower")  # fmt: skip
    for y, (row, changes) in enumerate(zip(drawn.best, drawn.changes, strict=True)):
        for x, (name, change) in enumerate(zip(row, changes, strict=True)):
            ax.annotate(f"{name}\n{100 * change:+z.1f} %", (x, y), ha="center", va="center", fontsize=7)
    ax.set_xticks(range(len(drawn.gbps)), [f"{each:g}" for each in drawn.gbps])
    ax.set_yticks(range(len(drawn.skews)), [f"{each:.2f}" for each in drawn.skews])
    ax.set_xlabel("bandwidth of a rank, GB/s")
    ax.set_ylabel("hottest expert over mean")
    ax.set_title("Best strategy, and its change of the makespan against contiguous", fontsize=10)
    return ax.figure
