"""Every command, module and class without torch: it works, or ends in one line with the command that helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemopt import Placement, Traces
from gemopt.exceptions import EXTRAS, MissingPackageError, install_hint, missing

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names!r})); "
SHAPE = "hidden=64,inter=32,experts=8,topk=2"


def python(code: str, *arguments: str, without: tuple[str, ...] = ("torch", "transformers", "accelerate"), **env: str):
    """A process in which some packages are not installed."""
    command = [sys.executable, "-c", BLOCKED.format(names=without) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**env, **_CLEAN})


_CLEAN = {"PYTHONPATH": "", "HOME": "/nonexistent", "PATH": ""}


@pytest.fixture
def files(tmp_path):
    Placement.contiguous(2, 8, 2).save(tmp_path / "placement.json")
    (tmp_path / "prompts.txt").write_text("hello\n")
    (tmp_path / "record.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "profile.json").write_text(json.dumps(_profile()))
    return tmp_path


def _profile():
    samples = [{"assignments": n, "active_experts": 1, "latency_us": 10.0 + n} for n in (1, 8, 64)]
    return {"schema_version": 1, "devices": [{"rank": 0, "name": "cpu", "samples": samples}]}


COMMANDS = [
    ["profile", "--shape", SHAPE, "-o", "{0}/out.json"],
    ["profile", "--model", "{0}", "-o", "{0}/out.json"],
    ["profile", "--shape", SHAPE, "--kernel", "per_expert", "-o", "{0}/out.json"],
    ["profile", "check", "{0}/profile.json"],
    ["apply", "{0}/placement.json", "--model", "{0}"],
    ["apply", "{0}/placement.json", "--model", "{0}", "--at-load"],
    ["trace", "--model", "tiny-moe", "--prompts", "{0}/prompts.txt", "-o", "{0}/out.safetensors"],
    ["trace", "import", "{0}/record.pt", "--from", "sglang", "-o", "{0}/out.safetensors"],
]


HARMLESS = [
    ["apply", "{0}/placement.json", "--dry-run", "--json"],
    ["apply", "--help"],
    ["profile", "--help"],
    ["trace", "--help"],
    ["engines"],
]
ALL_OF_THEM = """
import contextlib, io, json
from gemopt.cli import main
ended = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try: main(words)
        except SystemExit as end: code = end.code
    ended.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ended))
