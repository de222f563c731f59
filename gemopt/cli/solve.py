"""Commands `gemopt solve` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemopt import cores, interrupts
from gemopt.cli import links, moves, options
from gemopt.cli.app import app, detail, examples, notice, print_json, say, show, typed, warn
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import layers_shown
from gemopt.words import outside

if TYPE_CHECKING:
    from gemopt.result import Result

JSON_FIELDS = (
    *("solver", "status", "stopped_by", "objective_us", "bound_us", "gap", "change", "seconds", "outside"),
    *("cost", "cost_summary", "notes", "moves", "ceiling"),
)


@app.command(
    "solve",
    epilog=examples(
        "gemopt solve profile.json traces.safetensors -o placement.json",
        "gemopt solve profile.json traces.safetensors --slots-per-rank 5 --time-limit 30 -o placement.json",
        "gemopt solve profile.json traces.safetensors --current placement.json --max-moves 64 -o next.json",
    ),
)
def solve_command(
    profile: options.ProfilePath,
    traces: options.TracesPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="placement.json to write")] = None,
    solver: options.SolverName = "auto",
    time_limit: options.TimeLimit = None,
    slots_per_rank: options.Slots = None,
    split: options.SplitName = None,
    senders: options.SendersName = None,
    engine: options.EngineName = None,
    memory_budget: options.MemoryBudget = None,
    seed: options.Seed = 0,
    gap: options.Gap = 0.0,
    cost: options.Cost = "auto",
    task: options.Task = None,
    phase: options.PhaseName = None,
    warm_start: Annotated[Path | None, typer.Option("--warm-start", help="placement.json to start from")] = None,
    patience: options.Patience = None,
    threads: options.Threads = None,
    allow_one_rank: options.OneRank = False,
    current: moves.Current = None,
    move_price: moves.MovePrice = None,
    expert_bytes: moves.ExpertBytes = None,
    bandwidth: moves.Bandwidth = None,
    horizon_steps: moves.Horizon = None,
    max_moves: moves.MaxMoves = None,
    max_moves_per_layer: moves.MaxPerLayer = None,
    max_bytes_per_rank: moves.MaxBytes = None,
    exclude_ranks: moves.Exclude = None,
    add_rank: moves.Add = None,
    save_profile: moves.SaveProfile = None,
    topology: links.TopologyName = None,
    once_per: links.OncePer = None,
    tokens_from: links.TokensFrom = None,
    token_bytes: links.TokenBytes = None,
    overlap: links.Overlap = False,
    compute_slack: links.ComputeSlack = None,
    rules: options.RulesPath = None,
    result_path: Annotated[Path | None, typer.Option("--result", help="write the whole result as JSON")] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="write what was proved, for gemopt verify")
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Place the experts: profile and traces in, placement out."""
    from gemopt.profile import Profile
    from gemopt.resize import profile_after
    from gemopt.result import Status
    from gemopt.solve import DEFAULT_TIME_LIMIT, solve
    from gemopt.solving.options import check_options

    exchange = links.parse_exchange(topology, once_per, tokens_from, token_bytes, overlap)
    check_outputs(
        ("--output", output, "placement"), ("--result", result_path, "result"),
        ("--certificate", certificate, "certificate"), ("--save-profile", save_profile, "profile"),
        read=[("the profile", profile)],
    )  # fmt: skip
    excluded, added = moves.parse_excluded(exclude_ranks), moves.parse_added(add_rank)
    limit_s = DEFAULT_TIME_LIMIT if time_limit is None else time_limit
    asked: dict[str, Any] = {
        "senders": senders, "memory_budget": options.parse_budget(memory_budget), "solver": solver,
        "time_limit": time_limit, "gap": gap, "seed": seed, "cost": cost, "warm_start": warm_start,
        "patience": patience, "threads": threads, "allow_one_rank": allow_one_rank, "current": current,
        "move_price": move_price, "expert_bytes": moves.parse_bytes(expert_bytes), "bandwidth": bandwidth,
        "horizon_steps": horizon_steps, "max_moves": max_moves, "max_moves_per_layer": max_moves_per_layer,
        "max_bytes_per_rank": max_bytes_per_rank, "exclude_ranks": excluded, "add_ranks": added,
        "topology": topology, "exchange": exchange, "compute_slack": compute_slack, "rules": rules,
        "certificate": certificate,
    }  # fmt: skip
    slots = options.parse_slots(slots_per_rank)
    check_options({**asked, "split": split})
    with options.whole_or_nothing(threads):
        measured, chosen = Profile.load(profile), options.load_traces(traces, task, phase)
        slots, split, full = options.heeded(
            engine, slots, split, chosen, measured, current, memory_budget, solver=solver
        )
        detail(f"{profile}: {measured.brief()}; {traces}: {chosen}; {threads or cores.available()} cores")
        ids, steps = chosen.layer_ids, chosen.num_steps
        with interrupts.held(), layers_shown(solver, ids, steps, limit_s=limit_s, hidden=as_json) as on_layers:
            result = solve(
                measured,
                chosen,
                slots_per_rank=slots,
                split=split,
                full_slots=full,
                on_layers=on_layers,
                notice=None if as_json else notice,
                **asked,
            ).made_by(typed())
            if output is not None and result.placement is not None:
                result.placement.save(output)
            if result_path is not None:
                result.save(result_path)
            if save_profile is not None and result.placement is not None:
                profile_after(current, measured, exclude=excluded, add=added).save(save_profile)
    if as_json:
        kept = {*JSON_FIELDS, *([] if result.links is None else ["links"])}
        print_json(result.model_dump(mode="json", include=kept))
    else:
        _tell(result)
        saved = output is not None or result_path is not None
        if result.placement is not None and not saved:
            say("not saved: give -o placement.json")
        of_placement = (output, certificate, save_profile) if result.placement is not None else ()
        if written := [str(path) for path in (*of_placement, result_path) if path is not None]:
            say(f"wrote {', '.join(written)}")
        if (excluded or added) and result.placement is not None and saved and save_profile is None:
            say("its ranks are numbered anew: commands that take it need their profile, which --save-profile writes")
    if result.status is Status.INFEASIBLE:
        return options.EXIT_INFEASIBLE
    return 0 if result.placement is not None else options.EXIT_NO_SOLUTION


