"""`gemopt trace import`: what a serving engine recorded becomes traces."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import console, print_json, trace_app


class PhaseName(StrEnum):
    """Which tokens of recorded requests."""

    PREFILL = "prefill"
    DECODE = "decode"
    ALL = "all"


@trace_app.command(name="import")
def import_command(
    paths: Annotated[list[Path], typer.Argument(help="Recorded files, or their folder.")],
    source: Annotated[str, typer.Option("--from", help="Engine that recorded; see `gemopt engines`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="traces.safetensors to write.")],
    ep: Annotated[int | None, typer.Option("--ep", min=1, help="Ranks that must have recorded.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Experts of a layer.")] = None,
    layer_ids: Annotated[str | None, typer.Option(help="Decoder layers with experts, like 3-60.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the network.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per token.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the network.")] = None,
    phase: Annotated[PhaseName, typer.Option(help="Responses: which tokens.")] = PhaseName.DECODE,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses: sequences in flight.")] = 64,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Responses: prompt tokens of a step.")] = 4096,
    keep_tokens: Annotated[bool, typer.Option("--keep-tokens", help="Keep token-level ids (in memory).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read routing traces that a serving engine recorded."""
    from gemopt.formats.engine import TraceOptions
    from gemopt.formats.importing import import_traces
    from gemopt.formats.layers import parse_layers
    from gemopt.traces import Phase

    options = TraceOptions(
        num_ranks=ep,
        num_experts=num_experts,
        layer_ids=parse_layers(layer_ids),
        num_hidden_layers=num_hidden_layers,
        top_k=top_k,
        model=model,
        batch_size=batch_size,
        prefill_tokens=prefill_tokens,
        phase=Phase.MIXED if phase is PhaseName.ALL else Phase[phase.name],
        keep_tokens=keep_tokens,
    )
    found = import_traces(paths, source=source, destination=output, options=options)
    if as_json:
        print_json({"output": str(output), **vars(found)})
        return
    layers = f"{len(found.layer_ids)} MoE layers ({found.layer_ids[0]} to {found.layer_ids[-1]})"
    sizes = f"{found.num_steps} steps, {layers}, {found.num_experts} experts, {found.assignments} assignments"
    console.print(f"wrote {output}: {sizes}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
