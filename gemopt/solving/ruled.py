"""A call with rules: what they ask of every layer, whether that can be kept, and starts that keep it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.layer_rules import LayerRules, layer_rules
from gemopt.links import Links
from gemopt.placement import GivenPlacement, Placement
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import Result, StoppedBy
from gemopt.rules import Rules
from gemopt.solvers import hurried
from gemopt.solvers.base import Row
from gemopt.solvers.hurried import OutOfTimeError
from gemopt.solvers.nearest import nearest_row
from gemopt.solvers.placing import conflict, example
from gemopt.solving.moving import Moving
from gemopt.traces import Traces

IntArray = NDArray[np.int64]
MORE_MOVES = "more moves than ranks and rules ask for, perhaps: the time ended before the fewest were proven"


@dataclass(frozen=True, eq=False)
class Ruled:
    """The rules of a call, by the ranks that serve.

    Attributes
    ----------
    rules, nodes_G
        What every placement must keep (None: nothing), and the [G] node of each rank.
    note
        Whose they are, where the call did not give them.
    impossible
        Why no placement keeps them, where ranks that left show that at once.
    """

    rules: Rules | None
    nodes_G: IntArray
    note: str = ""
    impossible: str = ""

    @classmethod
    def of(
        cls,
        given: Rules | str | os.PathLike[str] | None,
        moving: Moving | None,
        warm_start: GivenPlacement | None,
        profile: Profile,
        links: Links | None,
    ) -> Ruled:
        """The rules given, else those of the placement in force, else of the warm start.

        They name ranks as the placement in force does, new ranks after them. Nodes are those of the topology, else of
        the placement that the rules come from, else of the profile.

        Raises
        ------
        InputError
            Rules on ranks that there are not, or on nodes of which the profile knows others than the placement that the
            rules come from.
        """
        nodes_G = np.asarray(profile.node_of_rank if links is None else links.topology.node_of_rank, np.int64)
        source = None
        if given is None and (moving is not None or warm_start is not None):
            name = "warm_start" if moving is None else "current"
            source = Placement.of(warm_start if moving is None else moving.current, name)
        rules = Rules.of(given) if given is not None else None if source is None else source.rules
        if rules is None or not rules.named():
            return cls(None, nodes_G)
        own = links is None and (source is None or source.node_of_rank is None)
        if own and rules.about_nodes:
            _check_named(profile)
        note = "" if source is None else f"keeps the rules of {name}: {rules.brief()}"
        if source is not None and source.node_of_rank is not None and links is None:
            nodes_G = _nodes(source.node_of_rank, nodes_G, moving)
        if moving is None or not moving.resized.changed:
            return cls(rules, nodes_G, note)
        numbers = moving.resized.numbers
        known = max(moving.resized.ranks_before, 1 + max(numbers))
        for name, rule in rules.named():
            ranks = getattr(rule, "ranks", [0])
            if max(ranks) >= known:
                raise InputError(f"rules.{name}.ranks", ranks, f"ranks 0 to {known - 1}, as current and new ones")
        if found := rules.homeless(numbers):
            return cls(rules, nodes_G, note, f"infeasible: {found} asks for ranks none of which is left")
        return cls(rules.renumbered(numbers), nodes_G, note)

    def load(self) -> float:
        """Load what finds rows that keep the rules, if any; the seconds that took, see `hurried.load`."""
        return 0.0 if self.rules is None else hurried.load()

    def apply(self, layers: list[Problem], traces: Traces) -> list[Problem]:
        """The layers with their rules.

        Raises
        ------
        InputError
            See `gemopt.layer_rules.layer_rules`.
        """
        if self.rules is None:
            return layers
        found = layer_rules(self.rules, traces.layer_ids, traces.num_experts, len(self.nodes_G), self.nodes_G)
        return [replace(problem, rules=each) for problem, each in zip(layers, found, strict=True)]

    def stamped(self, result: Result, *more: str) -> Result:
        """The result whose placement says which rules it keeps, with more notes."""
        notes, placement = [*result.notes, *filter(None, (self.note, *more))], result.placement
        if self.rules is not None and placement is not None:
            placement = placement.under(self.rules, self.nodes_G)
        return result.model_copy(update={"placement": placement, "notes": notes})


def _check_named(profile: Profile) -> None:
    """Raise where some devices have a node and others none: all the latter would be on one node."""
    nameless = [device.rank for device in profile.devices if device.node is None]
    if 0 < len(nameless) < profile.num_ranks:
        limit, hint = "the node of every rank, for rules on nodes", "name them in the profile, or give a topology"
        raise InputError("Profile.devices.node", f"nothing for ranks {nameless}", limit, hint)


def _nodes(before_G: IntArray, known_G: IntArray, moving: Moving | None) -> IntArray:
    """[G] nodes of the ranks that serve, from those of a placement; with new ranks from what the profile knows."""
    if moving is None or not moving.resized.changed:
        return before_G
    old_G = moving.resized.old_rank
    stays = old_G >= 0
    if stays.all():
        return before_G[old_G]
    pairs = np.unique(np.stack([before_G[old_G[stays]], known_G[stays]]), axis=1).shape[1]
    alike = pairs == len(np.unique(before_G[old_G[stays]])) == len(np.unique(known_G[stays]))
    if not alike:
        limit = "the profile knows others, and where new ranks are is known from it alone"
        raise InputError("current.node_of_rank", before_G.tolist(), limit, "name the devices' nodes in the profile")
    return known_G


def exemplified(layers: Sequence[Problem], layer_ids: Sequence[int], deadline: float) -> tuple[list[Problem], str]:
    """The layers, whose rules know a placement that keeps them, where one was found; or rules of a layer that no
    placement keeps together, in words."""
    known: dict[int, LayerRules] = {}
    for problem, layer_id in zip(layers, layer_ids, strict=True):
        rules = problem.rules
        if rules is None or id(rules) in known:
            continue
        alike = sum(each.rules is rules for each in layers)  # that can all begin with it
        seconds = max(hurried.seconds_left(), hurried.LEAST_S * alike)
        example_GE, impossible = example(rules, problem.slots_per_rank, seconds, full=problem.full)
        if impossible:
            return list(layers), _contradiction(problem, rules, layer_id, deadline)
        known[id(rules)] = replace(rules, example_GE=example_GE)
    return [p if p.rules is None else replace(p, rules=known[id(p.rules)]) for p in layers], ""


def _contradiction(problem: Problem, rules: LayerRules, layer_id: int, deadline: float) -> str:
    names = conflict(rules, problem.slots_per_rank, full=problem.full, deadline=deadline) or rules.names
    slots = ", ".join(map(str, sorted(set(problem.slots_per_rank.tolist()))))
    told = "; ".join(f"{name}: {_says(rules, name)}" for name in names)
    full = ", all full" if problem.full else ""
    return f"infeasible: no placement of layer {layer_id} in {slots} slots per rank{full} keeps {told}"


def _says(rules: LayerRules, name: str) -> str:
    return next(demand.says for demand in rules.demands if demand.name == name)


def eased(
    layers: list[Problem], moving: Moving | None, layer_ids: Sequence[int], deadline: float
) -> tuple[list[Problem], str, StoppedBy | None]:
    """The layers with the moves that lost and new ranks ask for, what is to be said of them, and None; or why there is
    no answer, and if that is proven."""
    layers, note = exemplified(layers, layer_ids, deadline)
    if note or moving is None:
        return layers, note, StoppedBy.PROOF if note else None
    try:
        layers, proven = moving.eased(layers, deadline)
        return layers, "" if proven else MORE_MOVES, None
    except OutOfTimeError as late:
        return layers, str(late), late.stopped_by


def keeping(problem: Problem, row: Row | None) -> Row | None:
    """A warm start with as few changes as make it keep the rules.

    Raises
    ------
    InputError
        No such row was found in time.
    """
    if row is None or problem.rules is None or not problem.rules.broken(row, problem.slots_per_rank):
        return row
    found = nearest_row(problem, row)
    if found is None:
        raise InputError("warm_start", "rules are broken", "one near it that keeps them was not found", "leave it out")
    return found
