"""The master programme of contents with copies: an expert is in columns that hold parts of it, which sum up to one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gemopt.solvers.exact.column_master import Floats, Master
from gemopt.solvers.exact.share_space import Shares
from gemopt.solvers.exact.tree import FAST

Array = NDArray[Any]


class ShareMaster(Master):
    """Columns known so far and where the iteration is; see `Master`."""

    space: Shares

    def _step(self, size: np.float32, x: Floats, mu: Floats, pi: Floats, y: Floats, *out: Floats) -> None:
        step_shares(
            self.parts, self.sets, self.space.owner_X, self.space.contents.part.astype(np.float32), self.kind, x, mu,
            pi, y, size, *out,
        )  # fmt: skip


@njit(cache=True, nogil=True, fastmath=FAST)
def step_shares(
    parts_NM: Array, sets_NS: Array, owner_X: Array, part_X: Array, kind_N: Array, x_N: Array, mu_EM: Array,
    pi_E: Array, y_K: Array, size: np.float32, out_N: Array, cost_EM: Array, held_E: Array, used_K: Array,
) -> None:  # fmt: skip
    """As `step_columns`, where a column has a part of each of its experts."""
    cost_EM[:] = 0
    held_E[:] = 0
    used_K[:] = 0
    for n in range(len(x_N)):
        total = -y_K[kind_N[n]]
        for s in range(sets_NS.shape[1]):
            part, e, above = part_X[sets_NS[n, s]], owner_X[sets_NS[n, s]], np.float32(0)
            if part > 0:
                for j in range(parts_NM.shape[1]):
                    above += parts_NM[n, j] * mu_EM[e, j]
                total += part * (above - pi_E[e])
        out_N[n] = max(np.float32(0), x_N[n] - size * total)
        over = 2 * out_N[n] - x_N[n]
        if over != 0:
            used_K[kind_N[n]] += over
            for s in range(sets_NS.shape[1]):
                held, e = over * part_X[sets_NS[n, s]], owner_X[sets_NS[n, s]]
                if held != 0:
                    held_E[e] += held
                    for j in range(parts_NM.shape[1]):
                        cost_EM[e, j] += held * parts_NM[n, j]
