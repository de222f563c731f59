"""Job files: read, changed, refused, run; every example runs."""

from __future__ import annotations

import errno
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_inputs import gemopt, gemopt_json, write_inputs
from cli_inputs import profile as ranks

from gemopt import documents
from gemopt.evaluate import evaluate
from gemopt.jobs import read_job, running
from gemopt.jobs.document import Kubernetes, SolverSettings, TableSource
from gemopt.jobs.kubernetes import APPLY_BYTES, LIMIT_BYTES, config_map
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.result import Result
from gemopt.traces import Traces

pytestmark = pytest.mark.usefixtures("quick_bounds")

yaml = pytest.importorskip("yaml")
EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples" / "jobs").glob("*.yaml"))
JOB: dict[str, Any] = {
    "profile": "profile.json",
    "traces": "traces.safetensors",
    "num_hidden_layers": 2,
    "steps": {"holdout": 0.5},
    "solver": {"name": "local-search", "time_limit": 20, "patience": 1},
    "exports": [{"engine": "sglang"}, {"engine": "CSV", "file": "map.csv"}],
    "output": "out/job",
}


def write_job(folder: Path, name: str = "job.yaml", **changes: Any) -> Path:
    write_inputs(folder)
    path = folder / name
    job = {**JOB, "report": {"page": False}, **changes}
    path.write_text(json.dumps(job) if name.endswith("json") else yaml.safe_dump(job))
    return path


def test_a_job_writes_the_whole_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    job, out = write_job(tmp_path, report={"page": True}), tmp_path / "out" / "job"
    found = gemopt_json(capsys, "run", job)
    assert sorted(found["files"]) == sorted(path.name for path in out.iterdir())
    placement, profile = Placement.load(out / "placement.json"), Profile.load(out / "profile.json")
    given, _ = Traces.load(tmp_path / "traces.safetensors").split(0.5)
    assert evaluate(placement, profile, given).objective_us == pytest.approx(found["objective_us"])
    assert Result.load(out / "result.json").placement is not None and placement.num_hidden_layers == 2
    sglang = json.loads((out / "sglang.json").read_text())["physical_to_logical_map"]
    assert sglang == placement.physical_to_logical.tolist()
    launch = (out / "launch-sglang.sh").read_text()
    assert os.access(out / "launch-sglang.sh", os.X_OK)
    assert found["commands"]["sglang"] in launch and str(out / "sglang.json") in shlex.split(launch, comments=True)
    manifest = yaml.safe_load((out / "configmap.yaml").read_text())
    assert manifest["kind"] == "ConfigMap" and manifest["metadata"]["name"] == "gemopt-placement"
    assert manifest["data"] == {name: (out / name).read_text() for name in ("sglang.json", "map.csv")}
    assert found["headline"] in (out / "report.html").read_text() and "6 steps it did not see" in found["headline"]


def test_a_rank_that_leaves_is_in_none_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    asked = {"current": "contiguous", "exclude_ranks": [2], "slots_per_rank": 3}
    job = write_job(tmp_path, report={"page": True}, constraints=asked, exports=[{"engine": "csv"}])
    out = tmp_path / "out" / "job"
    whole = ranks(4)
    whole.save(tmp_path / "profile.json")
    found = gemopt_json(capsys, "run", job)
    assert "the one in force was of other ranks" in " ".join(found["notes"]) and "report.html" in found["files"]
    left = Profile.load(out / "profile.json")
    assert [device.samples for device in left.devices] == [whole.devices[rank].samples for rank in (0, 1, 3)]
    given, _ = Traces.load(tmp_path / "traces.safetensors").split(0.5)
    assert evaluate(out / "placement.json", left, given).objective_us == pytest.approx(found["objective_us"])


