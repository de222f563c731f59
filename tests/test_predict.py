"""Predictors: what they learn, what they may know, and how they are held to account."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.predict import PREDICTORS, Batch, assess, make, shares_of
from gemopt.predict.assess import held_out
from gemopt.predict.base import Steps, positions
from gemopt.predict.distribution import Dirichlet, Smoothing, Window
from gemopt.traces import Tokens, Traces, from_tokens

EXPERTS, LAYERS, TOP_K, REQUESTS, LENGTH = 8, 3, 2, 24, 16


def recorded(seed: int = 0) -> Traces:
    """Layer 1 follows from layer 0, layer 2 from the token id; layer 0 is by chance, skewed."""
    rng = np.random.default_rng(seed)
    count = REQUESTS * LENGTH
    token_ids = rng.integers(0, 5, count)
    share = np.array([4, 2, 1, 1, 1, 1, 1, 1]) / 12
    ids = np.empty((count, LAYERS, TOP_K), dtype=np.int64)
    ids[:, 0] = np.array([rng.choice(EXPERTS, TOP_K, replace=False, p=share) for _ in range(count)])
    ids[:, 1] = (ids[:, 0] + 3) % EXPERTS
    ids[:, 2] = np.stack([token_ids, token_ids + 1], axis=1)
    traces = from_tokens(ids, np.arange(0, count, LENGTH), num_experts=EXPERTS, batch_size=6)
    assert traces.tokens is not None
    # the batching reorders tokens: their ids follow from what layer 2 chose
    return replace(traces, tokens=replace(traces.tokens, token_ids=traces.tokens.ids[:, 2, 0].astype(np.int64)),
                   task=np.arange(traces.num_steps) % 2, task_names=("a", "b"))  # fmt: skip


def test_accuracy_is_where_the_signal_is() -> None:
    traces = recorded()
    found = {
        name: assess(make(name), traces) for name in PREDICTORS if name not in ("window", "dirichlet", "mlp", "lstm")
    }
    assert found["previous"].accuracy_L[1] == 1.0
    assert found["token"].accuracy_L[2] == 1.0
    for name in ("all-past", "frequency", "position"):
        assert found[name].accuracy_L[2] < 0.8
    assert found["all-past"].error_L.max() < 0.3
    assert found["frequency"].error_L[2] > 0.5  # names the same experts for every token
    assert all(each.us_per_token > 0 for each in found.values())


def test_held_out_are_whole_requests() -> None:
    tokens = recorded().tokens
    assert tokens is not None and tokens.request is not None
    held = held_out(tokens, 0.25, seed=3)
    assert not set(tokens.request[held]) & set(tokens.request[~held])
    assert len(set(tokens.request[held])) == REQUESTS // 4
    with pytest.raises(InputError, match="holdout"):
        held_out(tokens, 0.001, seed=0)


def test_the_position_counts_within_the_request() -> None:
    tokens = Tokens(
        ids=np.zeros((5, 1, 1), int), step_of_token=np.array([0, 0, 1, 1, 2]), request=np.array([7, 3, 7, 3, 7])
    )
    found = positions(tokens)
    assert found is not None and found.tolist() == [0, 0, 1, 1, 2]


def test_a_batch_shows_no_more_than_the_layers_before() -> None:
    traces = recorded()
    tokens = traces.tokens
    assert tokens is not None
    step, layer = 5, 1
    now = (tokens.step_of_token == step)[:, None, None] & (np.arange(LAYERS) >= layer)[None, :, None]
    later = (tokens.step_of_token > step)[:, None, None] | now
    other = replace(traces, tokens=replace(tokens, ids=np.where(later, 0, tokens.ids)))
    seen, unseen = Steps(traces).batch(step, layer), Steps(other).batch(step, layer)
    assert np.array_equal(seen.previous, unseen.previous) and seen.previous.shape[1] == layer  # type: ignore[union-attr, arg-type]
    assert seen.size == unseen.size


def test_distributions_follow_their_formulas() -> None:
    counts = np.random.default_rng(1).integers(0, 9, (40, 2, 4))
    traces, fresh = Traces(counts=counts), np.random.default_rng(2).integers(0, 9, (2, 4))
    window = Window(steps=8)
    window.fit(traces)
    window.observe(fresh)
    last = counts[-7:].sum(axis=0) + fresh
    assert np.allclose(window.predict(Batch(1, 10)), last[1] / last[1].sum())
    smooth = Smoothing(half_life=1)
    smooth.fit(traces)
    smooth.observe(fresh)
    weight = sum(counts[-1 - age] * 0.5 ** (age + 1) for age in range(40)) + fresh
    assert np.allclose(smooth.predict(Batch(0, 10)), weight[0] / weight[0].sum())


def test_the_prior_is_strong_where_windows_are_noise_and_weak_where_they_drift() -> None:
    rng = np.random.default_rng(0)
    same = rng.multinomial(16, np.full(8, 1 / 8), (256, 1))
    shares = rng.dirichlet(np.full(8, 0.2), 4)
    moving = np.array([[rng.multinomial(400, shares[t // 64])] for t in range(256)])
    strengths = []
    for counts in (same, moving):
        predictor = Dirichlet(steps=32)
        predictor.fit(Traces(counts=counts))
        strengths.append(predictor.strength_L[0])
    assert strengths[0] > strengths[1]


def test_tasks_have_their_own_shares() -> None:
    counts = np.zeros((64, 1, 4), int)
    counts[::2, 0, 0], counts[1::2, 0, 3] = 9, 9
    predictor = make("task")
    predictor.fit(Traces(counts=counts, task=np.arange(64) % 2, task_names=("a", "b")))
    assert predictor.predict(Batch(0, 9, task=0)).tolist() == [1, 0, 0, 0]
    assert predictor.predict(Batch(0, 9, task=1)).tolist() == [0, 0, 0, 1]
    assert 0.4 < predictor.predict(Batch(0, 9))[0] < 0.6


def test_shares_of_named_experts() -> None:
    assert shares_of(np.array([[0, 1], [0, 2]]), True, 4).tolist() == [0.5, 0.25, 0.25, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [("token", "Traces.token_ids"), ("previous", "Traces.ids"), ("task", "Traces.task"), ("position", "Traces.ids")],
)
def test_what_is_not_recorded_is_said(name: str, said: str) -> None:
    traces = Traces(counts=np.ones((80, 2, 4), int))
    if name == "token":
        whole = recorded()
        assert whole.tokens is not None
        traces = replace(whole, tokens=replace(whole.tokens, token_ids=None))
    with pytest.raises(InputError, match=f"{said}: got nothing"):
        make(name).fit(traces)


def test_a_history_shorter_than_the_window_is_said() -> None:
    with pytest.raises(InputError, match="history: got 40 steps; the window of the predictor window is 64"):
        make("window").fit(Traces(counts=np.ones((40, 1, 4), int)))
    with pytest.raises(InputError, match="predictor: got fortune"):
        make("fortune")
