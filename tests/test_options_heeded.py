"""Options whose effect somebody waits for in vain are refused in one line; those that change nothing here are taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, write_inputs
from kernel_tables import written
from watched import filled

from gemopt import Placement, Traces

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("solve {p} {t} --solver nobody", "solver: got nobody"),
        ("solve {p} {t} --time-limit -1", "time_limit: got -1"),
        ("solve {p} {t} --gap 2", "gap: got 2"),
        ("solve {p} {t} --split odd", "split: got odd"),
        ("solve {p} {t} --senders uniform", "senders: got uniform; the even split does not ask"),
        ("solve {p} {t} --cost cubic", "cost model: got cubic"),
        ("solve {p} {t} --phase lunch", "--phase: got lunch"),
        ("solve {p} {t} --slots-per-rank many", "--slots-per-rank: got many"),
        ("solve {p} {t} --memory-budget all", "--memory-budget: got all"),
        ("solve {p} {t} --memory-budget 9 --current {p}", "memory_budget: got 9"),
        ("solve {p} {t} --memory-budget 9 --topology nvlink-2", "topology: got with memory_budget"),
        (
            "solve {p} {t} --max-moves 3",
            "max_moves: got 3; moves are counted from the placement in force; give --current",
        ),
        (
            "solve {p} {t} --expert-bytes 9.5",
            "--expert-bytes: got 9.5; a whole number of bytes, such as 9400000 or 9.4e6",
        ),
        ("solve {p} {t} --current {p} --expert-bytes nan", "--expert-bytes: got nan"),
        ("solve {p} {t} --compute-slack 0.1", "compute_slack: got 0.1"),
        ("solve {p} {t} --solver lpt --rules {r}", "rules: got apart[0]; lpt cannot keep rules"),
        ("solve {p} {t} --solver lpt --warm-start {p}", "warm_start: got lpt; a solver that starts from"),
        ("solve {p} {t} --certificate {d}/c.json --current {p}", "certificate: got current"),
        ("compare {p} {t} --phase lunch", "--phase: got lunch"),
        ("compare {p} {t} --gap 2", "gap: got 2"),
        ("compare {p} {t} --cost cubic", "cost model: got cubic"),
        ("compare {p} {t} --slots-per-rank many", "--slots-per-rank: got many"),
        ("compare {p} {t} --holdout 2", "holdout: got 2"),
        ("evaluate {p} {p} {t} --cost cubic", "cost model: got cubic"),
        ("evaluate {p} {p} {t} --senders odd", "senders: got odd"),
        ("trace import {t} --from vllm --ep 4 -o {d}/o.safetensors", "--ep: got 4; vllm has no recordings that ranks"),
        ("trace import {t} --from tokens --ep 4 -o {d}/o.safetensors", "--ep: got 4; tokens has no recordings that"),
    ],
)
def test_options_are_refused_before_what_takes_long_to_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    """The traces are no traces: whoever reads them says so."""
    profile, traces = write_inputs(tmp_path)
    Path(traces).write_bytes(b"not yet")
    (rules := tmp_path / "rules.json").write_text('{"schema_version": 1, "apart": [{"experts": [0, 1]}]}')
    code, _, err = gemopt(capsys, *words.format(p=profile, t=traces, d=tmp_path, r=rules).split())
    assert code == 2 and said in err and err.count("\n") == 1, err


def test_ranks_of_dumps_that_no_rank_writes_are_refused_before_a_watch_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = filled(tmp_path)
    words = ["watch", folder / "traces", "--profile", folder / "profile.json", "--placement", folder / "placement.json"]
    code, _, err = gemopt(capsys, *words, "--from", "vllm", "--ep", "4", "--once")
    assert code == 2 and "--ep: got 4; vllm has no recordings that ranks write apart" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("solve {p} {t} --threads 99999999999999999999", "threads: got 99999999999999999999; a whole number of at"),
        ("compare {p} {t} --threads 99999999999999999999", "threads: got 99999999999999999999; a whole number of"),
        ("compare {p} {t} --solvers=", "solver: got "),
        ("trace import {n} --from array --top-k 99999999999999999999 -o {d}/q", "--top-k: got 99999999999999999999;"),
        ("profile import {c} --ranks 99999999999999999999 -o {d}/q", "'--ranks': got 99999999999999999999; input"),
        ("profile import {c} --top-k 99999999999999999999 -o {d}/q", "'--top-k': got 99999999999999999999; input"),
        ("profile import {c} --ranks 2 --repeat-column= -o {d}/q", "--repeat-column: got nothing; a name"),
        ("profile import {c} --ranks 2 --time-column= -o {d}/q", "--time-column: got nothing; a name"),
        ("profile import {c} --ranks 2 --fleet= -o {d}/q", "--fleet: got nothing; a name"),
        ("apply {m} --dry-run --expert-bytes 99999999999999999999", "'--expert-bytes': got 99999999999999999999"),
        ("apply {m} --layout foo", "'--layout': got foo; one of 'shared', 'own'; see gemopt apply --help"),
        ("watch {d} --profile {p} --placement {m} --interval=", "'--interval': got nothing; input should be a valid"),
        ("placement import  --from vllm -o {d}/q", "PATH: got .; a file with a placement"),
        ("placement import {m} --from vllm --num-experts 7 -o {d}/q", "--num-experts: got 7; 8, as "),
        ("placement import {m} --from vllm --ep 3 -o {d}/q", "--ep: got 3; 2, as "),
        ("placement import {m} --from vllm --layer-ids 3-4 -o {d}/q", "--layer-ids: got [3, 4]; [0, 1], as "),
        ("placement import {m} --from vllm --num-hidden-layers 9 -o {d}/q", "--num-hidden-layers: got 9; 2, as "),
    ],
)
def test_values_that_cannot_be_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    """They ended in tracebacks, were ignored, or took all memory."""
    profile, traces = write_inputs(tmp_path)
    np.save(tmp_path / "counts.npy", Traces.load(traces).counts)
    Placement.contiguous(2, 8, 2, num_hidden_layers=2).save(tmp_path / "m.json")
    names = {"p": profile, "t": traces, "c": written(tmp_path, TABLE), "n": tmp_path / "counts.npy"}
    code, _, err = gemopt(capsys, *words.format(d=tmp_path, m=tmp_path / "m.json", **names).split(" "))
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "q").exists()


def test_bytes_of_an_expert_are_typed_as_rates_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, traces = write_inputs(tmp_path)
    Placement.contiguous(2, 4, 2).save(tmp_path / "m.json")
    words = ["solve", profile, traces, "--solver", "local-search", "--patience", 0, "--current", tmp_path / "m.json"]
    found = []
    for size in ("13e6", "13000000"):
        path = tmp_path / f"{size}.json"
        assert gemopt(capsys, *words, "--bandwidth", 20, "--expert-bytes", size, "--result", path)[0] == 0
        found.append(json.loads(path.read_text())["moves"])
    assert found[0] == found[1] and found[0]["move_us"] == pytest.approx(650)


def test_what_a_placement_of_ours_leaves_out_may_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Placement.contiguous(2, 8, 2).save(tmp_path / "m.json")
    words = ["placement", "import", tmp_path / "m.json", "--from", "vllm", "--num-hidden-layers", 5, "--model", "ours"]
    assert gemopt(capsys, *words, "--num-experts", 8, "-o", tmp_path / "q.json")[0] == 0
    found = Placement.load(tmp_path / "q.json")
    assert (found.num_hidden_layers, found.model, found.num_experts) == (5, "ours", 8)