def test_a_table_makes_the_profile_that_the_command_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, speeds = tmp_path / "t.csv", tmp_path / "s.csv"
    table.write_text("tokens,latency_us\n0,5\n64,9\n128,20\n")
    speeds.write_text("gpu,rel_time\n" + "".join(f"g{n},{1 + n / 50}\n" for n in range(5)) + "g5,900\n")
    words = ("--unit", "tokens", "--top-k", 2, "--speeds", speeds, "--seed", 3, "--ranks", 6, "--device", "H100",
             "--expert-bytes", 100, "--model", "moe")  # fmt: skip
    code, out, _ = gemopt(capsys, "profile", "import", table, "-o", tmp_path / "p.json", *words)
    assert code == 0 and "are all times in one unit?" in out
    source = TableSource(table=table, unit="tokens", top_k=2, speeds=speeds, seed=3, ranks=6, device="H100",
                         expert_bytes=100, model="moe")  # fmt: skip
    notes: list[str] = []
    assert running._profile(source, notes) == Profile.load(tmp_path / "p.json") and len(notes) == 1
    slower = running._profile(source.model_copy(update={"slower": {0: 1.5, 3: 30}}), notes)
    code, out, _ = gemopt(
        capsys, "profile", "import", table, "-o", tmp_path / "s.json", *words, "--slower", "0:1.5", "--slower", "3:30"
    )
    assert code == 0 and "--slower 3 is 30 times the time" in out and Profile.load(tmp_path / "s.json") == slower
    assert (
        slower.devices[3].samples[0].latency_us
        == 30 * Profile.load(tmp_path / "p.json").devices[3].samples[0].latency_us
    )
    assert "profile.slower.3 is 30 times the time; 30 % more is 1.3" in notes and "slower.0" not in " ".join(notes)


def test_the_written_job_is_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path)
    first = gemopt_json(capsys, "run", job, "--set", "solver.seed=3")
    again = gemopt_json(capsys, "run", tmp_path / "out/job/job.json", "-o", tmp_path / "again")
    assert again["objective_us"] == first["objective_us"]
    assert (tmp_path / "again/placement.json").read_bytes() == (tmp_path / "out/job/placement.json").read_bytes()


