"""What YAML makes of the values of a job, and names of files that would be written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_inputs import write_inputs

from gemopt.exceptions import InputError
from gemopt.jobs import read_job, run_job
from gemopt.result import Result
from gemopt.topology import load


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("solver: {seed: 010}", "got 010; a plain number; 010 is 8 in YAML"),
        ("solver: {time_limit: 1:30}", "got 1:30; a plain number"),
        ("constraints: {slots_per_rank: 012}", "got 012; a plain number"),
        ("solver: {seed: yes}", "solver.seed: true; a number or a text, no yes or no"),
        ("solver: {gap: no}", "solver.gap: false"),
        ("steps: {task: on}", "steps.task: true; a number or a text, no yes or no; quote a text"),
        ("constraints: {exclude_ranks: [yes], current: contiguous}", "constraints.exclude_ranks: true"),
        ("exchange: {dispatch_bytes: yes}", "exchange.dispatch_bytes: true"),
        ("kubernetes: no", "kubernetes: false; keys and values, no yes or no; null for none"),
        ("report: no", "report: false; keys and values, no yes or no; report: {page: false}"),
        ("constraints: {memory_budget: 80GB}", "constraints.memory_budget: got 80GB; input should be a valid number"),
        ("constraints: {expert_bytes: 9.45e1}", "constraints.expert_bytes: got 9.45e1"),
        (
            "constraints: {rules: $SOME_DIR/rules.json}",
            "constraints.rules: got $SOME_DIR/rules.json; a path written out",
        ),
        ("topology: ${SOME_DIR}/links.json", "topology: got ${SOME_DIR}/links.json; a path written out"),
    ],
)
def test_what_yaml_reads_as_another_value_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"profile: p.json\ntraces: t.safetensors\noutput: out\n{line}\n")
    with pytest.raises(InputError) as error:
        read_job(path)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "inside", "value"),
    [
        ("solver: {seed: 0}", "seed", 0),
        ("solver: {seed: 1_0}", "seed", 10),
        ("solver: {time_limit: 1e1}", "time_limit", 10.0),
        ("solver: {time_limit: 0.5}", "time_limit", 0.5),
        ("solver: {allow_one_rank: yes}", "allow_one_rank", True),
    ],
)
def test_what_yaml_reads_as_it_is_written_is_taken(tmp_path: Path, line: str, inside: str, value: object) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"profile: p.json\ntraces: t.safetensors\noutput: out\n{line}\n")
    assert getattr(read_job(path).solver, inside) == value


def test_numbers_and_files_as_the_command_line_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    (tmp_path / "alltoall.txt").write_text("")
    (tmp_path / "a$b").write_text("")
    given = "constraints: {expert_bytes: 9.4e6, memory_budget: '80e9,40e9', rules: a$b}\ntopology: alltoall.txt"
    path.write_text(f"profile: p.json\ntraces: t.safetensors\noutput: out\n{given}\n")
    job = read_job(path)
    asked = job.constraints
    assert (asked.expert_bytes, asked.memory_budget, asked.rules) == (9_400_000, [8e10, 4e10], tmp_path / "a$b")
    assert job.topology == str(tmp_path / "alltoall.txt")
    with pytest.raises(InputError, match="no such file"):
        load(read_job(path, ["topology=other.txt"]).topology or "")
    with pytest.raises(InputError, match=r"gemopt topology .*alltoall\.txt -o topology\.json reads what was measured"):
        load(job.topology or "")


def test_no_file_of_a_job_is_written_over(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    job = {
        "profile": "profile.json", "traces": "traces.safetensors", "output": "out", "num_hidden_layers": 2,
        "solver": {"name": "linear"}, "report": {"page": False},
    }  # fmt: skip
    path = tmp_path / "job.json"
    for files, said in (
        ([("sglang", "result.json")], "exports.file: got result.json; a name that the job has no use for"),
        ([("vllm", "placement.json")], "got placement.json"),
        ([("trtllm", "configmap.yaml")], "got configmap.yaml"),
        ([("trtllm", "a.yaml"), ("trtllm", "a.options.yaml")], "got a.options.yaml; one name per file"),
        ([("sglang", "a.json"), ("vllm", "a.json.gemopt.json")], "got a.json.gemopt.json; one name per file"),
    ):
        path.write_text(json.dumps({**job, "exports": [{"engine": engine, "file": file} for engine, file in files]}))
        with pytest.raises(InputError) as error:
            run_job(read_job(path))
        assert said in str(error.value) and not (tmp_path / "out").exists()
    exports = [{"engine": "sglang", "file": "a.json"}, {"engine": "trtllm", "file": "a.yaml"}]
    path.write_text(json.dumps({**job, "exports": exports}))
    done = run_job(read_job(path))
    assert len({*done.files}) == len(done.files) and Result.load(tmp_path / "out" / "result.json").placement is not None
    scripts = [(tmp_path / "out" / name).read_text() for name in done.files if name.endswith(".sh")]
    assert len(scripts) == 2 and all(any(each in text for text in scripts) for each in done.commands.values())
