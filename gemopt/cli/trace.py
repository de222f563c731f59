"""`gemopt trace`: run prompts through a model and record what it routes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gemopt.cli.app import examples, print_json, say, trace_app
from gemopt.cli.options import AsJson, leave_group
from gemopt.cli.progress import progress as shown
from gemopt.exceptions import InputError
from gemopt.words import counted


@trace_app.callback(
    invoke_without_command=True,
    epilog=examples("gemopt trace --model tiny-moe --prompts prompts.jsonl --batch 32 -o traces.safetensors"),
)
def trace(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="folder of a transformers model, or tiny-moe")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='text, one prompt a line; or .jsonl of {"prompt": ..., "task": ...}')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="traces.safetensors, or a folder of numbered files")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="sequences in a batch")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="tokens to generate; 0: prompts only")] = 32,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="longer prompts are cut")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token, always")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of sampling")] = 0,
    task: Annotated[str | None, typer.Option(help="tag of prompts that name none")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="also keep the experts of every token")] = False,
    hidden: Annotated[
        int, typer.Option(min=0, help="also keep what enters the routers, of requests with at most so many tokens")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="torch device; default: the accelerator, or cpu")] = None,
    as_json: AsJson = False,
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
    context.call_on_close(leave_group)
    network, tokenizer = load_model(model, device=device)
    if hidden and first:
        size = destination.room_for_hidden(network, hidden)
        if not as_json:
            say(f"hidden states of at most {hidden:,} tokens: {size / 1e6:,.1f} MB, then in {destination.hidden}")
    done = 0
    with shown("prompts", total=len(requests), hidden=as_json or not first) as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if bar is not None:
                bar(done, len(requests))

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
            hidden=hidden,
            progress=advance,
        )
    if first:
        _report(destination, num_cut, len(requests), hidden=hidden > 0, as_json=as_json)


def _report(destination: Any, num_cut: int, num_prompts: int, *, hidden: bool, as_json: bool) -> None:
    from gemopt.traces import Phase

    traces = destination.finish()
    load_LE = traces.counts.sum(axis=0, dtype=float)
    steps = {phase.name.lower(): int((traces.phase == phase).sum()) for phase in Phase}
    summary = {
        "output": str(destination.path),
        "hidden": str(destination.hidden) if hidden else None,
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
    say(
        f"{destination.path}: {counted(num_prompts, 'prompt')}, {steps['prefill']} prefill and "
        f"{counted(steps['decode'], 'decode step')}, "
        f"{counted(traces.num_layers, 'MoE layer')} of {traces.num_experts} experts, {int(load_LE.sum()):,} assignments"
    )
    say(
        "hottest expert of each layer, times the mean: "
        + " ".join(f"{ratio:.1f}" for ratio in summary["hottest_expert_to_mean"])
    )
    if num_cut:
        say(f"prompts cut: {num_cut} (--max-prompt-tokens)")
