"""A memory budget over the whole model: which layers' copies are worth their bytes.

All layers are placed in their even part of the budget, or in the slots of a start that keeps to it, as fast as that
goes, and again with the most slots that one may use. Then the copy that costs least to lose goes, on a rank that holds
too much, over all layers, until every rank keeps to its budget (CRAFT, arXiv:2603.28768, spends memory on the layers
that gain most, by a benefit per layer and number of copies; here it is the objective of every single copy, under the
even split). Once its share of the time is over, the copies with least load go without that. What is left is searched
once more, each layer in the slots that it kept; where that is no better than what came first, as in too short a time,
that is the answer. What a solver proves with all slots is kept: it holds of fewer.
Losing copies breaks no rules; experts move where rules let them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import total
from gemopt.exceptions import InputError, check_number
from gemopt.latency import FloatArray
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem, slot_counts
from gemopt.result import StoppedBy
from gemopt.solvers import get, hurried
from gemopt.solvers.base import Row
from gemopt.solving.layers import Layer, value_of
from gemopt.solving.schedule import Run
from gemopt.splits.weights import remember_weights

FIRST_SHARE = 0.5  # of the time, at most, for a descent that keeps to the budget
WIDE_SHARE = 0.5  # of the rest, with all slots
THINNING_SHARE = 0.1  # of the rest, to choose copies by what each costs to lose
IntArray = NDArray[np.int64]


def experts_within(budget_bytes: float | Sequence[float], expert_bytes: int | None, num_ranks: int) -> IntArray:
    """[G] experts, over all layers, that a rank's budget holds.

    Raises
    ------
    InputError
        The size of an expert is unknown, or the budget is no bytes or of other ranks.
    """
    if expert_bytes is None:
        limit, hint = "needs the size of an expert, which the profile does not say", "give --expert-bytes"
        raise InputError("memory_budget", budget_bytes, limit, hint)
    check_number("expert_bytes", expert_bytes, "at least 1", least=1)
    budget = np.array(budget_bytes, dtype=np.float64)
    budget_G = np.full(num_ranks, float(budget)) if budget.ndim == 0 else budget
    if budget_G.shape != (num_ranks,) or not np.isfinite(budget_G).all() or (budget_G < 0).any():
        raise InputError("memory_budget", budget_bytes, f"bytes per device: one number, or one for each of {num_ranks}")
    return np.floor_divide(budget_G, expert_bytes).astype(np.int64)


def slots_within(
    held_G: IntArray, slots_per_rank: int | Sequence[int] | None, num_layers: int, num_experts: int
) -> tuple[IntArray | None, list[int]]:
    """What ranks hold, or None where that is all slots; and slots of each rank: as asked for, or the most of one layer.

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
    return None if (held_G >= slots_G * num_layers).all() else held_G, slots_G.tolist()


