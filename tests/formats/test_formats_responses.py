"""Responses of every shape that clients keep; counts must equal the truth, and what was left out must be said."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from cli_inputs import gemopt
from responded import ANSWER, EXPERTS, LAYERS, PROMPT, TOP_K, body, counts, loader, npy, routing

from gemopt.exceptions import InputError
from gemopt.traces import Phase


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


# Prompt and answer


def test_several_samples_of_one_prompt(load):
    """n=2: the prompt is in the rows of both, and usage adds up the answers."""
    first, second = routing(0), routing(1, tokens=PROMPT + 7 - 1)
    second[:PROMPT] = first[:PROMPT]
    both = body(first, answer=ANSWER + 7)
    both["choices"].append({"index": 1, "routed_experts": npy(second)})
    traces, _ = load([both])
    assert (traces.counts == counts(np.concatenate([first[PROMPT:], second[PROMPT:]]))).all()
    prefill, notes = load([both], phase=Phase.PREFILL)
    assert prefill.counts.sum() == PROMPT * LAYERS * TOP_K
    assert "1 further sample of a prompt" in notes
    every, notes = load([both], phase=Phase.MIXED)
    assert (every.counts == counts(np.concatenate([first, second[PROMPT:]]))).all()
    assert "1 further sample of a prompt" in notes
    both["usage"]["completion_tokens"] += 1
    with pytest.raises(InputError, match="of all answers"):
        load([both])
    for choice, length in zip(both["choices"], (ANSWER, 7), strict=True):
        choice["token_ids"] = [0] * length
    with pytest.raises(InputError, match="completion_tokens"):
        load([both])
    both["usage"] = {"prompt_tokens": PROMPT}
    assert (load([both])[0].counts == traces.counts).all()


def test_several_prompts_in_one_request(load):
    """Prompts of their own: usage adds up the prompts as well."""
    first, second = routing(0), routing(1, tokens=4 + ANSWER - 1)
    both = body(first, prompt=PROMPT + 4, answer=2 * ANSWER)
    both["choices"].append({"index": 1, "routed_experts": npy(second)})
    with pytest.raises(InputError, match="of all answers"):
        load([both])
    for choice in both["choices"]:
        choice["token_ids"] = [0] * ANSWER
    assert (load([both])[0].counts == counts(np.concatenate([first[PROMPT:], second[4:]]))).all()
    prefill, notes = load([both], phase=Phase.PREFILL, batch_size=1)
    assert prefill.counts.sum() == (PROMPT + 4) * LAYERS * TOP_K
    assert "further sample" not in notes


@pytest.mark.parametrize(
    "known",
    [
        {"usage": {"completion_tokens": ANSWER}},
        {"usage": {"prompt_tokens": PROMPT}},
        {"prompt_token_ids": [0] * PROMPT},
        {"choices": {"token_ids": [0] * ANSWER}},
        {"choices": {"prompt_token_ids": [0] * PROMPT}},
        {"prompt_ids": [0] * PROMPT, "num_prompt_tokens": None},
        {"num_prompt_tokens": PROMPT},
    ],
)
def test_any_of_the_counts_tells_the_prompt_from_the_answer(load, known):
    ids = routing()
    whole = body(ids)
    del whole["usage"]
    whole["choices"][0].update(known.pop("choices", {}))
    traces, _ = load([{**whole, **known}])
    assert (traces.counts == counts(ids[PROMPT:])).all()


@pytest.mark.parametrize("known", [{}, {"prompt_ids": [[0] * PROMPT]}])
def test_without_any_count_nothing_is_guessed(load, known):
    ids = routing()
    whole = body(ids) | known
    del whole["usage"]
    for phase in (Phase.DECODE, Phase.PREFILL):
        with pytest.raises(InputError, match=r"tell the prompt from the answer; --phase all"):
            load([whole], phase=phase)
    traces, notes = load([whole], phase=Phase.MIXED)
    assert (traces.counts == counts(ids)).all()
    assert "as if they had been generated" in notes


def test_rows_that_do_not_fit_the_counts(load):
    ids = routing()
    with pytest.raises(InputError, match="at most the 3 of the prompt"):
        load([body(ids, prompt=3)])
    traces, notes = load([body(ids, prompt=PROMPT + 20)])  # routed_experts_prompt_start, or a cached prefix
    assert (traces.counts == counts(ids[PROMPT:])).all()
    assert "1 answers have no rows for the start of their prompt" in notes
    traces, notes = load([body(ids, answer=ANSWER - 1)])  # the token that ended the answer is not counted
    assert (traces.counts == counts(ids[PROMPT:])).all()
    assert "a row more than tokens" in notes


@pytest.mark.parametrize(
    "told", [{"usage": {"prompt_tokens_details": {"cached_tokens": 6}}}, {"num_cached_tokens": 6}, {"cached_tokens": 6}]
)
def test_cached_tokens_of_a_prompt_are_not_computed_again(load, told):
    """A prefix cache had them: they have rows, as a later turn of a conversation has those of the turns before."""
    ids = routing()
    whole = body(ids)
    if "cached_tokens" in told:  # SGLang
        raw = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
        meta = {"routed_experts": raw, "prompt_tokens": PROMPT, "completion_tokens": ANSWER, **told}
        source, more = "sglang", {"num_hidden_layers": LAYERS, "top_k": TOP_K}
        whole = {"meta_info": meta}
    else:
        source, more = "vllm", {}
        whole["usage"].update(told.get("usage", {}))
        whole.update({"num_cached_tokens": told["num_cached_tokens"]} if "num_cached_tokens" in told else {})
    prefill, notes = load([whole], source=source, phase=Phase.PREFILL, **more)
    assert (prefill.counts == counts(ids[6:PROMPT]).sum(axis=0)).all()
    assert "left out: 6 tokens of prompts from the engine's prefix cache" in notes
    traces, notes = load([whole], source=source, **more)
    assert (traces.counts == counts(ids[PROMPT:])).all()
    assert "prefix cache" not in notes
    assert (load([whole], source=source, phase=Phase.MIXED, **more)[0].counts == counts(ids[6:])).all()


def test_cached_tokens_without_rows_or_of_several_prompts(load):
    whole = body(routing(), prompt=PROMPT + 20)  # the engine left the rows of a cached prefix out
    whole["usage"]["prompt_tokens_details"] = {"cached_tokens": 22}
    prefill, _ = load([whole], phase=Phase.PREFILL)
    assert prefill.counts.sum() == (PROMPT - 2) * LAYERS * TOP_K
    whole = body(routing(), answer=1, prompt=PROMPT + ANSWER - 1)
    whole["usage"]["prompt_tokens_details"] = {"cached_tokens": PROMPT + ANSWER - 1}
    with pytest.raises(InputError, match="no prefill token; 14 tokens of prompts from the engine's prefix cache"):
        load([whole], phase=Phase.PREFILL)
    both = body(routing(0), prompt=PROMPT + 4, answer=2 * ANSWER)
    both["choices"].append({"index": 1, "routed_experts": npy(routing(1, tokens=4 + ANSWER - 1))})
    for choice in both["choices"]:
        choice["token_ids"] = [0] * ANSWER
    both["usage"]["prompt_tokens_details"] = {"cached_tokens": 6}
    with pytest.raises(InputError, match="6 of several prompts together"):
        load([both], phase=Phase.PREFILL)
    assert load([both])[0].num_steps == 2 * (ANSWER - 1)


def test_draft_tokens_are_named(load):
    raw = base64.b64encode(routing().astype(np.int32).tobytes()).decode()
    meta = {"routed_experts": raw, "prompt_tokens": PROMPT, "completion_tokens": ANSWER, "spec_verify_ct": 3}
    sizes = {"source": "sglang", "num_hidden_layers": LAYERS, "top_k": TOP_K}
    assert "1 answers were decoded with draft tokens" in load([{"meta_info": meta}], **sizes)[1]
    assert "draft" not in load([{"meta_info": {**meta, "spec_verify_ct": 0}}], **sizes)[1]
    assert "draft" not in load([{"meta_info": meta}], phase=Phase.PREFILL, **sizes)[1]


# Containers


def stream(ids, name="s", **final):
    first = {"id": name, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "a"}}]}
    last = {"id": name, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "routed_experts": npy(ids)}]}
    usage = {"id": name, "choices": [], "usage": {"prompt_tokens": PROMPT, "completion_tokens": ANSWER}}
    return [first, last, {**usage, **final}]


@pytest.mark.parametrize("wrapped", ["plain", "batch", "list", "result", "stream", "events", "mixed streams", "json"])
def test_wrapped_responses(load, wrapped):
    a, b = routing(0), routing(1)
    one, two = body(a, id="a"), body(b, id="b")
    both = [*stream(a, "a"), *stream(b, "b")]
    events = "\n\n".join(f"event: message\ndata: {json.dumps(line)}" for line in both)
    lines = {
        "plain": [one, two],
        "json": [one, two],
        "batch": [{"error": None, "response": {"status_code": 200, "body": each}} for each in (one, two)],
        "list": [[one, two]],
        "result": [{"result": one}, {"result": [two]}],
        "stream": both,
        "mixed streams": [line for pair in zip(stream(a, "a"), stream(b, "b"), strict=True) for line in pair],
        "events": f": ping\n\n{events}\n\ndata: [DONE]\n",
    }[wrapped]  # fmt: skip
    traces, notes = load(lines, suffix=".json" if wrapped == "json" else ".jsonl")
    assert (traces.counts == counts(np.concatenate([a[PROMPT:], b[PROMPT:]]))).all()
    assert "skipped" not in notes


def test_a_stream_that_repeats_what_it_sent(load):
    ids = routing()
    chunks = stream(ids)
    chunks[0]["choices"][0]["routed_experts"] = npy(ids[:6])
    assert (load(chunks)[0].counts == counts(ids[PROMPT:])).all()
    chunks[0]["choices"][0]["routed_experts"] = npy((ids[:6] + 1) % EXPERTS)
    with pytest.raises(InputError, match="2 chunks that differ"):
        load(chunks)


def test_sglang_streams_count_once(load):
    ids = routing().astype(np.int32)
    text = base64.b64encode(ids.tobytes()).decode()
    meta = {"id": "r", "prompt_tokens": PROMPT, "completion_tokens": 2, "finish_reason": None}
    part = base64.b64encode(ids[: PROMPT + 1].tobytes()).decode()
    last = {**meta, "completion_tokens": ANSWER, "finish_reason": {"type": "stop"}, "routed_experts": text}
    lines = [{"text": "a", "meta_info": {**meta, "routed_experts": part}}, {"text": "ab", "meta_info": last}]
    traces, notes = load(lines, "sglang", num_hidden_layers=LAYERS, top_k=TOP_K)
    assert (traces.counts == counts(ids[PROMPT:])).all()
    assert "the number of tokens fits" in notes


def test_what_has_no_tokens_is_skipped_and_counted(load):
    ids = routing()
    nothing = {"choices": [{"index": 0, "routed_experts": None, "finish_reason": "abort"}], "usage": {}}
    lines = [
        body(ids, id="a"),
        nothing,
        {"object": "error", "message": "too long", "code": 400},
        {"id": "x", "response": {"status_code": 429, "body": {"error": {"message": "slow down"}}}, "error": None},
        {"id": "y", "response": None, "error": {"code": "batch_expired"}},
        {"detail": "not found"},
        {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}},
        {"meta_info": {"id": "z", "completion_tokens": 0, "finish_reason": {"type": "abort", "message": "no"}}},
        body(routing(1), id="b"),
    ]
    traces, notes = load(lines)
    assert traces.num_steps == 2 * (ANSWER - 1)
    assert "skipped 7 of 9 answers: 2 aborted, 4 error, 1 without routed_experts" in notes
    with pytest.raises(InputError, match=r"no decode token; skipped 1 of 1 answers: 1 aborted.*ask the engine"):
        load([nothing])


def test_the_same_answer_twice_counts_once(load):
    one, other = body(routing(), id="a"), body(routing(1), id="a")
    traces, notes = load([one, other, one])
    assert traces.num_steps == 2 * (ANSWER - 1)
    assert "1 answers came twice: counted once" in notes
    del one["id"]  # without a name two equal answers may be two requests
    assert load([one, one])[0].num_steps == 2 * (ANSWER - 1)


def test_answers_that_choose_alike_are_named(load):
    """Sent twice, or kept twice without an id: they count, but not without a word."""
    first, other = body(routing(0)), body(routing(1))
    traces, notes = load([first, other, first])
    assert (
        traces.counts.sum(axis=0)
        == 2 * counts(routing(0)[PROMPT:]).sum(axis=0) + counts(routing(1)[PROMPT:]).sum(axis=0)
    ).all()
    assert "1 answers choose the experts of another, token by token" in notes
    assert "token by token" not in load([first, other])[1]


def test_an_id_far_above_the_others_stands_for_none(load):
    ids = routing(0, tokens=PROMPT + 40 - 1, experts=64, top_k=TOP_K)
    ids[-1, :, 0] = 255
    answer = body(ids, answer=40)
    with pytest.raises(InputError, match=r"255, and no other above \d+; experts: a number that stands for none"):
        load([answer], num_experts=None)
    assert load([answer], num_experts=256)[0].num_experts == 256


# Encodings


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64", None])
def test_sglang_wire_types(load, dtype):
    ids = routing()
    meta = {"prompt_tokens": PROMPT, "completion_tokens": ANSWER, "routed_experts_dtype": dtype}
    data = base64.b64encode(ids.astype(dtype or "int32").tobytes()).decode()
    given = {"num_hidden_layers": LAYERS, "top_k": TOP_K}
    for holder in (
        {"meta_info": {**meta, "routed_experts": data}},
        {"choices": [{"sgl_ext": {"routed_experts": data, "routed_experts_dtype": dtype}}], "usage": meta},
        {"choices": [{}], "sglext": {"routed_experts": data, "routed_experts_dtype": dtype}, "usage": meta},
    ):
        assert (load([holder], "sglang", **given)[0].counts == counts(ids[PROMPT:])).all()
    with pytest.raises(InputError, match="routed_experts_dtype: got float8"):
        load([{"meta_info": {**meta, "routed_experts": data, "routed_experts_dtype": "float8"}}], "sglang", **given)


@pytest.mark.parametrize("layers,top_k", [(1, 4), (4, 1), (4, 2), (2, 1), (1, 1), (8, 2)])
def test_a_wrong_hint_makes_no_wrong_counts(load, layers, top_k):
    """The bytes have no shape; any reading with another number of tokens is refused."""
    data = base64.b64encode(routing().astype(np.int32).tobytes()).decode()
    meta = {"prompt_tokens": PROMPT, "completion_tokens": ANSWER, "routed_experts": data}
    given = {"num_hidden_layers": layers, "top_k": top_k}
    if layers * top_k == LAYERS * TOP_K:  # as many tokens: only the note can tell
        try:
            assert "the same bytes would fit another split" in load([{"meta_info": meta}], "sglang", **given)[1]
        except InputError as error:
            assert any(word in str(error) for word in ("expert twice", "repeats experts", "expert 0"))
        return
    with pytest.raises(InputError, match="give the right --num-hidden-layers and --top-k"):
        load([{"meta_info": meta}], "sglang", **given)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.b85encode])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
@pytest.mark.parametrize("start", [0, 4, None])
def test_dynamo(load, encode, dtype, start):
    ids = routing()
    rows = ids[start or 0 :]
    said = {"data": encode(rows.astype(dtype).tobytes()).decode(), "shape": list(rows.shape), "dtype": dtype}
    response = body(ids)
    del response["choices"][0]["routed_experts"]
    for inside in ({"routed_experts": {**said, "start": start}}, {"engine_data": {"routed_experts": said}}):
        assert (load([{**response, "nvext": inside}])[0].counts == counts(ids[PROMPT:])).all()
    for wrong in (
        {"shape": [14, 2]},
        {"shape": [99, 2, 2]},
        {"dtype": "x"},
        {"dtype": None},
        {"start": -1},
        {"data": 3},
    ):
        with pytest.raises(InputError, match="routed_experts"):
            load([{**response, "nvext": {"routed_experts": {**said, **wrong}}}])


def test_outputs_of_vllm_without_a_server(load):
    ids = routing()
    output = {"token_ids": list(range(ANSWER)), "routed_experts": ids.tolist()}
    request = {"request_id": "0", "prompt_token_ids": list(range(PROMPT)), "outputs": [output]}
    assert (load([request])[0].counts == counts(ids[PROMPT:])).all()


def test_what_is_no_response_has_a_way_in(load):
    ways = r"counts in JSON: --from array.*logical_count", r"ids of tokens: .*from_tokens"
    for other, way in zip(({"layer_0": {"0": 12, "1": 5}}, {"layer": 0, "topk_ids": [1, 2]}), ways, strict=True):
        with pytest.raises(InputError, match=rf"got keys layer.*choices, or meta_info.*{way}"):
            load([other])


def test_the_command_says_it_all(tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, [body(routing()), {"error": "x"}])))
    words = ["trace", "import", tmp_path / "r.jsonl", "--from", "vLLM", "-o", tmp_path / "t.safetensors"]
    for more, prefix in (([], "note: "), (["--json"], "")):
        code, out, _ = gemopt(capsys, *words, *more)
        assert code == 0
        assert f"{prefix}skipped 1 of 2 answers: 1 error" in out
        assert "8 experts, the highest id seen + 1" in out
    assert "4 steps" in out or json.loads(out)["num_steps"] == ANSWER - 1
    assert "14 steps" in gemopt(capsys, *words, "--phase", "all", "--num-experts", "8")[1]
