"""Draws pictures of single pages from the data that comes with gemopt: `python docs/pictures/pages.py [NAME ...]`."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from draw import ACCENT, DARK, LAYER, MUTED, save
from matplotlib import pyplot

from gemopt import Placement, Traces, solve
from gemopt.cli.demo import DATA, RANKS, SLOW_RANK, cases, on_surface
from gemopt.conflicts import conflict_graph, plot_conflicts
from gemopt.costs import fit
from gemopt.evaluate import evaluate
from gemopt.plotting import plot_front, plot_replay
from gemopt.replay import replay
from gemopt.solving.fronts import moves_front

SHIFT = 1100  # the step at which the traffic goes to the next domain
SLOTS = range(4, 9)  # of a rank; four hold the experts


def following() -> None:
    """Traffic goes from one domain to the next: what follows it, and with how many moves."""
    shifting = cases()[2]
    chosen = ["fitted-once", "free", "controller", "clairvoyant"]
    found = replay(shifting.profile, shifting.traces, chosen, fit=0.5)
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    plot_replay(found, axes=axes)
    save(figure, "following")


def moves() -> None:
    """Placed for the first domain, then moved for the second: the first swaps gain nearly all."""
    shifting = cases()[2]
    before, after = shifting.traces.steps(slice(0, SHIFT)), shifting.traces.steps(slice(SHIFT, None))
    placed = solve(shifting.profile, before, solver="local-search", patience=5, time_limit=30).placement
    assert placed is not None
    points = moves_front(shifting.profile, after, placed, solvers=["local-search"], time_limit=20)
    figure, ax = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    plot_front(points, ax=ax)
    save(figure, "moves")


def copies() -> None:
    """Slots for copies, split evenly or anew at every step: held-out change of one layer."""
    mixed = cases()[1]
    one = Traces(counts=mixed.traces.counts[:, LAYER : LAYER + 1])
    fitted, kept = one.split(0.5)
    contiguous = evaluate(Placement.contiguous(1, 32, 8), mixed.profile, kept).objective_us
    figure, ax = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    for split, colour in (("even", MUTED), ("static", DARK), ("optimal", ACCENT)):
        changes = []
        for slots in SLOTS:
            found = solve(mixed.profile, fitted, slots_per_rank=slots, split=split, solver="local-search",
                          time_limit=10).placement  # fmt: skip
            assert found is not None
            changes.append(100 * (evaluate(found, mixed.profile, kept).objective_us / contiguous - 1))
        ax.plot(SLOTS, changes, "o-", color=colour, label=split)
    ax.set(xlabel="slots of a rank (four hold the experts)", ylabel="against contiguous\nplacement, held out, %")
    ax.set_xticks(list(SLOTS))
    ax.legend(frameon=False, fontsize=9)
    save(figure, "copies")


def costs() -> None:
    """Measured points of a kernel, the curve through them, and the roofline that does not explain them."""
    profile = cases()[0].profile
    table = profile.devices[0].table()
    loads = np.geomspace(1, table[:, 0].max(), 2000)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, most in zip(axes, (512, table[:, 0].max()), strict=True):
        for name, colour in (("roofline", MUTED), ("staircase", ACCENT)):
            cost, _ = fit(profile, model=name)
            latency = cost.latencies[0]
            at = loads[loads <= most]
            features = [at] if len(cost.features) == 1 else [at, np.full(len(at), 4.0)]
            ax.plot(at, latency(features), color=colour, label=name)
        seen = table[(table[:, 0] > 0) & (table[:, 0] <= most)]
        ax.plot(seen[:, 0], seen[:, 2], "o", color=DARK, markersize=4, label="measured")
        ax.set(xlabel="assignments on the rank", xlim=(0, most), ylim=(0, None))
    axes[0].set_ylabel("latency, us")
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, "costs")


def conflicts() -> None:
    """The conflict graph of the layer that the page speaks of."""
    figure, ax = pyplot.subplots(figsize=(9, 5), layout="constrained")
    plot_conflicts(conflict_graph(DATA / "gptoss20b_trace_shift_b32.npz", LAYER), ax=ax)
    save(figure, "conflicts")


def bounds() -> None:
    """Layer by layer: experts in order, the placement that was found, and what no placement can go below."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    staircase = cases()[1]
    roofline = replace(staircase, profile=on_surface(RANKS, slow_rank=SLOW_RANK))
    for ax, case, title in zip(axes, (staircase, roofline), ("H100, staircase", "RTX PRO 6000, roofline"), strict=True):
        found = solve(case.profile, case.traces, time_limit=30)
        assert found.placement is not None and found.bound_us is not None
        num_layers, steps = len(found.per_layer), len(case.traces.counts)
        linear = evaluate(Placement.contiguous(num_layers, 32, 8), case.profile, case.traces)
        layers = range(num_layers)
        ours = np.array([layer.objective_us for layer in found.per_layer]) / steps
        bound = np.array([layer.bound_us for layer in found.per_layer]) / steps
        ax.plot(layers, linear.per_layer_us / steps, "o", color=MUTED, markersize=4, label="experts in order")
        ax.plot(layers, ours, "o", color=ACCENT, markersize=4, label="placed")
        ax.fill_between(layers, 0, bound, step="mid", color=DARK, alpha=0.15, linewidth=0, label="proven out of reach")
        gap = 100 * (1 - bound.sum() / ours.sum())
        ax.set(title=f"{title}: at most {gap:.1f} % left", xlabel="layer", ylim=(0, None))
        ax.title.set_fontsize(10)
    axes[0].set_ylabel("makespan of a step, us")
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, "bounds")


DRAWINGS = {each.__name__: each for each in (following, moves, copies, costs, conflicts, bounds)}


def main() -> None:
    """Draw those that are named, or all."""
    for name in sys.argv[1:] or DRAWINGS:
        DRAWINGS[name]()


if __name__ == "__main__":
    main()
