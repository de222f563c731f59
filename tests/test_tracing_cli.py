"""`gemopt trace` on the shipped network and on small ones: what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.cli import main  # noqa: E402
from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import describe, find_moe_layers, tiny, tiny_moe_path  # noqa: E402
from gemopt.profiling.generating import Prompt, batches, load_model, read_prompts, record  # noqa: E402
from gemopt.traces import Phase, Traces, with_hidden  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = Path(__file__).parent.parent / "examples" / "data" / "prompts.jsonl"


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-moe", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model saved with the byte tokenizer of the shipped one."""
    path = tmp_path_factory.mktemp("model") / "small"
    tiny("olmoe", vocab_size=264).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_moe_path() / name, path / name)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def refusal(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def cosine_distance(a, b) -> float:
    a, b = a.ravel().astype(float), b.ravel().astype(float)
    return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_shipped_network(shipped):
    model, tokenizer = shipped
    shape = describe(model)
    assert (shape.num_experts, shape.top_k, len(find_moe_layers(model))) == (64, 4, 4)
    assert sum(path.stat().st_size for path in tiny_moe_path().iterdir()) <= 5_000_000
    text = "Grüße,\n\tx = 1"
    assert tokenizer(text)["input_ids"] == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_network_has_learnt(shipped):
    """Held-out English costs fewer bits per byte than its letter frequencies would (about 4.2 for an order-0 code)."""
    model, tokenizer = shipped
    ids = torch.tensor(
        [tokenizer("The package is free software; you can redistribute it and/or modify it.")["input_ids"]]
    )
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss / np.log(2) < 3.2


def test_routing_differs_by_kind_of_text(shipped, tmp_path):
    """Loads of two kinds lie further apart than those of two halves of one kind, for every pair of kinds."""
    halves = [Prompt(prompt.text, f"{prompt.task} {number % 2}") for number, prompt in enumerate(read_prompts(PROMPTS))]
    record(*shipped, halves, tmp_path / "t", batch_size=16, max_new_tokens=0)
    traces = Traces.load(tmp_path / "t")
    loads = {task: traces.select(task=task).counts.sum(axis=0) for task in traces.task_names}
    kinds = ("prose", "code", "maths")
    within = max(cosine_distance(loads[f"{kind} 0"], loads[f"{kind} 1"]) for kind in kinds)
    between = min(
        cosine_distance(loads[f"{a} {i}"], loads[f"{b} {1 - i}"]) for a in kinds for b in kinds for i in (0, 1) if a < b
    )
    assert between > 2 * within
    for load_LE in loads.values():
        assert (load_LE.max(axis=1) > 1.5 * load_LE.mean(axis=1)).all()  # skewed, as real routing is


def test_a_file_of_traces(folder, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    lines = [{"prompt": "one", "task": "a"}, {"prompt": "three", "task": "b"}, {"prompt": "two", "task": "a"}]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n" + json.dumps({"prompt": "none"}) + "\n")
    output = tmp_path / "t.safetensors"
    options = ("--model", folder, "--prompts", prompts, "-o", output, "--device", "cpu")
    assert run("trace", *options, "--max-new-tokens", 4, "--tokens", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    traces = Traces.load(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "t.safetensors"]
    assert traces.task_names == ("a", "b")
    assert traces.task.tolist() == [0] * 4 + [1] * 4 + [-1] * 4
    assert traces.phase.tolist() == [Phase.PREFILL, *[Phase.DECODE] * 3] * 3
    assert traces.counts[::4, 0].sum(axis=1).tolist() == [2 * 6, 2 * 5, 2 * 4]  # bytes of the prompts, top-2
    assert traces.tokens.token_ids[:6].tolist() == [byte + 3 for byte in b"onetwo"]
    assert traces.tokens.request.max() == 3
    assert summary["steps"] == {"prefill": 3, "decode": 9, "mixed": 0}
    assert summary["assignments"] == traces.counts.sum()
    assert run("trace", *options, "--max-new-tokens", 0, "--task", "c", "--max-prompt-tokens", 2) == 0
    assert "prompts cut: 4 (--max-prompt-tokens)" in capsys.readouterr().out
    again = Traces.load(output)  # replaced
    assert again.task_names == ("a", "b", "c")
    assert again.counts[:, 0].sum(axis=1).tolist() == [8, 4, 4]


def test_a_folder_of_traces(folder, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("first line\n\nsecond\n" * 3)
    output = tmp_path / "traces"
    options = ("--model", folder, "--prompts", prompts, "-o", output, "--batch", 2, "--max-new-tokens", 2)
    assert run("trace", *options, "--device", "cpu") == 0
    assert "6 prompts, 3 prefill and 3 decode steps" in capsys.readouterr().out.replace("\n", " ")
    assert Traces.load(output).num_steps == 6 and len(list(output.iterdir())) == 1
    assert "new or empty folder" in refusal(capsys, "trace", *options, "--device", "cpu")


def test_hidden_states_lie_beside_the_trace(folder, tmp_path, capsys):
    prompts, output = tmp_path / "p.txt", tmp_path / "t.safetensors"
    prompts.write_text("first\nsecond\nthird\n")
    options = ("trace", "--model", folder, "--prompts", prompts, "--device", "cpu", "--max-new-tokens", 3, "-o")
    assert run(*options, output, "--hidden", 20) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    width = describe(load_model(str(folder), device="cpu")[0]).hidden_size
    assert f"at most 20 tokens: {20 * 3 * width * 2 / 1e6:.1f} MB" in said
    assert said.index("hidden states") < said.index("3 prompts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt", "t.hidden.safetensors", "t.safetensors"]
    found = with_hidden(Traces.load(output), tmp_path / "t.hidden.safetensors")
    assert found.tokens.hidden.shape[1:] == (3, width) and len(set(found.tokens.request)) == 2
    assert run(*options, tmp_path / "folder", "--hidden", 99, "--json") == 0
    assert json.loads(capsys.readouterr().out)["hidden"] == str(tmp_path / "folder" / "hidden.safetensors")
    assert "hidden: got 2; at least" in refusal(capsys, *options, tmp_path / "u.safetensors", "--hidden", 2)
    assert "MB that are free" in refusal(capsys, *options, tmp_path / "u.safetensors", "--hidden", 10**15)
    assert not (tmp_path / "u.safetensors").exists()


def test_sampling_follows_its_seed(folder, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("first line\nsecond\n")

    def tokens(name, seed):
        output = tmp_path / f"{name}.safetensors"
        options = ("--model", folder, "--prompts", prompts, "-o", output, "--device", "cpu", "--tokens")
        assert run("trace", *options, "--temperature", "1", "--seed", seed, "--max-new-tokens", 6) == 0
        return Traces.load(output).tokens.token_ids.tolist()

    assert tokens("a", 1) == tokens("b", 1) != tokens("c", 2)


def test_what_is_refused(folder, tmp_path, capsys):
    prompts, output = tmp_path / "p.txt", tmp_path / "t.safetensors"
    prompts.write_text("x\n")
    model = ("--model", folder)
    good = ("trace", *model, "--prompts", prompts, "--device", "cpu")
    assert "--model: got nothing" in refusal(capsys, "trace")
    assert "--output: got nothing" in refusal(capsys, *good)
    assert "No such file" in refusal(capsys, "trace", *model, "--prompts", tmp_path / "none", "-o", output)
    wrong = ("trace", "--model", tmp_path / "none", "--prompts", prompts, "-o", output)
    assert "a folder of a transformers model" in refusal(capsys, *wrong)
    assert ".safetensors file or a folder" in refusal(capsys, *good, "-o", tmp_path / "t.npz")
    assert "No such file" in refusal(capsys, *good, "-o", tmp_path / "none" / "t")
    assert "a device of this machine" in refusal(capsys, *good[:-1], "abacus", "-o", output)
    assert "below the model's context of 512" in refusal(capsys, *good, "-o", output, "--max-new-tokens", 512)
    for text, message in (
        ("", "no prompts"),
        ('{"prompt": "a"}\nnot json\n', "line 2: got not json"),
        ('{"prompt": ""}', "line 1, prompt"),
        ('{"prompt": "a", "task": 3}', "line 1, task: got 3"),
        ("[1]", "a JSON object"),
    ):
        (tmp_path / "p.jsonl").write_text(text)
        line = refusal(capsys, "trace", *model, "--prompts", tmp_path / "p.jsonl", "-o", output)
        assert message in line
    (tmp_path / "t.safetensors.parts").mkdir()
    (tmp_path / "t.safetensors.parts" / "000000.safetensors").write_text("")
    assert "cut short" in refusal(capsys, *good, "-o", output)
    assert not output.exists()


def test_models_that_cannot_be_loaded(folder, tmp_path, capsys):
    prompts, output, broken = tmp_path / "p.txt", tmp_path / "t.safetensors", tmp_path / "broken"
    prompts.write_text("x\n")
    shutil.copytree(folder, broken)
    options = ("trace", "--model", broken, "--prompts", prompts, "-o", output, "--device", "cpu")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    assert "tokenizer" in refusal(capsys, *options)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:1000])
    assert "broken" in refusal(capsys, *options)


def test_weights_that_are_not_in_the_files_are_not_made_up(folder, tmp_path, capsys):
    """transformers makes them at random and says so in a log: a trace of them would be of no network."""
    from safetensors.torch import load_file, save_file

    from gemopt.executor.load import load

    prompts, lost = tmp_path / "p.txt", tmp_path / "lost"
    prompts.write_text("x\n")
    shutil.copytree(folder, lost)
    tensors = load_file(lost / "model.safetensors")
    router = next(name for name in tensors if name.endswith("gate.weight"))
    save_file({k: v for k, v in tensors.items() if k != router}, lost / "model.safetensors", metadata={"format": "pt"})
    line = refusal(capsys, "trace", "--model", lost, "--prompts", prompts, "-o", tmp_path / "t.safetensors")
    assert (
        f"model {lost}: weights: got no {router}; all weights of the network: what is missing would be random" in line
    )
    with pytest.raises(InputError, match=f"weights: got no {router}"):
        load(lost)


def test_code_beside_the_weights_is_not_run(folder, tmp_path, capsys):
    prompts, own = tmp_path / "p.txt", tmp_path / "own"
    prompts.write_text("x\n")
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "my_moe", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text("raise SystemExit('ran')\n")
    line = refusal(capsys, "trace", "--model", own, "--prompts", prompts, "-o", tmp_path / "t.safetensors")
    assert "is not run here: load it in Python, for gemopt.profiling.tracing.Tracer" in line


def test_prompts_and_batches(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a\n \nb\n")
    assert read_prompts(path, task="t") == [Prompt("a", "t"), Prompt("b", "t")]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(path)
    path.write_text('{"prompt":\n"a"}')
    with pytest.raises(InputError, match=r"a JSON document; .*\.jsonl"):
        read_prompts(path)
    mixed = [Prompt(str(i), "ab"[i % 2]) for i in range(5)]
    groups = [[(prompt.text, prompt.task) for prompt in group] for group in batches(mixed, 2)]
    assert groups == [[("0", "a"), ("2", "a")], [("4", "a")], [("1", "b"), ("3", "b")]]


def test_importing_stays_a_command(capsys):
    assert run("trace", "import", "--help") == 0
    assert "serving engine" in capsys.readouterr().out


def test_without_torch(tmp_path, capsys, monkeypatch):
    for name in ("gemopt.profiling.generating", "gemopt.profiling.tracing", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not there
    line = refusal(capsys, "trace", "--model", "tiny-moe", "--prompts", PROMPTS, "-o", tmp_path / "t")
    assert "torch: not installed" in line and "(from a clone: pip install '.[torch]')" in line


@pytest.mark.distributed
def test_torchrun_shares_the_experts(folder, tmp_path):
    """Two ranks, half of the experts each, write the traces one process writes."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("first line\nsecond\n")
    options = ["trace", "--model", folder, "--prompts", prompts, "--max-new-tokens", 3, "--device", "cpu"]
    options += ["--hidden", 99, "-o"]
    assert run(*options, tmp_path / "one.safetensors") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gemopt", *map(str, options), str(tmp_path / "two.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 prompts") == 1
    one, two = (Traces.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    np.testing.assert_array_equal(one.counts, two.counts)
    hidden = [with_hidden(each, tmp_path / f"{name}.hidden.safetensors") for each, name in ((one, "one"), (two, "two"))]
    np.testing.assert_allclose(*(each.tokens.hidden.astype(float) for each in hidden), atol=0.02)
