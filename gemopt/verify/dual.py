"""What the multipliers of a certificate prove, in whole numbers: no rounding, so no doubt.

The formula is that of docs/bounds.md. With all in units of 2^-24: multipliers mu, factors s, planes (a, b) and
prices, costs of pairs and of experts alone are whole numbers of 2^-48 or 2^-72 picoseconds.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np

from gemopt.certificate import UNIT, IntArray, LayerProof
from gemopt.exceptions import InputError
from gemopt.latency import Curve
from gemopt.verify.case import PS, Case
from gemopt.verify.contents import Above, least_content, pairs_of


def check_dual(case: Case, layer: LayerProof, duals: dict[str, IntArray]) -> float:
    """Microseconds that no placement of the layer falls below, by its multipliers; rounded down.

    Raises
    ------
    InputError
        Multipliers that are missing, of other shapes, negative or of too large sums; planes above a latency.
    """
    name = f"Certificate.layers[{layer.layer_id}]"
    mu_TKE, v_CE, price_G = (array(duals, f"{part}.{layer.layer_id}") for part in ("mu", "v", "y"))
    features, steps, experts = case.loads_FTE.shape
    ranks = np.flatnonzero(case.slots_G)
    groups, kinds = len(layer.planes), len(layer.planes[0]) if layer.planes else 0
    if case.spare:
        raise InputError(f"{name}.proof", "dual", "multipliers prove nothing where slots are spare")
    shapes = (mu_TKE.shape, v_CE.shape, price_G.shape)
    if shapes != ((steps, kinds, experts), (groups, experts), (len(ranks),)):
        raise InputError(f"{name}: multipliers", str(shapes), "one for every row, sum and rank")
    if not len(layer.group) == len(layer.factor) == len(ranks) or any(not 0 <= c < groups for c in layer.group):
        raise InputError(f"{name}.group", layer.group, f"a group and a factor for each of {len(ranks)} ranks")
    if any(len(plane) != 1 + features for planes in layer.planes for plane in planes) or min(layer.factor) < 0:
        raise InputError(f"{name}.planes", len(layer.planes), f"an intercept and {features} slopes each; factors >= 0")
    total_T = mu_TKE.sum(axis=(1, 2))
    if (mu_TKE < 0).any() or (mu_TKE > UNIT).any() or (total_T > UNIT).any():
        raise InputError(
            f"{name}: mu", int(total_T.max()), f"multipliers >= 0 that sum to at most {UNIT} for each step"
        )
    slots_C = _slots(case, layer, ranks, name)
    for index, g in enumerate(ranks):
        for plane in layer.planes[layer.group[index]]:
            if slack(case, int(g), plane, layer.factor[index]) < 0:
                raise InputError(f"{name}.planes", plane, f"nowhere above the latency of rank {g}")
    fixed = sum(int(left) * int(low) for left, low in zip(UNIT - total_T, case.floors_T, strict=True)) * UNIT**2
    pi = duals.get(f"pi.{layer.layer_id}")
    if pi is not None:
        if pi.shape != (experts,):
            raise InputError(f"{name}: pi", str(pi.shape), f"a price of each of {experts} experts")
        return _bound_of_contents(case, layer, mu_TKE, [int(price) for price in pi], slots_C, fixed)
    return _bound(case, layer, mu_TKE, v_CE, price_G, slots_C, fixed)


def array(duals: dict[str, IntArray], name: str) -> IntArray:
    """Multipliers by name; `InputError` where there are none."""
    if name not in duals:
        raise InputError(f"multipliers {name}", "nothing", "the file beside the certificate must have them")
    return duals[name]


def _slots(case: Case, layer: LayerProof, ranks: IntArray, name: str) -> list[int]:
    """[C] slots of each group, whose ranks have equally many."""
    found: list[set[int]] = [set() for _ in layer.planes]
    for c, g in zip(layer.group, ranks, strict=True):
        found[c].add(int(case.slots_G[g]))
    if any(len(each) != 1 for each in found):
        raise InputError(
            f"{name}.group", layer.group, "ranks of a group have equally many slots, and no group is empty"
        )
    return [each.pop() for each in found]


def _pairs(case: Case, layer: LayerProof, mu_TKE: IntArray) -> tuple[list[list[int]], list[list[list[int]]]]:
    """([C][E] what experts cost alone, [C][E][j < i] what two together cost), in 2^-48 picoseconds."""
    groups, experts = len(layer.planes), mu_TKE.shape[2]
    together = [[[0] * experts for _ in range(experts)] for _ in range(groups)]
    alone = [[0] * experts for _ in range(groups)]
    for k in range(mu_TKE.shape[1]):
        mass_E = mu_TKE[:, k].sum(axis=0).tolist()
        products = [(mu_TKE[:, k].T @ loads_TE).tolist() for loads_TE in case.loads_FTE]
        for c in range(groups):
            intercept, *slopes = layer.planes[c][k]
            for i in range(experts):
                alone[c][i] += intercept * mass_E[i]
                for slope, product in zip(slopes, products, strict=True):
                    alone[c][i] += slope * product[i][i]
                    mine = together[c][i]
                    for j in range(i):
                        mine[j] += slope * (product[i][j] + product[j][i])
    return alone, together


def _bound_of_contents(
    case: Case, layer: LayerProof, mu_TKE: IntArray, pi: list[int], slots_C: list[int], fixed: int
) -> float:
    """With prices of experts in 2^-24 picoseconds, and every content of a rank at what it costs."""
    alone, together = _pairs(case, layer, mu_TKE)
    least: dict[object, int] = {}
    total = fixed + sum(pi) * UNIT**2
    for g, c, factor in zip(np.flatnonzero(case.slots_G).tolist(), layer.group, layer.factor, strict=True):
        key = c, factor, case.like_G[g]
        if key not in least:
            mine = [factor * cost - price * UNIT**2 for cost, price in zip(alone[c], pi, strict=True)]
            costs = [[factor * cost for cost in row] for row in together[c]]
            pairs = pairs_of(mine, costs, slots_C[c], f"Certificate.layers[{layer.layer_id}]")
            least[key] = least_content(pairs, Above(case, g, layer.planes[c], factor, mu_TKE))
        total += least[key]
    return below(Fraction(total, UNIT**3 * PS))


def _bound(
    case: Case, layer: LayerProof, mu_TKE: IntArray, v_CE: IntArray, price_G: IntArray, slots_C: list[int], fixed: int
) -> float:
    """fixed: 2^-72 picoseconds of the steps' floors."""
    groups, experts = v_CE.shape
    alone, together = _pairs(case, layer, mu_TKE)
    twice = [
        [2 * (alone[c][i] + (slots_C[c] - 1) * int(v_CE[c, i]) * UNIT) for i in range(experts)] for c in range(groups)
    ]
    for c in range(groups):
        for i in range(experts):
            for j in range(i):
                pair = together[c][i][j] - (int(v_CE[c, i]) + int(v_CE[c, j])) * UNIT
                if pair < 0:  # each of the two pays half
                    twice[c][i] += pair
                    twice[c][j] += pair
    prices = [int(price) * UNIT**2 for price in price_G]
    total = 2 * fixed + 2 * sum(price * slots_C[c] for price, c in zip(prices, layer.group, strict=True))
    for i in range(experts):
        costs = zip(layer.factor, layer.group, prices, strict=True)
        total += min(factor * twice[c][i] - 2 * price for factor, c, price in costs)
    return below(Fraction(total, 2 * UNIT**3 * PS))


