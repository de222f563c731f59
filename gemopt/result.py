"""What a solver found, what is proven about it, and why it stopped: three separate facts."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field

from gemopt.documents import Document, Part
from gemopt.links.report import LinksReport
from gemopt.placement import Placement
from gemopt.tables import frame, html_table
from gemopt.words import counted, short

OPTIMALITY_TOLERANCE = 1e-6
"""A gap at or below this relative size is called optimal: the exact solvers work with tolerances near 1e-7."""

SHOWN_LAYERS = 4  # whose lost experts a summary lists


class Status(StrEnum):
    """What is known."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


class StoppedBy(StrEnum):
    """Why the solver stopped."""

    PROOF = "proof"
    GAP = "gap"
    TIME_LIMIT = "time_limit"
    ITERATIONS = "iterations"
    INTERRUPT = "interrupt"


class Incumbent(Part):
    """A solution met on the way: seconds since the start, objective, and the bound known then."""

    seconds: float
    objective_us: float
    bound_us: float | None = None


class MovesReport(Part):
    """What changes against the placement in force.

    Attributes
    ----------
    moves, bytes
        Experts that a rank receives and did not hold, over all layers, and their weights (None: expert size unknown).
    per_layer, into_rank
        The same moves by layer and by rank.
    makespan_before_us, gain_us
        Objective of the placement in force on the same steps (with what links take), and by how much it falls.
    move_us
        Microseconds that one move takes, once: the price, or bytes over bandwidth; None when neither was given.
    price_us
        Microseconds of the objective that each move had to pay for.
    cost_us
        `price_us` times the moves: `objective_us` and this are what was minimised.
    paid_after_steps
        Steps after which the moves have paid for themselves: what they take over the gain per step. None when that is
        not known, or when nothing is gained.
    from_checkpoint
        By layer id, experts that no rank holds any more: their weights come from the checkpoint.
    old_rank
        For each rank its number in the placement in force, -1 for a new one.
    """

    moves: int
    bytes: int | None
    per_layer: list[int]
    into_rank: list[int]
    makespan_before_us: float
    gain_us: float
    move_us: float | None
    price_us: float
    cost_us: float
    paid_after_steps: float | None
    from_checkpoint: dict[int, list[int]] = Field(default_factory=dict)
    old_rank: list[int] = Field(default_factory=list)

    def summary(self, num_steps: int) -> str:
        """One or two lines for people."""
        size = "" if self.bytes is None else f" ({short(self.bytes / 1e9)} GB)"
        gain, before = self.gain_us / num_steps, self.makespan_before_us / num_steps
        change = f"{abs(gain):.1f} us per step {'gained on' if gain >= 0 else 'more than'} the {before:.1f} us in force"
        paid = (
            "" if self.paid_after_steps is None else f"; paid for after {counted(round(self.paid_after_steps), 'step')}"
        )
        line = f"{counted(self.moves, 'move')}{size}, {change}{paid}"
        lost = sum(map(len, self.from_checkpoint.values()))
        if not lost:
            return line
        some = list(self.from_checkpoint.items())[:SHOWN_LAYERS]
        shown = [f"layer {layer}: {', '.join(map(str, each))}" for layer, each in some]
        if len(self.from_checkpoint) > SHOWN_LAYERS:
            shown.append(f"and {counted(len(self.from_checkpoint) - SHOWN_LAYERS, 'layer')} more, see --result")
        return f"{line}\n{counted(lost, 'expert')} without another copy, from the checkpoint: {'; '.join(shown)}"


class Origin(Part):
    """How an answer was made.

    Attributes
    ----------
    call
        The command, or the call in Python with what differs from the defaults.
    versions
        Of gemopt, Python and the packages that answers and bounds depend on.
    profile_sha256, traces_sha256
        Of the profile and the steps solved on, as in certificates.
    """

    call: str
    versions: str
    profile_sha256: str
    traces_sha256: str


