"""Which moves pay: few swaps from the placement in force, judged on weighted past steps. Pure functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.evaluate import objective, rank_times
from gemopt.latency import FloatArray
from gemopt.layer_rules import Demand
from gemopt.online.compiled import Compiled
from gemopt.online.decision import Weights
from gemopt.online.earlier import onwards
from gemopt.online.policy import Policy
from gemopt.placement import EMPTY
from gemopt.problem import Problem
from gemopt.solvers import hurried
from gemopt.solvers.base import Row
from gemopt.solvers.nearest import nearest_row
from gemopt.solvers.placing import conflict
from gemopt.solvers.search.blocs import settled
from gemopt.solvers.search.moves import Waypoint, few_moves
from gemopt.solvers.search.state import Costs
from gemopt.splits import chosen_weights

MANY = 64  # experts, beyond which a decision looks less closely to end soon:
LEAST = 0.004  # of the makespan is what a swap must gain where it keeps all that it promises
PROBE = 0.5  # swaps are looked for down to this part of what a swap must promise, to learn what they keep


@dataclass(frozen=True)
class Prices:
    """What a plan must pay for: microseconds per step for each move and each layer touched; and fractions of the
    makespan, by which a swap keeps less than it promises, and that a move must promise more while moves do not pay."""

    move_us: float
    layer_us: float
    shortfall: float
    doubt: float = 0.0

    @classmethod
    def of(
        cls, policy: Policy, expert_bytes: float, steps: float, shortfall: float, trust: float, exempt: bool
    ) -> Prices:
        """Of moves that serve for so many steps, of whose promises a share counts; exempt: all of it but for that."""
        transfer_us = expert_bytes / policy.bytes_per_s * 1e6
        move_us, layer_us = policy.slowdown * transfer_us / steps, policy.commit_us / steps
        doubt = 0.5 * shortfall * (1 / trust - 1)  # a swap is two moves
        return cls(move_us / trust, layer_us / trust, 0.0 if exempt else shortfall, doubt)


@dataclass(frozen=True, eq=False)
class Proposal:
    """What one layer could do: waypoints after 0, 1, 2, ... swaps, the first being what is in force."""

    layer: int
    way: Sequence[Waypoint]
    prices: Prices

    def net_us(self, index: int) -> float:
        """Gain per step of going to a waypoint, less what it must pay for."""
        if index == 0:
            return 0.0
        first, chosen, prices = self.way[0], self.way[index], self.prices
        short = (index * prices.shortfall + chosen.moves * prices.doubt) * first.objective_us
        promised = first.objective_us - chosen.objective_us - short
        return promised - prices.move_us * chosen.moves - prices.layer_us

    def best(self, most_moves: int | None = None) -> int:
        """Waypoint of the largest net gain within a number of moves."""
        within = [k for k, each in enumerate(self.way) if most_moves is None or each.moves <= most_moves]
        return max(within, key=self.net_us)


def effective_steps(weights_N: FloatArray) -> float:
    """How many equally weighted steps tell as much."""
    return float(weights_N.sum() ** 2 / (weights_N**2).sum())


def propose(
    problem: Problem,
    layer: int,
    home: Row,
    prices: Prices,
    *,
    dead_zone: float,
    max_swaps: int,
    into_G: NDArray[np.int64],
    costs: Costs,
    weights_P: FloatArray | None = None,
    back: Sequence[Waypoint] = (),
) -> Proposal | None:
    """Swaps of one layer, most of which pay or nearly do, also after a way back where that pays; None without any.

    dead_zone: slowest over mean rank below which nothing is tried. into_G: [G] experts that each rank may receive.
    costs: the latencies in compiled form. weights_P: [P] static weights of the copies, which travel with them.
    back: rows that served before, see `gemopt.online.earlier`.
    """
    times_TG = rank_times(problem, home, weights_P)
    now_us = float(times_TG.max(axis=1) @ problem.weights_T)
    mean_us = float(times_TG.mean(axis=1) @ problem.weights_T)
    if now_us <= dead_zone * mean_us or now_us - mean_us <= prices.layer_us:
        return None
    many = problem.num_experts > MANY
    options = {
        "price_us": prices.move_us + prices.doubt * now_us,
        "least_us": (PROBE * prices.shortfall or LEAST * many) * now_us,
        "max_swaps": max_swaps,
        "max_into_G": into_G,
        "costs": costs,
    }
    here = Waypoint(home, now_us, 0, weights_P)
    best = max(back, key=lambda each: Proposal(layer, [here, each], prices).net_us(1), default=here)
    returns = best is not here and Proposal(layer, [here, best], prices).net_us(1) > 0
    ways = [[here, *onwards(problem, home, best, **options)]] if returns else []
    if not (returns and many):
        ways.append(few_moves(problem, home, weights_P=weights_P, **options))  # type: ignore[arg-type]
    found = max((Proposal(layer, way, prices) for way in ways), key=lambda each: each.net_us(each.best()))
    return found if len(found.way) > 1 else None


def propose_all(
    problems: Sequence[Problem],
    layers: Sequence[int],
    rows: NDArray[np.int64],
    weights: Weights,
    prices: Prices,
    policy: Policy,
    into_G: NDArray[np.int64],
    compiled: Compiled,
    back: Callable[[int], Sequence[Waypoint]],
) -> list[Proposal]:
    """`propose` for these layers, in their order whatever the number of threads, which have ended when it returns."""
    costs = {layer: compiled.of(problems[layer]) for layer in layers}

    def one(layer: int) -> Proposal | None:
        return propose(
            problems[layer],
            layer,
            rows[layer],
            prices,
            dead_zone=policy.dead_zone,
            max_swaps=policy.max_swaps,
            into_G=into_G,
            costs=costs[layer],
            weights_P=weights[layer],
            back=back(layer),
        )

    if policy.threads == 1 or len(layers) < 2:
        found = [one(layer) for layer in layers]
    else:
        with ThreadPoolExecutor(policy.threads) as pool:
            found = list(pool.map(one, layers))
    return [proposal for proposal in found if proposal is not None]


def rechosen(problem: Problem, waypoint: Waypoint) -> tuple[FloatArray | None, float]:
    """[P] static weights of the copies of a waypoint, chosen anew where that is better (None under another split), and
    the objective with them in microseconds."""
    if waypoint.weights is None:
        return None, waypoint.objective_us
    found = chosen_weights(problem, waypoint.row)
    value = objective(problem, waypoint.row, found)
    return (found, value) if value < waypoint.objective_us else (waypoint.weights, waypoint.objective_us)


def rechosen_all(
    problems: Sequence[Problem], before_LP: NDArray[np.int64], rows_LP: NDArray[np.int64], weights: Weights
) -> tuple[Weights, float]:
    """(static weights, chosen anew in layers that changed; what these changes gain in microseconds per step)."""
    found, gain_us = list(weights), 0.0
    for layer in np.flatnonzero((rows_LP != before_LP).any(axis=1)).tolist():
        problem, row = problems[layer], rows_LP[layer]
        gain_us += objective(problem, before_LP[layer], weights[layer])
        found[layer] = None if weights[layer] is None else chosen_weights(problem, row)
        gain_us -= objective(problem, row, found[layer])
    return found, gain_us


def choose(proposals: Sequence[Proposal], most_moves: int | None) -> dict[int, Waypoint]:
    """Waypoint of each layer that moves; where moves are limited, those layers first that gain most per move."""
    left = most_moves
    chosen: dict[int, Waypoint] = {}

    def worth(each: Proposal) -> float:
        index = each.best()
        return each.net_us(index) / max(each.way[index].moves, 1)

    for each in sorted(proposals, key=lambda one: (-worth(one), one.layer)):
        index = each.best(left)
        if each.net_us(index) <= 0:
            continue
        chosen[each.layer] = each.way[index]
        left = None if left is None else left - each.way[index].moves
    return chosen


def settle(
    problems: Sequence[Problem], rows_LP: NDArray[np.int64], dead_G: NDArray[np.bool_]
) -> tuple[list[Problem], NDArray[np.int64], str]:
    """What must move whatever it costs: off dead ranks, and under the rules.

    Returns
    -------
    list of Problem, array, str
        The layers, whose sets of experts stay on the rank or node that they are on now; rows; and what to say: why
        there are no such rows when it begins with `infeasible`.
    """
    with hurried.call(time.monotonic() + hurried.LIMIT_S, lambda: False):  # of all layers together
        return _settled(problems, rows_LP, dead_G)


def _settled(
    problems: Sequence[Problem], rows_LP: NDArray[np.int64], dead_G: NDArray[np.bool_]
) -> tuple[list[Problem], NDArray[np.int64], str]:
    rows, held_to, said = np.array(rows_LP), list(problems), ""
    without = f" without rank {', '.join(map(str, np.flatnonzero(dead_G)))}" if dead_G.any() else ""
    for layer, problem in enumerate(problems):
        room = int(problem.slots_per_rank[~dead_G].sum())
        if without and room < problem.num_experts:  # which solvers may take for ever to prove
            need = f"{problem.num_experts} experts need a slot, the others have {room}"
            return held_to, rows, f"infeasible{without}: {need}"
        if problem.rules is not None:
            row = _keep_rules(problem, rows[layer], dead_G)
            if row is None:
                return held_to, rows, f"infeasible{without}: {_in_conflict(problem, dead_G)}"
            said = "rules ask for moves" if (row != rows[layer]).any() else said
            held_to[layer] = settled(problem, row)
        else:
            row = evacuate(problem, rows[layer], dead_G) if without else rows[layer]
            if row is None:
                need = f"{problem.num_experts} experts need a slot, the others have {room}"
                return held_to, rows, f"infeasible{without}: {need}"
        rows[layer] = row
    return held_to, rows, said


def _keep_rules(problem: Problem, home: Row, dead_G: NDArray[np.bool_]) -> Row | None:
    """The row with the fewest changes that keeps the rules and leaves dead ranks empty; None where none was found."""
    bound = _without(problem, dead_G)
    assert bound.rules is not None
    return nearest_row(bound, home) if bound.rules.broken(home, problem.slots_per_rank) else home


def _in_conflict(problem: Problem, dead_G: NDArray[np.bool_]) -> str:
    """The rules that no row without dead ranks keeps together, in words."""
    rules = _without(problem, dead_G).rules
    assert rules is not None
    names = conflict(rules, problem.slots_per_rank, full=False)
    says = {demand.name: demand.says for demand in rules.demands}
    told = "; ".join(f"{name}: {says[name]}" for name in names)
    return f"no placement was found that keeps {told or 'the rules'}"


def _without(problem: Problem, dead_G: NDArray[np.bool_]) -> Problem:
    """A problem with rules, whose dead ranks are closed to all experts by one more."""
    rules = problem.rules
    assert rules is not None
    if not dead_G.any():
        return problem
    closed_GE = np.repeat(dead_G[:, None], problem.num_experts, axis=1)
    failed = Demand("failed ranks", "they hold nothing", closed_GE=closed_GE)
    return replace(problem, rules=replace(rules, demands=(*rules.demands, failed)))


def evacuate(problem: Problem, home: Row, dead_G: NDArray[np.bool_]) -> Row | None:
    """The row with the experts of dead ranks in slots of the others, heaviest first to the rank that ends first; None
    when the slots do not suffice. Copies give way where no slot is empty."""
    row = home.copy()
    dead_P = dead_G[problem.rank_of_slot]
    row[dead_P] = EMPTY
    experts = np.arange(problem.num_experts)
    weight_E = problem.weights_T @ problem.counts_TE
    missing = experts[~np.isin(experts, row)]
    for expert in missing[np.argsort(-weight_E[missing], kind="stable")]:
        free_P = (row == EMPTY) & ~dead_P
        if not free_P.any():
            copies_E = np.bincount(row[row != EMPTY], minlength=problem.num_experts)
            free_P = ~dead_P & (copies_E[row] > 1)
            if not free_P.any():
                return None
            spare = np.flatnonzero(free_P)
            free_P = np.zeros_like(free_P)
            free_P[spare[weight_E[row[spare]].argmin()]] = True
        times_G = problem.weights_T @ rank_times(problem, row)
        slots = np.flatnonzero(free_P)
        row[slots[times_G[problem.rank_of_slot[slots]].argmin()]] = expert
    return row
