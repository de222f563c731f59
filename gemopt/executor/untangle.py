"""Cut the moves of a layer into groups that can be committed one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemopt.placement import EMPTY

IntArray = NDArray[np.int64]


@dataclass
class Untangle:
    """Order the arrivals of a layer so that small groups of them can be committed one after the other.

    A newcomer may overwrite an expert only when that expert is held elsewhere, at the latest in the same commit.
    Ranks whose newcomers wait for each other form cycles; since slots of a rank are interchangeable the shortest
    cycle over ranks is a commit in which each rank receives one expert.
    """

    before_P: IntArray
    after_P: IntArray
    rank_of_slot: IntArray
    arrivals: list[list[int]] = field(init=False)
    free: list[list[int]] = field(init=False)
    waiting: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        ranks = self.rank_of_slot
        changed = np.flatnonzero(self.before_P != self.after_P)
        staying = set(self.before_P[self.before_P == self.after_P].tolist())
        num_ranks = int(ranks.max()) + 1
        self.arrivals = [[] for _ in range(num_ranks)]
        self.free = [[] for _ in range(num_ranks)]
        self.waiting = {}
        for slot in changed.tolist():
            old, new = int(self.before_P[slot]), int(self.after_P[slot])
            if new != EMPTY:
                self.arrivals[ranks[slot]].append(new)
            if old == EMPTY or old in staying:
                self.free[ranks[slot]].append(slot)
            else:
                self.waiting.setdefault(old, []).append(slot)

    def components(self) -> Iterator[list[tuple[int, int]]]:
        """Groups of (slot, expert) to commit together, in an order in which they can be."""
        while any(self.arrivals):
            rank = next((g for g, a in enumerate(self.arrivals) if a and self.free[g]), None)
            if rank is None:
                yield self._cycle()
                continue
            expert, slot = self.arrivals[rank].pop(0), self.free[rank].pop(0)
            self._release(expert)
            yield [(slot, expert)]

    def _release(self, expert: int, *, used: frozenset[int] = frozenset()) -> None:
        ranks = self.rank_of_slot
        for slot in self.waiting.pop(expert, []):
            if slot not in used:
                self.free[ranks[slot]].append(slot)

    def _edges(self) -> list[dict[int, tuple[int, int]]]:
        """Per rank: where an expert that waits to leave it arrives -> (expert, its slot)."""
        arriving: dict[int, list[int]] = {}
        for rank, experts in enumerate(self.arrivals):
            for expert in experts:
                arriving.setdefault(expert, []).append(rank)
        edges: list[dict[int, tuple[int, int]]] = [{} for _ in self.arrivals]
        ranks = self.rank_of_slot
        for expert, slots in self.waiting.items():
            for slot in slots:
                for rank in arriving.get(expert, ()):
                    edges[ranks[slot]].setdefault(rank, (expert, slot))
        return edges

    def _cycle(self) -> list[tuple[int, int]]:
        edges = self._edges()
        path = min(filter(None, (_shortest_cycle(edges, g) for g in range(len(edges)))), key=len)
        hops = list(zip(path, path[1:] + path[:1], strict=True))
        slot_on = {here: edges[here][there][1] for here, there in hops}
        component = []
        for here, there in hops:
            expert = edges[here][there][0]
            self.arrivals[there].remove(expert)
            component.append((slot_on[there], expert))
        used = frozenset(slot for slot, _ in component)
        for _, expert in component:
            self._release(expert, used=used)
        return component


def _shortest_cycle(edges: Sequence[dict[int, tuple[int, int]]], start: int) -> list[int] | None:
    parent: dict[int, int] = {}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for following in edges[node]:
            if following == start:
                path = [node]
                while path[-1] != start:
                    path.append(parent[path[-1]])
                return path[::-1]
            if following not in parent:
                parent[following] = node
                queue.append(following)
    return None
