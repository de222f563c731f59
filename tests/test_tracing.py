"""The tracer counts what the routers chose: no padding, no ended sequences, nothing lost to a kill or a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import FAMILIES, find_moe_layers, tiny  # noqa: E402
from gemopt.profiling._trace_files import TraceFolder  # noqa: E402
from gemopt.profiling.tracing import Tracer, load_ranks  # noqa: E402
from gemopt.traces import Phase, Tokens, Traces  # noqa: E402

PAD = 0
PROMPTS = [[5, 9, 11, 200, 31, 7], [40, 41], [77, 3, 90, 12]]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny("olmoe")


def left_padded(rows):
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def experts_of(model, row):
    """[tokens, L, K] experts of one unpadded sequence, by the router logits the model itself reports."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
    return np.stack([layer.topk(model.config.num_experts_per_tok).indices.numpy() for layer in logits], axis=1)


def counts_of(ids_NLK, num_experts=8):
    return np.stack(
        [np.bincount(ids_NLK[:, layer].ravel(), minlength=num_experts) for layer in range(ids_NLK.shape[1])]
    )


def traced(model, folder, run, **options):
    with Tracer(model, folder, **options), torch.no_grad():
        run()
    return Traces.load(folder)


def test_padding_is_not_counted(model, tmp_path):
    traces = traced(model, tmp_path / "t", lambda: model(**left_padded(PROMPTS)), ids=True)
    expected = [experts_of(model, row) for row in PROMPTS]
    assert traces.counts.shape == (1, 3, 8)
    np.testing.assert_array_equal(traces.counts[0], counts_of(np.concatenate(expected)))
    assert traces.counts.sum() == sum(map(len, PROMPTS)) * 3 * 2
    np.testing.assert_array_equal(np.sort(traces.tokens.ids), np.sort(np.concatenate(expected)))
    assert traces.tokens.token_ids.tolist() == [token for prompt in PROMPTS for token in prompt]
    assert traces.tokens.request.tolist() == [0] * 6 + [1] * 2 + [2] * 4
    everything = traced(model, tmp_path / "u", lambda: model(left_padded(PROMPTS)["input_ids"]))
    assert everything.counts.sum() == 18 * 3 * 2  # without a mask every token is a real one


def test_generation_has_one_prefill_step_and_then_decode_steps(model, tmp_path):
    answer = []
    run = lambda: answer.append(model.generate(**left_padded(PROMPTS), max_new_tokens=5, do_sample=False))  # noqa: E731
    traces = traced(model, tmp_path / "t", run, eos_token_ids=(), ids=True)
    assert traces.phase.tolist() == [Phase.PREFILL] + [Phase.DECODE] * 4
    assert traces.counts.sum(axis=2).tolist() == [[24] * 3] + [[6] * 3] * 4
    for row, prompt in enumerate(PROMPTS):  # the whole sequence at once routes as prompt and tokens one by one did
        sequence = prompt + answer[0][row, 6:-1].tolist()
        mine = traces.tokens.ids[traces.tokens.request == row]
        np.testing.assert_array_equal(np.sort(mine), np.sort(experts_of(model, sequence)))


def test_a_sequence_that_ended_is_not_counted(model, tmp_path):
    """Row 0 feeds its end-of-sequence token in the second decode step: it counts no more, padding after it neither."""
    from transformers import DynamicCache

    def run():
        cache = DynamicCache(config=model.config)
        model(**left_padded(PROMPTS), past_key_values=cache)
        mask = left_padded(PROMPTS)["attention_mask"]
        for fed in ([8, 9, 10], [99, 9, 10], [PAD, 9, 99], [PAD, 9, PAD]):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            model(input_ids=torch.tensor(fed)[:, None], attention_mask=mask, past_key_values=cache)
        model(**left_padded(PROMPTS))  # a new batch: all rows count again

    traces = traced(model, tmp_path / "t", run, eos_token_ids=(99,))
    assert traces.counts[:, 0].sum(axis=1).tolist() == [24, 6, 4, 2, 2, 24]
    assert traces.phase.tolist() == [0, 1, 1, 1, 1, 0]


