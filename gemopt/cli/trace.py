"""`gemopt trace`: run prompts through a model and record what it routes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gemopt.cli.app import console, errors, print_json, trace_app
from gemopt.exceptions import InputError


@trace_app.callback(invoke_without_command=True)
def trace(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Folder of a transformers model, or tiny-moe.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Text, one prompt a line; or .jsonl of {"prompt": ..., "task": ...}.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="traces.safetensors, or a folder of numbered files.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate; 0: prompts only.")] = 32,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are cut.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token, always.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    task: Annotated[str | None, typer.Option(help="Tag of prompts that name none.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also keep the experts of every token.")] = False,
    device: Annotated[str | None, typer.Option(help="Torch device; default: the accelerator, or cpu.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Record routing traces of a model, or import those of a serving engine."""
    if context.invoked_subcommand is not None:
        return
    for option, value in (("--model", model), ("--prompts", prompts), ("--output", output)):
        if value is None:
            raise InputError(option, "", "this option is needed", "see gemopt trace --help")
    assert model is not None and prompts is not None and output is not None
    from gemopt.profiling.generating import Destination, load_model, read_prompts, record

    destination = Destination(output)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:  # rank 0 writes; another could find the folder it has just made
        destination.check()
    requests = read_prompts(prompts, task=task)
    network, tokenizer = load_model(model, device=device)
    with _progress(len(requests), show=first) as advance:
        num_cut = record(
            network,
            tokenizer,
            requests,
            destination.folder,
            batch_size=batch,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            temperature=temperature,
            seed=seed,
            tokens=tokens,
            progress=advance,
        )
    if first:
        _report(destination, num_cut, len(requests), as_json=as_json)


def _progress(total: int, *, show: bool) -> Any:
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(console=errors, transient=True, disable=not (show and errors.is_terminal)) as progress:
            row = progress.add_task("prompts", total=total)
            yield lambda count: progress.advance(row, count)

    return bar()


def _report(destination: Any, num_cut: int, num_prompts: int, *, as_json: bool) -> None:
    from gemopt.traces import Phase

    traces = destination.finish()
    load_LE = traces.counts.sum(axis=0, dtype=float)
    steps = {phase.name.lower(): int((traces.phase == phase).sum()) for phase in Phase}
    summary = {
        "output": str(destination.path),
        "model": traces.model,
        "prompts": num_prompts,
        "prompts_cut": num_cut,
        "steps": steps,
        "layers": traces.num_layers,
        "experts": traces.num_experts,
        "top_k": traces.top_k,
        "assignments": int(load_LE.sum()),
        "tasks": list(traces.task_names),
        "hottest_expert_to_mean": [round(float(x), 3) for x in load_LE.max(axis=1) / load_LE.mean(axis=1)],
    }
    if as_json:
        print_json(summary)
        return
    console.print(
        f"{destination.path}: {num_prompts} prompts, {steps['prefill']} prefill and {steps['decode']} decode steps, "
        f"{traces.num_layers} MoE layers of {traces.num_experts} experts, {int(load_LE.sum()):,} assignments",
        soft_wrap=True,
    )
    console.print(
        "hottest expert of each layer, times the mean: "
        + " ".join(f"{ratio:.1f}" for ratio in summary["hottest_expert_to_mean"]),
        soft_wrap=True,
    )
    if num_cut:
        console.print(f"{num_cut} prompts were cut: --max-prompt-tokens")
