"""Commands `gemopt solve` and `evaluate`, and what `compare` shares with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gemopt import cores, interrupts
from gemopt.cli.app import app, console, errors, print_json, say
from gemopt.cli.links import OncePer, Overlap, Senders, TokenBytes, TopologyName, parse_exchange
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

if TYPE_CHECKING:
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
Seed = Annotated[int, typer.Option("--seed", help="seed of the random choices")]
Gap = Annotated[float, typer.Option("--gap", help="stop once this close to the optimum is proven, e.g. 0.01")]
Cost = Annotated[str, typer.Option("--cost", help="cost model: auto, staircase, roofline")]
Task = Annotated[str | None, typer.Option("--task", help="use only the steps of this task")]
PhaseName = Annotated[str | None, typer.Option("--phase", help="use only prefill or decode steps")]
Patience = Annotated[int | None, typer.Option("--patience", help="tries without gain before giving up; 0: one descent")]
Threads = Annotated[int | None, typer.Option("--threads", help="cores used in all; default: every one")]
OneRank = Annotated[bool, typer.Option("--allow-one-rank", help="solve even where the profile has only one device")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output")]

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


def load_traces(path: Path, task: str | None, phase: str | None) -> Traces:
    """Traces, restricted to a task and a phase."""
    from gemopt.exceptions import InputError
    from gemopt.traces import Phase, Traces

    traces = Traces.load(path)
    if task is None and phase is None:
        return traces
    known = {each.name.lower(): each for each in Phase}
    if phase is not None and phase not in known:
        raise InputError("--phase", phase, f"one of {', '.join(known)}")
    return traces.select(task=task, phase=None if phase is None else known[phase])


@contextmanager
def layer_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over the layers on standard error; nothing for machines."""
    if quiet or not errors.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


@app.command("solve")
def solve_command(
    profile: ProfilePath,
    traces: TracesPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="placement.json to write")] = None,
    solver: Annotated[str, typer.Option("--solver", help="auto, or a solver's name (see gemopt compare)")] = "auto",
    time_limit: TimeLimit = None,
    slots_per_rank: Slots = None,
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
    senders: Senders = None,
    token_bytes: TokenBytes = None,
    overlap: Overlap = False,
    result_path: Annotated[Path | None, typer.Option("--result", help="write the whole result as JSON")] = None,
    as_json: AsJson = False,
) -> int:
    """Place the experts: profile and traces in, placement out."""
    from gemopt.documents import check_writable
    from gemopt.profile import Profile
    from gemopt.result import Status
    from gemopt.solve import solve

    exchange = parse_exchange(topology, once_per, senders, token_bytes, overlap)
    for path in (output, result_path):
        if path is not None:
            check_writable(path)
    with whole_or_nothing(threads):
        chosen = load_traces(traces, task, phase)
        measured = Profile.load(profile)
        with interrupts.held(), layer_progress(f"{solver}: layers", quiet=as_json) as progress:
            result = solve(
                measured,
                chosen,
                slots_per_rank=parse_slots(slots_per_rank),
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
                progress=progress,
                notice=None if as_json else errors.print,
            )
            if output is not None and result.placement is not None:
                result.placement.save(output)
            if result_path is not None:
                result.save(result_path)
    if as_json:
        moves = None if result.moves is None else result.moves.model_dump(mode="json")
        more = {"moves": moves} | ({} if result.links is None else {"links": result.links.model_dump(mode="json")})
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
    if result.outside > 0.01:
        say(f"{100 * result.outside:.0f} % of the loads lie outside the measured range of the profile")
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


@app.command("evaluate")
def evaluate_command(
    placement: Annotated[Path, typer.Argument(help="placement.json", show_default=False)],
    profile: ProfilePath,
    traces: TracesPath,
    cost: Cost = "auto",
    task: Task = None,
    phase: PhaseName = None,
    topology: TopologyName = None,
    once_per: OncePer = None,
    senders: Senders = None,
    token_bytes: TokenBytes = None,
    overlap: Overlap = False,
    as_json: AsJson = False,
) -> int:
    """Score a placement on every step of the traces, with no solver involved."""
    from gemopt.cli.tables import evaluation_fields, evaluation_table
    from gemopt.costs import fit
    from gemopt.evaluate import evaluate
    from gemopt.placement import Placement
    from gemopt.profile import Profile

    chosen = load_traces(traces, task, phase)
    measured = Profile.load(profile)
    model, _ = fit(measured, model=cost)
    loaded = Placement.load(placement)
    wired: dict[str, Any] = {
        "topology": topology,
        "exchange": parse_exchange(topology, once_per, senders, token_bytes, overlap),
    }
    evaluation = evaluate(loaded, measured, chosen, cost=model, **wired)
    contiguous = Placement.contiguous(
        chosen.num_layers, chosen.num_experts, measured.num_ranks, layer_ids=list(chosen.layer_ids)
    )
    base = evaluate(contiguous, measured, chosen, cost=model, **wired)
    fields = evaluation_fields(evaluation, base)
    if as_json:
        print_json(fields)
    else:
        console.print(evaluation_table(fields, chosen.num_steps))
    return 0
