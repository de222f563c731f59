"""Damaged files: whatever a byte becomes, the answer is a result or one clear line, never another exception."""

from __future__ import annotations

import base64
import io
import json
import random

import numpy as np
import pytest
from safetensors.numpy import save

from gemopt.exceptions import InputError
from gemopt.formats.engine import Facts, TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.formats.registry import engines, export, import_placement, side_path

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

TRIALS = 60
PIECES = (b"9999999999", b"null", b"[]", b"-1", b"1e5", b'"x"', b"{}", b"true")


def damaged(data: bytes, rnd: random.Random) -> bytes:
    """Cut short, or a few bytes changed, removed or put in."""
    if rnd.random() < 0.25:
        return data[: rnd.randrange(len(data))]
    made = bytearray(data)
    for _ in range(rnd.choice((1, 1, 2, 5, 20))):
        place, kind = rnd.randrange(len(made)), rnd.random()
        if kind < 0.4:
            made[place] = rnd.randrange(256)
        elif kind < 0.7:
            made[place] = rnd.choice(b'0123456789[]{},:"-.eE \n')
        elif kind < 0.85 and len(made) > 20:
            del made[place : place + rnd.randrange(1, 9)]
        else:
            made[place:place] = rnd.choice(PIECES)
    return bytes(made)


@pytest.mark.parametrize("name,suffix", [(e.name, s) for e in engines() if e.write and e.read for s in e.suffixes])
def test_damaged_placements(make_placement, tmp_path, name, suffix):
    path = tmp_path / f"p{suffix}"
    export(make_placement(layers=2, layer_ids=[1, 2], num_hidden_layers=3), to=name, path=path)
    side_path(path).unlink(missing_ok=True)
    good, rnd, refused = path.read_bytes(), random.Random(name + suffix), 0
    for _ in range(TRIALS):
        path.write_bytes(damaged(good, rnd))
        try:
            import_placement(path, source=name, facts=Facts(num_ranks=2))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > TRIALS // 2


def pt(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def recordings():
    """Engine, files and options of one small recording of each kind."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (5, 4, 8)).astype(np.int32)
    ids = np.argsort(rng.random((6, 3, 8)), axis=2)[:, :, :2].astype(np.int32)
    record = {
        "forward_pass_id": 3,
        "rank": 0,
        "global_physical_count": torch.ones((4, 10), dtype=torch.int32),
        "input_ids": [1, 2],
        "forward_mode": 2,
        "topk_ids_of_layer": torch.from_numpy(rng.integers(0, 10, (4, 2, 8)).astype(np.int32)),
    }
    table = torch.from_numpy(np.tile(np.arange(10) % 8, (4, 1)))
    rank = save({f"{step}_{layer}": rng.integers(0, 9, 8) for step in range(3) for layer in range(2)})
    meta = b'{"num_experts": 8, "num_experts_per_token": 2}'

    def response(encoded) -> bytes:
        return json.dumps({"choices": [{"routed_experts": encoded}], "usage": {"completion_tokens": 3}}).encode()

    raw = {"meta_info": {"routed_experts": base64.b64encode(ids.tobytes()).decode(), "completion_tokens": 3}}
    text = base64.b64encode(npy(ids)).decode()
    tokens = {"keep_tokens": True}
    return {
        "stat": ("sglang", {"a_1.pt": pt({"logical_count": torch.from_numpy(counts)})}, {}),
        "detail": ("sglang", {"a_1_0.pt": pt({"records": [record], "last_physical_to_logical_map": table})}, {}),
        "tokens": ("sglang", {"a_1_0.pt": pt({"records": [record], "last_physical_to_logical_map": table})}, tokens),
        "raw": ("sglang", {"r.json": json.dumps(raw).encode()}, {"num_hidden_layers": 3, "top_k": 2}),
        "statistic": ("tensorrt-llm", {"meta_info.json": meta, "rank0.safetensors": rank}, {}),
        "npy": ("array", {"a.npy": npy(counts)}, {}),
        "safetensors": ("array", {"a.safetensors": save({"counts": counts})}, {}),
        "jsonl": ("vllm", {"r.jsonl": response(text) + b"\n"}, {}),
        "lists": ("lmdeploy", {"r.json": response(ids.tolist())}, {}),
    }


@pytest.mark.parametrize("kind", recordings())
def test_damaged_recordings(tmp_path, kind):
    source, files, options = recordings()[kind]
    folder, rnd, refused = tmp_path / "in", random.Random(kind), 0
    folder.mkdir()
    for _ in range(TRIALS):
        victim = rnd.choice(list(files))
        for name, data in files.items():
            (folder / name).write_bytes(damaged(data, rnd) if name == victim else data)
        target = tmp_path / "out.safetensors"
        try:
            import_traces([folder], source=source, destination=target, options=TraceOptions(**options))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > TRIALS // 3
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "out.safetensors"}