def below(number: Fraction) -> float:
    """A float that is not above."""
    near = float(number)
    return near if Fraction(near) <= number else float(np.nextafter(near, -np.inf))


def slack(case: Case, g: int, plane: list[int], factor: int) -> Fraction:
    """Picoseconds by which `factor` times a plane stays below the latency of rank g under every load it may have.

    Below one of its terms is enough, and that is a sum of curves, each of its own load: the least of each difference.
    """
    scale = Fraction(factor, UNIT * UNIT)
    best: Fraction | None = None
    for term in case.cost.latencies[g].terms:
        least = -scale * plane[0]
        for f, curve in enumerate(term):
            low, high = load_range(case, g, f)
            least += min(PS * at(curve, x) - scale * plane[1 + f] * x for x in corners(curve, low, high))
        best = least if best is None else max(best, least)
    assert best is not None
    return best


def load_range(case: Case, g: int, f: int) -> tuple[int, int]:
    """Least and most of a feature that a full rank g carries at any step, without copies."""
    sorted_TE, size = np.sort(case.loads_FTE[f], axis=1), int(case.slots_G[g])
    low = int(sorted_TE[:, :size].sum(axis=1).min())
    return low, int(sorted_TE[:, sorted_TE.shape[1] - size :].sum(axis=1).max())


def corners(curve: Curve, low: int, high: int) -> list[Fraction]:
    """Where a curve bends between two loads, and these."""
    inside = [Fraction(float(x)) for x in curve.x if low < x < high]
    return [Fraction(low), *inside, Fraction(high)]


def at(curve: Curve, load: Fraction) -> Fraction:
    """The curve at a load, exactly."""
    k = min(int(np.searchsorted(curve.x, float(load), side="right")) - 1, len(curve.x) - 1)
    x0, y0 = Fraction(float(curve.x[k])), Fraction(float(curve.y[k]))
    if k == len(curve.x) - 1:
        return y0 + Fraction(float(curve.slope)) * (load - x0)
    x1, y1 = Fraction(float(curve.x[k + 1])), Fraction(float(curve.y[k + 1]))
    return y0 + (y1 - y0) * (load - x0) / (x1 - x0)


def units(number: float) -> int:
    """A number in units, rounded down."""
    return floor(Fraction(number) * UNIT)
