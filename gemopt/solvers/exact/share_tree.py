"""Branching on how many copies each expert has: bounds and proves layers with few spare slots, every cost model alike.

A `Box` is a range of copies for each expert, with the contents that these allow. The master programme goes on from
where that of the box it was cut from ended; a look at all its contents is a bound, and leaves those whose reduced cost
is not above what is open. Where they are few they are searched (`share_search`), else the range that the master is
least sure of is cut in two. The boxes with the lowest bounds are next, some for each thread. With the numbers of copies
known a rank has some thousands of contents, and the master leaves a few per cent less open. Contents that it has in use
are searched wherever it ended, for better placements.

Multipliers are taken half-way between those of the master and the best so far, which steadies them (P. Wentges,
"Weighted Dantzig-Wolfe decomposition for linear mixed-integer programming", 1997).
"""

from __future__ import annotations

import heapq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt import cores
from gemopt.bounds import step_bounds
from gemopt.evaluate import objective
from gemopt.latency import FloatArray, IntArray
from gemopt.problem import Problem
from gemopt.solvers.exact.column_kernels import rows_of
from gemopt.solvers.exact.column_master import Held, Master
from gemopt.solvers.exact.copies_tree import CopiesTree, make_copies_tree
from gemopt.solvers.exact.share_screen import cut_copies
from gemopt.solvers.exact.share_search import Hosts, Left, search_left
from gemopt.solvers.exact.share_space import Priced, Shares
from gemopt.solvers.exact.tree import CLOSE, expert_order
from gemopt.solvers.size import MOST_EXPERTS

FIRST_LOOKS, FIRST_ITERATIONS = 12, 100  # at all contents, and of the master before each
LOOKS, ITERATIONS = 3, 50  # the same of every other box
LEAST_GAIN = 0.02  # of what is open, of a bound that rises still
HELD = 256  # cheapest contents in the master, beside those in use
HELD_BESIDE_TABLES = 768  # the same where latencies are looked up, so that a look takes as long as more iterations
BOXES = 8  # at once for each thread, where there are several: they do not take equally long
MOST_LEFT = 2500  # contents that are searched
MOST_WORK = 3 * 10**7  # steps and columns that a search may look at, where the box can be cut
MOST_ENTRIES = 2**27  # of all boxes: a gigabyte, of which their multipliers may go into a certificate
IN_USE, DIVE_WORK = 0.003, 10**6  # of a column in the master, and the work of a search of those in use
NEVER = 2**62


@dataclass(frozen=True, eq=False)
class Box:
    """From low to high [E] copies; contents `ids` [n] that are left, on the kinds of ranks where net [K, n] is finite.

    net: what each costs less its prices by the last multipliers. best: the best bound, its own net in the same order.
    held: where the master ended. settled: whether its bound hardly rose when last looked at.
    """

    low_E: IntArray
    high_E: IntArray
    ids: IntArray
    net_KN: FloatArray
    best: Priced
    held: Held
    settled: bool = False

    @property
    def live_KN(self) -> NDArray[np.bool_]:
        """[K, n] whether a content may be on a kind of ranks."""
        return np.isfinite(self.best.net_KN, order="C")

    @property
    def entries(self) -> int:
        """How large its arrays are together."""
        nets = {id(each): each.size for each in (self.net_KN, self.best.net_KN)}
        return self.best.mu_ET.size + self.ids.size + sum(nets.values())

    def keep(self, live_KN: NDArray[np.bool_]) -> Box:
        """The same with these contents only."""
        some = live_KN.any(axis=0)
        net, best = (np.where(live_KN, each, np.inf)[:, some] for each in (self.net_KN, self.best.net_KN))
        return replace(self, ids=self.ids[some], net_KN=net, best=self.best._replace(net_KN=best))


class Worked(NamedTuple):
    """What became of a box: parts of it that are open, or the box itself, `closed`; and how many nodes that took.

    value_us, held: [E] of a better placement, if one was found.
    """

    parts: list[Box]
    closed: bool
    nodes: int
    value_us: float
    held_E: IntArray


class Covered(NamedTuple):
    """Boxes that hold all placements, by their ranges low, high [N, E] and multipliers mu [N, E, T], pi [N, E]."""

    low_NE: IntArray
    high_NE: IntArray
    mu_NET: FloatArray
    pi_NE: FloatArray
    floor_T: FloatArray


