"""Command `gemopt profile links`, under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import console, examples, print_json, profile_app
from gemopt.cli.options import AsJson
from gemopt.cli.outputs import check_outputs
from gemopt.exceptions import InputError


@profile_app.command(
    "links", epilog=examples("torchrun --nproc-per-node 8 --no-python gemopt profile links -o topology.json")
)
def profile_links(
    output: Annotated[Path, typer.Option("-o", "--output", help="topology.json to write", show_default=False)],
    least: Annotated[int, typer.Option("--min-bytes", min=1, help="through a port, at least")] = 1 << 10,
    most: Annotated[int, typer.Option("--max-bytes", min=2, help="through a port, at most")] = 1 << 26,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="exchanges per size")] = 10,
    device: Annotated[str, typer.Option("--device", help="auto: the accelerator of the local rank, else cpu")] = "auto",
    as_json: AsJson = False,
) -> int:
    """Measure links: all-to-all within nodes and between them. Start with torchrun, one process per rank."""
    if least >= most:
        raise InputError("--max-bytes", most, f"more than --min-bytes {least}")
    check_outputs(("--output", output, "topology"))
    from gemopt.profiling.links import measure_links

    sizes = [least]
    while 4 * sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    topology = measure_links([*sizes, most], repeats=repeats, device=device)
    if topology is None:
        return 0
    topology.save(output)
    if as_json:
        print_json(topology.model_dump(mode="json"))
    else:
        from gemopt.cli.links import described

        for line in [*described(topology), f"wrote {output}"]:
            console.print(line)
    return 0
