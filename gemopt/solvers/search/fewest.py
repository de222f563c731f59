"""Fewest bytes between nodes among placements that compute hardly longer than one that heeds no links.

Descents from that placement come first, with makespans weighed against bytes more and less: in little time they find
most. Then rounds of annealing, from there or from the best, lower bytes for a price of makespans, another one every
round, and longer every round. Where layers are exchanged each by itself, what a layer sends for how much it computes is
kept as a front, and one point of every front is chosen so that all layers together send the fewest bytes for what they
may compute: the slack goes where it gains most. Where senders follow experts, layers anneal in turn, and the best that
all compute in time is kept. All bytes between nodes count as much as those through the fullest port there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import linked_total, objective
from gemopt.latency import FloatArray
from gemopt.links import Links
from gemopt.links.flows import Flow
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers.base import Linked, Options, Row, incumbent, seeded
from gemopt.solvers.search.annealing import Front, Trade, anneal
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.linked import Layers
from gemopt.solvers.search.swaps import total_cost
from gemopt.topology import Level

WEIGHTS = (16.0, 8.0, 4.0, 2.0, 1.0)  # of all makespans against all bytes, in the descents
PATIENCE = 2  # rounds without gain, for each one of `Options.patience`
FIRST, LONGER, LONGEST = 2.0, 1.6, 400.0  # swaps drawn of a layer, per pair of slots, in the first round and later
HOT, COLD = 1.0, 0.015  # what swaps may cost at the beginning and at the end, in parts of an expert's mean bytes
PRICE, SPREAD = 10.0, 1.5  # of all makespans against all bytes in the first round, and by what factor others differ
DRIFT = 1.2  # of the price, from round to round
TURNS = 40  # of every layer in a round, where layers are coupled
BINS, LEAST_SPAN = 160, 0.005
BLOCK = 1 << 14  # swaps drawn at once
LEAST_GAIN = 1e-9


def search_fewest(problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> Linked:
    """Lower the bytes between nodes of a placement; its makespans grow by at most `options.compute_slack` of them.

    `options.patience`: of rounds, as of kicks in `search_linked`; 0: descents and one round. Copies stay as they are.
    Only what needs no longer to compute than allowed is taken.
    """
    search = _Fewest([settled(problem, row) for problem, row in zip(problems, rows, strict=True)], links, rows, options)
    with options.alarm() as stop:
        search.run(stop)
    found = search.found
    found.stopped_by = options.cut_by if options.expired() else StoppedBy.ITERATIONS
    return found


class _Point(NamedTuple):
    """What one layer computes, and sends through every port [R], with a row [P]."""

    compute: float
    loads: FloatArray
    row: Row


class _OneStep(Layers):
    """All layers under search, with the tokens of all steps together."""

    @property
    def position_T(self) -> NDArray[np.int64]:
        return np.zeros(1, np.int64)

    def flows(self, layer: int) -> list[Flow]:
        return [replace(flow, step_N=np.zeros_like(flow.step_N), num_steps=1) for flow in super().flows(layer)]

    def loads(self, layer: int, ports: int) -> FloatArray:
        """[R] bytes through every port, in both directions of an exchange."""
        return sum((stream.loads.reshape(-1, ports).sum(axis=0) for stream in self.streams(layer)), np.zeros(ports))


class _Fewest:
    """The search. least: what the best rows send, of what the start does, all bytes and the fullest port's added up.

    points: of the best rows, by layer. fronts: by layer; one of one bin for all where layers are coupled.
    """

    def __init__(self, problems: Sequence[Problem], links: Links, rows: list[Row], options: Options) -> None:
        assert options.compute_slack is not None
        self.problems, self.links, self.counted, self.options = problems, links, _counting(links), options
        self.compute_L = [objective(problem, row) for problem, row in zip(problems, rows, strict=True)]
        self.most_us = (1 + options.compute_slack) * sum(self.compute_L)
        self.first, self.ports = self._sent(rows), len(self.counted.topology.ports.names)
        self.least = float((self.first > 0).sum())
        self.byte, self.fullest = np.array([0.5, 1.0]) / np.maximum(self.first, 1e-9)  # every byte is on two ports
        self.draws, self.start = seeded(options.seed, len(problems)), rows
        value = linked_total(problems, rows, links)
        self.found = Linked(rows, value, StoppedBy.ITERATIONS, [incumbent(value)])
        bins = 1 if links.coupled else BINS
        self.fronts = [
            Front(np.full(bins, np.inf), np.zeros(bins), np.zeros((bins, self.ports)), np.zeros((bins, len(row)), int))
            for row in (rows[:1] if links.coupled else rows)
        ]

    def run(self, stop: NDArray[np.uint8]) -> None:
        """Descents, then rounds until too many in a row bring no gain."""
        if self.least == 0 or stop[0]:
            return
        patience = np.inf if self.options.patience is None else self.options.patience
        self._descend(stop)
        if stop[0]:
            return
        search, price, length, idle = self._begun(self.found.rows, stop), PRICE, FIRST, 0
        self.points = [
            _Point(objective(problem, row), search.loads(layer, self.ports), row)
            for layer, (problem, row) in enumerate(zip(self.problems, search.begun, strict=True))
        ]
        while self.least > 0 and not stop[0]:
            before, spread = self.least, SPREAD ** self.draws.uniform(-1.0, 1.0)
            each = self._in_turn if self.links.coupled else self._by_itself
            compute_us = each(search, price * spread / self.most_us, length, stop)
            idle = 0 if self.least < before else idle + 1
            if idle >= patience * PATIENCE:
                break
            price *= DRIFT if compute_us > self.most_us else 1 / DRIFT
            length = min(LONGEST, LONGER * length)
            search = self._begun(self.found.rows if self.draws.random() < 0.5 else self.start, stop)

    def _descend(self, stop: NDArray[np.uint8]) -> None:
        """Descents from the start, with bytes through all ports alike and through the fullest."""
        sent_us = float(self.counted.communication(self.start, self.problems[0].slots_per_rank).time_TL.sum())
        for weight, even in product(WEIGHTS, (True, False)):
            if stop[0]:
                return
            layers = Layers(self.problems, replace(self.counted, even=even, _cache={}), self.start, stop)
            layers.settle(compute=weight * sent_us / max(sum(self.compute_L), 1e-300))
            self._take(layers.rows())

    def _begun(self, rows: list[Row], stop: NDArray[np.uint8]) -> _OneStep:
        return _OneStep(self.problems, self.counted, rows, stop)

    def _by_itself(self, search: _OneStep, price: float, length: float, stop: NDArray[np.uint8]) -> float:
        """Anneal layer by layer, then choose of their fronts; microseconds that all compute at the end."""
        assert self.options.compute_slack is not None
        span, compute_us = max(self.options.compute_slack, LEAST_SPAN), 0.0
        for layer, start_us in enumerate(self.compute_L):
            if not stop[0]:
                low_us, bin_us = (1 - 2 * span) * start_us, 8 * span * start_us / BINS
                trade = Trade(self.byte, self.fullest, price, 0.0, self.links.per_node, low_us, bin_us)
                others_R = sum((point.loads for n, point in enumerate(self.points) if n != layer), np.zeros(self.ports))
                loads = search.loads(layer, self.ports), others_R
                compute_us += self._anneal(search, layer, trade, self.fronts[layer], loads, length, 0, 1)
        self._choose(stop)
        return compute_us

    def _in_turn(self, search: _OneStep, price: float, length: float, stop: NDArray[np.uint8]) -> float:
        """Anneal a little of every layer in turn, and take what is better; microseconds that all compute at the end."""
        layers = range(len(self.problems))
        loads = sum((search.loads(n, self.ports) for n in layers), np.zeros(self.ports)), np.zeros(self.ports)
        compute_L = np.array([total_cost(search.state(layer)) for layer in layers])
        front = self.fronts[0]
        for turn, layer in product(range(TURNS), layers):
            if stop[0]:
                break
            front.sent[0] = self.least
            left_us = self.most_us - (compute_L.sum() - compute_L[layer])
            trade = Trade(self.byte, self.fullest, price, left_us, False, left_us, self.most_us)
            compute_L[layer] = self._anneal(search, layer, trade, front, loads, length, turn, TURNS)
            if front.sent[0] < self.least:
                self._take([*search.rows()[:layer], front.rows[0].copy(), *search.rows()[layer + 1 :]])
        return float(compute_L.sum())

    def _anneal(
        self, search: _OneStep, layer: int, trade: Trade, front: Front, loads: tuple[FloatArray, FloatArray],
        length: float, turn: int, turns: int,
    ) -> float:  # fmt: skip
        """One of several turns of a layer; microseconds that it computes afterwards."""
        streams, scratches, _, room = search.around(layer, 1.0)
        parts = (search.costs[layer], search.state(layer), search.item_LP[layer], search.rank_LQ[layer])
        slots, compute_us = len(search.begun[layer]), 0.0
        unit = -2.0 / (len(self.problems) * self.problems[layer].num_experts)
        left = size = max(1, int(length * slots * slots / turns))
        while left > 0 and not search.stop[0]:
            drawn = min(left, BLOCK)
            part_N = (turn + 1 - (left - np.arange(drawn)) / size) / turns
            patience_N = unit * HOT * (COLD / HOT) ** part_N * np.log(1.0 - self.draws.random(drawn))
            pairs_N2 = self.draws.integers(slots, size=(drawn, 2))
            compute_us = anneal(*parts, streams, scratches, room, trade, front, *loads, pairs_N2, patience_N)
            left -= drawn
        return float(compute_us)

    def _choose(self, stop: NDArray[np.uint8]) -> None:
        """Take a point of every layer's front: two layers at a time change theirs while all send less in their time."""
        choices = [[point, *_best(front)] for front, point in zip(self.fronts, self.points, strict=True)]
        choices.append([_Point(0.0, np.zeros(self.ports), self.start[0])])  # so that one layer is one of two
        compute = [np.array([point.compute for point in each]) for each in choices]
        loads = [np.array([point.loads for point in each]) for each in choices]
        at, least, due = [0] * len(choices), self.least - LEAST_GAIN, True
        total_us, total_R = sum(each[0] for each in compute), sum(each[0] for each in loads)
        while due:
            due = False
            for one, two in combinations(range(len(choices)), 2):
                left_us = self.most_us - total_us + compute[one][at[one]] + compute[two][at[two]]
                others_R = total_R - loads[one][at[one]] - loads[two][at[two]]
                sent = self._value(loads[one][:, None] + loads[two] + others_R)
                sent[compute[one][:, None] + compute[two] > left_us] = np.inf
                if sent.min() < least:
                    least, due = sent.min() - LEAST_GAIN, True
                    at[one], at[two] = divmod(int(sent.argmin()), sent.shape[1])
                    total_us = self.most_us - left_us + compute[one][at[one]] + compute[two][at[two]]
                    total_R = others_R + loads[one][at[one]] + loads[two][at[two]]
            due = due and not stop[0]  # one pass there is always time for
        chosen = [each[n] for each, n in zip(choices, at, strict=True)][:-1]
        if any(at) and self._take([point.row for point in chosen]):
            self.points = chosen

    def _take(self, rows: list[Row]) -> bool:
        """Take rows that send less for no more compute than allowed.

        They are counted anew: swaps move copies with their share, but which copy has an odd token goes by slots.
        """
        value = float((self._sent(rows) * [2 * self.byte, self.fullest]).sum())
        pairs = zip(self.problems, rows, strict=True)
        if value >= self.least or sum(objective(problem, row) for problem, row in pairs) > self.most_us:
            return False
        self.least, self.found.rows, self.found.total_us = value, rows, linked_total(self.problems, rows, self.links)
        self.found.history.append(incumbent(self.found.total_us))
        return True

    def _value(self, loads: FloatArray) -> FloatArray:
        """What is minimised, of bytes through every port [..., R]."""
        return np.asarray(self.byte * loads.sum(axis=-1) + self.fullest * loads.max(axis=-1))

    def _sent(self, rows: list[Row]) -> NDArray[np.float64]:
        """[2] bytes between nodes, and through the fullest port there."""
        sent = self.counted.communication(rows, self.problems[0].slots_per_rank)
        return np.array([sent.cross_node_bytes, sent.fullest_bytes["between_nodes"]])


def _best(front: Front) -> list[_Point]:
    """The points of a front than which none sends less for no more compute."""
    order = np.argsort(front.compute, kind="stable")
    sent = np.minimum.accumulate(front.sent[order])
    best = order[np.isfinite(sent) & (sent < np.append(np.inf, sent[:-1]))]
    return [_Point(float(front.compute[n]), front.loads[n].copy(), front.rows[n].copy()) for n in best.tolist()]


def _counting(links: Links) -> Links:
    """The same tokens over ports between nodes alone, whose times are bytes."""
    owner = "rank" if links.topology.between_nodes is None else links.topology.between_nodes.port_of
    level = Level(bandwidth_gbs=1.0, port_of=owner)
    others = dict.fromkeys(("within_node", "between_racks", "pair_bandwidth_gbs", "pair_latency_us"))
    topology = links.topology.model_copy(update={**others, "between_nodes": level})
    return replace(
        links, topology=topology, exchange=links.exchange.model_copy(update={"overlap": False}), even=False, _cache={}
    )
