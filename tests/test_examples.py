"""The examples do what they say: each runs, and what it shows is checked."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemopt import Status

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def main(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_listed_and_tested() -> None:
    listed = set(re.findall(r"`([\w.]+\.(?:py|ipynb|json))`", (EXAMPLES / "README.md").read_text()))
    here = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".json")}
    assert here <= listed
    tested = Path(__file__).read_text()
    assert all(Path(name).stem in tested for name in here - {"train_tiny_moe.py", "grafana_watch.json"})


def test_solve_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    result = main("solve_in_python")()
    assert result.change < -0.1 and result.placement.layer_ids == [1, 2, 3]
    assert "layer 3: " in capsys.readouterr().out


def test_exact_against_heuristic() -> None:
    rows = {row.solver: row for row in main("exact_against_heuristic")()}
    assert rows["cpsat"].objective_us <= min(row.objective_us for row in rows.values())
    assert rows["local-search"].objective_us < rows["lpt"].objective_us < rows["linear"].objective_us
    assert rows["cpsat"].status in (Status.OPTIMAL, Status.FEASIBLE) and rows["cpsat"].bound_us > 0


def test_one_slow_gpu() -> None:
    times = main("one_slow_gpu")()
    assert times["local-search"] < times["eplb"] < times["linear"]
    assert times["share of the slow rank"] < 1 / 8


def test_copies() -> None:
    times = main("copies")()
    assert times[5] < 0.9 * times[4]


def test_two_nodes() -> None:
    scores = main("two_nodes")()
    blind, aware = scores["loads alone"], scores["loads and links"]
    assert aware.objective_us < 0.95 * min(blind.objective_us, scores["contiguous"].objective_us)
    assert aware.communication.cross_node_bytes < 0.5 * blind.communication.cross_node_bytes


def test_sglang_to_sglang(tmp_path: Path) -> None:
    rows = main("sglang_to_sglang")(tmp_path)
    assert len(rows) == 3 and rows[0] == list(range(16)), "the dense layer has its experts in order"
    assert all(sorted(row) == list(range(16)) for row in rows) and rows[1] != rows[0]


def test_following_the_traffic() -> None:
    changes = main("following_the_traffic")()
    assert changes["controller"] <= changes["fitted-once"] + 0.005 < changes["contiguous"] + 0.005


@pytest.mark.distributed
@pytest.mark.slow
def test_live_apply(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "live_apply.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment}
    done = subprocess.run([sys.executable, *command], check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    moved, error = re.search(r"moved (\d+) experts .* differ by ([\d.e+-]+)", done.stdout).groups()
    assert int(moved) > 100 and float(error) < 1e-2 and "unequal slots" in done.stdout


@pytest.mark.slow
def test_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    kernels = tmp_path / "kernels" / "python3"
    kernels.mkdir(parents=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": words, "display_name": "Python 3", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    options = {"timeout": 280, "kernel_name": "python3", "resources": {"metadata": {"path": tmp_path}}}
    nbclient.NotebookClient(notebook, **options).execute()
    text = "\n".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "Placement(3 layers, 32 experts in 32 slots on 8 ranks)" in text and "conflicts:" in text
    assert text.count("image/png") >= 3
