"""Jobs whose traces an engine recorded, and steps that only judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_inputs import profile
from responded import PROMPT, body, counts, routing

from gemopt.exceptions import InputError
from gemopt.formats.registry import import_placement
from gemopt.jobs import read_job, running
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")


def write_job(folder: Path, **changes: Any) -> Path:
    profile().save(folder / "profile.json")
    job = {
        "profile": "profile.json",
        "traces": "traces.safetensors",
        "solver": {"name": "linear"},
        "report": {"page": False},
        "output": "out",
        **changes,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


@pytest.mark.parametrize("phase", [None, "prefill", "all"])
def test_a_job_says_what_its_recording_says(phase: str | None, tmp_path: Path) -> None:
    """What `trace import` notes, and which tokens of responses are wanted."""
    ids = routing()
    (tmp_path / "responses.jsonl").write_text(json.dumps(body(ids)))
    source = {"engine": "vllm", "files": "responses.jsonl", "phase": phase}
    job = read_job(write_job(tmp_path, traces=source))
    found = running.run_job(job)
    wanted = {None: counts(ids[PROMPT:]), "prefill": counts(ids[:PROMPT]), "all": counts(ids)}[phase]
    assert found.result.num_steps == (1 if phase == "prefill" else len(wanted))
    said = [note for note in found.notes if note.startswith("traces: ")]
    assert any("experts, the highest id seen + 1" in note for note in said), found.notes
    assert any("as if they had been generated" in note for note in said) == (phase == "all")
    with pytest.raises(InputError, match="phase"):
        read_job(write_job(tmp_path, traces={**source, "phase": "both"}))


def test_steps_that_only_judge_do_not_choose_what_an_export_moves(tmp_path: Path) -> None:
    path = write_job(
        tmp_path,
        constraints={"slots_per_rank": [3, 1]},
        num_hidden_layers=1,
        steps={"holdout": 0.5},
        exports=[{"engine": "lmdeploy", "approximate": True}],
    )
    halves = [[[1, 5, 9, 5]]] * 4 + [[[100, 5, 9, 5]]] * 4  # expert 0 is hot in the second one
    Traces(counts=np.array(halves), num_hidden_layers=1).save(tmp_path / "traces.safetensors")
    running.run_job(read_job(path))
    exported = import_placement(tmp_path / "out" / "lmdeploy.json", source="lmdeploy")
    assert set(exported.physical_to_logical[0, 2:].tolist()) == {0, 3}


def test_exact_solvers_of_a_job_may_leave_slots_empty(tmp_path: Path) -> None:
    """They cannot be told that none may be; where copies help none is, and the engine takes what they found."""
    path = write_job(
        tmp_path,
        constraints={"slots_per_rank": 3},
        num_hidden_layers=1,
        solver={"name": "branch"},
        exports=[{"engine": "vllm"}],
    )
    Traces(counts=np.tile([9, 5, 1, 1], (4, 1, 1)), num_hidden_layers=1).save(tmp_path / "traces.safetensors")
    assert running.run_job(read_job(path)).result.placement is not None


@pytest.mark.parametrize("approximate", [False, True])
def test_spare_slots_are_used_where_an_engine_wants_none_empty(approximate: bool, tmp_path: Path) -> None:
    """LPT makes no copies unless they are asked for, as they are for an engine to which nothing is approximated."""
    path = write_job(
        tmp_path,
        constraints={"slots_per_rank": 3},
        num_hidden_layers=1,
        solver={"name": "lpt"},
        exports=[{"engine": "vllm", "approximate": approximate}],
    )
    Traces(counts=np.ones((4, 1, 4), int), num_hidden_layers=1).save(tmp_path / "traces.safetensors")
    found = running.run_job(read_job(path))
    assert not found.failed
    assert found.result.placement is not None
    assert found.result.placement.has_empty_slots is approximate
    assert not import_placement(tmp_path / "out" / "vllm.json", source="vllm").has_empty_slots


def test_a_job_adds_up_tables_of_parts(tmp_path: Path) -> None:
    for name, time in (("up", 20), ("down", 10)):
        (tmp_path / f"{name}.csv").write_text(f"assignments,us\n8,{time}\n64,{2 * time}\n")
    Traces(counts=np.arange(1, 17).reshape(2, 1, 8)).save(tmp_path / "traces.safetensors")
    source = {"table": ["up.csv", "down.csv"], "ranks": 2}
    made = running.run_job(read_job(write_job(tmp_path, profile={**source, "sum_column": ["file"]})))
    assert any("up + down: their times are added up" in note for note in made.notes), made.notes
    with pytest.raises(InputError, match=r"profile\.sum_column file; a device each: profile\.device_column file"):
        running.run_job(read_job(write_job(tmp_path, profile=source, output="again")))
