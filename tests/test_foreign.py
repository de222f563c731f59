"""What a user mixed up is named: swapped files, documents of another kind, misspelt keys, wrong arguments."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, profile, traces, write_inputs

from gemopt import InputError, Placement, Profile, Traces, compare, evaluate, solve
from gemopt.documents import foreign
from gemopt.replay import replay


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    measured, routed = write_inputs(tmp_path)
    Placement.contiguous(2, 4, 2).save(tmp_path / "placement.json")
    return Path(measured), Path(routed), tmp_path / "placement.json"


def test_swapped_files_are_named(inputs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    measured, routed, placement = inputs
    for words, wrong, found, needed in (
        (("solve", routed, measured), routed, "traces of gemopt", "a JSON document is needed"),
        (("solve", measured, measured), measured, "a profile of gemopt", "traces are needed"),
        (("solve", routed, routed), routed, "traces of gemopt", "a JSON document is needed"),
        (("solve", placement, routed), placement, "a placement of gemopt", "a profile is needed"),
        (("evaluate", measured, placement, routed), placement, "a placement of gemopt", "a profile is needed"),
        (("evaluate", placement, routed, measured), routed, "traces of gemopt", "a JSON document is needed"),
        (("evaluate", placement, measured, measured), measured, "a profile of gemopt", "traces are needed"),
        (("evaluate", measured, measured, routed), measured, "a profile of gemopt", "a placement is needed"),
    ):
        code, out, err = gemopt(capsys, *words)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"gemopt: {wrong}: got {found}; {needed}"), err
        assert err.endswith("; were arguments swapped?\n")


def test_a_folder_of_dumps_says_how_they_are_read(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "expert_distribution_recorder_1764000000.5.pt").write_bytes(b"")
    with pytest.raises(InputError, match="gemopt trace import reads what an engine recorded"):
        solve(inputs[0], tmp_path / "dumps")


def test_documents_of_gemopt_are_named_where_those_of_others_are_read(
    inputs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, routed, placement = inputs
    certificate, played, out = (tmp_path / name for name in ("certificate.json", "replay.json", "out"))
    replay(measured, routed, strategies=["contiguous"], window=4).save(played)
    assert gemopt(capsys, "solve", measured, routed, "--solver", "lpt", "--certificate", certificate)[0] == 0
    for words, found, needed in (
        (("trace", "import", "--from", "sglang", measured), "a profile", "what sglang records is needed"),
        (("trace", "import", "--from", "vllm", placement), "a placement", "what vllm records is needed"),
        (("placement", "import", "--from", "sglang", measured), "a profile", "a placement of sglang is needed"),
        (("profile", "import", placement), "a placement", "a table of times is needed"),
        (("report", certificate, "--profile", measured, "--traces", routed), "a certificate", "a result is needed"),
        (("report", played, "--profile", measured, "--traces", routed), "a replay result", "a result is needed"),
        (("solve", measured, routed, "--rules", measured), "a profile", "rules are needed"),
        (
            ("report", placement, "--profile", measured, "--traces", routed, "--replay", measured),
            "a profile",
            "a replay result is needed",
        ),
    ):
        code, _, err = gemopt(capsys, *words, "-o", out)
        assert code == 2 and f": got {found} of gemopt; {needed}" in err, err
        assert not out.exists()
    placement.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3]] * 2}))
    assert "got a placement of SGLang; " in gemopt(capsys, "evaluate", placement, measured, routed)[2]


def _write(path: Path, content: object) -> Path:
    if isinstance(content, np.ndarray):
        with path.open("wb") as stream:
            np.save(stream, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content", "found", "way_out"),
    [
        ("a.npy", np.ones((3, 2, 4), int), "a NumPy array", "gemopt trace import"),
        ("a.safetensors", np.ones(3), "a NumPy array", "gemopt trace import"),
        ("a.csv", "layer_id,expert_id,count\n0,0,3\n", "a table", "gemopt trace import"),
        ("a.csv", "num_tokens,latency_us\n1,3.5\n", "a table of latencies", "gemopt profile import"),
        ("a.json", {"logical_count": [[1]]}, "statistics of SGLang", "gemopt trace import"),
        ("a.json", {"physical_to_logical_map": [[0]]}, "a placement of SGLang", "gemopt placement import"),
        ("a.jsonl", '{"choices": []}\n{"choices": []}\n', "lines of JSON", "gemopt trace import"),
        ("a.json", {"step": 3, "counts": [[1]]}, "counts in JSON", "gemopt trace import"),
        ("a.json", '{"choices": [', "a text that begins like JSON", "cut short"),
        ("a.json", {"anything": 1}, "a JSON document", ""),
    ],
)
def test_a_file_that_is_no_traces_is_named(
    tmp_path: Path, name: str, content: object, found: str, way_out: str
) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        Traces.load(path)
    assert str(caught.value).startswith(f"{path}: got {found}") and way_out in str(caught.value)


def test_a_torch_file_is_told_from_an_archive_of_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02")
    assert foreign.of_file(tmp_path / "a.pt")[0] == "a file of torch (.pt)"
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 1, 1), int))
    assert ".npz" in foreign.of_file(tmp_path / "a.npz")[0]
    assert foreign.of_file(tmp_path / "missing") == ("", "") == foreign.of_file(tmp_path)


def test_a_broken_file_of_the_right_kind_is_not_called_another(tmp_path: Path) -> None:
    traces().save(tmp_path / "t.safetensors")
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a complete safetensors file"):
        Traces.load(tmp_path / "t.safetensors")
    (tmp_path / "p.json").write_text('{"devices": [')
    with pytest.raises(InputError, match="a complete JSON document is needed"):
        Profile.load(tmp_path / "p.json")


def test_a_misspelt_key_is_named_with_the_right_one(tmp_path: Path) -> None:
    good = json.loads(profile().model_dump_json())
    sample = good["devices"][0]["samples"][1]
    sample["latency_ms"] = sample.pop("latency_us")
    (tmp_path / "p.json").write_text(json.dumps(good))
    with pytest.raises(InputError) as caught:
        Profile.load(tmp_path / "p.json")
    assert "Profile.devices.0.samples.1.latency_ms: got " in str(caught.value)
    assert str(caught.value).endswith("in another unit? did you mean latency_us?")
    with pytest.raises(InputError, match=r"Placement\.num_expert: got 4; no such key.*; did you mean num_experts\?"):
        Placement(physical_to_logical=[[0, 1, 2, 3]], slots_per_rank=[2, 2], num_expert=4)
    with pytest.raises(InputError, match=r"Profile\.expert_bytes: got 4; no such key.*; it belongs into model$"):
        Profile(expert_bytes=4)
    with pytest.raises(InputError, match=r"Profile\.latency_us: got 4; .* it belongs into devices\.samples$"):
        Profile(latency_us=4)
    with pytest.raises(
        InputError, match=r"Profile\.colour: got red; no such key; known here: schema_version, devices,"
    ):
        Profile(devices=profile().devices, colour="red")


def test_calls_take_paths_and_objects_alike_and_name_what_they_cannot_take(inputs: tuple[Path, Path, Path]) -> None:
    measured, routed, placement = inputs
    objects = Profile.load(measured), Traces.load(routed)
    assert evaluate(placement, measured, str(routed)).objective_us == pytest.approx(
        evaluate(Placement.load(placement), *objects).objective_us
    )
    rows = [compare(*given, solvers=["lpt"]) for given in ((str(measured), routed), objects)]
    assert rows[0][0].objective_us == rows[1][0].objective_us
    options = {"strategies": ["contiguous"], "window": 4}
    assert replay(measured, routed, **options).rows == replay(*objects, **options).rows
    for call, said in (
        (lambda: solve(measured, objects[1].counts), "traces: got a ndarray; .*gemopt.Traces\\(counts=array\\)"),
        (lambda: solve(objects[1], objects[0]), "profile: got a Traces; .*were arguments swapped"),
        (lambda: solve({}, routed), "profile: got a dict; .*gemopt.Profile\\(\\*\\*"),
        (lambda: evaluate(objects[0], objects[0], objects[1]), "placement: got a Profile; .*swapped"),
        (lambda: compare(None, routed), "profile: got a NoneType; a Profile or the path of one$"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_objects_show_themselves_in_a_line() -> None:
    measured, routed = profile(), traces()
    big = Traces(counts=np.ones((300, 24, 128), int), top_k=4, model="net")
    found = solve(measured, routed, solver="linear")
    assert repr(big) == "Traces(300 steps, 24 layers, 128 experts, top-4, 921,600 assignments of net)"
    assert repr(measured) == "Profile(2 devices (unknown), 12 samples of 0 to 64 assignments)" == str(measured)
    assert repr(found.placement) == "Placement(2 layers, 4 experts in 4 slots on 2 ranks)"
    assert repr(found).startswith("Result(linear: feasible, ") and "the optimum at most" in repr(found)
    score = evaluate(found.placement, measured, routed)
    assert repr(score).startswith("Evaluation(12 steps, 2 layers, ")
    for each in (big, measured, found, found.placement, score):
        assert len(repr(each)) < 200 and "\n" not in repr(each)


def test_an_npz_may_say_what_network_it_is_of(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", counts=np.ones((2, 2, 4), int), layer_ids=[1, 2], num_hidden_layers=3, model="net")
    found = Traces.load(tmp_path / "t.npz")
    assert (found.layer_ids, found.num_hidden_layers, found.model, found.top_k) == ((1, 2), 3, "net", None)


def test_modules_are_attributes_of_the_package() -> None:
    import subprocess

    code = (
        "import gemopt; print(gemopt.conflicts.conflict_graph.__name__, gemopt.plotting.save.__name__,"
        " gemopt.compare.__name__, gemopt.migration.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["conflict_graph", "save", "compare", "gemopt.migration"]


@pytest.mark.parametrize(
    ("name", "text", "engine"),
    [
        ("map.csv", "layer,rank,slot,expert\n0,0,0,1\n0,1,1,0\n", "csv"),
        ("map.yaml", "num_slots: 2\ninitial_global_assignments:\n  0: [1, 0]\n", "tensorrt-llm"),
    ],
)
def test_placements_of_engines_say_how_they_are_read(
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    engine: str,
) -> None:
    path = tmp_path / name
    path.write_text(text)
    code, _, err = gemopt(capsys, "evaluate", path, *inputs[:2])
    assert code == 2 and "gemopt placement import reads the placements of engines" in err, err
    code, _, err = gemopt(capsys, "trace", "import", path, "--from", "csv", "-o", tmp_path / "t.safetensors")
    assert code == 2 and f"gemopt placement import --from {engine}" in err, err
