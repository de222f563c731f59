"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from gemopt.compare import Comparison
    from gemopt.evaluate import Evaluation


def comparison_table(rows: Sequence[Comparison], *, title: str | None = None) -> Table:
    """Objective in milliseconds over all given steps and layers; changes against contiguous placement."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("solver")
    held = any(row.holdout_us is not None for row in rows)
    heads = ["objective ms", "change", "bound ms", "gap", "seconds", *(["held-out"] if held else [])]
    for head in [*heads, "p50 us", "p90 us", "p99 us"]:
        table.add_column(head, justify="right")
    best = min((_key(row, held) for row in rows), default=0.0)
    for row in rows:
        if row.objective_us is None:
            table.add_row(row.solver, f"[dim]{row.note}", *[""] * (len(table.columns) - 2))
            continue
        cells = [
            f"{row.objective_us / 1e3:.1f}",
            _percent(row.change),
            "" if row.bound_us is None else f"{row.bound_us / 1e3:.1f}",
            "" if row.gap is None else f"{100 * row.gap:.2f} %",
            f"{row.seconds:.1f}",
            *([_percent(row.holdout_change)] if held else []),
            *(f"{value:.0f}" if value is not None else "" for value in (row.p50_us, row.p90_us, row.p99_us)),
        ]
        table.add_row(row.solver, *cells, style="bold" if _key(row, held) == best else None)
    return table


def _key(row: Comparison, held: bool) -> float:
    value = row.holdout_us if held else row.objective_us
    return float("inf") if value is None else value


def _percent(change: float | None) -> str:
    return "" if change is None else f"{100 * change:+.1f} %"


def evaluation_fields(evaluation: Evaluation, base: Evaluation) -> dict[str, Any]:
    """JSON of `gemopt evaluate`."""
    return {
        "objective_us": evaluation.objective_us,
        "change": evaluation.objective_us / base.objective_us - 1 if base.objective_us else None,
        "p50_us": evaluation.quantile_us(0.5),
        "p90_us": evaluation.quantile_us(0.9),
        "p99_us": evaluation.quantile_us(0.99),
        "idle_share": evaluation.idle_share,
        "outside": evaluation.outside,
        "per_layer_us": evaluation.per_layer_us.tolist(),
    }


def evaluation_table(fields: dict[str, Any], num_steps: int) -> Table:
    """The same for people."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    mean = fields["objective_us"] / num_steps
    table.add_row("objective", f"{fields['objective_us'] / 1e3:.1f} ms over {num_steps} steps, {mean:.1f} us per step")
    table.add_row("against contiguous", _percent(fields["change"]))
    table.add_row("step p50, p90, p99", " / ".join(f"{fields[q]:.0f}" for q in ("p50_us", "p90_us", "p99_us")) + " us")
    table.add_row("ranks wait", f"{100 * fields['idle_share']:.1f} % of the time")
    table.add_row("outside the profile", f"{100 * fields['outside']:.1f} % of the loads")
    return table
