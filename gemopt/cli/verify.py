"""Command `gemopt verify`: check a certificate with none of the code that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import app, examples, print_json, show
from gemopt.cli.options import AsJson, PhaseName, Task, load_traces

EXAMPLE = "gemopt verify cert.json --profile profile.json --traces traces.safetensors"


@app.command("verify", epilog=examples(EXAMPLE))
def verify_command(
    certificate: Annotated[Path, typer.Argument(help="certificate.json", show_default=False)],
    profile: Annotated[Path, typer.Option("--profile", help="profile.json that it is about", show_default=False)],
    traces: Annotated[Path, typer.Option("--traces", help="traces that it is about", show_default=False)],
    task: Task = None,
    phase: PhaseName = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="nodes of a search to repeat, for each layer")] = 200_000,
    as_json: AsJson = False,
) -> int:
    """Check that a placement is worth, and proven to be as good as, what its certificate says."""
    from gemopt.profile import Profile
    from gemopt.verify import verify

    found = verify(certificate, Profile.load(profile), load_traces(traces, task, phase), most_nodes=nodes)
    layers = [vars(each) for each in found.layers]
    totals = {
        "objective_us": found.objective_us,
        "checked_us": found.checked_us,
        "checked_gap": found.checked_gap,
        "claimed_us": found.claimed_us,
        "claimed_gap": found.claimed_gap,
    }
    if as_json:
        print_json(totals | {"layers": layers})
    else:
        from gemopt.cli.tables import verified_table

        show(verified_table(found))
    return 0
