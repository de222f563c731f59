"""Small tables for notebooks: HTML, and pandas where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gemopt.exceptions import missing


def html_table(title: str, facts: Mapping[str, object]) -> str:
    """Two columns under a title, for `_repr_html_`."""
    rows = "".join(f"<tr><th style='text-align:left'>{escape(k)}</th><td>{escape(str(v))}</td></tr>"
                   for k, v in facts.items())  # fmt: skip
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def html_rows(title: str, columns: Mapping[str, Sequence[str]]) -> str:
    """A line of heads, and one for each entry of the columns, under a title; for `_repr_html_`."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in columns)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in zip(*columns.values(), strict=True))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption><tr>{heads}</tr>{rows}</table>"


def frame(columns: Mapping[str, Sequence[Any] | Any]) -> Any:
    """A pandas data frame of these columns.

    Raises
    ------
    MissingPackageError
        pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise missing(error, "to_dataframe()") from None
    return pd.DataFrame(dict(columns))
