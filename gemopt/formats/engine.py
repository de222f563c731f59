"""What an engine can express, and what its writer and its readers are given and give back."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents.arrays import integer_array
from gemopt.exceptions import InputError, naming, refuse_unused
from gemopt.placement import EMPTY, Placement, Split, bare
from gemopt.traces import Phase, Traces

IntArray = NDArray[Any]


def of_network(placement: Placement, model: str | None) -> tuple[Placement, list[str]]:
    """The placement for the network that an engine is to start, and a warning where it knows another one."""
    if model is None:
        return placement, []
    strange = placement.model is not None and bare(placement.model) != bare(model)
    return placement.changed(model=model), [f"warning: the placement is for {placement.model}"] if strange else []


def check_network(model: str | None, called: str) -> None:
    """Raise `InputError` for a network without a name."""
    if model is not None and not model.strip():
        raise InputError(called, model, "a name or a path")


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What a placement does not say. `role`: `prefill` or `decode` when the two are served apart.

    `mtp_layers`: draft layers that the engine numbers from `num_hidden_layers` on, refused by engines that have nothing
    to say of them. `traces`: measured loads, for the engines that take loads instead of a placement.
    """

    role: str | None = None
    mtp_layers: int = 0
    traces: Traces | None = None


@dataclass(frozen=True, kw_only=True)
class Export:
    """Files written, the command that starts the engine with them ("" for tables), and what the user should know."""

    files: tuple[str, ...]
    command: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a foreign file leaves out: given by the user, or by the side file of an export.

    `notes`: what the user should know of the file; grows while it is read.
    """

    num_ranks: int | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    model: str | None = None
    split: Split | None = None
    device_uuids: tuple[str | None, ...] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How to read traces.

    `batch_size` (64), `prefill_tokens` (4096), `phase` (decode): continuous batching of recorded requests; phase MIXED
    takes all tokens, one after the other. `keep_tokens`: keep the token-level record where there is one (in memory).
    `num_ranks`: how many ranks must have written. `no_pipeline`: no files are of stages of a pipeline, however like it
    their counts look.
    """

    num_ranks: int | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    top_k: int | None = None
    model: str | None = None
    batch_size: int | None = None
    prefill_tokens: int | None = None
    phase: Phase | None = None
    keep_tokens: bool = False
    no_pipeline: bool = False

    def refuse_unused(self, recording: str, *used: str) -> None:
        """Refuse options that some recordings heed, and this one does not."""
        given = {
            "num_ranks": self.num_ranks, "batch_size": self.batch_size, "prefill_tokens": self.prefill_tokens,
            "phase": None if self.phase is None else self.phase.name.lower(), "keep_tokens": self.keep_tokens or None,
        }  # fmt: skip
        options = {"--ep" if name == "num_ranks" else "--" + name.replace("_", "-"): value
                   for name, value in given.items() if name not in used}  # fmt: skip
        refuse_unused(options, f"does not apply to {recording}")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Counts as a stream, so that importing needs the memory of one file.

    Attributes
    ----------
    blocks
        Called for each pass over the files; yields [steps, rows, E] logical counts >= 0.
    layer_ids
        Decoder layer of each row; None when every decoder layer has a row, dense ones (all zero) included.
    num_hidden_layers, top_k
        When the files say.
    phase
        [T] `Phase` of each step, None when not recorded.
    notes
        What the user should know; grows while blocks are read.
    """

    blocks: Callable[[], Iterator[IntArray]]
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    top_k: int | None = None
    phase: IntArray | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A recording that is read as a whole, and what the user should know of it."""

    traces: Traces
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine: what it can express, and the functions that write and read its files.

    Attributes
    ----------
    versions
        Versions whose source or loader the format was checked against.
    placement
        The file that carries a placement; empty when the engine takes none.
    traces
        The recordings `read_traces` understands.
    rank_files
        Whether ranks write some of its recordings apart, so that it can be told how many there are.
    replicas, unequal_slots, empty_slots
        Whether the engine's file can say so.
    dense_rows
        Whether layers without experts need a row as well.
    group_limits
        Whether group-limited routing restricts the order of experts.
    hidden_layers
        Whether its file must know how many decoder layers there are.
    draft_layers
        Whether draft (MTP) layers change anything for it.
    splits
        How the engine can share an expert's assignments among its copies; the first is what it does unless told.
    dumps
        How the names of its recordings end.
    suffixes
        How the name of its file must end.
    document
        Which document of gemopt the file is, if one.
    side_file
        Whether the file leaves out something that importing it again needs.
    note
        One line on how to use it, or why it takes no placement.
    """

    name: str
    versions: str
    placement: str = ""
    traces: tuple[str, ...] = ()
    dumps: tuple[str, ...] = ()
    rank_files: bool = False
    replicas: bool = False
    unequal_slots: bool = False
    empty_slots: bool = False
    dense_rows: bool = False
    group_limits: bool = False
    hidden_layers: bool = False
    draft_layers: bool = False
    splits: tuple[Split, ...] = ()
    suffixes: tuple[str, ...] = ()
    document: str = ""
    side_file: bool = True
    note: str = ""
    check: Callable[[Placement, WriteOptions], None] | None = None
    write: Callable[[Placement, Path, WriteOptions], Export] | None = None
    read: Callable[[Path, Facts], Placement] | None = None
    read_traces: Callable[[Sequence[Path], TraceOptions], Recording | Loaded] | None = None


def expert_rows(placement: Placement, *, num_rows: int) -> NDArray[np.int64]:
    """[num_rows, P] a row per decoder layer: the placement where there is one, experts in order elsewhere.

    Layers without experts never look at their row; it only has to be valid.
    """
    rows = np.tile(in_order(placement), (num_rows, 1))
    rows[np.array(placement.layer_ids)] = placement.physical_to_logical
    return rows


def in_order(placement: Placement) -> NDArray[np.int64]:
    """[P] experts 0, 1, ..., E-1, 0, ...: what engines start with."""
    return np.arange(placement.num_slots) % placement.num_experts


def require_hidden_layers(placement: Placement, engine: str) -> int:
    """Decoder layers of the network; `InputError` when the placement does not say."""
    if placement.num_hidden_layers is None:
        raise InputError(
            "Placement.num_hidden_layers",
            None,
            f"{engine} numbers layers among all decoder layers",
            "give --num-hidden-layers N",
        )
    return placement.num_hidden_layers


def file_facts(path: Path, facts: Facts, *, rows: int) -> tuple[list[int], int | None]:
    """Layer ids and hidden layers of a file with `rows` rows, one per decoder layer."""
    hidden = facts.num_hidden_layers
    if hidden is not None and rows != hidden:
        raise InputError(f"{path}: layers", rows, f"a row for each of the {hidden} decoder layers")
    ids = list(range(rows)) if facts.layer_ids is None else list(facts.layer_ids)
    if not ids or min(ids) < 0 or max(ids) >= rows:
        raise InputError("--layer-ids", ids, f"layers 0 to {rows - 1}, the rows of {path}")
    return ids, rows


def moe_rows(facts: Facts, rows: int) -> list[int]:
    """Layer ids of a file with a row for every MoE layer in order, which does not say where they are."""
    if facts.layer_ids is not None:
        return list(facts.layer_ids)
    facts.notes.append(f"rows are MoE layers, read as layers 0 to {rows - 1}: with dense layers, give --layer-ids")
    return list(range(rows))


def check_layers(path: Path, facts: Facts, ids: Sequence[int]) -> None:
    """Refuse `--layer-ids` that are not the layers which a file names itself."""
    if facts.layer_ids is not None and list(facts.layer_ids) != list(ids):
        found, limit = (", ".join(map(str, layers)) for layers in (facts.layer_ids, ids))
        raise InputError("--layer-ids", found, f"layers {limit}, as {path} says", "leave it out")


def make_placement(path: Path, rows: object, facts: Facts, **fields: Any) -> Placement:
    """Placement with equal slots from the rows [L, P] of a foreign file.

    Raises
    ------
    InputError
        When the ranks are unknown or do not divide the slots, or the rows are no placement.
    """
    table_LP = integer_array(rows, name=f"{path}: physical_to_logical", ndim=2)
    if not table_LP.size:
        raise InputError(f"{path}: physical_to_logical", f"shape {table_LP.shape}", "at least one layer and slot")
    ranks = fields.pop("num_ranks", facts.num_ranks)
    if ranks is None:
        raise InputError(f"{path}: ranks", None, "the file does not say how many ranks share the slots", "give --ep N")
    if ranks < 1 or table_LP.shape[1] % ranks:
        raise InputError("--ep", ranks, f"a divisor of the {table_LP.shape[1]} slots in {path}")
    if facts.num_experts is None and not (table_LP == 0).any() and (table_LP == 1).any():
        raise InputError(
            f"{path}: physical_to_logical", "no expert 0", "experts from 0 on", "numbered from 1? subtract 1"
        )
    experts = int(table_LP.max()) + 1 if facts.num_experts is None else facts.num_experts
    if int(table_LP.max()) >= experts:
        raise InputError(f"{path}: physical_to_logical", int(table_LP.max()), f"experts 0 to {experts - 1}")
    each = np.repeat(np.arange(ranks), table_LP.shape[1] // ranks)
    if facts.num_experts is None and ranks == experts < len(each) and (np.sort(table_LP[0]) == each).all():
        facts.notes.append(f"all {experts} experts have as many copies: or are these the ranks of experts, in turn?")
    devices, split = facts.device_uuids, facts.split or Split.EVEN
    if split is Split.STATIC and (np.diff(np.sort(table_LP, axis=1), axis=1) != 0).all():
        split = Split.EVEN  # there are no copies whose weights these files could lack
    settled = {
        "slots_per_rank": np.full(ranks, table_LP.shape[1] // ranks),
        "num_experts": experts,
        "split": split,
        "model": facts.model,
        "device_uuids": list(devices) if devices is not None and len(devices) == ranks else None,
    }
    with naming(path):
        return Placement(physical_to_logical=table_LP, **{**settled, **fields})


def check_sizes(
    options: TraceOptions, *, where: str, layers: int, experts: int | None = None, top_k: int | None = None
) -> None:
    """Refuse a recording whose decoder layers, experts or experts per token are not those of the options."""
    pairs = {
        "--num-hidden-layers": (layers, options.num_hidden_layers),
        "--num-experts": (experts, options.num_experts),
        "--top-k": (top_k, options.top_k),
    }
    for name, (found, given) in pairs.items():
        if None not in (found, given) and found != given:
            raise InputError(where, found, f"{name} is {given}")
    if options.layer_ids is not None and max(options.layer_ids) >= layers:
        raise InputError("--layer-ids", max(options.layer_ids), f"layers 0 to {layers - 1}")


def copy_slots(row: NDArray[np.int64], num_experts: int) -> list[list[int]]:
    """Slots of each expert of a layer, in slot order."""
    slots: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(row.tolist()):
        if expert != EMPTY:
            slots[expert].append(slot)
    return slots


def model_name(placement: Placement) -> str:
    """What stands for the network in a command line."""
    return quoted(placement.model or "MODEL")


def split_heads(ranks: int, instead: str) -> list[str]:
    """A note where ranks, as after one has left, are no power of two: networks seldom have such numbers of heads."""
    if ranks & (ranks - 1) == 0:
        return []
    return [f"It shares out the attention heads over {ranks} ranks, which must divide their number; else {instead}."]


def quoted(value: object) -> str:
    """`value` as one word of a shell command; paths become absolute, since servers start elsewhere."""
    return shlex.quote(str(value.absolute() if isinstance(value, Path) else value))
