"""Command `gemopt compare`."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemopt.cli import links, options
from gemopt.cli.app import app, examples, notice, print_json, show
from gemopt.cli.moves import Current, ExpertBytes, parse_bytes
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import one_by_one
from gemopt.cli.progress import progress as shown
from gemopt.exceptions import InputError

if TYPE_CHECKING:
    from gemopt.profile import Profile
    from gemopt.traces import Traces


@app.command(
    "compare",
    epilog=examples(
        "gemopt compare profile.json traces.safetensors --plot compare.png",
        "gemopt compare profile.json traces.safetensors --solvers linear,eplb,local-search --time-limit 5",
        "gemopt compare profile.json traces.safetensors --current placement.json --moves",
    ),
)
def compare_command(
    profile: options.ProfilePath,
    traces: options.TracesPath,
    solvers: Annotated[str | None, typer.Option("--solvers", help=f"separated by commas: {options.SOLVERS}")] = None,
    holdout: Annotated[float, typer.Option("--holdout", help="share of the steps kept to score on; 0: none")] = 0.5,
    time_limit: Annotated[float, typer.Option("--time-limit", help="wall seconds for each solver")] = 10.0,
    slots_per_rank: options.Slots = None,
    engine: options.EngineName = None,
    seed: options.Seed = 0,
    gap: options.Gap = 0.0,
    cost: options.Cost = "auto",
    task: options.Task = None,
    phase: options.PhaseName = None,
    patience: options.Patience = None,
    threads: options.Threads = None,
    allow_one_rank: options.OneRank = False,
    current: Current = None,
    moves: Annotated[bool, typer.Option("--moves", help="latency against moves from --current instead")] = False,
    expert_bytes: ExpertBytes = None,
    topology: links.TopologyName = None,
    once_per: links.OncePer = None,
    tokens_from: links.TokensFrom = None,
    token_bytes: links.TokenBytes = None,
    overlap: links.Overlap = False,
    rules: options.RulesPath = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="write a picture of the table")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Exact against heuristic: every solver on the same input, scored on steps it did not see.

    With --current and --moves: what moving 2, 4, 8, ... experts from a placement in force gains, and what the solvers
    of --solvers find when moves are free.
    """
    from gemopt.compare import DEFAULT_SOLVERS, compare
    from gemopt.exceptions import ABOVE_0, BELOW_1, MissingPackageError, check_number
    from gemopt.profile import Profile
    from gemopt.solvers import get
    from gemopt.solving.fronts import check_request
    from gemopt.solving.options import check_options

    names = list(DEFAULT_SOLVERS) if solvers is None else [name.strip() for name in solvers.split(",")]
    if len(set(names)) < len(names):
        raise InputError("--solvers", solvers, "each of them once")
    for name in names:
        with suppress(MissingPackageError) if solvers is None else nullcontext():
            get(name)
    check_request(current, moves)
    if expert_bytes is not None and not moves:
        raise InputError("--expert-bytes", expert_bytes, "moves are weighed with --moves", "add --current and --moves")
    size = parse_bytes(expert_bytes)
    check_outputs(("--plot", plot, ""))
    asked: dict[str, Any] = {
        "time_limit": time_limit,
        "seed": seed,
        "gap": gap,
        "patience": patience,
        "threads": threads,
        "allow_one_rank": allow_one_rank,
        "topology": topology,
        "exchange": links.parse_exchange(topology, once_per, tokens_from, token_bytes, overlap),
        "rules": rules,
        "notice": None if as_json else notice,
    }
    slots = options.parse_slots(slots_per_rank)
    check_options({**asked, "cost": cost})
    if holdout:
        check_number("holdout", holdout, "a share strictly between 0 and 1, or 0", least=ABOVE_0, most=BELOW_1)
    if current is not None:
        for option, value in (("--topology", topology), ("--slots-per-rank", slots_per_rank), ("--engine", engine)):
            if value is not None:
                raise InputError(option, str(value), "moves are not weighed with it", "leave out --current")
        del asked["topology"], asked["exchange"]
        with options.whole_or_nothing(threads):
            chosen, found_by = options.load_traces(traces, task, phase), names if solvers else []
            return _front(Profile.load(profile), chosen, current, plot, as_json, solvers=found_by, holdout=holdout,
                          cost=cost, expert_bytes=size, **asked)  # fmt: skip
    with (
        options.whole_or_nothing(threads),
        shown("solvers", total=len(names), limit_s=time_limit * len(names), hidden=as_json) as progress,
    ):
        measured, loaded = Profile.load(profile), options.load_traces(traces, task, phase)
        links.doubt(topology, measured)
        slots, split, full = options.heeded(engine, slots, None, loaded, measured, None, solver="auto")
        rows = compare(
            measured,
            loaded,
            solvers=names,
            holdout=holdout,
            cost=cost,
            on_result=one_by_one(progress, len(names)),
            slots_per_rank=slots,
            split=split,
            full_slots=full,
            **asked,
        )
    options.note_doubts(measured, loaded)
    if plot is not None:
        from gemopt.plotting import plot_comparison, save

        save(plot_comparison(rows), plot)
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        from gemopt.cli.tables import comparison_table

        show(comparison_table(rows))
    return 0


def _front(profile: Profile, traces: Traces, current: Path, plot: Path | None, as_json: bool, **asked: Any) -> int:
    """Print and draw latency against moves."""
    from gemopt.cli.tables import front_table
    from gemopt.placement import Placement
    from gemopt.plotting import plot_front, save
    from gemopt.solving.fronts import moves_front

    points = moves_front(profile, traces, Placement.load(current), **asked | {"notice": notice})
    options.note_doubts(profile, traces)
    if plot is not None:
        save(plot_front(points), plot)
    if as_json:
        print_json([point.model_dump(mode="json") for point in points])
    else:
        show(front_table(points))
    return 0
