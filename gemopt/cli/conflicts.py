"""Command `gemopt conflicts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import app, examples, print_json, tell
from gemopt.cli.options import AsJson, PhaseName, Task, TracesPath, load_traces
from gemopt.cli.outputs import check_outputs


@app.command("conflicts", epilog=examples("gemopt conflicts traces.safetensors --layer 12 --plot layer12.png"))
def conflicts_command(
    traces: TracesPath,
    layer: Annotated[int | None, typer.Option("--layer", help="layer id; default: all layers")] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="steps over which an expert counts as hot; default 64 or fewer")
    ] = None,
    task: Task = None,
    phase: PhaseName = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="draw one layer: --layer, else the one with most conflicts")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts are hot in the same steps, which always, and which in bursts."""
    from gemopt.conflicts import as_dict, conflict_graph, plot_conflicts, summary
    from gemopt.exceptions import InputError

    check_outputs(("--plot", plot, ""))
    loaded = load_traces(traces, task, phase)
    if layer is not None and layer not in loaded.layer_ids:
        raise InputError("--layer", layer, f"layers of these traces: {', '.join(map(str, loaded.layer_ids))}")
    wanted = [i for i, layer_id in enumerate(loaded.layer_ids) if layer in (None, layer_id)]
    graphs = [conflict_graph(loaded, index, window=window) for index in wanted]
    if plot is not None:
        from gemopt.plotting import save

        save(plot_conflicts(max(graphs, key=lambda graph: graph.number_of_edges())), plot)
    if as_json:
        print_json([as_dict(graph) for graph in graphs])
        return
    for graph in graphs:
        tell(summary(graph))
