"""The typer application and what its commands share. Commands register themselves on import."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console

app = typer.Typer(
    name="gemopt",
    help="Decide which expert of a mixture-of-experts model runs on which GPU, and prove how good the answer is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile_app = typer.Typer(help="Measure devices, import a kernel table, check a profile.")
trace_app = typer.Typer(help="Record routing traces of a model, or import those of a serving engine.")
placement_app = typer.Typer(help="Import and inspect placements.", no_args_is_help=True)
app.add_typer(profile_app, name="profile")
app.add_typer(trace_app, name="trace")
app.add_typer(placement_app, name="placement")

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Machine output: one JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def say(text: str) -> None:
    """One line for people, as it is: never wrapped, brackets are no markup."""
    console.print(text, markup=False, soft_wrap=True)
