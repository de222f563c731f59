"""Experts that tokens chose are no counts [steps, layers, experts]: told by the numbers, and what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Traces


@pytest.mark.parametrize(("experts", "top_k", "dense"), [(8, 2, 0), (64, 8, 0), (64, 8, 3), (256, 6, 1)])
def test_ids_of_tokens_are_no_counts(load, tmp_path, experts, top_k, dense):
    rng = np.random.default_rng(4)
    ids = np.argsort(rng.random((300, 6, experts)), axis=2)[:, :, :top_k]
    ids[:, :dense] = 0
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(InputError, match=rf"got {top_k} experts of each token, .*\[300, 6, {top_k}\].*ids of tokens"):
        load(tmp_path / "a.npy", "array")
    assert load(tmp_path / "a.npy", "array", num_experts=top_k)[0].num_experts == top_k  # told to be counts


@pytest.mark.parametrize("pad", [0, -1, 64])
def test_ids_with_padding_or_turned_are_no_counts(load, tmp_path, pad):
    rng = np.random.default_rng(4)
    ids = rng.random((300, 6, 64)).argsort(axis=2)[:, :, :4]
    ids[rng.random(ids.shape) < 0.05] = -1
    ids[:40] = pad
    for array in (ids, ids.transpose(0, 2, 1)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(InputError, match=r"got 4 experts of each token, .*ids of tokens"):
            load(tmp_path / "a.npy", "array")


@pytest.mark.parametrize(("layers", "tokens", "top_k"), [(2, 200, 2), (4, 128, 2), (16, 50, 8), (48, 200, 4)])
def test_ids_by_layer_are_no_counts(load, tmp_path, layers, tokens, top_k):
    ids = np.random.default_rng(4).random((layers, tokens, 32)).argsort(axis=2)[:, :, :top_k]
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(InputError, match=rf"got {top_k} experts of each token"):
        load(tmp_path / "a.npy", "array")
    np.savez(tmp_path / "a.npz", counts=ids)
    with pytest.raises(InputError, match="experts of tokens, by the numbers"):
        Traces.load(tmp_path / "a.npz")


def test_few_experts_far_apart_are_counts(load, tmp_path):
    popular = np.array([1, 3, 9, 27])
    counts = popular * np.random.default_rng(5).integers(1, 40, (300, 3, 1))  # never a tie within a row
    np.save(tmp_path / "a.npy", counts[:, :1] + np.zeros((300, 3, 4), int))  # every layer alike
    assert load(tmp_path / "a.npy", "array")[0].num_experts == 4


@pytest.mark.parametrize("drafts", [0, 1])
def test_layers_with_as_many_assignments_are_counts_in_any_order(load, tmp_path, drafts):
    """Popularities that are the same, but of other experts in each layer, leave few ties; two experts none."""
    popular = np.array([[100, 52, 25, 11, 7, 3], [3, 7, 11, 25, 52, 100], [7, 3, 52, 100, 11, 25]])
    counts = np.stack([popular * (1 + step % 5) for step in range(40)])
    counts = np.concatenate([counts, counts[:, :drafts] // 2], axis=1)
    np.save(tmp_path / "a.npy", counts)
    assert (load(tmp_path / "a.npy", "array")[0].counts == counts).all()
    rng = np.random.default_rng(0)
    first = np.stack([rng.binomial(n, 0.5, size=24) for n in (101, 33, 77, 65, 91, 53, 87, 45)])
    counts = np.stack([first, np.array([101, 33, 77, 65, 91, 53, 87, 45])[:, None] - first], axis=2)  # odd: no ties
    np.save(tmp_path / "a.npy", counts)
    assert (load(tmp_path / "a.npy", "array")[0].counts == counts).all()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", ["columns", "lists", "lines"])
def test_ids_in_tables_are_no_counts(load, tmp_path, kind, first):
    """A column for each of the experts that a token chose is none for each expert."""
    ids = np.random.default_rng(1).random((40, 6, 32)).argsort(axis=2)[:, :, :4]
    rows = [{"step": t, "layer": i, "counts": ids[t, i].tolist()} for t in range(40) for i in range(6)]
    head = ["step,layer", *(f"expert_{first + k}" for k in range(4))]
    texts = {
        "columns": "\n".join([",".join(head), *(f"{r['step']},{r['layer']},{str(r['counts'])[1:-1]}" for r in rows)]),
        "lists": json.dumps(rows),
        "lines": "\n".join(
            ["step,layer,expert,count", *(f"{t},{i},{first + k},{n}" for (t, i, k), n in np.ndenumerate(ids))]
        ),
    }
    path = tmp_path / ("a.json" if kind == "lists" else "a.csv")
    path.write_text(texts[kind])
    with pytest.raises(InputError, match=r"experts that tokens chose, by the numbers; .*--from tokens"):
        load(path, "csv")
