"""The solvers and their registry. Modules are imported on first use: ortools and pulp are heavy."""

from __future__ import annotations

from importlib import import_module

from gemopt.exceptions import InputError
from gemopt.solvers.base import Options, Outcome, Solver, Supports

REGISTRY = {
    "linear": "gemopt.solvers.baselines.fixed:Linear",
    "round-robin": "gemopt.solvers.baselines.fixed:RoundRobin",
    "eplb": "gemopt.solvers.baselines.eplb:Eplb",
    "eplb-hierarchical": "gemopt.solvers.baselines.eplb:EplbHierarchical",
    "lpt": "gemopt.solvers.baselines.lpt:Lpt",
    "gem": "gemopt.solvers.baselines.gem:Gem",
    "moetuner": "gemopt.solvers.baselines.moetuner:MoeTuner",
    "conflict": "gemopt.solvers.baselines.conflict:Conflict",
    "local-search": "gemopt.solvers.search.local_search:LocalSearch",
    "cpsat": "gemopt.solvers.exact.cpsat:CpSat",
    "milp": "gemopt.solvers.exact.milp:Milp",
    "auto": "gemopt.solvers.auto:Auto",
}


def names() -> list[str]:
    """Names of all solvers, baselines first."""
    return list(REGISTRY)


def get(name: str) -> Solver:
    """The solver of that name; `InputError` naming the known ones otherwise."""
    if name not in REGISTRY:
        raise InputError("solver", name, f"known solvers: {', '.join(REGISTRY)}")
    module, attribute = REGISTRY[name].split(":")
    solver: Solver = getattr(import_module(module), attribute)()
    return solver


def that_can(need: str) -> list[str]:
    """Solvers whose `Supports` has `need`."""
    return [name for name in REGISTRY if getattr(get(name).supports, need)]


__all__ = ["REGISTRY", "Options", "Outcome", "Solver", "Supports", "get", "names", "that_can"]
