"""Tables on narrow terminals: a row becomes a name and a paragraph, so that no number is cut."""

from __future__ import annotations

import textwrap

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def stacked(table: Table, console: Console) -> RenderableType | None:
    """The rows one below the other; None when the table fits as it is."""
    for column in table.columns:
        column.no_wrap = True
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        return None
    heads = [_name_and_unit(_plain(column.header)) for column in table.columns]
    rows = [list(column.cells) for column in table.columns]
    parts: list[RenderableType] = [] if table.title is None else [Text(_plain(table.title))]
    for number, row in enumerate(table.rows):
        words = []
        for head, cells in zip(heads[1:], rows[1:], strict=True):
            value = _plain(cells[number])
            if value:
                unit = head[1:] if value != "-" else []
                whole = " ".join(filter(None, [head[0], value, *unit]))  # a value keeps its name and unit beside it
                words.append(whole if len(heads) == 2 else whole.replace(" ", "\u00a0"))
        first = _plain(rows[0][number])
        parts.append(Text(f"{heads[0][0]} {first}" if first.isdigit() else first, style=row.style or ""))
        if words:  # rich breaks lines at a non-breaking space as well
            lines = textwrap.fill("  ".join(words), console.width - 2, break_on_hyphens=False)
            parts.append(Padding(Text(lines, style=row.style or ""), (0, 0, 0, 2)))
    if table.caption is not None:
        parts.append(Text(_plain(table.caption)))
    return Group(*parts)


def _name_and_unit(head: str) -> list[str]:
    """Of a head of two lines the last word is the unit: "held", "out %"."""
    return head.replace("\n", " ").rsplit(" ", 1) if "\n" in head else [head]


def _plain(value: object) -> str:
    return value.plain if isinstance(value, Text) else str(value)
