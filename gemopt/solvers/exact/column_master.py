"""The master programme over some of the columns: a primal-dual iteration in float32 that can stop at any time.

    min sum_tl w_t z_tl,   z_tl >= sum of x_kC part_tl(k, C) over columns that hold i  for all i, t, l
    every expert in one column, count_k columns of kind k, x >= 0

Its dual solutions are the multipliers and prices of `Space.prove`. Reflected Halpern steps with restarts, as in
`gemopt.bounds.primal_dual`, from no column in use: from the incumbent's alone the iteration stays there for long.
It begins with one level, which costs least and takes it nearly all the way; more of them close some of what is left.
Times are in units of the incumbent's objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.solvers.exact.column_kernels import project, step_columns
from gemopt.solvers.exact.column_space import IntArray, Space

if TYPE_CHECKING:
    from gemopt.solvers.exact.contents import Contents
    from gemopt.solvers.exact.share_space import Shares
    from gemopt.solvers.exact.step_space import Stepwise

F32 = np.float32
Floats = NDArray[np.float32]

MOST_ROOM = 2e7  # entries of the columns' parts
POWER_STEPS, POWER_STEPS_MORE = 12, 6  # for the norms at first, and from those of other columns
STEP = 0.67  # of the norm of either kind of rows, below the root of a half
PRIMAL_WEIGHT = 12.0
HIGHEST = 10.0  # times the incumbent's objective: a step that takes longer counts as this
SUFFICIENT, NECESSARY, LONG = 0.2, 0.8, 0.36  # of the fixed-point error, and of the iterations, at a restart


class Master:
    """Columns known so far and where the iteration is."""

    def __init__(self, space: Space | Contents | Stepwise | Shares, value_us: float) -> None:
        self.space, self.unit = space, value_us
        self.weight = max(float(space.problem.weights_T.mean()), 1e-300)  # the unit of multipliers
        self.ids, self.ratio = np.zeros(0, np.int64), F32(1)
        most_T, experts = space.problem.weights_T / self.weight, space.problem.num_experts
        self.z: dict[str, Floats] = {
            "x": np.zeros(0, F32),
            "mu": np.tile(most_T / (experts * space.planes), (experts, space.planes)).astype(F32),
            "pi": np.zeros(experts, F32),
            "y": np.zeros(len(space.count_K), F32),
        }
        self.image, self.iterations = self.z, 0
        self._set_levels(space.floor_T[None])

    def cut(self, levels_LT: FloatArray) -> None:
        """Cut latencies at these levels, before the next `hold`; each has the multipliers of the one it was part of."""
        middles = (levels_LT[1:] + levels_LT[:-1]).sum(axis=1) / 2
        part_of = np.searchsorted(self.levels_LT[1:].sum(axis=1), np.append(middles, np.inf))
        experts = len(self.z["mu"])
        self.z["mu"] = self.z["mu"].reshape(experts, len(self.levels_LT), -1)[:, part_of].reshape(experts, -1)
        self._set_levels(levels_LT)

    def _set_levels(self, levels_LT: FloatArray) -> None:
        self.levels_LT, steps = levels_LT, len(self.space.problem.weights_T)
        self.ends_LT = np.vstack([levels_LT, np.full((1, steps), HIGHEST * self.unit)])
        self.most_M = np.tile(self.space.problem.weights_T / self.weight, len(levels_LT)).astype(F32)
        self.most_columns = int(MOST_ROOM / self.z["mu"].shape[1])
        self.power: dict[str, Floats] = {}  # where the search for norms is

    def fold(self, space: Contents) -> None:
        """Go on, with the next `hold`, where a latency is one row: the largest of its planes, cut at the floors."""
        self.z["mu"] = self.z["mu"].reshape(len(self.z["mu"]), self.space.planes, -1).sum(axis=1)
        self.space = space
        self._set_levels(self.levels_LT)

    def net(self) -> FloatArray:
        """[n] what each column costs less the prices of its experts, about, in microseconds."""
        mu, pi, net_N = self.image["mu"], self.image["pi"] * self.ratio, np.zeros(len(self.ids))
        for s in range(self.sets.shape[1]):
            mine = np.flatnonzero(self.sizes > s)
            experts = self.sets[mine, s]
            net_N[mine] += np.einsum("nm,nm->n", self.parts[mine], mu[experts]) - pi[experts]
        return net_N * self.unit

    def least(self) -> FloatArray:
        """[K] the least `net` of any column of a kind."""
        net_N = self.net()
        return np.array([net_N[self.kind == k].min(initial=np.inf) for k in range(len(self.space.count_K))])

    @property
    def used(self) -> IntArray:
        """Columns in use."""
        return self.ids[self.image["x"] > 0]

    def hold(self, ids: IntArray) -> None:
        """Go on with these columns, as many as there is room for, and no others."""
        ids = np.unique(ids[: self.most_columns])
        x = np.zeros(len(ids), F32)
        _, mine, theirs = np.intersect1d(ids, self.ids, assume_unique=True, return_indices=True)
        x[mine] = self.z["x"][theirs]
        self.z["x"], self.ids = x, ids
        self.parts = self.space.parts(ids, self.ends_LT, self.weight / self.unit)
        self.sets, self.kind = self.space.members(ids), self.space.kind(ids)
        self.sizes = self.space.size_K[self.kind]
        self._scale()

    def _scale(self) -> None:
        """Step sizes from the norms of both kinds of rows, which are scaled to be alike.

        A step of minus one from no column gives each what it costs, or none where that is negative, and twice their
        sum; a step of one gives the others.
        """
        falls = bool((self.parts < 0).any())  # planes below the floors
        none, out, norms = np.zeros(len(self.ids), F32), np.empty(len(self.ids), F32), []
        for rows in (("mu",), ("pi", "y")):
            v = {name: np.zeros_like(self.z[name]) for name in ("mu", "pi", "y")}
            for name in rows:
                before = self.power.get(name, np.ones_like(v[name]))
                v[name] = np.maximum(before, F32(0.1) * before.mean())
            for _ in range(POWER_STEPS_MORE if rows[0] in self.power else POWER_STEPS):
                size = max(np.sqrt(sum(float((v[name] ** 2).sum()) for name in rows)), 1e-30)
                new, less = ({name: np.empty_like(part) for name, part in v.items()} for _ in range(2))
                self._step(F32(-1), none, v["mu"], -v["pi"], -v["y"], out, *new.values())
                if falls and rows[0] == "mu":
                    self._step(F32(1), none, v["mu"], v["pi"], v["y"], out, *less.values())
                    new = {name: part - less[name] for name, part in new.items()}
                norm = np.sqrt(sum(float((new[name] ** 2).sum()) for name in rows)) / size / 2
                v.update({name: new[name] / F32(max(size * norm, 1e-30)) for name in rows})
            if norm > 0:
                self.power.update({name: v[name] for name in rows})
            norms.append(norm)
        self.norm = max(np.sqrt(norms[0]), 1e-12)
        ratio = F32(self.norm / max(np.sqrt(norms[1]), 1e-12))  # without columns neither has a norm
        for name in ("pi", "y"):
            self.z[name] *= self.ratio / ratio
        self.ratio = ratio
        self._restart(self.z)

    def _restart(self, start: dict[str, Floats]) -> None:
        self.z = {name: part.copy() for name, part in start.items()}
        self.anchor = {name: part.copy() for name, part in start.items()}
        self.image = {name: part.copy() for name, part in start.items()}
        self.since, self.first, self.last = 0, 0.0, np.inf

    @np.errstate(over="ignore", invalid="ignore")
    def iterate(self, count: int, stop: Any) -> None:
        """So many steps, unless stopped. Where they diverge nothing is proven: `multipliers` are any numbers then."""
        cost, held, used = (np.empty_like(self.z[name]) for name in ("mu", "pi", "y"))
        for _ in range(count):
            if stop[0]:
                return
            z, image, ratio = self.z, self.image, self.ratio
            down, up = F32(STEP / self.norm / PRIMAL_WEIGHT), F32(STEP / self.norm * PRIMAL_WEIGHT)
            self._step(down, z["x"], z["mu"], ratio * z["pi"], ratio * z["y"], image["x"], cost, held, used)
            cost *= up
            cost += z["mu"]
            wide = (-1, len(self.most_M))  # planes of a latency share what the multipliers of a step may sum to
            project(cost.reshape(wide), self.most_M, image["mu"].reshape(wide))
            image["pi"][...] = z["pi"] + up * ratio * (1 - held)
            image["y"][...] = z["y"] + up * ratio * (self.space.count_K.astype(F32) - used)
            self._advance(down, up)

    def _step(self, size: np.float32, x: Floats, mu: Floats, pi: Floats, y: Floats, *out: Floats) -> None:
        """Half a step, of the columns; see `step_columns`."""
        step_columns(self.parts, self.sets, self.sizes, self.kind, x, mu, pi, y, np.array([size]), *out)

    def _advance(self, down: np.float32, up: np.float32) -> None:
        self.iterations += 1
        self.since += 1
        apart = {name: float(((self.image[name] - self.z[name]) ** 2).sum()) for name in self.z}
        error = np.sqrt(apart["x"] / down + (apart["mu"] + apart["pi"] + apart["y"]) / up)
        if not np.isfinite(error):
            self.norm *= 2
            self._restart(self.anchor)
            return
        if self.since == 1:
            self.first = error
        fallen = error <= SUFFICIENT * self.first or (error <= NECESSARY * self.first and error > self.last)
        if fallen or self.since > max(20, LONG * self.iterations):
            self._restart(self.image)
            return
        part = F32(self.since / (self.since + 1))
        for name, z in self.z.items():
            z[...] = self.anchor[name] * (1 - part) + part * (2 * self.image[name] - z)
        self.last = error

    def multipliers(self) -> tuple[FloatArray, FloatArray]:
        """(mu [L, E, T], pi [E] in microseconds), as `Space.prove` takes them."""
        experts, levels = len(self.z["mu"]), len(self.levels_LT)
        mu = self.image["mu"].astype(np.float64).reshape(experts, levels, -1).transpose(1, 0, 2) * self.weight
        return mu, self.image["pi"].astype(np.float64) * float(self.ratio) * self.unit
