"""Copies that are added one at a time where the optimal split promises most, though none of them may gain alone.

On a staircase a step may be no faster until the last of several copies is there. Promises (`spreading`) count the load
that each of them lets out of the ranks that a step waits for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.placement import EMPTY, Split
from gemopt.problem import Problem
from gemopt.solvers.base import Row, within_limits
from gemopt.solvers.search.spreading import Look, Looks
from gemopt.splits import plain

STEPS = 128  # looked at, at most
LOOKS = 16  # copies that are tried for each that is taken, at most
ELSEWHERE = 0.25  # of what a copy takes of a cut: what the same counts that it takes where no step waits
SAME = 1e-9  # of the value


def has_promises(problem: Problem) -> bool:
    """Whether there may be copies, which share by the optimal split of plain loads: nothing is known of others."""
    return problem.spare_slots > 0 and problem.split is Split.OPTIMAL and plain(problem)


def promised_copies(problem: Problem, row: Row, stop: NDArray[np.uint8]) -> Iterator[Row]:
    """Rows with one copy more each, in an empty slot or in place of another copy, none of them slower than the last.

    They keep to the limits of moves and the rules if the first one does.
    """
    steps = np.unique(np.linspace(0, problem.num_steps - 1, STEPS).round().astype(np.int64))
    looks = Looks(problem.select(steps))
    look, seen = looks.at(row.astype(np.int64)), {row.tobytes()}
    for _ in range(problem.num_slots):
        if stop[0]:
            return
        for slot, expert in _promising(problem, look):
            changed = look.row.copy()
            changed[slot] = expert
            if changed.tobytes() in seen or not within_limits(problem, changed):
                continue
            found = looks.at(changed, look)
            if found.value_us <= look.value_us * (1 + SAME):
                break
        else:
            return
        look = found
        seen.add(look.row.tobytes())
        yield look.row


def _promising(problem: Problem, look: Look) -> list[tuple[int, int]]:
    """Slots and their new experts, the best first."""
    loss_P, loss_G = _losses(problem, look), np.full(problem.num_ranks, np.inf)
    slot_G = np.zeros(problem.num_ranks, np.int64)
    for rank in np.unique(problem.rank_of_slot):
        mine = np.flatnonzero(problem.rank_of_slot == rank)
        slot_G[rank] = mine[np.lexsort((look.row[mine] != EMPTY, loss_P[mine]))[0]]
        loss_G[rank] = loss_P[slot_G[rank]]
    net_EG = np.where(_barred(problem, look), 0.0, look.promise.gain_EG - loss_G)
    best = np.argsort(-net_EG, axis=None, kind="stable")[:LOOKS]
    experts, ranks = np.unravel_index(best[net_EG.flat[best] > 0], net_EG.shape)
    return list(zip(slot_G[ranks].tolist(), experts.tolist(), strict=True))


def _losses(problem: Problem, look: Look) -> FloatArray:
    """[P] microseconds that each slot may cost without its expert, which has another copy: what it takes of a cut, and
    part of what it takes elsewhere, where another cut may be next."""
    copies, cut_TC = look.copies, look.cut_TG[:, look.copies.rank]
    loss_P = np.where(look.row == EMPTY, 0.0, np.inf)
    if len(copies.slot):
        cut_TR = np.logical_or.reduceat(cut_TC, copies.first[:-1], axis=1)
        taken_TC = np.where(cut_TR[:, copies.owner] & ~cut_TC, 1.0, ELSEWHERE) * look.shares_TP[:, copies.slot]
        loss_P[copies.slot] = look.promise.slope_T @ taken_TC
    return loss_P


def _barred(problem: Problem, look: Look) -> NDArray[np.bool_]:
    """[E, G] which expert a rank may not get: one that it has, that a rule forbids, or for which no move is left."""
    barred_EG, moves = look.looks.barred(look.row), problem.moves
    if moves is None:
        return barred_EG
    into_G = moves.into(look.row, problem.slots_per_rank)
    over_G = np.full(problem.num_ranks, moves.most is not None and into_G.sum() >= moves.most)
    if moves.most_into_G is not None:
        over_G |= into_G >= moves.most_into_G
    return np.asarray(barred_EG | (over_G & ~moves.home_GE.T))
