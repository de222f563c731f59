"""Commands `gemopt profile` and `gemopt profile check`; both run alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemopt.cli.app import examples, notice, print_json, profile_app, say, tell
from gemopt.cli.options import AsJson
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import progress as shown
from gemopt.exceptions import InputError
from gemopt.words import counted

Model = Annotated[str | None, typer.Option(help="folder or hub name of a transformers model; its config is enough")]
Shape = Annotated[str | None, typer.Option(help="hidden=, inter=, experts=, topk= and perhaps dtype=, with commas")]
KernelName = Annotated[
    str | None, typer.Option("--kernel", help="vllm, sglang, per_expert or module:callable, for a shape")
]
DeviceKind = Annotated[str, typer.Option(help="auto: the accelerator of the local rank, else cpu")]
EpSize = Annotated[int | None, typer.Option(min=1, help="ranks that share the experts; default: ranks started")]
InTurn = Annotated[bool, typer.Option("--in-turn", help="one rank at a time, instead of all at once")]
BlockMs = Annotated[float | None, typer.Option(help="time per timing; default 1 on accelerators, 10 on CPUs")]
Seconds = Annotated[float, typer.Option(min=0.0, help="least time per point")]
TimeoutS = Annotated[float, typer.Option(min=2.0, help="silence after which a rank counts as dead, seconds")]


@profile_app.callback(
    invoke_without_command=True,
    epilog=examples(
        "gemopt profile --shape hidden=64,inter=32,experts=8,topk=2,dtype=float32 -o profile.json",
        "torchrun --nproc-per-node 8 --no-python gemopt profile --model MODEL -o profile.json",
    ),
)
def profile(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="profile.json to write")] = None,
    model: Model = None,
    shape: Shape = None,
    kernel: KernelName = None,
    device: DeviceKind = "auto",
    ep_size: EpSize = None,
    points: Annotated[int, typer.Option(help="most loads to measure, 16 or more")] = 100,
    target_error: Annotated[float, typer.Option(min=0.0, help="stop a curve at this expected mean error")] = 0.01,
    max_assignments: Annotated[int, typer.Option(help="largest load of a rank")] = 4096,
    sweep: Annotated[
        str, typer.Option(metavar="surface|load", help="load x active experts, or all experts active")
    ] = "surface",
    in_turn: InTurn = False,
    block_ms: BlockMs = None,
    seconds: Seconds = 0.1,
    max_drift: Annotated[float, typer.Option(min=0.0, help="refuse when the reference load drifts more")] = 0.1,
    timeout: TimeoutS = 10.0,
    plot: Annotated[Path | None, typer.Option(help="also draw the curves, fit and slowest rank (.png, .svg)")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure devices, import a kernel table, check a profile."""
    if context.invoked_subcommand is not None:
        return
    source = {"model": model, "shape": shape, "kernel": kernel, "device": device, "ep_size": ep_size}
    options = {
        "points": points,
        "target_error": target_error,
        "max_assignments": max_assignments,
        "sweep": sweep,
        "in_turn": in_turn,
        "max_drift": max_drift,
    }
    from gemopt.profiling.group import Group

    group = Group(timeout_s=timeout)
    with group.watch():
        if output is None:
            raise InputError("--output", "", "this option is needed", "see gemopt profile --help")
        if sweep not in ("surface", "load"):
            raise InputError("--sweep", sweep, "surface or load")
        check_outputs(("--output", output, "profile"), ("--plot", plot, ""))
        from gemopt.profiling.profiler import Profiler

        rank = _rank(group, source, options, block_ms, seconds)
        if group.rank:
            group.serve(rank.answer)
            return
        with shown("loads", total=points, hidden=as_json) as bar:
            progress = None if bar is None else lambda done: bar(done, points)
            measured = Profiler(rank, progress=progress).run()
        measured.save(output)
        if plot is not None:
            _plot(measured, plot)
        group.dismiss()
    _report(measured, output, as_json=as_json)


