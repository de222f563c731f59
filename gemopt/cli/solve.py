"""Commands `gemopt solve` and `evaluate`, and what `compare` shares with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemopt import cores, interrupts
from gemopt.cli.app import app, detail, examples, notice, print_json, say, show, typed, warn
from gemopt.cli.links import OncePer, Overlap, TokenBytes, TokensFrom, TopologyName, parse_exchange
from gemopt.cli.moves import (
    Add,
    Bandwidth,
    Current,
    Exclude,
    ExpertBytes,
    Horizon,
    MaxBytes,
    MaxMoves,
    MaxPerLayer,
    MovePrice,
    parse_added,
    parse_excluded,
)
from gemopt.cli.progress import layers_shown

if TYPE_CHECKING:
    from gemopt.profile import Profile
    from gemopt.result import Result
    from gemopt.traces import Traces

ProfilePath = Annotated[Path, typer.Argument(help="profile.json", show_default=False)]
TracesPath = Annotated[Path, typer.Argument(help="traces: .safetensors, a folder of them, or .npz", show_default=False)]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit", help="wall seconds for the whole call, all used; default: up to 10", show_default=False
    ),
]
Slots = Annotated[str | None, typer.Option("--slots-per-rank", help="one number, or one per rank: 5,5,4,4")]
SplitName = Annotated[
    str | None, typer.Option("--split", help="how copies share: even, static, nearest, optimal", show_default=False)
]
SendersName = Annotated[
    str | None, typer.Option("--senders", help="who sends, for the nearest split: traces, uniform", show_default=False)
]
MemoryBudget = Annotated[
    str | None,
    typer.Option("--memory-budget", help="bytes of experts per device over all layers: 40e9, or one per rank"),
]
RulesPath = Annotated[
    Path | None, typer.Option("--rules", help="rules.json: experts pinned, kept off, apart or together")
]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="heed an engine's limits and split; see gemopt engines")
]
Seed = Annotated[int, typer.Option("--seed", help="seed of the random choices")]
Gap = Annotated[float, typer.Option("--gap", help="stop once this close to the optimum is proven, e.g. 0.01")]
Cost = Annotated[str, typer.Option("--cost", metavar="auto|staircase|roofline", help="cost model")]
Task = Annotated[str | None, typer.Option("--task", help="use only the steps of this task")]
PhaseName = Annotated[str | None, typer.Option("--phase", metavar="prefill|decode|mixed", help="use only these steps")]
Hidden = Annotated[
    Path | None, typer.Option("--hidden", help="hidden states of gemopt trace --hidden: only the requests drawn there")
]
Patience = Annotated[int | None, typer.Option("--patience", help="tries without gain before giving up; 0: one descent")]
Threads = Annotated[int | None, typer.Option("--threads", help="cores used in all; default: every one")]
OneRank = Annotated[bool, typer.Option("--allow-one-rank", help="solve even where the profile has only one device")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output")]

SOLVERS = (
    "auto, linear, round-robin, eplb, eplb-hierarchical, lpt, gem, moetuner, conflict, local-search, "
    "branch, columns, cpsat, milp"
)
EXIT_INFEASIBLE = 3
EXIT_NO_SOLUTION = 4
EXIT_INTERRUPTED = 130
JSON_FIELDS = (
    *("solver", "status", "stopped_by", "objective_us", "bound_us", "gap", "change", "seconds", "outside"),
    *("cost", "cost_summary"),
)


def parse_slots(text: str | None) -> int | list[int] | None:
    """`5` or `5,5,4,4`."""
    from gemopt.exceptions import InputError

    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--slots-per-rank", text, "a whole number, or one per rank separated by commas") from None
    return numbers[0] if len(numbers) == 1 else numbers


def parse_budget(text: str | None) -> float | list[float] | None:
    """`40e9` or `40e9,40e9,20e9,20e9`."""
    from gemopt.exceptions import InputError

    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--memory-budget", text, "bytes, or one number per rank separated by commas") from None
    return numbers[0] if len(numbers) == 1 else numbers


def heeded(
    engine: str | None,
    slots: int | list[int] | None,
    split: str | None,
    traces: Traces,
    profile: Profile,
    current: Path | None,
    memory_budget: str | None = None,
) -> tuple[int | list[int] | None, str | None, bool]:
    """Slots, split and whether all slots must be full, as asked for and as the engine can take them.

    Raises
    ------
    UnsupportedError
        What the engine cannot express, with what it can.
    """
    if engine is None:
        return slots, split, False
    from gemopt.exceptions import UnsupportedError
    from gemopt.formats.registry import get, within_engine
    from gemopt.placement import Placement

    if memory_budget is not None and not get(engine).empty_slots:
        limit = f"{engine} needs an expert in every slot, and a budget leaves each layer its own"
        raise UnsupportedError("memory_budget", memory_budget, limit, "give --slots-per-rank")
    used: int | list[int] | None = slots
    if slots is None and current is not None:
        used = Placement.load(current).slots_per_rank.tolist()
    ranks = len(used) if isinstance(used, list) else profile.num_ranks
    limits = within_engine(get(engine), used, split, traces.num_experts, ranks)
    return slots, split if memory_budget is not None else limits.split, limits.full


def load_traces(path: Path, task: str | None, phase: str | None, hidden: Path | None = None) -> Traces:
    """Traces of a file, restricted to a task and a phase, and to the requests whose hidden states are in another."""
    from gemopt.traces import Traces, with_hidden

    loaded = Traces.load(path)
    return select_steps(loaded if hidden is None else with_hidden(loaded, hidden), task, phase)


def select_steps(traces: Traces, task: str | None, phase: str | None) -> Traces:
    """The steps of a task and a phase."""
    from gemopt.exceptions import InputError
    from gemopt.traces import Phase

    if task is None and phase is None:
        return traces
    known = {each.name.lower(): each for each in Phase}
    if phase is not None and phase not in known:
        raise InputError("--phase", phase, f"one of {', '.join(known)}")
    return traces.select(task=task, phase=None if phase is None else known[phase])


@app.command(
    "solve",
    epilog=examples(
        "gemopt solve profile.json traces.safetensors -o placement.json",
        "gemopt solve profile.json traces.safetensors --slots-per-rank 5 --time-limit 30 -o placement.json",
        "gemopt solve profile.json traces.safetensors --current placement.json --max-moves 64 -o next.json",
    ),
)
def solve_command(
    profile: ProfilePath,
    traces: TracesPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="placement.json to write")] = None,
    solver: Annotated[str, typer.Option("--solver", help=SOLVERS)] = "auto",
    time_limit: TimeLimit = None,
    slots_per_rank: Slots = None,
    split: SplitName = None,
    senders: SendersName = None,
    engine: EngineName = None,
    memory_budget: MemoryBudget = None,
    seed: Seed = 0,
    gap: Gap = 0.0,
    cost: Cost = "auto",
    task: Task = None,
    phase: PhaseName = None,
    warm_start: Annotated[Path | None, typer.Option("--warm-start", help="placement.json to start from")] = None,
    patience: Patience = None,
    threads: Threads = None,
    allow_one_rank: OneRank = False,
    current: Current = None,
    move_price: MovePrice = None,
    expert_bytes: ExpertBytes = None,
    bandwidth: Bandwidth = None,
    horizon_steps: Horizon = None,
    max_moves: MaxMoves = None,
    max_moves_per_layer: MaxPerLayer = None,
    max_bytes_per_rank: MaxBytes = None,
    exclude_ranks: Exclude = None,
    add_rank: Add = None,
    topology: TopologyName = None,
    once_per: OncePer = None,
    tokens_from: TokensFrom = None,
    token_bytes: TokenBytes = None,
    overlap: Overlap = False,
    rules: RulesPath = None,
    result_path: Annotated[Path | None, typer.Option("--result", help="write the whole result as JSON")] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="write what was proved, for gemopt verify")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Place the experts: profile and traces in, placement out."""
    from gemopt.documents import check_writable
    from gemopt.profile import Profile
    from gemopt.result import Status
    from gemopt.solve import DEFAULT_TIME_LIMIT, solve

    exchange = parse_exchange(topology, once_per, tokens_from, token_bytes, overlap)
    for path in (output, result_path, certificate):
        if path is not None:
            check_writable(path)
    limit_s = DEFAULT_TIME_LIMIT if time_limit is None else time_limit
    with whole_or_nothing(threads):
        chosen = load_traces(traces, task, phase)
        measured = Profile.load(profile)
        slots, split, full = heeded(
            engine, parse_slots(slots_per_rank), split, chosen, measured, current, memory_budget
        )
        detail(f"{profile}: {measured.brief()}; {traces}: {chosen}; {threads or cores.available()} cores")
        ids, steps = chosen.layer_ids, chosen.num_steps
        with interrupts.held(), layers_shown(solver, ids, steps, limit_s=limit_s, hidden=as_json) as on_layers:
            result = solve(
                measured,
                chosen,
                slots_per_rank=slots,
                split=split,
                senders=senders,
                full_slots=full,
                memory_budget=parse_budget(memory_budget),
                solver=solver,
                time_limit=time_limit,
                gap=gap,
                seed=seed,
                cost=cost,
                warm_start=warm_start,
                patience=patience,
                threads=threads,
                allow_one_rank=allow_one_rank,
                current=current,
                move_price=move_price,
                expert_bytes=expert_bytes,
                bandwidth=bandwidth,
                horizon_steps=horizon_steps,
                max_moves=max_moves,
                max_moves_per_layer=max_moves_per_layer,
                max_bytes_per_rank=max_bytes_per_rank,
                exclude_ranks=parse_excluded(exclude_ranks),
                add_ranks=parse_added(add_rank),
                topology=topology,
                exchange=exchange,
                rules=rules,
                on_layers=on_layers,
                notice=None if as_json else notice,
                certificate=certificate,
            ).made_by(typed())
            if output is not None and result.placement is not None:
                result.placement.save(output)
            if result_path is not None:
                result.save(result_path)
    if as_json:
        moves = None if result.moves is None else result.moves.model_dump(mode="json")
        more = {"moves": moves} | ({} if result.links is None else {"links": result.links.model_dump(mode="json")})
        more |= {"ceiling": None if result.ceiling is None else result.ceiling.model_dump(mode="json")}
        print_json({name: getattr(result, name) for name in (*JSON_FIELDS, "notes")} | more)
    else:
        _tell(result, output)
    if result.status is Status.INFEASIBLE:
        return EXIT_INFEASIBLE
    return 0 if result.placement is not None else EXIT_NO_SOLUTION


