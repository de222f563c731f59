"""The commands as their user runs them: export, engines, placement import, trace import; wrong input included."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_inputs import gemopt

from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.formats.engine import Facts
from gemopt.formats.engines.deepseek_eplb import tensors
from gemopt.formats.registry import export, import_placement, side_path
from gemopt.placement import Placement
from gemopt.profile import Device, Profile, Sample
from gemopt.traces import Traces

UUIDS = ["GPU-a", "GPU-b"]


@pytest.fixture
def run(capsys):
    def call(*words, code=0):
        ended, out, err = gemopt(capsys, *words)
        assert ended == code, err
        if code:
            assert err.count("\n") == 1, err
            assert "Traceback" not in err
        return err if code else out

    return call


@pytest.fixture
def files(tmp_path):
    """A placement with unequal slots, one with equal slots, a profile and traces."""
    common = {"num_experts": 6, "num_hidden_layers": 3, "layer_ids": [1, 2], "device_uuids": UUIDS, "model": "m"}
    rows = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    Placement(physical_to_logical=rows, slots_per_rank=[3, 3], **common).save(tmp_path / "equal.json")
    Placement(physical_to_logical=rows, slots_per_rank=[4, 2], **common).save(tmp_path / "unequal.json")
    samples = [Sample(assignments=n, latency_us=10.0 + n) for n in (1, 100, 1000)]
    slower = [Sample(assignments=n, latency_us=10.0 + 3 * n) for n in (1, 100, 1000)]
    devices = [Device(rank=0, samples=samples, uuid="GPU-a"), Device(rank=1, samples=slower, uuid="GPU-b")]
    Profile(devices=devices).save(tmp_path / "profile.json")
    counts = np.random.default_rng(0).integers(1, 99, (4, 2, 6))
    Traces(counts=counts, layer_ids=(1, 2), num_hidden_layers=3).save(tmp_path / "traces.safetensors")
    return tmp_path


def test_export_prints_the_launch_command_and_the_devices(run, files):
    out = run("export", files / "equal.json", "--to", "sglang", "-o", files / "map.json", "--ep", 2)
    assert f"--init-expert-location {files / 'map.json'}" in out
    assert "--ep 2 " in out
    assert "ranks: 0 = GPU-a, 1 = GPU-b" in out
    assert len(json.loads((files / "map.json").read_text())["physical_to_logical_map"]) == 3


def test_export_as_json(run, files):
    told = json.loads(run("export", files / "equal.json", "--to", "vllm", "-o", files / "p.json", "--json"))
    assert told["files"] == [str(files / "p.json")]
    assert told["command"].startswith(f"GEMOPT_PLACEMENT={files / 'p.json'} vllm serve m ")
    assert told["devices"] == UUIDS


def test_prefill_and_decode_export_as_a_pair(run, files):
    words = ["export", files / "equal.json", "--decode", files / "equal.json", "--to", "sglang", "-o", files / "m.pt"]
    told = json.loads(run(*words, "--json"))
    assert [report["role"] for report in told] == ["prefill", "decode"]
    for report in told:
        assert f"--disaggregation-mode {report['role']}" in report["command"]
        assert (files / f"m.{report['role']}.pt").exists()
    assert "decode:" in run(*words)


def test_a_pair_is_checked_before_the_first_is_written(run, files):
    words = ["--to", "tensorrt-llm", "-o", files / "m.yaml"]
    run("export", files / "equal.json", "--decode", files / "unequal.json", *words, code=2)
    assert not list(files.glob("m.*"))


def test_approximate_tells_what_it_costs(run, files):
    words = ["export", files / "unequal.json", "--to", "tensorrt-llm", "-o", files / "lb.yaml"]
    assert "--approximate" in run(*words, code=2)
    out = run(*words, "--approximate")
    assert "2 experts moved" in out
    out = run(*words, "--approximate", "--profile", files / "profile.json", "--traces", files / "traces.safetensors")
    run("placement", "import", files / "lb.yaml", "--from", "tensorrt-llm", "-o", files / "back.json")
    profile, traces = Profile.load(files / "profile.json"), Traces.load(files / "traces.safetensors")
    before, after = (
        evaluate(Placement.load(files / name), profile, traces).objective_us for name in ("unequal.json", "back.json")
    )
    assert f"the time of 4 steps by {after - before:+.1f} us" in out
    assert "both" in run(*words, "--approximate", "--profile", files / "profile.json", code=2)


def test_the_network_to_start_is_named_by_hand(run, files):
    words = ["export", files / "equal.json", "--to", "vllm", "-o", files / "p.json", "--json", "--model"]
    told = json.loads(run(*words, "/srv/M"))
    assert " vllm serve /srv/M " in told["command"] and told["changes"] == []
    told = json.loads(run(*words, "n"))
    assert " vllm serve n " in told["command"] and told["changes"] == ["warning: the placement is for m"]
    assert "--model" in run(*words, " ", code=2)


def test_devices_in_another_order(run, files):
    words = ["export", files / "equal.json", "--to", "csv", "-o", files / "p.csv"]
    out = run(*words, "--devices", "GPU-b,GPU-a")
    assert "rank 0 drives GPU-b, which was rank 1" in out
    run("placement", "import", files / "p.csv", "--from", "csv", "-o", files / "back.json")
    back = Placement.load(files / "back.json")
    assert back.physical_to_logical.tolist() == [[3, 4, 5, 0, 1, 2], [2, 1, 0, 5, 4, 3]]
    assert back.device_uuids == ["GPU-b", "GPU-a"]
    assert "GPU-c" in run(*words, "--devices", "GPU-a,GPU-c", code=2)


def test_devices_present_in_another_order(run, files, monkeypatch, capsys):
    monkeypatch.setattr("gemopt.formats.devices.present", lambda: ["b", "a"])
    told = json.loads(run("export", files / "equal.json", "--to", "csv", "-o", files / "p.csv", "--json"))
    assert told["changes"] == ["warning: the devices here are in another order; to follow them: --devices b,a"]


def test_export_refuses(run, files):
    good = files / "equal.json"
    for words, named in [
        ([good, "--to", "nonsense", "-o", files / "x.json"], "sglang"),
        ([good, "--to", "sglang", "-o", files / "x.json", "--ep", 4], "--ep"),
        ([good, "--to", "sglang", "-o", files / "x.json", "--num-hidden-layers", 9], "--num-hidden-layers"),
        ([good, "--to", "sglang", "-o", files / "x.yaml"], ".json"),
        ([good, "--to", "sglang", "-o", files / "absent" / "x.json"], "absent"),
        ([good, "--to", "checkpoint", "-o", files / "x"], "--source"),
        ([good, "--to", "checkpoint", "-o", files / "x", "--source", files, "--approximate"], "--approximate"),
        ([good, "--to", "vllm", "-o", files / "x.json", "--mtp-layers", 1], "mtp_layers: got 1"),
        ([good, "--to", "xllm", "-o", files / "x"], "sglang"),
        ([files / "absent.json", "--to", "sglang", "-o", files / "x.json"], "absent.json"),
        ([files / "profile.json", "--to", "sglang", "-o", files / "x.json"], "a placement is needed"),
        ([good, "--to", "sglang"], "--output"),
    ]:
        assert named in run("export", *words, code=2)
    assert not list(files.glob("x*"))


def test_engines(run):
    table = run("engines")
    rows = {row["name"]: row for row in json.loads(run("engines", "--json"))}
    assert all(name in table for name in rows)
    assert rows["sglang"]["dense_rows"]
    assert rows["sglang"]["splits"] == ["even", "nearest", "optimal"]
    assert rows["csv"]["unequal_slots"]
    assert rows["checkpoint"]["group_limits"]
    assert rows["checkpoint"]["writes"]
    assert not rows["vllm-ascend"]["traces"]
    assert not rows["xllm"]["writes"]


def test_trace_import(run, files):
    counts = np.random.default_rng(0).integers(0, 9, (5, 3, 6))
    np.save(files / "counts.npy", counts)
    out = run("trace", "import", files / "counts.npy", "--from", "array", "-o", files / "t.safetensors", "--top-k", 2)
    assert f"5 steps, 3 MoE layers (0 to 2), 6 experts, {counts.sum()} assignments" in out
    assert (Traces.load(files / "t.safetensors").counts == counts).all()
    words = ["trace", "import", files / "counts.npy", "--from", "array", "-o", files / "t.safetensors", "--json"]
    told = json.loads(run(*words))
    assert told["num_steps"] == 5
    assert told["layer_ids"] == [0, 1, 2]


def test_trace_import_refuses(run, files):
    np.save(files / "counts.npy", np.ones((2, 3, 4), np.int64))
    for words, named in [
        ([files / "absent.npy", "--from", "array"], "absent.npy"),
        ([files / "counts.npy", "--from", "sglang"], ".pt"),
        ([files / "counts.npy", "--from", "vllm-ascend"], "placement import"),
        ([files / "counts.npy", "--from", "array", "--layer-ids", "x"], "--layer-ids"),
        ([files / "counts.npy", "--from", "array", "--num-experts", 9], "--num-experts"),
        ([files / "counts.npy", "--from", "array", "--phase", "mixed"], "phase"),
        ([files, "--from", "tensorrt-llm"], "meta_info.json"),
    ]:
        assert named in run("trace", "import", *words, "-o", files / "out.safetensors", code=2)
    assert not (files / "out.safetensors").exists()
    bad = [files / "counts.npy", "--from", "array", "-o", files / "absent" / "out.safetensors"]
    assert "absent" in run("trace", "import", *bad, code=2)


def test_placement_import(run, files):
    run("export", files / "equal.json", "--to", "vllm-ascend", "-o", files / "map.json")
    out = run("placement", "import", files / "map.json", "--from", "vllm-ascend", "-o", files / "back.json")
    assert "2 layers, 6 experts in 6 slots on 2 ranks" in out
    assert Placement.load(files / "back.json") == Placement.load(files / "equal.json")
    for words, named in [
        ([files / "map.json", "--from", "array"], "placements of"),
        ([files / "map.json", "--from", "vllm-ascend", "--ep", 3], "--ep"),
        ([files / "absent.json", "--from", "sglang"], "absent.json"),
    ]:
        assert named in run("placement", "import", *words, "-o", files / "x.json", code=2)
    assert not (files / "x.json").exists()


@pytest.mark.parametrize("name", ["checkpoint", "transformers"])
def test_checkpoints_go_to_the_executor(run, files, monkeypatch, name):
    taken = []
    monkeypatch.setattr("gemopt.executor.checkpoint.export_checkpoint", lambda *given, **_: taken.append(given))
    monkeypatch.setattr("gemopt.executor.checkpoint.unnamed_weights", lambda source: ["mtp.safetensors"])
    out = run("export", files / "equal.json", "--to", name, "--source", files / "in", "-o", files / "out")
    assert taken == [(Placement.load(files / "equal.json"), files / "in", files / "out")]
    assert "2 expert-parallel ranks" in out and "mtp.safetensors left out" in out
    pair = ["--decode", files / "equal.json", "--to", name, "--source", files / "in", "-o", files / "out"]
    assert "--decode" in run("export", files / "equal.json", *pair, code=2)


def test_a_file_without_a_side_file_replaces_one_with_it(make_placement, tmp_path):
    first, second = (make_placement(layers=2, experts=8, ranks=2, seed=seed) for seed in (0, 1))
    path = tmp_path / "map.json"
    export(first, to="sglang", path=path)
    assert side_path(path).exists()
    assert export(second, to="vllm", path=path).files == (str(path),)
    assert not side_path(path).exists()
    assert import_placement(path, source="vllm") == second


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_placement_that_went_through_a_spreadsheet(make_placement, tmp_path, encoding):
    placement, notes = make_placement(layers=2, experts=8, ranks=2), []
    export(placement, to="csv", path=tmp_path / "p.csv")
    head, *rows = (tmp_path / "p.csv").read_text().split()
    lines = [f";{head.upper()};model".replace(",", ";")]
    lines += [f"{i};{row};m".replace(",", ".0;") for i, row in enumerate(rows[::-1])]
    (tmp_path / "q.csv").write_bytes("\r\n".join(["# of November", *lines, ";;;;;", ""]).encode(encoding))
    facts = Facts(num_hidden_layers=2, notes=notes)
    assert import_placement(tmp_path / "q.csv", source="csv", facts=facts) == placement
    assert notes == ["q.csv: model is m in all lines: left unread"]


def test_what_eplb_returns_saved_as_it_is(make_placement, tmp_path):
    torch = pytest.importorskip("torch")
    placement = make_placement(layers=2, experts=8, ranks=2, slots=5)
    tables = [torch.from_numpy(tensors(placement)[name]) for name in ("phy2log", "log2phy", "logcnt")]
    torch.save(tuple(tables), tmp_path / "p.pt")
    facts = Facts(num_ranks=2, num_hidden_layers=2)
    assert import_placement(tmp_path / "p.pt", source="deepseek-eplb", facts=facts) == placement
    torch.save((*tables[:2], tables[2] + 1), tmp_path / "p.pt")
    with pytest.raises(InputError, match="logcnt"):
        import_placement(tmp_path / "p.pt", source="deepseek-eplb", facts=facts)