class Ceiling(Part):
    """What is left to gain on an objective, and what could gain it, in microseconds.

    Attributes
    ----------
    unknown_us
        Objective above the bound: at most so much is left to more solving. Whether it is there is not known.
    copies_us
        Bound above what any number of copies must take, each rank holding every expert: proven out of reach in these
        slots (and limits of moves); at most so much is left to more slots.
    spread_us
        The rest: nothing that moves or splits experts goes below.
    lost_us
        On steps that the placement was not made for: what they take beyond the same ratio to their own `spread_us`;
        what planning anew could bring. Negative where they suit it better; None without such steps.
    """

    unknown_us: float
    copies_us: float
    spread_us: float
    lost_us: float | None = None

    @classmethod
    def of(cls, objective_us: float, bound_us: float, spread_us: float) -> Ceiling:
        """Split an objective at its bound and at the bound with any number of copies."""
        bound_us, spread_us = min(bound_us, objective_us), min(spread_us, bound_us, objective_us)
        return cls(unknown_us=objective_us - bound_us, copies_us=bound_us - spread_us, spread_us=spread_us)

    @property
    def objective_us(self) -> float:
        """What is split."""
        return self.unknown_us + self.copies_us + self.spread_us

    def on(self, held_out_us: float, held_out_spread_us: float) -> Ceiling:
        """With what is lost on other steps, whose objective and `spread_us` are given."""
        ratio = self.objective_us / self.spread_us if self.spread_us > 0 else 1.0
        return self.model_copy(update={"lost_us": held_out_us - ratio * held_out_spread_us})

    def summary(self, held_out_us: float | None = None) -> str:
        """One line for people; `lost_us` as a share of the objective on the other steps."""
        parts = (self.unknown_us, self.copies_us)
        unknown, copies = (f"{100 * part / max(self.objective_us, 1e-300):.1f} %" for part in parts)
        line = f"left to gain, at most: {unknown} by solving on, {copies} more by more copies"
        if self.lost_us is None or not held_out_us:
            return line
        lost = 100 * self.lost_us / held_out_us
        return f"{line}; the change of traffic " + (f"cost {lost:.1f} %" if lost >= 0.05 else "cost nothing")


class LayerResult(Part):
    """One MoE layer: objective, bound and gap over all steps; `note` says how a bound or placement was reached.

    `moves_us` is the price of the layer's moves: bound and gap are those of `objective_us + moves_us`.

    reached: whether the solver searched at all; where not, the placement is that of a greedy start or of the search an
    exact solver starts from. start_us: objective of what an exact solver started from. own_bound_us: bound of its own.
    stated_steps, distinct_steps: steps stated to it, of how many. bounded_steps: steps of the trace with a full bound.
    """

    layer_id: int
    status: Status
    stopped_by: StoppedBy
    objective_us: float | None
    bound_us: float | None
    gap: float | None
    seconds: float
    note: str = ""
    reached: bool = True
    start_us: float | None = None
    own_bound_us: float | None = None
    stated_steps: int | None = None
    distinct_steps: int | None = None
    bounded_steps: int | None = None
    moves_us: float = 0.0

    @property
    def cut(self) -> bool:
        """Whether the time was over, or Ctrl-C came, before the solver searched; not where nothing was left to do."""
        return not self.reached and self.stopped_by in (StoppedBy.TIME_LIMIT, StoppedBy.INTERRUPT)

    def line(self) -> str:
        """The layer in one line."""
        value = "no placement" if self.objective_us is None else f"{self.objective_us:.1f} us"
        gap = "" if self.gap is None else f", gap {100 * self.gap:.2f} %"
        note = f"; {self.note}" if self.note else ""
        return f"layer {self.layer_id}: {value}{gap}, {self.stopped_by.value} after {self.seconds:.2f} s{note}"


