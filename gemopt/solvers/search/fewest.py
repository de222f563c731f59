"""Fewest bytes between nodes among placements that compute hardly longer than one that heeds no links.

Descents from that placement lower bytes, with makespans weighed against them more and less. Then the best, or what is
as good, is kicked, a few slots of one layer on different nodes change places, and descends again: makespans weigh a
little more where they came out too long, else a little less. All bytes between nodes count as much as those through
the fullest port there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import linked_total, objective
from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import DEFAULT_PATIENCE, Linked, Options, Row, incumbent, seeded
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.linked import Layers, exchanged
from gemopt.topology import Level

WEIGHTS = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5)  # of all makespans against all bytes, in the first descents
DRIFT = 1.15  # of the weight, from kick to kick
MOST_PAIRS = 3  # of slots that a kick exchanges
PATIENCE = 10  # kicks per layer without gain, for each one of `Options.patience`


def search_fewest(problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
    """Lower the bytes between nodes of a placement; its makespans grow by at most `options.compute_slack` of them.

    `options.patience` as in `search_linked`; 0: no kicks. Copies stay as they are. Only what needs no longer to compute
    than allowed is taken.
    """
    search = _Fewest([settled(problem, row) for problem, row in zip(problems, rows, strict=True)], links, rows, options)
    with options.alarm() as stop:
        search.run(stop)
    found = search.found
    found.stopped_by = options.cut_by if options.expired() else StoppedBy.ITERATIONS
    return found


class _Fewest:
    """The search: what was found, the last rows that were as good, and their makespans by layer."""

    def __init__(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> None:
        assert options.compute_slack is not None
        self.problems, self.links, self.counted, self.options = problems, links, _counting(links), options
        self.node_P = np.repeat(links.topology.node_of_rank, problems[0].slots_per_rank)
        self.start = self.base = rows
        self.compute_L = [objective(problem, row) for problem, row in zip(problems, rows, strict=True)]
        self.most_us = (1 + options.compute_slack) * sum(self.compute_L)
        self.first = self._sent(rows)
        self.least = float((self.first > 0).sum())
        sent_us = float(self.counted.communication(rows, problems[0].slots_per_rank).time_TL.sum())
        self.unit = sent_us / max(sum(self.compute_L), 1e-300)  # of weights: all makespans as much as all bytes
        value = linked_total(problems, rows, links)
        self.found, self.idle = Linked(rows, value, StoppedBy.ITERATIONS, [incumbent(value)]), 0

    def run(self, stop: NDArray[np.uint8]) -> None:
        """Descents, then kicks."""
        if self.least == 0:
            return
        for weight in WEIGHTS:
            for even in (True, False):
                if not stop[0]:
                    self._descend(self.start, weight, stop, even=even)
        patience = DEFAULT_PATIENCE if self.options.patience is None else self.options.patience
        draws, weight, self.idle = seeded(self.options.seed, len(self.problems)), 1.0, 0
        while self.idle < patience * PATIENCE * len(self.problems) and not stop[0]:
            layer = int(draws.integers(len(self.problems)))
            rows = [*self.base[:layer], self._kicked(layer, draws), *self.base[layer + 1 :]]
            fits = self._descend(rows, weight, stop, even=bool(draws.integers(2)), only=layer)
            weight *= 1 / DRIFT if fits else DRIFT

    def _kicked(self, layer: int, draws: np.random.Generator) -> Row:
        row = self.base[layer]
        for _ in range(draws.integers(1, 1 + MOST_PAIRS)):
            nodes = draws.permutation(np.unique(self.node_P))[:2]  # of those with slots
            pair = np.array([draws.choice(np.flatnonzero(self.node_P == node)) for node in nodes])
            row = exchanged(self.problems[layer], row, pair)
        return row

    def _descend(
        self, rows: list[Row], weight: float, stop: NDArray[np.uint8], *, even: bool, only: int | None = None
    ) -> bool:
        """Descend from rows and take what is good enough; whether it keeps to the makespans allowed."""
        layers = Layers(self.problems, replace(self.counted, even=even, _cache={}), rows, stop)
        layers.settle(compute=weight * self.unit, only=only)
        rows, self.idle = layers.rows(), self.idle + 1
        compute_L = [
            us if np.array_equal(row, known) else objective(problem, row)
            for us, row, known, problem in zip(self.compute_L, rows, self.base, self.problems, strict=True)
        ]
        if sum(compute_L) > self.most_us:
            return False
        value = float((self._sent(rows)[self.first > 0] / self.first[self.first > 0]).sum())
        if value > self.least:
            return True
        self.base, self.compute_L = rows, compute_L
        if value < self.least:
            self.least, self.idle = value, 0
            self.found.rows, self.found.total_us = rows, linked_total(self.problems, rows, self.links)
            self.found.history.append(incumbent(self.found.total_us))
        return True

    def _sent(self, rows: list[Row]) -> NDArray[np.float64]:
        """[2] bytes between nodes, and through the fullest port there."""
        sent = self.counted.communication(rows, self.problems[0].slots_per_rank)
        return np.array([sent.cross_node_bytes, sent.fullest_bytes["between_nodes"]])


def _counting(links: Links) -> Links:
    """The same tokens over ports between nodes alone, whose times are bytes."""
    owner = "rank" if links.topology.between_nodes is None else links.topology.between_nodes.port_of
    level = Level(bandwidth_gbs=1.0, port_of=owner)
    others = dict.fromkeys(("within_node", "between_racks", "pair_bandwidth_gbs", "pair_latency_us"))
    topology = links.topology.model_copy(update={**others, "between_nodes": level})
    return replace(
        links, topology=topology, exchange=links.exchange.model_copy(update={"overlap": False}), even=False, _cache={}
    )
