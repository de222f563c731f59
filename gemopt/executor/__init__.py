"""Put placements in force: plan the moves, move weights of a live model, rewrite checkpoints.

Importing this registers `ep_implementation="gemopt"` with transformers where that is installed.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gemopt.exceptions import called

if TYPE_CHECKING:
    from gemopt.executor.apply import Background, Executor, MigrationError
    from gemopt.executor.checkpoint import export_checkpoint
    from gemopt.executor.plan import Plan

_HOME = {
    "Background": "apply",
    "Executor": "apply",
    "MigrationError": "apply",
    "Plan": "plan",
    "export_checkpoint": "checkpoint",
}
__all__ = ["Background", "Executor", "MigrationError", "Plan", "export_checkpoint"]

if find_spec("torch") is not None and find_spec("transformers") is not None:
    with suppress(ImportError):  # an old transformers has no such registry; plans and checkpoints work all the same
        import gemopt.executor.expert_parallel  # noqa: F401 (registers itself)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemopt.executor' has no attribute {name!r}")
    with called(f"gemopt.executor.{name}"):
        return getattr(import_module(f"gemopt.executor.{_HOME[name]}"), name)
