"""`gemopt export`, `gemopt engines` and `gemopt placement import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemopt.cli.app import app, examples, notice, placement_app, print_json, say, show, tell
from gemopt.cli.options import AsJson, engine_names, note_doubts
from gemopt.cli.outputs import check_outputs
from gemopt.cli.progress import progress as shown
from gemopt.exceptions import InputError, refuse_unused
from gemopt.words import counted

if TYPE_CHECKING:
    from gemopt.formats.engine import Engine, Export
    from gemopt.placement import Placement

PERMUTED = ("checkpoint",)
HiddenLayers = Annotated[int | None, typer.Option("--num-hidden-layers", min=1, help="decoder layers of the network")]


@app.command(
    epilog=examples(
        "gemopt export placement.json --to sglang -o map.json",
        "gemopt export placement.json --to vllm-ascend --approximate -o map.json",
        "gemopt export placement.json --to checkpoint --source MODEL -o PERMUTED",
    ),
)
def export(
    placement: Annotated[Path, typer.Argument(help="placement.json or result.json")],
    to: Annotated[str, typer.Option("--to", help="engine; see `gemopt engines`", autocompletion=engine_names)],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write (a folder for checkpoints)")],
    decode: Annotated[
        Path | None, typer.Option(help="placement of the decode servers; the first one is then that of prefill")
    ] = None,
    ep: Annotated[int | None, typer.Option("--ep", min=1, help="ranks to export for; refused if they differ")] = None,
    num_hidden_layers: HiddenLayers = None,
    model: Annotated[str | None, typer.Option(help="network to start, by name or path, instead of the traces'")] = None,
    mtp_layers: Annotated[int, typer.Option(min=0, max=64, help="draft (MTP) layers of the network")] = 0,
    approximate: Annotated[bool, typer.Option("--approximate", help="convert what the engine cannot express")] = False,
    profile: Annotated[Path | None, typer.Option(help="price the conversion: profile.json")] = None,
    traces: Annotated[Path | None, typer.Option(help="price the conversion: traces")] = None,
    devices: Annotated[str | None, typer.Option(help="uuids of the ranks' devices now, comma separated")] = None,
    source: Annotated[Path | None, typer.Option(help="checkpoint to permute (--to checkpoint)")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a placement for a serving engine and print the command that starts it."""
    from gemopt.formats.engine import check_network, of_network
    from gemopt.formats.registry import canonical, get

    to = canonical(to)
    check_network(model, "--model")
    if source is not None and to not in PERMUTED:
        raise InputError("--source", str(source), f"{to} takes no checkpoint", "leave it out, or give --to checkpoint")
    if (profile or traces) and not approximate:
        raise InputError("--profile, --traces", str(profile or traces), "they price a conversion", "give --approximate")
    given = [(placement, None)] if decode is None else [(placement, "prefill"), (decode, "decode")]
    targets = [output.with_stem(f"{output.stem}.{role}") if role else output for _, role in given]
    if decode is not None and to in PERMUTED:
        raise InputError("--decode", str(decode), "one placement per checkpoint", "export the two one after the other")
    if to not in PERMUTED:
        outputs = [("--output", path, get(to).document) for path in targets]
        check_outputs(*outputs, read=[("a placement", path) for path, _ in given])
    else:
        options = {"--approximate": approximate or None, "--mtp-layers": mtp_layers or None}
        refuse_unused(options, "a checkpoint is permuted as the placement says")
    prepared: list[tuple[Placement, list[str]]] = []
    for path, _ in given:
        ready, notes = _loaded(path, ep, num_hidden_layers), list[str]()
        if approximate:
            ready, notes = _approximated(ready, get(to), profile, traces)
        ready, moved = _on_devices(ready, devices)
        ready, named = of_network(ready, model)
        prepared.append((ready, notes + moved + named))
    if to in PERMUTED:
        results = [_permuted(prepared[0][0], source, output)]
    else:
        results = _written([ready for ready, _ in prepared], to, targets, [role for _, role in given], mtp_layers)
    reports = [
        _report(ready, result, notes, role)
        for (ready, notes), result, (_, role) in zip(prepared, results, given, strict=True)
    ]
    if as_json:
        print_json(reports if decode is not None else reports[0])
        return
    for report in reports:
        _show(report)


