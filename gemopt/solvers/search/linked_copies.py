"""Copies under makespans and links together: dropped, added and replaced while that lowers the joint objective.

Another copy changes which tokens go where, so every change is judged by evaluating the layer and, where senders follow
experts, the next one. Experts are tried by how much load another copy would take off one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import moves_us, rank_times
from gemopt.latency import FloatArray
from gemopt.layer_rules import LayerRules
from gemopt.links import Links
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers.base import Options, Row, beside, within_limits
from gemopt.solvers.search.sharing_walk import SharingWalk

FEW = 8  # experts that are tried in a slot
MOST = 3  # slots whose copies a kick changes
WORK, MOST_TRIES = 1 << 16, 512  # tokens that a round of annealing counts, about, and single changes of it at most
EPSILON = 1e-9


def search_copies(
    problems: Sequence[Problem], links: Links, rows: list[Row], options: Options, only: int | None = None
) -> list[Row]:
    """Rows with other copies, of all layers or one, until no change helps or the time ends; never worse."""
    rows, helped = list(rows), True
    while helped and not options.expired():
        helped = False
        for layer in range(len(rows)) if only is None else [only]:
            while (better := _better(problems, links, rows, layer, options)) is not None:
                rows[layer], helped = better, True
    return rows


def _better(problems: Sequence[Problem], links: Links, rows: list[Row], layer: int, options: Options) -> Row | None:
    """The first change of a layer that lowers its cost, and that of the next layer where senders follow experts."""
    if options.expired():
        return None
    touched = range(layer, min(layer + 1 + links.coupled, len(rows)))
    goal = sum(_cost(problems, links, rows, n) for n in touched) * (1 - EPSILON)
    own = beside(problems, rows, layer, options.budget)
    for row in _changes(own, rows[layer]):
        if options.expired():
            return None
        tried = [*rows[:layer], row, *rows[layer + 1 :]]
        if within_limits(own, row) and sum(_cost(problems, links, tried, n) for n in touched) < goal:
            return row
    return None


def walked(
    problems: Sequence[Problem], links: Links, rows: list[Row], layer: int, draws: np.random.Generator, hot: float,
    options: Options,
) -> list[Row]:  # fmt: skip
    """The rows with another one of a layer: the best that a round of annealing by single changes comes through.

    Where none is better than what it begins with, the one that it ends in. Where tokens are too many for that, with
    other copies in a few slots.
    """
    tokens = links.traces.tokens
    size = int((links.traces.counts[:, layer] > 0).sum()) if tokens is None else len(tokens.step_of_token)
    tries, touched = min(MOST_TRIES, WORK // max(1, size)), range(layer, min(layer + 1 + links.coupled, len(rows)))
    own = beside(problems, rows, layer, options.budget)
    if tries < len(rows[layer]) ** 2:
        return [*rows[:layer], recopied(own, rows[layer], draws), *rows[layer + 1 :]]

    def cost(row: Row, _: NDArray[np.int64]) -> tuple[FloatArray, NDArray[np.int64]]:
        tried = [*rows[:layer], row, *rows[layer + 1 :]]
        cost_T = np.sum([_cost_T(problems, links, tried, n) for n in touched], axis=0)
        return cost_T, rank_times(own, row).argmax(axis=1)

    walk = SharingWalk(own, rows[layer], draws, cost, hot)
    walk.round = tries
    row = walk.best if walk.walk(tries, options.expired) else walk.row
    return [*rows[:layer], row, *rows[layer + 1 :]]


def _cost(problems: Sequence[Problem], links: Links, rows: list[Row], layer: int) -> float:
    """Microseconds of one layer, over all steps, and of its moves."""
    found_us = float(problems[layer].weights_T @ _cost_T(problems, links, rows, layer))
    return found_us + moves_us(problems[layer], rows[layer])


def _cost_T(problems: Sequence[Problem], links: Links, rows: list[Row], layer: int) -> FloatArray:
    """[T] microseconds of one layer."""
    problem = problems[layer]
    makespan_T = rank_times(problem, rows[layer]).max(axis=1)
    flows = links.flows(layer, rows, problem.slots_per_rank)
    sent_T = np.sum([time_T for flow in flows for _, time_T in flow.parts()], axis=0)
    return np.asarray(np.maximum(makespan_T, sent_T) if links.exchange.overlap else makespan_T + sent_T)


def recopied(problem: Problem, row: Row, draws: np.random.Generator) -> Row:
    """A row whose spare slots, up to a few drawn at random, hold another copy or, unless all must be full, none."""
    row, ranks = row.copy(), problem.rank_of_slot
    for _ in range(draws.integers(1, MOST + 1)):
        spare = np.flatnonzero((row == EMPTY) | (_number_E(problem, row)[row] > 1))
        if not len(spare):
            return row
        slot = int(draws.choice(spare))
        open_ = np.flatnonzero(~_barred_EG(problem, row)[:, ranks[slot]])
        choices = open_ if problem.full else np.append(open_, EMPTY)
        tried = _with(row, slot, draws.choice(choices)) if len(choices) else row
        row = tried if within_limits(problem, tried) else row
    return row


def _changes(problem: Problem, row: Row) -> Iterator[Row]:
    """Rows with one copy less, one more, or another one, the most promising first."""
    ranks, load_E = problem.rank_of_slot, problem.weights_T @ problem.counts_TE
    number_E, barred_EG = _number_E(problem, row), _barred_EG(problem, row)
    wanted = np.argsort(-load_E / (number_E * (number_E + 1)), kind="stable")
    copies = np.flatnonzero((row != EMPTY) & (number_E[row] > 1))
    copies = copies[np.argsort(load_E[row[copies]] / (number_E[row[copies]] * (number_E[row[copies]] - 1)))]
    empty = np.flatnonzero(row == EMPTY)
    _, first = np.unique(ranks[empty], return_index=True)  # empty slots of a rank are alike
    for slot in [] if problem.full else copies.tolist():
        yield _with(row, slot, EMPTY)
    for slot in (*empty[first].tolist(), *copies.tolist()):
        for expert in [e for e in wanted.tolist() if not barred_EG[e, ranks[slot]]][:FEW]:
            yield _with(row, slot, expert)


def _number_E(problem: Problem, row: Row) -> NDArray[np.int64]:
    """[E] copies of every expert."""
    return np.bincount(row[row != EMPTY], minlength=problem.num_experts)


def _barred_EG(problem: Problem, row: Row) -> NDArray[np.bool_]:
    """[E, G] ranks where an expert may have no other copy, as it has one there or rules say so."""
    rules = problem.rules or LayerRules((), problem.num_ranks, problem.num_experts)
    return rules.barred_EG(row, problem.slots_per_rank)


def _with(row: Row, slot: int, expert: int) -> Row:
    changed = row.copy()
    changed[slot] = expert
    return changed
