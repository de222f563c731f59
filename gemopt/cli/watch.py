"""`gemopt watch`: follow a growing trace folder and keep the placement right."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemopt.cli.app import app, examples, say, warn
from gemopt.cli.outputs import check_outputs
from gemopt.exceptions import InputError

if TYPE_CHECKING:
    from gemopt.online.controller import Controller
    from gemopt.online.policy import Policy
    from gemopt.online.watch import Actions
    from gemopt.placement import Placement
    from gemopt.traces import Traces

LOCAL = "127.0.0.1"


@app.command(
    epilog=examples(
        "gemopt watch traces/ --profile profile.json --placement placement.json --once",
        "gemopt watch traces/ --profile profile.json --placement placement.json --to sglang --port 9400",
    ),
)
def watch(
    folder: Annotated[Path, typer.Argument(help="folder that grows: numbered traces, or an engine's dumps (--from)")],
    profile: Annotated[Path, typer.Option(help="profile.json")],
    placement: Annotated[Path, typer.Option(help="the placement in force; a new one replaces it, unless -o")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="where new placements go instead")] = None,
    to: Annotated[list[str] | None, typer.Option("--to", help="also export: ENGINE, or ENGINE=FILE")] = None,
    source: Annotated[str | None, typer.Option("--from", help="engine whose dumps the folder gets")] = None,
    ep: Annotated[int | None, typer.Option("--ep", min=1, help="ranks whose dumps are waited for")] = None,
    on_change: Annotated[str | None, typer.Option(help="command after a change; {placement} is its file")] = None,
    command_timeout: Annotated[float, typer.Option(min=0.1, max=1e6, help="seconds the command may take")] = 60.0,
    rules: Annotated[Path | None, typer.Option(help="rules.json to keep; default: those of the placement")] = None,
    senders: Annotated[str | None, typer.Option(help="who sends to copies of the nearest split: uniform")] = None,
    policy: Annotated[Path | None, typer.Option(help="policy.json: the controller's knobs; see docs/online.md")] = None,
    state: Annotated[Path | None, typer.Option(help="file that keeps what was learnt over a restart")] = None,
    window: Annotated[int, typer.Option(min=1, help="most steps of one decision")] = 64,
    interval: Annotated[float, typer.Option(min=0.05, max=1e6, help="seconds between two looks at the folder")] = 5.0,
    port: Annotated[int | None, typer.Option(help="serve /metrics (Prometheus) and /healthz; 0: any port")] = None,
    host: Annotated[str, typer.Option(help="address to serve on")] = LOCAL,
    once: Annotated[bool, typer.Option("--once", help="one look, one decision, and out")] = False,
) -> None:
    """Follow a growing trace folder: decide, write the placement, export it, run a command, serve metrics."""
    from gemopt.formats.registry import get
    from gemopt.online.follow import PATIENCE, Follower
    from gemopt.online.given import Given
    from gemopt.online.metrics import Health, Metrics, serve
    from gemopt.online.sole import sole
    from gemopt.online.watch import Actions, Watch
    from gemopt.solving.first_use import ONCE, told_of

    if folder.exists() and not folder.is_dir():
        raise InputError("folder", str(folder), "a folder of numbered traces or of an engine's dumps, no file")
    if once and not folder.exists():
        raise InputError("folder", str(folder), "a folder that is there for one look", "leave out --once to wait")
    if ep is not None and source is None:
        raise InputError("--ep", ep, "ranks that write dumps of an engine", "give --from, as in --from sglang")
    if port is None and host != LOCAL:
        raise InputError("--host", host, "where to serve on a port", "give --port")
    target = output or placement
    exports = _exports(target, to or [])
    same = os.path.realpath(target) == os.path.realpath(placement)
    written = [
        ("--placement" if same else "--output", target, "placement"),
        ("--state", state, "traces"),  # begins as they do; what is no state is refused when it is read
        *((f"--to {name}", path, get(name).document) for name, path in exports),
    ]
    given = [("--profile", profile), ("--rules", rules), ("--policy", policy), ("--placement", placement)]
    check_outputs(*written, read=given)
    with ExitStack() as held:
        for _, path, _ in written:
            if path is not None:
                held.enter_context(sole(path))
        read_once = Given(path for path in (profile, rules, policy, None if same else placement) if path is not None)
        controller = _controller(profile, placement, rules, senders, policy)
        read, suffixes = (None, ()) if source is None else _reader(source, ep, controller.placement)
        follower = Follower(folder, read, suffixes=suffixes, patience=1 if once else PATIENCE)
        in_force = controller.placement
        actions = Actions(target, _writes(target, exports, in_force), _words(on_change), command_timeout, in_force)
        if state is not None and state.exists():
            follower.resume(controller.load(state))
        controller.confirm(in_force if same else _last(actions, controller.placement))
        metrics = None if port is None else Metrics()
        health = Health(stale_after_s=max(60.0, 10 * interval))
        if metrics is not None and port is not None:
            server = serve(metrics, health, port, host)
            held.callback(server.server_close)
            held.callback(server.shutdown)
            _log(f"serving http://{host}:{server.server_port}/metrics and /healthz")
        with told_of(_log, ONCE):
            controller.warm()
        watched = Watch(controller, follower, actions, _log, metrics, health, state, window, read_once)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            held.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
        watched.run(interval, stop, once=once)
    if once and watched.failed:
        raise typer.Exit(1)


def _log(text: str) -> None:
    (warn if text.startswith("warning") else say)(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}")


def _words(command: str | None) -> Sequence[str]:
    if command is None:
        return ()
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError("--on-change", command, str(error), "quote it as for a shell") from None
    if not words or shutil.which(words[0]) is None:
        raise InputError("--on-change", command, "a command that can be run")
    return words


def _controller(
    profile: Path, placement: Path, rules: Path | None, senders: str | None, policy: Path | None
) -> Controller:
    from gemopt.migration import size_doubts
    from gemopt.online.controller import Controller
    from gemopt.online.policy import Policy
    from gemopt.placement import Placement
    from gemopt.profile import Profile
    from gemopt.rules import Rules

    in_force, measured = Placement.load(placement), Profile.load(profile)
    if rules is not None:
        in_force = in_force.under(Rules.load(rules), measured.node_of_rank)
    if in_force.rules is not None:
        _log(f"keeps rules: {in_force.rules.brief()}")
    found = Controller(measured, in_force, Policy() if policy is None else _policy(policy), senders=senders)
    for each in size_doubts(found.expert_bytes, found.policy.bytes_per_s / 1e9):
        _log(f"note: {each}")
    return found


def _policy(path: Path) -> Policy:
    from gemopt.documents import read_json
    from gemopt.online.policy import Policy

    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: policy", content, "a JSON object", "see docs/online.md")
    try:
        return Policy(**content)
    except InputError as error:
        raise error.about(f"{path}: {error.field.partition('.')[2]}") from None


def _last(actions: Actions, learnt: Placement) -> Placement:
    """What is in force where placements go to a file of their own: what a watch has put there, as its state says."""
    from gemopt.online.watch import serve_alike

    in_force, theirs, actions.holds = actions.holds, actions.replaced(), None
    assert in_force is not None
    if theirs is None:
        return in_force
    if serve_alike(theirs, learnt):
        _log(f"goes on from {actions.path}, where it has put the placement in force")
        return theirs
    _log(f"warning: {actions.path}: holds another placement, which is taken to be out of force and will be replaced")
    return in_force


def _exports(target: Path, to: Sequence[str]) -> list[tuple[str, Path]]:
    """Engines and their files, which lie beside the placement unless named."""
    from gemopt.formats.registry import get

    found = []
    for each in to:
        name, _, file = each.partition("=")
        suffixes = get(name).suffixes
        beside = target.with_name(f"{target.stem}.{name}{suffixes[0] if suffixes else '.json'}")
        found.append((name, Path(file) if file else beside))
    return found


def _writes(
    target: Path, exports: Sequence[tuple[str, Path]], in_force: Placement
) -> list[Callable[[Placement], object]]:
    """What saves a placement: its exports, then itself; what an engine cannot take of the one in force is refused."""
    from gemopt.formats.engine import WriteOptions
    from gemopt.formats.registry import check, export, get

    for name, path in exports:
        check(in_force, get(name), path=path, options=WriteOptions())
    writes: list[Callable[[Placement], object]] = [
        partial(export, to=name, path=path, options=WriteOptions()) for name, path in exports
    ]
    return [*writes, lambda placement: placement.save(target)]


def _reader(
    source: str, ep: int | None, placement: Placement
) -> tuple[Callable[[Sequence[Path]], Traces], Sequence[str]]:
    """What reads an engine's new files through its importer, and how their names end."""
    from gemopt.formats.engine import TraceOptions
    from gemopt.formats.importing import import_traces
    from gemopt.formats.registry import recorder
    from gemopt.traces import Traces

    dumps = recorder(source, ep).dumps
    options = TraceOptions(
        num_experts=placement.num_experts,
        layer_ids=tuple(placement.layer_ids),
        num_hidden_layers=placement.num_hidden_layers,
        num_ranks=ep,
    )

    said: set[str] = set()

    def read(files: Sequence[Path]) -> Traces:
        with tempfile.TemporaryDirectory(prefix="gemopt-watch-") as scratch:
            path = Path(scratch) / "traces.safetensors"
            found = import_traces(list(files), source=source, destination=path, options=options)
            for note in found.notes:
                if (kind := re.sub(r"\d+", "", note)) not in said:  # once, whatever its numbers
                    said.add(kind)
                    _log(f"note: {note}")
            return Traces.load(path)

    return read, dumps
