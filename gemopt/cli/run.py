"""Command `gemopt run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemopt import interrupts
from gemopt.cli.app import app, examples, notice, print_json, say
from gemopt.cli.options import EXIT_INFEASIBLE, EXIT_NO_SOLUTION, AsJson, whole_or_nothing
from gemopt.cli.progress import progress as shown_progress


@app.command(
    "run",
    epilog=examples("gemopt run examples/jobs/slow_gpu.yaml", "gemopt run job.yaml --set solver.time_limit=5 -o out"),
)
def run_command(
    job: Annotated[Path, typer.Argument(help="job.yaml (or .json)", show_default=False)],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change a key: solver.time_limit=5, exports.0.engine=vllm"),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder to write, instead of the job's")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the job with every default filled in, and stop")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Run a job file: profile and traces in, a folder with placement, exports, report and launch commands out."""
    from gemopt.jobs import read_job, run_job, shown
    from gemopt.jobs.running import command_of
    from gemopt.result import Status

    changes = [*(change or []), *([f"output={output}"] if output is not None else [])]
    wanted = read_job(job, changes)
    if print_config:
        sys.stdout.write(shown(wanted, as_json=as_json))
        return 0
    title = f"{wanted.solver.name}: layers"
    with (
        whole_or_nothing(wanted.solver.threads),
        interrupts.held(),
        shown_progress(title, limit_s=wanted.solver.time_limit, hidden=as_json) as progress,
    ):
        done = run_job(wanted, command=command_of(job, changes), progress=progress, notice=None if as_json else notice)
    if as_json:
        print_json({
            "folder": str(done.folder), "status": done.result.status.value,
            "stopped_by": done.result.stopped_by.value, "objective_us": done.result.objective_us,
            "bound_us": done.result.bound_us, "gap": done.result.gap, "change": done.result.change,
            "moves": None if done.result.moves is None else done.result.moves.model_dump(mode="json"),
            "files": done.files, "commands": done.commands, "headline": done.headline, "notes": done.notes,
            "failed": done.failed,
        })  # fmt: skip
    else:
        told = [each for each in (done.result.moves, done.result.links) if each is not None]
        more = [each.summary(done.result.num_steps) for each in told]
        for line in [done.headline or done.result.summary(), *more, *done.notes]:
            say(line)
        for engine, command in done.commands.items():
            say(f"start {engine}: {command}")
        say(f"wrote {done.folder}: {', '.join(done.files)}")
    for line in done.failed:
        sys.stderr.write(f"gemopt: {line}\n")
    if done.failed:
        return 2
    if done.result.status is Status.INFEASIBLE:
        return EXIT_INFEASIBLE
    return 0 if done.result.placement is not None else EXIT_NO_SOLUTION
