"""A memory budget over the whole model: which layers' copies are worth their bytes.

All layers are placed with the most slots that one may use. Then the copy that costs least to lose goes, on a rank that
holds too much, over all layers, until every rank keeps to its budget (CRAFT, arXiv:2603.28768, spends memory on the
layers that gain most, by a benefit per layer and number of copies; here it is the objective of every single copy, under
the even split). Once its share of the time is over, the copies with least load go without that. What is left is
searched once more, each layer in the slots that it kept.
Losing copies breaks no rules; experts move where rules let them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, check_number
from gemopt.latency import FloatArray
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem, slot_counts
from gemopt.solvers.base import Row
from gemopt.solving.layers import Layer
from gemopt.solving.schedule import Run

FIRST_SHARE = 0.5  # of the time, with all slots
THINNING_SHARE = 0.1  # to choose copies by what each costs to lose
IntArray = NDArray[np.int64]


def experts_within(budget_bytes: float | Sequence[float], expert_bytes: int | None, num_ranks: int) -> IntArray:
    """[G] experts, over all layers, that a rank's budget holds.

    Raises
    ------
    InputError
        The size of an expert is unknown, or the budget is no bytes or of other ranks.
    """
    if expert_bytes is None:
        limit, hint = "needs the size of an expert, which the profile does not say", "give expert_bytes"
        raise InputError("memory_budget", budget_bytes, limit, hint)
    check_number("expert_bytes", expert_bytes, "at least 1", least=1)
    budget = np.array(budget_bytes, dtype=np.float64)
    budget_G = np.full(num_ranks, float(budget)) if budget.ndim == 0 else budget
    if budget_G.shape != (num_ranks,) or not np.isfinite(budget_G).all() or (budget_G < 0).any():
        raise InputError("memory_budget", budget_bytes, f"bytes per device: one number, or one for each of {num_ranks}")
    return np.floor_divide(budget_G, expert_bytes).astype(np.int64)


def slots_within(
    held_G: IntArray, slots_per_rank: int | Sequence[int] | None, num_layers: int, num_experts: int
) -> list[int]:
    """Slots of each rank: those asked for, or the most that one layer may use.

    Raises
    ------
    InputError
        The experts of all layers have no room in the budget, or not in these slots.
    """
    if slots_per_rank is None:
        slots_G = most_slots(held_G, num_layers, num_experts)
    else:
        slots_G = slot_counts(slots_per_rank, num_experts, len(held_G))
    room = int(np.minimum(held_G, slots_G * num_layers).sum())
    if room < num_layers * num_experts:
        limit = f"{num_layers} layers of {num_experts} experts need room for {num_layers * num_experts}"
        raise InputError("memory_budget", f"room for {room} experts", limit, "more memory per device, or more devices")
    found: list[int] = slots_G.tolist()
    return found


def most_slots(held_G: IntArray, num_layers: int, num_experts: int) -> IntArray:
    """[G] slots that one layer may use when nothing else is asked for: its even part of the budget, and as much again
    as that leaves for copies."""
    even_G = -(-held_G // num_layers)
    spare = max(0, int(even_G.sum()) - num_experts)
    return np.minimum(num_experts, even_G + -(-spare // len(held_G)))


def solve_within(run: Run, held_G: IntArray) -> None:
    """Solve the layers of a run so that rank g holds at most `held_G[g]` experts over all of them.

    The bounds are of placements with all slots, and so hold for these.
    """
    whole = [layer.problem for layer in run.layers]
    left = max(0.0, run.clock + run.time_limit - time.monotonic())
    replace(run, time_limit=run.time_limit - (1 - FIRST_SHARE) * left, progress=None).go()
    deadline = run.clock + run.time_limit - (1 - FIRST_SHARE - THINNING_SHARE) * left

    def late() -> bool:
        return run.interrupted.is_set() or time.monotonic() > deadline

    rows = thinned(whole, [_row(layer) for layer in run.layers], held_G, late)
    for layer, problem, row in zip(run.layers, whole, rows, strict=True):
        kept = row != EMPTY
        slots_G = np.bincount(problem.rank_of_slot[kept], minlength=problem.num_ranks)
        slots_G.setflags(write=False)  # as the problem's: the same kernels serve
        layer.problem = replace(problem, slots_per_rank=slots_G, full=True)
        layer.warm, layer.outcome = row[kept], None
    again = [
        Layer(each.problem, each.warm, each.seed, bounded_steps=each.problem.num_steps)  # bounded already
        for each in run.layers
    ]
    replace(run, layers=again, on_layers=None).go()  # without bounds of their own
    for layer, found, problem, row in zip(run.layers, again, whole, rows, strict=True):
        outcome, padded = found.outcome, row.copy()
        assert outcome is not None and outcome.row is not None
        padded[row != EMPTY] = outcome.row
        layer.problem, layer.seconds = problem, layer.seconds + found.seconds
        layer.outcome = replace(outcome, row=padded, bound_us=None, own_bound_us=None)


def _row(layer: Layer) -> Row:
    assert layer.outcome is not None and layer.outcome.row is not None
    return layer.outcome.row


class _Thinning:
    """One layer's row that loses copies; `loss_P`: microseconds that each copy's loss costs, infinity where it is the
    only one. exact: whether that is the objective's word, else a guess by its load."""

    def __init__(self, problem: Problem, row: Row, *, exact: bool) -> None:
        from gemopt.solvers.search.shares import make_search, make_shares
        from gemopt.solvers.search.state import make_costs

        self.problem = replace(problem, split=Split.EVEN, senders_TGE=None, moves=None, full=False)
        self.row, self._make_search = row.copy(), make_search
        self.shares = make_shares(self.problem) if exact else None  # None too where counts are too many to tabulate
        self.costs = make_costs(self.problem) if exact else None
        self.look()

    def look(self) -> None:
        """Bring the losses up to date."""
        from gemopt.solvers.search.copies import removal_costs
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.swaps import total_cost

        self.loss_P = self._guessed()
        if self.shares is None or self.costs is None:
            return
        state = make_state(self.problem, self.row, self.costs)
        removal_costs(self.costs, state, self.shares, self._make_search(state), self.loss_P)
        self.loss_P -= total_cost(state)

    def guess(self) -> None:
        """From now on, losses are guessed."""
        self.shares = None
        self.look()

    def _guessed(self) -> FloatArray:
        """[P] what the load of each copy takes, by itself."""
        copies_E = np.bincount(self.row[self.row != EMPTY], minlength=self.problem.num_experts)
        load_E = self.problem.num_steps * self.problem.linearised[1].mean(axis=0) / copies_E
        return np.where((self.row != EMPTY) & (copies_E[self.row] > 1), load_E[self.row], np.inf)

    def keeps_rules(self, slot: int, target: int) -> bool:
        """Whether the content of a slot may go to an empty one."""
        if self.problem.rules is None:
            return True
        row = self.row.copy()
        row[target], row[slot] = row[slot], EMPTY
        return self.problem.rules.broken(row, self.problem.slots_per_rank) is None


