"""Run a job: read, solve, and write the folder."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemopt.documents import write_text
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError, refuse_unused
from gemopt.formats.approximate import approximate
from gemopt.formats.engine import Export, TraceOptions, WriteOptions, check_network, of_network
from gemopt.formats.importing import import_traces
from gemopt.formats.layers import parse_layers
from gemopt.formats.registry import canonical, check_draft, export, get
from gemopt.formats.tables.fleet import check_drawn, serving, slowed
from gemopt.formats.tables.kernel import read_table
from gemopt.jobs.document import ExportTo, Job, Kubernetes, RecordedSource, TableSource
from gemopt.jobs.kubernetes import config_map
from gemopt.jobs.reading import shown
from gemopt.placement import Placement, check_layer_ids
from gemopt.profile import Profile
from gemopt.report import report
from gemopt.report.style import graph_objects
from gemopt.resize import profile_after
from gemopt.result import Result, StoppedBy
from gemopt.solve import solve
from gemopt.solvers import get as solver_of
from gemopt.traces import Phase, Traces
from gemopt.words import outside

OPTION = re.compile(r"--(unit|top-k|ep|where|(?:load|time|device|repeat|sum)-column)\b")
OWN_FILES = ("result.json", "job.json", "profile.json", "placement.json", "configmap.yaml", "report.html")
EXISTS = ("a folder that does not exist yet", "give another with -o")


@dataclass(frozen=True)
class Outcome:
    """What a job made: the result, the files by name in the folder, and what to know.

    `failed`: exports that the placement cannot be written for, in words; everything else is there.
    """

    result: Result
    folder: Path
    files: list[str]
    commands: dict[str, str]
    headline: str = ""
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run_job(
    job: Job,
    *,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Outcome:
    """Solve and write `job.output`. Nothing is written before there is an answer.

    Parameters
    ----------
    command
        What was typed, for the result and the report.

    Raises
    ------
    InputError
        The folder exists, an engine is unknown or takes no placement, an input cannot be used.
    """
    _check(job)
    notes: list[str] = []
    profile, traces = _profile(job.profile, notes), _traces(job.traces, notes)
    traces = traces.select(task=job.steps.task, phase=Phase.named(job.steps.phase, "steps.phase"))
    _check_layers(job, traces)
    given, _ = traces.split(job.steps.holdout) if job.steps.holdout else (traces, None)
    settings, constraints = job.solver, job.constraints
    current = _current(constraints.current, traces, profile)
    options = {**settings.model_dump(exclude={"name"}), **constraints.model_dump(), "current": current}
    options |= {"topology": job.topology, "exchange": job.exchange}
    options["full_slots"] |= constraints.memory_budget is None and _want_full_slots(job)
    with _folder(job.output):
        result = solve(profile, given, solver=settings.name, progress=progress, notice=notice, **options)
        result = result.made_by(command) if command else result
        left = profile_after(current, profile, exclude=constraints.exclude_ranks, add=constraints.add_ranks)
        return _Writer(job, left, traces, given, result, current, notes).write(command)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make the folder before the search, so that its answer has a place; away with it where nothing came into it."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise InputError("output", str(path), *EXISTS) from None
    except OSError as error:
        raise InputError("output", f"{path}: {error.strerror}", "a folder that can be made") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def _current(given: str | Path | None, traces: Traces, profile: Profile) -> Placement | None:
    if given is None:
        return None
    if isinstance(given, Path):
        return Placement.load(given)
    shape = (traces.num_layers, traces.num_experts, profile.num_ranks)
    return Placement.contiguous(*shape, layer_ids=list(traces.layer_ids))


def _want_full_slots(job: Job) -> bool:
    """Whether an engine takes no empty slots, they are not filled after the search, and the solver can heed it."""
    wanting = any(not wanted.approximate and not get(wanted.engine).empty_slots for wanted in job.exports)
    return wanting and solver_of(job.solver.name).supports.policies


def _check(job: Job) -> None:
    """Refuse before the search what could only fail after it."""
    if job.output.exists():
        raise InputError("output", str(job.output), *EXISTS)
    check_network(job.model, "model")
    for wanted in job.exports:
        engine = get(wanted.engine)
        if engine.write is None:
            raise InputError("exports.engine", wanted.engine, engine.note or "takes no placement file")
        check_draft(engine, wanted.mtp_layers)
        if wanted.file is not None and engine.suffixes and Path(wanted.file).suffix not in engine.suffixes:
            raise InputError("exports.file", wanted.file, f"{engine.name} wants {' or '.join(engine.suffixes)}")
    names = [*OWN_FILES, *(name for wanted in job.exports for name in _files(wanted))]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        limit = "a name that the job has no use for" if twice in OWN_FILES else "one name per file"
        raise InputError("exports.file", twice, limit, "give each of them a file")
    if job.report.page:
        graph_objects()
    else:
        told = {"report.baseline": job.report.baseline, "report.replay": job.report.replay}
        refuse_unused({name: path and str(path) for name, path in told.items()}, "is of the page, and there is none")
    if job.kubernetes not in (None, Kubernetes()) and not job.exports:
        raise InputError("kubernetes", "given", "a ConfigMap carries exported maps, and there are none", "add exports")


def _check_layers(job: Job, traces: Traces) -> None:
    hidden = job.num_hidden_layers
    asking = next((get(wanted.engine).name for wanted in job.exports if get(wanted.engine).hidden_layers), None)
    if hidden is None and traces.num_hidden_layers is None and asking is not None:
        raise InputError("num_hidden_layers", None, f"{asking} numbers layers among all decoder layers", "add the key")
    if hidden is not None and traces.num_hidden_layers not in (None, hidden):
        raise InputError("num_hidden_layers", hidden, f"{traces.num_hidden_layers}, as the traces say", "leave it out")
    check_layer_ids(traces.layer_ids, traces.num_layers, hidden)


def _file(wanted: ExportTo) -> str:
    suffix = (get(wanted.engine).suffixes or ("",))[0]
    return wanted.file or f"{canonical(wanted.engine)}{suffix}"


def _files(wanted: ExportTo) -> list[str]:
    """All that an export writes, but its script."""
    name, beside = _file(wanted), Path(_file(wanted))
    return [
        name,
        f"{name}.gemopt.json",
        *([f"{beside.stem}.options.yaml"] if beside.suffix in (".yaml", ".yml") else []),
    ]


def _key(option: re.Match[str]) -> str:
    return f"profile.{option[1].replace('-', '_')}"


def _profile(source: Path | TableSource, notes: list[str]) -> Profile:
    if isinstance(source, Path):
        return Profile.load(source)
    check_drawn(source.speeds, source.fleet, source.memory_fleet, source.seed, "profile.{}".format)
    said: list[str] = []
    try:
        found = read_table(source.table, unit=source.unit, top_k=source.top_k, ep=source.ep, where=source.where,
                           load=source.load_column, time=source.time_column, device=source.device_column,
                           repeat=source.repeat_column, parts=source.sum_column, notes=said)  # fmt: skip
    except InputError as error:
        texts = (OPTION.sub(_key, text) for text in (error.limit, error.hint))
        raise InputError(OPTION.sub(_key, error.field), error.value, *texts) from None
    notes += [OPTION.sub(_key, each) for each in said]
    fields = ("device", "speeds", "fleet", "memory_fleet", "ranks", "seed")
    found = serving(found, notes=notes, **{name: getattr(source, name) for name in fields})
    found = slowed(found, source.slower, notes, "profile.slower.")
    found = found.model_copy(update={"source": f"imported from {', '.join(each.name for each in source.table)}"})
    return found.with_model(name=source.model, expert_bytes=source.expert_bytes, top_k=source.top_k)


def _traces(source: Path | RecordedSource, notes: list[str]) -> Traces:
    if isinstance(source, Path):
        return Traces.load(source)
    fields = source.model_dump(exclude={"engine", "files", "ep", "layer_ids", "phase"})
    phase = Phase.MIXED if source.phase == "all" else Phase.named(source.phase, "traces.phase")
    options = TraceOptions(**fields, num_ranks=source.ep, layer_ids=parse_layers(source.layer_ids), phase=phase)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.safetensors"
        found = import_traces(source.files, source=source.engine, destination=path, options=options)
        notes += [f"traces: {note}" for note in found.notes]
        return Traces.load(path)


class _Writer:
    """Everything that goes into the folder of one job."""

    def __init__(
        self,
        job: Job,
        profile: Profile,
        traces: Traces,
        given: Traces,
        result: Result,
        before: Placement | None,
        notes: list[str],
    ) -> None:
        self.job, self.profile, self.traces, self.result, self.before = job, profile, traces, result, before
        self.given = given  # without the steps that only judge
        self.files: list[str] = []
        cut = result.stopped_by is StoppedBy.INTERRUPT
        late = [f"interrupted after {result.seconds:.1f} s: this is what was found by then"] if cut else []
        self.notes = [*late, *notes, *result.notes]
        self.notes += [doubt] if (doubt := outside(result.outside)) else []
        if job.topology is not None and job.report.page:
            self.notes.append("the report counts what ranks compute, not what links take; result.json has both")
        self.failed: list[str] = []
        self.commands: dict[str, str] = {}

    def write(self, command: str) -> Outcome:
        """Answer first, then what is made of it."""
        self._save("result.json", self.result.save)
        self._text("job.json", shown(self.job, as_json=True))
        self._save("profile.json", self.profile.save)
        headline = ""
        if self.result.placement is not None:
            placement = self._placement(self.result.placement)
            self._save("placement.json", placement.save)
            maps = [each for wanted in self.job.exports for each in self._export(placement, wanted)]
            if self.job.kubernetes is not None and maps:
                self._config_map(self.job.kubernetes, maps)
            if self.job.report.page:
                headline = self._report(command)
        return Outcome(self.result, self.job.output, self.files, self.commands, headline, self.notes, self.failed)

    def _config_map(self, settings: Kubernetes, maps: list[Path]) -> None:
        text, note = config_map(settings, maps)
        self.notes += [note] if note else []
        if text:
            self._text("configmap.yaml", text)

    def _placement(self, found: Placement) -> Placement:
        known = {"num_hidden_layers": found.num_hidden_layers or self.job.num_hidden_layers}
        placement, said = of_network(found.changed(**known), self.job.model)
        self.notes += said
        return placement

    def _export(self, placement: Placement, wanted: ExportTo) -> list[Path]:
        """The engine's files; where it cannot express the placement that is kept for the end."""
        path = self.job.output / _file(wanted)
        engine = get(wanted.engine)
        try:
            if wanted.approximate:
                placement, changes = approximate(placement, engine, loads=self.given.counts.mean(axis=0),
                                                 cost=self._cost)  # fmt: skip
                self.notes += [f"{engine.name}: {each}" for each in changes]
            made: Export = export(
                placement, to=engine.name, path=path, options=WriteOptions(mtp_layers=wanted.mtp_layers)
            )
        except InputError as error:
            self.failed.append(f"exports, {engine.name}: {error}")
            return []
        self.files += [Path(each).name for each in made.files]
        self.notes += [f"{engine.name}: {each}" for each in made.notes]
        if made.command:
            self.commands[engine.name] = made.command
            text = "#!/bin/sh\n# " + "\n# ".join(["Starts the engine with this placement.", *made.notes])
            script = f"launch-{path.stem}.sh"
            script = f"launch-{path.name}.sh" if script in self.files else script
            self._text(script, f"{text}\n{made.command}\n")
            mode = (self.job.output / script).stat().st_mode
            (self.job.output / script).chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
        return [Path(each) for each in made.files if not each.endswith(".gemopt.json")]

    def _cost(self, placement: Placement) -> float:
        job = self.job
        return evaluate(
            placement, self.profile, self.given, senders=job.constraints.senders, topology=job.topology,
            exchange=job.exchange,
        ).objective_us  # fmt: skip

    def _report(self, command: str) -> str:
        settings = self.job.report
        current = self.job.constraints.current
        before = settings.baseline or (current if isinstance(current, Path) else None)
        if settings.baseline is None and self.before is not None and self.before.num_ranks != self.profile.num_ranks:
            before = None
            self.notes.append("the page compares with contiguous placement: the one in force was of other ranks")
        made = report(self.result, self.profile, self.traces, baseline=before, replay=settings.replay, command=command,
                      senders=self.job.constraints.senders)  # fmt: skip
        self._save("report.html", made.save)
        return made.headline

    def _save(self, name: str, save: Callable[[Path], None]) -> None:
        save(self.job.output / name)
        self.files.append(name)

    def _text(self, name: str, text: str) -> None:
        self._save(name, lambda path: write_text(path, text))


def command_of(path: Path, overrides: Sequence[str]) -> str:
    """The command that runs a job again."""
    words: list[Any] = ["gemopt", "run", str(path), *(word for each in overrides for word in ("--set", each))]
    return shlex.join(words)
