"""Search under makespans and links together, over all layers: sweeps of swaps, layer by layer, from several starts.

Starts are the placement that heeds makespans alone, what swaps make of it under the links alone or as if all ports of a
kind carried as much (which every byte changes, not only those of the fullest), and, where senders follow experts, whole
ranks renamed along the transitions. From each, every layer in turn takes the swaps that lower its cost and that of the
next layer's dispatch, until a sweep takes next to nothing. The best is then kicked: a few slots of one layer change
places, or spare slots other copies, or, where senders follow experts, two ranks all they hold in a few layers in a row;
what that changes for descends again. Last, copies are changed once more.
Where moves cost or are limited, the first start is the placement in force, at a price that falls to what they cost, so
that what gains most moves first. Kicks then also bring home what has moved, and other layers may use what that frees.
All that is offered is scored by `linked_total`; the kernels see the convex hulls of the ports' curves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from gemopt.evaluate import linked_total
from gemopt.links import Links
from gemopt.links.flows import Flow
from gemopt.moves import Budget
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.result import StoppedBy, relative_gap
from gemopt.solvers.base import Linked, Options, Row, beside, incumbent, seeded, within_budget
from gemopt.solvers.nearest import home_row
from gemopt.solvers.relabel import renamed
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.linked_copies import search_copies, walked
from gemopt.solvers.search.linked_kicks import change_roles, kicked, limited
from gemopt.solvers.search.linked_swaps import Price, Room, slowest, sweep_linked
from gemopt.solvers.search.state import Costs, State, make_costs, make_state, step_order
from gemopt.solvers.search.streams import Scratch, Stream, make_scratch, make_stream
from gemopt.solvers.search.terms import Terms, free_terms, make_terms

EPSILON = 1e-6
SWAP_SHARE = 0.6  # of the time, where there are copies to change afterwards
SWEEPS = 12  # over one layer before the next, and over all layers, at most
FEW = 0.02  # of the swaps of the first sweep over all layers: the last one
FALLING = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # of a layer's cost: what a move must gain, beside its price
HEATS = (0.1, 0.3, 0.03)  # of the cost: of rounds of annealing with spare slots, one after the other
SAMPLE_TOKENS = 8000  # of a descent before that on all steps
LEAST_STEPS = 16
Rows = list[Row]


class Prelude(NamedTuple):
    """Descents before: weight of makespans, whether every byte counts instead of the fullest port's, and for one after
    the other what a move must gain, of a layer's cost, beside its price."""

    compute: float
    even: bool
    gains: tuple[float, ...] = (0.0,)


PRELUDES = (Prelude(1.0, True), None, Prelude(0.0, False), Prelude(0.0, True))


def search_linked(problems: Sequence[Problem], links: Links, rows: Rows, options: Options) -> Linked:
    """Improve the rows of all layers under the joint objective; never worse than what is given. Blocs stay.

    `options.patience`: kicks of each kind per layer in a row without gain; 0: from the first start alone; None: as many
    as there is time for.
    """
    problems = [settled(problem, row) for problem, row in zip(problems, rows, strict=True)]
    value = linked_total(problems, rows, links)
    found = Linked(list(rows), value, StoppedBy.ITERATIONS, [incumbent(value)])
    if options.expired():
        found.stopped_by = options.cut_by
        return found
    sample = _sampled(problems, links, options.seed)
    copies, priced = problems[0].spare_slots > 0, any(problem.moves is not None for problem in problems)
    deadline = time.monotonic() + (SWAP_SHARE if copies else 1.0) * options.remaining
    with replace(options, deadline=deadline).alarm() as stop:
        starts: list[tuple[Rows, Prelude | None]] = [(rows, each) for each in PRELUDES]
        if links.coupled:
            starts.insert(0, (aligned(problems, links, rows), None))
        if priced:
            starts.insert(0, (_at_home(problems, rows), Prelude(1.0, False, FALLING)))
            starts = [each for each in starts if within_budget(problems, each[0], options.budget)]
            for home, _ in starts[:1]:
                _offer(found, problems, links, home, options.budget)
        for given, prelude in starts[:1] if options.patience == 0 else starts:
            if stop[0]:
                break
            start = given
            for some, some_links in (sample, (problems, links)):
                if prelude is not None and start is given:
                    even_links = replace(some_links, even=prelude.even, _cache={})
                    before = Layers(some, even_links, start, stop, options.budget)
                    mean_us = found.total_us / problems[0].num_steps * some[0].num_steps / len(problems)
                    for gain in prelude.gains:
                        before.settle(compute=prelude.compute, least_us=gain * mean_us)
                    start = before.rows()
                search = Layers(some, some_links, start, stop, options.budget)
                search.settle()
                start = search.rows()
                if stop[0] or some is problems or len(some[0].counts_TE) == len(problems[0].counts_TE):
                    break
            _offer(found, problems, links, start, options.budget)
        _kick(found, problems, links, options, stop)
    if copies and not options.expired():
        changed = search_copies(problems, links, found.rows, options)
        _offer(found, problems, links, changed, options.budget)
        if not options.expired():
            with options.alarm() as stop:
                search = Layers(problems, links, changed, stop, options.budget)
                search.settle()
                _offer(found, problems, links, search.rows(), options.budget)
                _kick(found, problems, links, options, stop)
    if options.expired():
        found.stopped_by = options.cut_by
    return found


