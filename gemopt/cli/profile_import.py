"""Command `gemopt profile import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemopt.cli.app import profile_app, say


@profile_app.command("import")
def import_table(
    table: Annotated[Path, typer.Argument(help="CSV: tokens[,active_experts],latency_us[,rank]")],
    output: Annotated[Path, typer.Option("-o", "--output", help="profile.json to write")],
    unit: Annotated[str, typer.Option(help="what the load column counts: assignments, tokens or group-tokens")] = (
        "assignments"
    ),
    top_k: Annotated[int | None, typer.Option(help="experts per token")] = None,
    ep: Annotated[int | None, typer.Option(help="ranks of the measured group, for group-tokens")] = None,
    speeds: Annotated[Path | None, typer.Option(help="CSV with rel_time: draw a what-if cluster from it")] = None,
    fleet: Annotated[str | None, typer.Option(help="which dataset of the speeds, when it holds several")] = None,
    memory_fleet: Annotated[str | None, typer.Option(help="another dataset for the memory-bound part")] = None,
    ranks: Annotated[int, typer.Option(help="devices to draw")] = 8,
    seed: Annotated[int, typer.Option(help="seed of the draw")] = 0,
    device: Annotated[str | None, typer.Option(help="name of the measured device")] = None,
    source: Annotated[str | None, typer.Option(help="where the table comes from, and its licence")] = None,
) -> None:
    """Turn a kernel table into a profile, or into a cluster of differing devices."""
    from gemopt.documents import check_writable
    from gemopt.exceptions import InputError
    from gemopt.formats.kernel_table import Unit, read_fleet, read_table, what_if

    check_writable(output)
    if unit not in list(Unit):
        raise InputError("--unit", unit, f"one of {', '.join(Unit)}")
    profile = read_table(table, unit=Unit(unit), top_k=top_k, ep=ep)
    if device is not None:
        named = [each.model_copy(update={"name": device}) for each in profile.devices]
        profile = profile.model_copy(update={"devices": named})
    if speeds is not None:
        memory = None if memory_fleet is None else read_fleet(speeds, memory_fleet)
        profile = what_if(profile, read_fleet(speeds, fleet), ranks=ranks, seed=seed, memory=memory)
    elif fleet or memory_fleet:
        raise InputError("--fleet", fleet or memory_fleet, "fleets are read from --speeds", "give --speeds")
    profile = profile.model_copy(update={"source": source or f"imported from {table.name}"})
    profile.save(output)
    samples = sum(len(each.samples) for each in profile.devices)
    say(f"{output}: {profile.num_ranks} devices, {samples} samples")
