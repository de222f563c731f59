"""What in a response is routing, and what is padding, a dense layer or no expert: never counted, never guessed."""

from __future__ import annotations

import base64
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responded import ANSWER, EXPERTS, LAYERS, PROMPT, TOP_K, body, counts, loader, npy, routing

from gemopt.exceptions import InputError
from gemopt.formats.engine import TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.traces import Phase, Traces


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_padded_tokens_are_not_routing(load):
    ids = routing()
    padded = np.concatenate([ids, np.zeros((50, LAYERS, TOP_K), int)])
    for rows in (padded, np.concatenate([padded[-50:], ids])):
        traces, notes = load([body(rows)])
        assert (traces.counts == counts(ids[PROMPT:])).all()
        assert "50 tokens without any expert (padding)" in notes
    ids[PROMPT + 1] = 0
    for options in ({}, {"layer_ids": (0, 1)}):
        traces, notes = load([body(ids)], **options)
        assert (traces.counts == counts(np.delete(ids, PROMPT + 1, axis=0)[PROMPT:])).all()
        assert "1 token without any expert (padding)" in notes
    unknown = body(padded)
    del unknown["usage"]["prompt_tokens"]
    with pytest.raises(InputError, match="padded at the end"):
        load([unknown])


def test_a_layer_that_lacks_some_tokens_is_refused_whatever_the_hint(load):
    ids = routing()
    ids[PROMPT + 1, 1] = 0
    for options in ({}, {"layer_ids": (0, 1)}, {"layer_ids": (1,)}):
        with pytest.raises(InputError, match="layer 1 names an expert twice, or none, in 1 of 4"):
            load([body(ids)], **options)
    assert (load([body(ids)], layer_ids=(0,))[0].counts == counts(ids[PROMPT:, :1])).all()


def test_dense_layers_may_hold_anything(load):
    ids = routing()
    ids[:, 0] = 3
    traces, notes = load([body(ids)])
    assert traces.layer_ids == (1,)
    assert "layers 0 repeat experts" in notes
    ids[:, 0] = [-1, 30000]
    response = body(ids)
    response["choices"][0]["routed_experts"] = npy(ids, np.int32)
    assert (load([response], layer_ids=(1,))[0].counts == counts(ids[PROMPT:, 1:])).all()
    with pytest.raises(InputError, match="below 8192"):
        load([response])


def test_a_layer_that_never_varies_is_not_taken_for_routing(load):
    ids = routing(tokens=PROMPT + 20)
    ids[:, 0] = [1, 0]
    ids[::2, 0] = [0, 1]
    with pytest.raises(InputError, match=r"layers 0 name the same experts in every token.*--layer-ids, for example 1"):
        load([body(ids, answer=21)])
    assert (load([body(ids, answer=21)], layer_ids=(1,))[0].counts == counts(ids[PROMPT:, 1:])).all()
    few = ids[: PROMPT + ANSWER - 1]
    assert (load([body(few)])[0].counts == counts(few[PROMPT:])).all()  # so few may well choose alike
    every = routing(tokens=PROMPT + 20, experts=2)
    assert load([body(every, answer=21)], num_experts=2)[0].num_layers == LAYERS


def test_top_1_with_dense_layers_is_never_guessed(load):
    ids = routing(layers=4, top_k=1)
    ids[:, 0] = ids[:, 2] = 0
    with pytest.raises(InputError, match=r"layers 0, 2 name expert 0 in every token.*--layer-ids, for example 1, ?3"):
        load([body(ids)])
    traces, _ = load([body(ids)], layer_ids=(1, 3))
    assert (traces.counts == counts(ids[PROMPT:, [1, 3]])).all()
    assert traces.layer_ids == (1, 3)
    everything, _ = load([body(ids)], layer_ids=(0, 1, 2, 3))  # a router that always takes expert 0, says the user
    assert (everything.counts == counts(ids[PROMPT:])).all()
    ids[:, 2] = -1  # no expert at all is no routing
    response = body(ids)
    response["choices"][0]["routed_experts"] = npy(ids, np.int8)
    ids[:, 0] = 1
    response["choices"][0]["routed_experts"] = npy(ids, np.int8)
    assert load([response])[0].layer_ids == (0, 1, 3)


def test_top_1_padding_is_refused_or_trimmed(load):
    ids = routing(tokens=PROMPT + 20 - 1, layers=6, top_k=1)
    padded = np.concatenate([ids, np.zeros((9, 6, 1), int)])
    traces, notes = load([body(padded, answer=20)])
    assert (traces.counts == counts(ids[PROMPT:])).all()
    assert "9 tokens without any expert" in notes
    inside = ids.copy()
    inside[PROMPT + 2 : PROMPT + 5] = 0
    for options in ({}, {"layer_ids": tuple(range(6))}):
        with pytest.raises(InputError, match="look like padding"):
            load([body(inside, answer=20)], **options)
    few = routing(tokens=PROMPT + 200 - 1, layers=2, top_k=1)
    few[PROMPT + 3] = 0  # two layers of eight experts: one token in 64 has expert 0 in both
    traces, notes = load([body(few, answer=200)])
    assert (traces.counts == counts(few[PROMPT:])).all()
    assert "taken as routing, not as padding" in notes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(2, 20), st.data())