def aligned(problems: Sequence[Problem], links: Links, rows: Rows) -> Rows:
    """The rows with whole ranks renamed, layer after layer, so that tokens have a short way from the layer before.

    An assignment problem for each layer: bytes between the ranks before and the contents of each rank, times what a
    byte takes. Only ranks with as many slots and equal rules change places; speeds are left to the swaps that follow.
    """
    slots_G, found = problems[0].slots_per_rank, list(rows)
    byte_GG = links.topology.byte_times()
    for layer in range(1, len(rows)):
        rules = problems[layer].rules
        kind_GN = np.column_stack([slots_G] if rules is None else [slots_G, rules.role_G])
        other = (kind_GN[:, None] != kind_GN[None]).any(axis=2)
        flow = links.flows(layer, found, slots_G)[0]
        all_visits = sum((flow.visits(t, t + 1) for t in range(flow.num_steps)), start=np.zeros(1))
        visits = all_visits.reshape(flow.routes[0].senders, -1)
        cost_GG = visits[:, : len(slots_G)].T @ byte_GG
        contents, ranks = linear_sum_assignment(np.where(other, 1e3 * (1.0 + cost_GG.sum()), cost_GG))
        roles_G = np.empty(len(slots_G), np.int64)
        roles_G[ranks] = contents
        found[layer] = renamed(problems[layer], found[layer], roles_G)
    return found


def _at_home(problems: Sequence[Problem], rows: Rows) -> Rows:
    """The rows of the placement in force, where they may be; else those given."""
    homes = [None if each.moves is None else home_row(each, each.moves) for each in problems]
    return [row if home is None else home for home, row in zip(homes, rows, strict=True)]


def _offer(found: Linked, problems: Sequence[Problem], links: Links, rows: Rows, budget: Budget | None) -> bool:
    value = linked_total(problems, rows, links)
    if value >= found.total_us or not within_budget(problems, rows, budget):
        return False
    found.rows, found.total_us = rows, value
    found.history.append(incumbent(value))
    return True


