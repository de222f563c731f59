"""`gemopt apply`: the dry run from files, bad input, and one real run under torchrun."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json

from gemopt import Placement


@pytest.fixture
def placements(tmp_path):
    """Files of two placements of 2 layers, 8 experts, 2 ranks, and of one of 4 ranks."""
    rng = np.random.default_rng(0)
    made = {}
    for name, slots in (("a", [4, 4]), ("b", [5, 3]), ("four", [2] * 4)):
        rows = [rng.permutation(8) for _ in range(2)]
        made[name] = str(tmp_path / f"{name}.json")
        Placement(physical_to_logical=rows, slots_per_rank=slots, num_experts=8, layer_ids=[1, 2]).save(made[name])
    return made


def test_dry_run_counts_what_crosses(capsys, placements):
    words = ("--dry-run", "--expert-bytes", "1000", "--ranks-per-node", "1")
    report = gemopt_json(capsys, "apply", placements["a"], *words)
    table = Placement.load(placements["a"]).physical_to_logical
    crossing = sum(int((row[:4] >= 4).sum() + (row[4:] < 4).sum()) for row in table)
    assert report["moves"] == {"local": 0, "node": 0, "cross": crossing, "relay": 0}
    assert report["bytes"]["cross"] == 1000 * crossing and report["stay"] == 16 - crossing
    assert report["stages"] == report["layers"] == 2 and report["estimate_s"] > 0


def test_dry_run_from_a_placement_to_itself_and_to_other_slots(capsys, placements):
    same = gemopt_json(capsys, "apply", placements["a"], "--current", placements["a"], "--dry-run")
    assert same["stages"] == 0 and same["stay"] == 16 and same["estimate_s"] is None
    code, out, _ = gemopt(capsys, "apply", placements["b"], "--current", placements["a"], "--dry-run")
    assert code == 0 and "2 commits in 2 layers; sizes are unknown: give --model or --expert-bytes" in out
    assert "0.0" not in out, "an unknown size is not none"
    report = gemopt_json(capsys, "apply", placements["b"], "--current", placements["a"], "--dry-run")
    assert set(report["bytes"].values()) == {None} and report["buffer_bytes"] is None and sum(report["moves"].values())


def test_the_network_that_comes_with_gemopt_has_a_name(capsys, tmp_path):
    rows = [np.roll(np.arange(64), 3)] * 4
    Placement(physical_to_logical=rows, slots_per_rank=[32, 32], num_experts=64).save(tmp_path / "p.json")
    report = gemopt_json(capsys, "apply", str(tmp_path / "p.json"), "--model", "tiny-moe", "--dry-run")
    assert report["bytes"]["node"] == 13824 * report["moves"]["node"] > 0


@pytest.mark.parametrize(
    ("experts", "layers", "words"),
    [
        (32, [0, 1, 2, 3], "Placement.num_experts: got 32; the checkpoint has 64 experts"),
        (64, [0, 1, 2], "Placement.layer_ids: got [0, 1, 2]; the checkpoint has MoE layers [0, 1, 2, 3]"),
        (64, [1, 2, 3, 4], "Placement.layer_ids: got [1, 2, 3, 4]; the checkpoint has MoE layers [0, 1, 2, 3]"),
    ],
)
def test_a_dry_run_for_another_network_is_refused(capsys, tmp_path, experts, layers, words):
    """Bytes of its experts would be wrong, and no rank would take the placement."""
    path, rows, each = tmp_path / "p.json", [np.arange(experts)] * len(layers), [experts // 2] * 2
    Placement(physical_to_logical=rows, slots_per_rank=each, num_experts=experts, layer_ids=layers).save(path)
    code, out, err = gemopt(capsys, "apply", str(path), "--model", "tiny-moe", "--dry-run")
    assert (code, out) == (2, "") and words in err


def test_a_budget_without_end_is_none(capsys, placements):
    words = ("--dry-run", "--expert-bytes", "1000", "--budget")
    reports = [gemopt_json(capsys, "apply", placements["b"], *words, budget) for budget in ("inf", "1e9")]
    assert reports[0] == reports[1]


def test_a_placement_for_other_ranks_is_refused_before_anything_is_loaded(capsys, placements, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, out, err = gemopt(capsys, "apply", placements["a"], "--model", "nowhere")
    assert (code, out) == (2, "") and "2 ranks; torchrun started 3; --nproc-per-node 2" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--current", "four", "--dry-run"], "4 ranks"),
        (["a", "--dry-run", "--at-load"], "one of the two"),
        (["a", "--dry-run", "--budget", "1"], "--expert-bytes"),
        (["a", "--dry-run", "--budget", "1e-9", "--expert-bytes", "100"], "needs a buffer of 100 bytes"),
        (["a", "--dry-run", "--model", "nowhere"], "nowhere"),
        (["a"], "--model"),
        (["a", "--model", "."], "torchrun"),
        (["missing.json", "--dry-run"], "missing.json"),
        (["a", "--dry-run", "--node-gbps", "0"], "node-gbps"),
        (["a", "--dry-run", "--profile", "p.json"], "got p.json; for ranks that serve copies under the optimal split"),
        (["a", "--at-load", "--model", ".", "--current", "four"], "nothing moves"),
        (["a", "--dry-run", "--model", ".", "--expert-bytes", "100"], "their own size"),
    ],
)
def test_bad_input_is_one_line(capsys, placements, monkeypatch, arguments, words):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code, out, err = gemopt(capsys, "apply", *(placements.get(argument, argument) for argument in arguments))
    assert code == 2 and out == ""
    assert words in err and err.count("\n") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_apply_under_torchrun(tmp_path):
    pytest.importorskip("transformers")
    from gemopt.models import tiny

    tiny("qwen3_moe", num_layers=3).save_pretrained(tmp_path / "model")
    wanted = Placement(
        physical_to_logical=[[7, 0, 6, 1, 5, 2, 4, 3]] * 2, slots_per_rank=[5, 3], num_experts=8, layer_ids=[1, 2]
    )
    wanted.save(tmp_path / "wanted.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "gemopt", "apply", "wanted.json", "--model", "model", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    from gemopt.executor.plan import checksum, layer_rows

    assert report["checksum"] == checksum(layer_rows(wanted)), "what is in force is what was asked for"
    assert sum(report["moves"].values()) > 0 and report["elapsed_s"] > 0
