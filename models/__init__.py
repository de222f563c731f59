"""What a MoE network is to gemopt: find its routers and experts. `families` is plain data; the rest needs torch."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemopt.exceptions import called
from gemopt.models.checkpoint_names import TensorRole, renamed, tensor_role
from gemopt.models.families import FAMILIES, Family, family

if TYPE_CHECKING:
    from gemopt.models.layers import MoeLayer, auto_class, describe, find_moe_layers, from_files, num_hidden_layers
    from gemopt.models.tiny_models import tiny

_HOME = {
    "MoeLayer": "layers",
    "auto_class": "layers",
    "describe": "layers",
    "find_moe_layers": "layers",
    "from_files": "layers",
    "num_hidden_layers": "layers",
    "tiny": "tiny_models",
}
TINY_MOE = "tiny-moe"
__all__ = [
    "FAMILIES",
    "TINY_MOE",
    "Family",
    "MoeLayer",
    "TensorRole",
    "auto_class",
    "describe",
    "family",
    "find_moe_layers",
    "from_files",
    "model_path",
    "num_hidden_layers",
    "renamed",
    "tensor_role",
    "tiny",
    "tiny_moe_path",
]


def tiny_moe_path() -> Path:
    """Folder of the small trained network shipped with gemopt, for transformers' `from_pretrained`."""
    return Path(__file__).parent / "tiny_moe"


def model_path(model: str | os.PathLike[str]) -> str:
    """What a user called a network: its path or hub name as it is, `tiny-moe` the folder of the one shipped."""
    name = os.fspath(model)
    return str(tiny_moe_path()) if name == TINY_MOE and not Path(name).exists() else name


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemopt.models' has no attribute {name!r}")
    with called(f"gemopt.models.{name}"):
        value = getattr(import_module(f"gemopt.models.{_HOME[name]}"), name)
    globals()[name] = value
    return value