def _loaded(path: Path, ep: int | None, num_hidden_layers: int | None) -> Placement:
    """The placement of a file, which is of so many ranks and decoder layers."""
    from gemopt.placement import Placement

    placement = Placement.load(path)
    if ep is not None and ep != placement.num_ranks:
        raise InputError(
            "--ep", ep, f"the {counted(placement.num_ranks, 'rank')} of {path}", f"solve for {counted(ep, 'rank')}"
        )
    if num_hidden_layers is None:
        return placement
    known = placement.num_hidden_layers
    if known not in (None, num_hidden_layers):
        raise InputError("--num-hidden-layers", num_hidden_layers, f"{known}, as {path} says")
    return placement.changed(num_hidden_layers=num_hidden_layers)


def _on_devices(placement: Placement, wanted: str | None) -> tuple[Placement, list[str]]:
    """The placement on devices in the order wanted, or a warning where those here are in another one."""
    from gemopt.formats import devices

    if wanted is not None:
        return devices.follow(placement, wanted.split(","))
    strange = "" if placement.device_uuids is None else devices.compare(placement, devices.present())
    return placement, [f"warning: {strange}"] if strange else []


def _approximated(
    placement: Placement, engine: Engine, profile: Path | None, traces: Path | None
) -> tuple[Placement, list[str]]:
    from gemopt.evaluate import evaluate
    from gemopt.formats.approximate import approximate
    from gemopt.profile import Profile
    from gemopt.traces import Traces

    if (profile is None) != (traces is None):
        raise InputError("--profile, --traces", "one of them", "both, to price the conversion, or neither")
    if profile is None or traces is None:
        return approximate(placement, engine)
    loaded, devices = Traces.load(traces), Profile.load(profile)
    note_doubts(devices, loaded)

    def cost(candidate: Placement) -> float:
        return evaluate(candidate, devices, loaded).objective_us

    before = cost(placement)
    chosen, notes = approximate(placement, engine, loads=loaded.counts.mean(axis=0), cost=cost)
    if notes:
        after = cost(chosen)
        share = 100 * (after - before) / before if before else 0.0
        notes.append(
            f"this changes the time of {counted(loaded.num_steps, 'step')} by {after - before:+z.1f} us "
            f"({share:+z.2f} %)"
        )
    return chosen, notes


def _permuted(placement: Placement, source: Path | None, path: Path) -> Export:
    from gemopt.executor.checkpoint import export_checkpoint, unnamed_weights
    from gemopt.formats.engine import Export
    from gemopt.models import model_path

    if source is None:
        raise InputError("--source", None, "the folder of the checkpoint to permute", "give --source CHECKPOINT")
    source = Path(model_path(source))
    with shown("files of weights") as progress:
        export_checkpoint(placement, source, path, progress=progress)
    notes = [f"Load it with {placement.num_ranks} expert-parallel ranks, experts split in order."]
    if left := unnamed_weights(source):
        notes.append(f"{', '.join(left)} left out: the index does not name them.")
    return Export(files=(str(path),), command="", notes=tuple(notes))


def _written(
    placements: list[Placement], to: str, paths: list[Path], roles: list[str | None], mtp_layers: int
) -> list[Export]:
    """All of them, or none: the second of a pair must not fail when the first is written."""
    from gemopt.formats.engine import WriteOptions
    from gemopt.formats.registry import check, export, get

    options = [WriteOptions(role=role, mtp_layers=mtp_layers) for role in roles]
    files = list(zip(placements, paths, options, strict=True))
    for placement, path, option in files:
        check(placement, get(to), path=path, options=option)
    return [export(placement, to=to, path=path, options=option) for placement, path, option in files]