"""


def run_all(commands, files, **env):
    """Commands in one process without torch: what each ended with, and printed."""
    done = python(ALL_OF_THEM, json.dumps([[part.format(files) for part in words] for words in commands]), **env)
    assert done.returncode == 0, done.stderr
    return zip([" ".join(words[:3]) for words in commands], json.loads(done.stdout), strict=True)


def test_a_command_ends_in_one_line(files):
    before = sorted(files.iterdir())
    for words, (code, out, err) in run_all(COMMANDS, files, WORLD_SIZE="2", RANK="0"):
        assert (code, out) == (2, ""), (words, err)
        assert err.startswith("gemopt: torch: not installed; ") and "gemopt." not in err and err.count("\n") == 1, (
            words,
            err,
        )
        assert "pip install 'gemopt[torch]' (from a clone: pip install '.[torch]')" in err, words
    assert sorted(files.iterdir()) == before


def test_that_line_names_the_command(files):
    words, said = zip(*run_all([COMMANDS[0], COMMANDS[3], COMMANDS[4]], files, WORLD_SIZE="2", RANK="0"), strict=True)
    for (*_, err), name in zip(said, ("gemopt profile", "gemopt profile check", "gemopt apply"), strict=True):
        assert f"; {name} needs it; pip install" in err, (words, err)


def test_a_process_ends_in_that_line(files):
    done = python("from gemopt.cli import main; main()", *(part.format(files) for part in COMMANDS[4]))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_what_needs_no_torch_works_without(files):
    for words, (code, _, err) in run_all(HARMLESS, files):
        assert code == 0, (words, err)


MODULES = sorted(
    ".".join(["gemopt", *parts, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
    for parts, folder in (([], ROOT / "gemopt"), (["models"], ROOT / "models"), (["profiling"], ROOT / "profiling"))
    for path in folder.rglob("*.py")
    if path.name != "__main__.py"
)


def test_every_module_imports_or_says_in_one_line_what_is_missing():
    """In one process: a module that fails is not kept."""
    code = (
        "import importlib, json; from gemopt.exceptions import MissingPackageError\n"
        "def tried(name):\n"
        "    try: importlib.import_module(name)\n"
        "    except MissingPackageError as error: return str(error)\n"
        "    return ''\n"
        "print(json.dumps({name: tried(name) for name in sys.argv[1:]}))"
    )
    child = "gemopt.solvers.baselines.moetuner_worker"  # in a process of its own: its HiGHS stands in OR-Tools' way
    done = python(code, *(name for name in MODULES if name != child), child)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    refused = {name: line for name, line in said.items() if line}
    assert {"gemopt.profiling.tracing", "gemopt.executor.apply", "gemopt.models.layers"} <= set(refused)
    assert {"gemopt.executor.checkpoint", "gemopt.executor.plan", "gemopt.models.families"} <= set(said) - set(refused)
    for name, line in refused.items():
        assert line.startswith("torch: not installed; gemopt.") and "\n" not in line, (name, line)


CLASSES = [
    ("gemopt.executor", "Executor"),
    ("gemopt.executor", "Background"),
    ("gemopt.executor", "MigrationError"),
    ("gemopt.models", "tiny"),
    ("gemopt.models", "find_moe_layers"),
    ("gemopt.profiling.tracing", "Tracer"),
    ("gemopt.profiling.profiler", "Profiler"),
    ("gemopt.predict.networks", "Mlp"),
]


def test_a_class_says_what_is_missing():
    """In one process, as above; a name that is nowhere is refused as well."""
    code = (
        "import json, traceback\n"
        "def tried(module, name):\n"
        "    try: exec(f'from {module} import {name}', {})\n"
        "    except ImportError: return traceback.format_exc()\n"
        "    return ''\n"
        "print(json.dumps([[tried(*each), tried(each[0], 'nothing')] for each in json.loads(sys.argv[1])]))"
    )
    done = python(code, json.dumps(CLASSES))
    assert done.returncode == 0, done.stderr
    for each, (said, nothing) in zip(CLASSES, json.loads(done.stdout), strict=True):
        last = (said.strip() or "nothing").splitlines()[-1]
        named = ".".join(each) if each[0] in ("gemopt.executor", "gemopt.models") else each[0]
        assert f"MissingPackageError: torch: not installed; {named} needs it" in last, (each, said)
        assert "During handling" not in said and nothing, each


def test_transformers_alone_may_be_missing():
    done = python("from gemopt.executor import Executor", without=("transformers",))
    assert "transformers: not installed; gemopt.executor.Executor needs it" in done.stderr


def test_the_error_is_one_of_import_and_of_input():
    error = missing(ModuleNotFoundError("No module named 'yaml'", name="yaml"), "reading a.yaml")
    assert isinstance(error, MissingPackageError) and isinstance(error, ImportError) and error.name == "yaml"
    assert str(error) == f"yaml: not installed; reading a.yaml needs it; {install_hint('yaml')}"
    old = missing(ModuleNotFoundError("", name="transformers.distributed"), "the executor")
    assert str(old).startswith("transformers: has no distributed, perhaps too old; the executor needs it; pip install")
    old = missing(ImportError("", name="transformers.distributed"), "the executor")
    assert str(old).startswith("transformers: has not all of distributed, perhaps too old; the executor needs it")
    other = ModuleNotFoundError("No module named 'numpyy'", name="numpyy")
    assert missing(other, "x") is other, "not ours to explain"


def test_every_extra_exists():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)


def test_without_the_exact_solvers_the_search_answers_and_says_so(files):
    """`auto` and `compare` go on without ortools and pulp; who asks for an exact solver by name is told what to do."""
    samples = [{"assignments": n, "latency_us": 10.0 + n} for n in (1, 8, 64)]
    for name, ranks in (("two", 2), ("seven", 7)):  # our own provers take copies on up to six
        devices = [{"rank": rank, "samples": samples} for rank in range(ranks)]
        (files / f"{name}.json").write_text(json.dumps({"schema_version": 1, "devices": devices}))
    counts = np.random.default_rng(0).integers(1, 30, (6, 1, 12))
    Traces(counts=counts).save(files / "traces.safetensors")
    code = (
        "from gemopt.cli import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end: print('exit', end.code, flush=True)\n"
    )
    given, seven = (f"{files / name}.json {files / 'traces.safetensors'}" for name in ("two", "seven"))
    commands = (
        f"solve {seven} --slots-per-rank 2\nsolve {given} --solver milp\ncompare {given} --time-limit 1 --patience 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=("ortools", "pulp", "highspy")) + code],
        capture_output=True, text=True, timeout=300, check=False, input=commands, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    hint = "pip install 'gemopt[exact]' (from a clone: pip install '.[exact]')"
    assert done.stdout.count("exit 0") == 2 and done.stdout.count("exit 2") == 1, done.stdout + done.stderr
    assert f"no proof was tried: ortools: not installed; solver cpsat needs it; {hint}" in done.stdout
    assert f"gemopt: pulp: not installed; solver milp needs it; {hint}\n" in done.stderr
    assert "cpsat: not run: ortools: not installed" in done.stdout and "milp: not run: pulp" in done.stdout
