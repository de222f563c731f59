"""Command `gemopt profile import`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemopt.cli.app import examples, notice, print_json, profile_app, say, warn
from gemopt.cli.moves import parse_bytes
from gemopt.cli.options import MOST_BYTES, AsJson
from gemopt.cli.outputs import check_outputs
from gemopt.exceptions import InputError
from gemopt.words import counted

if TYPE_CHECKING:
    from gemopt.profile import Profile

Columns = list[str] | None
MOST = 1 << 16  # devices, or experts of a token: more are a slip


@profile_app.command(
    "import",
    epilog=examples(
        "gemopt profile import h100_vllm_gptoss20b_ep8.csv --unit group-tokens --top-k 4 --ep 8 --ranks 8 "
        "-o profile.json",
        "gemopt profile import gate_up.csv silu.csv down.csv --sum-column file -o profile.json",
        "gemopt profile import table.csv --where dtype=bf16 --time-column 'kernel_time:ms' -o profile.json",
    ),
)
def import_table(
    tables: Annotated[
        list[Path], typer.Argument(help="CSV or parquet with loads and times, or what benchmark_moe printed")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="profile.json to write")],
    unit: Annotated[
        str | None, typer.Option(help="what the load column counts: assignments (default), tokens or group-tokens")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=MOST, help="experts per token")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="ranks of the measured group, for group-tokens")] = None,
    where: Annotated[Columns, typer.Option(metavar="COLUMN=VALUE", help="only these rows; repeatable")] = None,
    load_column: Annotated[str | None, typer.Option(help="column with the load; then give --unit")] = None,
    time_column: Annotated[
        str | None, typer.Option(metavar="NAME[:ms]", help="column with the layer's time; those of parts: A:ms+B:ms")
    ] = None,
    device_column: Annotated[Columns, typer.Option(help="column that tells devices apart; repeatable")] = None,
    repeat_column: Annotated[
        Columns, typer.Option(help="column that only numbers repeats, or holds a result; repeatable")
    ] = None,
    sum_column: Annotated[
        Columns,
        typer.Option(help="column that names parts of a layer, to be added up; of several tables: file; repeatable"),
    ] = None,
    speeds: Annotated[
        Path | None, typer.Option(help="CSV with rel_time, or times of GPUs: draw a what-if cluster from it")
    ] = None,
    fleet: Annotated[str | None, typer.Option(help="which dataset of the speeds, when it holds several")] = None,
    memory_fleet: Annotated[str | None, typer.Option(help="another dataset for the memory-bound part")] = None,
    ranks: Annotated[
        int | None, typer.Option(max=MOST, help="devices: equal ones, or drawn from --speeds (then 8 unless given)")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the draw")] = 0,
    slower: Annotated[
        list[str] | None, typer.Option(metavar="RANK:FACTOR", help="3:1.3: rank 3 takes 1.3 times as long; repeatable")
    ] = None,
    device: Annotated[str | None, typer.Option(help="name of the measured device")] = None,
    source: Annotated[str | None, typer.Option(help="where the table comes from, and its licence")] = None,
    model: Annotated[str | None, typer.Option(help="name of the network")] = None,
    expert_bytes: Annotated[
        float | None, typer.Option(min=1, max=MOST_BYTES, help="weights of one expert, for the price of moves")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a kernel table into a profile, or into a cluster of equal or differing devices."""
    from gemopt.formats.tables.fleet import check_drawn, serving, slowed
    from gemopt.formats.tables.kernel import read_table

    check_outputs(
        ("--output", output, "profile"), read=[*(("the table", each) for each in tables), ("--speeds", speeds)]
    )
    named = {"--time-column": [time_column], "--load-column": [load_column], "--repeat-column": repeat_column}
    named |= {"--device-column": device_column, "--sum-column": sum_column, "--fleet": [fleet]}
    for option, names in (named | {"--memory-fleet": [memory_fleet]}).items():
        if "" in (names or []):
            raise InputError(option, "nothing", "a name")
    check_drawn(speeds, fleet, memory_fleet, seed)
    size = parse_bytes(expert_bytes)
    notes: list[str] = []
    profile = read_table(
        tables,
        unit=unit,
        top_k=top_k,
        ep=ep,
        where=where or (),
        load=load_column,
        time=time_column,
        device=device_column or (),
        repeat=repeat_column or (),
        parts=sum_column or (),
        notes=notes,
    )
    measured = profile.num_ranks
    profile = serving(
        profile, notes=notes, device=device, speeds=speeds, fleet=fleet, memory_fleet=memory_fleet, ranks=ranks,
        seed=seed,
    )  # fmt: skip
    profile = slowed(profile, _factors(slower or ()), notes)
    profile = profile.model_copy(
        update={"source": source or f"imported from {', '.join(each.name for each in tables)}"}
    )
    profile = profile.with_model(name=model, expert_bytes=size, top_k=top_k)
    profile.save(output)
    if as_json:
        for note in notes:
            notice(f"note: {note}")
        samples = sum(len(each.samples) for each in profile.devices)
        print_json({"output": str(output), "devices": profile.num_ranks, "samples": samples})
        return
    say(f"{output}: {_summary(profile, measured, differing=speeds is not None or bool(slower))}")
    for note in notes:
        warn(f"note: {note}")


def _factors(given: Iterable[str]) -> dict[int, float]:
    """3:1.3 by rank."""
    factors = dict[int, float]()
    for each in given:
        rank, _, factor = each.partition(":")
        try:
            number, times = int(rank), float(factor)
        except ValueError:
            raise InputError("--slower", each, "a rank and a factor, like 3:1.3") from None
        if number in factors:
            raise InputError("--slower", each, f"rank {number} once")
        factors[number] = times
    return factors


def _summary(profile: Profile, measured: int, *, differing: bool) -> str:
    samples = sum(len(each.samples) for each in profile.devices)
    count = profile.num_ranks
    if count == 1:
        return f"1 device, {counted(samples, 'sample')}; a placement needs several: --ranks N makes N equal ones"
    kind = "equal " if count > measured and not differing else ""
    return f"{count} {kind}devices, {samples} samples"
