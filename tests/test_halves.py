"""Halves of the experts that keep most tokens on their sender's node: against all halves, and against the links."""

from __future__ import annotations

import sys
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_topology import EXCHANGE, token_traces

from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Curve, Latency
from gemopt.links import Links
from gemopt.problem import Problem

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from halves import best_halves
from halves_compute import compute_of, fewest_leaving, least_value


def never() -> bool:
    return False


def kept_by(ids_NK: np.ndarray[Any, Any], home_N: np.ndarray[Any, Any], node_E: np.ndarray[Any, Any]) -> int:
    """Tokens all of whose experts are at home."""
    return int(((node_E[ids_NK] == home_N[:, None]) | (ids_NK < 0)).all(axis=1).sum())


@pytest.mark.parametrize("seed", range(12))
def test_no_halves_keep_more(seed: int) -> None:
    draws = np.random.default_rng(seed)
    experts, tokens = int(draws.integers(4, 9)), int(draws.integers(1, 60))
    ids_NK = np.argsort(draws.random((tokens, experts)) ** draws.uniform(1, 3, experts), axis=1)[:, :3]
    ids_NK[draws.random((tokens, 3)) < 0.1] = -1
    home_N = draws.integers(0, 2, tokens)
    room = np.array([-(-experts // 2), draws.integers(experts // 2, experts + 1)])
    found = best_halves(ids_NK, home_N, experts, room, never)
    assert found is not None and found.proven and (np.bincount(found.node_E, minlength=2) <= room).all()
    each = [
        np.isin(np.arange(experts), part).astype(int)
        for size in range(experts - int(room[0]), int(room[1]) + 1)
        for part in combinations(range(experts), size)
    ]
    assert found.kept == kept_by(ids_NK, home_N, found.node_E) == max(kept_by(ids_NK, home_N, n) for n in each)


def test_what_was_cut_is_not_called_proven() -> None:
    draws = np.random.default_rng(1)
    ids_NK, home_N = np.argsort(draws.random((2000, 24)), axis=1)[:, :4], draws.integers(0, 2, 2000)
    found = best_halves(ids_NK, home_N, 24, np.array([12, 12]), never, most=256)
    assert found is not None and not found.proven and found.kept == kept_by(ids_NK, home_N, found.node_E)
    assert best_halves(ids_NK, home_N, 24, np.array([12, 12]), lambda: True) is None


def test_bytes_between_nodes_are_of_the_tokens_that_leave() -> None:
    traces, slots_G = token_traces(), np.full(4, 2)
    exchange = EXCHANGE.model_copy(update={"once_per": "node", "senders": "recorded"})
    links, tokens = Links.of("2x2-ib400", traces, 4, exchange=exchange), traces.tokens
    assert tokens is not None and tokens.source_rank is not None
    home_N, node_P = links.topology.node_of_rank[tokens.source_rank], np.repeat(links.topology.node_of_rank, slots_G)
    rows, left = [], 0
    for layer in range(traces.num_layers):
        found = best_halves(tokens.ids[:, layer], home_N, 8, np.array([4, 4]), never)
        assert found is not None and found.proven
        rows.append(np.argsort(found.node_E, kind="stable"))
        assert (node_P[np.argsort(rows[-1])] == found.node_E).all()
        left += len(home_N) - found.kept
    assert links.communication(rows, slots_G).cross_node_bytes == left * (links.dispatch_bytes + links.combine_bytes)


@pytest.mark.parametrize("seed", range(6))
def test_no_placement_passes_what_halves_compute(seed: int) -> None:
    """Against all placements of 8 experts on 4 ranks, and against the halves that were found."""
    draws = np.random.default_rng(seed)
    ids_NK = np.argsort(draws.random((400, 8)) ** draws.uniform(1, 4, 8), axis=1)[:, :2]
    home_N, step_N = draws.integers(0, 2, 400), draws.integers(0, 3, 400)
    counts_TE = np.zeros((3, 8), np.int64)
    np.add.at(counts_TE, (step_N[:, None], ids_NK), 1)
    corners = Curve(np.append(0, np.sort(draws.choice(300, 6, replace=False)) + 1), np.cumsum(draws.random(7)), 0.01)
    latencies = [Latency(((corners,),)).times(speed) for speed in draws.uniform(1, 2, 4)]
    problem = Problem.make(counts_TE, [ASSIGNMENTS], latencies, weights_T=draws.uniform(0.5, 2, 3))
    compute = compute_of(problem, np.arange(8), 5.0)
    rows = [np.array(row) for row in permutations(range(8)) if all(row[n] < row[n + 1] for n in (0, 2, 4, 6))]
    node_NE = [np.repeat([0, 1], 4)[np.argsort(row)] for row in rows]
    left = [400 - kept_by(ids_NK, home_N, node_E) for node_E in node_NE]
    each = [objective(problem, row) for row in rows]
    for price in (0.0, 10.0, 100.0):
        value, node_E, proven = least_value(ids_NK, home_N, compute, price, never)
        assert proven and value <= min(us * price + tokens for us, tokens in zip(each, left, strict=True)) + 1e-6
        best = min(us for us, nodes in zip(each, node_NE, strict=True) if (nodes == node_E).all())
        assert 400 - kept_by(ids_NK, home_N, node_E) <= value <= 400 - kept_by(ids_NK, home_N, node_E) + best * price
    least = fewest_leaving([(ids_NK, home_N)], [compute], min(each), (0.0, 10.0, 100.0, 1000.0), 60.0)
    fewest = min(tokens for us, tokens in zip(each, left, strict=True) if us <= min(each))
    assert 400 - max(kept_by(ids_NK, home_N, n) for n in node_NE) - 1e-6 <= least <= fewest + 1e-6
