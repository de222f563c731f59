"""From documents to a page: numbers, headline, sections."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version

import gemopt
from gemopt.documents import write_text
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay.result import ReplayResult
from gemopt.report import devices, experts, figures, numbers
from gemopt.report.inputs import Inputs, Source, gather
from gemopt.report.numbers import Bounds, Side
from gemopt.report.page import render
from gemopt.report.style import Section, graph_objects
from gemopt.result import OPTIMALITY_TOLERANCE, Result
from gemopt.splits.senders import Senders
from gemopt.traces import Traces
from gemopt.words import counted

PACKAGES = ("numpy", "numba", "scipy", "ortools", "plotly")


@dataclass(frozen=True, eq=False)
class Report:
    """A page: its headline in one sentence, key figures, sections, and the HTML."""

    headline: str
    key_figures: dict[str, str]
    sections: list[Section]
    html: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page atomically."""
        write_text(path, self.html)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.headline)}</p>"


def report(
    answer: Result | Placement | Source,
    profile: Profile | Source,
    traces: Traces | Source,
    *,
    baseline: Result | Placement | Source | None = None,
    holdout: Traces | Source | None = None,
    replay: ReplayResult | Source | None = None,
    cost: str | None = None,
    senders: Senders | str | None = None,
    choose: Callable[[Traces], Traces] = lambda traces: traces,
    command: str = "",
) -> Report:
    """Make the page about a result or a placement; parameters as `gemopt.report.inputs.gather`.

    Parameters
    ----------
    command
        The command that made the page, shown in it for repeating.

    Raises
    ------
    InputError
        As `gather`.
    MissingPackageError
        plotly is not installed.
    """
    graph_objects()
    inputs = gather(answer, profile, traces, baseline=baseline, holdout=holdout, replay=replay, cost=cost,
                    senders=senders, choose=choose)  # fmt: skip
    edges = numbers.windows(inputs.fitted.num_steps, inputs.placement.num_ranks)
    before, after = (numbers.side(inputs, each, edges)
                     for each in (inputs.before, inputs.placement))  # fmt: skip
    bound = numbers.bounds(inputs)
    judged = inputs.fitted if inputs.held is None else inputs.held
    old_us, new_us = (inputs.evaluate(each, judged).step_us
                      for each in (inputs.before, inputs.placement))  # fmt: skip
    layers = [experts.layer_conflicts(inputs.fitted.counts[:, i]) for i in range(inputs.fitted.num_layers)]
    sections = [
        figures.makespan(inputs, before, after, bound),
        figures.ranks(inputs, before, after, edges),
        figures.latency(inputs, old_us, new_us),
        devices.devices(inputs, max(before.most, after.most)),
        experts.classes(inputs, layers),
        experts.conflicts(inputs, layers),
        figures.moves(inputs),
        figures.search(inputs),
        *([] if inputs.replay is None else [figures.replay(inputs.replay, inputs.replay_of)]),
    ]
    held = float(new_us.sum() / old_us.sum() - 1) if inputs.held is not None and old_us.sum() else None
    headline = _headline(inputs, before, after, bound, held)
    facts = _key_figures(inputs, before, after, bound, held)
    html = render(headline, facts, sections, _repeat(inputs, command), title=_title(inputs))
    return Report(headline, facts, sections, html)


def _title(inputs: Inputs) -> str:
    name = inputs.placement.model or inputs.fitted.model or inputs.profile.model.name
    ranks, layers, experts_ = inputs.placement.num_ranks, inputs.fitted.num_layers, inputs.fitted.num_experts
    return f"{name + ': ' if name else ''}{counted(layers, 'layer')} of {experts_} experts on {counted(ranks, 'rank')}"


def _gap(inputs: Inputs, after: Side, bound: Bounds) -> float:
    if inputs.result is not None and inputs.result.gap is not None and inputs.result.links is None:
        return inputs.result.gap
    value = after.evaluation.objective_us
    return max(0.0, 1 - float(bound.per_layer_us.sum()) / value) if value else 0.0


def _headline(inputs: Inputs, before: Side, after: Side, bound: Bounds, held: float | None) -> str:
    old, new = before.evaluation.objective_us, after.evaluation.objective_us
    change = new / old - 1 if old else 0.0
    seen = f", {_words(held)} on {counted(inputs.held.num_steps, 'step')} it did not see" if (
        held is not None and inputs.held is not None) else ""  # fmt: skip
    gap = _gap(inputs, after, bound)
    left = f"the best possible one would take at most {100 * gap:.1f} % less than this, which is proven"
    if gap <= OPTIMALITY_TOLERANCE:
        left = "no placement in these slots takes less, which is proven"
    steps = f"{counted(inputs.fitted.num_steps, 'step')} of {counted(inputs.fitted.num_layers, 'MoE layer')}"
    aside = "" if inputs.result is None or inputs.result.links is None else ", links aside"
    return f"This placement takes {_words(change, inputs.before_name)} over {steps}{aside}{seen}; {left}."


def _words(change: float, other: str = "") -> str:
    percent = f"{100 * abs(change):.1f}"
    said = "as much time" if percent == "0.0" else f"{percent} % {'less' if change < 0 else 'more'} time"
    return " ".join([said, *([] if not other else ["as" if percent == "0.0" else "than", other])])


def _key_figures(inputs: Inputs, before: Side, after: Side, bound: Bounds, held: float | None) -> dict[str, str]:
    steps = inputs.fitted.num_steps
    old, new = before.evaluation.objective_us / steps / 1e3, after.evaluation.objective_us / steps / 1e3
    found = {"step, before": f"{old:.3f} ms", "step, after": f"{new:.3f} ms",
             "change": f"{100 * (new / old - 1):+z.1f} %" if old else "-"}  # fmt: skip
    if held is not None:
        found["held out"] = f"{100 * held:+z.1f} %"
    found["gap to the bound"] = f"{100 * _gap(inputs, after, bound):.1f} %"
    waits = [f"{100 * each.evaluation.idle_share:.1f}" for each in (before, after)]
    found["ranks wait"] = f"{waits[0]} \u2192 {waits[1]} %"
    if inputs.result is not None and inputs.result.links is not None:
        found["links, not in the step"] = f"{inputs.result.links.exposed_us / inputs.result.num_steps / 1e3:.3f} ms"
    if inputs.placement.rules is not None:
        found["rules kept"] = str(len(inputs.placement.rules.named()))
    if inputs.placement.has_copies:
        spare = inputs.placement.num_slots - inputs.placement.num_experts
        found["slots for copies"] = f"{spare} per layer"
    return found


# As in certificates: of contents, unlike those of the files.
ORIGIN = {"profile_sha256": "sha256 of the profile's content", "traces_sha256": "sha256 of the counts"}


def _repeat(inputs: Inputs, command: str) -> dict[str, str]:
    """What it takes to make the page again."""
    found = {"command": command} if command else {}
    if inputs.result is not None:
        result = inputs.result
        found["answer"] = f"solver {result.solver}, {result.seconds:.1f} s, cost model {result.cost}"
        if result.origin is not None:
            found |= {f"answer: {ORIGIN.get(name, name)}": value for name, value in result.origin}
    found["versions"] = ", ".join(
        [f"gemopt {gemopt.__version__}", f"Python {platform.python_version()}", *map(_versioned, PACKAGES)]
    )
    for package, number in inputs.profile.software.items():
        found["versions"] += f"; measured with {package} {number}"
    return {**found, **{f"sha256 of {name}": digest for name, digest in inputs.digests.items()}}


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
