"""Pictures of results. Every function takes an optional `ax` and returns the figure."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemopt.compare import BASELINE, Comparison
from gemopt.documents import check_writable, replacing
from gemopt.evaluate import Evaluation
from gemopt.exceptions import InputError, missing
from gemopt.result import Result

ACCENT, MUTED = "#d1495b", "#8d99ae"


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing(error, "drawing") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    return _pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def check_picture(path: str | os.PathLike[str]) -> str:
    """The format a picture's ending asks for; `InputError` when it is unknown or the file could not be written."""
    kind = os.path.splitext(path)[1].lstrip(".") or "png"
    known = _pyplot().Figure().canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError("--plot", str(path), f"endings {', '.join(sorted(known))}")
    check_writable(path)
    return kind


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write the picture atomically; the format follows the ending."""
    kind = check_picture(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=kind)
    with replacing(path) as stream:
        stream.write(buffer.getvalue())


def plot_comparison(rows: Sequence[Comparison], *, title: str = "", ax: Any = None) -> Any:
    """Change of the summed step latency against contiguous placement, on fitted and on held-out steps."""
    shown = [row for row in rows if row.change is not None and row.ran and row.solver != BASELINE]
    ax = _axes(ax, (8, 0.5 * len(shown) + 1.6))
    places = np.arange(len(shown))
    held = any(row.holdout_change is not None for row in shown)
    bars = [("fitted on", [row.change for row in shown], MUTED)]
    if held:
        bars.append(("held out", [row.holdout_change for row in shown], ACCENT))
    height = 0.8 / len(bars)
    for index, (label, values, colour) in enumerate(bars):
        percent = [100 * (value or 0.0) for value in values]
        drawn = ax.barh(places + index * height, percent, height, label=label, color=colour)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a bound must not strike a number out
        ax.bar_label(drawn, fmt="%+.1f", padding=3, fontsize=8, bbox=behind, zorder=4)
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
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    return ax.figure


def plot_history(result: Result, *, ax: Any = None) -> Any:
    """Best objective over time, with the proven bound."""
    ax = _axes(ax, (7, 4))
    points = [(point.seconds, point.objective_us) for point in result.history]
    if points:
        seconds, values = zip(*points, (result.seconds, points[-1][1]), strict=True)
        ax.step(seconds, values, where="post", color=ACCENT, label="incumbent")
    if result.bound_us is not None:
        ax.axhline(result.bound_us, color="black", linestyle=":", label="bound")
    ax.set_xlabel("seconds")
    ax.set_ylabel("objective, us")
    ax.set_title(result.solver)
    if ax.lines:
        ax.legend()
    return ax.figure


def plot_stragglers(evaluation: Evaluation, num_ranks: int, *, title: str = "", ax: Any = None) -> Any:
    """How often each rank is the one the others wait for, per layer."""
    ax = _axes(ax, (7, 4))
    share_LG = np.stack(
        [np.bincount(column, minlength=num_ranks) / len(column) for column in evaluation.straggler_TL.T]
    )
    drawn = ax.imshow(share_LG, aspect="auto", cmap="magma_r", vmin=0, vmax=1)
    ax.set_xlabel("rank")
    ax.set_ylabel("MoE layer")
    ax.set_title(title or "Share of steps in which a rank is the slowest")
    ax.figure.colorbar(drawn, ax=ax)
    return ax.figure
