"""Lower bounds on what links take: bytes that no placement can spare, over all ports that could carry them.

A token visits every rank (or other node) that serves one of its experts and is not where it starts. A rank with S slots
serves at most S of them, so a token of k experts visits at least ceil(k / S); summed over all steps, experts that are
chosen together share a visit only where they share a rank, and an expert shares its rank with S - 1 others at most.
What stays local is bounded alike: an expert's tokens start where it is only from one rank (with copies: from those
whose slots are not taken by others). The bytes of the visits left go through some ports; were they spread over all of
them in proportion to their speed, the fullest would take no longer than it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from gemopt.latency import FloatArray
from gemopt.links import Links
from gemopt.problem import Problem
from gemopt.topology import LEVELS, Ports

IntArray = NDArray[Any]
ROUNDING = 1e-9
CELLS = 1 << 25  # numbers held at once to count steps


def links_bound(problems: Sequence[Problem], links: Links) -> FloatArray:
    """[L] microseconds that dispatch and combine of each layer take at least, over all steps, whatever the placement.

    0 where steps are weighted.
    """
    found_L = np.zeros(len(problems))
    if any((problem.weights_T != 1).any() for problem in problems):
        return found_L
    slots_G, node_G = problems[0].slots_per_rank, links.topology.node_of_rank
    pairs_LEE = None if links.traces.tokens is None else links.traces.pairs().astype(np.float64)
    per_rank, per_node = int(slots_G.max()), int(np.bincount(node_G, weights=slots_G).max())
    for layer in range(len(problems)):
        pairs_EE = None if pairs_LEE is None else pairs_LEE[layer]
        for back, token_bytes in ((False, links.dispatch_bytes), (True, links.combine_bytes)):
            best = 0.0
            for levels, group_G, unit in (
                ((0, 1), np.arange(len(node_G)), per_rank),
                ((1,), node_G, per_node if links.per_node else per_rank),
            ):
                visits, steps = _visits(links, layer, pairs_EE, group_G, slots_G, unit, back=back)
                best = max(best, _spread(links.topology.ports, levels, visits * token_bytes, steps))
            found_L[layer] += best
    return np.asarray(found_L * (1 - ROUNDING))


def _spread(ports: Ports, levels: tuple[int, ...], total: float, steps: int) -> float:
    """Microseconds over all steps of `total` bytes through the ports into ranks of some levels.

    steps: of how many it is known that anything is sent. With a line a + s b nowhere above the curve of each port, a
    step of B bytes takes z >= min a + B / sum(1 / s): no port that carries any had more than (z - a) / s.
    """
    chosen = np.flatnonzero(ports.level_of == len(LEVELS))  # every way has a link of its own, if any has
    if not len(chosen):
        chosen = np.flatnonzero(np.isin(ports.level_of, levels) & ports.into)
    if not len(chosen) or total <= 0:
        return 0.0
    mean = total / max(steps, 1) / len(chosen)
    lowest, speed = np.inf, 0.0
    kinds, numbers = np.unique(ports.curve_of[chosen], return_counts=True)
    for kind, number in zip(kinds.tolist(), numbers.tolist(), strict=True):
        pieces = [(max(a, 0.0), s) if a >= 0 else (0.0, 0.0) for a, s in ports.curves[kind].low.hull.pieces()]
        a, s = max(pieces, key=lambda piece: piece[0] + piece[1] * mean)
        lowest = min(lowest, a)
        speed += np.inf if s <= 0 else number / s
    return float(lowest * steps + (0.0 if np.isinf(speed) else total / speed))


def _visits(
    links: Links,
    layer: int,
    pairs_EE: FloatArray | None,
    group_G: IntArray,
    slots_G: IntArray,
    unit: int,
    *,
    back: bool,
) -> tuple[float, int]:
    """Visits of other groups (ranks, or nodes) over all steps at least, and in how many steps there surely is one.

    unit: most experts that one visit may be for, by slots.
    """
    counts_TE, tokens = links.traces.counts[:, layer], links.traces.tokens
    slots_D = np.bincount(group_G, weights=slots_G).astype(np.int64)
    copies = int(slots_G.sum()) > counts_TE.shape[1]
    if len(slots_D) < 2:
        return 0.0, 0
    each = links.exchange.once_per == "assignment" or tokens is None
    top_k = 1 if tokens is None else int(tokens.ids.shape[2])
    most = 1 if each else max(1, min(unit, top_k))
    together = 0.0
    if not each:
        assert pairs_EE is not None
        together = np.inf if copies else _together(pairs_EE, unit)
    if links.spread(layer) and not (links.coupled and back):
        total = float(counts_TE.sum())
        away = 1.0 - np.bincount(group_G).max() / len(group_G)  # of the senders, at least
        return away * max(total / most, total - together), int((counts_TE.sum(axis=1) > 0).sum())
    remote = float(counts_TE.sum()) - _local(links, layer, group_G, slots_D, copies=copies, back=back)
    if remote <= 0.5:
        return 0.0, 0
    steps = 0 if copies or links.coupled else _steps_away(links, layer, group_G)
    return max(remote / most, remote - together), steps


def _together(pairs_EE: FloatArray, unit: int) -> float:
    """Most pairs of experts of one token that may share a visit, over all tokens."""
    others_EE = pairs_EE - np.diag(np.diag(pairs_EE))
    return 0.5 * _top(others_EE, unit - 1)


def _top(values_EE: FloatArray, number: int) -> float:
    """Sum of the largest few of every row."""
    return float(np.sort(values_EE, axis=1)[:, ::-1][:, : max(0, number)].sum())


def _local(links: Links, layer: int, group_G: IntArray, slots_D: IntArray, *, copies: bool, back: bool) -> float:
    """Most assignments whose token starts (back: ends) in the group of the expert, over all steps."""
    tokens = links.traces.tokens
    assert tokens is not None
    experts = links.traces.num_experts
    ids_NK = tokens.ids[:, layer]
    known = ids_NK >= 0
    if not links.coupled or (layer == 0 and not back):
        assert tokens.source_rank is not None
        from_NK = np.broadcast_to(group_G[tokens.source_rank][:, None], ids_NK.shape)
        table_ED = _table(ids_NK[known], from_NK[known], experts, len(slots_D))
        if copies:
            return sum(_top(table_ED[:, [d]].T, int(slots)) for d, slots in enumerate(slots_D))
        table_EP = np.repeat(table_ED, slots_D, axis=1)
        return float(table_EP[linear_sum_assignment(-table_EP)].sum())
    if copies:
        return np.inf
    before_NK = ids_NK if back else tokens.ids[:, layer - 1]
    first_N = np.take_along_axis(before_NK, (before_NK >= 0).argmax(axis=1)[:, None], axis=1)
    from_NK = np.broadcast_to(first_N, ids_NK.shape)
    table_EE = _table(ids_NK[known], from_NK[known], experts, experts)
    most = int(slots_D.max())
    if not back:
        return min(_top(table_EE, most), _top(table_EE.T, most))
    own = float(np.trace(table_EE))
    others_EE = table_EE - np.diag(np.diag(table_EE))
    return own + min(_top(others_EE, most - 1), _top(others_EE.T, most - 1))


def _table(first: IntArray, second: IntArray, rows: int, columns: int) -> FloatArray:
    """[rows, columns] how often each pair occurs."""
    found = np.bincount(first.astype(np.int64) * columns + second, minlength=rows * columns)
    return found.reshape(rows, columns).astype(np.float64)


def _steps_away(links: Links, layer: int, group_G: IntArray) -> int:
    """Steps in which some expert has tokens from more than one group, so that some of them travel."""
    tokens = links.traces.tokens
    assert tokens is not None and tokens.source_rank is not None
    groups, experts, steps = int(group_G.max()) + 1, links.traces.num_experts, links.traces.num_steps
    if groups * experts * steps > CELLS:
        return 0
    ids_NK = tokens.ids[:, layer]
    token, place = np.nonzero(ids_NK >= 0)
    cell = (tokens.step_of_token[token].astype(np.int64) * experts + ids_NK[token, place]) * groups
    table = np.bincount(cell + group_G[tokens.source_rank[token]], minlength=steps * experts * groups)
    return int(((table.reshape(steps, experts, groups) > 0).sum(axis=2) > 1).any(axis=1).sum())
