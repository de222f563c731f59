"""What a replay found: one row per strategy, and what happened step by step; `replay.json`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from gemopt.documents import Document, Part
from gemopt.latency import FloatArray, IntArray
from gemopt.replay.copying import Migration
from gemopt.replay.schedule import Schedule
from gemopt.tables import frame


class ReplayRow(Part):
    """One strategy over the scored steps.

    Attributes
    ----------
    makespan_us
        Sum over steps and MoE layers of the slowest rank, plus what copying added. Without the non-MoE time.
    change
        Fraction against contiguous placement.
    moves
        Experts that some rank received, all layers.
    migration_us
        The part of `makespan_us` that copying added: stalls and slower steps, not the wait for a better placement.
    p50_us, p90_us, p99_us
        Quantiles of the step latency: MoE layers, copying and the non-MoE time.
    ttft_ms, tpot_ms
        Mean latency of the steps with prompts, and of those with next tokens; None where there are none.
    """

    strategy: str
    makespan_us: float
    change: float | None
    moves: int
    migration_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    ttft_ms: float | None
    tpot_ms: float | None


class Decided(Part):
    """A decision that changed the wanted placement, at a step of the traces."""

    step: int
    moves: int
    reason: str = ""


class Track(Part):
    """One strategy step by step.

    `step_us`: MoE latency with what copying added; `copying_us`: that part; `moves`: experts on their way from this
    step on; `setup_moves`: from contiguous placement to the first one, which the makespan does not pay for.
    """

    strategy: str
    step_us: list[float]
    copying_us: list[float]
    moves: list[int]
    decisions: list[Decided] = Field(default_factory=list)
    setup_moves: int = 0


class Regime(Part):
    """Steps `start` to before `stop` of the traces are of one task."""

    name: str
    start: int
    stop: int


class ReplayResult(Document):
    """Answer of `gemopt.replay.replay`.

    Attributes
    ----------
    first_step
        Of the traces, the first one that is scored; the tracks begin there.
    baseline_us
        MoE latency of every scored step under contiguous placement.
    profile_sha256, traces_sha256
        Digests of what was replayed; empty in older documents.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    rows: list[ReplayRow]
    timeline: list[Track]
    baseline_us: list[float]
    first_step: int
    num_steps: int
    num_layers: int
    num_ranks: int
    window: int
    fit: float
    seed: int
    noise: float
    non_moe_us: float
    cost: str
    migration: Migration
    schedule: Schedule
    regimes: list[Regime] = Field(default_factory=list)
    profile_sha256: str = ""
    traces_sha256: str = ""

    @property
    def notes(self) -> list[str]:
        """A line for each event that slows no scored step, or whose factor may be a share or per cents."""
        over = self.schedule.before(self.first_step)
        return [
            f"{event} is over before step {self.first_step}, the first that is scored: it slows none" for event in over
        ] + [said for event in self.schedule.events if (said := event.doubt)]

    def row(self, strategy: str) -> ReplayRow:
        """The row of one strategy."""
        return next(row for row in self.rows if row.strategy == strategy)

    def track(self, strategy: str) -> Track:
        """One strategy step by step."""
        return next(track for track in self.timeline if track.strategy == strategy)

    def changes(self, track: Track) -> tuple[IntArray, FloatArray]:
        """([W + 1] first steps of the windows and the end, [W] change of the makespan against contiguous placement)."""
        cuts = np.arange(0, len(self.baseline_us), self.window)
        ours_us, base_us = (np.add.reduceat(np.array(each), cuts) for each in (track.step_us, self.baseline_us))
        return self.first_step + np.append(cuts, len(self.baseline_us)), ours_us / base_us - 1

    def to_dataframe(self) -> Any:
        """`rows` as a pandas data frame, one per strategy.

        Raises
        ------
        MissingPackageError
            pandas is not installed.
        """
        return frame({name: [getattr(row, name) for row in self.rows] for name in ReplayRow.model_fields})
