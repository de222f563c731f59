"""Responses with the experts of every token, as clients keep them, and the traces they become."""

from __future__ import annotations

import base64
import io
import json

import numpy as np

from gemopt.formats.engine import TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.traces import Traces

PROMPT, ANSWER, LAYERS, EXPERTS, TOP_K = 10, 5, 2, 8, 2


def routing(seed=0, *, tokens=PROMPT + ANSWER - 1, layers=LAYERS, experts=EXPERTS, top_k=TOP_K):
    return np.random.default_rng(seed).random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]


def npy(ids, dtype=np.uint8) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(dtype))
    return base64.b64encode(buffer.getvalue()).decode()


def body(ids, *, prompt=PROMPT, answer=ANSWER, **more):
    usage = {"prompt_tokens": prompt, "completion_tokens": answer}
    return {"choices": [{"index": 0, "routed_experts": npy(ids), "finish_reason": "stop"}], "usage": usage, **more}


def counts(ids, experts=EXPERTS):
    """[T, L, E] of tokens decoded one per step."""
    return np.stack([[np.bincount(row, minlength=experts) for row in token] for token in ids])


def loader(folder):
    """A call reads bodies (text as it is) as a file of responses: their traces, and the notes on them."""

    def call(bodies, source="vllm", suffix=".jsonl", **options):
        path = folder / f"responses{suffix}"
        lines = bodies if isinstance(bodies, str) else "\n".join(map(json.dumps, bodies))
        path.write_text(json.dumps(bodies) if suffix == ".json" else lines)
        given = TraceOptions(**{"num_experts": EXPERTS, "batch_size": 1, **options})
        found = import_traces([path], source=source, destination=folder / "t.safetensors", options=given)
        return Traces.load(folder / "t.safetensors"), " | ".join(found.notes)

    return call
