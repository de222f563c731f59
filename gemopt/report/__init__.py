"""One self-contained page about a placement, for people."""

from __future__ import annotations

from gemopt.report.build import Report, report

__all__ = ["Report", "report"]