class Result(Document):
    """Answer of `gemopt.solve`; `result.json`.

    Attributes
    ----------
    status, stopped_by
        What is known; why it stopped.
    objective_us
        Summed makespan of the placement over all given steps and layers, in microseconds, as `evaluate` gives it.
    bound_us, gap
        Proven lower bound of `total_us` over all placements (within the limits of moves), in microseconds, and
        `(total_us - bound_us) / total_us`. Without a price of moves `total_us` is `objective_us`.
    moves
        What changes against the placement in force; None when none was given.
    ceiling
        What of `total_us` is left to more solving and to more copies; None without a placement.
    links
        With a topology, what exchanging tokens takes; `objective_us` holds it then, beside the makespans.
    change
        `objective_us` against contiguous placement in the same slots, as a fraction: -0.065 is 6.5 % less.
    placement
        None when none was found; never an empty stand-in.
    outside
        Share of the evaluated loads that lie outside the measured range of the profile.
    cost, cost_error
        Cost model, and its cross-validated mean relative error on the profile's own points.
    cost_summary
        The same in one line for people; empty when the cost model was given.
    notes
        What people should know: what was cut, and how placements and bounds were reached.
    origin
        What it takes to make the answer again.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    solver: str
    status: Status
    stopped_by: StoppedBy
    objective_us: float | None
    bound_us: float | None
    gap: float | None
    change: float | None = None
    seconds: float
    num_steps: int
    placement: Placement | None
    history: list[Incumbent] = Field(default_factory=list)
    per_layer: list[LayerResult] = Field(default_factory=list)
    outside: float = 0.0
    cost: str = ""
    cost_error: float | None = None
    cost_summary: str = ""
    notes: list[str] = Field(default_factory=list)
    moves: MovesReport | None = None
    links: LinksReport | None = None
    origin: Origin | None = None
    ceiling: Ceiling | None = None

    def made_by(self, command: str) -> Result:
        """The same, with this command as what made it."""
        return self.model_copy(update={"origin": self.origin and self.origin.model_copy(update={"call": command})})

    @property
    def total_us(self) -> float | None:
        """What was minimised: `objective_us` and the price of the moves, in microseconds."""
        if self.objective_us is None or self.moves is None:
            return self.objective_us
        return self.objective_us + self.moves.cost_us

    def brief(self) -> str:
        """The first two lines of `summary` in one."""
        return ", ".join(self.summary().splitlines()[: 1 if self.objective_us is None else 2])

    def summary(self) -> str:
        """A few lines for people."""
        if self.objective_us is None:
            return f"{self.solver}: {self.status.value}, stopped by {self.stopped_by.value}, {self.seconds:.2f} s"
        mean, count = self.objective_us / self.num_steps, len(self.per_layer)
        below = "no bound" if self.gap is None else f"the optimum at most {100 * self.gap:.2f} % below"
        proven = "proven: none is better" if self.status is Status.OPTIMAL else below
        change = "" if self.change is None else f"{100 * self.change:+z.1f} % against contiguous placement, "
        lines = [
            f"{self.solver}: {self.status.value}, {mean:.1f} us per step over {count} layer{'s' * (count != 1)}",
            f"{change}{proven}",
            *([] if self.ceiling is None else [self.ceiling.summary()]),
            f"stopped by {self.stopped_by.value} after {self.seconds:.2f} s",
            self.cost_summary or f"cost model {self.cost}",
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = {
            "status": f"{self.status.value}, stopped by {self.stopped_by.value} after {self.seconds:.2f} s",
            "per step": "-" if self.objective_us is None else f"{self.objective_us / self.num_steps:.1f} us",
            "against contiguous": "-" if self.change is None else f"{100 * self.change:+z.1f} %",
            "proven gap": "-" if self.gap is None else f"{100 * self.gap:.2f} %",
            "layers, steps": f"{len(self.per_layer)}, {self.num_steps}",
            "cost model": self.cost_summary.removeprefix("cost model ") or self.cost,
        }
        return html_table(f"gemopt: {self.solver}", facts)

    def to_dataframe(self) -> Any:
        """`per_layer` as a pandas data frame, one row per MoE layer.

        Raises
        ------
        MissingPackageError
            pandas is not installed.
        """
        rows = [layer.model_dump(mode="json") for layer in self.per_layer]
        return frame({name: [row[name] for row in rows] for name in LayerResult.model_fields})

    def plot_history(self, *, ax: Any = None) -> Any:
        """Incumbent over time with the proven bound; returns the matplotlib axes."""
        from gemopt.plotting import plot_history

        return plot_history(self, ax=ax)

    def plot_layers(self, *, ax: Any = None) -> Any:
        """Makespan of every layer with its bound; returns the matplotlib axes."""
        from gemopt.plotting import plot_layers

        return plot_layers(self, ax=ax)


def relative_gap(objective_us: float | None, bound_us: float | None) -> float | None:
    """`(objective - bound) / objective`, between 0 and 1; None when either is unknown."""
    if objective_us is None or bound_us is None:
        return None
    if objective_us <= 0:
        return 0.0
    return min(1.0, max(0.0, (objective_us - bound_us) / objective_us))
