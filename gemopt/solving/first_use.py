"""Compiled kernels: made on first use, kept beside the sources afterwards. Making them takes long, so it is said."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np

from gemopt.bounds import lower_bound, step_bounds, together_bound
from gemopt.bounds.links import links_bound
from gemopt.evaluate import objective
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.layer_rules import Demand, LayerRules
from gemopt.links import Links
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers import get
from gemopt.solvers.base import LinkedSolver, Options, Solver
from gemopt.solvers.exact.contents import ContentsSearch
from gemopt.solvers.exact.share_tree import bound_of_copies
from gemopt.solvers.exact.stepwise import StepwiseSearch
from gemopt.solvers.search.copies import removal_costs
from gemopt.solvers.search.packing import filled
from gemopt.solvers.search.shares import make_search, make_shares
from gemopt.solvers.search.spread_climb import Climb
from gemopt.solvers.search.spreading import Looks
from gemopt.solvers.search.state import make_costs, make_state
from gemopt.solvers.size import paired, prover
from gemopt.solving.turns import least_s
from gemopt.solving.walks import add_copies, walk_fronts
from gemopt.splits import plain
from gemopt.topology.named import named
from gemopt.traces import Tokens, Traces
from gemopt.traces.arrays import count_assignments
from gemopt.words import say

ONCE = "compiling kernels used here for the first time: a minute or two, once"
NOTICE = f"{ONCE} (not counted in the time limit)"
LOOK_S = 0.1
OWN = ("gem", "branch", "columns", "auto")  # have kernels that the other solvers do not use
_known: set[tuple[object, ...]] = set()


def ready(
    solver: Solver,
    problem: Problem,
    notice: Callable[[str], None] | None = None,
    links: Links | None = None,
    *,
    budget: bool = False,
    compute_slack: float | None = None,
    time_limit: float = np.inf,
) -> float:
    """Load or compile the kernels on two steps of a layer; returns the seconds that took, which are not of solving.

    What this process has used is ready: nothing is done where a problem of this kind went before. `notice` is told when
    compiling begins and how long it took; None: `voice.say`. budget: copies are chosen within a memory budget.
    compute_slack: as in `gemopt.solve`. time_limit: seconds of the call, which say whether contents of ranks can come
    to be priced.
    """
    contents = paired(problem) and time_limit >= least_s(problem)
    kind = _kind(solver, problem, budget, contents), _asked(problem), _sent(links, compute_slack)
    if kind in _known:
        return 0.0
    begin = time.monotonic()
    with told_of(notice):
        tiny = problem.select(np.argsort(problem.counts_TE.sum(axis=1), kind="stable")[-2:])
        _use(solver, tiny if tiny.rules is None else _easy(problem), budget, contents)
        if links is not None:
            _use_links(solver, problem, links, compute_slack)
        if budget:
            _use_budget(problem)
    _known.add(kind)
    return time.monotonic() - begin


@contextmanager
def told_of(notice: Callable[[str], None] | None = None, text: str = NOTICE) -> Iterator[None]:
    """Say `text` when compiling begins within, and afterwards how long it took; None: to `say`."""
    notice, begin, over = notice or say, time.monotonic(), threading.Event()
    before = _compiled()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if _compiled() > before:
                notice(text)
                return

    watcher = threading.Thread(target=watch, name="gemopt-first-use", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    if _compiled() > before:
        notice(f"compiled in {time.monotonic() - begin:.0f} s")


def unlike(problems: Sequence[Problem]) -> list[Problem]:
    """One layer of each kind that rules make of the layers of a call: they share all else that decides on kernels."""
    return list({(each.rules is None, _asked(each)): each for each in reversed(problems)}.values())


def _kind(solver: Solver, problem: Problem, budget: bool, contents: bool) -> tuple[object, ...]:
    """What decides which kernels a call runs, beside rules and links."""
    without = (problem.moves is None, problem.rules is None, problem.senders_TGE is None, not problem.spare_slots)
    terms = max(len(latency.terms) for latency in problem.latencies)
    costs = (len(problem.features), min(terms, 2))
    searches = solver.supports.improves or solver.supports.proves
    own = (solver.name if solver.name in OWN else searches, prover(problem) if solver.name == "auto" else None)
    return (*own, budget, problem.split, problem.full, *without, *costs, contents)


def _asked(problem: Problem) -> tuple[object, ...]:
    """Kinds of rules, and whether moves into each rank are limited."""
    demands = () if problem.rules is None else problem.rules.demands
    kinds = {"closed" if d.closed_GE is not None else "apart" if d.apart_E is not None else "bloc" for d in demands}
    return (*sorted(kinds), problem.moves is not None and problem.moves.most_into_G is not None)


def _sent(links: Links | None, compute_slack: float | None) -> tuple[object, ...]:
    """What decides which kernels run for links."""
    if links is None:
        return ()
    exchange = links.exchange
    return (
        links.senders,
        exchange.once_per,
        exchange.overlap,
        links.even,
        links.traces.tokens is None,
        compute_slack is None,
    )


def _easy(problem: Problem) -> Problem:
    """Four experts on two ranks, with rules of the same kinds: those of the problem may take long to keep."""
    counts = np.array([[1, 2, 3, 9], [9, 2, 1, 1]], np.int32)
    few = Problem.make(
        counts, problem.features, (problem.latencies * 2)[:2], 2 + (problem.spare_slots > 0), split=problem.split,
        senders_TGE=None if problem.senders_TGE is None else np.stack([counts - 1, np.ones_like(counts)], axis=1),
        full=problem.full,
    )  # fmt: skip
    rules, moves, experts, ranks = problem.rules, problem.moves, np.arange(4), np.arange(2)
    assert rules is not None
    demands = {
        "closed": Demand("", "", closed_GE=(ranks[:, None] == 1) & (experts == 0)),
        "apart": Demand("", "", apart_E=experts < 2),
        "bloc": Demand("", "", bloc_E=experts == 0, unit_G=ranks),
    }
    *kinds, _ = _asked(problem)
    if moves is not None:
        into_G = None if moves.most_into_G is None else np.full(2, 2)
        moves = replace(moves, home_GE=experts % 2 == ranks[:, None], most_into_G=into_G, known_P=None)
    return replace(few, rules=LayerRules(tuple(demands[str(kind)] for kind in kinds), 2, 4), moves=moves)


def _use(solver: Solver, tiny: Problem, budget: bool, contents: bool) -> None:
    lower_bound(tiny)
    options = Options(deadline=np.inf, patience=1)
    free = replace(tiny, rules=None, full=False)
    row = get("linear").solve(free, options, None).row
    assert row is not None
    objective(free, row)
    if solver.supports.improves or solver.supports.proves:
        objective(free, filled(free, row))  # with copies
        kernels = solver if solver.name == "gem" else get("local-search")
        kernels.solve(tiny, options, None)
        two_ranks = Problem.make([[1, 2, 3, 4]], (ASSIGNMENTS,), [Latency(((line(1, s),),)) for s in (1, 2)])
        together_bound(two_ranks, step_bounds(two_ranks), np.zeros(1, np.uint8))
        if contents:
            ContentsSearch(two_ranks, step_bounds(two_ranks), np.inf).run(np.zeros(1, np.uint8))
            for few in (True, False):  # contents, which are all looked at, or improved by exchanges
                stepwise = StepwiseSearch(two_ranks, step_bounds(two_ranks), np.inf, np.arange(4))
                stepwise.few = few
                stepwise.run(np.zeros(1, np.uint8))
        if tiny.spare_slots and tiny.split is Split.OPTIMAL and plain(tiny):
            Climb(Looks(free).at(row), np.random.default_rng(0)).climb(1, lambda: False)  # whatever is left to gain
        for name in ("branch", "columns"):
            if solver.name == name or (solver.name == "auto" and (budget or prover(tiny) == name)):
                slots = [2] * (budget or not tiny.spare_slots) + [3] * (tiny.spare_slots > 0 and name == "branch")
                for each in slots:
                    if each > 2:
                        _use_shares(replace(two_ranks, slots_per_rank=np.full(2, each)))
                    get(name).solve(replace(two_ranks, slots_per_rank=np.full(2, each)), options, None)
    if tiny.moves is not None:
        fronts = walk_fronts([tiny], [None], [2], options, 1, promised=True)[0]
        if tiny.spare_slots and fronts[0].points:
            add_copies([tiny], fronts, None, options, 1)


def _use_shares(few: Problem) -> None:
    row = get("linear").solve(few, Options(deadline=np.inf), None).row
    assert row is not None
    search = bound_of_copies(few, row, -np.inf, np.zeros(1, np.uint8))
    assert search is not None
    box = search.open[0][2]
    search.halves(box)
    search.search(box)


def _use_budget(problem: Problem) -> None:
    """Two ranks with slots for copies, one of which is then lost."""
    few = Problem.make([[1, 2, 3, 9], [9, 2, 1, 1]], problem.features, [problem.latencies[0]] * 2, 3)
    row = get("local-search").solve(few, Options(deadline=np.inf, patience=1), None).row
    costs, shares = make_costs(few), make_shares(few)
    assert row is not None and shares is not None
    state = make_state(few, row, costs)
    removal_costs(costs, state, shares, make_search(state), np.zeros(few.num_slots))


def _use_links(solver: Solver, problem: Problem, links: Links, compute_slack: float | None) -> None:
    """Two layers of four experts on two ranks, whose tokens are given as those of `links` are."""
    ids, step = np.array([[[0, 2], [1, 3]], [[2, 3], [0, 1]], [[1, 3], [0, 2]]]), np.array([0, 0, 1])
    tokens = None
    if links.traces.tokens is not None:
        tokens = Tokens(ids, step, source_rank=np.array([0, 1, 1]) if links.senders == "recorded" else None)
    traces = Traces(counts=count_assignments(ids, step, 2, 4), tokens=tokens)
    few = replace(links, topology=named("nvlink-2" if compute_slack is None else "2x1-ib400"), traces=traces, _cache={})
    pair = [Problem.make(traces.counts[:, n], problem.features, problem.latencies[:2], 2) for n in range(2)]
    rows = [get("linear").solve(each, Options(deadline=np.inf), None).row for each in pair]
    links_bound(pair, few)
    if solver.supports.links:
        found = [row for row in rows if row is not None]
        search = solver if not solver.supports.proves else get("local-search")
        options = Options(deadline=np.inf, patience=1, compute_slack=compute_slack)
        cast(LinkedSolver, search).solve_linked(pair, few, found, options)


def _compiled() -> int:
    """Kernels that were not found in the cache so far."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("gemopt.")]
    kernels = [value for module in modules for value in list(vars(module).values()) if hasattr(value, "py_func")]
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels)
