"""A line about the work, such as what takes long, where somebody looks on."""

from __future__ import annotations

import sys


class Voice:
    """How much is said, for one command of the command line."""

    quiet = False
    verbose = False


def say(line: str) -> None:
    """Write to standard error where somebody looks on: a terminal, or an interactive session such as a notebook."""
    if not Voice.quiet and sys.stderr is not None and (sys.stderr.isatty() or hasattr(sys, "ps1")):
        print(f"gemopt: {line}", file=sys.stderr, flush=True)
