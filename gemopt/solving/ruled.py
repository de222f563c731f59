"""A call with rules: what they ask of every layer, whether that can be kept, and starts that keep it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.layer_rules import LayerRules, layer_rules
from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.rules import Rules
from gemopt.solvers.base import Row
from gemopt.solvers.placing import conflict, nearest_row
from gemopt.traces import Traces


def refuse_with_rules(rules: object, **asked: Any) -> None:
    """Refuse what cannot keep rules, by its name."""
    for name, value in asked.items():
        if rules is not None and value not in (None, ()):
            raise UnsupportedError("rules", f"with {name}", "the two do not go together", "leave one out")


def ruled(
    layers: list[Problem],
    rules: Rules | str | os.PathLike[str] | None,
    traces: Traces,
    profile: Profile,
    links: Links | None,
) -> list[Problem]:
    """The layers with their rules; nodes are those of the topology, without one those of the profile.

    Raises
    ------
    InputError
        See `gemopt.layer_rules.layer_rules`.
    """
    if rules is None:
        return layers
    nodes = profile.node_of_rank if links is None else links.topology.node_of_rank
    found = layer_rules(Rules.of(rules), traces.layer_ids, traces.num_experts, profile.num_ranks, nodes)
    return [replace(problem, rules=each) for problem, each in zip(layers, found, strict=True)]


def contradiction(layers: Sequence[Problem], layer_ids: Sequence[int], deadline: float) -> str:
    """Rules of a layer that no placement keeps together, in words; empty when all can be kept."""
    known: set[int] = set()
    for problem, layer_id in zip(layers, layer_ids, strict=True):
        rules = problem.rules
        if rules is None or id(rules) in known:
            continue
        known.add(id(rules))
        if names := conflict(rules, problem.slots_per_rank, full=problem.full, deadline=deadline):
            slots = ", ".join(map(str, sorted(set(problem.slots_per_rank.tolist()))))
            told = "; ".join(f"{name}: {_says(rules, name)}" for name in names)
            full = ", all full" if problem.full else ""
            return f"infeasible: no placement of layer {layer_id} in {slots} slots per rank{full} keeps {told}"
    return ""


def _says(rules: LayerRules, name: str) -> str:
    return next(demand.says for demand in rules.demands if demand.name == name)


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
