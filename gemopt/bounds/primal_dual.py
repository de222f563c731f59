"""Matrix-free primal-dual hybrid gradient on the co-location programme: multipliers, better the longer it runs.

Reflected Halpern iterations with restarts (Lu and Yang, Restarted Halpern PDHG for linear programming, 2024), in
float32: nothing here has to be right, as `dual_bound` makes a bound of any multipliers. The primal weight is not
adapted but cools: large at first, so that the multipliers move far, and small at last, so that they settle. The bound
rises with the last third of the way.
Steps are scaled block by block (Pock and Chambolle, 2011) and by the norm of what is left. Without spare slots loads
are taken from their mean of the step, which changes no solution, as the sums of U are known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemopt.bounds.colocation import Programme
from gemopt.bounds.primal_dual_kernels import F32, Array, halpern, step_ranks, step_rows, step_together
from gemopt.latency import FloatArray

NORM_ROUNDS = 10
HOT, WARM, COLD = 40.0, 4.0, 1e-3  # primal weight: at first, when it goes on from a point that has cooled, at last
SUFFICIENT, NECESSARY, LONG = 0.2, 0.8, 0.36  # when to restart: decay of the fixed-point error, share of all iterations


def _length(*parts: Array) -> float:
    """Euclidean length, in float64: squares of large entries overflow float32."""
    return float(np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in parts)))


class PrimalDual:
    """The iteration on one programme; `iterate` until told to stop, `multipliers` whenever asked.

    Parts of a point: x [E, G] shares of experts on ranks, u [C, E, E]; multipliers mu [T, K E] of the rows, v [C, E] of
    the sums of u, y [G] of the slots, rho [C, E, E] of `u <= q`. Units: the mean floor is 1.
    """

    def __init__(self, programme: Programme, stop: NDArray[np.uint8] | None = None) -> None:
        self.programme = p = programme
        _, steps, experts = p.features_FTE.shape
        groups, kinds = p.num_groups, p.planes_CKF.shape[1]
        unit = max(float(p.weights_T @ p.floor_T) / max(float(p.weights_T.sum()), 1e-300), 1e-12)
        self.weight = (p.weights_T / p.weights_T.mean()).astype(F32)
        self.floor = (p.floor_T / unit).astype(F32)
        mean_FT = p.features_FTE.mean(axis=2) * (p.spare == 0)
        scale_F = np.maximum(p.features_FTE.sum(axis=2).mean(axis=1), 1e-300)
        loads_FTE = (p.features_FTE - mean_FT[:, :, None]) / scale_F[:, None, None]
        self.data = np.concatenate(
            [*loads_FTE, (mean_FT / scale_F[:, None]).T, np.ones((steps, 1))], axis=1, dtype=F32
        )  # [T, F E + F + 1]
        planes = p.planes_CKF / unit
        self.base_CK = planes[:, :, 0].astype(F32)
        self.slope_CKF = (planes[:, :, 1:] * scale_F).astype(F32)
        self.alike = p.alike
        self.most = F32(p.factor_G[0]) if self.alike else F32(np.inf)
        self.factor_GC = np.zeros((len(p.factor_G), groups), F32)
        self.factor_GC[np.arange(len(p.factor_G)), p.group_G] = p.factor_G
        pairs = (0 if self.alike else groups, experts, experts)
        self.shapes = {
            "x": (experts, len(p.factor_G)), "u": (groups, experts, experts),
            "mu": (steps, kinds * experts), "v": (groups, experts), "y": (len(p.factor_G),), "rho": pairs,
        }  # fmt: skip
        self.others_C = (p.slots_C - p.spare - 1).astype(F32)
        self.iterations = 0
        self.balance = self.wanted = HOT
        self.z, self.anchor, self.image = self._point(), self._point(), self._point()
        self.stop = np.zeros(1, np.uint8) if stop is None else stop
        self._start()
        self._steps()

    def _point(self) -> dict[str, Array]:
        return {name: np.zeros(shape, F32) for name, shape in self.shapes.items()}

    def _start(self) -> None:
        """Every expert as much on every slot as on any other."""
        p = self.programme
        share_G = p.slots_G / p.slots_G.sum()
        self.z["x"][:] = share_G
        q_CE = np.repeat((share_G @ self.factor_GC)[:, None], p.num_experts, axis=1)
        for c in range(p.num_groups):
            self.z["u"][c] = q_CE[c, 0] * max(self.others_C[c], 0) / max(p.num_experts - 1, 1)
            np.fill_diagonal(self.z["u"][c], 0)
        self._anchor()

    def _anchor(self) -> None:
        for name, part in self.z.items():
            self.anchor[name][...] = part

    def _forward(self, q_CE: Array, mix_NEE: Array) -> Array:
        """[T, K E] the rows' right hand sides from q and from U times the slopes (diagonal: q times the slopes)."""
        p = self.programme
        features, experts = len(p.features_FTE), p.num_experts
        kinds = p.planes_CKF.shape[1]
        stack = np.zeros((self.data.shape[1], kinds * experts), F32)
        for k in range(kinds):
            mine = slice(k * experts, (k + 1) * experts)
            for f in range(features):
                mix = mix_NEE[k * features + f]
                slope_C = self.slope_CKF[:, k, f]
                np.fill_diagonal(mix, slope_C @ q_CE)
                stack[f * experts : (f + 1) * experts, mine] = mix
                stack[features * experts + f, mine] = (slope_C * p.slots_C.astype(F32)) @ q_CE
            stack[-1, mine] = self.base_CK[:, k] @ q_CE
        return self.data @ stack

    def _backward(self, mu: Array) -> tuple[Array, Array]:
        """([K F, E, E] symmetric gradient of U per unit slope, [C, E] gradient of q) of the rows."""
        p = self.programme
        features, experts = len(p.features_FTE), p.num_experts
        kinds = p.planes_CKF.shape[1]
        pulled = self.data.T @ mu
        pull = np.empty((kinds * features, experts, experts), F32)
        cost_CE = np.zeros((p.num_groups, experts), F32)
        for k in range(kinds):
            mine = slice(k * experts, (k + 1) * experts)
            for f in range(features):
                block = pulled[f * experts : (f + 1) * experts, mine]
                np.add(block, block.T, out=pull[k * features + f])
                alone = np.diagonal(block)
                slope_C = self.slope_CKF[:, k, f]
                cost_CE += slope_C[:, None] * alone
                cost_CE += (slope_C * p.slots_C.astype(F32))[:, None] * pulled[features * experts + f, mine]
            cost_CE += self.base_CK[:, k, None] * pulled[-1, mine]
        return pull, cost_CE

    def _steps(self) -> None:
        """Step sizes of the parts: sums of the absolute coefficients, then the norm of the scaled operator."""
        p = self.programme
        features, experts = len(p.features_FTE), p.num_experts
        loads = np.abs(self.data[:, : features * experts]).reshape(len(self.data), features, experts)
        slope_F = np.abs(self.slope_CKF).mean(axis=(0, 1))
        kinds = p.planes_CKF.shape[1]
        row = float((loads.sum(axis=2).mean(axis=0) * slope_F).sum()) + 1.0
        column = 2 * kinds * float((loads.mean(axis=2).sum(axis=0) * slope_F).sum()) + 4.0
        slots = float(p.slots_C.mean())
        near = 0.0 if self.alike else experts
        self.step = {
            "u": 1 / column, "x": 1 / (kinds * len(self.data) + slots + near + 1.0),
            "mu": 1 / row, "v": 1 / (experts + slots), "y": 1 / experts, "rho": 0.5,
        }  # fmt: skip
        rng = np.random.default_rng(0)
        u = rng.random(self.shapes["u"], dtype=F32) + F32(0.2)
        u = u + u.transpose(0, 2, 1)
        x = rng.random(self.shapes["x"], dtype=F32) * (not self.alike)
        norm = 1.0
        for _ in range(NORM_ROUNDS):
            if self.stop[0]:
                return
            size = F32(max(_length(u, x), 1e-20))
            u, x = u / size, x / size
            u, x = self._squared(u, x)
            norm = np.sqrt(_length(u, x))
        self.step = {name: 0.9 / max(norm, 1e-6) * value for name, value in self.step.items()}

    def _squared(self, u: Array, x: Array) -> tuple[Array, Array]:
        """The scaled operator and then its transpose, for the norm."""
        p, step = self.programme, self.step
        for c in range(p.num_groups):
            np.fill_diagonal(u[c], 0)
        root_u, root_x = F32(np.sqrt(step["u"])), F32(np.sqrt(step["x"]))
        u, x = u * root_u, x * root_x
        q_CE = (x @ self.factor_GC).T
        flat_NC = self.slope_CKF.reshape(p.num_groups, -1).T
        mu = F32(step["mu"]) * self._forward(q_CE, np.tensordot(flat_NC, u, axes=1))
        v = F32(step["v"]) * (self.others_C[:, None] * q_CE - u.sum(axis=2))
        pull, cost_CE = self._backward(mu)
        new_u = np.tensordot(flat_NC.T, pull, axes=1) - v[:, :, None] - v[:, None, :]
        cost_CE = cost_CE + self.others_C[:, None] * v
        if not self.alike:
            rho = F32(step["rho"]) * (u - q_CE[:, :, None])
            new_u += rho + rho.transpose(0, 2, 1)
            cost_CE -= rho.sum(axis=2)
        new_x = cost_CE.T @ self.factor_GC.T + F32(step["y"]) * x.sum(axis=0)
        return root_u * new_u, root_x * new_x * (not self.alike)

    def heat(self) -> None:
        """Begin to cool: from `HOT`, or from `WARM` where the point has cooled before."""
        self.hottest = WARM if self.iterations else HOT
        self.cool(0.0)
        if self.iterations:
            self._restart()

    def cool(self, part: float) -> None:
        """From the next restart on, the primal weight that belongs to so much of the way from hot to cold."""
        self.wanted = self.hottest * (COLD / self.hottest) ** min(part, 1.0)

    def iterate(self, rounds: int) -> None:
        """So many iterations, fewer when `stop` [1] is set."""
        p, z, image = self.programme, self.z, self.image
        flat_CN = np.ascontiguousarray(self.slope_CKF.reshape(p.num_groups, -1))
        mix = np.empty((flat_CN.shape[1], p.num_experts, p.num_experts), F32)
        sums = np.empty((p.num_groups, p.num_experts), F32)
        for _ in range(rounds):
            if self.stop[0]:
                break
            down = {name: F32(self.step[name] / self.balance) for name in ("u", "x")}
            up = {name: F32(self.step[name] * self.balance) for name in ("mu", "v", "y", "rho")}
            pull, cost_CE = self._backward(z["mu"])
            if self.alike:
                image["x"][...] = z["x"]
            else:
                cost_CE += self.others_C[:, None] * z["v"] - z["rho"].sum(axis=2)
                step_ranks(z["x"], cost_CE.T @ self.factor_GC.T - z["y"], down["x"], image["x"])
            bar_x = 2 * image["x"] - z["x"]
            bar_q = np.ascontiguousarray((bar_x @ self.factor_GC).T)
            step_together(
                z["u"], z["rho"], z["v"], bar_q, pull, flat_CN, self.most, down["u"], up["rho"],
                image["u"], image["rho"], mix, sums,
            )  # fmt: skip
            step_rows(z["mu"], self._forward(bar_q, mix), self.floor, self.weight, up["mu"], image["mu"])
            image["v"][...] = z["v"] + up["v"] * (self.others_C[:, None] * bar_q - sums)
            image["y"][...] = z["y"] + up["y"] * (p.slots_G.astype(F32) - bar_x.sum(axis=0))
            if p.spare:
                np.maximum(image["v"], 0, out=image["v"])
                np.minimum(image["y"], 0, out=image["y"])
            self._advance()

    def _advance(self) -> None:
        """The Halpern step, and a restart when the fixed-point error has fallen enough or for too long."""
        self.iterations += 1
        self.since += 1
        part = F32(self.since / (self.since + 1))
        moved = {
            name: halpern(self.z[name].ravel(), self.image[name].ravel(), self.anchor[name].ravel(), part)
            / self.step[name]
            for name in self.z
        }
        primal, dual = moved["x"] + moved["u"], moved["mu"] + moved["v"] + moved["y"] + moved["rho"]
        error = np.sqrt(primal * self.balance + dual / self.balance)
        if self.since == 1:
            self.first = error
        fallen = error <= SUFFICIENT * self.first
        rising = error <= NECESSARY * self.first and error > self.last
        if fallen or rising or self.since > max(20, LONG * self.iterations):
            self._restart()
        self.last = error

    since, first, last = 0, 0.0, np.inf

    def _restart(self) -> None:
        """Go on from the image, with the primal weight that is wanted."""
        self.balance = self.wanted
        for name, part in self.image.items():
            self.z[name][...] = part
        self._anchor()
        self.since = 0

    def multipliers(self) -> tuple[FloatArray, FloatArray]:
        """(mu [T, K, E] of the rows, v [C, E] of the sums of U), as `dual_bound` takes them."""
        p = self.programme
        kinds = p.planes_CKF.shape[1]
        unit = float(p.weights_T @ p.floor_T) / float(p.weights_T.sum())
        mu = self.image["mu"].astype(np.float64) * p.weights_T.mean()
        v = self.image["v"].astype(np.float64) * p.weights_T.mean() * unit
        mean_FT = p.features_FTE.mean(axis=2) * (p.spare == 0)
        # loads were taken from their means: that is in v
        shift_CE = np.zeros_like(v)
        mu_TKE = mu.reshape(len(mu), kinds, p.num_experts)
        for k in range(kinds):
            for f in range(len(p.features_FTE)):
                shift_CE += p.planes_CKF[:, k, 1 + f, None] * (mean_FT[f] @ mu_TKE[:, k])[None]
        return mu_TKE, v + shift_CE
