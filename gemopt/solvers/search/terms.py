"""What moves cost, as the compiled kernels read it, and swaps that keep to it.

`moved_G` counts the moves into each rank at present; every kernel that changes a placement keeps it up to date.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.moves import Moves
from gemopt.problem import Problem
from gemopt.solvers.search.state import Array, Number, State


class Terms(NamedTuple):
    """What moves cost and how many there may be.

    home_GE: [G, E] whether each rank holds each expert in the placement in force. price: microseconds per move.
    least: gain that a swap must bring, beyond the price. most: moves in all. into_G: moves into each rank.
    """

    home_GE: Array
    price: float
    least: float
    most: int
    into_G: Array


def make_terms(problem: Problem, moves: Moves, *, least_us: float = 0.0) -> Terms:
    """Terms of a problem's moves; no limit is as many moves as there are slots."""
    most = problem.num_slots if moves.most is None else moves.most
    into_G = problem.slots_per_rank if moves.most_into_G is None else moves.most_into_G
    home_GE, into_G = np.array(moves.home_GE, np.bool_), np.array(into_G, np.int64)
    home_GE.flags.writeable = into_G.flags.writeable = False  # always, so that kernels are compiled once
    return Terms(home_GE, float(moves.price_us), float(least_us), int(most), into_G)


def free_terms(problem: Problem) -> Terms:
    """Every expert is at home everywhere: nothing moves, nothing costs."""
    shape = (problem.num_ranks, problem.num_experts)
    return make_terms(problem, Moves(np.ones(shape, dtype=bool)))


@njit(nogil=True, inline="always")
def moves_of(terms: Terms, rank: Number, expert: Number) -> Number:
    """1 where a rank that holds an expert (-1: none) must have received it, else 0."""
    return 0 if expert < 0 or terms.home_GE[rank, expert] else 1


@njit(nogil=True)
def set_prices(content: Array, home_GE: Array, price: float, first: Number, end: Number, price_GP: Array) -> None:
    """Fill in what holding the contents of the slots from `first` to before `end` costs each rank, in microseconds:
    the price of a move, or nothing."""
    for p in range(first, end):
        expert = content[p]
        for g in range(price_GP.shape[0]):
            price_GP[g, p] = 0.0 if expert < 0 else price * (1 - int(home_GE[g, expert]))


@njit(nogil=True)
def set_fees(starts: Array, price_GP: Array, a: Number, b: Number, fees: Array) -> None:
    """Fill in what bringing the content of each slot of two ranks to the other one adds (negative: refunds)."""
    for i in range(starts[a], starts[a + 1]):
        fees[i] = price_GP[b, i] - price_GP[a, i]
    for j in range(starts[b], starts[b + 1]):
        fees[j] = price_GP[a, j] - price_GP[b, j]


@njit(nogil=True)
def set_fees_of(state: State, terms: Terms, a: Number, b: Number, fees: Array) -> None:
    """`set_fees` of two ranks alone."""
    content, home_GE, price = state.content, terms.home_GE, terms.price
    for here, there in ((a, b), (b, a)):
        for p in range(state.starts[here], state.starts[here + 1]):
            expert = content[p]
            fees[p] = 0.0 if expert < 0 else price * (int(home_GE[here, expert]) - int(home_GE[there, expert]))


@njit(nogil=True)
def moved_into(state: State, terms: Terms) -> Array:
    """[G] moves into each rank at present."""
    moved_G = np.zeros(len(state.starts) - 1, np.int64)
    for g in range(len(moved_G)):
        for p in range(state.starts[g], state.starts[g + 1]):
            moved_G[g] += moves_of(terms, g, state.content[p])
    return moved_G


@njit(nogil=True, inline="always")
def extra_moves(state: State, terms: Terms, a: Number, b: Number, i: Number, j: Number) -> tuple[int, int]:
    """Moves into rank a and into rank b that swapping slot i of a with slot j of b adds (negative: refunds)."""
    expert_i, expert_j = state.content[i], state.content[j]
    into_a = moves_of(terms, a, expert_j) - moves_of(terms, a, expert_i)
    into_b = moves_of(terms, b, expert_i) - moves_of(terms, b, expert_j)
    return into_a, into_b


@njit(nogil=True, inline="always")
def permitted(
    terms: Terms, moved: Number, moved_G: Array, a: Number, b: Number, into_a: Number, into_b: Number
) -> bool:
    """Whether so many more moves into two ranks, on top of `moved` in all, break no limit that they add to."""
    added = into_a + into_b
    if added > 0 and moved + added > terms.most:
        return False
    if into_a > 0 and moved_G[a] + into_a > terms.into_G[a]:
        return False
    return not (into_b > 0 and moved_G[b] + into_b > terms.into_G[b])