def test_any_padding_and_any_dense_layers(tmp_path_factory, seed, layers, dense, prompt, answer, data):
    """Zeros for dense layers and zeros around the tokens never change the counts of the others."""
    tokens = prompt + answer - 1
    ids = routing(seed, tokens=tokens, layers=layers + dense, top_k=3)
    zeros = data.draw(st.permutations(range(layers + dense)))[:dense]
    ids[:, zeros] = 0
    left, right = data.draw(st.sampled_from([(0, 0), (7, 0), (0, 7)]))
    rows = np.pad(ids, ((left, right), (0, 0), (0, 0)))
    folder = tmp_path_factory.mktemp("padding")
    (folder / "r.jsonl").write_text(json.dumps(body(rows, prompt=prompt, answer=answer)))
    options = TraceOptions(num_experts=EXPERTS, batch_size=1)
    found = import_traces([folder / "r.jsonl"], source="vllm", destination=folder / "t.safetensors", options=options)
    kept = [layer for layer in range(layers + dense) if layer not in zeros]
    assert found.layer_ids == tuple(kept)
    assert (Traces.load(folder / "t.safetensors").counts == counts(ids[prompt:, kept])).all()


def test_the_number_of_experts_is_not_guessed_without_a_word(load):
    traces, notes = load([body(routing())], num_experts=None)
    assert f"{traces.num_experts} experts, the highest id seen + 1; give --num-experts" in notes
    _, notes = load([body(routing())], num_experts=64)
    assert "highest id" not in notes
    assert "of 64 experts were never chosen in any layer" in notes


def test_columns_of_padding_are_no_experts_of_a_token(load):
    ids = routing()
    padded = np.concatenate([ids, np.full((*ids.shape[:2], 6), -1)], axis=2)
    traces, _ = load([body(padded, prompt=PROMPT) | {"choices": [{"routed_experts": npy(padded, np.int16)}]}], top_k=2)
    assert traces.top_k == 2 and (traces.counts == counts(ids[PROMPT:])).all()


def test_an_expert_appended_to_every_token_is_named(load):
    ids = routing()
    shared = np.concatenate([ids, np.full((*ids.shape[:2], 1), EXPERTS)], axis=2)
    _, notes = load([body(shared)] * 3, num_experts=None, phase=Phase.MIXED)
    assert f"expert {EXPERTS} gets one of every 3 assignments" in notes


@pytest.mark.parametrize("cut", [2, 4])
def test_bytes_without_a_shape_are_not_split_into_more_layers_of_fewer_experts(load, cut):
    """Experts of one choice never are the same, those of two layers are at times: so the numbers tell."""
    ids = routing(tokens=59, layers=6, experts=16, top_k=4)
    ids[:, 0] = 0  # dense
    told = {
        "prompt_tokens": 10,
        "completion_tokens": 50,
        "routed_experts": base64.b64encode(ids.astype("<i4")).decode(),
    }
    response = {"meta_info": {"id": "r", **told}}
    options = {"source": "sglang", "num_experts": 16}
    with pytest.raises(InputError, match=r"never name the same expert.*give --num-hidden-layers 6 --top-k 4"):
        load([response], num_hidden_layers=6 * cut, top_k=4 // cut, **options)
    traces, _ = load([response], num_hidden_layers=6, top_k=4, **options)
    assert traces.layer_ids == (1, 2, 3, 4, 5) and (traces.counts == counts(ids[10:, 1:], 16)).all()


def test_answers_of_several_networks_are_named(load) -> None:
    one, two = (body(routing(seed), model=f"m{seed}") for seed in range(2))
    assert "m0" not in load([one])[1]
    assert "answers of m0, m1: counted together, as if they were one network" in load([one, two])[1]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("source", ["vllm", "sglang"])
def test_rows_of_answers_alone_perhaps_packed(tmp_path, suffix, source):
    """As offline scripts keep `CompletionOutput`: its fields beside those of the prompt."""
    ids = [routing(seed) for seed in range(2)]
    rows = [
        {"prompt_token_ids": [0] * PROMPT, "token_ids": [0] * ANSWER, "routed_experts": each.tolist()} for each in ids
    ]
    text = json.dumps(rows) if ".json." in suffix else "\n".join(map(json.dumps, rows))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    options = TraceOptions(num_experts=EXPERTS, batch_size=2)
    import_traces([path], source=source, destination=tmp_path / "t.safetensors", options=options)
    traces = Traces.load(tmp_path / "t.safetensors")
    assert (traces.counts == sum(counts(each[PROMPT:]) for each in ids)).all()
    if suffix.endswith(".gz"):
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match=r"a\.json.*end"):
            import_traces([path], source=source, destination=tmp_path / "t.safetensors", options=options)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_that_are_too_long_are_named_once(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("gemopt.formats.responses.bodies.LINE_LIMIT", 64)
    path, text = tmp_path / f"a{suffix}", json.dumps(body(routing())).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    with pytest.raises(InputError, match=rf"a\{suffix}: line 1: got 64 bytes; lines below 64 bytes$"):
        import_traces([path], source="vllm", destination=tmp_path / "t.safetensors", options=TraceOptions())


def test_routing_within_the_message_of_a_choice(load) -> None:
    ids = routing()
    whole = body(ids)
    whole["choices"][0] = {"message": {"content": "", "routed_experts": whole["choices"][0].pop("routed_experts")}}
    assert (load([whole])[0].counts == counts(ids[PROMPT:])).all()
