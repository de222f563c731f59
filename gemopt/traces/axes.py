"""In which order the axes of counts are, as far as the numbers tell."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_LAYERS = 256  # of any network known
FEWEST_LAYERS = 4  # whose equal sums are no accident
SAMPLED = 128  # rows and columns
UNLIKELY = 6  # as e^-6
ENOUGH_SHARES, MUCH_MORE, MOST = 30, 4, 0.75  # whose variance is no accident; than by chance; of all
IN_ORDER = "bring them into that order, experts of all ranks side by side"


def other_order(counts: NDArray[Any]) -> str | None:
    """In which order the axes of counts [T, L, E] seem to be; None where that is the right one, or they do not tell.

    Every layer of a step has as many assignments, and steps differ: where that holds for another order alone, that is
    the order. Where most steps are alike, which axis is of layers must say. Where most layers have as many assignments
    but not on each of the rows below them, one axis is of ranks. One step again and again, as of loads that were made,
    is a single one: no layers are the same.
    """
    axes = "steps", "layers", "experts"
    right, turned = (0, 1, 2), (1, 0, 2)
    if (counts[0] == counts[-1]).all() and (counts == counts[0]).all():
        counts = counts[:1]
    sums_TL = counts.sum(axis=2, dtype=np.int64)
    sums_TL = sums_TL[:, sums_TL.any(axis=0)]
    if not sums_TL.size:
        return None
    if _fits(counts, *right):
        if not _alike(sums_TL.T) or axis_of_layers(counts) != 0:
            return None
        order: tuple[int, ...] | None = turned
    else:
        others = [each for each in permutations(range(3)) if each != right and counts.shape[each[2]] > 1]
        order = next((each for each in others if _fits(counts, *each)), None)
        if order == turned and _alike(sums_TL) and axis_of_layers(counts) == 1:
            return None
    if order is not None:
        return f"axes that look like [{', '.join(axes[order.index(i)] for i in range(3))}]"
    if (sums_TL == sums_TL[:, :1]).all():
        return None
    least = 1 if _alike(sums_TL) or _alike(sums_TL.T) else MOST  # all but draft layers
    for name, sums in {"layers, ranks": sums_TL.sum(axis=1), "ranks, layers": sums_TL.sum(axis=0)}.items():
        busy, most = sums[sums > 0], _usual(sums)
        if len(busy) >= FEWEST_LAYERS and most >= least and _no_accident(round(most * len(busy)) - 1, busy):
            return f"axes that look like [{name}, experts of a rank]"
    return None


def _alike(sums_TL: NDArray[Any]) -> bool:
    """Whether most layers of the first step have one sum, all but draft layers; of [L, T]: most steps of a layer."""
    return _usual(sums_TL[0]) > 0.5


def _usual(sums: NDArray[Any]) -> float:
    """Share of those above 0 that are as the most common of them."""
    busy = sums[sums > 0]
    return int(np.unique(busy, return_counts=True)[1].max(initial=0)) / max(1, len(busy))


def axis_of_layers(counts: NDArray[Any]) -> int | None:
    """Which of the first two axes of counts [T, L, E] is of layers; None where the numbers do not tell.

    Every layer has a router of its own: the mean shares of its experts differ from those of other layers by more than
    chance, while those of a step over all layers do not, as an expert that is hot in one layer says nothing of others.
    """
    some = counts[:SAMPLED, :SAMPLED].astype(np.float32)
    sums = some.sum(axis=2)
    busy = sums > 0
    kept = np.ix_(2 * busy.sum(axis=1) > busy.shape[1], 2 * busy.sum(axis=0) > busy.shape[0])
    some, sums, busy = some[kept], sums[kept], busy[kept]
    if not busy.all() or (min(busy.shape, default=0) - 1) * (some.shape[2] - 1) < ENOUGH_SHARES:
        return None
    if (some == some[:1]).all() or (some == some[:, :1]).all():  # one layer repeated, or a balance without chance
        return None
    shares = some / sums[:, :, None]
    mean = shares.mean(axis=(0, 1))
    between = [  # mean squares between the rows of an axis, where chance alone makes both the same
        busy.shape[1 - axis] * float(((shares.mean(axis=1 - axis) - mean) ** 2).sum()) / (busy.shape[axis] - 1)
        for axis in (0, 1)
    ]
    return next((axis for axis in (0, 1) if between[axis] > MUCH_MORE * between[1 - axis]), None)


def _fits(counts: NDArray[Any], step: int, layer: int, expert: int) -> bool:
    """Whether every layer of a step has as many assignments, dense and idle ones left out, where that says anything."""
    sums = counts.sum(axis=expert, dtype=np.int64)
    by_step = sums if step < layer else sums.T
    by_step = by_step[np.ix_(by_step.any(axis=1), by_step.any(axis=0))]
    fewest = 2 if layer == 1 else FEWEST_LAYERS  # of a single step
    enough = min(by_step.shape) > 1 or (step == 0 and by_step.shape[1] >= fewest)
    if not enough or (by_step != by_step[:, :1]).any():
        return False
    return (step, layer, expert) == (0, 1, 2) or _no_accident(by_step.size - len(by_step), by_step)


def _no_accident(equal: int, sums: NDArray[Any]) -> bool:
    """Whether chance would hardly make so many sums equal to others: two Poisson numbers are in 1 of (4 pi n)^.5."""
    return bool(equal * np.log(4 * np.pi * sums.mean()) / 2 > UNLIKELY)
