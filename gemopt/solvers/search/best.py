"""What every search of one layer keeps: the problem, this call's options, and the best row so far."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.problem import Problem
from gemopt.result import Incumbent, StoppedBy, relative_gap
from gemopt.solvers.base import Options, Outcome, Row, incumbent, seeded
from gemopt.solvers.search.packing import filled

if TYPE_CHECKING:
    from gemopt.solvers.search.state import Costs, State


class Best:
    """The incumbent of a search that a later call may go on with.

    searched: whether anything was. stop: [1] see `Options.alarm`. weights_P: static weights of the incumbent, where
    some were chosen.
    """

    options: Options
    stop: NDArray[np.uint8]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.row: Row | None = None
        self.weights_P: FloatArray | None = None
        self.value = np.inf
        self.history: list[Incumbent] = []
        self.searched = False
        self.draws: np.random.Generator | None = None

    @classmethod
    def going_on(cls, options: Options, problem: Problem) -> Self | None:
        """The search of an earlier call that this one goes on with, where there is one of the kind and the problem."""
        search = options.begun
        return search if isinstance(search, cls) and search.problem is problem else None

    def __getstate__(self) -> dict[str, Any]:
        """What a call on another machine goes on from: neither this call's options nor what is made anew."""
        left = ("options", "stop", "costs", "guides", "shares", "walk")
        return {name: value for name, value in vars(self).items() if name not in left}

    @cached_property
    def costs(self) -> Costs:
        """The latencies as the kernels read them."""
        from gemopt.solvers.search.state import make_costs

        return make_costs(self.problem)

    def state(self, row: Row, costs: Costs | None = None, shares_TP: NDArray[np.int64] | None = None) -> State:
        """State of a row that ends with this call's time; costs: in place of the latencies; see `make_state`."""
        from gemopt.solvers.search.state import make_state

        return make_state(self.problem, row, self.costs if costs is None else costs, self.stop, shares_TP)

    def completed(self, row: Row) -> Row:
        """The row, with empty slots filled where none may be."""
        return filled(self.problem, row) if self.problem.full else row

    def keep(self, row: Row, value: float) -> bool:
        """Take a row over that is worth `value`, when that is the best so far."""
        if value >= self.value:
            return False
        self.row, self.value, self.weights_P = row.copy(), value, self.problem.weighed.get(row.tobytes())
        self.history.append(incumbent(value))
        return True

    def outcome(self, stopped_by: StoppedBy, unsearched: str) -> Outcome:
        """What was found, and by whom. unsearched: what that is where there was no time to search."""
        note = "" if self.searched else f"no time to search: {unsearched}"
        return Outcome(
            self.row, stopped_by, history=self.history, note=note, reached=self.searched, search=self,
            weights_P=self.weights_P,
        )  # fmt: skip

    def ended(self, *, descended: bool) -> StoppedBy | None:
        """Why the search ends where its descents do; None where kicks follow, which are drawn from now on."""
        if self.row is None or self.problem.num_ranks < 2 or self.options.patience == 0:
            ended = StoppedBy.ITERATIONS if descended else self.options.cut_by
            return StoppedBy.GAP if self.good_enough() else ended
        self.draws = self.draws or seeded(self.options.seed, self.problem.num_experts, self.problem.num_ranks)
        return None

    def good_enough(self) -> bool:
        """Whether the known bound proves the incumbent to the wanted gap."""
        gap = relative_gap(self.value, self.options.bound_us)
        return gap is not None and self.options.bound_us > 0 and gap <= self.options.gap

    def enough_us(self) -> float:
        """The largest objective that is good enough; 0 where no bound is known."""
        return self.options.bound_us / max(1e-9, 1 - self.options.gap)
