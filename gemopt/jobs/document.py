"""The job file as a document; its JSON Schema is `docs/schema/job.json`."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from gemopt.documents import Document, Part
from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit
from gemopt.links import Exchange
from gemopt.placement import Split
from gemopt.splits.senders import Senders

FOLDER: ContextVar[Path] = ContextVar("FOLDER", default=Path())  # of the job file: its relative paths begin there


class Typed(str):
    """A text from the command line, whose relative paths begin at the current folder."""

    __slots__ = ()


def _placed(value: Any) -> Any:
    if not isinstance(value, (str, Path)):
        return value
    folder = Path.cwd() if isinstance(value, Typed) else FOLDER.get()
    path = Path(os.path.abspath(folder / Path(value).expanduser()))
    if VARIABLE.search(str(value)) and not path.exists():  # else a folder of that name would be made
        raise PydanticCustomError("variable", "a path written out: variables of the shell are not looked up in a job")
    return path


def _spelt(field: str, pattern: str, limit: str) -> AfterValidator:
    """A text that matches; the error says in words what would."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise InputError(field, text, limit)
        return text

    return AfterValidator(check)


def _whole(value: Any) -> Any:
    """`9.4e6`, which YAML reads as a text."""
    try:
        number = float(value) if isinstance(value, str) else 0.5
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


def _listed(value: Any) -> Any:
    """`4,4,2` as the command line takes it."""
    return value.split(",") if isinstance(value, str) and "," in value else value


def _several(value: Any) -> Any:
    """One path without a list around it."""
    return [value] if isinstance(value, (str, Path)) else value


def _wired(value: Any) -> Any:
    """A file of a topology; any other text is the name of one."""
    path = _placed(value)
    return str(path) if isinstance(value, str) and (path.suffix == ".json" or path.is_file()) else value


VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?")
PATH, MADE = "path", "made"  # a document that is there, or how to make one
Placed = Annotated[Path, BeforeValidator(_placed)]
Bytes = Annotated[int | None, BeforeValidator(_whole)]
Paths = Annotated[list[Path], Field(min_length=1)]
FileName = Annotated[
    str, _spelt("exports.file", r"[A-Za-z0-9][-._A-Za-z0-9]*", "a name in the folder: letters, digits, dots, dashes")
]
DnsName = Annotated[
    str,
    _spelt(
        "kubernetes.config_map", r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", "lower-case letters, digits, dashes, dots"
    ),
]
DnsLabel = Annotated[
    str, _spelt("kubernetes.namespace", r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "lower-case letters, digits, dashes")
]
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[
    str,
    _spelt(
        "kubernetes.labels",
        rf"([a-z0-9]([-.a-z0-9]{{0,251}}[a-z0-9])?/)?{LABEL}",
        "at most 63 letters, digits, dashes, dots, underscores, after a DNS name and / where wanted",
    ),
]
LabelValue = Annotated[
    str, _spelt("kubernetes.labels", f"({LABEL})?", "at most 63 letters, digits, dashes, dots, underscores")
]


def _kind(value: Any) -> str:
    return PATH if isinstance(value, (str, Path)) else MADE


class TableSource(Part):
    """A profile from a kernel table, or several, as `gemopt profile import` makes it.

    `slower`: factor of the latency by rank, to ask what a slow device would do.
    """

    table: Annotated[list[Placed], BeforeValidator(_several, json_schema_input_type=Path | Paths)] = Field(min_length=1)
    unit: Unit | None = None
    top_k: int | None = None
    ep: int | None = None
    where: list[str] = Field(default_factory=list)
    load_column: str | None = None
    time_column: str | None = None
    device_column: list[str] = Field(default_factory=list)
    repeat_column: list[str] = Field(default_factory=list)
    sum_column: list[str] = Field(default_factory=list)
    speeds: Placed | None = None
    fleet: str | None = None
    memory_fleet: str | None = None
    ranks: int | None = Field(default=None, ge=1)
    seed: int = 0
    device: str | None = None
    model: str | None = None
    expert_bytes: Bytes = Field(default=None, ge=1)
    slower: dict[int, float] = Field(default_factory=dict)