def test_every_key_can_be_changed_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    job = write_job(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    words = ("--set", "solver.time_limit=5", "--set", "exports.1.engine=vllm-ascend", "--set", "traces=t.npz",
             "--set", "exports.1.file=m.json", "--set", 'constraints.slots_per_rank=[3,1]', "-o", "here",
             "--set", "kubernetes=null", "--set", "constraints.current=contiguous")  # fmt: skip
    code, out, err = gemopt(capsys, "run", job, "--print-config", *words)
    assert (code, err) == (0, "")
    shown = yaml.safe_load(out)
    told = {"name": "local-search", "time_limit": 5.0, "patience": 1}
    assert shown["solver"] == SolverSettings().model_dump() | told
    assert shown["exports"][1]["engine"] == "vllm-ascend" and shown["exports"][1]["file"] == "m.json"
    assert shown["constraints"]["slots_per_rank"] == [3, 1] and shown["kubernetes"] is None
    assert shown["constraints"]["current"] == "contiguous"
    assert shown["profile"] == str(tmp_path / "profile.json")  # beside the job
    assert shown["traces"] == str(elsewhere / "t.npz") and shown["output"] == str(elsewhere / "here")  # typed here
    assert gemopt_json(capsys, "run", job, "--print-config", *words) == shown
    (tmp_path / "shown.json").write_text(json.dumps(shown))
    assert read_job(tmp_path / "shown.json") == read_job(job, [w for w in words if "=" in w] + ["output=here"])


BAD = {
    "an unknown key": ({"solver": {"time_limt": 3}}, (), ("solver.time_limt", "did you mean time_limit?")),
    "an unknown key at the top": ({"profil": "p"}, (), ("profil", "profile")),
    "an unknown key of an export": ({"exports": [{"engine": "csv", "fil": "a"}]}, (), ("exports.0.fil", "file")),
    "no traces": ({"traces": None}, (), ("traces",)),
    "a network without a name": ({"model": " "}, (), ("model", "a name or a path")),
    "a word for a number": ({}, ("--set", "solver.time_limit=long"), ("solver.time_limit", "long")),
    "an unknown engine": ({"exports": [{"engine": "magic"}]}, (), ("magic", "sglang")),
    "an engine without placements": ({"exports": [{"engine": "xllm"}]}, (), ("xllm", "no placement")),
    "the wrong ending": ({"exports": [{"engine": "sglang", "file": "a.csv"}]}, (), ("a.csv", ".json")),
    "a file outside": ({"exports": [{"engine": "sglang", "file": "../a.json"}]}, (), ("exports.file", "../a.json")),
    "one name twice": ({"exports": [{"engine": "csv"}, {"engine": "csv"}]}, (), ("csv.csv", "one name")),
    "a bad name for Kubernetes": ({"kubernetes": {"config_map": "Big_Map"}}, (), ("kubernetes.config_map", "Big_Map")),
    "a holdout of all": ({}, ("--set", "steps.holdout=1"), ("steps.holdout",)),
    "fewer layers than the traces have": ({"num_hidden_layers": 1}, (), ("below num_hidden_layers = 1",)),
    "no such item": ({}, ("--set", "exports.7.engine=csv"), ("exports.7", "2 items")),
    "no value": ({}, ("--set", "output"), ("KEY=VALUE",)),
    "a key inside a value": ({}, ("--set", "traces.engine=sglang"), ("traces holds a value",)),
    "traces of no file": ({"traces": {"engine": "sglang", "files": []}}, (), ("traces.files",)),
    "a solver that is none": ({}, ("--set", "solver.name=magic"), ("magic", "local-search")),
    "an output that cannot be": ({"output": "/proc/none/here"}, (), ("output", "/proc/none/here")),
    "layers that an engine asks for": ({"num_hidden_layers": None}, (), ("num_hidden_layers", "sglang", "add the key")),
    "a text for a list": ({"exports": ["sglang"]}, (), ("exports.0: got sglang; keys and values are needed",)),
    "a document for a path": ({"constraints": {"rules": {}}}, (), ("constraints.rules", "a path is needed")),
    "a baseline of no page": ({"report": {"page": False, "baseline": "p.json"}}, (), ("report.baseline", "p.json")),
    "a ConfigMap of nothing": ({"exports": [], "kubernetes": {"namespace": "a"}}, (), ("kubernetes", "add exports")),
    "draft layers of an engine that knows none": (
        {"exports": [{"engine": "vllm", "mtp_layers": 1}]},
        (),
        ("mtp_layers: got 1", "vllm"),
    ),
    "a seed that draws nothing": ({"profile": {"table": "t.csv", "seed": 3}}, (), ("profile.seed", "speeds")),
    "an output that is a file": ({"output": "profile.json"}, (), ("output", "does not exist yet", "-o")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_jobs_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changes, words, named = BAD[case]
    job = write_job(tmp_path, **changes)
    code, out, err = gemopt(capsys, "run", job, *words)
    assert (code, out) == (2, "") and err.startswith("gemopt: ") and err.count("\n") == 1, err
    for each in named:
        assert each in err
    assert not (tmp_path / "out" / "job").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, out = write_job(tmp_path), tmp_path / "out" / "job"
    out.mkdir(parents=True)
    (out / "placement.json").write_text("mine")
    code, _, err = gemopt(capsys, "run", job)
    assert code == 2 and str(out) in err and err.count("\n") == 1
    assert [path.read_text() for path in out.iterdir()] == ["mine"]


def test_a_disk_that_is_full_leaves_no_folder_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path, solver={"name": "lpt"})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(documents.os, "fsync", full)
    code, _, err = gemopt(capsys, "run", job)
    assert code == 2 and "No space left" in err and not (tmp_path / "out" / "job").exists()
    monkeypatch.undo()
    assert gemopt(capsys, "run", job)[0] == 0


def test_what_an_engine_cannot_express_costs_nobody_the_answer(tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    job = write_job(tmp_path, constraints={"slots_per_rank": [3, 1]})
    code, out, err = gemopt(capsys, "run", job)
    assert code == 2 and err.count("\n") == 1 and "slots_per_rank" in err and "sglang" in err
    written = {path.name for path in (tmp_path / "out/job").iterdir()}
    assert {"placement.json", "result.json", "map.csv", "configmap.yaml"} <= written and "sglang.json" not in written
    assert "map.csv" in out


def test_rules_topology_and_memory_are_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rules.json").write_text('{"pinned": [{"experts": [0, 3], "ranks": [1]}]}')
    job = write_job(
        tmp_path,
        constraints={"rules": "rules.json", "slots_per_rank": 3, "compute_slack": 0.1},
        topology="2x1-ib400",
        exchange={"dispatch_bytes": 64, "combine_bytes": 64, "once_per": "assignment", "senders": "uniform"},
        exports=[],
    )
    gemopt_json(capsys, "run", job)
    result = Result.load(tmp_path / "out/job/result.json")
    assert result.links is not None and result.links.saved is not None and result.placement is not None
    assert not {0, 3} & set(result.placement.physical_to_logical[:, :3].ravel().tolist())
    assert gemopt(capsys, "run", job, "-o", "one", "--set", 'constraints.rules="none.json"')[0] == 2
    (tmp_path / "rules.json").write_text('{"together": [{"experts": [0, 1, 2, 3]}]}')
    code, out, err = gemopt(capsys, "run", job, "-o", tmp_path / "none")
    assert code == 3 and "together[0]: experts 0, 1, 2, 3 all on one rank" in out + err
    memory = {"memory_budget": 60, "expert_bytes": 10}
    job = write_job(tmp_path, "memory.yaml", constraints=memory, output="out/memory", exports=[])
    gemopt_json(capsys, "run", job)
    held = Placement.load(tmp_path / "out/memory/placement.json")
    assert all((held.physical_to_logical[:, held.rank_of_slot == rank] >= 0).sum() <= 6 for rank in range(2))
    code, _, err = gemopt(capsys, "run", job, "-o", tmp_path / "x", "--set", "exchange.once_per=rank")
    assert code == 2 and "give a topology" in err


def test_json_jobs_and_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "job.json")
    assert gemopt_json(capsys, "run", job, "--print-config")["output"] == str(tmp_path / "out/job")
    told = "$schema: job.json\nx-search: &s {name: lpt}\nprofile: p\ntraces: t\noutput: o\nsolver: *s\n"
    (tmp_path / "told.yaml").write_text(told)
    found = read_job(tmp_path / "told.yaml", ["constraints.slots_per_rank=4,4,2"])
    assert found.solver.name == "lpt" and found.constraints.slots_per_rank == [4, 4, 2]
    recorded = read_job(tmp_path / "told.yaml", ['traces={"engine": "sglang", "files": "dumps"}']).traces
    assert not isinstance(recorded, Path) and recorded.files == [Path.cwd() / "dumps"]
    for text, named in (
        ("", "got nothing"),
        ("profile: a\nprofile: b\n", "every key once"),
        ("- a\n", "keys and values"),
        ("a: [", "YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        code, _, err = gemopt(capsys, "run", tmp_path / "bad.yaml")
        assert code == 2 and named in err and err.count("\n") == 1


def test_a_config_map_takes_what_kubernetes_takes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]\n")
    (tmp_path / "b.pt").write_bytes(b"\xff\x00")
    text, note = config_map(
        Kubernetes(namespace="moe", labels={"model": "m"}), [tmp_path / "a.json", tmp_path / "b.pt"]
    )
    manifest = yaml.safe_load(text)
    assert manifest["data"] == {"a.json": "[1]\n"} and manifest["binaryData"] == {"b.pt": "/wA="} and note == ""
    assert manifest["metadata"]["namespace"] == "moe" and manifest["metadata"]["labels"]["model"] == "m"
    (tmp_path / "large").write_text("[0]\n" * (APPLY_BYTES // 4))
    text, note = config_map(Kubernetes(), [tmp_path / "large"])
    assert "--server-side" in note and text.count("[0]") == APPLY_BYTES // 4
    (tmp_path / "big").write_bytes(b"x" * (LIMIT_BYTES + 1))
    text, note = config_map(Kubernetes(), [tmp_path / "big"])
    assert text == "" and str(LIMIT_BYTES) in note


@pytest.mark.parametrize(
    ("labels", "taken"),
    [
        ({"app.kubernetes.io/part-of": "moe", "v": "1.0_a", "empty": ""}, True),
        ({"model": "gpt oss"}, False),
        ({"model": "-a"}, False),
        ({"a/b/c": "d"}, False),
        ({"a" * 64: "d"}, False),
    ],
)
def test_labels_are_those_that_kubernetes_takes(labels: dict[str, str], taken: bool) -> None:
    if taken:
        assert Kubernetes(labels=labels).labels == labels
        return
    with pytest.raises(ValueError, match=r"kubernetes\.labels"):
        Kubernetes(labels=labels)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: Path) -> None:
    quick = ("--set", "solver.name=lpt", "--set", "solver.time_limit=1", "--set", "report.page=false")
    few = path.stem == "few_moves"
    if few:
        quick = ("--set", "solver.time_limit=60", "--set", "solver.patience=0", *quick[4:], "--set",
                 "steps.holdout=0.97")  # fmt: skip
    if path.stem == "copies":
        quick = ("--set", "solver.name=eplb", *quick[2:])
    job = read_job(path)
    assert job.output.parent == path.parents[2] / "out" and str(path.name) in path.read_text()
    found = gemopt_json(capsys, "run", path, *quick, "-o", tmp_path / "out")
    assert found["failed"] == [] and "configmap.yaml" in found["files"]
    moves = Result.load(tmp_path / "out" / "result.json").moves
    assert found["change"] < 0 and (moves is not None and 0 < moves.moves <= 64 if few else moves is None)
    for wanted in job.exports:
        assert wanted.engine in {*found["commands"], "csv"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_job_says_what_lies_outside_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`solve` did, a job did not."""
    job, profile = write_job(tmp_path, exports=[]), tmp_path / "profile.json"
    whole = Profile.load(profile)
    short = [each.model_copy(update={"samples": each.samples[:2]}) for each in whole.devices]
    whole.model_copy(update={"devices": short}).save(profile)
    found = gemopt_json(capsys, "run", job)
    assert any("% of the loads lie outside the measured range of the profile" in note for note in found["notes"])


def test_a_job_says_what_it_moves_and_what_it_is_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It told neither the moves nor the bytes, only in result.json; and the placement in force was `the baseline`."""
    pytest.importorskip("plotly")
    asked = {"current": "force.json", "max_moves": 2, "expert_bytes": 3_000_000}
    exports = [{"engine": "vllm"}]
    job = write_job(tmp_path, exports=exports, constraints=asked, report={"page": True}, model="/srv/moe")
    traces = replace(Traces.load(tmp_path / "traces.safetensors"), model="org/Net")
    traces.save(tmp_path / "traces.safetensors")
    ranks = Profile.load(tmp_path / "profile.json").num_ranks
    Placement.contiguous(traces.num_layers, traces.num_experts, ranks).save(tmp_path / "force.json")
    code, out, _ = gemopt(capsys, "run", job)
    moves = Result.load(tmp_path / "out/job/result.json").moves
    assert code == 0 and moves and moves.summary(6) in out and "warning: the placement is for org/Net" in out
    assert "time than the baseline force.json over 6 steps" in out.replace("\n", " ")
    again = gemopt_json(capsys, "run", job, "-o", tmp_path / "again")
    assert again["moves"] == moves.model_dump(mode="json") and " vllm serve /srv/moe " in again["commands"]["vllm"]
