"""Which layers are small enough for which proof."""

from __future__ import annotations

from math import comb, factorial, log2

from gemopt.placement import Split
from gemopt.problem import Problem

PROVABLE_EXPERTS = 16
PROVABLE_TIMES = 4000
PROVABLE_LITERALS = 1000  # ways to hold an expert or one of its copies x ranks, of which CP-SAT states one each
BRANCHED_EXPERTS = 24  # by branch and bound, on few ranks, without moves and rules
BRANCHED_WAYS = 44.0  # bits of the number of ways to place them
COPIED_WAYS = 47.0  # where slots are spare
COPIED_RANKS = 6  # with slots, where any are spare: each set of them is tried, and each order of equal ones
FEW_COLUMNS = 20_000  # contents of ranks, up to which listing them beats branch and bound
MANY_COLUMNS = 50_000  # of which a look at all is not for every round
MOST_COLUMNS = 400_000
MOST_ENTRIES = 2e8  # columns x steps: latencies looked up when all are priced
MOST_EXPERTS = 64  # a column is a word of bits
MOST_SHARES = 1_500_000  # contents of a rank where copies share evenly
MOST_SHARE_ENTRIES = 1e10  # the same of all kinds of ranks x steps
MOST_PAIRS = 255  # of an expert and its copies, numbered in a byte
MOST_PAIRED = 5e7  # contents of ranks that differ, when pairs of experts price them
MOST_PAIRED_EXPERTS = 256  # numbered in a byte


def branches(problem: Problem) -> bool:
    """Whether branch and bound has a chance: few experts and ranks, even shares, neither moves nor rules."""
    other = problem.moves is not None or problem.rules is not None
    uneven = problem.spare_slots and (problem.split is not Split.EVEN or problem.full)
    if other or uneven or problem.num_experts > BRANCHED_EXPERTS:
        return False
    if problem.spare_slots and (problem.slots_per_rank > 0).sum() > COPIED_RANKS:
        return False
    ways = log2(_ways(problem)) - sum(log2(factorial(len(group))) for group in problem.equal_ranks)
    return ways <= (COPIED_WAYS if problem.spare_slots else BRANCHED_WAYS)


def _ways(problem: Problem) -> int:
    """In how many ways experts can have sets of ranks, with no more copies in all than there are slots."""
    ranks = int((problem.slots_per_rank > 0).sum())
    most = min(problem.spare_slots, problem.num_experts * (ranks - 1))
    ways = [1] + [0] * most  # by the copies beyond one for each
    for _ in range(problem.num_experts):
        ways = [sum(ways[n - k] * comb(ranks, k + 1) for k in range(min(n, ranks - 1) + 1)) for n in range(most + 1)]
    return sum(ways)


def num_columns(problem: Problem) -> int | None:
    """How many contents the ranks can have, of equal ranks those of one; None where they are too many to list.

    Or where copies, moves or rules make more of a placement than these.
    """
    other = problem.moves is not None or problem.rules is not None
    if other or problem.spare_slots or problem.num_experts > MOST_EXPERTS:
        return None
    columns = num_contents(problem)
    return columns if columns <= MOST_COLUMNS and columns * problem.num_steps <= MOST_ENTRIES else None


def num_shares(problem: Problem) -> int | None:
    """How many contents any rank can have where copies share evenly; None where they are too many to list."""
    most, spare = problem.most_copies, problem.spare_slots
    ways, contents = [1] + [0] * spare, 1  # to have copies, by those beyond one for each
    for size in range(1, int(problem.slots_per_rank.max()) + 1):
        ways = [sum(ways[max(0, n - most + 1) : n + 1]) for n in range(spare + 1)]
        contents += sum(ways) * comb(problem.num_experts, size)
    few = contents <= MOST_SHARES and contents * len(problem.kinds) * problem.num_steps <= MOST_SHARE_ENTRIES
    return contents if few and problem.num_experts * most <= MOST_PAIRS else None


def num_contents(problem: Problem) -> int:
    """How many contents the ranks can have, of equal ranks those of one, none with a copy."""
    return sum(comb(problem.num_experts, int(problem.slots_per_rank[group[0]])) for group in problem.kinds)


def paired(problem: Problem) -> bool:
    """Whether all contents of ranks can be priced by pairs of experts: several on a rank, none with a copy."""
    if problem.spare_slots or problem.num_experts > MOST_PAIRED_EXPERTS or problem.slots_per_rank.max() < 2:
        return False
    return num_contents(problem) <= MOST_PAIRED


def prover(problem: Problem) -> str | None:
    """The solver of ours that has the best chance to prove a layer; None where none has any."""
    columns, branched = num_columns(problem), branches(problem)
    if columns is not None and (columns <= FEW_COLUMNS or not branched):
        return "columns"
    return "branch" if branched else None


def provable(problem: Problem) -> bool:
    """Whether `auto` tries a proof: by a solver of ours, or by CP-SAT where experts and steps are few."""
    if problem.spare_slots and (problem.split is not Split.EVEN or problem.full):
        return False
    few = problem.num_experts <= PROVABLE_EXPERTS and problem.num_steps * problem.num_ranks <= PROVABLE_TIMES
    most = min(problem.num_ranks, problem.spare_slots + 1)
    few &= problem.num_experts * (most * (most + 1) // 2) * problem.num_ranks <= PROVABLE_LITERALS
    return few or prover(problem) is not None
