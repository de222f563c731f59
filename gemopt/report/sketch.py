"""The first picture once more, drawn before the page is made: to be seen while a browser still reads plotly."""

from __future__ import annotations

import io
import re
from typing import Any

from gemopt.report.style import INK, ON_DARK

WIDTH = 1086  # of the page's pictures on a wide screen, in pixels; elsewhere it scales


def sketch(shown: Any) -> str:
    """The bars and the line of `figures.makespan` as an SVG in the colours of both themes; empty without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return ""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gemopt", "font.size": 12, "savefig.dpi": 72}):
        picture = Figure(figsize=(WIDTH / 72, shown.layout.height / 72), layout="constrained")
        ax = picture.subplots()
        before, after, bound = shown.data
        places = range(len(bound.y))
        drawn: list[Any] = [ax.bar(places, bar.y, bar.width, color=bar.marker.color) for bar in (before, after)]
        drawn += ax.step(places, bound.y, where="mid", color=bound.line.color, lw=2.5)
        ax.set_xticks([at for at in places if at % max(1, len(places) // 20) == 0])
        ax.set_xticklabels([bound.x[int(at)] for at in ax.get_xticks()])
        ax.set(xlabel=shown.layout.xaxis.title.text, ylabel=shown.layout.yaxis.title.text, xmargin=0.01)
        ax.spines[:].set_visible(False)
        names = [before.name, after.name, bound.name]
        picture.legend(drawn, names, loc="outside upper left", ncols=3, frameon=False)
        text = io.StringIO()
        picture.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_both_themes(text.getvalue())


def _for_both_themes(text: str) -> str:
    svg = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)  # styles reach the page
    svg = re.sub(r'width="[^"]*" height="[^"]*"', 'class="sketch" aria-hidden="true"', svg, count=1)
    colours = ON_DARK | {"#000000": INK["dark"][0]}
    for light, dark in colours.items():
        svg = re.sub(rf"(?<=: ){light}\b", f"light-dark({light}, {dark})", svg)
    return svg.replace("'DejaVu Sans'", "system-ui").strip()
