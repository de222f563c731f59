"""The master programme over some of the columns: a primal-dual iteration in float32 that can stop at any time.

    min sum_tl w_t z_tl,   z_tl >= sum of x_kC part_tl(k, C) over columns that hold i  for all i, t, l
    every expert in one column, count_k columns of kind k, x >= 0

Its dual solutions are the multipliers and prices of `Space.prove`. Reflected Halpern steps with restarts, as in
`gemopt.bounds.primal_dual`, from no column in use: from the incumbent's alone the iteration stays there for long.
It begins with one level, which costs least and takes it nearly all the way; more of them close some of what is left.
Times are in units of the incumbent's objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray, IntArray
from gemopt.solvers.exact.column_space import Space
from gemopt.solvers.exact.master_kernels import Columns, Point, Way, iterate, norm_of_costs, norm_of_sums

if TYPE_CHECKING:
    from gemopt.solvers.exact.contents import Contents
    from gemopt.solvers.exact.share_space import Shares
    from gemopt.solvers.exact.step_space import Stepwise

F32 = np.float32
Floats = NDArray[np.float32]

MOST_ROOM = 2e7  # entries of the columns' parts
POWER_STEPS, POWER_STEPS_MORE = 12, 3  # for the norms at first, and from those of other columns
LEAST_NORM = 1e-12
HIGHEST = 10.0  # times the incumbent's objective: a step that takes longer counts as this


class Held(NamedTuple):
    """Where an iteration ended, from which another one may go on.

    ids: [n] columns. image: what it multiplies them with, in which unit by its `ratio`. costs_EM, sums_R: vectors near
    the norms of the rows.
    """

    ids: IntArray
    image: Point
    ratio: np.float32
    costs_EM: Floats
    sums_R: Floats


class Master:
    """Columns known so far and where the iteration is.

    owner_X, share_X: whom the items in columns belong to and how much of it each is; None: items are experts.
    """

    def __init__(
        self, space: Space | Contents | Stepwise | Shares, value_us: float, owner_X: IntArray | None = None,
        share_X: FloatArray | None = None,
    ) -> None:  # fmt: skip
        self.space, self.unit = space, value_us
        self.weight = max(float(space.problem.weights_T.mean()), 1e-300)  # the unit of multipliers
        self.ids, self.ratio = np.zeros(0, np.int64), F32(1)
        most_T, experts = space.problem.weights_T / self.weight, space.problem.num_experts
        self.owner_X = np.arange(experts) if owner_X is None else owner_X
        self.share_X = np.ones(experts, F32) if share_X is None else share_X.astype(F32)
        self.count_K = space.count_K.astype(F32)
        self.z = self.image = Point(
            np.zeros(0, F32),
            np.tile(most_T / (experts * space.planes), (experts, space.planes)).astype(F32),
            np.zeros(experts, F32),
            np.zeros(len(space.count_K), F32),
        )
        self.way = Way(1.0, 0, 0, 0.0, np.inf)
        self._set_levels(space.floor_T[None])

    @property
    def iterations(self) -> int:
        """All that it has gone."""
        return self.way.iterations

    @property
    def norm(self) -> float:
        """The largest singular value of the rows of latencies, about."""
        return self.way.norm

    def go_on(self, held: Held) -> None:
        """Begin, with the next `hold`, where another iteration ended."""
        self.ids, self.ratio, self.costs_EM, self.sums_R = held.ids, held.ratio, held.costs_EM, held.sums_R
        self.z = self.image = held.image

    @property
    def held(self) -> Held:
        """Where it is; not to be changed."""
        return Held(self.ids, self.image, self.ratio, self.costs_EM, self.sums_R)

    def cut(self, levels_LT: FloatArray) -> None:
        """Cut latencies at these levels, before the next `hold`; each has the multipliers of the one it was part of."""
        middles = (levels_LT[1:] + levels_LT[:-1]).sum(axis=1) / 2
        part_of = np.searchsorted(self.levels_LT[1:].sum(axis=1), np.append(middles, np.inf))
        experts = len(self.z.mu)
        mu = self.z.mu.reshape(experts, len(self.levels_LT), -1)[:, part_of].reshape(experts, -1)
        self.z = self.z._replace(mu=mu)
        self._set_levels(levels_LT)

    def _set_levels(self, levels_LT: FloatArray) -> None:
        self.levels_LT, steps = levels_LT, len(self.space.problem.weights_T)
        self.ends_LT = np.vstack([levels_LT, np.full((1, steps), HIGHEST * self.unit)])
        self.most_M = np.tile(self.space.problem.weights_T / self.weight, len(levels_LT)).astype(F32)
        self.most_columns = int(MOST_ROOM / self.z.mu.shape[1])
        self.costs_EM, self.sums_R = np.zeros((0, 0), F32), np.zeros(0, F32)

    def fold(self, space: Contents) -> None:
        """Go on, with the next `hold`, where a latency is one row: the largest of its planes, cut at the floors."""
        mu = self.z.mu.reshape(len(self.z.mu), self.space.planes, -1).sum(axis=1)
        self.z, self.space = self.z._replace(mu=mu), space
        self._set_levels(self.levels_LT)

    def net(self) -> FloatArray:
        """[n] what each column costs less the prices of its experts, about, in microseconds."""
        mu, pi, net_N = self.image.mu, self.image.pi * self.ratio, np.zeros(len(self.ids))
        for s in range(self.columns.items.shape[1]):
            mine = np.flatnonzero(self.columns.size > s)
            experts = self.columns.items[mine, s]
            net_N[mine] += np.einsum("nm,nm->n", self.columns.parts[mine], mu[experts]) - pi[experts]
        return net_N * self.unit

    def least(self) -> FloatArray:
        """[K] the least `net` of any column of a kind."""
        net_N = self.net()
        return np.array([net_N[self.columns.kind == k].min(initial=np.inf) for k in range(len(self.count_K))])

    @property
    def used(self) -> IntArray:
        """Columns in use."""
        return self.ids[self.image.x > 0]

    def hold(self, ids: IntArray) -> None:
        """Go on with these columns, as many as there is room for, and no others."""
        ids = np.unique(ids[: self.most_columns])
        x = np.zeros(len(ids), F32)
        _, mine, theirs = np.intersect1d(ids, self.ids, assume_unique=True, return_indices=True)
        x[mine] = self.z.x[theirs]
        self.z, self.ids = self.z._replace(x=x), ids
        kind = self.space.kind(ids)
        parts = self.space.parts(ids, self.ends_LT, self.weight / self.unit)
        members = np.ascontiguousarray(self.space.members(ids))
        size = np.minimum(self.space.size_K[kind], (self.share_X[members] > 0).sum(axis=1))  # without empty slots
        self.columns = Columns(parts, members, size, kind, self.owner_X, self.share_X)
        self._scale()

    def _scale(self) -> None:
        """Step sizes from the norms of both kinds of rows, which are scaled to be alike."""
        again = bool(self.costs_EM.size)
        costs_EM = self.costs_EM if again else np.ones_like(self.z.mu)
        sums_R = self.sums_R if again else np.ones(len(self.z.pi) + len(self.z.y), F32)
        costs_EM, sums_R = (np.maximum(each, F32(0.1) * each.mean()) for each in (costs_EM, sums_R))
        rounds = POWER_STEPS_MORE if again else POWER_STEPS
        norm = max(np.sqrt(norm_of_costs(self.columns, costs_EM, rounds)), LEAST_NORM)
        ratio = F32(norm / max(np.sqrt(norm_of_sums(self.columns, sums_R, rounds)), LEAST_NORM))
        if norm > LEAST_NORM:  # without columns neither has one
            self.costs_EM, self.sums_R = costs_EM, sums_R
        change = self.ratio / ratio
        self.ratio = ratio
        self.z = Point(self.z.x.copy(), self.z.mu.copy(), self.z.pi * change, self.z.y * change)
        self.anchor, self.image = _copy(self.z), _copy(self.z)
        self.way = Way(float(norm), self.way.iterations, 0, 0.0, np.inf)

    def iterate(self, count: int, stop: Any) -> None:
        """So many steps, unless stopped or without columns. Where they diverge `multipliers` are any numbers."""
        if len(self.ids):
            z, anchor, image = self.z, self.anchor, self.image
            self.way = iterate(
                self.columns, self.most_M, self.count_K, self.ratio, z, anchor, image, self.way, count, stop
            )

    def multipliers(self) -> tuple[FloatArray, FloatArray]:
        """(mu [L, E, T], pi [E] in microseconds), as `Space.prove` takes them."""
        experts, levels = len(self.image.mu), len(self.levels_LT)
        mu = self.image.mu.astype(np.float64).reshape(experts, levels, -1).transpose(1, 0, 2) * self.weight
        return mu, self.image.pi.astype(np.float64) * float(self.ratio) * self.unit


def _copy(point: Point) -> Point:
    return Point(*(part.copy() for part in point))