def _report(placement: Placement, result: Export, notes: list[str], role: str | None) -> dict[str, Any]:
    return {
        "role": role,
        "files": list(result.files),
        "command": result.command,
        "devices": placement.device_uuids,
        "changes": notes,
        "notes": list(result.notes),
    }


def _show(report: dict[str, Any]) -> None:
    if report["role"]:
        say(f"{report['role']}:")
    say("wrote " + ", ".join(report["files"]))
    if report["command"]:
        say("start: " + report["command"])
    if report["devices"]:
        say("ranks: " + ", ".join(f"{rank} = {uuid or 'unknown'}" for rank, uuid in enumerate(report["devices"])))
    for text in report["changes"]:
        (notice if text.startswith("warning") else say)(text)
    for text in report["notes"]:
        say("note: " + text)


@app.command(name="engines", epilog=examples("gemopt engines --json"))
def engines_command(as_json: AsJson = False) -> None:
    """What each serving engine can express, take and record."""
    from rich.table import Table

    from gemopt.formats.registry import engines

    rows = [_capabilities(engine) for engine in engines()]
    if as_json:
        print_json(rows)
        return
    flags = {
        "export": "writes",
        "import": "reads",
        "traces": "traces",
        "copies": "replicas",
        "unequal": "unequal_slots",
        "empty": "empty_slots",
        "dense": "dense_rows",
        "groups": "group_limits",
    }
    table = Table("engine", *flags, "split", box=None, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = True
    for row in rows:
        marks = ["yes" if row[flag] else "-" for flag in flags.values()]
        table.add_row(row["name"], *marks, row["splits"][0] if row["splits"] and row["replicas"] else "-")
    show(table)
    for row in rows:
        splits = "copies share the load as " + ", ".join(row["splits"]) if row["replicas"] else ""
        said = [row["versions"], row["placement"], *row["traces"], splits, row["note"]]
        tell(f"{row['name']}: " + "; ".join(text for text in said if text))


def _capabilities(engine: Engine) -> dict[str, Any]:
    names = ("name", "versions", "placement", "replicas", "unequal_slots", "empty_slots", "dense_rows", "group_limits")
    return {
        **{name: getattr(engine, name) for name in names},
        "splits": list(engine.splits),
        "writes": engine.write is not None or engine.name in PERMUTED,
        "reads": engine.read is not None,
        "traces": list(engine.traces),
        "note": engine.note,
    }


@placement_app.command(
    name="import", epilog=examples("gemopt placement import map.json --from sglang --ep 8 -o placement.json")
)
def import_placement(
    path: Annotated[Path, typer.Argument(help="the engine's placement file")],
    source: Annotated[
        str,
        typer.Option("--from", help="engine that it is written for; see `gemopt engines`", autocompletion=engine_names),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="placement.json to write")],
    ep: Annotated[int | None, typer.Option("--ep", min=1, help="ranks that share the slots")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="experts of a layer")] = None,
    layer_ids: Annotated[str | None, typer.Option(help="decoder layers with experts, like 3-60")] = None,
    num_hidden_layers: HiddenLayers = None,
    model: Annotated[str | None, typer.Option(help="name of the network")] = None,
    as_json: AsJson = False,
) -> None:
    """Read the placement of a serving engine."""
    from gemopt.formats.engine import Facts
    from gemopt.formats.layers import parse_layers
    from gemopt.formats.registry import import_placement as read

    check_outputs(("--output", output, "placement"), read=[("the engine", path)])
    notes: list[str] = []
    facts = Facts(
        notes=notes,
        num_ranks=ep,
        num_experts=num_experts,
        layer_ids=parse_layers(layer_ids),
        num_hidden_layers=num_hidden_layers,
        model=model,
    )
    placement = read(path, source=source, facts=facts)
    placement.save(output)
    sizes = {
        "output": str(output),
        "layers": placement.num_layers,
        "experts": placement.num_experts,
        "ranks": placement.num_ranks,
        "slots": placement.num_slots,
    }
    if as_json:
        print_json({**sizes, "notes": notes})
        return
    for line in [f"wrote {output}: {placement.brief()}", *(f"note: {note}" for note in notes)]:
        say(line)
