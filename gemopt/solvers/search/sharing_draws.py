"""Changes drawn at random, most from the rank that a step waits for, and a walk along those that lose little."""

from __future__ import annotations

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import MINUS, PLUS, ZERO, put
from gemopt.solvers.search.sharing_changes import Change, Sharing, carry_out, concern, list_shares, loss_of, take_up
from gemopt.solvers.search.state import Array, Costs, Number, State, freed, rank_of

DRAWS = 7  # random numbers of a change
FROM_SLOWEST = 0.75  # of the changes begin on the rank that a step waits for
SHIFTS = 0.4  # of the changes are of weights alone, where weights are chosen
SWAPS, DROPS = 0.5, 0.1  # of the others
WHOLE = 0.1  # of the weights that go elsewhere go as a whole
FINEST = 3.0  # powers of ten: the least part of a weight that goes
AT_A_GLANCE = 0.5  # of what a change may lose: losing more on the first steps, it will lose too much


@njit(nogil=True)
def draw_shift(state: State, sharing: Sharing, change: Change, g: Number, p: Number, draws: Array) -> bool:
    """Some weight goes from a copy on a rank, the first from a slot on, to another one."""
    first, size = state.starts[g], state.starts[g + 1] - state.starts[g]
    for n in range(size):
        slot = first + (p - first + n) % size
        expert, copies = state.content[slot], 0
        if expert < 0 or sharing.end_P[slot] == sharing.begin_P[slot]:
            continue
        for h in range(change.slot.shape[1]):
            copies += sharing.slot_EG[expert, h] >= 0
        if copies < 2:
            continue
        take_up(sharing, change, ZERO, expert)
        pass_on(change, ZERO, g, draws[0], draws[1])
        return True
    return False


@njit(nogil=True)
def pass_on(change: Change, x: Number, g: Number, which: float, much: float) -> None:
    """Give a part of a copy's weight to another copy, both drawn; 1: all of it."""
    others: Number = -1 if change.slot[x, g] >= 0 else 0
    for h in range(change.slot.shape[1]):
        others += change.slot[x, h] >= 0
    left = int(which * others)
    for h in range(change.slot.shape[1]):
        if h != g and change.slot[x, h] >= 0:
            if left == 0:
                amount = change.weight[x, g] * part_of(much)
                change.weight[x, g] -= amount
                change.weight[x, h] += amount
                return
            left -= 1


@njit(nogil=True)
def part_of(drawn: float) -> float:
    """Part of a weight that goes elsewhere: all of it, or of any size."""
    return 1.0 if drawn < WHOLE else 10.0 ** (-FINEST * (drawn - WHOLE) / (1.0 - WHOLE))


@njit(nogil=True)
def is_spare(state: State, sharing: Sharing, slot: Number) -> bool:
    """Whether a slot may hold something else: it is empty, or has a copy of what is elsewhere as well."""
    expert, copies = state.content[slot], 0
    if expert < 0:
        return True
    for h in range(sharing.slot_EG.shape[1]):
        copies += sharing.slot_EG[expert, h] >= 0
    return copies > 1


@njit(nogil=True)
def draw_swap(state: State, sharing: Sharing, change: Change, g: Number, p: Number, draws: Array) -> bool:
    """Two slots of two ranks change places, shares and all."""
    q: Number = np.int64(draws[0] * len(state.content))
    e: Number = state.content[p]
    f: Number = state.content[q]
    h = rank_of(state, q)
    if h == g or e == f or (e >= 0 and not freed(state, h, e, f)) or (f >= 0 and not freed(state, g, f, e)):
        return False
    take_up(sharing, change, ZERO, e)
    take_up(sharing, change, PLUS, f)
    if e >= 0:
        change.slot[0, g], change.slot[0, h] = -1, q
        change.weight[0, h], change.weight[0, g] = change.weight[0, g], 0.0
    else:
        concern(change, q, h, MINUS, 0.0, 0.0)
    if f >= 0:
        change.slot[1, h], change.slot[1, g] = -1, p
        change.weight[1, g], change.weight[1, h] = change.weight[1, h], 0.0
    else:
        concern(change, p, g, MINUS, 0.0, 0.0)
    return True