class RecordedSource(Part):
    """Traces that a serving engine recorded, as `gemopt trace import` reads them."""

    engine: str
    files: Annotated[list[Placed], BeforeValidator(_several, json_schema_input_type=Path | Paths)] = Field(min_length=1)
    ep: int | None = Field(default=None, ge=1)
    num_experts: int | None = Field(default=None, ge=1)
    layer_ids: str | None = None
    num_hidden_layers: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    model: str | None = None
    phase: Literal["prefill", "decode", "all"] | None = None
    batch_size: int | None = Field(default=None, ge=1)
    prefill_tokens: int | None = Field(default=None, ge=1)
    no_pipeline: bool = False


class Steps(Part):
    """Which steps are used: of a task or phase, and the share at the end that only judges."""

    task: str | None = None
    phase: str | None = None
    holdout: float = Field(default=0.0, ge=0, lt=1)


class Constraints(Part):
    """Slots, rules, the placement in force, what moving from it costs, and compute given up for fewer bytes between
    nodes; as the options of `gemopt solve`.

    `current`: a path, or `contiguous` for what engines start with.
    """

    slots_per_rank: Annotated[int | list[int] | None, BeforeValidator(_listed)] = None
    split: Split | None = None
    senders: Senders | None = None
    full_slots: bool = False
    memory_budget: Annotated[float | list[float] | None, BeforeValidator(_listed)] = None
    rules: Placed | None = None
    current: Literal["contiguous"] | Placed | None = None
    move_price: float | None = None
    expert_bytes: Bytes = None
    bandwidth: float | None = None
    horizon_steps: float | None = None
    max_moves: int | None = None
    max_moves_per_layer: int | None = None
    max_bytes_per_rank: float | None = None
    exclude_ranks: list[int] = Field(default_factory=list)
    add_ranks: list[int] = Field(default_factory=list)
    compute_slack: float | None = None


class SolverSettings(Part):
    """Who searches, and for how long; as the options of `gemopt solve`."""

    name: str = "auto"
    time_limit: float | None = None
    gap: float = 0.0
    seed: int = 0
    patience: int | None = None
    threads: int | None = None
    cost: str = "auto"
    warm_start: Placed | None = None
    allow_one_rank: bool = False


class ExportTo(Part):
    """A file for one engine; `file` defaults to the engine's name and the ending that it wants."""

    engine: str
    file: FileName | None = None
    approximate: bool = False
    mtp_layers: int = Field(default=0, ge=0, le=64)


class ReportSettings(Part):
    """The page; compared with `baseline`, else with the placement in force, else with contiguous placement."""

    page: bool = True
    baseline: Placed | None = None
    replay: Placed | None = None


class Kubernetes(Part):
    """A ConfigMap that carries the exported maps."""

    config_map: DnsName = "gemopt-placement"
    namespace: DnsLabel | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)


class Job(Document):
    """One job: profile and traces in, a folder with placement, exports and report out.

    Attributes
    ----------
    profile, traces
        A path, or how to make them of a table and of what an engine recorded.
    output
        Folder to write; it must not exist yet.
    num_hidden_layers
        Decoder layers of the network, where the traces do not say and an engine wants to know.
    model
        The network that engines start, by name or path; else what the traces call it.
    topology, exchange
        Links between the ranks, as a file or by name (`2x8-ib400`), and how tokens are exchanged over them.
    exports
        Engines to write for.
    kubernetes
        null: no ConfigMap.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    profile: Annotated[Annotated[Placed, Tag(PATH)] | Annotated[TableSource, Tag(MADE)], Discriminator(_kind)]
    traces: Annotated[Annotated[Placed, Tag(PATH)] | Annotated[RecordedSource, Tag(MADE)], Discriminator(_kind)]
    output: Placed
    num_hidden_layers: int | None = Field(default=None, ge=1)
    model: str | None = Field(default=None, min_length=1)
    steps: Steps = Field(default_factory=Steps)
    constraints: Constraints = Field(default_factory=Constraints)
    topology: Annotated[str, BeforeValidator(_wired)] | None = None
    exchange: Exchange | None = None
    solver: SolverSettings = Field(default_factory=SolverSettings)
    exports: list[ExportTo] = Field(default_factory=list)
    report: ReportSettings = Field(default_factory=ReportSettings)
    kubernetes: Kubernetes | None = Field(default_factory=Kubernetes)
