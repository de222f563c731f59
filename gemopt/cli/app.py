"""The typer application and what its commands share. Commands register themselves on import."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gemopt import __version__
from gemopt.cli.stacked import stacked
from gemopt.words import Voice

EVERYWHERE = "Everywhere"
PANELS = {
    "To begin with": ("demo", "doctor"),
    "Measure and record": ("profile", "trace", "topology"),
    "Place": ("solve", "compare", "evaluate", "verify", "conflicts", "report", "run"),
    "Put in force": ("export", "engines", "placement", "apply"),
    "While traffic changes": ("replay", "advise", "watch"),
}
"""In which order help shows the commands, and under which heads."""


def examples(*lines: str) -> str:
    """What stands below the help of a command: lines to copy."""
    return "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *lines])


app = typer.Typer(
    name="gemopt",
    help="Decide which expert of a mixture-of-experts model runs on which GPU, and prove how good the answer is.",
    epilog=examples("gemopt demo", "gemopt demo --files .", "gemopt solve profile.json traces.safetensors -o p.json"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile_app = typer.Typer(help="Measure devices, import a kernel table, check a profile.")
trace_app = typer.Typer(help="Record routing traces of a model, or import those of a serving engine.")
placement_app = typer.Typer(help="Import placements of serving engines.", no_args_is_help=True)
app.add_typer(profile_app, name="profile")
app.add_typer(trace_app, name="trace")
app.add_typer(placement_app, name="placement")

console = Console(highlight=False)
NARROW = 80
"""Columns below which help has no frames: they cut names short."""
errors = Console(stderr=True, highlight=False)


def _quiet(given: bool) -> bool:
    Voice.quiet = Voice.quiet or given
    return given


def _verbose(given: bool) -> bool:
    Voice.verbose = Voice.verbose or given
    return given


def _version(given: bool) -> None:
    if given:
        sys.stdout.write(f"gemopt {__version__}\n")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Decide which expert of a mixture-of-experts model runs on which GPU, and prove how good the answer is."""


def make() -> Any:
    """The command line as one object, every command of which takes --quiet and --verbose."""
    shared = typer.Typer(add_completion=False)

    @shared.command()
    def _(
        quiet: Annotated[
            bool,
            typer.Option(
                "--quiet", "-q", callback=_quiet, expose_value=False, rich_help_panel=EVERYWHERE,
                help="say nothing but errors, tables and JSON: the exit code tells",
            ),
        ] = False,
        verbose: Annotated[
            bool,
            typer.Option(
                "--verbose", "-v", callback=_verbose, expose_value=False, rich_help_panel=EVERYWHERE,
                help="say on standard error what was read and how each part was found",
            ),
        ] = False,
    ) -> None: ...  # fmt: skip

    Voice.quiet = Voice.verbose = False
    app.rich_markup_mode = "rich" if shutil.get_terminal_size().columns >= NARROW else None
    options = [each for each in typer.main.get_command(shared).params if each.name in ("quiet", "verbose")]
    command: Any = typer.main.get_command(app)
    _add(command, options)
    for panel, names in PANELS.items():
        for name in names:
            command.commands[name] = command.commands.pop(name)
            command.commands[name].rich_help_panel = panel
    return command


def _add(command: Any, options: list[Any]) -> None:
    command.params += options
    for inner in getattr(command, "commands", {}).values():
        _add(inner, options)


def typed() -> str:
    """What was typed, by the program's own name."""
    return os.fsencode(shlex.join(["gemopt", *sys.argv[1:]])).decode(errors="replace")


def print_json(value: Any) -> None:
    """Machine output: one JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def tell(text: str) -> None:
    """What was asked for, as it is: never wrapped, brackets are no markup."""
    console.print(text, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A line that goes with the answer; left out by --quiet."""
    if not Voice.quiet:
        tell(text)


def warn(text: str) -> None:
    """A line that must not be missed: beside the answer, or on standard error when all else is quiet."""
    (errors if Voice.quiet else console).print(text, markup=False, soft_wrap=True)


def notice(text: str) -> None:
    """A line about the work, on standard error; left out by --quiet."""
    if not Voice.quiet:
        errors.print(text, markup=False, soft_wrap=True)


def detail(text: str) -> None:
    """A line on standard error that only --verbose asks for."""
    if Voice.verbose:
        errors.print(text, markup=False, soft_wrap=True)


def show(table: Table) -> None:
    """A table; where the terminal is too narrow for it, its rows one below the other, with nothing left out."""
    console.print(stacked(table, console) or table)
