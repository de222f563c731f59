"""Responses of vLLM, SGLang and LMDeploy with the experts of their tokens; counts must equal the truth."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from recordings import load
from responded import ANSWER, PROMPT, counts, loader, routing

from gemopt.exceptions import InputError
from gemopt.traces import Phase


def requests(rng, layers=3, experts=8, top_k=2, lengths=((3, 4), (5, 2), (1, 6))):
    """(prompt tokens, generated tokens, ids [prompt + generated - 1, layers, K]) of some requests."""
    return [
        (p, g, np.argsort(rng.random((p + g - 1, layers, experts)), axis=2)[:, :, :top_k].astype(np.int32))
        for p, g in lengths
    ]


def expected_steps(decoded, batch):
    """Continuous batching, simulated token by token: each free sequence takes the next request."""
    waiting, running, steps = list(decoded), [], []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(list(waiting.pop(0)))
        steps.append([request.pop(0) for request in running])
        running = [request for request in running if request]
    return steps


def counted(steps, layers, experts):
    counts = np.zeros((len(steps), layers, experts), np.int64)
    for step, tokens in enumerate(steps):
        for ids in tokens:
            for layer, chosen in enumerate(ids):
                counts[step, layer, chosen] += 1
    return counts


def npy_text(array) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_vllm_responses(tmp_path):
    made = requests(np.random.default_rng(0))
    path = tmp_path / "responses.jsonl"
    lines = [
        {
            "choices": [{"routed_experts": npy_text(ids.astype(np.uint8))}],
            "usage": {"prompt_tokens": p, "completion_tokens": g},
        }
        for p, g, ids in made
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    traces, _ = load(path, "vllm", tmp_path, batch_size=2, num_experts=8)
    truth = counted(expected_steps([ids[p:] for p, _, ids in made], 2), 3, 8)
    assert (traces.counts == truth).all()
    assert (traces.phase == Phase.DECODE).all()
    prefill, _ = load(path, "vllm", tmp_path, batch_size=2, num_experts=8, phase=Phase.PREFILL)
    assert (prefill.counts == counted([[*made[0][2][:3], *made[1][2][:5]], made[2][2][:1]], 3, 8)).all()


def test_sglang_responses_and_dense_layers(tmp_path):
    made = requests(np.random.default_rng(1))
    path = tmp_path / "responses.json"
    bodies = []
    for _, g, ids in made:
        ids[:, 0] = 0  # a dense layer: never captured
        meta = {"completion_tokens": g, "routed_experts": base64.b64encode(ids.tobytes()).decode()}
        bodies.append({"text": "x", "meta_info": meta})
    path.write_text(json.dumps(bodies))
    traces, _ = load(path, "sglang", tmp_path, batch_size=4, num_hidden_layers=3, top_k=2, num_experts=8)
    assert traces.layer_ids == (1, 2)
    assert traces.num_hidden_layers == 3
    assert (traces.counts == counted(expected_steps([i[p:, 1:] for p, _, i in made], 4), 2, 8)).all()
    with pytest.raises(InputError, match="--num-hidden-layers"):
        load(path, "sglang", tmp_path)
    with pytest.raises(InputError, match="multiple of 4"):
        load(path, "sglang", tmp_path, num_hidden_layers=7, top_k=3)


def test_lmdeploy_responses(tmp_path):
    made = requests(np.random.default_rng(2))
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"choices": [{"routed_experts": ids.tolist()}]} for _, _, ids in made]))
    # Without usage nothing tells the prompt from the answer: all tokens count, or none.
    traces, notes = load(path, "lmdeploy", tmp_path, batch_size=2, num_experts=8, phase=Phase.MIXED)
    assert "as if they had been generated" in notes[0]
    assert (traces.counts == counted(expected_steps([ids for _, _, ids in made], 2), 3, 8)).all()
    for phase in (Phase.PREFILL, Phase.DECODE):
        with pytest.raises(InputError, match=r"completion_tokens.*--phase all"):
            load(path, "lmdeploy", tmp_path, phase=phase)


@pytest.mark.parametrize(
    "body,word",
    [
        ([], "no token"),
        ([3], "JSON object"),
        ([{"choices": []}], "choices"),
        ([{"choices": [{"text": "x"}]}], "ask the engine"),
        ([{"choices": [{"routed_experts": "%%%"}]}], "base64"),
        ([{"choices": [{"routed_experts": "AAAA"}]}], r"\.npy"),
        ([{"choices": [{"routed_experts": base64.b64encode(b"\x93NUMPY\x01\x00").decode()}]}], r"complete \.npy"),
        ([{"choices": [{"routed_experts": [[[0, 1]], [[0]]]}]}], "whole numbers"),
        ([{"choices": [{"routed_experts": [[[0, 1]]]}, {"routed_experts": [[[0, 1], [0, 1]]]}]}], "one network"),
        ([{"choices": [{"routed_experts": [[[0, 0]]]}]}], "no token; 1 token of padding"),
        ([{"choices": [{"routed_experts": [[[1, 1]]]}]}], "every layer repeats"),
        ([{"choices": [{"routed_experts": [[[1, 1]], [[0, 1]]]}]}], "1 of 2 tokens"),
        ([{"choices": [{"routed_experts": [[[0, 1 << 40]]]}]}], "below 8192"),
        ([{"choices": [{"routed_experts": [[[0, 1]]]}], "usage": {"completion_tokens": 9}}], "at most the 1"),
        ([{"choices": [{"routed_experts": [[[0, 1]]]}], "usage": {"completion_tokens": "9"}}], "completion_tokens"),
    ],
)
def test_bad_responses(tmp_path, body, word):
    (tmp_path / "r.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=word):
        load(tmp_path / "r.json", "vllm", tmp_path, phase=Phase.DECODE if "usage" in str(body) else Phase.MIXED)


def test_hostile_npy_header(tmp_path):
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 1024, 8), }"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    body = {"choices": [{"routed_experts": base64.b64encode(data).decode()}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"complete \.npy"):
        load(tmp_path / "r.jsonl", "vllm", tmp_path)


@pytest.mark.parametrize("answer", [1, 5])
def test_rows_of_the_prompt_that_come_apart(tmp_path, answer):
    """vLLM 0.21 to 0.32 put them beside the choices, which hold the rows of the answer."""
    path, whole = tmp_path / "responses.jsonl", []
    with path.open("w") as stream:
        for prompt, generated, ids in requests(np.random.default_rng(4), lengths=((3, answer), (6, answer))):
            whole.append(ids)
            rest = npy_text(ids[prompt:].astype(np.uint8)) if generated > 1 else None
            body = {"choices": [{"index": 0, "routed_experts": rest}], "usage": {"prompt_tokens": prompt}}
            body["usage"]["completion_tokens"] = generated
            stream.write(json.dumps({**body, "prompt_routed_experts": npy_text(ids[:prompt].astype(np.uint8))}) + "\n")
    for phase, rows in {
        Phase.PREFILL: [ids[:prompt] for ids, prompt in zip(whole, (3, 6), strict=True)],
        Phase.MIXED: whole,
    }.items():
        traces, _ = load(path, "vllm", tmp_path, phase=phase, num_experts=8)
        assert (traces.counts.sum(axis=0) == counted([np.concatenate(rows)], 3, 8)[0]).all()


def test_rows_of_prompts_of_another_network_are_refused(tmp_path):
    rows = np.array([[[0, 1], [2, 3]]], np.uint8)
    body = {"choices": [{"routed_experts": npy_text(rows)}], "prompt_routed_experts": npy_text(rows[:, :1])}
    (tmp_path / "a.json").write_text(json.dumps({**body, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    with pytest.raises(InputError, match=r"shape \(1, 2, 2\); that of prompt_routed_experts, \(1, 1, 2\)"):
        load(tmp_path / "a.json", "vllm", tmp_path)


def test_ids_that_wrapped_are_told(tmp_path):
    ids = requests(np.random.default_rng(5), experts=384, top_k=8, lengths=((1, 200),))[0][2]
    body = {"choices": [{"routed_experts": npy_text(ids.astype(np.uint8))}]}
    (tmp_path / "a.json").write_text(json.dumps({**body, "usage": {"prompt_tokens": 1, "completion_tokens": 200}}))
    with pytest.raises(InputError, match=r"so do all layers: did the ids wrap in a small type"):
        load(tmp_path / "a.json", "vllm", tmp_path)
    with pytest.raises(InputError, match=r"got ids in uint8; a type that holds 384 experts; they wrapped"):
        load(tmp_path / "a.json", "vllm", tmp_path, num_experts=384)


@pytest.mark.parametrize("cumulative", [True, False])
def test_request_outputs_as_they_were_streamed(tmp_path, cumulative):
    """All the tokens so far in each, or only what is new; request ids begin again in the next run."""
    lines, wanted = [], []
    for seed in (0, 1):
        ids = routing(seed)
        wanted.append(ids[PROMPT:])
        for end in (2, 3, ANSWER):
            begin = 0 if cumulative or end == 2 else {3: 2, ANSWER: 3}[end]
            output = {"index": 0, "token_ids": list(range(begin, end))}
            if cumulative or end == ANSWER:
                output["routed_experts"] = ids[: PROMPT + end - 1].tolist()
            prompt = list(range(PROMPT))
            lines.append(
                {"request_id": "0", "prompt_token_ids": prompt, "outputs": [output], "finished": end == ANSWER}
            )
    traces, notes = loader(tmp_path)(lines)
    assert (traces.counts == counts(np.concatenate(wanted))).all()
    assert "skipped" not in notes and "twice" not in notes