def _tell(result: Result, output: Path | None) -> None:
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
    if result.outside > 0.01:
        warn(f"{100 * result.outside:.0f} % of the loads lie outside the measured range of the profile")
    if result.placement is not None:
        say(f"wrote {output}" if output is not None else "not saved: give -o placement.json")


@contextmanager
def whole_or_nothing(threads: int | None) -> Iterator[None]:
    """Within, at most so many threads; Ctrl-C before there is an answer ends the command with one line."""
    try:
        with cores.at_most(threads or cores.available()):
            yield
    except KeyboardInterrupt:
        sys.stderr.write("gemopt: interrupted before there was an answer: nothing written\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None


@app.command("evaluate", epilog=examples("gemopt evaluate placement.json profile.json traces.safetensors"))
def evaluate_command(
    placement: Annotated[Path, typer.Argument(help="placement.json", show_default=False)],
    profile: ProfilePath,
    traces: TracesPath,
    cost: Cost = "auto",
    task: Task = None,
    phase: PhaseName = None,
    topology: TopologyName = None,
    once_per: OncePer = None,
    tokens_from: TokensFrom = None,
    token_bytes: TokenBytes = None,
    overlap: Overlap = False,
    senders: SendersName = None,
    rules: RulesPath = None,
    as_json: AsJson = False,
) -> int:
    """Score a placement on every step of the traces, with no solver involved."""
    from gemopt.cli.tables import evaluation_fields, evaluation_table
    from gemopt.costs import fit
    from gemopt.evaluate import evaluate
    from gemopt.layer_rules import check_kept
    from gemopt.placement import Placement
    from gemopt.profile import Profile
    from gemopt.splits.senders import Senders

    chosen = load_traces(traces, task, phase)
    measured = Profile.load(profile)
    model, _ = fit(measured, model=cost)
    loaded = Placement.load(placement)
    if rules is None:
        check_kept(loaded)
    Senders.asked_by(senders, loaded.split)
    wired: dict[str, Any] = {
        "topology": topology,
        "exchange": parse_exchange(topology, once_per, tokens_from, token_bytes, overlap),
    }
    evaluation = evaluate(loaded, measured, chosen, cost=model, senders=senders, rules=rules, **wired)
    contiguous = Placement.contiguous(
        chosen.num_layers, chosen.num_experts, measured.num_ranks, layer_ids=list(chosen.layer_ids)
    )
    base = evaluate(contiguous, measured, chosen, cost=model, **wired)
    fields = evaluation_fields(evaluation, base)
    if as_json:
        print_json(fields)
    else:
        show(evaluation_table(fields, chosen.num_steps))
    return 0
