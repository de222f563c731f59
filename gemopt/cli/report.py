"""Command `gemopt report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemopt.cli.app import app, examples, notice, print_json, say, typed
from gemopt.cli.options import AsJson, PhaseName, SendersName, Task, select_steps
from gemopt.cli.outputs import check_outputs

if TYPE_CHECKING:
    from gemopt.traces import Traces


@app.command(
    "report",
    epilog=examples(
        "gemopt report result.json --profile profile.json --traces traces.safetensors -o report.html",
        "gemopt report placement.json --profile profile.json --traces traces.safetensors --baseline p.json -o r.html",
    ),
)
def report_command(
    answer: Annotated[Path, typer.Argument(help="result.json or placement.json", show_default=False)],
    profile: Annotated[Path, typer.Option("--profile", help="profile.json", show_default=False)],
    traces: Annotated[Path, typer.Option("--traces", help="traces that it was solved on", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="page to write", show_default=False)],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="placement or result to compare with; default: contiguous")
    ] = None,
    holdout: Annotated[Path | None, typer.Option("--holdout", help="traces that the solver did not see")] = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="what gemopt replay -o wrote")] = None,
    cost: Annotated[
        str | None, typer.Option("--cost", help="cost model: auto, staircase, roofline; default: the result's")
    ] = None,
    senders: SendersName = None,
    task: Task = None,
    phase: PhaseName = None,
    as_json: AsJson = False,
) -> int:
    """One self-contained page about a placement: what it gains, what is proven, who waits for whom."""
    from gemopt.profile import Profile, profile_doubts
    from gemopt.report import report

    check_outputs(("--output", output, "page"))
    measured, notes = Profile.load(profile), set[str]()

    def choose(given: Traces) -> Traces:
        notes.update(profile_doubts(measured, given))
        return select_steps(given, task, phase)

    made = report(
        answer,
        profile,
        traces,
        baseline=baseline,
        holdout=holdout,
        replay=replay,
        cost=cost,
        senders=senders,
        choose=choose,
        command=typed(),
    )
    made.save(output)
    for note in notes:
        notice(f"note: {note}")
    if as_json:
        left_out = {each.name: each.text for each in made.sections if each.figure is None}
        print_json({"headline": made.headline, "key_figures": made.key_figures, "output": str(output),
                    "left_out": left_out})  # fmt: skip
    else:
        say(made.headline)
        say(f"wrote {output}")
    return 0
