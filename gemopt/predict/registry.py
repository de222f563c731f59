"""Predictors by name."""

from __future__ import annotations

from collections.abc import Callable

from gemopt.exceptions import InputError
from gemopt.predict.base import Predictor
from gemopt.predict.distribution import Dirichlet, PerTask, Smoothing, Window
from gemopt.predict.tokens import Alike, Frequency, Previous, octave

PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "all-past": lambda: Window("all-past", steps=None),
    "window": Window,
    "smoothing": Smoothing,
    "dirichlet": Dirichlet,
    "task": PerTask,
    "frequency": Frequency,
    "token": lambda: Alike("token", lambda ids_N: ids_N, "token_ids"),
    "position": lambda: Alike("position", octave, "position"),
    "previous": Previous,
    "mlp": lambda: _network("Mlp"),
    "lstm": lambda: _network("Lstm"),
}


def _network(name: str) -> Predictor:
    """Needs torch, which a plain installation lacks."""
    from gemopt.predict import networks

    found: Predictor = getattr(networks, name)()
    return found


def make(name: str) -> Predictor:
    """A fresh predictor; `InputError` for an unknown name."""
    if name not in PREDICTORS:
        raise InputError("predictor", name, f"one of {', '.join(PREDICTORS)}")
    return PREDICTORS[name]()