def test_the_models_own_end_token_is_known(model, tmp_path):
    first = model.generate(**left_padded(PROMPTS), max_new_tokens=2, do_sample=False)[:, -2]
    model.generation_config.eos_token_id = int(first[0])
    try:
        run = lambda: model.generate(**left_padded(PROMPTS), max_new_tokens=4, do_sample=False)  # noqa: E731
        traces = traced(model, tmp_path / "t", run)
    finally:
        model.generation_config.eos_token_id = 2
    alive = int((first != first[0]).sum())
    assert traces.counts[1, 0].sum() == 2 * alive < 6


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family, tmp_path):
    """Counts, pairs and transitions agree with the token-level record, which agrees with what the routers return."""
    network = tiny(family)
    layers = find_moe_layers(network)
    seen = [[] for _ in layers]
    handles = [
        layer.router.register_forward_hook(lambda m, a, out, layer=layer, to=to: to.append(layer.chosen(out)))
        for layer, to in zip(layers, seen, strict=True)
    ]
    batch = left_padded(PROMPTS)
    traces = traced(network, tmp_path / "t", lambda: network(**batch), ids=True)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool().flatten()
    ids = torch.stack([torch.cat(layer)[real] for layer in seen], dim=1).numpy()
    np.testing.assert_array_equal(traces.tokens.ids, np.where(ids < 8, ids, -1))
    assert traces.layer_ids == tuple(layer.layer_id for layer in layers)
    assert (traces.num_hidden_layers, traces.top_k, traces.model) == (3, 2, network.config.model_type)
    again = Traces(counts=traces.counts, tokens=traces.tokens)
    np.testing.assert_array_equal(
        traces.counts[0], [np.bincount(i[i < 8].ravel(), minlength=8) for i in ids.swapaxes(0, 1)]
    )
    np.testing.assert_array_equal(traces.pair_counts, again.pairs())
    np.testing.assert_array_equal(traces.transitions, again.transition_counts())


def test_identity_experts_make_no_assignment(tmp_path):
    network = tiny("longcat_flash")
    _, *others = find_moe_layers(network)
    for layer in others:
        layer.tensor("router.e_score_correction_bias")[8:] = 100.0  # every token chooses two identity experts
    traces = traced(network, tmp_path / "t", lambda: network(**left_padded(PROMPTS)), ids=True)
    assert others and traces.counts[:, 0].any()
    assert traces.counts[:, 1:].sum() == 0 == traces.pair_counts[1:].sum()
    assert (traces.tokens.ids[:, 1:] == -1).all()


def test_tasks_and_files(model, tmp_path):
    batch = left_padded(PROMPTS)
    with Tracer(model, tmp_path / "t", steps_per_file=2) as tracer, torch.no_grad():
        model(**batch)
        with tracer.task("code"):
            model(**batch)
            with tracer.task("maths"):
                model(**batch)
            model(**batch)
        with tracer.task(None):
            model(**batch)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [f"{i:06d}.safetensors" for i in range(3)]
    traces = Traces.load(tmp_path / "t")
    assert traces.task_names == ("code", "maths")
    assert traces.task.tolist() == [-1, 0, 1, 0, -1]
    assert tracer.num_steps == traces.num_steps == 5
    np.testing.assert_array_equal(
        traces.pair_counts, 5 * Traces.load(tmp_path / "t" / "000002.safetensors").pair_counts
    )


