"""Synthetic instances the benchmarks share: skewed, bursty, drifting routing on ranks that differ in speed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemopt.profile import Device, Profile, Sample
from gemopt.traces import Traces

TILE = 128
BASE_US, TILE_US = 60.0, 18.75


def routing(
    *, layers: int = 58, experts: int = 256, steps: int = 1000, tokens: int = 4096, top_k: int = 8, seed: int = 0
) -> Traces:
    """Zipf 0.7; 12 topics of 20 experts (at most half) under AR(1) activity (rho 0.97) shared by all layers.

    Logits drift by +-0.35.
    Probabilities are capped at 0.9 / top_k; each step draws `tokens * top_k` assignments from a multinomial.
    """
    rng = np.random.default_rng(seed)
    topics = 12
    activity = np.empty((steps, topics))
    activity[0] = rng.standard_normal(topics)
    for t in range(1, steps):
        activity[t] = 0.97 * activity[t - 1] + np.sqrt(1 - 0.97**2) * rng.standard_normal(topics)
    counts = np.empty((steps, layers, experts), dtype=np.int32)
    for layer in range(layers):
        logits = -0.7 * np.log(rng.permutation(experts) + 1.0)
        members = np.zeros((topics, experts))
        for topic in range(topics):
            members[topic, rng.choice(experts, min(20, experts // 2), replace=False)] = 1.1 * rng.uniform(0.5, 1.0)
        drift = rng.uniform(-0.35, 0.35, experts) * np.linspace(0, 1, steps)[:, None]
        counts[:, layer] = _draw(rng, logits + activity @ members + drift, tokens, top_k)
    return Traces(counts=counts, top_k=top_k)


def _draw(rng: np.random.Generator, logits_TE: NDArray[np.float64], tokens: int, top_k: int) -> NDArray[np.int64]:
    chance = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    for _ in range(20):
        chance = np.minimum(chance, 0.9 / top_k)
        chance /= chance.sum(axis=1, keepdims=True)
    return rng.multinomial(tokens * top_k, chance)


def speeds(ranks: int, *, seed: int = 0, slow: float | None = None) -> NDArray[np.float64]:
    """U[0.9, 1.1] for each rank; one rank divided by `slow` when given."""
    drawn = np.random.default_rng(seed + 1000).uniform(0.9, 1.1, ranks)
    if slow is not None:
        drawn[ranks // 2] /= slow
    return drawn


def staircase_profile(speed_G: NDArray[np.float64], *, largest: int = 32768, tile: int = TILE) -> Profile:
    """(60 + 18.75 ceil(N / tile)) us / speed, sampled on both sides of every tile boundary."""
    edges = np.arange(0, largest + 1, tile)
    loads = np.unique(np.concatenate([edges, edges + 1]))
    return _profile(speed_G, loads, BASE_US + TILE_US * np.ceil(loads / tile))


def affine_profile(speed_G: NDArray[np.float64], *, largest: int = 32768) -> Profile:
    """(60 + 18.75 N / 128) us / speed."""
    loads = np.array([0, largest])
    return _profile(speed_G, loads, BASE_US + TILE_US * loads / TILE)


def _profile(speed_G: NDArray[np.float64], loads: NDArray[np.int64], latency_us: NDArray[np.float64]) -> Profile:
    devices = [
        Device(
            rank=rank,
            name="synthetic",
            samples=[
                Sample(assignments=int(n), latency_us=float(y / speed)) for n, y in zip(loads, latency_us, strict=True)
            ],
        )
        for rank, speed in enumerate(speed_G)
    ]
    return Profile(devices=devices, source="synthetic")
