"""Colours, and the shape of a section of the page. Nothing here knows what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import missing

# Okabe and Ito's palette, safe for colour-blind readers; the page maps each to a lighter one on dark ground.
BEFORE, AFTER, BOUND, SLOWEST = "#b35900", "#0072b2", "#111111", "#d55e00"
GREEN, PURPLE, SKY, YELLOW = "#009e73", "#a3568c", "#3d95c7", "#b8860b"
ON_DARK = {
    BEFORE: "#f0a33e",
    AFTER: "#5ab4f0",
    BOUND: "#f5f5f5",
    SLOWEST: "#ff8c42",
    GREEN: "#35c79c",
    PURPLE: "#dd94c5",
    SKY: "#8fd0f5",
    YELLOW: "#f0e442",
}
INK = {"light": ("#1a1d21", "#e3e7ec", "#ffffff"), "dark": ("#e8eaed", "#363d45", "#14171a")}  # and lines, ground
MANY = (AFTER, BEFORE, GREEN, PURPLE, SKY, YELLOW, BOUND, SLOWEST)  # the two that are alike furthest apart
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SCALE = "Cividis"
ALL_LAYERS = "all layers"
LAYERS = {"title": "MoE layer", "type": "category", "nticks": 15}
WHOLE = {"tickformat": ",d"}  # 12,000 us, not 12k


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers behind a picture, for those who read rather than look."""

    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Section:
    """One picture and what is said of it.

    Attributes
    ----------
    name, title, text
        Anchor, heading, and what the picture shows and how to read it.
    figure
        The plotly figure; None where there is nothing to draw, and `text` says why.
    choices
        For each choice of a picker, what changes in each trace of the figure. They are layers when `picker` is
        `layer`, and the page then has one picker for all such sections.
    picker
        Name of the picker; empty for none.
    """

    name: str
    title: str
    text: str
    figure: Any = None
    choices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    picker: str = ""
    table: Table | None = None


def graph_objects() -> Any:
    """`plotly.graph_objects`; one line where plotly is not installed."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise missing(error, "the report page") from None
    return go


def figure(*traces: Any, height: int = 380, **layout: Any) -> Any:
    """A figure without a look of its own; the page brings the template of its theme."""
    made = graph_objects().Figure(data=list(traces))
    base = {"template": None, "height": height, "margin": {"l": 64, "r": 16, "t": 28, "b": 48}, "autosize": True}
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0.0}
    made.update_layout(**{**base, "legend": legend, **layout})
    return made


def changes(*traces: Any) -> list[dict[str, Any]]:
    """What a choice changes: for each trace of the figure the attributes that are set in these."""
    found: list[dict[str, Any]] = graph_objects().Figure(data=list(traces)).to_dict()["data"]
    return found


def small(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers in few bytes: whole ones in the smallest unsigned type, others in float32."""
    array = np.asarray(values)
    if array.dtype.kind in "iu" and array.size and array.min() >= 0:
        for kind in (np.uint8, np.uint16, np.uint32):
            if array.max() <= np.iinfo(kind).max:
                return array.astype(kind)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def microseconds(value: float) -> str:
    """Four digits, with a thin space between thousands."""
    digits = max(0, 3 - int(np.floor(np.log10(abs(value)))) if value else 1)
    return f"{value:,.{min(digits, 3)}f}".replace(",", "\u202f")
