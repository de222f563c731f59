"""What a file keeps in uint8 or uint16 must count, join, cut and multiply like the wide arrays it came from."""

from __future__ import annotations

import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemopt.conflicts import conflict_graph
from gemopt.exceptions import InputError
from gemopt.traces import Phase, Tokens, Traces, concatenate, count_assignments
from gemopt.traces.arrays import widened

SHAPES = [(33, 8), (40, 256), (256, 256), (257, 3), (300, 300), (1300, 64), (2, 70_000)]


def made(steps: int, experts: int, *, layers: int = 2, top_k: int = 2, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    step = np.sort(np.append(rng.integers(0, steps, 2 * steps), [0, steps - 1]))
    ids = (rng.integers(0, experts, (len(step), layers, 1)) + np.arange(top_k)) % experts
    ids[0, 0] = [experts - 1, 0]
    ids[1, 0] = [1, -1]
    tokens = Tokens(ids=ids, step_of_token=step, source_rank=step % 200, token_ids=step * 700, request=step * 3)
    plain = Traces(counts=count_assignments(ids, step, steps, experts), tokens=tokens, phase=step[:steps] * 0 + 1)
    if experts > 300:
        return plain
    return replace(plain, pair_counts=plain.pairs(), transitions=plain.transition_counts())


def equal(a: Any, b: Any) -> None:
    for each in fields(type(a)):
        left, right = getattr(a, each.name), getattr(b, each.name)
        if isinstance(left, Tokens):
            equal(left, right)
        elif isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left.astype(object), right.astype(object), err_msg=each.name)
        else:
            assert left == right, each.name


def again(traces: Traces) -> Traces:
    with tempfile.TemporaryDirectory() as folder:
        traces.save(Path(folder) / "t.safetensors")
        return Traces.load(Path(folder) / "t.safetensors")


@pytest.mark.parametrize(("steps", "experts"), SHAPES)
def test_a_token_record_reads_back(steps: int, experts: int) -> None:
    traces = made(steps, experts)
    equal(again(traces), traces)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.integers(4, 40), st.integers(0, 99), st.data())
def test_every_operation_is_the_same_after_a_round_trip(steps: int, experts: int, seed: int, data: Any) -> None:
    traces = made(steps, experts, seed=seed)
    read = again(traces)
    cut = data.draw(st.integers(1, steps - 1))
    chosen = np.flatnonzero(np.random.default_rng(seed).random(steps) < 0.5) if cut > 1 else np.array([0])
    chosen = chosen if len(chosen) else np.array([steps - 1])
    assert read.tokens is not None and traces.tokens is not None
    for one, other in [
        (read.steps(chosen), traces.steps(chosen)),
        (read.select(phase=Phase.DECODE), traces.select(phase=Phase.DECODE)),
        (concatenate([read, read.steps(slice(0, cut))]), concatenate([traces, traces.steps(slice(0, cut))])),
        (concatenate([again(read), read]), concatenate([traces, traces])),
        (again(concatenate([read, read])), concatenate([traces, traces])),
        *list(zip(read.windows(cut), traces.windows(cut), strict=True))[-3:],
    ]:
        equal(one, other)
        np.testing.assert_array_equal(one.pairs(), other.pairs())
        np.testing.assert_array_equal(one.transition_counts(), other.transition_counts())
    # Products and differences of what was read do not wrap either.
    for name in ("pair_counts", "transitions"):
        wide = getattr(traces, name).astype(object)
        assert (getattr(read, name) * 1000 - 7 == wide * 1000 - 7).all()
    for name in ("step_of_token", "request", "token_ids", "source_rank"):
        wide = getattr(traces.tokens, name).astype(object)
        assert (getattr(read.tokens, name) * experts * 1000 - 7 == wide * experts * 1000 - 7).all()
    assert (read.tokens.ids * experts + read.tokens.ids == traces.tokens.ids.astype(object) * (experts + 1)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16])
def test_counting_does_not_depend_on_the_type(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    steps, experts = 120, 120
    step = np.sort(rng.integers(0, steps, 500))
    ids = rng.integers(0, experts, (500, 3, 2))
    expected = count_assignments(ids, step, steps, experts)
    np.testing.assert_array_equal(count_assignments(ids.astype(dtype), step.astype(dtype), steps, experts), expected)
    tokens = Tokens(ids=ids.astype(dtype), step_of_token=step.astype(dtype))
    assert tokens.ids.dtype in (np.int32, np.int64) and tokens.step_of_token.dtype == np.int64
    np.testing.assert_array_equal(tokens.ids, ids)


def test_what_is_no_integer_is_left_for_the_checks() -> None:
    assert widened(None) is None
    fractions = np.array([0.5])
    assert widened(fractions) is fractions
    with pytest.raises(InputError, match="step_of_token"):
        Traces(np.ones((2, 1, 2)), tokens=Tokens(ids=np.zeros((2, 1, 1), int), step_of_token=np.array([0.0, 1.0])))


def test_the_conflict_graph_of_a_file_is_that_of_the_array() -> None:
    traces = made(260, 8)
    assert dict(conflict_graph(again(traces), 0).edges) == dict(conflict_graph(traces, 0).edges)


def test_a_recorder_that_recorded_nothing_is_refused_everywhere(tmp_path: Path) -> None:
    idle = np.zeros((4, 2, 3), int)
    busy = idle.copy()
    busy[2, 1, 0] = 5
    with pytest.raises(InputError, match="recorded nothing"):
        Traces(idle)
    np.savez(tmp_path / "idle.npz", counts=idle)
    with pytest.raises(InputError, match=r"idle\.npz.*at least one assignment"):
        Traces.load(tmp_path / "idle.npz")
    traces = Traces(busy, phase=np.array([0, 0, 1, 1]))
    assert [int(window.counts.sum()) for window in traces.windows(2)] == [0, 5]  # a pause is part of a recording
    for refused in (lambda: traces.select(phase=Phase.PREFILL), lambda: traces.split(0.5)):
        with pytest.raises(InputError, match="recorded nothing"):
            refused()
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, window in enumerate(traces.windows(2)):
        window.save(folder / f"{number:06d}.safetensors")
    np.testing.assert_array_equal(Traces.load(folder).counts, busy)
    (folder / "000001.safetensors").unlink()
    with pytest.raises(InputError, match="recorded nothing"):
        Traces.load(folder)


def test_times_of_ranks_go_with_their_steps(tmp_path: Path) -> None:
    rank_us = np.array([[1.0, 2.0], [np.nan, 4.0], [5.0, 6.0]])
    traces = Traces(counts=np.ones((3, 1, 4), np.int64), rank_us=rank_us)
    traces.save(tmp_path / "t.safetensors")
    read = Traces.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read.rank_us, rank_us)
    np.testing.assert_array_equal(read.steps([0, 2]).rank_us, rank_us[[0, 2]])
    np.testing.assert_array_equal(concatenate([read, read]).rank_us, np.concatenate([rank_us, rank_us]))
    assert concatenate([read, Traces(counts=traces.counts)]).rank_us is None


@pytest.mark.parametrize("wrong", [np.ones((2, 2)), np.ones(3), np.full((3, 2), -1.0), np.ones((3, 2), np.int64)])
def test_times_that_cannot_be(wrong: np.ndarray) -> None:
    with pytest.raises(InputError, match="rank_us"):
        Traces(counts=np.ones((3, 1, 4), np.int64), rank_us=wrong)
