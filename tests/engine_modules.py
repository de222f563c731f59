"""Published files of engines as modules, with stubs for what they import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock


def stub(monkeypatch, name: str, **attributes) -> ModuleType:
    """A module that has what is given, and makes up the rest."""
    module = ModuleType(name)
    module.__path__ = []
    module.__getattr__ = lambda key: MagicMock() if not key.startswith("__") else _missing(key)
    vars(module).update(attributes)
    _register(monkeypatch, name, module)
    return module


def _register(monkeypatch, name: str, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        stub(monkeypatch, parent)
    if parent:
        monkeypatch.setattr(sys.modules[parent], last, module, raising=False)


def _missing(key: str):
    raise AttributeError(key)


def load(monkeypatch, name: str, path: Path) -> ModuleType:
    """The file `path` as the module `name`; its parents are empty packages."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    _register(monkeypatch, name, module)
    spec.loader.exec_module(module)
    return module
