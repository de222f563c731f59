"""The solvers and their registry. Modules are imported on first use: ortools and pulp are heavy."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

from gemopt.exceptions import InputError, MissingPackageError, missing
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
    "branch": "gemopt.solvers.exact.branch:Branch",
    "columns": "gemopt.solvers.exact.columns:Columns",
    "milp": "gemopt.solvers.exact.milp:Milp",
    "auto": "gemopt.solvers.auto:Auto",
}
CHILD_NEEDS = {"milp": ("pulp",)}  # imported by a child process only


def names() -> list[str]:
    """Names of all solvers, baselines first."""
    return list(REGISTRY)


def get(name: str) -> Solver:
    """The solver of that name; `InputError` naming the known ones, or the extra of gemopt that brings what it needs."""
    if not isinstance(name, str) or name not in REGISTRY:
        raise InputError("solver", name, f"known solvers: {', '.join(REGISTRY)}")
    module, attribute = REGISTRY[name].split(":")
    try:
        for package in CHILD_NEEDS.get(name, ()):
            if find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
        solver: Solver = getattr(import_module(module), attribute)()
    except ModuleNotFoundError as error:
        raise missing(error, f"solver {name}") from None
    return solver


def that_can(need: str) -> list[str]:
    """Solvers whose `Supports` has `need`."""
    found = []
    for name in REGISTRY:
        with suppress(MissingPackageError):
            if getattr(get(name).supports, need):
                found.append(name)
    return found


__all__ = ["REGISTRY", "Options", "Outcome", "Solver", "Supports", "get", "names", "that_can"]
