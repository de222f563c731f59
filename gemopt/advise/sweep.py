"""From which skew, bandwidth, batch and drift on a strategy pays: small replays of traffic that is made so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gemopt.advise.document import StrategyMap, Sweep
from gemopt.advise.variants import skewness, with_batch, with_change, with_skew
from gemopt.costs import CostModel
from gemopt.latency import spread_evenly
from gemopt.profile import Profile
from gemopt.replay import Migration, replay
from gemopt.replay.duplication import PREFIX
from gemopt.replay.strategy import Solved
from gemopt.rules import Rules
from gemopt.traces import Traces

POWERS = (0.25, 0.5, 1.0, 1.5, 2.0)
GBPS = (2.0, 8.0, 32.0, 128.0, 450.0)
BATCHES = (0.25, 1.0, 4.0)
SHARES = (0.0, 0.25, 0.5, 1.0)
LAYERS, STEPS, WINDOW = 3, 256, 32
STILL = ("contiguous", "fitted-once", "copies")  # no link plays a role once they are in force
PAYS = 0.01
WORTH = 0.003  # less is not worth another strategy, or more memory
SCOUTS = ("copies", PREFIX + "all-past")  # tell how many slots for copies gain


@dataclass(frozen=True, eq=False)
class Bench:
    """What all cells share. `slots`: of each strategy."""

    profile: Profile
    cost: CostModel
    slots: dict[str, NDArray[np.int64]]
    migration: Migration
    non_moe_us: float
    seed: int
    rules: Rules | None = None
    solved: Solved = field(default_factory=dict)

    def changes(self, traces: Traces, names: Sequence[str], gbps: float | None = None) -> dict[str, float]:
        """Change of each strategy on the second half of the traces."""
        migration = self.migration.model_copy(update={} if gbps is None else {"bytes_per_s": gbps * 1e9})
        found: dict[str, float] = {}
        for slots in {tuple(self.slots[name].tolist()) for name in names}:
            same = [name for name in names if tuple(self.slots[name].tolist()) == slots]
            result = replay(
                self.profile,
                traces,
                same,
                window=max(1, min(WINDOW, traces.num_steps // 4)),
                slots_per_rank=slots,
                migration=migration,
                non_moe_us=self.non_moe_us,
                seed=self.seed,
                cost=self.cost,
                rules=self.rules and self.rules.on_layers(traces.layer_ids),
                solved=self.solved,
            )
            found |= {row.strategy: row.change or 0.0 for row in result.rows}
        return found


def sample(traces: Traces) -> Traces:
    """The last steps of some of the layers, evenly spread."""
    layers = spread_evenly(traces.num_layers, LAYERS)
    last = traces.steps(slice(-min(STEPS, traces.num_steps), None))
    ids = tuple(np.array(traces.layer_ids)[layers].tolist())
    return replace(last, counts=last.counts[:, layers], layer_ids=ids, num_hidden_layers=None, tokens=None,
                   rank_us=None, allow_idle=True)  # fmt: skip


def slots_that_gain(bench: Bench, past: Traces, spare: int) -> int:
    """Slots for copies on each rank: 1, 2, 4 and so on as long as twice as many gain `WORTH`; at most `spare`.

    bench: with the slots of those of `SCOUTS` that are tried, when there are no copies.
    """
    best: dict[str, float] = {}
    slots, shown = 1, sample(past)
    for more in [*(2**i for i in range(spare.bit_length()) if 2**i < spare), spare] if spare > 1 else []:
        with_copies = replace(bench, slots={name: bare_G + more for name, bare_G in bench.slots.items()})
        found = with_copies.changes(shown, list(bench.slots))
        if best and all(found[name] > best[name] - WORTH for name in found):
            break
        slots, best = more, {name: min(found[name], best.get(name, 0.0)) for name in found}
    return slots


def sweeps(
    bench: Bench, traces: Traces, names: Sequence[str], advance: Callable[[], None]
) -> tuple[list[Sweep], StrategyMap]:
    """Skew, bandwidth, batch and drift, one at a time, and skew by bandwidth."""
    shown = sample(traces)
    moving = [name for name in names if name not in STILL]
    skews, grid = [], []
    for power in POWERS:
        skewed = shown if power == 1 else with_skew(shown, power)
        skews.append(skewness(skewed.counts))
        still = bench.changes(skewed, [name for name in names if name in STILL])
        grid.append([still | (bench.changes(skewed, moving, gbps) if moving else {}) for gbps in GBPS])
        advance()
    column = int(np.argmin(np.abs(np.log(np.array(GBPS) * 1e9 / bench.migration.bytes_per_s))))
    batches = [bench.changes(shown if f == 1 else with_batch(shown, f), names) for f in BATCHES]
    start = 3 * shown.num_steps // 4
    drifts = [bench.changes(with_change(shown, share, start, bench.seed), names) for share in SHARES]
    advance()
    mean = float(shown.counts.sum(axis=2).mean())
    found = [
        _sweep("skew", skews, [cells[column] for cells in grid]),
        _sweep("bandwidth", list(GBPS), grid[POWERS.index(1.0)]),
        _sweep("batch", [f * mean for f in BATCHES], batches),
        _sweep("drift", list(SHARES), drifts),
    ]
    bests = [[min(cell, key=lambda name: cell[name]) for cell in cells] for cells in grid]
    changes = [[min(cell.values()) for cell in cells] for cells in grid]
    return found, StrategyMap(skews=skews, gbps=list(GBPS), best=bests, changes=changes)


def _sweep(what: str, values: list[float], cells: list[dict[str, float]]) -> Sweep:
    best = [min(cell, key=lambda name: cell[name]) for cell in cells]
    pays = [cell[name] <= -PAYS for cell, name in zip(cells, best, strict=True)]
    first = next((i for i in range(len(values)) if all(pays[i:])), None)
    return Sweep(
        what=what,
        values=values,
        changes={name: [cell[name] for cell in cells] for name in cells[0]},
        best=best,
        pays_from=None if first is None else values[first],
        changes_at=[values[i] for i in range(1, len(values)) if best[i] != best[i - 1]],
    )