def test_many_pending_tokens_are_counted_in_between(model, tmp_path, monkeypatch):
    batch = left_padded(PROMPTS)
    whole = traced(model, tmp_path / "a", lambda: [model(**batch) for _ in range(5)], ids=True)
    monkeypatch.setattr("gemopt.profiling.tracing.PENDING_BYTES", 2 * 18 * 3 * 2 * 8 - 1)  # two forwards
    parts = traced(model, tmp_path / "b", lambda: [model(**batch) for _ in range(5)], ids=True)
    for name in ("counts", "pair_counts", "transitions", "phase"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    for name in ("ids", "step_of_token", "request", "token_ids"):
        np.testing.assert_array_equal(getattr(whole.tokens, name), getattr(parts.tokens, name))


def test_the_model_is_left_as_it_was(model, tmp_path):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before, batch = hooks(), left_padded(PROMPTS)
    with torch.no_grad():
        expected = model(**batch).logits
        with Tracer(model, tmp_path / "t"):
            assert torch.equal(model(**batch).logits, expected)
    assert hooks() == before
    with pytest.raises(RuntimeError, match="out of memory"), Tracer(model, tmp_path / "u"), torch.no_grad():
        model(**batch)
        raise RuntimeError("out of memory")
    assert hooks() == before
    assert Traces.load(tmp_path / "u").num_steps == 1  # what ran before the failure is kept


def test_a_forward_that_fails_leaves_no_step(model, tmp_path):
    batch = left_padded(PROMPTS)
    with Tracer(model, tmp_path / "t"), torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10_000]]))
        model(**batch)
    assert Traces.load(tmp_path / "t").num_steps == 1