def thinned(
    problems: Sequence[Problem], rows: Sequence[Row], held_G: IntArray, late: Callable[[], bool] = lambda: False
) -> list[Row]:
    """The rows without the copies that cost least to lose, until no rank holds more than `held_G` over all layers.

    Where a rank holds too much but no copies, its coldest expert goes to a rank with room. `late`: whether the time to
    choose by the objective is over; asked before every look at it.

    Raises
    ------
    InputError
        A rank holds too much that nothing can be done about, as rules may have it.
    """
    layers = [_Thinning(problem, row, exact=not late()) for problem, row in zip(problems, rows, strict=True)]
    rank_of_slot = problems[0].rank_of_slot
    over_G, guessing = -held_G.copy(), False
    for layer in layers:
        over_G += np.bincount(rank_of_slot[layer.row != EMPTY], minlength=len(held_G))
    while (over_G > 0).any():
        if not guessing and late():
            guessing = True
            for layer in layers:
                layer.guess()
        loss_LP = np.stack([layer.loss_P for layer in layers])
        on_full_P = (over_G > 0)[rank_of_slot]
        if not np.isfinite(loss_LP[:, on_full_P]).any():
            if _moved(layers, over_G):
                continue
            on_full_P[:] = True  # a copy elsewhere makes room
        loss_LP[:, ~on_full_P] = np.inf
        index, slot = np.unravel_index(loss_LP.argmin(), loss_LP.shape)
        if not np.isfinite(loss_LP[index, slot]):
            rank, rules = int(over_G.argmax()), any(problem.rules is not None for problem in problems)
            limit = f"no placement within it{' that keeps the rules' if rules else ''} was found"
            raise InputError("memory_budget", f"{over_G[rank]} experts too many on rank {rank}", limit, "more memory")
        layers[index].row[slot] = EMPTY
        layers[index].look()
        over_G[rank_of_slot[slot]] -= 1
    return [layer.row for layer in layers]


def _moved(layers: Sequence[_Thinning], over_G: IntArray) -> bool:
    """Move the coldest expert of the fullest rank to an empty slot of a rank with room; whether there is one."""
    source = int(over_G.argmax())
    best: tuple[float, _Thinning, int, int] | None = None
    for layer in layers:
        ranks, row = layer.problem.rank_of_slot, layer.row
        load_E = layer.problem.counts_TE.sum(axis=0, dtype=np.int64)
        empty = np.flatnonzero((row == EMPTY) & (over_G < 0)[ranks])
        mine = np.flatnonzero((ranks == source) & (row != EMPTY))
        pairs = (
            (slot, target)
            for slot in mine[np.argsort(load_E[row[mine]], kind="stable")].tolist()
            for target in empty[np.argsort(over_G[ranks[empty]], kind="stable")].tolist()
            if layer.keeps_rules(slot, target)
        )
        slot, target = next(pairs, (-1, -1))
        if slot >= 0 and (best is None or load_E[row[slot]] < best[0]):
            best = float(load_E[row[slot]]), layer, slot, target
    if best is None:
        return False
    _, layer, slot, target = best
    ranks = layer.problem.rank_of_slot
    over_G[ranks[target]] += 1
    over_G[source] -= 1
    layer.row[target], layer.row[slot] = layer.row[slot], EMPTY
    layer.look()
    return True
