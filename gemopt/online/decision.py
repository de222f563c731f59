"""What the controller answers, and the moves behind a wanted placement."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemopt.latency import FloatArray
from gemopt.migration import Move, batches, count_moves, held, keep_in_place, moves
from gemopt.placement import EMPTY, Placement, Split

Weights = list[FloatArray | None]


@dataclass(frozen=True, eq=False)
class Decision:
    """What a step of the controller wants.

    Attributes
    ----------
    placement
        Wanted placement; the very object in force when nothing moves.
    moves
        By layer id, what travels; slots as in `gemopt.migration.Move`.
    num_moves
        Experts that some rank receives.
    gain_us
        Predicted gain per step, in microseconds summed over the layers.
    cost_us
        What the moves stall once, in microseconds: commits, and what transfers in the background slow down.
    reason
        Why, in one line.
    drift
        Distance of the last loads from what was predicted, 0 to 1: the largest of the blocks of 8 steps that they fill.
    imbalance
        Slowest over mean rank of the last steps, over all layers, with each rank as fast as it is known to be by now;
        NaN where nothing was seen.
    changed
        Whether the traffic changed suddenly.
    refused
        Whether the steps could not be used.
    trust
        Share of what moves promised that measured latencies bore out lately; promises count by as much. 1 without any.
    """

    placement: Placement
    moves: dict[int, list[Move]] = field(default_factory=dict)
    num_moves: int = 0
    gain_us: float = 0.0
    cost_us: float = 0.0
    reason: str = ""
    drift: float = 0.0
    imbalance: float = float("nan")
    changed: bool = False
    refused: bool = False
    trust: float = 1.0


def static_weights(placement: Placement) -> Weights:
    """Of every layer, the [P] static weights of its copies; None under another split."""
    if placement.split is not Split.STATIC or placement.split_weights is None:
        return [None] * placement.num_layers
    return list(placement.split_weights)


@dataclass(frozen=True, eq=False)
class Travel:
    """The way to a wanted placement, its slots in the order that moves fewest experts.

    layers: indices of those that change; moves: by layer id; num_moves: experts received in all; rounds: of each batch
    of layers that travel together, experts that the busiest rank receives, which is how long it takes.
    """

    placement: Placement
    layers: tuple[int, ...]
    moves: dict[int, list[Move]]
    num_moves: int
    rounds: list[int]


def travel_between(
    before: Placement,
    wanted_LP: NDArray[np.int64],
    nodes_G: NDArray[np.int64] | None,
    batch_experts: float,
    weights_LP: FloatArray | None = None,
) -> Travel:
    """From the placement in force to the wanted rows; a rank receives at most `batch_experts` at once, or one layer.

    weights_LP: [L, P] static weights of the wanted rows.
    """
    slots_G, rows = before.slots_per_rank, np.array(wanted_LP)
    weights = None if weights_LP is None else np.array(weights_LP)
    changed = np.flatnonzero((before.physical_to_logical != rows).any(axis=1))
    moved: dict[int, list[Move]] = {}
    into_NG: list[NDArray[np.int64]] = []
    for layer in changed:
        old, row = before.physical_to_logical[layer], rows[layer]
        old_GE = held(old, slots_G, before.num_experts)
        differs = np.flatnonzero((old != row) & (row != EMPTY))
        if old_GE[before.rank_of_slot[differs], row[differs]].any():  # an expert that stays is in another slot
            order = keep_in_place(old, row, slots_G)
            rows[layer] = row[order]
            if weights is not None:
                weights[layer] = weights[layer][order]
        moved[before.layer_ids[layer]] = moves(old, rows[layer], slots_G, nodes=nodes_G)
        new_GE = held(row, slots_G, before.num_experts) & ~old_GE
        into_NG.append(new_GE.sum(axis=1))
    grouped = batches(moved, into_NG, batch_experts)
    rounds = [int(np.sum([into_NG[n] for n in group], axis=0).max()) for group in grouped]
    total = int(sum(into_G.sum() for into_G in into_NG))
    placement = before.changed(physical_to_logical=rows, split_weights=weights) if moved else before
    return Travel(placement, tuple(map(int, changed)), moved, total, rounds)


def joined(*parts: str) -> str:
    """What there is to say, in one line."""
    return "; ".join(part for part in parts if part)


def unmade(wanted: Placement, found: Placement) -> int:
    """Experts that a rank was to receive and does not hold in the placement that was found in force."""
    rows = zip(found.physical_to_logical, wanted.physical_to_logical, strict=True)
    return sum(count_moves(*pair, found.slots_per_rank, wanted.slots_per_rank) for pair in rows)
