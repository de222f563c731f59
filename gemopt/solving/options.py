"""What is refused of a call's options before any of its files is read: numbers, names, what cannot work together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gemopt import cores
from gemopt.costs import known
from gemopt.documents import check_writable
from gemopt.exceptions import ABOVE_0, BELOW_1, InputError, UnsupportedError, check_flags, check_number
from gemopt.placement import Split
from gemopt.rules import Rules
from gemopt.solvers import get, names, that_can
from gemopt.solvers.base import Solver
from gemopt.solving.coupled import refuse_with_links
from gemopt.solving.moving import Asked
from gemopt.splits.senders import Senders


def check_options(given: Mapping[str, Any]) -> Solver:
    """The solver of a call, which these keywords of `gemopt.solve` are asked of.

    Raises
    ------
    InputError
        What makes no sense whatever profile and traces are, or that the solver cannot heed.
    MissingPackageError
        What the solver needs is not installed.
    """
    asked: dict[str, Any] = dict.fromkeys(
        ("memory_budget", "current", "topology", "certificate", "warm_start", "rules")
    ) | dict(given)
    _check_numbers(asked)
    solver, moving = get(asked.get("solver", "auto")), Asked(**{f.name: asked.get(f.name) for f in fields(Asked)})
    if isinstance(cost := asked.get("cost", "auto"), str):
        known(cost)
    split, senders = split_of(asked.get("split")), asked.get("senders")
    if senders is not None and (split is not None or asked["current"] is None):  # else that of the one in force
        Senders.asked_by(senders, split or Split.EVEN)
    budget, current = asked["memory_budget"], asked["current"]
    if budget is not None and (current is not None or asked.get("full_slots")):
        limit = f"not together with {'full_slots' if current is None else 'current'}"
        raise UnsupportedError("memory_budget", budget, limit, "leave one out")
    if asked["certificate"] is not None:
        _check_certificate(asked["certificate"], "current" if current is not None else budget and "memory_budget")
    (moving if budget is None else Asked(**{**vars(moving), "expert_bytes": None})).check()
    refuse_with_links(asked["topology"], memory_budget=budget, certificate=asked["certificate"])
    _refuse_other_ranks(asked["topology"], moving)
    _check_slack(asked.get("compute_slack"), asked["topology"], solver, moving)
    if asked["warm_start"] is not None and not solver.supports.improves:
        can = [name for name in names() if get(name).supports.improves]
        raise InputError("warm_start", solver.name, "a solver that starts from a placement", f"use {' or '.join(can)}")
    if asked["rules"] is not None and not solver.supports.rules and (named := Rules.of(asked["rules"]).named()):
        can = that_can("rules")
        limit = f"{solver.name} cannot keep rules"
        raise UnsupportedError("rules", ", ".join(name for name, _ in named), limit, f"use {', '.join(can)}")
    return solver


def split_of(name: Split | str | None) -> Split | None:
    """The split of this name; None where none is asked for."""
    try:
        return None if name is None else Split(name)
    except ValueError:
        raise InputError("split", name, "one of " + ", ".join(Split)) from None


def _check_numbers(asked: Mapping[str, Any]) -> None:
    check_flags(**{name: asked[name] for name in ("full_slots", "allow_one_rank") if name in asked})
    if (time_limit := asked.get("time_limit")) is not None:
        check_number("time_limit", time_limit, "seconds above 0, at most 1e7", least=ABOVE_0, most=1e7)
    check_number("gap", asked.get("gap", 0.0), "a fraction from 0 to below 1", "0.01 is one per cent", most=BELOW_1)
    if (threads := asked.get("threads")) is not None:
        cores.check(threads)
    for name in ("patience", "seed"):
        if name == "seed" or asked.get(name) is not None:
            check_number(name, asked.get(name, 0), "a whole number of at least 0", whole=True)


def _check_certificate(path: str | os.PathLike[str], other: object) -> None:
    """Refuse what cannot be certified, or written, before it is solved."""
    check_writable(path)
    if other:
        raise UnsupportedError("certificate", other, "it says nothing of moves or memory", "solve without it")


def _refuse_other_ranks(topology: object, moving: Asked) -> None:
    """With a topology the ranks are those in force: what they took over the links of others is not known."""
    for name in ("exclude_ranks", "add_ranks"):
        if topology is not None and moving.given(name):
            way_out = f"solve with {name} first, then from that placement with the topology"
            raise UnsupportedError(
                "topology", f"with {name}", "links join the ranks of the placement in force", way_out
            )


def _check_slack(compute_slack: float | None, topology: object, solver: Solver, moving: Asked) -> None:
    """Refuse a slack of compute without links to spare, or where the solver cannot spare them."""
    if compute_slack is None:
        return
    limit = "a fraction from 0 to below 1"
    check_number("compute_slack", compute_slack, limit, "0.005 is half a per cent", most=BELOW_1)
    if topology is None:
        raise InputError("compute_slack", compute_slack, "is given up for fewer bytes between nodes", "give a topology")
    for name in ("move_price", "bandwidth", "max_moves", "max_moves_per_layer", "max_bytes_per_rank"):
        if (value := getattr(moving, name)) is not None:
            limit = "is found without a price or limits of moves"
            raise UnsupportedError("compute_slack", f"{compute_slack} with {name} {value}", limit, "leave one out")
    if not solver.supports.fewest_bytes:
        limit = f"{solver.name} cannot search for fewest bytes between nodes"
        raise UnsupportedError("compute_slack", compute_slack, limit, f"use {' or '.join(that_can('fewest_bytes'))}")
