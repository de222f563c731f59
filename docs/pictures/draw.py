"""Draws the pictures of `docs/index.md` from the data that comes with gemopt: `python docs/pictures/draw.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot

from gemopt import Placement, Traces, solve
from gemopt.cli.demo import DATA, SLOW_RANK, SLOWER, cases
from gemopt.costs import fit
from gemopt.evaluate import rank_times
from gemopt.formats.tables.kernel import Unit, read_table, slow_down
from gemopt.problem import problems

HERE = Path(__file__).resolve().parent
ACCENT, MUTED, DARK = "#d1495b", "#8d99ae", "#2b2d42"
LAYER, STEP, STEPS = 12, 100, 200
mpl.rcParams.update({"svg.hashsalt": "gemopt", "svg.fonttype": "path", "font.size": 10, "axes.spines.top": False,
                     "axes.spines.right": False})  # fmt: skip


def save(figure: Any, name: str) -> None:
    """As SVG without a date, so that drawing again changes nothing."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def bars(ax: Any, times_G: np.ndarray, title: str) -> None:
    """One step of one layer: everybody waits for the slowest rank."""
    worst = int(times_G.argmax())
    colours = [ACCENT if rank == worst else MUTED for rank in range(len(times_G))]
    ax.barh(range(len(times_G)), times_G, color=colours)
    waiting = times_G.max() - times_G
    ax.barh(range(len(times_G)), waiting, left=times_G, color="none", edgecolor=MUTED, hatch="///", linewidth=0)
    ax.axvline(times_G.max(), color=ACCENT, linewidth=1.5)
    ax.set_yticks(range(len(times_G)), [f"rank {rank}" for rank in range(len(times_G))])
    ax.set_title(
        f"{title}: {times_G.max():.0f} us, ranks wait {100 * waiting.mean() / times_G.max():.0f} %", fontsize=10
    )


def main() -> None:
    """Draw all of them."""
    first, *_ = cases()
    profile = slow_down(first.profile, SLOW_RANK, SLOWER)
    traces = first.traces.steps(slice(0, STEPS))
    problem = problems(fit(profile)[0], traces, None)[LAYER]
    contiguous = Placement.contiguous(1, 32, 8).physical_to_logical[0]
    one = Traces(counts=traces.counts[:, LAYER : LAYER + 1])
    found = solve(profile, one, solver="local-search", patience=50, time_limit=60).placement
    assert found is not None
    times = [rank_times(problem, row) for row in (contiguous, found.physical_to_logical[0])]

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharex=True, sharey=True, layout="constrained")
    bars(axes[0], times[0][STEP], "experts in order")
    bars(axes[1], times[1][STEP], "placed by gemopt")
    axes[0].invert_yaxis()  # the other shares it
    figure.supxlabel("time of the rank's experts in one layer at one step, us (hatched: waiting)", fontsize=10)
    save(figure, "straggler")

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    h100 = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    table = h100.devices[0].table()
    small = table[(table[:, 0] > 0) & (table[:, 0] <= 512)]
    axes[0].plot(small[:, 0], small[:, 2], "o-", color=DARK)
    axes[0].set(
        xlabel="assignments on the rank", ylabel="latency, us", title="H100: not a straight line", ylim=(0, None)
    )
    surface = read_table(DATA / "moe_block_rtxpro6000_qwen3_30b.csv", unit=Unit.TOKENS, top_k=8).devices[0].table()
    for active, colour in zip((8, 32, 128), (MUTED, ACCENT, DARK), strict=True):
        rows = surface[surface[:, 1] == active]
        axes[1].plot(rows[:, 0], rows[:, 2], "o-", color=colour, label=f"{active} experts active")
    axes[1].set(xlabel="assignments on the rank", title="RTX PRO 6000: experts count too", xscale="log", ylim=(0, None))
    axes[1].legend(frameon=False, fontsize=9)
    save(figure, "latency")

    counts = cases()[2].traces.counts[:, LAYER].astype(float)
    share = counts / counts.sum(axis=1, keepdims=True) * counts.shape[1]
    windows = share[: len(share) // 25 * 25].reshape(-1, 25, share.shape[1]).mean(axis=1)
    figure, ax = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    drawn = ax.imshow(windows.T, aspect="auto", cmap="magma_r", vmin=0, extent=(0, len(share), 32, 0))
    ax.set(xlabel="step: the traffic goes from one domain to the next", ylabel="expert")
    figure.colorbar(drawn, ax=ax, label="load, times an equal share")
    save(figure, "traffic")

    figure, ax = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    for label, times_TG, colour in (("experts in order", times[0], MUTED), ("placed by gemopt", times[1], ACCENT)):
        ax.plot(
            times_TG.max(axis=1),
            color=colour,
            linewidth=1.2,
            label=f"{label}: {times_TG.max(axis=1).sum() / 1e3:.1f} ms in all",
        )
    ax.set(xlabel="step", ylabel="slowest rank, us")
    ax.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    ax.set_ylim(0, 1.25 * times[0].max())
    save(figure, "objective")


if __name__ == "__main__":
    main()
