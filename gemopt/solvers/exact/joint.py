"""All layers with their links as plain arrays: what CP-SAT and MILP state of what tokens take on their way.

Tokens with the same step, sender and experts are one with a number. A set of experts is on a destination where any of
them is; the sender is a rank, or the one that has an expert of this layer or of the one before. Copies of an expert
take turns: with r copies, the n-th of its tokens in a step goes to copy n mod r, and so all with the same n mod `turns`
do, which every r divides. What is called an expert of a token here is `expert * turns + n mod turns`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import UnsupportedError
from gemopt.latency import FloatArray, IntArray
from gemopt.links import Links
from gemopt.links.flows import Flow
from gemopt.moves import Budget
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.exact.compact import Compact

MOST_COPIES = 6
MOST_TERMS = 200_000
"""Ways of tokens that are stated at most, over all steps, layers and destinations."""
FEW_TERMS = 8_000  # up to which CP-SAT finds better placements than the search alone (tiny_links.md)


@dataclass(frozen=True, eq=False)
class Sending:
    """Dispatch or combine of one layer. N tokens, S sets of up to K experts, D destinations, R ports.

    step_N, number_N: step, and how many such tokens. sender_N: their rank, or -1 where they are with expert `follow_N`
    of layer `follow_layer`. set_N: their experts, a row of sets_SK [S, K] (-1 for none). inside_DG: [D, G] ranks of
    each destination. start, port, bytes: sparse rows [C * D], as in `Routes`. line_of: [M] port of each line of lines
    [M, 2]: it takes no less than intercept + slope * bytes, where it carries any.
    """

    layer: int
    follow_layer: int
    step_N: IntArray
    number_N: IntArray
    sender_N: IntArray
    follow_N: IntArray
    set_N: IntArray
    sets_SK: IntArray
    inside_DG: NDArray[np.bool_]
    start: IntArray
    port: IntArray
    bytes: FloatArray
    line_of: IntArray
    lines: FloatArray

    @property
    def terms(self) -> int:
        """Ways of tokens, about."""
        senders = np.where(self.sender_N < 0, self.inside_DG.shape[1], 1)
        return int(senders.sum()) * len(self.inside_DG)


def turns_of(problem: Problem) -> int:
    """What every number of copies that an expert may have divides."""
    return math.lcm(*range(1, 1 + problem.most_copies))


def sendings(links: Links, layers: int, turns: int) -> list[Sending]:
    """Dispatch and combine of every layer, whatever the placement: as if every expert had a copy for each turn."""
    rows = [np.repeat(np.arange(links.traces.num_experts), turns)] * layers
    found = []
    for layer in range(layers):
        flows = links.flows(layer, rows, np.array([len(rows[0])]))
        for number, flow in enumerate(flows):
            follow_layer = layer if number else layer - 1
            found += [_sending(flow, side, layer, follow_layer) for side in range(len(flow.routes))]
    return found


def _sending(flow: Flow, side: int, layer: int, follow_layer: int) -> Sending:
    """Slots are turns of experts here."""
    route = flow.routes[side]
    sets_SK, set_N = np.unique(np.sort(flow.slot_NK, axis=1)[:, ::-1], axis=0, return_inverse=True)
    follow_N = np.full(len(flow.slot_NK), -1) if flow.follow_N is None else flow.follow_N
    sender_N = flow.sender_N if flow.follow_N is None else np.full(len(flow.slot_NK), -1)
    keys = np.stack([flow.step_N, sender_N, follow_N, set_N.ravel()], axis=1).astype(np.int64)
    keys, token_N = np.unique(keys, axis=0, return_inverse=True)
    number_N = np.bincount(token_N.ravel(), weights=flow.weight_N, minlength=len(keys)).astype(np.int64)
    node_G = route.node_of_rank
    inside_DG = np.eye(len(node_G), dtype=bool)
    if route.destinations > len(node_G):
        inside_DG = np.concatenate([inside_DG, node_G[None] == np.arange(node_G.max() + 1)[:, None]])
    table = route.matrix[:, : route.num_ports].tocsr()
    pieces = [(port, piece) for port, kind in enumerate(route.curve_of) for piece in route.curves[kind].hull.pieces()]
    return Sending(
        layer, follow_layer, keys[:, 0], number_N, keys[:, 1], keys[:, 2], keys[:, 3], sets_SK.astype(np.int64),
        inside_DG, table.indptr.astype(np.int64), table.indices.astype(np.int64), table.data.astype(np.float64),
        np.array([port for port, _ in pieces], np.int64),
        np.array([piece for _, piece in pieces], np.float64).reshape(-1, 2),
    )  # fmt: skip


def check_stated(name: str, problems: Sequence[Problem], links: Links) -> None:
    """`UnsupportedError` where an exact solver does not state the links."""
    instead = "use local-search, or leave the topology out"
    if problems[0].most_copies > MOST_COPIES:
        slots = "/".join(map(str, problems[0].slots_per_rank.tolist()))
        limit = f"{name} states links with up to {MOST_COPIES} copies of an expert"
        raise UnsupportedError("slots_per_rank", slots, limit, instead)
    if any((problem.weights_T != 1).any() for problem in problems):
        raise UnsupportedError("topology", "weighted steps", f"{name} states links of plain steps only", instead)
    tokens = _tokens(problems, links)
    if problems[0].spare_slots and tokens > MOST_TERMS:  # before they are told apart by their turns, which takes long
        limit = f"{name} states up to {MOST_TERMS} with copies (fewer steps or layers)"
        raise UnsupportedError("topology", f"{tokens} tokens in all layers", limit, instead)
    terms = num_terms(problems, links)
    if terms > MOST_TERMS:
        limit = f"{name} states up to {MOST_TERMS} (fewer steps or layers)"
        raise UnsupportedError("topology", f"{terms} ways of tokens", limit, instead)


def stated_soon(problems: Sequence[Problem], links: Links) -> bool:
    """Whether all layers with their links are few enough for CP-SAT to find and prove what a search does not."""
    first = problems[0]
    if first.most_copies > MOST_COPIES or (first.spare_slots and first.full) or _tokens(problems, links) > FEW_TERMS:
        return False
    return all((each.weights_T == 1).all() for each in problems) and num_terms(problems, links) <= FEW_TERMS


def num_terms(problems: Sequence[Problem], links: Links) -> int:
    """Ways of tokens, over all steps, layers and destinations."""
    return sum(each.terms for each in sendings(links, len(problems), turns_of(problems[0])))


def _tokens(problems: Sequence[Problem], links: Links) -> int:
    """Tokens in all layers; none where only counts are known."""
    return 0 if links.traces.tokens is None else len(links.traces.tokens.step_of_token) * len(problems)


@dataclass(frozen=True, eq=False)
class JointCompact:
    """All layers, one after the other in `held` [L * Q, G] and rows [L * P]; `overlap` as in `Exchange`.

    most, most_into_G: moves of all layers together, in all and into each rank [G].
    """

    layers: list[Compact]
    sendings: list[Sending]
    turns: int
    overlap: bool
    most: IntArray
    most_into_G: IntArray

    @classmethod
    def of(
        cls, layers: list[Compact], sendings: list[Sending], turns: int, overlap: bool, budget: Budget | None
    ) -> JointCompact:
        """With the budget that layers share; more moves than slots are no limit."""
        most_into_G = len(layers) * layers[0].slots_G
        most, budget = np.array(most_into_G.sum()), budget or Budget()
        most = most if budget.most is None else np.minimum(most, budget.most)
        into_G = most_into_G if budget.most_into_G is None else np.minimum(most_into_G, budget.most_into_G)
        return cls(layers, sendings, turns, overlap, most, into_G)

    def save(self, path: Path) -> None:
        """Write all arrays to one npz file."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("overlap", "turns", "most", "most_into_G")}
        for n, compact in enumerate(self.layers):
            arrays |= {f"layer {n} {name}": value for name, value in compact.arrays().items()}
        for n, sending in enumerate(self.sendings):
            arrays |= {f"sending {n} {field.name}": getattr(sending, field.name) for field in fields(Sending)}
        np.savez(path, **arrays)

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> JointCompact:
        """From what `save` wrote."""
        groups: dict[str, dict[int, dict[str, Any]]] = {"layer": {}, "sending": {}}
        overlap, turns = bool(arrays.pop("overlap")), int(arrays.pop("turns"))
        most, most_into_G = arrays.pop("most"), arrays.pop("most_into_G")
        for key, value in arrays.items():
            kind, n, name = key.split(" ")
            groups[kind].setdefault(int(n), {})[name] = value
        layers, sent = ([group[n] for n in sorted(group)] for group in groups.values())
        for each in sent:
            each.update(layer=int(each["layer"]), follow_layer=int(each["follow_layer"]))
        compacts = [Compact.of_arrays(each) for each in layers]
        return cls(compacts, [Sending(**each) for each in sent], turns, overlap, most, most_into_G)

    @property
    def open_us(self) -> float:
        """As in `Compact`: each layer may exceed its floors by as much as all together."""
        return max(compact.open_us for compact in self.layers)

    @property
    def base_us(self) -> float:
        """Microseconds of all floors."""
        return sum(compact.base_us for compact in self.layers)

    @property
    def num_steps(self) -> int:
        """Steps, each with all layers."""
        return self.layers[0].num_steps

    @property
    def roundings(self) -> int:
        """As in `Compact`, and each way of tokens."""
        return sum(compact.roundings for compact in self.layers) + sum(each.terms for each in self.sendings)

    @property
    def most_load(self) -> int:
        """As in `Compact`."""
        return max(compact.most_load for compact in self.layers)

    def each(self, held_QG: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """What is held of each layer."""
        return np.split(held_QG, len(self.layers))

    def fits(self, held_QG: NDArray[np.bool_]) -> bool:
        """As in `Compact`."""
        return all(compact.fits(held) for compact, held in zip(self.layers, self.each(held_QG), strict=True))

    def held(self, row_P: Row) -> NDArray[np.bool_]:
        """As in `Compact`."""
        rows = np.split(row_P, len(self.layers))
        return np.concatenate([compact.held(row) for compact, row in zip(self.layers, rows, strict=True)])

    def row(self, held_QG: NDArray[np.bool_]) -> Row:
        """As in `Compact`."""
        return np.concatenate([c.row(held) for c, held in zip(self.layers, self.each(held_QG), strict=True)])

    def canonical(self, held_QG: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """As it is: links tell all ranks apart."""
        return held_QG


def load_compact(path: Path) -> Compact | JointCompact:
    """What was saved."""
    with np.load(path) as arrays:
        known = dict(arrays)
    return JointCompact.of_arrays(known) if "overlap" in known else Compact.of_arrays(known)
