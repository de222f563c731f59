"""Outputs replace files of their own kind, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, write_inputs

from gemopt.cli.outputs import check_outputs
from gemopt.documents import foreign
from gemopt.exceptions import InputError
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


def test_a_document_does_not_replace_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who takes -o for --plot, as in `replay -o replay.png`, keeps the picture of the last time."""
    (tmp_path / "replay.png").write_bytes(b"drawn")
    for kind in ("replay result", "placement", "advice"):
        with pytest.raises(InputError, match=f"replay.png; no picture: it holds {kind}"):
            check_outputs(("--output", tmp_path / "replay.png", kind))
    check_outputs(("--plot", tmp_path / "replay.png", ""), ("--output", tmp_path / "replay.json", "replay result"))
    profile, traces = write_inputs(tmp_path)
    assert gemopt(capsys, "replay", traces, "--profile", profile, "-o", tmp_path / "replay.png")[0] == 2
    assert (tmp_path / "replay.png").read_bytes() == b"drawn"


def test_a_result_is_taken_wherever_a_placement_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, placement, result = write_inputs(tmp_path), tmp_path / "p.json", tmp_path / "r.json"
    assert gemopt(capsys, "solve", *inputs, "--solver", "lpt", "-o", placement, "--result", result)[0] == 0
    assert Placement.load(result) == Placement.load(placement)
    for words in (
        ("evaluate", "IT", *inputs, "--json"),
        ("export", "IT", "--to", "csv", "-o", tmp_path / "map.csv", "--json"),
        ("apply", "IT", "--dry-run", "--current", "IT", "--json"),
    ):
        told = [gemopt(capsys, *(path if word == "IT" else word for word in words)) for path in (placement, result)]
        assert told[0][0] == 0 and told[0][:2] == told[1][:2], words
    for option in ("--current", "--warm-start"):
        assert gemopt(capsys, "solve", *inputs, option, result, "--patience", 0)[0] == 0
    assert gemopt(capsys, "compare", *inputs, "--current", result, "--moves", "--patience", 0)[0] == 0
    (tmp_path / "steps").mkdir()
    watch = ("watch", tmp_path / "steps", "--profile", inputs[0], "--placement", result, "--once")
    code, _, err = gemopt(capsys, *watch)
    assert code == 2 and "it is a result of gemopt, which would be lost" in err
    assert gemopt(capsys, *watch, "-o", tmp_path / "next.json")[0] == 0


@pytest.mark.parametrize("given", ["", "-o p.json", "--result r.json"])
def test_what_is_saved_in_a_result_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    words = [tmp_path / word if "." in word else word for word in given.split()]
    out = gemopt(capsys, "solve", *write_inputs(tmp_path), "--solver", "lpt", *words)[1]
    assert ("not saved: give -o placement.json" in out) == (not given)


def test_what_holds_no_placement_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, path = write_inputs(tmp_path), tmp_path / "r.json"
    shown = gemopt(capsys, "solve", *inputs, "--solver", "lpt", "--json")[1]
    for content, said in (
        (shown, "got what solve --json prints; a placement is needed; solve -o writes its placement"),
        ('{"solver": "lpt", "stopped_by": "proof", "per_layer": [], "status": "infeasible", "placement": null}',
         "got a result without one, infeasible; a placement is needed"),
    ):  # fmt: skip
        path.write_text(content)
        assert gemopt(capsys, "evaluate", path, *inputs) == (2, "", f"gemopt: {path}: {said}\n")


def test_no_output_waits_for_a_pipe(tmp_path: Path) -> None:
    """What is no file, as /dev/stdout of a pipeline, is refused, and not read to see what it holds."""
    os.mkfifo(tmp_path / "pipe")
    reader, writer = os.pipe()
    for path in (tmp_path / "pipe", Path(f"/dev/fd/{reader}")):
        with pytest.raises(InputError, match="no regular file"):
            check_outputs(("--output", path, "placement"))
        assert foreign.of_file(path) == ("", "")
    os.close(reader)
    os.close(writer)
    with pytest.raises(InputError, match="got -; the name of a file; --json prints"):
        check_outputs(("--output", Path("-"), "placement"))
