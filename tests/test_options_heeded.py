"""Options whose effect somebody waits for in vain are refused in one line; those that change nothing here are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_inputs import gemopt, write_inputs
from kernel_tables import written

pytestmark = pytest.mark.usefixtures("quick_bounds")

TABLE = "assignments,time_us\n1,50\n2,51\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare {p} {t} --solvers lpt,lpt", "--solvers: got lpt,lpt; each of them once"),
        ("watch {d} --profile {p} --placement {p} --once --host 0.0.0.0", "--host: got 0.0.0.0; where to serve"),
        ("profile import {c} --ranks 2 --seed 5 -o {d}/q.json", "--seed: got 5; draws devices from --speeds"),
        ("profile import {c} --memory-fleet hbm -o {d}/q.json", "--memory-fleet: got hbm; read from --speeds"),
    ],
)
def test_options_that_cannot_do_their_work_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    profile, traces = write_inputs(tmp_path)
    table = written(tmp_path, TABLE)
    typed = words.format(p=profile, t=traces, d=tmp_path, c=table).split()
    code, _, err = gemopt(capsys, *typed)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        "compare {p} {t} --solvers lpt --patience 1 --gap 0.1 --time-limit 5",
        "replay {t} --profile {p} --window 2 --strategies contiguous --gbps 5 --noise 0.1",
        "solve {p} {t} --solver lpt --seed 7",
    ],
)
def test_options_that_change_nothing_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    profile, traces = write_inputs(tmp_path)
    assert gemopt(capsys, *words.format(p=profile, t=traces).split())[0] == 0
