"""Parts of a call's time: what is kept for scoring the answer, and who gets what layers proven early have left."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from gemopt.evaluate import objective
from gemopt.placement import Split
from gemopt.result import StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.search.packing import filled
from gemopt.solving.layers import Layer, value_of
from gemopt.splits.rules import even_weights

SCORE_SHARE = 0.25  # of the limit, at most, is kept for scoring the answer
LEAST_S = 0.05  # for a layer once more


def scoring_s(layers: Sequence[Layer], time_limit: float, times: int) -> float:
    """Seconds to keep for scoring the answer of all layers so many times, from how long one takes with its copies."""
    first = layers[0].problem
    row = get("linear").solve(first, Options(deadline=np.inf), None).row
    assert row is not None
    row = row if first.rules else filled(first, row)
    weights_P = even_weights(row, first.num_experts) if first.split is Split.STATIC else None
    objective(first, row, weights_P)  # computes features once, which the search needs as well
    begin = time.monotonic()
    objective(first, row, weights_P)
    return min(SCORE_SHARE * time_limit, 1.5 * times * len(layers) * (time.monotonic() - begin))


def once_more(layers: Sequence[Layer], gap: float, left_s: float, workers: int, interrupted: bool) -> list[Layer]:
    """Of layers cut by the time those with most open, as many as can be given about as long again as they had."""
    if left_s < LEAST_S or interrupted:
        return []
    found = sorted((layer for layer in layers if _cut_short(layer, gap)), key=lambda layer: -layer.standing.open_us)
    needed = np.cumsum([layer.seconds for layer in found])
    return found[: max(workers, int(np.searchsorted(needed, left_s * workers, side="right")))]


def _cut_short(layer: Layer, gap: float) -> bool:
    outcome = layer.outcome
    if outcome is None or outcome.stopped_by is not StoppedBy.TIME_LIMIT or (value := value_of(outcome)) is None:
        return False
    return layer.standing.open_us > gap * value
