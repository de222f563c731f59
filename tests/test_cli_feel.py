"""What every command has in common: help with examples, --version, --quiet, --verbose, colours, narrow terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json, write_inputs
from rich.console import Console
from rich.table import Table

import gemopt as package
from gemopt import Placement
from gemopt.cli.app import PANELS
from gemopt.cli.demo import cases
from gemopt.cli.progress import TimeLeft, layers_table
from gemopt.cli.stacked import stacked
from gemopt.compare import Comparison
from gemopt.evaluate import evaluate
from gemopt.plotting import plot_comparison
from gemopt.result import MovesReport, Status, StoppedBy
from gemopt.solvers import names
from gemopt.solving.layers import Standing
from gemopt.words import gathered, short

pytestmark = pytest.mark.usefixtures("quick_bounds")


def commands() -> dict[str, Any]:
    """Every command by its words; groups that do something by themselves too."""
    from gemopt.cli import load
    from gemopt.cli.app import make

    load()
    found: dict[str, Any] = {}

    def walk(words: tuple[str, ...], command: Any) -> None:
        inner = getattr(command, "commands", {})
        if words and (not inner or getattr(command, "invoke_without_command", False)):
            found[" ".join(words)] = command
        for name, each in inner.items():
            walk((*words, name), each)

    walk((), make())
    return found


def lines(epilog: str | None) -> list[str]:
    return [line.strip() for line in (epilog or "").split("\n") if line.strip() and not line.startswith("Example")]


COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name: str) -> None:
    examples = lines(COMMANDS[name].epilog)
    assert examples, f"gemopt {name} shows no example"
    for line in examples:
        words = shlex.split(line)
        words = words[words.index("gemopt") + 1 :]
        assert words[: len(name.split())] == name.split(), line
        command = COMMANDS[name]
        command.make_context(name, words[len(name.split()) :], resilient_parsing=False).close()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_are_of_one_style(name: str) -> None:
    for parameter in COMMANDS[name].params:
        text = getattr(parameter, "help", None)
        if parameter.name == "help":
            continue
        assert text, f"gemopt {name}: {parameter.name} has no help"
        assert not text.endswith("."), (name, parameter.name, text)
        first = re.match(r"[A-Za-z]+", text)
        assert first is None or not (first[0][0].isupper() and first[0][1:].islower()), (name, parameter.name, text)
        if parameter.name == "as_json":
            assert text == "JSON on standard output"


def test_help_shows_every_command_under_a_head(capsys: pytest.CaptureFixture[str]) -> None:
    out = gemopt(capsys, "--help")[1]
    heads = [out.index(f"─ {panel} ─") for panel in PANELS]
    assert heads == sorted(heads) and "─ Commands ─" not in out, "a new command goes into PANELS"
    assert {name.split()[0] for name in COMMANDS} == {name for names in PANELS.values() for name in names}


def test_help_lists_the_solvers() -> None:
    from gemopt.cli.options import SOLVERS

    assert set(re.findall(r"[a-z][\w-]+", SOLVERS)) == set(names())


def test_version_and_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--version", "-V"):
        assert gemopt(capsys, option) == (0, f"gemopt {package.__version__}\n", "")
    for name, value in {"_GEMOPT_COMPLETE": "complete_bash", "COMP_WORDS": "gemopt so", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = gemopt(capsys)
    assert code == 0 and out.split() == ["solve"]
    for typed, offered in (("solve --solver mi", ["milp"]), ("export p.json --to sg", ["sglang"])):
        monkeypatch.setenv("COMP_WORDS", f"gemopt {typed}")
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
        assert gemopt(capsys)[1].split() == offered


def test_quiet_leaves_errors_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    words = ("solve", *inputs, "--solver", "lpt", "-o", tmp_path / "p.json")
    assert gemopt(capsys, *words, "--quiet") == (0, "", "") == gemopt(capsys, "-q", *words)
    assert Placement.load(tmp_path / "p.json").num_ranks == 2
    assert "wrote" in gemopt(capsys, *words)[1], "quiet is of one command only"
    assert "objective" in gemopt(capsys, "evaluate", tmp_path / "p.json", *inputs, "-q")[1]
    assert json.loads(gemopt(capsys, *words, "--quiet", "--json")[1])["solver"] == "lpt"
    code, out, err = gemopt(capsys, "solve", inputs[1], inputs[0], "--quiet")
    assert (code, out) == (2, "") and err.startswith("gemopt: ")


def test_verbose_says_what_was_read_and_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    _, plain, silent = gemopt(capsys, "solve", *inputs, "--solver", "lpt")
    _, out, err = gemopt(capsys, "solve", *inputs, "--solver", "lpt", "--verbose")
    assert silent == "" and out.splitlines()[0] == plain.splitlines()[0]
    assert "12 steps, 2 layers, 4 experts" in err and "layer 1: " in err


def in_a_terminal(words: list[str], **env: str) -> str:
    """What a command writes when it sees a terminal."""
    master, slave = pty.openpty()
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(words, stdout=slave, stderr=slave, env={**base, "TERM": "xterm-256color", **env})
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(master)
    return shown.decode(errors="replace")


def test_no_color_is_honoured() -> None:
    words = [sys.executable, "-m", "gemopt", "solve", "--help"]
    colours = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38|9[0-7])[0-9;]*m")
    assert colours.search(in_a_terminal(words))
    plain = in_a_terminal(words, NO_COLOR="1")
    assert not colours.search(plain) and "--time-limit" in re.sub(r"\x1b\[[0-9;]*m", "", plain)


def test_layers_are_shown_while_they_are_solved_on_terminals_only(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "gemopt", "solve", *map(str, write_inputs(tmp_path)), "--time-limit", "2"]
    more = ["--solver", "local-search", "--slots-per-rank", "3"]
    live, quiet = in_a_terminal([*words, *more]), in_a_terminal([*words, *more, "--quiet"])
    assert "gap %" in live and " all" in live and "of 2 s" in live
    assert "gap %" not in quiet and " all" not in quiet


def test_the_table_of_layers_shows_what_is_open() -> None:
    layers = [Standing(100.0, 90.0), Standing(200.0, 100.0), Standing(None, 0.0), Standing(50.0, 50.0)]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(layers_table("auto", layers, [3, 4, 5, 6], 10, 2))
    shown = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["4", "20.00", "10.00", "50.00"] in shown and ["5", "-", "-", "-"] in shown
    assert ["..."] in shown and ["all", "-", "24.00", "-"] in shown and not any(line[:1] == ["3"] for line in shown)
    console.print(layers_table("auto", [layers[0], layers[3]], [3, 6], 10, 9))
    assert "all 15.00 14.00 6.67" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_tables_of_narrow_terminals_lose_nothing() -> None:
    table = Table("solver", "total\nms", "held\nout %")
    table.add_row("local-search", "1301", "-10.5")
    table.add_row("eplb-hierarchical", "1422", "-2.2", style="bold")
    table.add_row("cpsat", "-", "")
    table.caption = "a note of many words that is wrapped rather than cut off"

    def shown(width: int, table: Table = table) -> str:
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(stacked(table, console) or table)
        return console.file.getvalue()

    assert "━" in shown(80) and "total" in shown(80)
    narrow = shown(24)
    assert "…" not in narrow and all(len(line.rstrip()) <= 24 for line in narrow.splitlines())
    for text in ("local-search", "1301", "-10.5", "eplb-hierarchical", "1422"):
        assert text in narrow
    assert "total\u00a01301\u00a0ms" in narrow and "held\u00a0out\u00a0-10.5\u00a0%" in narrow and "wrapped" in narrow
    assert "total\u00a0-" in narrow and "-\u00a0ms" not in narrow
    pairs = Table(show_header=False)
    pairs.add_row("objective", "2505.3 ms over 939 steps, 2668.0 us per step")
    lines = [line.strip() for line in shown(40, pairs).splitlines()]
    assert lines == ["objective", "2505.3 ms over 939 steps, 2668.0 us", "per step"]


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_cuts_no_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert "…" not in gemopt(capsys, *name.split(), "--help")[1]


@pytest.mark.parametrize("words", [("engines",), ("compare", "--solvers", "linear,lpt", "--time-limit", "1")])
def test_commands_fit_forty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    inputs = write_inputs(tmp_path) if words[0] == "compare" else ()
    _, out, _ = gemopt(capsys, words[0], *inputs, *words[1:])
    assert "…" not in out
    if words[0] == "compare":
        assert "lpt" in out and all(len(line.rstrip()) <= 40 for line in out.splitlines())
    else:
        assert "export\u00a0yes" in out and "copies\u00a0yes" in out


def test_time_left_is_never_more_than_the_limit_leaves() -> None:
    class Work:
        total, elapsed, time_remaining, finished = 10, 4.0, None, False

    assert TimeLeft(10.0).render(Work()).plain == "0:06 left"
    Work.time_remaining = 100.0
    assert TimeLeft(10.0).render(Work()).plain == "0:06 left" and TimeLeft().render(Work()).plain == "1:40 left"
    Work.finished = True
    assert TimeLeft().render(Work()).plain == ""


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = gemopt_json(capsys, "doctor")
    assert found["gemopt"]["version"]["found"] == package.__version__
    assert set(found["solvers"]) == set(names()) and found["solvers"]["cpsat"]["state"] == "ok"
    assert found["packages"]["numpy"]["found"] == np.__version__
    assert "extra" not in found["packages"]["ortools"]["found"], "the core brings it"
    assert "(extra exact)" in found["packages"]["highspy"]["found"]
    assert {"cores", "throttling"} <= set(found["machine"])
    monkeypatch.setitem(sys.modules, "ortools", None)
    for name in [each for each in sys.modules if each.startswith(("ortools.", "gemopt.solvers.exact.cpsat"))]:
        monkeypatch.delitem(sys.modules, name)
    found = gemopt_json(capsys, "doctor")
    assert found["solvers"]["cpsat"]["state"] == "missing" and "gemopt[exact]" in found["solvers"]["cpsat"]["hint"]
    code, out, _ = gemopt(capsys, "doctor")
    assert code == 0 and "- cpsat" in out and "pip install 'gemopt[exact]'" in out


def rows(solvers: list[str]) -> list[Comparison]:
    known: dict[str, Any] = {"status": Status.FEASIBLE, "stopped_by": StoppedBy.PROOF, "seconds": 1.0, "gap": 0.1}
    return [
        Comparison(solver=name, objective_us=1e6 * (1 - i / 50), change=-i / 50, bound_us=9e5, holdout_us=1e6,
                   holdout_change=0.005 - i / 50, p50_us=1.0, p90_us=2.0, p99_us=3.0, **known)
        for i, name in enumerate(solvers)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_nothing_in_the_comparison_is_drawn_over_something_else(count: int) -> None:
    ax = getattr(plot_comparison(rows(names()[:count])), "axes", None)
    ax = ax[0] if isinstance(ax, list) else ax
    figure = ax.figure
    figure.canvas.draw()
    texts = [text for text in ax.texts if text.get_text()]
    if count == 1:
        assert [text.get_text() for text in texts] == ["only contiguous placement: nothing to compare"]
        return
    renderer = figure.canvas.get_renderer()
    legend, label = ax.get_legend(), ax.xaxis.label
    boxes = [part.get_window_extent(renderer) for part in (*texts, legend, label, *ax.get_xticklabels())]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :]), "labels collide"
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 for box in boxes)


def test_demo_files_are_what_the_first_commands_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gemopt(capsys, "demo", "--files", tmp_path)
    assert code == 0 and "wrote" in out
    inputs = (tmp_path / "profile.json", tmp_path / "traces.safetensors")
    assert gemopt(capsys, "solve", *inputs, "--solver", "lpt", "-o", tmp_path / "placement.json")[0] == 0
    code, out, _ = gemopt(capsys, "export", tmp_path / "placement.json", "--to", "sglang", "-o", tmp_path / "map.json")
    assert code == 0 and "--ep 8" in out, "the shipped traces say how many decoder layers there are"
    before = (tmp_path / "profile.json").read_bytes()
    code, _, err = gemopt(capsys, "demo", "--files", tmp_path)
    assert code == 2 and err.count("\n") == 1 and (tmp_path / "profile.json").read_bytes() == before


def test_what_the_demo_places_by_was_measured_at_its_loads() -> None:
    for case in cases():
        steps, ranks = case.traces.steps(slice(0, 200)), case.profile.num_ranks
        in_order = Placement.contiguous(steps.num_layers, steps.num_experts, ranks)
        assert evaluate(in_order, case.profile, steps).outside == 0, case.title


def test_a_kernel_table_says_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("tokens,latency_us\n8,10\n64,20\n")
    words = ("profile", "import", tmp_path / "t.csv", "--unit", "tokens", "--top-k", "2", "--ranks", "4")
    found = gemopt_json(capsys, *words, "--model", "net", "--expert-bytes", "1000", "-o", tmp_path / "p.json")
    assert found == {"output": str(tmp_path / "p.json"), "devices": 4, "samples": 8}
    shape = package.Profile.load(tmp_path / "p.json").model
    assert (shape.name, shape.expert_bytes, shape.top_k) == ("net", 1000, 2)


def test_large_sizes_are_said_without_an_exponent() -> None:
    """`1.29e+03 GB` was."""
    known: dict[str, Any] = dict.fromkeys(MovesReport.model_fields, 0.0) | {"per_layer": [], "into_rank": []}
    known |= {"moves": 30000, "bytes": 1_290_000_000_000, "from_checkpoint": {}, "old_rank": []}
    assert "30000 moves (1290 GB)" in MovesReport(**known).summary(1)
    assert [short(each, 2) for each in (332.4, 0.476, 0.0)] == ["330", "0.48", "0"]


def test_notes_of_layers_that_differ_in_numbers_are_one() -> None:
    left = [f"{n} of 496 contents of a rank may be part of a better placement" for n in (7, 11, 7, 3)]
    ticks = [f"CP-SAT counts in steps of {tick} us" for tick in ("1e-03", "1e-04", "1e-04")]
    assert gathered([*left, *ticks, "layer 3.5"]) == [
        ("3 to 11 of 496 contents of a rank may be part of a better placement", 4),
        ("CP-SAT counts in steps of 1e-03 us", 1),
        ("CP-SAT counts in steps of 1e-04 us", 2),
        ("layer 3.5", 1),
    ]
