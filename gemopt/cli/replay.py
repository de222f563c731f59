"""Command `gemopt replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemopt.cli import options
from gemopt.cli.app import app, examples, notice, print_json, say, show
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import one_by_one
from gemopt.cli.progress import progress as shown

if TYPE_CHECKING:
    from gemopt.traces import Traces

STRATEGY_NAMES = (
    "contiguous, fitted-once, eplb-vllm, eplb-sglang, free, controller, clairvoyant; by name alone: copies, "
    "duplication-PREDICTOR"
)


@app.command(
    "replay",
    epilog=examples(
        "gemopt replay traces.safetensors --profile profile.json --plot replay.png",
        "gemopt replay traces.safetensors --profile profile.json --event 3:1.3@600-800 --json",
    ),
)
def replay_command(
    traces: options.TracesPath,
    profile: Annotated[Path, typer.Option("--profile", help="profile.json", show_default=False)],
    window: Annotated[int, typer.Option("--window", help="steps between decisions")] = 64,
    fit: Annotated[float, typer.Option("--fit", help="share of the steps to fit on; the rest is scored")] = 0.5,
    strategies: Annotated[
        str | None, typer.Option("--strategies", help=f"separated by commas: {STRATEGY_NAMES}")
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option("--event", help="3:1.3@400-800: rank 3 is 1.3 times slower in these steps; 3:fail@400-800"),
    ] = None,
    expert_bytes: Annotated[
        float | None, typer.Option("--expert-bytes", help="default: the profile's, or 9.4e6")
    ] = None,
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", "--gbps", help="GB/s that a rank sends and receives")
    ] = 20.0,
    slowdown: Annotated[float, typer.Option("--slowdown", help="by how much copying slows the step beside it")] = 0.05,
    commit_us: Annotated[float, typer.Option("--commit-us", help="stall when a layer's new placement begins")] = 100.0,
    non_moe_us: Annotated[float, typer.Option("--non-moe-us", help="time of a step outside the MoE layers")] = 0.0,
    noise: Annotated[float, typer.Option("--noise", help="of measured latencies, e.g. 0.02")] = 0.0,
    plan: Annotated[str | None, typer.Option("--plan", help="regimes from tagged steps: 'A:256 B:256 A:256'")] = None,
    slots_per_rank: options.Slots = None,
    seed: options.Seed = 0,
    cost: options.Cost = "auto",
    task: options.Task = None,
    phase: options.PhaseName = None,
    hidden: options.Hidden = None,
    rules: options.RulesPath = None,
    split: Annotated[str, typer.Option("--split", help="how copies share: even, nearest")] = "even",
    senders: Annotated[str | None, typer.Option("--senders", help="who sends, for the nearest split: uniform")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="write a picture of makespan and moves over time")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write rows and time line as JSON")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Judge strategies on recorded traffic: who follows it, at which makespan, with how many moves."""
    from gemopt.problem import slot_counts
    from gemopt.profile import Profile
    from gemopt.replay import STRATEGIES, Schedule, replay
    from gemopt.replay.judge import too_late, usual
    from gemopt.replay.strategies import make

    names = [] if strategies is None else [name.strip() for name in strategies.split(",")]
    if strategies is not None:
        make(names)
    schedule, slots = Schedule.parse(event or []), options.parse_slots(slots_per_rank)
    options.check_names(cost, senders)
    check_outputs(("--output", output, "replay result"), ("--plot", plot, ""))
    measured = Profile.load(profile)
    migration = options.copying(measured, expert_bytes, bandwidth, slowdown=slowdown, commit_us=commit_us)
    chosen = _traffic(options.load_traces(traces, task, phase, hidden), plan)
    if strategies is None:
        names = usual(slot_counts(slots, chosen.num_experts, measured.num_ranks))
    if left_out := [] if strategies else [name for name in STRATEGIES if name not in names]:
        notice(f"{', '.join(left_out)}: left out, since EPLB needs as many slots on every rank")
    with shown("strategies", total=len(names), hidden=as_json) as progress:
        result = replay(
            measured,
            chosen,
            names,
            window=window,
            fit=fit,
            slots_per_rank=slots,
            migration=migration,
            throttle=schedule,
            non_moe_us=non_moe_us,
            noise=noise,
            seed=seed,
            cost=cost,
            rules=rules,
            split=split,
            senders=senders,
            on_track=one_by_one(progress, len(names)),
        )
    options.note_doubts(measured, chosen)
    if output is not None:
        result.save(output)
    if plot is not None:
        from gemopt.plotting import plot_replay, save

        save(plot_replay(result), plot)
    for note in result.notes:
        notice(f"--event {note}")
    if as_json:
        print_json([row.model_dump(mode="json") for row in result.rows])
        return 0
    from gemopt.cli.tables import replay_table

    show(replay_table(result))
    for note in too_late(names, chosen.num_steps):
        say(note)
    if rules is not None:
        say("contiguous and eplb-* know no rules")
    for path in (plot, output):
        if path is not None:
            say(f"wrote {path}")
    return 0


def _traffic(traces: Traces, plan: str | None) -> Traces:
    from gemopt.replay.workloads import from_steps, parse_plan

    return traces if plan is None else from_steps(traces, parse_plan(plan, traces.task_names))
