"""Command `gemopt advise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemopt.cli import links, options
from gemopt.cli.app import app, examples, print_json, say, show
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import progress as shown
from gemopt.words import outside, short

if TYPE_CHECKING:
    from rich.table import Table

    from gemopt.advise import Advice, Sweep
    from gemopt.profile import Profile
    from gemopt.replay import Migration

UNITS = {"skew": "x mean", "bandwidth": "GB/s", "batch": "assignments", "drift": "of experts"}


@app.command(
    "advise",
    epilog=examples(
        "gemopt advise profile.json traces.safetensors",
        "gemopt advise profile.json traces.safetensors --memory 2 --bandwidth 50 --plot map.png",
    ),
)
def advise_command(
    profile: options.ProfilePath,
    traces: options.TracesPath,
    memory: Annotated[float, typer.Option("--memory", help="GB free for copies on each rank, all layers")] = 0.0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="shape.json, or hidden_size=, heads=, kv_heads=, head_dim= and so on, with commas"
        ),
    ] = None,
    horizon: Annotated[int | None, typer.Option("--horizon", help="steps that the decision has to hold")] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", help="GB/s that a rank sends and receives; default: 20")
    ] = None,
    topology: links.TopologyName = None,
    non_moe_us: Annotated[
        float | None, typer.Option("--non-moe-us", help="time of a step outside the MoE layers; default: of --model")
    ] = None,
    expert_bytes: Annotated[
        float | None, typer.Option("--expert-bytes", help="default: the profile's, the model's, or 9.4e6")
    ] = None,
    predictors: Annotated[
        str | None,
        typer.Option("--predictors", help="to duplicate by, with commas, and to recommend; default: all, to compare"),
    ] = None,
    window: Annotated[int, typer.Option("--window", help="steps between decisions")] = 64,
    sweep: Annotated[bool, typer.Option("--sweep/--no-sweep", help="look for what it depends on")] = True,
    seed: options.Seed = 0,
    cost: options.Cost = "auto",
    task: options.Task = None,
    phase: options.PhaseName = None,
    hidden: options.Hidden = None,
    rules: options.RulesPath = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="write the strategy map, skew by bandwidth")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the advice as JSON")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Say what pays on these devices and this traffic: placing once, copies, following, duplicating, or nothing."""
    from gemopt.advise import advise
    from gemopt.exceptions import InputError
    from gemopt.profile import Profile

    check_outputs(("--output", output, "advice"), ("--plot", plot, ""))
    if plot is not None and not sweep:
        raise InputError("--plot", str(plot), "the map needs the sweep", "leave --no-sweep out")
    if not 0 <= memory <= 1e6:
        raise InputError("--memory", memory, "GB from 0 to 1e6")
    options.check_names(cost)
    migration = _migration(measured := Profile.load(profile), expert_bytes, bandwidth, topology)
    chosen = options.load_traces(traces, task, phase, hidden)
    with shown("replays", hidden=as_json) as progress:
        advice = advise(
            measured,
            chosen,
            horizon=horizon,
            memory_bytes=memory * 1e9,
            model=model,
            migration=migration,
            non_moe_us=non_moe_us,
            predictors=None if predictors is None else [name.strip() for name in predictors.split(",")],
            window=window,
            seed=seed,
            cost=cost,
            rules=rules,
            sweep=sweep,
            names=(str(profile), str(traces), *([] if hidden is None else [str(hidden)])),
            chosen=_given(task=task, phase=phase, cost=cost if cost != "auto" else None, seed=seed or None),
            progress=progress,
        )
    options.note_doubts(measured, chosen)
    if output is not None:
        advice.save(output)
    if plot is not None:
        from gemopt.plotting import plot_strategy_map, save

        save(plot_strategy_map(advice), plot)
    if as_json:
        print_json(advice.model_dump(mode="json"))
        return 0
    _tell(advice)
    for path in (plot, output):
        if path is not None:
            say(f"wrote {path}")
    return 0


def _given(**options: object) -> list[str]:
    """Options that are not as they would be without."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def _migration(
    profile: Profile, expert_bytes: float | None, bandwidth: float | None, topology: str | None
) -> Migration:
    """Cost of copying, over links of one bandwidth or the slowest ones of a topology."""
    from gemopt.exceptions import InputError
    from gemopt.topology import load

    found = options.copying(profile, expert_bytes, bandwidth)
    if topology is None:
        return found
    if bandwidth is not None:
        raise InputError("--bandwidth", bandwidth, "the topology says it", "leave one of them out")
    links.doubt(topology, profile)
    wired = load(topology)
    wired.check_ranks(profile.num_ranks)
    return found.model_copy(update={"bytes_per_s": wired.slowest_gbps(found.expert_bytes) * 1e9})


def _tell(advice: Advice) -> None:
    """The advice for people."""
    best = advice.option(advice.recommended)
    say(f"use {advice.recommended}: {_percent(advice.predicted_change)} of the MoE time against contiguous placement, "
        f"{_percent(advice.low)} to {_percent(advice.high)}; sure to {100 * advice.confidence:.0f} %")  # fmt: skip
    if advice.non_moe_us:
        outside_us = f"{advice.non_moe_us:.0f} us outside the MoE layers"
        say(f"that is {_percent(best.step_change)} of a whole step with {outside_us}")
    say(f"no placement can pass {_percent(advice.ceiling)} (proven); one that knew each window would reach "
        f"{_percent(advice.clairvoyant)}")  # fmt: skip
    say(f"hottest expert {advice.skew:.2f} times the mean; {100 * advice.drift:.1f} % of the traffic goes elsewhere in "
        f"the {advice.scored_steps} scored steps than in the {advice.fitted_steps} fitted ones")  # fmt: skip
    show(_table(advice))
    for each in advice.sweeps:
        say(_threshold(each))
    for note in advice.notes:
        say(note)
    if doubt := outside(advice.outside):
        say(doubt)
    say("next:")
    for command in advice.commands:
        say(f"  {command}")


def _table(advice: Advice) -> Table:
    from gemopt.cli.tables import new_table

    heads = ("change\n%", "5 to 95 %", "step\n%", "best\n%", "moves", "GB\nsent", "first\nmoves", "GB\nheld")
    table = new_table("strategy", *heads, left=("strategy",))
    for each in sorted(advice.strategies, key=lambda option: option.change):
        table.add_row(
            each.strategy, f"{100 * each.change:+z.1f}", f"{100 * each.low:+z.1f} {100 * each.high:+z.1f}",
            f"{100 * each.step_change:+z.1f}", f"{100 * each.best_share:.0f}", str(each.moves),
            short(each.traffic_bytes / 1e9, 2), str(each.setup_moves), short(each.memory_bytes / 1e9, 2),
            style="bold" if each.strategy == advice.recommended else None,
        )  # fmt: skip
    return table


def _threshold(sweep: Sweep) -> str:
    unit, values = UNITS[sweep.what], [short(each) for each in sweep.values]
    steps = ", ".join(f"{value} {best}" for value, best in zip(values, sweep.best, strict=True))
    pays = "pays nowhere" if sweep.pays_from is None else f"pays from {short(sweep.pays_from)} on"
    return f"{sweep.what} ({unit}) {pays}: {steps}"


def _percent(change: float) -> str:
    return f"{100 * change:+z.1f} %"
