"""Outputs replace files of their own kind, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, write_inputs

from gemopt.cli.outputs import check_outputs
from gemopt.placement import Placement

pytestmark = pytest.mark.usefixtures("quick_bounds")


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        (
            ("solve", "profile.json", "traces.safetensors", "-o", "profile.json"),
            "--output",
            "the file of the profile",
        ),
        (("solve", "profile.json", "traces.safetensors", "--result", "traces.safetensors"), "--result", "it is traces"),
        (("solve", "profile.json", "traces.safetensors", "-o", "x", "--result", "x"), "--result", "of --output"),
        (("conflicts", "traces.safetensors", "--plot", "map.png"), "--plot", "it is a placement"),
        (("export", "map.png", "--to", "sglang", "-o", "profile.json"), "--output", "it is a profile"),
        (("trace", "import", "t.csv", "--from", "csv", "-o", "t.csv"), "--output", "the file of a recording"),
        (("profile", "import", "t.csv", "-o", "t.csv"), "--output", "the file of the table"),
        (("trace", "import", "t.csv", "--from", "csv", "-o", "new.npz"), "--output", "written as .safetensors"),
        (
            ("report", "map.png", "--profile", "profile.json", "--traces", "traces.safetensors", "-o", "page.pdf"),
            "--output",
            "the page is HTML",
        ),
        (
            ("watch", ".", "--profile", "profile.json", "--placement", "map.png", "-o", "profile.json"),
            "--output",
            "of --pr",
        ),
    ],
)
def test_no_output_takes_the_place_of_another_document(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    option: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    Placement.contiguous(2, 4, 2).save(tmp_path / "map.png")
    (tmp_path / "t.csv").write_text("layer_id,expert_id,count\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = gemopt(capsys, *words)
    assert (code, out) == (2, "") and err.startswith(f"gemopt: {option}: got ") and said in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_takes_the_place_of_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the engine reads placements of gemopt, and the one that is watched has another path."""
    monkeypatch.chdir(tmp_path)
    inputs, placement = write_inputs(tmp_path), tmp_path / "p.json"
    (tmp_path / "steps").mkdir()
    watch = ("watch", "steps", "--profile", inputs[0], "--placement", placement, "--to", "vllm", "--once")
    for _ in range(2):
        for words in (
            ("solve", *inputs, "--solver", "lpt", "-o", placement, "--result", tmp_path / "r.json"),
            ("export", placement, "--to", "vllm", "-o", "p.vllm.json"),
            (*watch, "--output", "p.json"),
        ):
            assert gemopt(capsys, *words)[0] == 0, words
    assert gemopt(capsys, "export", placement, "--to", "vllm", "-o", "p.json")[0] == 2


def test_arrays_that_no_command_reads_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = np.random.default_rng(0).multinomial(40, np.full(8, 1 / 8), (5, 2))
    np.savez(tmp_path / "t.npz", counts=counts, seed=np.array(3), task_names=np.array(["a"]))
    code, _, err = gemopt(capsys, "conflicts", tmp_path / "t.npz")
    assert code == 0 and "t.npz: seed, task_names left unread" in err
    np.savez(tmp_path / "t.npz", counts=counts, top_k=np.array(2))
    assert "unread" not in gemopt(capsys, "conflicts", tmp_path / "t.npz")[2]


def test_a_page_may_have_any_ending_that_is_no_other_format(tmp_path: Path) -> None:
    check_outputs(("--output", tmp_path / "tmp.a7Xq2", "page"), ("--again", tmp_path / "PAGE.HTML", "page"))
