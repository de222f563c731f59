"""Command `gemopt apply`: plan a migration, or carry one out on the ranks that torchrun started."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemopt.cli.app import app, examples, print_json, say, show
from gemopt.cli.moves import parse_bytes
from gemopt.cli.options import MOST_BYTES, AsJson, leave_group
from gemopt.exceptions import InputError, refuse_unused
from gemopt.words import counted

if TYPE_CHECKING:
    from gemopt.executor.plan import Plan
    from gemopt.placement import Placement

GIB = 1 << 30


class LayoutName(StrEnum):
    """Whether the ranks share a batch or each have their own."""

    SHARED = "shared"
    OWN = "own"


@app.command(
    epilog=examples(
        "gemopt apply placement.json --model tiny-moe --dry-run",
        "torchrun --nproc-per-node 4 --no-python gemopt apply placement.json --model CHECKPOINT",
    ),
)
def apply(
    placement: Annotated[Path, typer.Argument(help="placement.json or result.json to put in force")],
    model: Annotated[Path | None, typer.Option(help="checkpoint folder, or tiny-moe")] = None,
    current: Annotated[Path | None, typer.Option(help="placement.json in force; default: contiguous")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would move")] = False,
    at_load: Annotated[bool, typer.Option("--at-load", help="permute the checkpoint in memory while loading")] = False,
    layout: Annotated[LayoutName, typer.Option(help="ranks share a batch, or each have their own")] = LayoutName.SHARED,
    expert_bytes: Annotated[
        float | None, typer.Option(min=1, max=MOST_BYTES, help="weights of one expert, without --model")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="GiB a rank may use for what it receives")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="default: all ranks on one node")] = None,
    node_gbps: Annotated[float, typer.Option(min=1e-3, help="GB/s of a rank inside a node, for the estimate")] = 50.0,
    cross_gbps: Annotated[float, typer.Option(min=1e-3, help="GB/s of a rank between nodes, for the estimate")] = 10.0,
    timeout: Annotated[float, typer.Option(min=1, help="seconds a layer may take")] = 60.0,
    profile: Annotated[Path | None, typer.Option(help="profile.json of the ranks, for the optimal split")] = None,
    as_json: AsJson = False,
) -> None:
    """Move experts of a live model to a placement; with --dry-run say what would move, and stop.

    Without --dry-run, start it on every rank.
    """
    from gemopt.costs import fit
    from gemopt.models import model_path
    from gemopt.placement import Placement, Split
    from gemopt.profile import Profile

    if dry_run and at_load:
        raise InputError("--at-load", "--dry-run", "one of the two", "nothing moves when loading permuted")
    budget_bytes = None if budget is None or math.isinf(budget) else int(budget * GIB)
    wanted = Placement.load(placement)
    if at_load:
        moving = {"--current": current, "--budget": budget, "--ranks-per-node": ranks_per_node}
        refuse_unused(moving, "not with --at-load: nothing moves")
    if dry_run or at_load or wanted.split is not Split.OPTIMAL:
        refuse_unused({"--profile": profile}, "for ranks that serve copies under the optimal split")
    if model is not None:
        refuse_unused({"--expert-bytes": expert_bytes}, "without --model, whose experts have their own size")
        model = Path(model_path(model))
    if dry_run:
        steps = dry_plan(wanted, current, model, parse_bytes(expert_bytes), ranks_per_node, budget_bytes)
        _show(describe(steps, node_gbps, cross_gbps), as_json, "would move")
        return
    if model is None:
        raise InputError("--model", None, "the checkpoint folder to load", "or --dry-run to plan only")
    if "WORLD_SIZE" not in os.environ:
        raise InputError(
            "WORLD_SIZE", None, "ranks to run on", "start with torchrun --nproc-per-node N --no-python gemopt apply ..."
        )
    ranks = wanted.num_ranks
    if str(ranks) != os.environ["WORLD_SIZE"]:
        started = f"torchrun started {os.environ['WORLD_SIZE']}"
        raise InputError("Placement.slots_per_rank", f"{ranks} ranks", started, f"--nproc-per-node {ranks}")
    with ExitStack() as end:
        end.callback(leave_group)
        if at_load:
            report = _apply_at_load(placement, model, layout)
        else:
            cost = None if profile is None else fit(Profile.load(profile))[0]
            settings = {
                "timeout_s": timeout, "ranks_per_node": ranks_per_node, "budget_bytes": budget_bytes, "cost": cost
            }  # fmt: skip
            report = _apply_live(placement, current, model, layout, settings, (node_gbps, cross_gbps))
        if int(os.environ.get("RANK", "0")) == 0:
            _show(report, as_json, "loaded" if at_load else "moved")


def dry_plan(
    wanted: Placement,
    current: Path | None,
    model: Path | None,
    expert_bytes: int | None,
    ranks_per_node: int | None,
    budget_bytes: int | None,
) -> Plan:
    """The plan from files alone; without a model and `expert_bytes` an expert counts as 0 bytes."""
    from gemopt.executor.checkpoint import expert_sizes
    from gemopt.executor.plan import layer_rows, plan
    from gemopt.placement import Placement

    layers, ranks = wanted.num_layers, wanted.num_ranks
    before = Placement.contiguous(layers, wanted.num_experts, ranks) if current is None else Placement.load(current)
    if current is not None and list(before.layer_ids) != list(wanted.layer_ids):
        raise InputError("Placement.layer_ids", wanted.layer_ids, f"--current has {list(before.layer_ids)}")
    sizes = [expert_bytes or 0] * layers if model is None else expert_sizes(model, wanted)
    if budget_bytes is not None and not any(sizes):
        given, limit = f"{budget_bytes / GIB:g} GiB", "the size of an expert must be known"
        raise InputError("--budget", given, limit, "give --model or --expert-bytes")
    nodes = [rank // (ranks_per_node or ranks) for rank in range(ranks)]
    return plan(layer_rows(before), layer_rows(wanted), sizes, nodes=nodes, budget_bytes=budget_bytes)


def describe(steps: Plan, node_gbps: float, cross_gbps: float) -> dict[str, Any]:
    """What a plan moves, in bytes, and how long that should take; None where the size of an expert is unknown."""
    from gemopt.migration import Link

    count, size, known = steps.count(), steps.bytes(), any(steps.expert_bytes)
    return {
        "stay": steps.stays,
        "moves": {link.value: count[link] for link in Link},
        "bytes": {link.value: size[link] if known else None for link in Link},
        "stages": len(steps.stages),
        "layers": len({stage.layer for stage in steps.stages}),
        "buffer_bytes": steps.buffer_bytes() if known else None,
        "estimate_s": steps.seconds(node_gbps=node_gbps, cross_gbps=cross_gbps) if known else None,
    }


def _apply_live(
    wanted: Path,
    current: Path | None,
    model: Path,
    layout: LayoutName,
    settings: dict[str, Any],
    rates: tuple[float, float],
) -> dict[str, Any]:
    from gemopt.executor import Executor
    from gemopt.executor import load as loading

    live = loading.load(model, loading.layout(layout.value, int(os.environ["WORLD_SIZE"])))
    executor = Executor(live, **settings)
    if current is not None:
        executor.apply(current)
    start = time.perf_counter()
    steps = executor.apply(wanted, probe=_probe_batch(live))
    elapsed = time.perf_counter() - start
    executor.verify()
    return {**describe(steps, *rates), "elapsed_s": elapsed, "checksum": executor.checksum()}


def _apply_at_load(placement: Path, model: Path, layout: LayoutName) -> dict[str, Any]:
    import torch

    from gemopt.executor import load as loading
    from gemopt.placement import Placement

    wanted = Placement.load(placement)
    outputs = []
    for permuted in (False, True):
        config = loading.layout(layout.value, wanted.num_ranks, "auto")
        live = loading.load_permuted(model, wanted, config) if permuted else loading.load(model, config)
        with torch.no_grad():
            outputs.append(live(**_probe_batch(live)).logits)
        del live
    error = float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
    limit = float(torch.finfo(outputs[0].dtype).eps) ** 0.5
    if not error <= limit:
        raise InputError("probe", f"outputs differ by {error:.2g}", f"at most {limit:.2g}")
    return {"layers": wanted.num_layers, "probe_error": error}


def _probe_batch(model: Any) -> dict[str, Any]:
    """A small batch of random tokens, the same on every rank."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return {"input_ids": torch.randint(0, vocabulary, (2, 16), generator=generator).to(model.device)}


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f}"


