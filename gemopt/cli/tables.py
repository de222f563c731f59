"""Tables for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from gemopt.words import counted, outside, short

if TYPE_CHECKING:
    from gemopt.compare import Comparison
    from gemopt.evaluate import Evaluation
    from gemopt.replay import ReplayResult
    from gemopt.solving.fronts import FrontPoint
    from gemopt.verify import Verified


def new_table(*heads: str, left: Collection[str]) -> Table:
    """A table without rows, whose columns are flush right but for those named; none is wrapped."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    return table


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """Objective over all given steps and layers; changes against contiguous placement. Fits 80 columns.

    The best row (held out, where steps were) is bold. Below the table stands what a solver could not do, and what it
    did to earn its row where that is marked `*`; one that did not run has no numbers, which would be another's.
    """
    held = any(row.holdout_us is not None for row in rows)
    said = [f"{row.solver}: {_said(row)}" for row in rows if _said(row)]
    if doubt := outside(max((row.outside for row in rows), default=0.0)):
        said.append(f"up to {doubt}")
    best = min((_key(row, held) for row in rows), default=0.0)
    said += [f"{row.solver}: {row.ceiling.summary(row.holdout_us)}" for row in rows
             if row.ceiling is not None and row.ran and _key(row, held) == best][:1]  # fmt: skip
    heads = ["total\nms", "change\n%", "bound\nms", "gap\n%", "time\ns", *(["held\nout %"] if held else [])]
    table = new_table("solver", *heads, "p50\nus", "p90\nus", "p99\nus", left=("solver",))
    if said:
        table.caption, table.caption_justify = Text("\n".join(said)), "left"
    for row in rows:
        if not row.ran:
            table.add_row(row.solver, "-", style="dim")
            continue
        cells = [
            _milliseconds(row.objective_us),
            _percent(row.change),
            _milliseconds(row.bound_us),
            "" if row.gap is None else f"{100 * row.gap:.2f}",
            f"{row.seconds:.{1 if row.seconds < 99 else 0}f}",
            *([_percent(row.holdout_change)] if held else []),
            *(f"{value:.0f}" if value is not None else "" for value in (row.p50_us, row.p90_us, row.p99_us)),
        ]
        name = f"{row.solver} *" if _said(row) else row.solver
        table.add_row(name, *cells, style="bold" if _key(row, held) == best else None)
    return table


def verified_table(found: Verified) -> Table:
    """What was checked beside what is only claimed, layer by layer and in all."""
    heads = ("layer", "proof", "total\nms", "certified\ngap %", "claimed\ngap %", "checked by")
    table = new_table(*heads, left=("layer", "proof", "checked by"))
    table.caption = Text("certified is what was checked here; claimed is what the solver says")
    table.caption_justify = "left"
    rows = [("all", "", found.objective_us, found.checked_us, found.claimed_us, "")]
    rows += [
        (str(each.layer_id), each.proof.value, each.objective_us, each.checked_us, each.claimed_us, each.note)
        for each in found.layers
    ]
    for layer, proof, objective, checked, claimed, note in rows:
        gaps = [f"{100 * (1 - bound / max(objective, 1e-300)):.3f}" for bound in (checked, claimed)]
        table.add_row(layer, proof, _milliseconds(objective), *gaps, note, style="bold" if layer == "all" else None)
    return table


def _said(row: Comparison) -> str:
    refusal = row.note.removeprefix(f"{row.solver} ")  # the line begins with the name
    return refusal or row.status.value if row.objective_us is None else row.earned()


def front_table(points: Sequence[FrontPoint]) -> Table:
    """Latency per step against moves; changes against the placement in force."""
    held = any(point.holdout_us is not None for point in points)
    sized = ("GB",) if any(point.bytes is not None for point in points) else ()
    heads = ("moves", *sized, "step us", "change %", *(("held out us", "held out %") if held else ()))
    table = new_table(*heads, "found by", left=("found by",))
    for point in points:
        size = "" if point.bytes is None else f"{point.bytes / 1e9:.2f}"
        cells = [str(point.moves), *([size] if sized else []), f"{point.step_us:.1f}", _percent(point.change)]
        if held:
            cells += ["" if point.holdout_us is None else f"{point.holdout_us:.1f}", _percent(point.holdout_change)]
        table.add_row(*cells, point.source)
    return table


