"""Advice as a document; `advice.json`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from gemopt.documents import Document, Part
from gemopt.replay.copying import Migration


class Option(Part):
    """What one strategy would do.

    Attributes
    ----------
    strategy, slots_per_rank
        As `gemopt replay` takes them.
    change, changes, low, high
        Of the makespan, copying included, against contiguous placement, as a fraction. `changes`: on the last steps
        and, where the traffic drifts, on the first ones, fitted on the others; `change` is their mean. 90 % of other
        recordings as long and of the same traffic lie between `low` and `high` (from blocks of consecutive steps),
        which hold the intervals of both playings and half of what these are apart more.
    step_change
        The same of whole steps, with the time outside the MoE layers.
    best_share
        Of the resampled recordings, how many have it within 1 % of their best choice. Where two playings were made,
        of a regime that may differ from both as they do from each other.
    moves, traffic_bytes
        Copied over links in the last steps.
    setup_moves, setup_bytes, breakeven_steps
        From contiguous placement to the first one, which the makespan does not pay for, and after how many steps that
        has paid for itself; None: never.
    memory_bytes
        Of each rank, at most, for experts beyond one copy each.
    """

    strategy: str
    slots_per_rank: list[int]
    change: float
    changes: list[float]
    low: float
    high: float
    step_change: float
    best_share: float
    moves: int
    traffic_bytes: float
    setup_moves: int
    setup_bytes: float
    breakeven_steps: float | None
    memory_bytes: float


class Sweep(Part):
    """Changes against contiguous placement when one property of traffic or links is another.

    values: of the property; changes: strategy -> one per value; pays_from: smallest value from which on the best
    strategy gains at least 1 %; changes_at: values where another strategy is best than at the value before.
    """

    what: str
    values: list[float]
    changes: dict[str, list[float]]
    best: list[str]
    pays_from: float | None
    changes_at: list[float]


class StrategyMap(Part):
    """Best strategy, and its change, by skewness (rows) and bandwidth in GB/s (columns)."""

    skews: list[float]
    gbps: list[float]
    best: list[list[str]]
    changes: list[list[float]]


class Advice(Document):
    """What to do, by how much it pays, and how sure that is.

    Attributes
    ----------
    recommended
        A strategy of `gemopt replay`: the simplest of those within `worth` of the best choice. Duplication per batch,
        which neither our executor nor an engine runs, is a choice only where predictors were named.
    predicted_change, low, high
        Of the makespan against contiguous placement, as a fraction, on steps that no strategy had seen: those of the
        recommended option.
    confidence
        Share of resampled recordings (blocks of consecutive steps) in which it is within 1 % of the best strategy:
        its `best_share`.
    ceiling
        No placement, changed before every step and with all slots that memory allows, changes the makespan by more than
        this: proven.
    clairvoyant
        Change of one that knows each window beforehand and copies at no cost. Both, too, are means of both playings.
    skew, drift, assignments, outside
        Of the traffic: hottest expert over mean; share of assignments that go elsewhere in the scored part than in the
        fitted one, beyond chance; mean per step and layer; share of rank loads outside the measured range.
    sweeps, map
        On a sample of layers and steps.
    commands
        What to run next.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    recommended: str
    predicted_change: float
    confidence: float
    low: float
    high: float
    strategies: list[Option]
    ceiling: float
    clairvoyant: float
    fitted_steps: int
    scored_steps: int
    horizon_steps: int
    window: int
    seed: int
    skew: float
    drift: float
    assignments: float
    outside: float
    non_moe_us: float
    migration: Migration
    worth: float
    sweeps: list[Sweep] = Field(default_factory=list)
    map: StrategyMap | None = None
    commands: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def option(self, strategy: str) -> Option:
        """One strategy."""
        return next(each for each in self.strategies if each.strategy == strategy)
