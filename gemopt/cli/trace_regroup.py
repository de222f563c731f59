"""`gemopt trace regroup`: more steps of the same requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import examples, say, trace_app
from gemopt.cli.outputs import check_outputs
from gemopt.words import counted


@trace_app.command(
    name="regroup", epilog=examples("gemopt trace regroup traces.safetensors --times 4 -o more.safetensors")
)
def regroup_command(
    traces: Annotated[Path, typer.Argument(help="traces with token-level ids and requests", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="traces.safetensors to write")],
    times: Annotated[int, typer.Option("--times", min=1, help="steps for each given one, itself among them")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draws")] = 0,
) -> None:
    """Put the requests of a trace together in other steps, to have more to fit where few were traced."""
    check_outputs(("--output", output, "traces"), read=[("the traces", traces)])
    from gemopt.traces import Traces, regrouped

    given = Traces.load(traces)
    found = regrouped(given, times, seed=seed)
    found.save(output)
    say(f"wrote {output}: {counted(found.num_steps, 'step')} of the requests of {given.num_steps}")
