"""Traces: what is counted, and how they are cut and joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_traces import recorded, routed, same

from gemopt.exceptions import InputError
from gemopt.traces import Phase, Tokens, Traces, concatenate, redrawn
from gemopt.traces.batching import from_tokens


def decode_by_hand(lengths: list[int], batch_size: int) -> list[list[tuple[int, int]]]:
    """Steps as lists of (request, token): run the batch one step at a time, refilling seats as they become free."""
    waiting, seats, steps = list(range(len(lengths))), [], []
    while waiting or seats:
        while waiting and len(seats) < batch_size:
            seats.append([waiting.pop(0), 0])
        steps.append([(request, token) for request, token in seats])
        seats = [[request, token + 1] for request, token in seats if token + 1 < lengths[request]]
    return steps


def prefill_by_hand(lengths: list[int], batch_size: int, limit: int) -> list[list[tuple[int, int]]]:
    waiting, steps = list(range(len(lengths))), []
    while waiting:
        chosen, tokens = [waiting.pop(0)], 0
        tokens = lengths[chosen[0]]
        while waiting and len(chosen) < batch_size and tokens + lengths[waiting[0]] <= limit:
            tokens += lengths[waiting[0]]
            chosen.append(waiting.pop(0))
        steps.append([(request, token) for request in chosen for token in range(lengths[request])])
    return steps


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=10), st.integers(1, 4), st.sampled_from(["decode", "prefill"]))
def test_continuous_batching_equals_a_plain_simulation(lengths: list[int], batch_size: int, phase: str) -> None:
    rng = np.random.default_rng(sum(lengths))
    layers, experts, limit = 2, 5, 9
    ids = routed(rng, sum(lengths), layers, experts, 2)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    tasks = [("a", "b")[i // 2 % 2] for i in range(len(lengths))]
    traces = from_tokens(
        ids.astype(np.uint8),
        starts,
        num_experts=experts,
        batch_size=batch_size,
        phase=Phase[phase.upper()],
        request_tasks=tasks,
        prefill_tokens=limit,
    )
    decode = phase == "decode"
    steps = decode_by_hand(lengths, batch_size) if decode else prefill_by_hand(lengths, batch_size, limit)
    assert traces.num_steps == len(steps) and traces.top_k == 2
    assert traces.phase is not None and set(traces.phase) == {int(Phase[phase.upper()])}
    assert traces.task is not None and traces.tokens is not None
    for step, members in enumerate(steps):
        expected = np.zeros((layers, experts), int)
        for request, token in members:
            for layer in range(layers):
                for expert in ids[starts[request] + token, layer]:
                    expected[layer, expert] += 1
        np.testing.assert_array_equal(traces.counts[step], expected)
        names = {tasks[request] for request, _ in members}
        assert traces.task[step] == (traces.task_names.index(names.pop()) if len(names) == 1 else -1)
        inside = traces.tokens.step_of_token == step
        assert sorted(traces.tokens.request[inside]) == sorted(request for request, _ in members)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ids": np.zeros((4, 2))}, "ids"),
        ({"ids": np.zeros((0, 2, 1), int)}, "ids"),
        ({"ids": np.full((4, 2, 1), 3)}, "experts 0 to 2"),
        ({"ids": np.full((4, 2, 1), -2)}, "got -2"),
        ({"ids": np.array([[[0, 1], [2, 2]]] * 4)}, "expert 2 twice for token 0 in layer 1"),
        ({"request_starts": [1, 2]}, "request_starts"),
        ({"request_starts": [0, 2, 2]}, "request_starts"),
        ({"request_starts": [0, 5]}, "request_starts"),
        ({"request_starts": []}, "request_starts"),
        ({"request_starts": [0.5]}, "request_starts"),
        ({"batch_size": 0}, "batch_size"),
        ({"phase": Phase.MIXED}, "phase"),
        ({"request_tasks": ["a"]}, "request_tasks"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
    ],
)
def test_from_tokens_refuses(change: dict[str, Any], named: str) -> None:
    given_ = {"ids": np.zeros((4, 2, 1), int), "request_starts": [0, 2], "num_experts": 3, "batch_size": 2}
    arguments = {**given_, **change}
    with pytest.raises(InputError) as error:
        from_tokens(arguments.pop("ids"), arguments.pop("request_starts"), **arguments)
    assert named in str(error.value)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_pairs_and_transitions_equal_a_naive_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    from gemopt.traces import document

    monkeypatch.setattr(document, "TOKEN_BLOCK", block)
    traces = recorded(3)
    assert traces.tokens is not None
    ids = np.array(traces.tokens.ids)
    ids[::5, 1, 1] = -1  # a token that chose one expert only
    pairs, moves = np.zeros((3, 6, 6), int), np.zeros((2, 6, 6), int)
    for token in ids:
        for layer in range(3):
            for a in token[layer][token[layer] >= 0]:
                for b in token[layer][token[layer] >= 0]:
                    pairs[layer, a, b] += 1
                if layer < 2:
                    for b in token[layer + 1][token[layer + 1] >= 0]:
                        moves[layer, a, b] += 1
    changed = Traces(counts=traces.counts, tokens=Tokens(ids=ids, step_of_token=traces.tokens.step_of_token))
    np.testing.assert_array_equal(changed.pairs(), pairs)
    np.testing.assert_array_equal(changed.transition_counts(), moves)
    kept = Traces(counts=traces.counts, pair_counts=pairs, transitions=moves)
    assert (kept.pairs() == pairs).all() and (kept.transition_counts() == moves).all()
    for asked in (Traces.pairs, Traces.transition_counts):
        with pytest.raises(InputError, match="token-level record"):
            asked(Traces(counts=traces.counts))


def test_one_layer_has_no_transitions() -> None:
    tokens = Tokens(ids=np.zeros((2, 1, 1), int), step_of_token=np.zeros(2, int))
    assert Traces(counts=np.full((1, 1, 1), 2), tokens=tokens).transition_counts().shape == (0, 1, 1)


def test_split_windows_and_select_keep_everything_in_step() -> None:
    whole = recorded(1)
    first, last = whole.split(0.25)
    assert first.num_steps + last.num_steps == whole.num_steps
    assert last.num_steps == round(0.25 * whole.num_steps)
    same(concatenate([first, last]), whole)
    windows = whole.windows(4)
    assert [w.num_steps for w in windows] == [4] * (whole.num_steps // 4)
    np.testing.assert_array_equal(windows[1].counts, whole.counts[4:8])
    prefill = recorded(1, phase=Phase.PREFILL, batch_size=1)
    maths = prefill.select(task="maths", phase=Phase.PREFILL)
    assert prefill.task is not None and maths.tokens is not None
    np.testing.assert_array_equal(maths.counts, prefill.counts[prefill.task == prefill.task_names.index("maths")])
    for part in (first, last, *windows, maths):
        assert part.tokens is not None
        counted = np.zeros_like(part.counts)
        for step, token in zip(part.tokens.step_of_token, part.tokens.ids, strict=True):
            for layer in range(part.num_layers):
                counted[step, layer, token[layer]] += 1
        np.testing.assert_array_equal(counted, part.counts)


def test_pair_counts_of_all_steps_are_not_those_of_some() -> None:
    traces = Traces(counts=np.ones((3, 1, 2), int), pair_counts=np.ones((1, 2, 2), int))
    assert traces.steps(slice(0, 2)).pair_counts is None


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda t: t.split(0.0), "holdout"),
        (lambda t: t.split(1.0), "holdout"),
        (lambda t: t.split(float("nan")), "holdout"),
        (lambda t: t.steps([0]).split(0.5), "hold none out"),
        (lambda t: t.windows(0), "length"),
        (lambda t: t.windows(999), "length"),
        (lambda t: t.steps([]), "steps"),
        (lambda t: t.steps([1, 0]), "increasing"),
        (lambda t: t.steps([1, 1]), "increasing"),
        (lambda t: t.steps([999]), "steps"),
        (lambda t: t.steps(np.ones(999, bool)), "steps"),
        (lambda t: t.select(task="poetry"), "maths, code"),
        (lambda t: t.select(phase=Phase.PREFILL), "prefill"),
        (lambda t: Traces(counts=t.counts).select(phase=Phase.PREFILL), "phase"),
        (lambda t: Traces(counts=t.counts).select(task="maths"), "task"),
    ],
)
def test_steps_that_are_not_there(ask: Callable[[Traces], Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        ask(recorded(1))
    assert named in str(error.value)


def test_parts_of_different_networks_do_not_join() -> None:
    a = Traces(counts=np.ones((2, 1, 4), int), model="a", top_k=2)
    others = [
        Traces(counts=np.ones((2, 1, 4), int), model="b", top_k=2),
        Traces(counts=np.ones((2, 1, 4), int), model="a", top_k=3),
        Traces(counts=np.ones((2, 1, 5), int), model="a", top_k=2),
        Traces(counts=np.ones((2, 1, 4), int), model="a", top_k=2, layer_ids=(3,)),
    ]
    for other in others:
        with pytest.raises(InputError, match="one network"):
            concatenate([a, other])
    ids = [Tokens(ids=np.zeros((1, 1, k), int), step_of_token=np.zeros(1, int)) for k in (1, 2)]
    with pytest.raises(InputError, match="one network"):
        concatenate([Traces(counts=np.ones((1, 1, 2), int), tokens=each) for each in ids])


def test_tasks_of_parts_with_other_names_keep_their_meaning() -> None:
    a = Traces(counts=np.ones((2, 1, 1), int), task=[0, -1], task_names=("x",))
    b = Traces(counts=np.ones((3, 1, 1), int), task=[1, 0, -1], task_names=("y", "x"))
    joined = concatenate([a, b])
    assert joined.task is not None
    assert [(*joined.task_names, None)[i] for i in joined.task] == ["x", None, "x", "y", None]
    assert concatenate([a, Traces(counts=np.ones((1, 1, 1), int))]).task is None


def test_redrawn_steps_keep_the_means_and_come_after_those_given() -> None:
    rng = np.random.default_rng(0)
    few = Traces(
        counts=rng.integers(0, 60, (8, 3, 16)), task=np.arange(8) % 2, task_names=("a", "b"), top_k=2,
        rank_us=np.ones((8, 4)), layer_ids=(1, 3, 5),
    )  # fmt: skip
    more = redrawn(few, 400)
    assert (more.counts[:8] == few.counts).all() and more.rank_us is None
    assert (more.num_steps, more.layer_ids, more.top_k, more.task_names) == (8 * 401, (1, 3, 5), 2, ("a", "b"))
    assert more.task is not None and (more.task == np.tile(np.arange(8) % 2, 401)).all()
    drawn = more.counts[8:].reshape(400, 8, 3, 16)
    assert (np.abs(drawn.mean(axis=0) - few.counts) <= 6 * np.sqrt(few.counts / 400)).all()
    assert (np.abs(drawn.var(axis=0) - few.counts) <= 0.5 * few.counts).all()
    same(redrawn(few, seed=3), redrawn(few, seed=3))
    assert (redrawn(few, seed=3).counts != redrawn(few, seed=4).counts).any()


def test_one_step_cannot_be_split() -> None:
    with pytest.raises(InputError, match="1 step cannot be split so"):
        Traces(counts=np.ones((1, 1, 3), int)).split(0.5)


def test_redrawn_leaves_what_was_recorded_of_tokens_out() -> None:
    whole = recorded()
    more = redrawn(replace(whole, pair_counts=whole.pairs(), transitions=whole.transition_counts()))
    assert whole.tokens is not None and more.num_steps == 2 * whole.num_steps
    assert more.pair_counts is None and more.transitions is None and more.tokens is None
    assert more.phase is not None and more.task is not None


@pytest.mark.parametrize(
    ("given", "named"), [({"times": 0}, "times"), ({"times": 1.5}, "times"), ({"seed": -1}, "seed")]
)
def test_redrawn_refuses(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        redrawn(Traces(counts=np.ones((2, 1, 3), int)), **given)


def test_chosen_experts_by_layer_are_no_tokens() -> None:
    ids = np.random.default_rng(0).random((4, 300, 16)).argsort(axis=2)[..., :2]  # [layers, tokens, K]
    with pytest.raises(InputError, match=r"at most 256 layers; of \[layers, tokens, K\] give ids\.swapaxes"):
        from_tokens(ids, [0], num_experts=16, batch_size=4)
    assert from_tokens(ids.swapaxes(0, 1), [0], num_experts=16, batch_size=4).num_layers == 4


def test_steps_in_a_row_share_their_counts_and_what_can_be_written_into_is_copied() -> None:
    mine = np.arange(1, 25, dtype=np.int32).reshape(4, 2, 3)
    view = mine[:]
    view.setflags(write=False)
    traces = Traces(counts=view)
    mine[0, 0, 0] = 9
    assert traces.counts[0, 0, 0] == 1
    owned = np.ones((4, 2, 3), np.int32)
    before = owned[:]
    owned.setflags(write=False)  # which a view from before does not heed
    kept = Traces(counts=owned)
    before[0, 0, 0] = 9
    assert kept.counts[0, 0, 0] == 1
    past, later = traces.split(0.5)
    assert np.shares_memory(past.counts, traces.counts) and np.shares_memory(later.counts, traces.counts)
    assert (traces.steps([0, 2]).counts == traces.counts[[0, 2]]).all()
    with pytest.raises(ValueError, match="read-only"):
        later.counts[0, 0, 0] = 2
