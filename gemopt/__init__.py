"""Decide which expert of a mixture-of-experts model runs on which GPU, and prove how good the answer is.

Public names are imported on first use, so that `import gemopt` stays cheap.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "GemoptError": "exceptions",
    "InfeasibleError": "exceptions",
    "InputError": "exceptions",
    "SolverError": "exceptions",
    "UnsupportedError": "exceptions",
    "Evaluation": "evaluate",
    "Placement": "placement",
    "Profile": "profile",
    "Result": "result",
    "Rules": "rules",
    "Status": "result",
    "StoppedBy": "result",
    "Traces": "traces",
    "compare": "compare",
    "evaluate": "evaluate",
    "solve": "solve",
}
# Modules that are reached as attributes of the package, without an import of their own.
_MODULES = {
    "advise", "conflicts", "costs", "executor", "formats", "jobs", "links", "migration", "models", "online", "plotting",
    "predict", "profiling", "replay", "report", "solvers", "testing", "topology", "traces", "verify",
}  # fmt: skip
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gemopt.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'gemopt' has no attribute {name!r}")
    value = getattr(import_module(f"gemopt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])


class _Package(ModuleType):
    """Keeps `gemopt.solve`, `compare` and `evaluate` the functions, though modules of the same names hold them.

    The import system would otherwise replace the attribute by the module as soon as anyone imports it.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == _HOME.get(name) and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
