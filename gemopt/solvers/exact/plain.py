"""What the provers of our own share: they know no price but time."""

from __future__ import annotations

from gemopt.evaluate import objective
from gemopt.exceptions import UnsupportedError
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.result import StoppedBy, relative_gap
from gemopt.solvers.base import Options, Outcome, Row, incumbent
from gemopt.solvers.search.packing import lpt_row


def begin(name: str, problem: Problem, options: Options, warm_start: Row | None, *, copies: bool = False) -> Outcome:
    """The row that a prover begins with, its objective in `start_us`; `reached` is False where that has to do.

    Raises
    ------
    UnsupportedError
        Moves, rules, or spare slots; with `copies` only if they do not share evenly, or no slot may stay empty.
    """
    even = problem.split is Split.EVEN and not problem.full
    others = {
        f"{problem.spare_slots} spare slots": problem.spare_slots and not copies,
        "copies": problem.spare_slots and not even,
        "moves": problem.moves is not None,
        "rules": problem.rules is not None,
    }
    for asked, there in others.items():
        if there:
            allowed = "copies that share evenly" if copies else "one copy of each expert"
            raise UnsupportedError(f"solver {name}", asked, f"{allowed}, no moves and no rules", "use cpsat or milp")
    row = lpt_row(problem) if warm_start is None else warm_start.copy()
    value = objective(problem, row)
    begun = Outcome(row, options.cut_by, None, [incumbent(value, options.bound_us)], start_us=value)
    gap = relative_gap(value, options.bound_us)
    if gap is not None and options.bound_us > 0 and gap <= options.gap:
        begun.stopped_by, begun.bound_us, begun.reached = StoppedBy.GAP, options.bound_us, False
    elif options.expired():
        begun.note, begun.reached = "no time to solve", False
    return begun
