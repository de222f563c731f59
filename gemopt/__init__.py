"""Decide which expert of a mixture-of-experts model runs on which GPU, and prove how good the answer is.

Public names are imported on first use, so that `import gemopt` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "GemoptError": "exceptions",
    "InputError": "exceptions",
    "SolverError": "exceptions",
    "UnsupportedError": "exceptions",
    "Placement": "placement",
    "Profile": "profile",
    "Traces": "traces",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemopt' has no attribute {name!r}")
    value = getattr(import_module(f"gemopt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