@profile_app.command(epilog=examples("gemopt profile check profile.json --model MODEL"))
def check(
    path: Annotated[Path, typer.Argument(metavar="PROFILE", help="profile.json to check")],
    model: Model = None,
    kernel: KernelName = None,
    device: DeviceKind = "auto",
    points: Annotated[int, typer.Option(min=1, help="loads to measure again")] = 5,
    tolerance: Annotated[float, typer.Option(min=0.0, help="change that still counts as holding")] = 0.05,
    block_ms: BlockMs = None,
    seconds: Seconds = 0.5,
    timeout: TimeoutS = 10.0,
    as_json: AsJson = False,
) -> None:
    """Measure a few points of a profile again and say whether it still holds; exit code 1 when it does not."""
    from gemopt.profile import Profile
    from gemopt.profiling.checking import check_profile, holds, relative
    from gemopt.profiling.group import Group
    from gemopt.profiling.profiler import Profiler

    then = Profile.load(path)
    source = {"model": model, "shape": None if model else then.model, "kernel": kernel, "device": device}
    group = Group(timeout_s=timeout)
    with group.watch():
        rank = _rank(group, {**source, "ep_size": None}, {"in_turn": then.mode == "in turn"}, block_ms, seconds)
        if group.rank:
            group.serve(rank.answer)
            return
        drifts = check_profile(then, Profiler(rank), points=points)
        group.dismiss()
    good = holds(drifts, tolerance)
    if as_json:
        print_json({"holds": good, "tolerance": tolerance, "devices": [vars(drift) for drift in drifts]})
    else:
        for drift, share in zip(drifts, relative(drifts), strict=True):
            tell(
                f"rank {drift.rank} ({drift.name}): {drift.ratio - 1:+.1%} in the median, "
                f"{drift.worst - 1:+.1%} at worst, {share - 1:+.1%} against the other ranks"
            )
        verdict = "still holds" if good else "no longer holds: measure it again"
        tell(f"{path}: {verdict} (tolerance {tolerance:.0%})")
    if not good:
        raise typer.Exit(1)


def _rank(group: Any, source: dict[str, Any], options: dict[str, Any], block_ms: float | None, seconds: float) -> Any:
    """This rank's workload on its device."""
    from gemopt.profiling.device import Device
    from gemopt.profiling.measure import Timing
    from gemopt.profiling.profiler import Options, Rank
    from gemopt.profiling.workload import find_workload

    device = Device(source.pop("device"), local_rank=group.local_rank)
    workload = find_workload(**source, device=device, rank=group.rank, num_ranks=group.size)
    for each in workload.notes if group.rank == 0 else ():
        notice(f"note: {each}")
    block_us = Timing.suited(device).block_us if block_ms is None else block_ms * 1e3
    return Rank(workload, device, group, Options(**options, timing=Timing(block_us=block_us, seconds=seconds)))


def _plot(profile: Any, path: Path) -> None:
    from gemopt.plotting import save
    from gemopt.profiling.plots import plot_profile

    save(plot_profile(profile), path)


def _report(profile: Any, output: Path, *, as_json: bool) -> None:
    from math import isnan

    from gemopt.costs import fit
    from gemopt.profiling.plots import slowest_rank

    _, report = fit(profile)
    slowest = slowest_rank(profile)
    summary = {
        "output": str(output),
        "mode": profile.mode,
        "kernel": profile.kernel,
        "ranks": profile.num_ranks,
        "points": len(profile.devices[0].samples),
        "fit": report.chosen,
        "fit_error": None if isnan(report.error) else round(report.error, 4),
        "slowest_rank": slowest,
    }
    if as_json:
        print_json(summary)
        return
    say(
        f"{output}: {counted(len(profile.devices[0].samples), 'load')} on {counted(profile.num_ranks, 'rank')} "
        f"({profile.mode}), kernel {profile.kernel}; "
        f"slowest rank {slowest} ({profile.devices[slowest].name}); {report.summary()}"
    )
