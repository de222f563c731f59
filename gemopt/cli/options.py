"""Options of `gemopt solve` that other commands share, what is made of them, and exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from gemopt import cores, interrupts

if TYPE_CHECKING:
    from gemopt.profile import Profile
    from gemopt.replay import Migration
    from gemopt.traces import Traces

N = TypeVar("N", int, float)


def among(*names: str) -> Callable[[str], list[str]]:
    """What the shell offers for a value: those of the names that begin as typed."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def engine_names(incomplete: str) -> list[str]:
    """The same for engines."""
    from gemopt.formats.registry import NAMES

    return among(*NAMES)(incomplete)


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
    str | None,
    typer.Option(
        "--split",
        help="how copies share: even, static, nearest, optimal",
        show_default=False,
        autocompletion=among("even", "static", "nearest", "optimal"),
    ),
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
    str | None,
    typer.Option("--engine", help="heed an engine's limits and split; see gemopt engines", autocompletion=engine_names),
]
Seed = Annotated[int, typer.Option("--seed", help="seed of the random choices")]
Gap = Annotated[float, typer.Option("--gap", help="stop once this close to the optimum is proven, e.g. 0.01")]
Cost = Annotated[
    str,
    typer.Option(
        "--cost",
        metavar="auto|staircase|roofline",
        help="cost model",
        autocompletion=among("auto", "staircase", "roofline"),
    ),
]
Task = Annotated[str | None, typer.Option("--task", help="use only the steps of this task")]
PhaseName = Annotated[
    str | None,
    typer.Option(
        "--phase",
        metavar="prefill|decode|mixed",
        help="use only these steps",
        autocompletion=among("prefill", "decode", "mixed"),
    ),
]
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
SolverName = Annotated[str, typer.Option("--solver", help=SOLVERS, autocompletion=among(*SOLVERS.split(", ")))]
MOST_BYTES = 1 << 50  # of one expert: more are a slip, and sums over experts would not fit
EXIT_INFEASIBLE = 3
EXIT_NO_SOLUTION = 4


def check_names(cost: str, senders: str | None = None) -> None:
    """Refuse what there is not, before anything is read."""
    from gemopt.costs import known
    from gemopt.splits.senders import Senders

    known(cost)
    Senders.of(senders)


def parse_slots(text: str | None) -> int | list[int] | None:
    """`5` or `5,5,4,4`."""
    return _numbers(text, int, "--slots-per-rank", "a whole number, or one per rank separated by commas")


def parse_budget(text: str | None) -> float | list[float] | None:
    """`40e9` or `40e9,40e9,20e9,20e9`."""
    return _numbers(text, float, "--memory-budget", "bytes, or one number per rank separated by commas")


def _numbers(text: str | None, kind: Callable[[str], N], option: str, limit: str) -> N | list[N] | None:
    from gemopt.exceptions import InputError

    if text is None:
        return None
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(option, text, limit) from None
    return numbers[0] if len(numbers) == 1 else numbers


def heeded(
    engine: str | None,
    slots: int | list[int] | None,
    split: str | None,
    traces: Traces,
    profile: Profile,
    current: Path | None,
    memory_budget: str | None = None,
    *,
    solver: str,
) -> tuple[int | list[int] | None, str | None, bool]:
    """Slots, split and whether all slots must be full, as asked for and as the engine can take them.

    Raises
    ------
    UnsupportedError
        What the engine cannot express, with what it can; what it needs and the solver cannot heed.
    """
    if engine is None:
        return slots, split, False
    from gemopt.exceptions import UnsupportedError
    from gemopt.formats.registry import get, within_engine
    from gemopt.placement import Placement, Split
    from gemopt.solvers import get as solver_of

    if memory_budget is not None and not get(engine).empty_slots:
        limit = f"{engine} needs an expert in every slot, and a budget leaves each layer its own"
        raise UnsupportedError("memory_budget", memory_budget, limit, "give --slots-per-rank")
    used: int | list[int] | None = slots
    if slots is None and current is not None:
        used = Placement.load(current).slots_per_rank.tolist()
    ranks = len(used) if isinstance(used, list) else profile.num_ranks
    limits = within_engine(get(engine), used, split, traces.num_experts, ranks)
    if (limits.full or limits.split is not Split.EVEN) and not solver_of(solver).supports.policies:
        wants = "an expert in every slot" if limits.full else f"the {limits.split.value} split"
        limit = f"{engine} needs {wants}, which {solver} cannot heed"
        raise UnsupportedError("--engine", engine, limit, "use --solver auto, or no spare slots")
    return slots, split if memory_budget is not None else limits.split, limits.full


def load_traces(path: Path, task: str | None, phase: str | None, hidden: Path | None = None) -> Traces:
    """Traces of a file, restricted to a task and a phase, and to the requests whose hidden states are in another."""
    from gemopt.cli.app import notice
    from gemopt.traces import Phase, Traces, with_hidden
    from gemopt.traces.document import STEP_ARRAYS
    from gemopt.traces.files import unread
    from gemopt.traces.tokens import ARRAYS

    Phase.named(phase, "--phase")  # refused before what may take long to read
    loaded = Traces.load(path)
    if names := unread(path, ("counts", *STEP_ARRAYS, *ARRAYS)):
        notice(f"{path.name}: {', '.join(names)} left unread")
    return select_steps(loaded if hidden is None else with_hidden(loaded, hidden), task, phase)


def copying(profile: Profile, expert_bytes: float | None, gbps: float | None, **others: float) -> Migration:
    """What copying experts costs on the devices of a profile; bandwidth in GB/s. None: what there is to assume.

    Raises
    ------
    InputError
        A number that makes no sense, by the name of its option.
    """
    from gemopt.cli.app import notice
    from gemopt.exceptions import ABOVE_0, InputError, check_number
    from gemopt.migration import size_doubts
    from gemopt.replay import Migration

    if gbps is not None:
        check_number("--bandwidth", gbps, "GB/s above 0, at most 1e6", least=ABOVE_0, most=1e6)
        others["bytes_per_s"] = gbps * 1e9
    if expert_bytes is not None:
        others["expert_bytes"] = expert_bytes
    try:
        found = Migration(**Migration.of(profile).model_dump(exclude_unset=True) | others)
    except InputError as error:
        raise error.about("--" + error.field.partition(".")[2].replace("_", "-")) from None
    for each in size_doubts(found.expert_bytes, found.bytes_per_s / 1e9):
        notice(f"note: {each}")
    return found


def note_doubts(profile: Profile, traces: Traces) -> None:
    """Say where latencies can hardly tell how the network of the traces is served."""
    from gemopt.cli.app import notice
    from gemopt.profile import profile_doubts

    for each in profile_doubts(profile, traces):
        notice(f"note: {each}")


def select_steps(traces: Traces, task: str | None, phase: str | None) -> Traces:
    """The steps of a task and a phase."""
    from gemopt.traces import Phase

    return traces.select(task=task, phase=Phase.named(phase, "--phase"))


@contextmanager
def whole_or_nothing(threads: int | None) -> Iterator[None]:
    """Within, at most so many threads; Ctrl-C or SIGTERM before there is an answer ends the command with one line."""
    try:
        with cores.at_most(threads or cores.available()), interrupts.terminable():
            yield
    except KeyboardInterrupt as error:
        sys.stderr.write("gemopt: interrupted before there was an answer: nothing written\n")
        raise SystemExit(128 + (error.args or (signal.SIGINT,))[0]) from None


def leave_group() -> None:
    """Leave torch's process group, if there is one: a rank that ends in it may abort when another has ended."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
