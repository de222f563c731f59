"""Plots of a profile: what was measured on each device, and the fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemopt.costs import fit
from gemopt.profile import Profile
from gemopt.words import counted


def slowest_rank(profile: Profile) -> int:
    """Rank whose latency, as a share of the mean over the ranks, is largest in the median over the common loads."""
    tables = [
        {(s.assignments, s.active_experts): s.latency_us for s in device.samples if s.assignments}
        for device in profile.devices
    ]
    common = [load for load in tables[0] if all(load in table for table in tables)]
    if not common:
        return int(np.argmax([np.mean(list(table.values())) for table in tables]))
    times_GP = np.array([[max(table[load], 1e-9) for load in common] for table in tables])
    return int(np.median(times_GP / times_GP.mean(axis=0), axis=1).argmax())


def plot_profile(profile: Profile, *, model: str = "auto", ax: Any = None) -> Any:
    """Latency against assignments with all measured experts active: points, fit (lines), slowest rank in bold red.

    `model` is the cost model, as for `gemopt.costs.fit`. Returns the matplotlib axes.
    """
    from gemopt.plotting import subplots

    ax = subplots(size=(8, 5))[1] if ax is None else ax
    cost, report = fit(profile, model=model)
    slowest, left_out = slowest_rank(profile), 0
    for device, latency in zip(profile.devices, cost.latencies, strict=True):
        table = device.table()
        active = np.nan_to_num(table[:, 1], nan=1.0)
        drawn = (active == active.max()) | np.isnan(table[:, 1])
        left_out += int((~drawn).sum())
        table = table[drawn]
        loads = np.linspace(table[:, 0].min(), table[:, 0].max(), 1000)
        features = [loads, np.minimum(loads, active.max())][: latency.num_features]
        marked = device.rank == slowest and profile.num_ranks > 1
        style = {"color": "tab:red", "linewidth": 2.0, "zorder": 3} if marked else {"linewidth": 0.9, "alpha": 0.8}
        label = f"rank {device.rank}: {device.name}{' (slowest)' if marked else ''}"
        line = ax.plot(loads, latency(features), label=label, **style)[0]
        ax.plot(table[:, 0], table[:, 2], ".", markersize=4, color=line.get_color(), zorder=line.get_zorder())
    ax.set_xlabel("assignments")
    ax.set_ylabel("latency (us)")
    title = profile.model.name or profile.kernel or "profile"
    fewer = f"\nnot drawn: {counted(left_out, 'point')} with fewer active experts" if left_out else ""
    ax.set_title(f"{title}: measured points and {report.chosen} fit{fewer}", fontsize=10)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize="small")
    return ax