def _tell(result: Result) -> None:
    """The result for people."""
    say(result.summary())
    if result.moves is not None:
        say(result.moves.summary(result.num_steps))
    if result.links is not None:
        say(result.links.summary(result.num_steps))
    for note in result.notes:
        say(note)
    for layer in result.per_layer:
        detail(layer.line())
    if doubt := outside(result.outside):
        warn(doubt)


@app.command("evaluate", epilog=examples("gemopt evaluate placement.json profile.json traces.safetensors"))
def evaluate_command(
    placement: Annotated[Path, typer.Argument(help="placement.json or result.json", show_default=False)],
    profile: options.ProfilePath,
    traces: options.TracesPath,
    cost: options.Cost = "auto",
    task: options.Task = None,
    phase: options.PhaseName = None,
    topology: links.TopologyName = None,
    once_per: links.OncePer = None,
    tokens_from: links.TokensFrom = None,
    token_bytes: links.TokenBytes = None,
    overlap: links.Overlap = False,
    senders: options.SendersName = None,
    rules: options.RulesPath = None,
    as_json: options.AsJson = False,
) -> int:
    """Score a placement on every step of the traces, with no solver involved."""
    from gemopt.cli.tables import evaluation_fields, evaluation_table
    from gemopt.costs import fit
    from gemopt.evaluate import evaluate
    from gemopt.layer_rules import check_kept
    from gemopt.placement import Placement, bare
    from gemopt.profile import Profile

    options.check_names(cost, senders)
    exchange = links.parse_exchange(topology, once_per, tokens_from, token_bytes, overlap)
    measured, loaded = Profile.load(profile), Placement.load(placement)
    model, _ = fit(measured, model=cost)
    chosen = options.load_traces(traces, task, phase)
    if None not in (loaded.model, chosen.model) and bare(str(loaded.model)) != bare(str(chosen.model)):
        notice(f"note: the placement is for {loaded.model}, the traces are of {chosen.model}")
    if rules is None:
        check_kept(loaded)
    wired: dict[str, Any] = {"topology": topology, "exchange": exchange}
    links.doubt(topology, measured)
    evaluation = evaluate(loaded, measured, chosen, cost=model, senders=senders, rules=rules, **wired)
    contiguous = Placement.contiguous(
        chosen.num_layers, chosen.num_experts, measured.num_ranks, layer_ids=list(chosen.layer_ids)
    )
    base = evaluate(contiguous, measured, chosen, cost=model, **wired)
    fields = evaluation_fields(evaluation, base)
    options.note_doubts(measured, chosen)
    if as_json:
        print_json(fields)
    else:
        show(evaluation_table(fields, chosen.num_steps))
    return 0
