"""Halves of the experts that keep most tokens on their sender's node: against all halves, and against the links."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_topology import EXCHANGE, token_traces

from gemopt.links import Links

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from halves import best_halves


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
