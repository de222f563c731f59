"""`gemopt watch` on the command line: one look, its options, what is refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt
from watched import EXPERTS, LAYERS, RANKS, contiguous, filled, grow, traffic

from gemopt import Placement, Traces
from gemopt.cli.watch import _reader
from gemopt.online.follow import Follower
from gemopt.online.sole import sole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code, and all that was said."""

    def command(*more: str) -> tuple[int, str]:
        words = ["watch", folder / "traces", "--profile", folder / "profile.json"]
        words += ["--placement", folder / "placement.json", "--once", *more]
        code, out, err = gemopt(capsys, *words)
        return code, out + err

    return command


def test_command_line(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    handler = signal.getsignal(signal.SIGINT)
    state = folder / "state.safetensors"
    code, output = run("--to", "sglang", "--to", "trtllm=" + str(folder / "lb.yaml"), "--state", str(state))
    assert code == 0, output
    assert "moved: " in output
    table = json.loads((folder / "placement.sglang.json").read_text())["physical_to_logical_map"]
    assert table == Placement.load(folder / "placement.json").physical_to_logical.tolist()
    assert (folder / "lb.yaml").exists()
    code, output = run("--state", str(state), "-o", str(folder / "new.json"))
    assert code == 0, output
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C of who called is as before"


def test_a_policy_in_another_unit_is_said(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    (folder / "policy.json").write_text(json.dumps({"bytes_per_s": 50, "expert_bytes": 9.4}))
    code, output = run("--policy", str(folder / "policy.json"), "-o", str(folder / "new.json"))
    assert code == 0 and "note: experts copied at 5e-08 GB/s, 50 bytes per second: is the unit right?" in output
    assert "note: an expert of 9.4 bytes" in output


def test_one_look_reads_an_engines_files(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    np.save(folder / "traces" / "counts.npy", traffic(hot=0).counts)
    code, output = run("--from", "array", "--interval", "0.05")
    assert code == 0 and "moved: " in output, output


def test_what_an_import_notes_is_said_once(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    counts = traffic(hot=0).counts * 4  # as counted by four ranks
    lists = json.dumps({"note": "x", "counts": counts.tolist()})
    (folder / "traces" / "load.json").write_text(lists)
    code, output = run("--from", "array", "--interval", "0.05")
    assert code == 0 and output.count("note: all counts are multiples of 4") == 1, output
    assert "note: load.json: note left unread" in output
    read, _ = _reader("array", None, Placement.load(folder / "placement.json"))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemopt.cli.watch._log", said.append)
        for name in ("a_1.json", "a_2.json"):
            (folder / name).write_text(lists)
            read([folder / name])
    assert len([note for note in said if "multiples" in note]) == 1
    assert len([note for note in said if "left unread" in note]) == 1, "whatever the numbers"


def test_ranks_that_dump_later_are_waited_for(folder: Path) -> None:
    """Rank 0 of three writes its file some looks before the others: alone it would be a third of the traffic."""
    pytest.importorskip("torch")
    from recordings import physical_counts, write_passes

    counts, table, truth = physical_counts(np.random.default_rng(0), dense=0)
    (dumps := folder / "dumps").mkdir()
    read, suffixes = _reader("sglang", 3, Placement.contiguous(truth.shape[1], truth.shape[2], 3))
    follower = Follower(dumps, read, suffixes=suffixes)
    write_passes(dumps, 100.0, 0, counts[0], table=table)
    assert [follower.look().traces for _ in range(3)] == [None] * 3
    for rank in (1, 2):
        write_passes(dumps, 100.0, rank, counts[rank], table=table)
    traces = [found for _ in range(3) if (found := follower.look().traces) is not None]
    assert len(traces) == 1
    np.testing.assert_array_equal(traces[0].counts, truth)


def test_one_look_says_what_it_does_not_read(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    np.save(folder / "traces" / "counts.npy", traffic(hot=0).counts)
    code, output = run("--from", "csv", "--interval", "0.05")
    assert code == 1 and "counts.npy; dumps end in .csv" in output and "no steps yet" in output, output


def test_one_look_that_fails_ends_with_an_error(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    code, output = run("--on-change", "false")
    assert code == 1 and "failed: " in output, output


def test_what_an_engine_cannot_take_is_refused_at_the_start(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    Placement.contiguous(LAYERS, EXPERTS, RANKS).save(folder / "placement.json")
    grow(folder, 0, traffic(hot=0))
    code, output = run("--to", "sglang")
    assert code == 2 and "num_hidden_layers" in output, output


def test_command_line_with_bad_input(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    policy = folder / "policy.json"
    policy.write_text('{"dead_zone": 0.5}')
    for words, said in [
        (["--policy", str(policy)], "dead_zone"),
        (["--to", "nobody"], "engine"),
        (["--on-change", "'"], "--on-change"),
        (["--on-change", "''"], "a command that can be run"),
        (["--on-change", "no-such-command {placement}"], "a command that can be run"),
        (["-o", "/no/such/folder/x.json"], "no such folder"),
        (["--from", "nobody"], "engine"),
        (["--from", "vllm-ascend"], "it records no loads"),
        (["--state", str(folder / "placement.json")], "--placement"),
        (["--state", "/no/such/folder/state"], "no such folder"),
        (["-o", str(folder / "profile.json")], "--profile"),
        (["--to", "sglang=" + str(folder / "placement.json")], "--placement"),
        (["--interval", "inf"], "--interval"),
        (["--ep", "4"], "--from"),
    ]:
        code, output = run(*words)
        assert code == 2, output
        assert said in output


def test_nearest_copies_are_followed_once_it_is_said_who_sends(
    folder: Path, run: Callable[..., tuple[int, str]]
) -> None:
    rows = np.tile(np.append(np.arange(EXPERTS).reshape(RANKS, -1), [[8], [12], [0], [4]], axis=1).ravel(), (LAYERS, 1))
    fields = {"slots_per_rank": [EXPERTS // RANKS + 1] * RANKS, "num_experts": EXPERTS, "split": "nearest"}
    Placement(physical_to_logical=rows, num_hidden_layers=LAYERS, **fields).save(folder / "placement.json")
    grow(folder, 0, traffic(hot=0))
    code, output = run()
    assert code == 2 and "--senders uniform" in output, output
    code, output = run("--senders", "uniform", "--port", "0")
    assert code == 0 and "moved: " in output and "warning" not in output, output
    assert Placement.load(folder / "placement.json").split == "nearest"


def test_steps_of_other_layers_are_refused(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, Traces(counts=traffic(hot=0).counts, layer_ids=(3, 4)))
    code, output = run()
    assert code == 1 and "warning: Placement.layer_ids" in output, output
    assert Placement.load(folder / "placement.json") == contiguous()


def test_two_watches_of_one_file_are_refused(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    grow(folder, 0, traffic(hot=0))
    with sole(folder / "placement.json"):
        code, output = run()
        assert code == 2 and "a file that another watch writes" in output, output
        code, output = run("-o", str(folder / "other.json"))
        assert code == 0, output
    for option in ("--state", "--to"):
        with sole(folder / "held.json"):
            code, output = run(option, f"{'sglang=' if option == '--to' else ''}{folder / 'held.json'}")
            assert code == 2 and "a file that another watch writes" in output, output
    assert run()[0] == 0


def test_a_restart_learns_nothing_twice(folder: Path, run: Callable[..., tuple[int, str]]) -> None:
    for number in range(3):
        grow(folder, number, traffic(hot=0, seed=number))
    state = folder / "state"
    run("--state", str(state))
    saved = state.read_bytes()
    code, output = run("--state", str(state))
    assert code == 0 and "no new steps" in output and state.read_bytes() == saved, output
    grow(folder, 3, traffic(hot=1))
    code, output = run("--state", str(state))
    assert code == 0 and "moved: " in output, output


def test_a_restart_goes_on_from_what_was_put_into_a_file_of_its_own(
    folder: Path, run: Callable[..., tuple[int, str]]
) -> None:
    grow(folder, 0, traffic(hot=0))
    new, words = folder / "new.json", ("-o", str(folder / "new.json"), "--state", str(folder / "state"))
    run(*words)
    first = Placement.load(new)
    assert Placement.load(folder / "placement.json") == contiguous() != first
    grow(folder, 1, traffic(hot=0, seed=1))
    code, output = run(*words)
    assert code == 0 and f"goes on from {new}" in output and "kept: " in output, output
    assert Placement.load(new) == first
    code, output = run("-o", str(new))
    assert code == 0 and f"warning: {new}: holds another placement" in output, output
