"""Importance matrices of llama.cpp."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError

COUNTS = routed(np.random.default_rng(3), steps=2, layers=3, experts=8)


def text(name):
    return struct.pack("<Q", len(name)) + name.encode()


def matrix(path, counts, first=1, kind="imatrix", change=None):
    """Write an imatrix as save_imatrix does: sums and counts of dense tensors and of the experts'."""
    tensors = {}
    for layer, row in enumerate(counts, first):
        tensors[f"blk.{layer}.attn_q.weight.counts"] = np.array([row.sum() // 2])
        for part in ("gate", "up", "down"):
            tensors[f"blk.{layer}.ffn_{part}_exps.weight.in_sum2"] = np.full((8, 4), 0.5)
            tensors[f"blk.{layer}.ffn_{part}_exps.weight.counts"] = row[:, None].astype(float)
    tensors.update(change or {})
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3)
    head += text("general.type") + struct.pack("<I", 8) + text(kind)
    head += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + text("calibration.txt")
    head += text("imatrix.chunk_count") + struct.pack("<II", 4, 50)
    body = b""
    for name, array in sorted(tensors.items()):
        shape = array.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(body))
        body += array.astype("<f4").tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def test_counts_of_an_importance_matrix(load, tmp_path):
    files = [matrix(tmp_path / f"im_{i}.gguf", step) for i, step in enumerate(COUNTS)]
    traces, notes = load(files[0], "llama.cpp")
    np.testing.assert_array_equal(traces.counts, COUNTS[:1])
    assert traces.layer_ids == (1, 2, 3) and "added up" in notes
    np.testing.assert_array_equal(load(files, "imatrix")[0].counts, COUNTS)
    chunks = {f"blk.{layer}.ffn_{part}_chexps.weight.counts": np.full((2, 1), 9) for layer in (1, 2) for part in "ab"}
    grove = matrix(tmp_path / "grove.gguf", COUNTS[0], change=chunks)  # GroveMoE's chunks beside the experts
    np.testing.assert_array_equal(load(grove, "imatrix")[0].counts, COUNTS[:1])


def test_what_is_no_importance_matrix_is_refused(load, tmp_path):
    good = matrix(tmp_path / "a.gguf", COUNTS[0])
    other = {"blk.2.ffn_up_exps.weight.counts": COUNTS[0, 0, :, None]}
    many = {f"blk.1.ffn_{part}_exps.weight.counts": np.full((8, 1), 2.0**24) for part in ("gate", "up", "down")}
    one = {name.replace("1", str(layer)): np.array([[100.0]]) for name in many for layer in (1, 2, 3)}
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 3) + b"name")
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:200])
    for path, words in (
        (matrix(tmp_path / "b.gguf", COUNTS[0], change=other), "other counts than .*blk.2.ffn_down_exps"),
        (matrix(tmp_path / "c.gguf", COUNTS[0], change=many), "32 bits hold exactly"),
        (matrix(tmp_path / "d.gguf", COUNTS[0][:0], kind="model"), "GGUF file of model; .*llama-imatrix"),
        (matrix(tmp_path / "f.gguf", COUNTS[0], change=one), "one number in each layer; .*run llama-imatrix again"),
        (matrix(tmp_path / "g.gguf", 0 * COUNTS[0]), "zeros alone"),
        (tmp_path / "old.dat", "older format has no counts by expert"),
        (tmp_path / "cut.gguf", "complete GGUF file"),
    ):
        with pytest.raises(InputError, match=words):
            load(path, "llama.cpp")
    for second, words in ((good, "each once"), (matrix(tmp_path / "e.gguf", COUNTS[1], first=2), "one network")):
        with pytest.raises(InputError, match=words):
            load([good, second], "llama.cpp")
