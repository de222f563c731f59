"""`gemopt trace import`: what a serving engine recorded becomes traces."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import examples, print_json, say, trace_app
from gemopt.cli.options import AsJson, engine_names
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import progress as shown
from gemopt.words import counted


class PhaseName(StrEnum):
    """Which tokens of recorded requests."""

    PREFILL = "prefill"
    DECODE = "decode"
    ALL = "all"


@trace_app.command(
    name="import",
    epilog=examples(
        "gemopt trace import dumps/ --from sglang -o traces.safetensors",
        "gemopt trace import counts.npy --from array -o traces.safetensors",
    ),
)
def import_command(
    paths: Annotated[list[Path], typer.Argument(help="recorded files, or their folder")],
    source: Annotated[
        str, typer.Option("--from", help="engine that recorded; see `gemopt engines`", autocompletion=engine_names)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="traces.safetensors to write")],
    ep: Annotated[int | None, typer.Option("--ep", min=1, help="ranks that must have recorded")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="experts of a layer")] = None,
    layer_ids: Annotated[str | None, typer.Option(help="decoder layers with experts, like 3-60")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(min=1, help="decoder layers of the network")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="experts per token")] = None,
    model: Annotated[str | None, typer.Option(help="name of the network")] = None,
    phase: Annotated[PhaseName | None, typer.Option(help="requests: which tokens (decode)")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="requests: sequences in flight (64)")] = None,
    prefill_tokens: Annotated[int | None, typer.Option(min=1, help="requests: prompt tokens of a step (4096)")] = None,
    keep_tokens: Annotated[bool, typer.Option("--keep-tokens", help="keep token-level ids (in memory)")] = False,
    no_pipeline: Annotated[
        bool, typer.Option("--no-pipeline", help="ranks and files are no stages of a pipeline, though they look so")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read routing traces that a serving engine recorded."""
    from gemopt.formats.engine import TraceOptions
    from gemopt.formats.importing import import_traces
    from gemopt.formats.layers import parse_layers
    from gemopt.traces import Phase

    check_outputs(("--output", output, "traces"), read=[("a recording", path) for path in paths])
    options = TraceOptions(
        num_ranks=ep,
        num_experts=num_experts,
        layer_ids=parse_layers(layer_ids),
        num_hidden_layers=num_hidden_layers,
        top_k=top_k,
        model=model,
        batch_size=batch_size,
        prefill_tokens=prefill_tokens,
        phase=None if phase is None else Phase.MIXED if phase is PhaseName.ALL else Phase[phase.name],
        keep_tokens=keep_tokens,
        no_pipeline=no_pipeline,
    )
    with shown("steps read", hidden=as_json) as bar:
        told = None if bar is None else lambda steps: bar(steps, None)
        found = import_traces(paths, source=source, destination=output, options=options, progress=told)
    if as_json:
        print_json({"output": str(output), **vars(found)})
        return
    layers = f"{counted(len(found.layer_ids), 'MoE layer')} ({found.layer_ids[0]} to {found.layer_ids[-1]})"
    sizes = f"{counted(found.num_steps, 'step')}, {layers}, {counted(found.num_experts, 'expert')}"
    say(f"wrote {output}: {sizes}, {found.assignments:,} assignments")
    for note in found.notes:
        say(f"note: {note}")