class ShareTree:
    """What is known of a layer: open boxes by their bounds, closed ones, and the best placement.

    value_us, held: [E] what it is worth and its sets of ranks in the order of the tree, once it is better than `row`.
    """

    def __init__(
        self, space: Shares, tree: CopiesTree, row: IntArray, value_us: float, stop: Any, threads: int = 1
    ) -> None:
        self.space, self.tree, self.stop, self.own, self.threads = space, tree, stop, space.ids(row), threads
        self.value_us, self.held_E = value_us, np.zeros(space.problem.num_experts, np.int64)
        self.hosts, self.nodes, self.boxes, self.entries = _hosts(space, tree), 0, 0, 0
        self.open: list[tuple[float, int, Box]] = []
        self.closed: list[Box] = []

    @property
    def limit_us(self) -> float:
        """What a better placement is below."""
        return self.value_us * (1 - CLOSE)

    @property
    def bound_us(self) -> float:
        """What no placement falls below."""
        known = min([box.best.bound_us for _, _, box in self.open], default=np.inf if self.closed else -np.inf)
        return self.value_us * (1 - 2 * CLOSE) if known >= self.limit_us else known

    @property
    def done(self) -> bool:
        """Whether no better placement is left."""
        return self.boxes > 0 and (not self.open or self.open[0][0] >= self.limit_us)

    def go(self, target_us: float) -> None:
        """Until stopped, or no box is below the target, or there is no room for more: some at once for each thread."""
        root = self._look(self._root())
        if root is None:
            return
        self._take(self.dive(root))
        most = 1 if self.threads == 1 else BOXES * self.threads
        with ThreadPoolExecutor(self.threads, initializer=cores.in_this_thread, initargs=(1,)) as pool:
            while self.open and self.open[0][0] < min(target_us, self.limit_us):
                if self.stop[0] or self.entries > MOST_ENTRIES:
                    return
                boxes = [heapq.heappop(self.open)[2] for _ in range(min(most, len(self.open)))]
                self.entries -= sum(box.entries for box in boxes)
                for worked in list(pool.map(self._work, boxes)):  # what one finds others know when all have ended
                    self._take(worked)

    def _work(self, box: Box) -> Worked:
        """Search a box, or cut it; as it is when stopped."""
        if self.stop[0]:
            return self._nothing(box)
        found = self.search(box)
        if found.closed:
            return found
        done = [found, *(self.dive(self._look(part) or part) for part in self.halves(box))]
        best = min(done, key=lambda each: each.value_us)
        parts = [part for each in done[1:] for part in each.parts]
        return best._replace(parts=parts, nodes=sum(each.nodes for each in done))

    def _take(self, worked: Worked) -> None:
        """Keep what became of a box."""
        self.nodes += worked.nodes
        if worked.value_us < self.value_us:
            self.value_us, self.held_E = worked.value_us, worked.held_E
        for box in worked.parts:
            self.entries += box.entries
            if worked.closed:
                self.closed.append(box)
            else:
                self.boxes += 1
                heapq.heappush(self.open, (box.best.bound_us, self.boxes, box))

    def covered(self) -> Covered:
        """All boxes, which prove the bound."""
        found = [*self.closed, *(box for _, _, box in self.open)]
        low, high = (np.array([getattr(box, name) for box in found]) for name in ("low_E", "high_E"))
        mu, pi = np.array([box.best.mu_ET for box in found]), np.array([box.best.pi_E for box in found])
        return Covered(low, high, mu, pi, self.space.floor_T)

    def _root(self) -> Box:
        space, experts = self.space, self.space.problem.num_experts
        net_KN, low_E = np.where(space.live_KN, 0.0, np.inf), np.ones(experts, np.int64)
        nothing = Priced(-np.inf, np.zeros((experts, space.problem.num_steps)), np.zeros(experts), net_KN)
        high_E = np.full(experts, min(space.most, 1 + space.problem.spare_slots))
        return Box(low_E, high_E, np.arange(len(space.contents.pairs)), net_KN, nothing, self._master().held)

    def _master(self) -> Master:
        return Master(self.space, max(self.value_us, 1e-300), self.space.owner_X, self.space.contents.part)

    def _look(self, box: Box) -> Box | None:
        """The box with a better bound and what it leaves; None when stopped before it had any."""
        first = box.best.bound_us == -np.inf
        if not first:
            bound_us = max(box.best.bound_us, self.space.bound_of(box.best.pi_E, box.best.net_KN))
            box = replace(box, best=box.best._replace(bound_us=bound_us))
        begun_us = box.best.bound_us
        master = self._master()
        master.go_on(box.held)
        for look in range(FIRST_LOOKS if first else LOOKS):
            if box.best.bound_us >= self.limit_us or (look and self._left(box).sum() <= MOST_LEFT):
                break
            master.hold(self._columns(master, box))
            master.iterate(FIRST_ITERATIONS if first else ITERATIONS, self.stop)
            mu_LET, pi_E = master.multipliers()
            mu_ET = mu_LET[0]
            if box.best.bound_us > -np.inf:
                mu_ET, pi_E = (mu_ET + box.best.mu_ET) / 2, (pi_E + box.best.pi_E) / 2
            found = self.space.prove(mu_ET, pi_E, self.stop, box.ids, box.live_KN, master.ids, self.limit_us)
            if found is None:
                break
            box = replace(box, net_KN=found.net_KN, held=master.held)
            if found.bound_us > box.best.bound_us:
                box = replace(box, best=found)
        if box.best.bound_us == -np.inf:
            return None
        return replace(box, settled=box.best.bound_us - begun_us <= LEAST_GAIN * (self.limit_us - begun_us))

    def _left(self, box: Box) -> NDArray[np.bool_]:
        """[K, n] the contents that the best multipliers leave for a better placement."""
        net_KN = box.best.net_KN
        room_us = self.limit_us - self.space.bound_of(box.best.pi_E, net_KN)
        return np.asarray(net_KN < net_KN.min(axis=1, keepdims=True) + room_us)

    def _columns(self, master: Master, box: Box) -> IntArray:
        """What the master goes on with: columns in use that are left, and the cheapest."""
        if box.best.bound_us == -np.inf:
            return self.own
        contents, used = len(self.space.contents.pairs), master.used
        at = np.minimum(np.searchsorted(box.ids, used % contents), len(box.ids) - 1)
        used = used[box.ids[at] == used % contents]
        held = HELD if self.space.straight else HELD_BESIDE_TABLES
        most = min(held // len(box.net_KN), box.net_KN.shape[1] - 1)
        first_KN = np.argpartition(box.net_KN, most, axis=1)[:, : most + 1]
        cheap = box.ids[first_KN] + np.arange(len(first_KN))[:, None] * contents
        return np.concatenate([used, cheap[np.isfinite(np.take_along_axis(box.net_KN, first_KN, 1))]])

    def search(self, box: Box) -> Worked:
        """A search of what a box leaves, if it is little or nothing else helps the box: closed when it ended."""
        known = bool((box.low_E == box.high_E).all())
        kind_N, at_N = np.nonzero(self._left(box))
        if len(kind_N) > MOST_LEFT and not (known and box.settled):
            return self._nothing(box)
        found = self._search_among(box, kind_N, at_N, NEVER if known else MOST_WORK)
        return found._replace(parts=[box.keep(np.zeros_like(box.live_KN))]) if found.closed else found

    def _nothing(self, box: Box) -> Worked:
        return Worked([box], False, 0, np.inf, self.held_E)

    def dive(self, box: Box) -> Worked:
        """A search of the columns in use, which may be parts of a good placement."""
        if box.best.bound_us >= self.limit_us:
            return self._nothing(box)
        used = box.held.ids[box.held.image.x > IN_USE]
        kind_N, content_N = np.divmod(used, len(self.space.contents.pairs))
        at_N = np.minimum(np.searchsorted(box.ids, content_N), len(box.ids) - 1)
        mine = (box.ids[at_N] == content_N) & np.isfinite(box.best.net_KN[kind_N, at_N])
        return self._search_among(box, kind_N[mine], at_N[mine], DIVE_WORK)._replace(closed=False)

    def _search_among(self, box: Box, kind_N: IntArray, at_N: IntArray, most_work: int) -> Worked:
        """A search of these contents of a box, closed when it ended."""
        space, net_KN = self.space, box.best.net_KN
        extra_N = (net_KN - net_KN.min(axis=1, keepdims=True))[kind_N, at_N]
        order = np.argsort(extra_N, kind="stable")
        kind_N, pairs_NS = kind_N[order], space.contents.pairs[box.ids[at_N[order]]]
        rows_NT = np.empty((len(kind_N), space.problem.num_steps))
        rows_of(space.features_XFT, pairs_NS, space.ranks_K[kind_N], space.tables, rows_NT)
        empty_NS = pairs_NS == len(space.contents.part) - 1
        expert_NS = space.owner_X[pairs_NS]
        bits_NS = np.where(empty_NS, np.uint64(0), np.uint64(1) << expert_NS.astype(np.uint64))
        left = Left(
            rows_NT, expert_NS, (pairs_NS % space.most + 1).astype(np.int64), (~empty_NS).sum(axis=1),
            np.bitwise_or.reduce(bits_NS, axis=1), kind_N, extra_N[order],
        )  # fmt: skip
        base_us, held_E = space.bound_of(box.best.pi_E, net_KN), self.held_E.copy()
        value_us, nodes, done = search_left(
            left, self.hosts, self.tree, base_us, self.value_us, held_E, most_work, self.stop
        )
        return Worked([box], bool(done), nodes, value_us, held_E)

    def halves(self, box: Box) -> list[Box]:
        """Two boxes, which cut the range of a heavy expert whose copies the master is in two minds about."""
        if (box.low_E == box.high_E).all():
            return [box]
        space = self.space
        taken_X = np.zeros(len(space.contents.part))
        for pair_N in space.members(box.held.ids).T:
            taken_X += np.bincount(pair_N, box.held.image.x * space.contents.part[pair_N], len(taken_X))
        below_EC = np.cumsum(taken_X[:-1].reshape(-1, space.most), axis=1)
        below_EC /= np.maximum(below_EC[:, -1:], 1e-9)
        load_E = space.problem.weights_T @ space.problem.counts_TE
        doubt_EC = (np.minimum(below_EC, 1 - below_EC) + 1e-3) * (load_E + 1e-9 * load_E.max() + 1e-300)[:, None]
        copies = np.arange(1, space.most + 1)
        doubt_EC[(copies < box.low_E[:, None]) | (copies >= box.high_E[:, None])] = -1
        e, k = np.unravel_index(int(doubt_EC.argmax()), doubt_EC.shape)
        low_E, high_E = box.low_E.copy(), box.high_E.copy()
        high_E[e], low_E[e] = k + 1, k + 2
        return [self._within(replace(box, high_E=high_E)), self._within(replace(box, low_E=low_E))]

    def _within(self, box: Box) -> Box:
        """A box with the contents that its ranges allow: slots are spare for the copies of all experts together."""
        space, contents = self.space, self.space.contents
        spare, least = space.problem.spare_slots, int((box.low_E - 1).sum())
        box = replace(box, high_E=np.minimum(box.high_E, box.low_E + spare - least))
        more_EC = np.arange(1, space.most + 1) - box.low_E[:, None]
        more_X = np.append(np.where(more_EC + box.low_E[:, None] > box.high_E[:, None], -1, more_EC), 0)
        live_KN = box.live_KN
        cut_copies(contents.pairs, contents.size, box.ids, more_X, space.slots_K, spare - least, live_KN)
        return box.keep(live_KN)


def bound_of_copies(problem: Problem, row: IntArray, target_us: float, stop: Any, threads: int = 1) -> ShareTree | None:
    """The boxes of a problem's copies, until stopped or at the target; None where contents or ranks are too many."""
    floor_T = step_bounds(problem)
    tree = make_copies_tree(problem, floor_T)
    space = Shares.of(problem, floor_T) if problem.num_experts <= MOST_EXPERTS else None
    if space is None or tree is None:
        return None
    search = ShareTree(space, tree, row, objective(problem, row), stop, threads)
    search.go(target_us)
    return search


def _hosts(space: Shares, tree: CopiesTree) -> Hosts:
    """The ranks of a space, as the search of what is left needs them."""
    kinds = [np.flatnonzero(space.kind_G == k) for k in range(len(space.ranks_K))]
    group_KG = np.zeros((len(kinds), max(len(ranks) for ranks in kinds)), np.int64)
    for k, ranks in enumerate(kinds):
        group_KG[k, : len(ranks)] = ranks
    sets = np.zeros(int(tree.held.max()) + 1, np.int64)
    sets[tree.held] = np.arange(len(tree.held))
    return Hosts(group_KG, space.count_K.astype(np.int64), sets, expert_order(space.problem))
