"""The page: text as HTML, figures as JSON, and plotly's script, all in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from gemopt.report.sketch import sketch
from gemopt.report.style import INK, ON_DARK, Section, Table, graph_objects

SHARED = "layer"  # this picker stands above all sections


def render(
    headline: str, facts: dict[str, str], sections: Sequence[Section], repeat: dict[str, str], *, title: str
) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    drawn = [section for section in sections if section.figure is not None]
    parts = {
        "title": escape(title),
        "headline": escape(headline),
        "facts": "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()),
        "controls": _shared_picker(drawn),
        "contents": "".join(f'<a href="#{each.name}">{escape(each.title)}</a>' for each in sections),
        "sections": "\n".join(_section(each, sketch(each.figure) if each is drawn[0] else "") for each in sections),
        "repeat": "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in repeat.items()),
        "css": _resource("page.css"),
        "data": _data(drawn),
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
        "script": _resource("page.js"),
    }
    before, *rest = _resource("page.html").split("{{")
    found = [before]
    for piece in rest:  # one pass, so that nothing that was put in is read as a mark again
        name, _, text = piece.partition("}}")
        found += [parts[name], text]
    return "".join(found)


def _resource(name: str) -> str:
    return files("gemopt.report").joinpath(name).read_text(encoding="utf-8")


def _data(sections: Sequence[Section]) -> str:
    """The looks of the themes, then each figure and what a picker changes in it, each read when it is drawn."""
    looks = {"dark": ON_DARK, "templates": {theme: _template(*ink) for theme, ink in INK.items()}}
    parts = {"looks": looks}
    for each in sections:
        figure = each.figure.to_dict()
        parts[each.name] = {"choices": each.choices, "figure": figure}
    return "\n".join(f'<script type="application/json" id="data-{k}">{_json(v)}</script>' for k, v in parts.items())


def _json(value: Any) -> str:
    """JSON with arrays in base64, and no text that could close the script."""
    from plotly.utils import PlotlyJSONEncoder

    return json.dumps(value, cls=PlotlyJSONEncoder, separators=(",", ":")).replace("<", "\\u003c")


def _template(ink: str, line: str, ground: str) -> Any:
    """The look of a theme: transparent ground, quiet grid."""
    axis = {"gridcolor": line, "zerolinecolor": line, "linecolor": line, "ticks": "", "automargin": True,
            "title": {"standoff": 8}}  # fmt: skip
    look = {
        "font": {"color": ink, "size": 13, "family": "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": ground, "bordercolor": ink, "font": {"color": ink}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": ink, "activecolor": "#0072b2"},
    }
    made: dict[str, Any] = graph_objects().layout.Template(layout=look).to_plotly_json()
    return made


def _shared_picker(sections: Sequence[Section]) -> str:
    choices = next((each.choices for each in sections if each.picker == SHARED), None)
    if choices is None:
        return ""
    step = '<button type="button" data-step="{0}" data-for="layer" aria-label="{1} layer">{2}</button>'
    return _select(SHARED, "Layer", choices) + step.format(-1, "previous", "\u2039") + step.format(1, "next", "\u203a")


def _select(picker: str, label: str, choices: dict[str, Any]) -> str:
    options = "".join(f'<option value="{escape(each)}">{escape(each)}</option>' for each in choices)
    return f'<label>{label} <select data-picker="{picker}">{options}</select></label>'


def _section(section: Section, first_seen: str) -> str:
    name = section.name
    own = section.picker not in ("", SHARED)
    picker = f'<div class="picker">{_select(section.picker, "Show", section.choices)}</div>' if own else ""
    plot = ""
    if section.figure is not None:
        height = section.figure.layout.height
        plot = (
            f'<div class="plot" id="plot-{name}" data-picker="{section.picker}" tabindex="0" role="figure" '
            f'aria-labelledby="title-{name}" '
            f'aria-describedby="text-{name}" style="min-height:{height}px">{first_seen}</div>'
        )
    return (
        f'<section id="{name}"><h2 id="title-{name}">{escape(section.title)}</h2>'
        f'<p id="text-{name}">{escape(section.text)}</p>{picker}{plot}{_table(section.table)}</section>'
    )


def _table(table: Table | None) -> str:
    if table is None:
        return ""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<details><summary>As a table</summary><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