def _show(report: dict[str, Any], as_json: bool, verb: str) -> None:
    if as_json:
        print_json(report)
        return
    from rich.table import Table

    if "moves" in report:
        table = Table(title=f"{verb}: {counted(sum(report['moves'].values()), 'expert')}, {report['stay']} stay")
        for column in ("from", "experts", "MiB"):
            table.add_column(column, justify="left" if column == "from" else "right")
        names = {
            "local": "the same rank",
            "node": "a rank of the node",
            "cross": "another node",
            "relay": "a rank of the node that just received it",
        }
        for link, name in names.items():
            table.add_row(name, str(report["moves"][link]), _mib(report["bytes"][link]))
        show(table)
        line = f"{counted(report['stages'], 'commit')} in {counted(report['layers'], 'layer')}"
        if report["buffer_bytes"] is None:
            line += "; sizes are unknown: give --model or --expert-bytes"
        else:
            line += f", buffer {_mib(report['buffer_bytes'])} MiB"
        if report["estimate_s"] is not None:
            line += f", estimated {report['estimate_s']:.3f} s"
        say(line)
    if "probe_error" in report:
        say(f"{counted(report['layers'], 'layer')} {verb} permuted; outputs differ by {report['probe_error']:.1e}")
    if "checksum" in report:
        say(f"took {report['elapsed_s']:.3f} s with two probes; placement in force {report['checksum'][:12]}")
