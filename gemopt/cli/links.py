"""Options of commands that take links between ranks, and the command `gemopt topology`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemopt.cli.app import app, console, examples, notice, print_json
from gemopt.cli.options import AsJson
from gemopt.cli.outputs import check_outputs
from gemopt.exceptions import InputError
from gemopt.words import counted

if TYPE_CHECKING:
    from gemopt.links import Exchange
    from gemopt.profile import Profile
    from gemopt.topology import Topology

ONCE_PER = ("assignment", "rank", "node")
TopologyName = Annotated[
    str | None, typer.Option("--topology", help="links between ranks: topology.json, or a name such as 2x8-ib400")
]
OncePer = Annotated[str | None, typer.Option("--once-per", help="a token goes to each assignment, rank or node once")]
TokensFrom = Annotated[
    str | None, typer.Option("--tokens-from", help="where tokens start: recorded, uniform or previous")
]
TokenBytes = Annotated[
    str | None, typer.Option("--token-bytes", help="bytes of a token, or of dispatch and combine: 2880,5760")
]
ComputeSlack = Annotated[
    float | None,
    typer.Option(
        "--compute-slack", help="fewest bytes between nodes for at most this part more compute: 0.005 is 0.5 %"
    ),
]
Overlap = Annotated[bool, typer.Option("--overlap", help="communication hides behind computing")]


def parse_exchange(
    topology: str | None, once_per: str | None, tokens_from: str | None, token_bytes: str | None, overlap: bool
) -> Exchange | None:
    """How tokens are exchanged; None without a topology, which all of it needs."""
    from gemopt.links import Exchange

    given = {
        "--once-per": once_per,
        "--tokens-from": tokens_from,
        "--token-bytes": token_bytes,
        "--overlap": overlap or None,
    }
    if topology is None:
        for name, value in given.items():
            if value is not None:
                raise InputError(name, value, "says how tokens go over links", "give --topology")
        return None
    for name, value, known in (
        ("--once-per", once_per, ONCE_PER),
        ("--tokens-from", tokens_from, ("recorded", "uniform", "previous")),
    ):
        if value is not None and value not in known:
            raise InputError(name, value, f"one of {', '.join(known)}")
    sizes: list[int | None] = [None, None]
    if token_bytes is not None:
        try:
            numbers = [int(part) for part in token_bytes.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or min(numbers) <= 0:
            raise InputError("--token-bytes", token_bytes, "one whole number above 0, or two: dispatch,combine")
        sizes = [numbers[0], numbers[-1]]
    return Exchange.model_validate(
        {
            "dispatch_bytes": sizes[0],
            "combine_bytes": sizes[1],
            "once_per": once_per or "rank",
            "senders": tokens_from,
            "overlap": overlap,
        }
    )


def doubt(topology: str | None, profile: Profile) -> None:
    """Say on standard error what is hardly right about links that were given for the devices of a profile."""
    from gemopt.topology import load
    from gemopt.topology.doubts import doubts

    for each in [] if topology is None else doubts(load(topology), profile.devices):
        notice(f"note: {each}")


@app.command(
    "topology",
    epilog=examples(
        "gemopt topology 2x8-ib400",
        "gemopt topology 2x8-ib400 -o topology.json",
        "gemopt topology wideep_deepep_ll_perf.parquet --where node_num=2 --where hidden_size=7168 --where num_topk=8 "
        "--where num_experts=256 --where phase=combine --inside nvlink-8 -o topology.json",
    ),
)
def topology_command(
    source: Annotated[str, typer.Argument(help="a name such as 2x8-ib400, or a file", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="topology.json to write")] = None,
    like: Annotated[
        str | None, typer.Option("--like", help="named topology whose speeds a rank_cost_matrix takes on")
    ] = None,
    inside: Annotated[
        str | None, typer.Option("--inside", help="topology for within a node, where something ran between them")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="only these rows of a table; repeatable")
    ] = None,
    token_bytes: Annotated[
        int | None, typer.Option("--token-bytes", min=1, help="of a token as measured, where a table does not tell")
    ] = None,
    once_per: OncePer = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", min=1, help="nodes of a table that does not tell; of nccl-tests 1 where NVLink joins all hosts"
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show, write or import links: a name, topology.json, nccl-tests output, rank_cost_matrix, measured tables."""
    from gemopt.formats.links import read_links
    from gemopt.topology.doubts import doubts

    if once_per is not None and once_per not in ONCE_PER:
        raise InputError("--once-per", once_per, f"one of {', '.join(ONCE_PER)}")
    check_outputs(("--output", output, "topology"), read=[("the source", Path(source))])
    found = read_links(
        source, like=like, inside=inside, where=where or (), token_bytes=token_bytes, once_per=once_per, nodes=nodes
    )
    if output is not None:
        found.save(output)
    if as_json:
        print_json(found.model_dump(mode="json"))
    for line in [] if as_json else described(found):
        console.print(line, highlight=False)
    for each in doubts(found):
        notice(f"note: {each}")
    if as_json:
        return 0
    if output is not None:
        console.print(f"wrote {output}")
    return 0


def described(topology: Topology) -> list[str]:
    """Lines for people."""
    from gemopt.topology import LEVELS

    racks = "" if topology.num_racks == 1 else f" in {counted(topology.num_racks, 'rack')}"
    ranks, nodes = counted(topology.num_ranks, "rank"), counted(topology.num_nodes, "node")
    lines = [f"{topology.name or 'topology'}: {ranks} on {nodes}{racks}"]
    for name in LEVELS:
        level = getattr(topology, name)
        if level is None:
            continue
        if level.points is None:
            speed = f"{level.bandwidth_gbs:g} GB/s ({8 * level.bandwidth_gbs:g} Gb/s), {level.latency_us:g} us"
        else:
            (low, first), (high, last) = level.points[0], level.points[-1]
            ends = f"{first:g} us for {low:,.0f} bytes to {last:g} us for {high:,.0f}"
            speed = f"{counted(len(level.points), 'point')}, {ends}"
        lines.append(f"{name.replace('_', ' ')}: {speed}, a port per {level.port_of}")
    if (pairs := topology.pair_bandwidth_gbs) is not None:
        most = max(float(row.sum() - row[rank]) for rank, row in enumerate(pairs))
        lines.append(f"a link from every rank to every other, up to {most:g} GB/s out of a rank over all of them")
    if topology.source:
        lines.append(f"source: {topology.source}")
    return lines
