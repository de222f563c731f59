"""Greedy packing of experts and copies into slots, shared by LPT, EPLB and the starts of local search."""

from __future__ import annotations

import numpy as np

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Row
from gemopt.solvers.hurried import OutOfTimeError
from gemopt.solvers.nearest import nearest_row
from gemopt.solvers.placing import first_row


def lpt_row(problem: Problem, *, copies_E: Row | None = None) -> Row:
    """[P] speed-weighted LPT: heaviest first, each to the rank that would finish it first.

    copies_E: [E] copies of each expert (default one each). Under rules: `first_row`.
    """
    if problem.rules is not None:
        return first_row(problem)
    offset_G, weight_GE = problem.linearised
    copies = np.ones(problem.num_experts, dtype=np.int64) if copies_E is None else copies_E
    items = np.repeat(np.arange(problem.num_experts), copies)
    return pack(items, weight_GE[:, items] / copies[items], offset_G, problem.slots_per_rank)


def replicate(weight_E: FloatArray, slots_G: Row, most: int | None = None) -> Row:
    """[E] copies: each spare slot (or `most` of them) to the expert with the most load per copy that can have one more.

    As EPLB does. At most one copy per rank, and never more than fit: copies of several experts compete for the ranks
    with many slots.
    """
    copies = np.ones(len(weight_E), dtype=np.int64)
    open_experts = np.ones(len(weight_E), dtype=bool)
    room_E = _room(slots_G, len(weight_E))
    wanted = slots_G.sum() if most is None else min(slots_G.sum(), len(weight_E) + most)
    while copies.sum() < wanted and open_experts.any():
        hottest = np.where(open_experts, weight_E / copies, -1.0).argmax()
        copies[hottest] += 1
        if not _fit(copies, room_E):  # more copies of others cannot make room
            copies[hottest] -= 1
            open_experts[hottest] = False
    return copies


def peak_load(problem: Problem) -> FloatArray:
    """[E] mean load and one standard deviation over the steps, in microseconds: bursts are what makes stragglers."""
    weights_T = problem.weights_T / max(problem.weights_T.sum(), 1e-300)
    mean_E = weights_T @ problem.counts_TE
    spread_E = np.sqrt(np.maximum(weights_T @ problem.counts_TE.astype(np.float64) ** 2 - mean_E**2, 0.0))
    varying_E = np.divide(spread_E, mean_E, out=np.zeros_like(mean_E), where=mean_E > 0)
    return np.asarray(problem.linearised[1].mean(axis=0) * (1.0 + varying_E))


def copies_worth_trying(problem: Problem) -> Row:
    """Experts that may deserve another copy, hottest first."""
    hottest = np.argsort(-problem.linearised[1].mean(axis=0), kind="stable")
    return hottest[: 16 + 2 * problem.spare_slots]


def filled(problem: Problem, row: Row) -> Row:
    """The row with copies in its empty slots: hottest experts first, by load per copy, one of each on a rank.

    Under rules sets of experts stay on their units, and a slot that no expert may have stays empty; if none may, the
    row is changed until all are full.
    """
    row, rules, (offset_G, weight_GE) = row.copy(), problem.rules, problem.linearised
    if rules is not None:
        rules = rules.settled(rules.units(row, problem.slots_per_rank))
    copies_E = np.bincount(row[row != EMPTY], minlength=problem.num_experts)
    held_GE = np.zeros(weight_GE.shape, dtype=bool)
    held_GE[problem.rank_of_slot[row != EMPTY], row[row != EMPTY]] = True
    load_G = offset_G + (held_GE * weight_GE / copies_E).sum(axis=1)
    empty = np.flatnonzero(row == EMPTY)
    for slot in empty[np.argsort(load_G[problem.rank_of_slot[empty]], kind="stable")]:
        rank = problem.rank_of_slot[slot]
        barred_E = held_GE[rank]
        if rules is not None:
            barred_E = barred_E | rules.closed_GE[rank] | rules.clash_EE[held_GE[rank]].any(axis=0)
            if barred_E.all():
                continue
        expert = int(np.where(barred_E, -1.0, weight_GE.mean(axis=0) / copies_E).argmax())
        row[slot] = expert
        held_GE[rank, expert] = True
        copies_E[expert] += 1
    if rules is not None and problem.full and (row == EMPTY).any():
        found = nearest_row(problem, row)
        if found is None:
            raise OutOfTimeError("a placement that keeps the rules with every slot full")
        return found
    return row


def placeable(copies_E: Row, slots_G: Row) -> bool:
    """Whether so many copies fit on different ranks each (Gale and Ryser): no k experts need more than k per rank."""
    return _fit(copies_E, _room(slots_G, len(copies_E)))


def _room(slots_G: Row, experts: int) -> Row:
    """[E] slots that the first 1, 2, ... experts can use, one on each rank."""
    return np.asarray(np.cumsum((slots_G[None] >= np.arange(1, experts + 1)[:, None]).sum(axis=1)))


def _fit(copies_E: Row, room_E: Row) -> bool:
    return bool((np.cumsum(np.sort(copies_E)[::-1]) <= room_E).all())


def pack(items: Row, weight_GI: FloatArray, offset_G: FloatArray, slots_G: Row) -> Row:
    """[P] items (experts, repeated for copies), heaviest first, each to the allowed rank that finishes it first."""
    finish = np.array(offset_G, dtype=np.float64)
    held: list[list[int]] = [[] for _ in slots_G]
    copied, full_G = np.bincount(items) > 1, slots_G == 0
    for index in np.argsort(-weight_GI.mean(axis=0), kind="stable"):
        expert = int(items[index])
        ready = np.where(full_G, np.inf, finish + weight_GI[:, index])
        if copied[expert]:
            ready[[expert in some for some in held]] = np.inf
        rank = int(ready.argmin())
        if ready[rank] == np.inf:
            rank = _make_room(expert, held, slots_G)
            full_G = np.array([len(some) for some in held]) >= slots_G  # others were moved
        held[rank].append(expert)
        full_G[rank] = len(held[rank]) >= slots_G[rank]
        finish[rank] += weight_GI[rank, index]
    row = np.full(int(slots_G.sum()), EMPTY)
    starts = np.cumsum(slots_G) - slots_G
    for start, experts in zip(starts, held, strict=True):
        row[start : start + len(experts)] = experts
    return row


def _make_room(expert: int, held: list[list[int]], slots_G: Row) -> int:
    """A rank without `expert` that has a free slot after others moved along, each to the next rank of a chain.

    The shortest augmenting chain; there is one whenever all copies fit at all (`placeable`).
    """
    before: dict[int, int | None] = {g: None for g, some in enumerate(held) if slots_G[g] and expert not in some}
    queue = list(before)
    for g in queue:
        if len(held[g]) < slots_G[g]:
            break
        for other in range(len(held)):
            if other not in before and slots_G[other] and set(held[g]) - set(held[other]):
                before[other] = g
                queue.append(other)
    else:
        raise AssertionError("copies that are placeable always find room")
    while (earlier := before[g]) is not None:
        moved = next(each for each in held[earlier] if each not in held[g])
        held[earlier].remove(moved)
        held[g].append(moved)
        g = earlier
    return g