def most_slots(held_G: IntArray, num_layers: int, num_experts: int) -> IntArray:
    """[G] slots that one layer may use when nothing else is asked for: its even part of the budget, and as much again
    as that leaves for copies."""
    even_G = -(-held_G // num_layers)
    spare = max(0, int(even_G.sum()) - num_experts)
    return np.minimum(num_experts, even_G + -(-spare // len(held_G)))


def solve_within(run: Run, held_G: IntArray) -> None:
    """Solve the layers of a run so that rank g holds at most `held_G[g]` experts over all of them.

    The bounds are of placements with all slots, and so hold for these; the answer is never worse than `_first`.
    """
    end, first = run.clock + run.time_limit, _first(_until(run, FIRST_SHARE), held_G)
    left, full = max(0.0, end - time.monotonic()), run.solver.supports.policies
    _until(run, WIDE_SHARE).go()
    pairs = list(zip(run.layers, first, strict=True))
    rows = [_widened(kept, layer.problem) if _value(kept) < _value(layer) else _row(layer) for layer, kept in pairs]

    def late() -> bool:
        return run.interrupted.is_set() or end - time.monotonic() < (1 - WIDE_SHARE - THINNING_SHARE) * left

    last = replace(run, layers=first, on_layers=None, end=end)
    try:
        rows = thinned([layer.problem for layer in run.layers], rows, held_G, late)
    except InputError:
        if not np.isfinite(_total(first)):
            raise
    else:
        last.layers = [_within(layer, row, full=full) for layer, row in zip(run.layers, rows, strict=True)]
        last.go()  # without bounds of their own
    run.end = last.end
    best = last.layers if _total(last.layers) < _total(first) else first
    for (layer, kept), found, chosen in zip(pairs, last.layers, best, strict=True):
        assert layer.outcome is not None and found.outcome is not None and chosen.outcome is not None
        layer.bound_us = max(layer.bound_us, layer.outcome.bound_us or 0.0)
        layer.seconds += kept.seconds + (found.seconds if found is not kept else 0.0)
        proved = found.outcome.stopped_by is StoppedBy.PROOF  # of the slots that the layer has, not of the budget
        stopped_by = StoppedBy.ITERATIONS if proved else found.outcome.stopped_by
        layer.outcome = replace(
            found.outcome if run.exact else chosen.outcome,
            row=_widened(chosen, layer.problem), weights_P=_widened_weights(chosen, layer.problem),
            history=chosen.outcome.history, bound_us=None, own_bound_us=None, stopped_by=stopped_by,
        )  # fmt: skip
        if chosen is not found and layer.outcome.start_us is not None:
            layer.outcome.start_us = _value(chosen)


def _until(run: Run, share: float) -> Run:
    """The run with this share of the time that is left."""
    left = max(0.0, run.clock + run.time_limit - time.monotonic())
    return replace(run, time_limit=run.time_limit - (1 - share) * left, progress=None)


def _first(run: Run, held_G: IntArray) -> list[Layer]:
    """The layers of a run after a descent that keeps to the budget: from placements to start from that do, or each in
    its even part. Without a placement where rules leave none there, or none that is found in time."""
    pairs = [(layer, layer.warm) for layer in run.layers if layer.warm is not None]
    if pairs and (_held([layer.problem for layer, _ in pairs], [row for _, row in pairs]) <= held_G).all():
        found = [_within(layer, row, full=False) for layer, row in pairs]
    else:
        slots_LG = even_slots(held_G, run.layers[0].problem.slots_per_rank, len(run.layers))
        slots_LG.setflags(write=False)  # as the problem's: the same kernels serve
        found = [
            Layer(replace(each.problem, slots_per_rank=slots_G), None, each.seed, bounded_steps=each.problem.num_steps)
            for each, slots_G in zip(run.layers, slots_LG, strict=True)
        ]
    solver = get("local-search") if run.solver.supports.proves else run.solver
    few = replace(run, solver=solver, layers=found, patience=0, on_layers=None)
    with suppress(hurried.OutOfTimeError), hurried.call(few.clock + few.time_limit, run.interrupted.is_set):
        few.go()
    return found


def even_slots(held_G: IntArray, slots_G: IntArray, num_layers: int) -> IntArray:
    """[L, G] slots of each layer, at most `slots_G`, of budgets that are divided evenly; what is left goes in turn."""
    even_G = np.minimum(held_G // num_layers, slots_G)
    rest = np.repeat(np.arange(len(held_G)), np.where(even_G < slots_G, held_G - num_layers * even_G, 0))
    slots_LG = np.tile(even_G, (num_layers, 1))
    np.add.at(slots_LG, (np.arange(len(rest)) % num_layers, rest), 1)
    return slots_LG


def _within(layer: Layer, row: Row, *, full: bool) -> Layer:
    """A layer in the slots that a row of it uses, to start from the row."""
    problem, slots_G = layer.problem, _kept(layer.problem, row)
    slots_G.setflags(write=False)  # as the problem's: the same kernels serve
    own, weights_P = replace(problem, slots_per_rank=slots_G, full=full), problem.weighed.get(row.tobytes())
    if weights_P is not None:
        remember_weights(own, row[row != EMPTY], weights_P[row != EMPTY])
    return Layer(own, row[row != EMPTY], layer.seed, bounded_steps=problem.num_steps)  # bounded already


def _widened(layer: Layer, wide: Problem) -> Row:
    """The row of a layer in the first slots of ranks that have more."""
    row = np.full(wide.num_slots, EMPTY)
    row[_first_slots(layer.problem, wide)] = _row(layer)
    return row


def _widened_weights(layer: Layer, wide: Problem) -> FloatArray | None:
    """The static weights of that row, where some were chosen."""
    if layer.outcome is None or layer.outcome.weights_P is None:
        return None
    weights_P = np.zeros(wide.num_slots)
    weights_P[_first_slots(layer.problem, wide)] = layer.outcome.weights_P
    return weights_P


def _first_slots(own: Problem, wide: Problem) -> IntArray:
    """[P] slots of a layer, in one whose ranks have more."""
    first_G = np.cumsum(wide.slots_per_rank) - wide.slots_per_rank
    own_G = np.cumsum(own.slots_per_rank) - own.slots_per_rank
    return np.arange(own.num_slots) + (first_G - own_G)[own.rank_of_slot]


def _total(layers: Sequence[Layer]) -> float:
    """Microseconds of the answers of all layers, infinite where one has none."""
    return sum(map(_value, layers))


def _value(layer: Layer) -> float:
    if layer.outcome is None or layer.outcome.row is None:
        return np.inf
    value = value_of(layer.outcome)
    return total(layer.problem, layer.outcome.row) if value is None else value


def _held(problems: Sequence[Problem], rows: Sequence[Row]) -> IntArray:
    """[G] experts that each rank holds over all layers."""
    return np.asarray(np.stack([_kept(*each) for each in zip(problems, rows, strict=True)]).sum(axis=0))


def _kept(problem: Problem, row: Row) -> IntArray:
    """[G] experts that each rank holds in a layer."""
    return np.bincount(problem.rank_of_slot[row != EMPTY], minlength=problem.num_ranks)


def _row(layer: Layer) -> Row:
    assert layer.outcome is not None and layer.outcome.row is not None
    return layer.outcome.row


class _Thinning:
    """One layer's row that loses copies; `loss_P`: microseconds that each copy's loss costs, infinity where it is the
    only one. exact: whether that is the objective's word, else a guess by its load."""

    def __init__(self, problem: Problem, row: Row, loss_P: FloatArray, *, exact: bool) -> None:
        from gemopt.solvers.search.shares import make_search, make_shares
        from gemopt.solvers.search.state import make_costs

        self.problem = replace(problem, split=Split.EVEN, senders_TGE=None, moves=None, full=False)
        self.row, self.loss_P, self._make_search = row.copy(), loss_P, make_search
        self.load_E = problem.num_steps * problem.linearised[1].mean(axis=0)
        self.shares = make_shares(self.problem) if exact else None  # None too where counts are too many to tabulate
        self.costs = make_costs(self.problem) if exact else None
        self.look()

    def look(self) -> None:
        """Bring the losses up to date."""
        from gemopt.solvers.search.copies import removal_costs
        from gemopt.solvers.search.state import make_state
        from gemopt.solvers.search.swaps import total_cost

        self.loss_P[:] = self._guessed()
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
        load_E = self.load_E / np.maximum(copies_E, 1)
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
    loss_LP = np.empty((len(rows), len(rows[0])))
    layers = [_Thinning(*each, exact=not late()) for each in zip(problems, rows, loss_LP, strict=True)]
    rank_of_slot = problems[0].rank_of_slot
    over_G, guessing = _held(problems, rows) - held_G, False
    while (over_G > 0).any():
        if not guessing and late():
            guessing = True
            for layer in layers:
                layer.guess()
        on_full_P = (over_G > 0)[rank_of_slot]
        if not np.isfinite(loss_LP[:, on_full_P]).any():
            if _moved(layers, over_G):
                continue
            on_full_P[:] = True  # a copy elsewhere makes room
        allowed_LP = np.where(on_full_P, loss_LP, np.inf)
        index, slot = np.unravel_index(allowed_LP.argmin(), loss_LP.shape)
        if not np.isfinite(allowed_LP[index, slot]):
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
    ranks = layers[0].problem.rank_of_slot
    roomy_P, source_P = (over_G < 0)[ranks], ranks == source
    for layer in layers:
        row, load_E = layer.row, layer.load_E
        mine = np.flatnonzero(source_P & (row != EMPTY))
        if not len(mine) or (best is not None and load_E[row[mine]].min() >= best[0]):
            continue
        empty = np.flatnonzero(roomy_P & (row == EMPTY))
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
    over_G[ranks[target]] += 1
    over_G[source] -= 1
    layer.row[target], layer.row[slot] = layer.row[slot], EMPTY
    layer.look()
    return True