def _key(row: Comparison, held: bool) -> float:
    value = row.holdout_us if held else row.objective_us
    return float("inf") if value is None or not row.ran else value


def _percent(change: float | None) -> str:
    return "" if change is None else f"{100 * change:+z.1f}"


def _milliseconds(value_us: float | None) -> str:
    return "" if value_us is None else f"{value_us / 1e3:.{1 if value_us < 1e6 else 0}f}"


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
    } | _link_fields(evaluation)


def _link_fields(evaluation: Evaluation) -> dict[str, Any]:
    """What exchanging tokens takes; nothing without a topology."""
    sent = evaluation.communication
    if sent is None:
        return {}
    return {
        "compute_us": evaluation.compute_us,
        "dispatch_us": float(sent.dispatch_TL.sum()),
        "combine_us": float(sent.combine_TL.sum()),
        "cross_node_bytes": sent.cross_node_bytes,
        "cross_rank_bytes": sent.cross_rank_bytes,
        "fullest_bytes": sent.fullest_bytes,
        "fullest_port": sent.fullest_port,
    }


def evaluation_table(fields: dict[str, Any], num_steps: int) -> Table:
    """The same for people."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    mean = fields["objective_us"] / num_steps
    table.add_row(
        "objective", f"{fields['objective_us'] / 1e3:.1f} ms over {counted(num_steps, 'step')}, {mean:.1f} us per step"
    )
    table.add_row("against contiguous", "" if fields["change"] is None else f"{_percent(fields['change'])} %")
    table.add_row("step p50, p90, p99", " / ".join(f"{fields[q]:.0f}" for q in ("p50_us", "p90_us", "p99_us")) + " us")
    table.add_row("ranks wait", f"{100 * fields['idle_share']:.1f} % of the time")
    if "dispatch_us" in fields:
        parts = " + ".join(f"{fields[name] / num_steps:.1f}" for name in ("compute_us", "dispatch_us", "combine_us"))
        table.add_row("compute + dispatch + combine", f"{parts} us per step")
        table.add_row("between nodes", f"{short(fields['cross_node_bytes'] / 1e9)} GB")
        table.add_row("fullest port", fields["fullest_port"])
    table.add_row("outside the profile", f"{100 * fields['outside']:.1f} % of the loads")
    return table


def replay_table(result: ReplayResult) -> Table:
    """Strategies over the scored steps: the bound is the one who knows the future; the best other row is bold."""
    quantiles, requests = ("p50\nus", "p90\nus", "p99\nus"), ("TTFT\nms", "TPOT\nms")
    heads = ("strategy", "makespan\nms", "change\n%", "moves", "copying\nms", *quantiles, *requests)
    table = new_table(*heads, left=("strategy",))
    scored = result.num_steps - result.first_step
    table.title, table.title_justify = f"{counted(scored, 'step')} scored, fitted on {result.first_step}", "left"
    table.caption, table.caption_justify = Text(_conditions(result)), "left"
    best = min((row.makespan_us for row in result.rows if row.strategy != "clairvoyant"), default=0.0)
    for row in result.rows:
        cells = [
            _milliseconds(row.makespan_us),
            _percent(row.change),
            str(row.moves),
            _milliseconds(row.migration_us),
            *(f"{value:.0f}" for value in (row.p50_us, row.p90_us, row.p99_us)),
            *("-" if value is None else f"{value:.2f}" for value in (row.ttft_ms, row.tpot_ms)),
        ]
        table.add_row(row.strategy, *cells, style="bold" if row.makespan_us == best else None)
    return table


def _conditions(result: ReplayResult) -> str:
    costs = result.migration
    said = [
        f"experts of {short(costs.expert_bytes / 1e6)} MB at {short(costs.bytes_per_s / 1e9)} GB/s; a transfer slows "
        f"steps by {short(100 * costs.slowdown)} %, a commit stalls {short(costs.commit_us)} us",
        f"quantiles, TTFT and TPOT with {result.non_moe_us:.0f} us a step outside the MoE layers",
        *(str(event) for event in result.schedule.events),
    ]
    return "\n".join(said)
