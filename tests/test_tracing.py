"""The tracer counts what the routers chose: no padding, no ended sequences, nothing lost to a kill or a full disk."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from traced import CACHE, traced

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from installed_families import INSTALLED  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import auto_class, find_moe_layers, tiny  # noqa: E402
from gemopt.profiling.tracing import Tracer  # noqa: E402
from gemopt.traces import Phase, Traces  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PAD = 0
PROMPTS = [[5, 9, 11, 200, 31, 7], [40, 41], [77, 3, 90, 12]]


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


def test_padding_is_not_counted(model, tmp_path):
    traces = traced(model, tmp_path / "t", lambda: model(**left_padded(PROMPTS)), ids=True)
    expected = [experts_of(model, row) for row in PROMPTS]
    assert traces.counts.shape == (1, 3, 8)
    np.testing.assert_array_equal(traces.counts[0], counts_of(np.concatenate(expected)))
    assert traces.counts.sum() == sum(map(len, PROMPTS)) * 3 * 2
    np.testing.assert_array_equal(np.sort(traces.tokens.ids), np.sort(np.concatenate(expected)))
    assert traces.tokens.token_ids.tolist() == [token for prompt in PROMPTS for token in prompt]
    assert traces.tokens.request.tolist() == [0] * 6 + [1] * 2 + [2] * 4
    assert traces.tokens.source_rank is None  # one process does not say who would send
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
        model(**left_padded(PROMPTS), **{CACHE: cache})
        mask = left_padded(PROMPTS)["attention_mask"]
        for fed in ([8, 9, 10], [99, 9, 10], [PAD, 9, 99], [PAD, 9, PAD]):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            model(input_ids=torch.tensor(fed)[:, None], attention_mask=mask, **{CACHE: cache})
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


@pytest.mark.parametrize("family", INSTALLED)
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


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "gemma4"])
def test_networks_that_see(kind, tmp_path):
    """Their decoders get neither ids nor, some, a mask of the padding: both are the whole network's."""
    network = tiny(f"{kind}_text", num_layers=2)
    if kind == "gemma4":
        eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(kind, text_config=network.config.to_dict(), vision_config=eyes)
        network = auto_class(config).from_config(config).eval()
    batch = left_padded(PROMPTS)
    with Tracer(network, tmp_path / "t", ids=True, eos_token_ids=(9,)), torch.no_grad():
        mask, cache = batch["attention_mask"], network(**batch)[CACHE]
        for fed in ([8, 9, 7], [6, 5, 9]):  # the second sequence ends, then the third
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            network(input_ids=torch.tensor(fed)[:, None], attention_mask=mask, **{CACHE: cache})
    traces, real = Traces.load(tmp_path / "t"), int(batch["attention_mask"].sum())
    assert traces.counts[:, 0].sum(axis=1).tolist() == [2 * real, 2 * 2, 2 * 1]
    assert traces.tokens.token_ids[-3:].tolist() == [8, 7, 6]
    with (
        pytest.raises(InputError, match="attention_mask: got dict") if kind == "gemma4" else nullcontext(),
        Tracer(network, tmp_path / "u"),
        torch.no_grad(),
    ):
        masks = {"full_attention": None, "sliding_attention": None} if kind == "gemma4" else None
        network.model.language_model(inputs_embeds=torch.zeros(1, 3, 32), attention_mask=masks)


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


def test_blocks_of_one_tracer_follow_each_other(model, tmp_path):
    batch, hooks = left_padded(PROMPTS), lambda: sum(len(m._forward_hooks) for m in model.modules())
    before = hooks()
    tracer = Tracer(model, tmp_path / "t")
    for _ in range(2):
        with torch.no_grad(), tracer:
            with pytest.raises(InputError, match="a block within its own"), tracer:
                pass
            model(**batch)
        model(**batch)  # of nobody
    assert hooks() == before
    assert Traces.load(tmp_path / "t").counts[:, 0].sum(axis=1).tolist() == [24, 24]


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


@pytest.mark.parametrize("shared", ["block", "router"])
def test_layers_that_share_a_router_are_refused(tmp_path, shared):
    """Each of its calls would overwrite what the one before chose."""
    network = tiny("olmoe")
    first, second = (layer.mlp for layer in network.model.layers[1:3])
    if shared == "block":
        network.model.layers[2].mlp = first
    else:
        second.gate = first.gate
    with pytest.raises(InputError, match="router saw 36 tokens"), Tracer(network, tmp_path / "t"), torch.no_grad():
        network(**left_padded(PROMPTS))


def test_who_generates_in_another_thread_is_told_why_at_the_end(model, tmp_path):
    """Continuous batching does, and puts what went wrong into its own log."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0, do_sample=False)
    with pytest.raises(InputError, match="cache: got PagedAttentionCache"), Tracer(model, tmp_path / "t"):
        model.generate_batch(inputs=PROMPTS, generation_config=settings, progress_bar=False)


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
