"""A small profile and traces on disk, and the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timed import timed

from gemopt.cli import main
from gemopt.profile import Profile
from gemopt.traces import Traces

NUM_STEPS = 12


def profile(ranks: int = 2) -> Profile:
    return timed(range(ranks), lambda n, g: (20.0 + n) * (1 + g / 10), (0, 4, 8, 16, 32, 64))


def traces(steps: int = NUM_STEPS, layers: int = 2, experts: int = 4, **fields: Any) -> Traces:
    rng = np.random.default_rng(1)
    return Traces(counts=rng.integers(0, 9, (steps, layers, experts)), **fields)


def write_inputs(folder: Path) -> tuple[str, str]:
    """Paths of profile.json and traces.safetensors with two tasks."""
    profile().save(folder / "profile.json")
    tasks = {"task": np.arange(NUM_STEPS) % 2, "task_names": ("maths", "code"), "phase": np.arange(NUM_STEPS) % 2}
    traces(**tasks).save(folder / "traces.safetensors")
    return str(folder / "profile.json"), str(folder / "traces.safetensors")


def gemopt(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, shown.out, shown.err


def gemopt_json(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """The one JSON document on standard output of a command that succeeds silently otherwise."""
    code, out, err = gemopt(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=pytest.fail)
