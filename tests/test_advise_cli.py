"""`gemopt advise`: what it prints, which commands it names, and what it refuses."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advised import SHAPE, profile, skewed
from cli_inputs import gemopt, gemopt_json

from gemopt.rules import Rules
from gemopt.traces import Phase


@pytest.fixture
def words(tmp_path: Path) -> list[Any]:
    skewed(steps=48, layers=1).save(tmp_path / "traces.safetensors")
    profile(hidden_size=64, top_k=2).save(tmp_path / "profile.json")
    node = {"within_node": {"bandwidth_gbs": 100}}
    (tmp_path / "links.json").write_text(json.dumps({"node_of_rank": [0, 0, 1, 1], **node}))
    (tmp_path / "wrong.json").write_text(json.dumps({"node_of_rank": [0, 0], **node}))
    network = {"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4, "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(network))
    Rules(together=[{"experts": [0, 1, 2]}]).save(tmp_path / "tights.json")
    return ["advise", tmp_path / "profile.json", tmp_path / "traces.safetensors", "--window", 8, "--no-sweep"]


def test_the_command_line(words: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gemopt_json(capsys, *words)
    assert {"recommended", "predicted_change", "confidence", "strategies", "ceiling", "commands"} <= set(found)
    assert found["recommended"] in [each["strategy"] for each in found["strategies"]]
    code, out, err = gemopt(capsys, *words, "--non-moe-us", 50, "-o", tmp_path / "advice.json")
    assert (code, err) == (0, "")
    assert out.startswith(f"use {found['recommended']}: ") and "proven" in out and "gemopt replay" in out
    assert json.loads((tmp_path / "advice.json").read_text())["non_moe_us"] == 50
    assert "of a whole step with 50 us outside the MoE layers" in out
    assert "whole step" not in gemopt(capsys, *words)[1], "nothing is known of the rest of a step"


def test_commands_name_the_same_steps_costs_and_files(
    words: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile.json").rename(tmp_path / "my profile.json")
    words[1] = tmp_path / "my profile.json"
    replace(skewed(steps=48, layers=1), phase=np.full(48, int(Phase.DECODE))).save(words[2])
    found = gemopt_json(capsys, *words, "--phase", "decode", "--cost", "staircase", "--seed", 3)
    for command in found["commands"]:
        parts = shlex.split(command)
        assert str(words[1]) in parts
        assert "watch" in parts or {"--phase", "decode", "--cost", "staircase", "--seed", "3"} <= set(parts)
    assert gemopt_json(capsys, *shlex.split(found["commands"][0])[1:])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--model", SHAPE.replace("hidden_size=64", "hidden_size=65")],
            "--model hidden_size: got 65; 64 in the profile",
        ),
        (["--model", SHAPE + ",num_experts=16"], "--model num_experts: got 16; 8 in the traces"),
        (["--model", "heads=4"], "--model hidden_size: got nothing"),
        (["--model", SHAPE.replace("kv_heads=2", "kv_heads=8")], "--model kv_heads: got 8; at most 4, as heads"),
        (["--model", "config.json"], "--model: got the config.json of a network; hidden_size, heads (there num_"),
        (["--model", "/no/such/shape.json"], "/no/such/shape.json"),
        (["--window", "25"], "traces: got 24 steps to score; at least the 25 of a window"),
        (["--horizon", "0"], "--horizon: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--memory", "-1"], "--memory: got -1.0"),
        (["--memory", "nan"], "--memory: got nan"),
        (["--bandwidth", "0"], "--bandwidth: got 0.0"),
        (["--bandwidth", "-2"], "--bandwidth: got -2.0; GB/s above 0"),
        (["--bandwidth", "5", "--topology", "1x4-nvlink4"], "--bandwidth: got 5.0; the topology says it"),
        (["--topology", "links.json"], "Topology.between_nodes: got nothing"),
        (["--topology", "wrong.json"], "topology: got 2 ranks; the profile has 4 devices"),
        (["--expert-bytes", "0"], "--expert-bytes: got 0.0"),
        (["--non-moe-us", "-2"], "--non-moe-us: got -2.0"),
        (["--memory", "1", "--predictors", "token"], "Traces.ids: got nothing; the predictor token needs it"),
        (
            ["--memory", "1", "--predictors", "window"],
            "history: got 24 steps; the window of the predictor window is 64",
        ),
        (["--memory", "1", "--predictors", "tarot"], "predictor: got tarot"),
        (["--predictors", "window"], "--predictors: got window; no slot to spare for copies"),
        (["--plot", "map.png"], "--plot: got map.png; the map needs the sweep"),
        (["--rules", "rules.json"], "rules.json: got No such file"),
        (["--rules", "tights.json", "--predictors", "window"], "--predictors: got window; duplication knows no rules"),
        (["-o", "/no/such/folder/out.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(
    words: list[Any], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in more:
        pytest.importorskip("matplotlib")
    more = [
        str(words[1].parent / word) if word.endswith("s.json") or word.endswith("g.json") else word for word in more
    ]
    code, out, err = gemopt(capsys, *words, *more)
    assert (code, out) == (2, "")
    assert err.startswith("gemopt: ") and err.count("\n") == 1 and said in err


def test_rules_that_no_placement_keeps_are_infeasible(words: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gemopt(capsys, *words, "--rules", str(words[1].parent / "tights.json"))
    assert (code, out) == (3, "")
    assert err == "gemopt: rules: got together[0]; no placement of layer 0 keeps them together\n"
