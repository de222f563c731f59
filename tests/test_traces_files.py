"""Files of traces: any traces survive them, small types, and what is no file of traces."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_traces import recorded, routed, same
from safetensors.numpy import save_file

from gemopt.exceptions import InputError
from gemopt.traces import Tokens, Traces

FILES = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def any_traces(draw: st.DrawFn) -> Traces:
    steps, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([1, 255, 256, 65535, 65536, (2**31 - 1) // experts]))
    names = tuple(draw(st.lists(st.text(max_size=5), max_size=3, unique=True)))
    counts = rng.integers(0, largest + 1, (steps, layers, experts))
    counts[0, 0, 0] = largest  # a trace of nothing is refused
    tokens = None
    if draw(st.booleans()):
        count = draw(st.integers(1, 6))
        ids = routed(rng, count, layers, experts, draw(st.integers(1, experts)))
        step = np.sort(rng.integers(0, steps, count))
        request = rng.integers(0, 2**40, count) if draw(st.booleans()) else None
        tokens = Tokens(ids=ids, step_of_token=step, request=request)
        counts = np.zeros_like(counts)
        for s, token in zip(step, ids, strict=True):
            for layer in range(layers):
                counts[s, layer, token[layer]] += 1
    return Traces(
        counts=counts,
        layer_ids=tuple(sorted(draw(st.sets(st.integers(0, 60), min_size=layers, max_size=layers)))),
        num_hidden_layers=draw(st.none() | st.just(61)),
        top_k=draw(st.none() | st.just(experts)),
        model=draw(st.none() | st.text(max_size=9)),
        phase=rng.integers(0, 3, steps) if draw(st.booleans()) else None,
        task=rng.integers(-1, len(names), steps) if draw(st.booleans()) else None,
        task_names=names,
        pair_counts=rng.integers(0, 2**40, (layers, experts, experts)) if draw(st.booleans()) else None,
        transitions=rng.integers(0, 9, (layers - 1, experts, experts)) if draw(st.booleans()) else None,
        tokens=tokens,
        extra={"note": draw(st.text(max_size=9))},
    )


@FILES
@given(any_traces())
def test_traces_survive_a_round_trip(tmp_path: Path, traces: Traces) -> None:
    traces.save(tmp_path / "t.safetensors")
    same(Traces.load(tmp_path / "t.safetensors"), traces)


def test_a_folder_of_numbered_files_is_one_trace(tmp_path: Path) -> None:
    whole = recorded(2)
    cuts = [0, 1, 5, whole.num_steps]
    for number, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        whole.steps(slice(a, b)).save(tmp_path / f"{number:06d}.safetensors")
    (tmp_path / ".000003.safetensors.0.tmp").write_bytes(b"half of it")
    same(Traces.load(tmp_path), whole)
    (tmp_path / "000001.safetensors").unlink()
    with pytest.raises(InputError, match=r"part 000001\.safetensors is missing"):
        Traces.load(tmp_path)
    (tmp_path / "000001.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"000001\.safetensors: got"):
        Traces.load(tmp_path)


def test_traces_are_not_written_under_a_name_that_could_not_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t\.npz; traces are written as \.safetensors"):
        Traces(counts=np.ones((1, 1, 2), int)).save(tmp_path / "t.npz")
    assert not list(tmp_path.iterdir())


def test_npz_with_counts(tmp_path: Path) -> None:
    counts = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.savez_compressed(tmp_path / "t.npz", counts=counts, phases=np.array(["a"]))
    np.testing.assert_array_equal(Traces.load(tmp_path / "t.npz").counts, counts)


GOOD = np.ones((2, 2, 3), np.int32)


def tensors(metadata: dict[str, str] | None = None, **arrays: Any) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=metadata)


def raw(dtype: str, shape: list[int], data: bytes) -> bytes:
    header = json.dumps({"counts": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def changed(value: float, dtype: Any = np.float64) -> np.ndarray:
    array = np.ones((2, 2, 3), dtype)
    array[1, 0, 2] = value
    return array


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("t.safetensors", b"", "t.safetensors"),
    "text": ("t.safetensors", b"counts, 1, 2, 3", "t.safetensors"),
    "truncated": ("t.safetensors", tensors(counts=GOOD)[:-5], "t.safetensors"),
    "header only": ("t.safetensors", tensors(counts=GOOD)[:9], "t.safetensors"),
    "bf16": ("t.safetensors", raw("BF16", [1, 1, 2], b"\0" * 4), "t.safetensors"),
    "fp8": ("t.safetensors", raw("F8_E4M3", [1, 1, 2], b"\0" * 2), "t.safetensors"),
    "bool": ("t.safetensors", raw("BOOL", [1, 1, 2], b"\0\1"), "bool"),
    "unknown type": ("t.safetensors", raw("U7", [1, 1, 2], b"\0\1"), "t.safetensors"),
    "no counts": ("t.safetensors", tensors(count=GOOD), "counts"),
    "NaN": ("t.safetensors", tensors(counts=changed(np.nan)), "NaN"),
    "infinite": ("t.safetensors", tensors(counts=changed(np.inf)), "counts"),
    "fractions": ("t.safetensors", tensors(counts=changed(0.5)), "fractions"),
    "negative": ("t.safetensors", tensors(counts=changed(-3, np.int64)), "got -3"),
    "overflowing": ("t.safetensors", tensors(counts=changed(2**64 - 1, np.uint64)), "at most 2147483647"),
    "overflowing sum": ("t.safetensors", tensors(counts=np.full((1, 1, 2), 2**31 - 1)), "at most 2147483647"),
    "overflowing float": ("t.safetensors", tensors(counts=changed(1e300)), "at most 2147483647"),
    "two dimensions": ("t.safetensors", tensors(counts=GOOD[0]), "shape (2, 3)"),
    "four dimensions": ("t.safetensors", tensors(counts=GOOD[None]), "shape (1, 2, 2, 3)"),
    "no steps": ("t.safetensors", tensors(counts=GOOD[:0]), "at least one step"),
    "no experts": ("t.safetensors", tensors(counts=GOOD[:, :, :0]), "at least one step"),
    "unknown version": ("t.safetensors", tensors({"gemopt_traces": "9"}, counts=GOOD), "version 1"),
    "layer ids": ("t.safetensors", tensors({"layer_ids": "[0]"}, counts=GOOD), "layer_ids"),
    "layer ids text": ("t.safetensors", tensors({"layer_ids": '["a", "b"]'}, counts=GOOD), "layer_ids"),
    "layer ids fractions": ("t.safetensors", tensors({"layer_ids": "[0.5, 1.5]"}, counts=GOOD), "layer_ids"),
    "layer ids null": ("t.safetensors", tensors({"layer_ids": "[null, 1]"}, counts=GOOD), "layer_ids"),
    "layer ids broken": ("t.safetensors", tensors({"layer_ids": "[0, 1"}, counts=GOOD), "layer_ids"),
    "layer ids huge": ("t.safetensors", tensors({"layer_ids": "[" + "9" * 5000 + "]"}, counts=GOOD), "layer_ids"),
    "layer ids deep": ("t.safetensors", tensors({"layer_ids": "[" * 99999}, counts=GOOD), "layer_ids"),
    "hidden layers": ("t.safetensors", tensors({"num_hidden_layers": "1"}, counts=GOOD), "num_hidden_layers"),
    "top-k": ("t.safetensors", tensors({"top_k": "4"}, counts=GOOD), "top_k"),
    "top-k text": ("t.safetensors", tensors({"top_k": "four"}, counts=GOOD), "top_k"),
    "phase": ("t.safetensors", tensors(counts=GOOD, phase=np.array([0, 3])), "phase"),
    "phase shape": ("t.safetensors", tensors(counts=GOOD, phase=np.array([0])), "phase"),
    "task": ("t.safetensors", tensors({"task_names": '["a"]'}, counts=GOOD, task=np.array([0, 1])), "task"),
    "task below": ("t.safetensors", tensors({"task_names": '["a"]'}, counts=GOOD, task=np.array([0, -2])), "got -2"),
    "task names": ("t.safetensors", tensors({"task_names": "[1, 2]"}, counts=GOOD), "task_names"),
    "task names twice": ("t.safetensors", tensors({"task_names": '["a", "a"]'}, counts=GOOD), "task_names"),
    "pairs": ("t.safetensors", tensors(counts=GOOD, pair_counts=GOOD), "pair_counts"),
    "pairs floats": ("t.safetensors", tensors(counts=GOOD, pair_counts=np.ones((2, 3, 3))), "pair_counts"),
    "transitions": ("t.safetensors", tensors(counts=GOOD, transitions=np.ones((2, 3, 3), int)), "transitions"),
    "ids alone": ("t.safetensors", tensors(counts=GOOD, ids=np.zeros((1, 2, 1), int)), "step_of_token"),
    "ids floats": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.zeros((1, 2, 1)), step_of_token=np.zeros(1, int)),
        "Traces.ids",
    ),
    "ids beyond": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.full((1, 2, 1), 3), step_of_token=np.zeros(1, int)),
        "experts 0 to 2",
    ),
    "ids layers": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.zeros((1, 1, 1), int), step_of_token=np.zeros(1, int)),
        "Traces.ids",
    ),
    "ids against counts": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.zeros((1, 2, 1), int), step_of_token=np.zeros(1, int)),
        "token-level ids make",
    ),
    "steps of tokens": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.zeros((1, 2, 1), int), step_of_token=np.full(1, 2)),
        "got 2",
    ),
    "steps out of order": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.zeros((2, 2, 1), int), step_of_token=np.array([1, 0], np.uint8)),
        "out of order",
    ),
    "request shape": (
        "t.safetensors",
        tensors(counts=GOOD, ids=np.zeros((1, 2, 1), int), step_of_token=np.zeros(1, int), request=np.zeros(2, int)),
        "Traces.request",
    ),
    "npz without counts": ("t.npz", npz(loads=GOOD), "counts"),
    "npz pickled": ("t.npz", npz(counts=np.array([[["a", None]]], dtype=object)), "t.npz"),
    "npz truncated": ("t.npz", npz(counts=GOOD)[:-30], "t.npz"),
    "npz empty": ("t.npz", b"", "t.npz"),
    "npz that is a pickle": ("t.npz", pickle.dumps([1, 2]), "t.npz"),
    "npz of text": ("t.npz", npz(counts=np.array([[["1"]]])), "counts"),
    "npy named npz": ("t.npz", b"\x93NUMPY\x01\x00", "t.npz"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_file_gives_one_line(tmp_path: Path, case: str) -> None:
    name, content, named = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Traces.load(path)
    text = str(error.value)
    assert text.startswith(str(path)) and named in text and "\n" not in text and len(text) < 600


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, found in ((tmp_path / "none.safetensors", "No such file"), (tmp_path, "no numbered")):
        with pytest.raises(InputError, match=found):
            Traces.load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    Traces(counts=GOOD).save(path)
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        Traces.load(path)


@FILES
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))
def test_damaged_files_give_one_line_or_valid_traces(tmp_path: Path, place: int, byte: int, length: int) -> None:
    path = tmp_path / "t.safetensors"
    recorded(4).save(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(bytes(content[: length % (2 * len(content)) + 1]))
    try:
        loaded = Traces.load(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.counts.min() >= 0


def test_small_types_are_written_and_counts_are_frozen(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    Traces(counts=GOOD).save(tmp_path / "t.safetensors")
    assert load_file(tmp_path / "t.safetensors")["counts"].dtype == np.uint8
    save_file({"counts": GOOD.astype(np.float32)}, tmp_path / "f.safetensors")
    traces = Traces.load(tmp_path / "f.safetensors")
    assert traces.counts.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        traces.counts[0, 0, 0] = 2