def _kick(found: Linked, problems: Sequence[Problem], links: Links, options: Options, stop: NDArray[np.uint8]) -> None:
    """Kicks of the best, one layer after the other, until too many in a row bring no gain, or it is good enough.

    Where senders follow experts the layers around a kicked one follow it before it may go back.
    """
    patience = np.inf if options.patience is None else options.patience
    draws, idle, layer = seeded(options.seed, len(problems)), 0, 0
    ways = [
        "swaps",
        *["copies"] * (problems[0].spare_slots > 0),
        *["roles"] * (links.coupled and problems[0].num_ranks > 1 and not limited(problems, options.budget)),
    ]
    while idle < patience * len(ways) * len(problems) and not stop[0]:
        gap = relative_gap(found.total_us, options.bound_us)
        if gap is not None and options.bound_us > 0 and gap <= options.gap:
            found.stopped_by = StoppedBy.GAP
            return
        turn, rows, order = idle // len(problems), list(found.rows), [{layer}]
        way = ways[turn % len(ways)]
        if way == "roles":
            order = [change_roles(problems, rows, layer, draws)]
        elif way == "swaps":
            rows[layer] = kicked(beside(problems, rows, layer, options.budget), rows[layer], draws)
        else:
            rows = walked(problems, links, rows, layer, draws, HEATS[turn // len(ways) % len(HEATS)], options)
        if links.coupled:
            order = [{layer - 1, layer + 1} & set(range(len(problems))), *order]
        if options.budget is not None:
            order.insert(0, {int(draws.integers(len(problems)))})
        search = Layers(problems, links, rows, stop, options.budget)
        for due in order:
            search.settle(due)
            for n in due if way == "copies" else ():
                changed = search_copies(problems, links, search.rows(), options, n)
                search = Layers(problems, links, changed, stop, options.budget)
        rows = search.rows()
        idle = 0 if _offer(found, problems, links, rows, options.budget) else idle + 1
        layer = (layer + 1) % len(problems)


def _sampled(problems: Sequence[Problem], links: Links, seed: int) -> tuple[Sequence[Problem], Links]:
    """Some of the steps, drawn at random, where there are many more tokens than a descent needs."""
    steps, tokens = problems[0].num_steps, links.traces.tokens
    size = len(tokens.step_of_token) if tokens is not None else int((links.traces.counts[:, 0] > 0).sum())
    keep = max(LEAST_STEPS, int(steps * SAMPLE_TOKENS / max(1, size)))
    if 2 * keep > steps:
        return problems, links
    chosen = np.sort(seeded(seed, steps).choice(steps, keep, replace=False))
    some = [problem.select(chosen) for problem in problems]
    for n, moves in enumerate(problem.moves for problem in problems):
        if moves is not None:
            some[n] = some[n].with_moves(replace(moves, price_us=moves.price_us * keep / steps))
    return some, links.on(links.traces.steps(chosen))


class Layers:
    """All layers under search. Items are what slots held at the beginning, see `streams`.

    The rows keep to the limits of moves, and swaps do so as well. moved: by layer, [G] moves into each rank at present.
    """

    def __init__(
        self, problems: Sequence[Problem], links: Links, rows: Rows, stop: NDArray[np.uint8],
        budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self.problems, self.links, self.stop, self.budget = problems, links, stop, budget
        self.moved = [
            np.zeros(each.num_ranks, np.int64) if each.moves is None else each.moves.into(row, each.slots_per_rank)
            for each, row in zip(problems, rows, strict=True)
        ]
        self.costs: list[Costs] = [make_costs(problem) for problem in problems]
        self.states: dict[int, State] = {}
        self.item_LP = [np.where(row != EMPTY, np.arange(len(row)), -1) for row in rows]
        self.rank_LQ = [problem.rank_of_slot.astype(np.int32) for problem in problems]
        self.begun, self.made = rows, dict[int, list[Stream]]()
        self.nothing = self._nothing(self.flows(0)[0])

    @property
    def position_T(self) -> NDArray[np.int64]:
        """[T] place of each step in the search."""
        return np.argsort(step_order(self.problems[0].num_steps))

    def _nothing(self, flow: Flow) -> Stream:
        """A stream without tokens, for what a layer does not have."""
        none, ranks = np.zeros(0, np.int32), self.rank_LQ[0]
        empty = Flow(np.zeros((0, 1), np.int32), none, none, none, flow.rank_P, flow.routes[:1], flow.num_steps)
        return make_stream(empty, self.position_T, ranks, ranks, itself=False)

    def flows(self, layer: int) -> list[Flow]:
        """Tokens of a layer as the search began."""
        return self.links.flows(layer, self.begun, self.problems[layer].slots_per_rank)

    def streams(self, layer: int) -> list[Stream]:
        """The streams of a layer, made when it is first looked at."""
        if layer not in self.made:
            ranks, flows = self.rank_LQ, self.flows(layer)
            homes = [np.arange(flow.routes[0].senders, dtype=np.int32) for flow in flows]
            if self.links.coupled:
                homes = [ranks[layer - 1] if layer > 0 else homes[0], ranks[layer]]
            self.made[layer] = [
                make_stream(flow, self.position_T, ranks[layer], home, itself=n == 1)
                for n, (flow, home) in enumerate(zip(flows, homes, strict=True))
            ]
        return self.made[layer]

    def rows(self) -> Rows:
        """The rows at present."""
        return [self.states[n].content.copy() if n in self.states else row.copy() for n, row in enumerate(self.begun)]

    def state(self, layer: int) -> State:
        """The state of a layer, made when it is first looked at."""
        if layer not in self.states:
            self.states[layer] = make_state(self.problems[layer], self.begun[layer], self.costs[layer], self.stop)
        return self.states[layer]

    def settle(self, due: set[int] | None = None, *, compute: float = 1.0, least_us: float = 0.0) -> None:
        """Sweeps over layers that something changed for, at first all or those due, until one takes next to nothing."""
        due, most = set(range(len(self.problems)) if due is None else due), None
        for _ in range(SWEEPS):
            taken = 0
            for layer in sorted(due):
                due.remove(layer)
                if self.stop[0]:
                    return
                swaps, more = self.layer(layer, compute=compute, least_us=least_us)
                due |= {layer} if more else set()
                if swaps and self.links.coupled:
                    due |= {layer - 1, layer + 1} & set(range(len(self.problems)))
                taken += swaps
            most = taken if most is None else most
            if taken <= FEW * most:
                return

    def layer(self, layer: int, *, compute: float = 1.0, least_us: float = 0.0) -> tuple[int, bool]:
        """Swaps taken of one layer, and whether there may be more. least_us: as in `terms`."""
        terms, moved_G = self.terms(layer, least_us), self.moved[layer]
        around = (self.state(layer), self.item_LP[layer], self.rank_LQ[layer], *self.around(layer, compute))
        total = taken = 0
        for _ in range(SWEEPS):
            taken = int(sweep_linked(self.costs[layer], *around, terms, moved_G, EPSILON))
            total += taken
            if not taken:
                break
        return total, taken > 0

    def terms(self, layer: int, least_us: float) -> Terms:
        """What moves of a layer cost, and `least_us` that each must gain beside, within what the others leave."""
        problem = self.problems[layer]
        if problem.moves is None:
            return free_terms(problem)
        moves = replace(problem.moves, price_us=problem.moves.price_us + least_us)
        if self.budget is not None:
            moves = self.budget.beside(moves, np.sum(self.moved, axis=0) - self.moved[layer])
        return make_terms(problem, moves)

    def around(
        self, layer: int, compute: float
    ) -> tuple[tuple[Stream, Stream, Stream], tuple[Scratch, Scratch, Scratch], Price, Room]:
        """What the swaps of a layer change besides its state, and what they cost."""
        state, steps = self.state(layer), self.problems[layer].num_steps
        later = self.links.coupled and layer + 1 < len(self.problems)
        makespan_T, combine_T, after = np.zeros(steps, np.float32), np.zeros(steps), self.nothing
        if later:
            after, combine_T = self.streams(layer + 1)[0], self.streams(layer + 1)[1].times
            slowest(self.state(layer + 1), -1, -1, makespan_T)
        price = Price(compute, self.links.exchange.overlap, later, makespan_T, combine_T)
        streams = (self.streams(layer)[0], self.streams(layer)[1] if self.links.coupled else self.nothing, after)
        own, back = (make_scratch(stream, own=True) for stream in streams[:2])
        time_a, time_b, others = np.empty((3, steps), np.float32)
        room = Room(np.empty_like(state.loads[0]), time_a, time_b, others, np.empty((3, steps)))
        return streams, (own, back, make_scratch(after, own=False)), price, room