def test_training_counts_the_forward_only(model, tmp_path):
    network = tiny("mixtral").train()
    network.activation_checkpointing_enable()
    batch = left_padded(PROMPTS)
    with Tracer(network, tmp_path / "t"):
        network(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert Traces.load(tmp_path / "t").counts.sum() == 12 * 3 * 2


def test_what_cannot_be_traced(model, tmp_path):
    batch = left_padded(PROMPTS)
    with pytest.raises(InputError, match="no forward"), Tracer(model, tmp_path / "a"):
        pass
    with Tracer(model, tmp_path / "b"), torch.no_grad():
        model(**batch)
    with pytest.raises(InputError, match=r"000000\.safetensors.*new or empty"):
        Tracer(model, tmp_path / "b")
    with pytest.raises(InputError, match="No such file"):
        Tracer(model, tmp_path / "missing" / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder"):
        Tracer(model, tmp_path / "file")
    with (
        pytest.raises(InputError, match=r"attention_mask.*4 dimensions"),
        Tracer(model, tmp_path / "d"),
        torch.no_grad(),
    ):
        model(input_ids=batch["input_ids"], attention_mask=torch.zeros(3, 1, 6, 6))
    with pytest.raises(InputError, match="steps_per_file"):
        Tracer(model, tmp_path / "e", steps_per_file=0)
    with pytest.raises(InputError, match="transformers model"):
        Tracer(torch.nn.Linear(2, 2), tmp_path / "f")


def test_a_router_that_is_bypassed_is_noticed(tmp_path):
    network = tiny("qwen3_moe")
    layer = find_moe_layers(network)[1]
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp.*did not run"), Tracer(network, tmp_path / "t"):
        network(**left_padded(PROMPTS))
        layer.block.forward = lambda hidden: hidden  # as a fused kernel would
        network(**left_padded(PROMPTS))
    assert Traces.load(tmp_path / "t").num_steps == 1


TRACE_FOREVER = """
    import sys, torch
    from gemopt.models import tiny
    from gemopt.profiling.tracing import Tracer

    torch.set_num_threads(1)
    model = tiny("olmoe", num_layers=2)
    batch = {"input_ids": torch.arange(3, 35).view(2, 16)}
    with Tracer(model, sys.argv[1], ids=True, steps_per_file=int(sys.argv[2])), torch.no_grad():
        for step in range(int(sys.argv[3])):
            model(**batch)
"""


def script(tmp_path, text=TRACE_FOREVER):
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_killed_tracer_leaves_readable_traces(tmp_path):
    folder = tmp_path / "t"
    process = subprocess.Popen([sys.executable, script(tmp_path), str(folder), "3", "100000"])
    deadline = time.monotonic() + 120
    while len(list(folder.glob("[0-9]*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    traces = Traces.load(folder)
    assert traces.num_steps >= 12
    assert traces.num_steps % 3 == 0
    assert (traces.counts.sum(axis=2) == 32 * 2).all()
    assert len(traces.tokens.ids) == 32 * traces.num_steps


def test_a_full_disk_is_one_line_and_keeps_what_is_written(tmp_path):
    """The kernel refuses files above a limit: the first part fits, the second does not."""
    folder = tmp_path / "t"
    run = script(
        tmp_path,
        """
        import resource, sys, torch
        from gemopt.exceptions import InputError
        from gemopt.models import tiny
        from gemopt.profiling.tracing import Tracer
        from gemopt.traces import Traces

        torch.set_num_threads(1)
        model = tiny("olmoe", num_layers=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            with Tracer(model, sys.argv[1], ids=True, steps_per_file=1), torch.no_grad():
                model(torch.arange(3, 35).view(2, 16))
                model(torch.ones(16, 500, dtype=torch.long))
                model(torch.arange(3, 35).view(2, 16))
                print("went on")
        except InputError as error:
            print(f"refused: {error}")
        hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        print("hooks left:", len(hooks))
        """,
    )
    done = subprocess.run([sys.executable, run, str(folder)], capture_output=True, text=True, check=True)
    refused, hooks = done.stdout.splitlines()
    assert refused.startswith(f"refused: {folder}/000001.safetensors: got File too large")
    assert hooks == "hooks left: 0"
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]
    assert Traces.load(folder).counts.sum() == 32 * 2 * 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def rank_traces(counts, ids, **fields):
    tokens = Tokens(
        ids=np.array(ids, dtype=np.int16).reshape(-1, 1, 1),
        step_of_token=np.repeat(np.arange(len(ids)), 1),
        request=np.zeros(len(ids), dtype=np.int32),
        token_ids=np.full(len(ids), 7, dtype=np.int32),
    )
    return Traces(counts=np.array(counts)[:, None, :], tokens=tokens, top_k=1, **fields)


def test_ranks_with_batches_of_their_own_are_added_up(tmp_path):
    for rank, (counts, ids, phase) in enumerate(
        [([[1, 0], [1, 0]], [0, 0], [0, 1]), ([[0, 1], [1, 0], [0, 1]], [1, 0, 1], [1, 1, 1])]
    ):
        (tmp_path / "t").mkdir(exist_ok=True)
        TraceFolder(tmp_path / "t", rank=rank).append(
            rank_traces(counts, ids, phase=np.array(phase), task=np.zeros(len(ids)), task_names=("a",))
        )
    traces = load_ranks(tmp_path / "t")
    assert traces.counts[:, 0].tolist() == [[1, 1], [2, 0]]  # the third step was written by one rank only
    assert traces.phase.tolist() == [Phase.MIXED, Phase.DECODE]
    assert traces.task.tolist() == [0, 0]
    assert traces.tokens.source_rank.tolist() == [0, 1, 0, 1]
    assert traces.tokens.ids[:, 0, 0].tolist() == [0, 1, 0, 0]
    assert traces.tokens.request.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="no rank"):
        load_ranks(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_an_accelerator_counts_as_the_cpu_does(tmp_path):
    network = tiny("qwen3_moe")
    expected = traced(network, tmp_path / "cpu", lambda: network(**left_padded(PROMPTS)), ids=True)
    device = torch.accelerator.current_accelerator().type
    network.to(device)
    batch = {name: tensor.to(device) for name, tensor in left_padded(PROMPTS).items()}
    traces = traced(network, tmp_path / "device", lambda: network(**batch), ids=True)
    for name in ("counts", "pair_counts", "transitions"):
        np.testing.assert_array_equal(getattr(traces, name), getattr(expected, name))


@pytest.mark.distributed
def test_expert_parallel_ranks(tmp_path):
    """Two ranks sharing a batch record it once; with batches of their own they record their share each."""
    single = tiny("qwen3_moe")
    single.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parent / "tracing_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    batches = json.loads((tmp_path / "batches.json").read_text())
    expected = [traced(single, tmp_path / f"e{i}", lambda b=b: single(torch.tensor(b))) for i, b in enumerate(batches)]
    shared = Traces.load(tmp_path / "shared")
    np.testing.assert_array_equal(shared.counts, expected[0].counts)
    own = load_ranks(tmp_path / "own")
    np.testing.assert_array_equal(own.counts, expected[0].counts + expected[1].counts)
    np.testing.assert_array_equal(own.pair_counts, expected[0].pair_counts + expected[1].pair_counts)
    assert own.tokens.source_rank.tolist() == [0] * 12 + [1] * 12