@njit(nogil=True)
def draw_copy(state: State, sharing: Sharing, change: Change, g: Number, p: Number, draws: Array, drop: bool) -> bool:
    """A spare slot gets a copy of what a slot holds, or with `drop` nothing."""
    slots = len(state.content)
    q: Number = np.int64(draws[0] * slots)
    for _ in range(slots):
        if is_spare(state, sharing, q) and not (drop and state.content[q] < 0):
            break
        q = (q + 1) % slots
    e: Number = MINUS if drop else state.content[p]
    f: Number = state.content[q]
    h = rank_of(state, q)
    if not is_spare(state, sharing, q) or e == f or (e >= 0 and not freed(state, h, e, f)):
        return False
    take_up(sharing, change, ZERO, e)
    take_up(sharing, change, PLUS, f)
    if f >= 0:
        change.slot[1, h] = -1
        pass_on(change, PLUS, h, draws[1], 0.0)
    if e >= 0:
        change.slot[0, h], change.weight[0, h] = q, 0.0
        amount = change.weight[0, g] * draws[2]
        change.weight[0, g] -= amount
        change.weight[0, h] += amount
    else:
        concern(change, q, h, MINUS, 0.0, 0.0)
    return True


@njit(nogil=True)
def draw_change(state: State, sharing: Sharing, change: Change, draws: Array) -> bool:
    """Draw a change and note what it concerns; whether it may be."""
    ranks, steps = state.times.shape
    for n in range(change.size[1]):
        change.group[change.ranks[n]] = -1
    change.size[:] = 0
    change.experts[:] = -1
    g: Number = np.int64(change.who[0, int(draws[0] * steps)])
    if draws[1] >= FROM_SLOWEST:
        g = np.int64((draws[1] - FROM_SLOWEST) / (1.0 - FROM_SLOWEST) * ranks)
    size = state.starts[g + 1] - state.starts[g]
    if size == 0:
        return False
    p = state.starts[g] + np.int64(draws[2] * size)
    shifts = SHIFTS if sharing.chosen else 0.0
    kind, made = (draws[3] - shifts) / (1.0 - shifts), False
    if kind < 0.0:
        made = draw_shift(state, sharing, change, g, p, draws[4:])
    elif kind < SWAPS:
        made = draw_swap(state, sharing, change, g, p, draws[4:])
    else:
        made = draw_copy(state, sharing, change, g, p, draws[4:], kind > 1.0 - DROPS and not sharing.full)
    if made:
        list_shares(state, sharing, change, ZERO)
        list_shares(state, sharing, change, PLUS)
    return made and change.size[0] > 0


@njit(nogil=True)
def walk(
    costs: Costs, state: State, sharing: Sharing, change: Change, draws_ND: Array, may_lose_N: Array, first: int,
    values: Array, best_P: Array, begin_P: Array, end_P: Array,
) -> None:  # fmt: skip
    """Try changes, and carry those out that lose no more than they may; `first` steps say at a glance what most lose.

    values: [2] of the state, and the best one; best_P, begin_P, end_P: what that one holds. Brought up to date.
    """
    steps = state.times.shape[1]
    for n in range(len(may_lose_N)):
        if not draw_change(state, sharing, change, draws_ND[n]):
            continue
        lost = loss_of(costs, state, sharing, change, ZERO, first)
        if first < steps:
            if lost > max(0.0, AT_A_GLANCE * may_lose_N[n]):
                continue
            lost += loss_of(costs, state, sharing, change, first, steps)
        if lost > may_lose_N[n]:
            continue
        carry_out(state, sharing, change, first)
        values[0] += lost
        if values[0] < values[1]:
            values[1] = values[0]
            put(best_P, state.content)
            put(begin_P, sharing.begin_P)
            put(end_P, sharing.end_P)
