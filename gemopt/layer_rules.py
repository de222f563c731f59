"""The rules of one layer as arrays: what its problem asks of every placement, and what in a placement breaks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.migration import held
from gemopt.placement import Placement
from gemopt.rules import Apart, Groups, KeptOff, Pinned, Reserved, Rule, Rules, Together

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Demand:
    """What one rule asks of one layer: one of three things, in arrays over E experts and G ranks.

    name, says: of the rule, for messages. closed_GE: [G, E] which rank may not hold which expert. apart_E: [E] experts
    of which no rank holds two. bloc_E, unit_G: [E] experts that are all on the ranks of one unit; [G] unit of each
    rank, 0, 1, ...
    """

    name: str
    says: str
    closed_GE: BoolArray | None = None
    apart_E: BoolArray | None = None
    bloc_E: BoolArray | None = None
    unit_G: IntArray | None = None

    def broken(self, held_GE: BoolArray) -> str:
        """What breaks it where `held_GE` says which rank holds which expert; empty when nothing does."""
        if self.closed_GE is not None:
            ranks, experts = np.nonzero(held_GE & self.closed_GE)
            return f"expert {experts[0]} on rank {ranks[0]}" if len(ranks) else ""
        if self.apart_E is not None:
            for rank, held_E in enumerate(held_GE & self.apart_E):
                if held_E.sum() > 1:
                    first, second = np.flatnonzero(held_E)[:2]
                    return f"experts {first} and {second} on rank {rank}"
            return ""
        assert self.bloc_E is not None and self.unit_G is not None
        ranks, experts = np.nonzero(held_GE & self.bloc_E)
        elsewhere = np.flatnonzero(self.unit_G[ranks] != self.unit_G[ranks[0]]) if len(ranks) else ranks
        if not len(elsewhere):
            return ""
        return f"expert {experts[0]} on rank {ranks[0]}, expert {experts[elsewhere[0]]} on rank {ranks[elsewhere[0]]}"

    def bound(self, unit: int | None) -> Demand:
        """A bloc that is bound to a unit (None: as it is), which leaves ranks that are closed to its experts."""
        if unit is None or self.unit_G is None or self.bloc_E is None:
            return self
        closed_GE = (self.unit_G != unit)[:, None] & self.bloc_E
        return replace(self, closed_GE=closed_GE, bloc_E=None, unit_G=None)


@dataclass(frozen=True, eq=False)
class LayerRules:
    """What the rules ask of one layer. G ranks, E experts.

    example_GE: [G, E] who holds the experts that rules are about in some placement that keeps them, where one is known.
    """

    demands: tuple[Demand, ...]
    num_ranks: int
    num_experts: int
    example_GE: BoolArray | None = None

    @property
    def names(self) -> list[str]:
        """Names of the rules, in order, each once."""
        return list(dict.fromkeys(demand.name for demand in self.demands))

    def only(self, names: Sequence[str]) -> LayerRules:
        """The same without rules of other names."""
        return replace(self, demands=tuple(demand for demand in self.demands if demand.name in names))

    def broken(self, row_P: IntArray, slots_per_rank: IntArray) -> tuple[str, str] | None:
        """What in a row breaks a rule, and which rule, in words; None when the row keeps them all."""
        held_GE = held(row_P, slots_per_rank, self.num_experts)
        for demand in self.demands:
            if found := demand.broken(held_GE):
                return found, f"{demand.name}: {demand.says}"
        return None

    @cached_property
    def closed_GE(self) -> BoolArray:
        """[G, E] which rank may not hold which expert."""
        closed_GE = np.zeros((self.num_ranks, self.num_experts), dtype=bool)
        for demand in self.demands:
            if demand.closed_GE is not None:
                closed_GE |= demand.closed_GE
        return closed_GE

    @cached_property
    def apart_AE(self) -> BoolArray:
        """[A, E] sets of experts of which no rank holds two."""
        found = [demand.apart_E for demand in self.demands if demand.apart_E is not None]
        return np.array(found, dtype=bool).reshape(len(found), self.num_experts)

    @cached_property
    def clash_EE(self) -> BoolArray:
        """[E, E] pairs of experts that are kept apart."""
        apart = self.apart_AE.astype(np.int64)
        return np.asarray((apart.T @ apart > 0) & ~np.eye(self.num_experts, dtype=bool))

    @cached_property
    def blocs(self) -> list[tuple[BoolArray, IntArray]]:
        """([E] members, [G] unit of each rank) of every set of experts that one unit of ranks holds."""
        return [
            (demand.bloc_E, demand.unit_G)
            for demand in self.demands
            if demand.bloc_E is not None and demand.unit_G is not None
        ]

    @cached_property
    def ruled_E(self) -> BoolArray:
        """[E] experts that any rule is about."""
        return np.asarray(
            np.vstack([self.closed_GE, self.apart_AE, *(members for members, _ in self.blocs)]).any(axis=0)
        )

    @cached_property
    def role_G(self) -> IntArray:
        """[G] equal numbers for ranks that may change places in every placement that keeps the rules."""
        nodes = [unit_G for _, unit_G in self.blocs if len(np.unique(unit_G)) < self.num_ranks]
        columns_GN = np.column_stack([self.closed_GE, *nodes])
        return np.unique(columns_GN, axis=0, return_inverse=True)[1].ravel()

    def barred_EG(self, row_P: IntArray, slots_per_rank: IntArray) -> BoolArray:
        """[E, G] which expert a rank may not get on top of what it holds: one that it has, or that a rule forbids."""
        held_GE = held(row_P, slots_per_rank, self.num_experts)
        return np.asarray(held_GE | self.closed_GE | (held_GE.astype(np.int64) @ self.clash_EE > 0)).T

    def units(self, row_P: IntArray, slots_per_rank: IntArray) -> list[int]:
        """Unit of every bloc in a row that keeps the rules."""
        held_GE = held(row_P, slots_per_rank, self.num_experts)
        return [int(unit_G[(held_GE & members).any(axis=1)][0]) for members, unit_G in self.blocs]

    def settled(self, units: Sequence[int | None] | Sequence[int]) -> LayerRules:
        """The same with blocs bound to these units (None: to any), which leaves ranks that are closed to them."""
        left = iter(units)
        return replace(
            self, demands=tuple(each if each.bloc_E is None else each.bound(next(left)) for each in self.demands)
        )


def layer_rules(
    rules: Rules, layer_ids: Sequence[int], num_experts: int, num_ranks: int, node_of_rank: object
) -> list[LayerRules | None]:
    """What the rules ask of every layer; None where that is nothing. Layers with the same rules share them.

    Raises
    ------
    InputError
        A rule names an expert, a rank or a layer that there is not, groups do not divide the experts, or nodes are
        asked for where all ranks are on one.
    """
    node_G = np.unique(np.asarray(node_of_rank), return_inverse=True)[1].ravel()
    demands = [(rule, _demands(name, rule, num_experts, num_ranks, node_G)) for name, rule in rules.named()]
    for name, rule in rules.named():
        _check_numbers(f"{name}.layers", rule.layers or [], layer_ids, f"layers {list(layer_ids)}")
    shared: dict[tuple[bool, ...], LayerRules] = {}
    found: list[LayerRules | None] = []
    for layer_id in layer_ids:
        held_by = tuple(rule.layers is None or layer_id in rule.layers for rule, _ in demands)
        if held_by not in shared:
            chosen = tuple(each for (_, made), holds in zip(demands, held_by, strict=True) if holds for each in made)
            shared[held_by] = LayerRules(chosen, num_ranks, num_experts)
        found.append(shared[held_by] if shared[held_by].demands else None)
    return found


def rules_of(placement: Placement) -> list[LayerRules | None]:
    """What the rules of a placement ask of every layer; None where that is nothing. Errors as of `layer_rules`."""
    ranks, nodes = placement.num_ranks, placement.node_of_rank
    nodes = np.zeros(ranks) if nodes is None else nodes
    return layer_rules(placement.rules or Rules(), placement.layer_ids, placement.num_experts, ranks, nodes)


def check_kept(placement: Placement, each: Sequence[LayerRules | None] | None = None) -> None:
    """Raise `InputError` unless a placement keeps the rules of each layer (None: its own)."""
    each = rules_of(placement) if each is None else each
    for asked, layer_id, row in zip(each, placement.layer_ids, placement.physical_to_logical, strict=True):
        broken = None if asked is None else asked.broken(row, placement.slots_per_rank)
        if broken is not None:
            raise InputError(f"physical_to_logical[layer {layer_id}]", *broken)


def _check_numbers(field: str, numbers: Sequence[int], known: Sequence[int], limit: str) -> None:
    unknown = [number for number in numbers if number not in known]
    if unknown:
        raise InputError(f"rules.{field}", unknown[0], limit)


def _demands(name: str, rule: Rule, num_experts: int, num_ranks: int, node_G: IntArray) -> list[Demand]:
    """What a rule asks of a layer."""
    experts, ranks = getattr(rule, "experts", []), getattr(rule, "ranks", [])
    _check_numbers(f"{name}.experts", experts, range(num_experts), f"experts 0 to {num_experts - 1}")
    _check_numbers(f"{name}.ranks", ranks, range(num_ranks), f"ranks 0 to {num_ranks - 1}")
    named_E, named_G = np.isin(np.arange(num_experts), experts), np.isin(np.arange(num_ranks), ranks)
    who, where = _listed("expert", experts), _listed("rank", ranks)
    match rule:
        case Pinned():
            return [Demand(name, f"{who} only on {where}", closed_GE=~named_G[:, None] & named_E)]
        case KeptOff():
            return [Demand(name, f"{who} not on {where}", closed_GE=named_G[:, None] & named_E)]
        case Reserved():
            return [Demand(name, f"{where} only for {who}", closed_GE=named_G[:, None] & ~named_E)]
        case Apart():
            return [Demand(name, f"{who} on different ranks", apart_E=named_E)]
        case Together(on="rank"):
            return [Demand(name, f"{who} all on one rank", bloc_E=named_E, unit_G=np.arange(num_ranks))]
        case Together():
            _check_nodes(name, node_G)
            return [Demand(name, f"{who} all on one node", bloc_E=named_E, unit_G=node_G)]
        case Groups():
            _check_nodes(name, node_G)
            return _groups(name, rule.num_groups, num_experts, node_G)
    raise AssertionError(f"{name} is a rule of no known kind")


def _groups(name: str, num_groups: int, num_experts: int, node_G: IntArray) -> list[Demand]:
    if num_experts % num_groups:
        raise InputError(f"rules.{name}.num_groups", num_groups, f"a divisor of {num_experts} experts")
    size = num_experts // num_groups
    says = f"each of {num_groups} groups of {size} experts on one node"
    groups_E = np.arange(num_experts) // size
    return [Demand(name, says, bloc_E=groups_E == group, unit_G=node_G) for group in range(num_groups)]


def _check_nodes(name: str, node_G: IntArray) -> None:
    if not node_G.any():
        limit, hint = "ranks on several nodes", "name the devices' nodes in the profile, or give a topology"
        raise InputError(f"rules.{name}", "one node", limit, hint)


def _listed(word: str, numbers: Sequence[int]) -> str:
    """`experts 1, 2`; of many, some."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{word}{'s' * (len(numbers) > 1)} {shown}"
