"""The engines by name, and the one place where a placement meets what an engine can express."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from gemopt.documents import Document, sha256
from gemopt.documents.arrays import IntVector
from gemopt.documents.foreign import telling
from gemopt.exceptions import InputError, UnsupportedError, refuse_unused
from gemopt.formats.engine import Engine, Export, Facts, WriteOptions
from gemopt.placement import GivenPlacement, Placement, Split
from gemopt.problem import slot_counts
from gemopt.rules import Rules
from gemopt.words import counted

_MODULES = {
    "sglang": "engines.sglang",
    "tensorrt-llm": "engines.tensorrt_llm",
    "vllm": "engines.vllm",
    "vllm-map": "engines.vllm_map",
    "vllm-ascend": "engines.vllm_ascend",
    "lmdeploy": "engines.lmdeploy",
    "deepseek-eplb": "engines.deepseek_eplb",
    "csv": "engines.csv_table",
    "array": "engines.array",
    "tokens": "tokens.rows",
    "checkpoint": "engines.checkpoint",
    "xllm": "engines.checkpoint",
    "llama.cpp": "engines.llama_cpp",
}
NAMES = tuple(_MODULES)
# How else people write the names, without case, "_", ".", "-" and blanks.
_ALIASES = {
    "sgl": "sglang",
    "trtllm": "tensorrt-llm",
    "trt": "tensorrt-llm",
    "tensorrt": "tensorrt-llm",
    "ascend": "vllm-ascend",
    "deepseek": "deepseek-eplb",
    "eplb": "deepseek-eplb",
    "transformers": "checkpoint",
    "huggingface": "checkpoint",
    "hf": "checkpoint",
    "numpy": "array",
    "imatrix": "llama.cpp",
}


def canonical(name: str) -> str:
    """The name of an engine however it is written (`trtllm`, `vLLM_Ascend`); `InputError` names those there are."""
    bare = re.sub(r"[-_. ]", "", name.casefold())
    found = _ALIASES.get(bare) or next((n for n in NAMES if re.sub(r"[-_. ]", "", n) == bare), None)
    if found is None:
        raise InputError("engine", name, "one of " + ", ".join(NAMES))
    return found


def get(name: str) -> Engine:
    """The engine called `name`, as `canonical` reads it."""
    name = canonical(name)
    found: Engine = import_module(f"gemopt.formats.{_MODULES[name]}").ENGINES[name]
    return found


def engines() -> list[Engine]:
    """All engines."""
    return [get(name) for name in NAMES]


class SideFile(Document):
    """What a foreign placement file cannot say, written beside it as `NAME.gemopt.json`; engines never read it."""

    SCHEMA_VERSION: ClassVar[int] = 1

    file_sha256: str
    slots_per_rank: IntVector
    num_experts: int
    layer_ids: list[int]
    num_hidden_layers: int | None = None
    split: Split = Split.EVEN
    model: str | None = None
    device_uuids: list[str | None] | None = None
    rules: Rules | None = None
    node_of_rank: IntVector | None = None


def side_path(path: Path) -> Path:
    """Where the side file of `path` lies."""
    return path.with_name(path.name + ".gemopt.json")


def obstacles(placement: Placement, engine: Engine) -> list[tuple[str, str, str, str]]:
    """What `engine` cannot express of `placement`: the capability it lacks, the field, its value, and the reason."""
    found = []
    if not placement.equal_slots and not engine.unequal_slots:
        slots = ", ".join(map(str, placement.slots_per_rank.tolist()))
        found.append(("unequal_slots", "slots_per_rank", slots, "needs as many slots on every rank"))
    if placement.has_empty_slots and not engine.empty_slots:
        empty = int((placement.physical_to_logical < 0).sum())
        found.append(
            ("empty_slots", "physical_to_logical", counted(empty, "empty slot"), "needs an expert in every slot")
        )
    if placement.has_copies and not engine.replicas:
        found.append(("replicas", "physical_to_logical", "copies of an expert", "holds every expert once"))
    if placement.has_copies and engine.replicas and placement.split not in engine.splits:
        can = ", ".join(engine.splits)
        found.append(("splits", "split", placement.split.value, f"shares the load among copies as: {can}"))
    return found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a placement for an engine keeps to: how copies share, and whether every slot must hold an expert."""

    split: Split
    full: bool


def within_engine(
    engine: Engine, slots_per_rank: object, split: str | None, num_experts: int, num_ranks: int
) -> Limits:
    """What solving for an engine must keep to.

    Raises
    ------
    UnsupportedError
        It takes no placement, or cannot have such slots, copies or that split.
    """
    if engine.write is None and engine.name != "checkpoint":  # which is written by permuting weights
        raise UnsupportedError("--engine", engine.name, engine.note or "takes no placement", "see gemopt engines")
    slots_G = slot_counts(slots_per_rank, num_experts, num_ranks)
    spare = int(slots_G.sum()) > num_experts
    if not engine.unequal_slots and len(set(slots_G.tolist())) > 1:
        slots, hint = ", ".join(map(str, slots_G.tolist())), f"use --slots-per-rank {slots_G.max()}"
        raise UnsupportedError("slots_per_rank", slots, f"{engine.name} needs as many slots on every rank", hint)
    if spare and not engine.replicas:
        raise UnsupportedError("slots_per_rank", int(slots_G.sum()), f"{engine.name} holds every expert once",
                               "leave the spare slots out")  # fmt: skip
    if not spare:
        return Limits(split=Split.EVEN, full=False)
    policy = split or engine.splits[0]
    if policy not in engine.splits:
        can = ", ".join(engine.splits)
        raise UnsupportedError("split", policy, f"{engine.name} shares the load among copies as: {can}")
    return Limits(split=Split(policy), full=not engine.empty_slots)


def able(placement: Placement) -> list[str]:
    """Names of the engines that can express the whole placement."""
    return [e.name for e in engines() if e.write is not None and not obstacles(placement, e)]


def refuse(placement: Placement, engine: Engine, options: WriteOptions) -> None:
    """Raise `UnsupportedError` for the first thing that `engine` cannot express, naming engines that can."""
    if engine.write is None:
        raise UnsupportedError("--to", engine.name, f"{engine.note or 'takes no placement file'}", _others(placement))
    for _, field, value, reason in obstacles(placement, engine):
        hint = f"use --approximate, or solve with --engine {engine.name}; {_others(placement)}"
        raise UnsupportedError(f"Placement.{field}", value, f"{engine.name} {reason}", hint)
    check_draft(engine, options.mtp_layers)
    if engine.check is not None:
        engine.check(placement, options)


def check_draft(engine: Engine, mtp_layers: int) -> None:
    """Refuse draft layers where nothing would be said of them."""
    if mtp_layers and not engine.draft_layers:
        raise InputError(
            "mtp_layers", mtp_layers, f"what is written for {engine.name} says nothing of them", "leave it out"
        )


def check(placement: Placement, engine: Engine, *, path: Path, options: WriteOptions) -> None:
    """Raise what `export` would raise before it writes anything."""
    refuse(placement, engine, options)
    if engine.suffixes and path.suffix not in engine.suffixes:
        raise InputError("--output", str(path), f"{engine.name} wants a name ending in {' or '.join(engine.suffixes)}")


def _others(placement: Placement) -> str:
    names = able(placement)
    return "an engine that can express it: " + ", ".join(names) if names else "no engine can express it"


def export(placement: GivenPlacement, *, to: str, path: Path, options: WriteOptions | None = None) -> Export:
    """Write `placement` for the engine `to`, and a side file with what that format leaves out.

    Raises
    ------
    UnsupportedError
        The engine cannot express the placement; nothing is written.
    """
    placement, engine, options = Placement.of(placement), get(to), options or WriteOptions()
    check(placement, engine, path=path, options=options)
    assert engine.write is not None
    result = engine.write(placement, path, options)
    if not engine.side_file:
        side_path(path).unlink(missing_ok=True)  # of the file that was there before
        return result
    told = SideFile.model_fields.keys() - {"schema_version", "file_sha256"}
    side = SideFile(file_sha256=sha256(path), **{name: getattr(placement, name) for name in told})
    side.save(side_path(path))
    return replace(result, files=(*result.files, str(side_path(path))))


def import_placement(path: Path, *, source: str, facts: Facts | None = None) -> Placement:
    """Read a placement written for, or recorded by, the engine `source`.

    What the file leaves out comes from `facts`, or from the side file that `export` wrote beside it.
    """
    engine = get(source)
    if not path.name:
        raise InputError("PATH", str(path), "a file with a placement")
    if engine.read is None:
        names = ", ".join(e.name for e in engines() if e.read is not None)
        hint = f"placements of: {names}"
        raise UnsupportedError("--from", engine.name, engine.note or "has no placement to read", hint)
    side, known = _side_file(path), facts or Facts()
    with telling(f"a placement of {engine.name}", path):
        found = engine.read(path, known if side is None else _with_side_file(side, known))
    if found.has_empty_slots and not engine.empty_slots and not engine.document:
        raise InputError(str(path), "an empty slot (-1)", f"an expert in every slot, as {engine.name} needs it")
    if facts is not None:
        found = _as_told(found, facts, path)
    return found if side is None else found.under(side.rules, side.node_of_rank)


def _as_told(found: Placement, facts: Facts, path: Path) -> Placement:
    """The placement with what its file left out and the user gave; `InputError` where the file says otherwise."""
    pairs = {
        "--ep": (facts.num_ranks, found.num_ranks),
        "--num-experts": (facts.num_experts, found.num_experts),
        "--layer-ids": (facts.layer_ids and list(facts.layer_ids), list(found.layer_ids)),
        "--num-hidden-layers": (facts.num_hidden_layers, found.num_hidden_layers),
    }
    for option, (given, here) in pairs.items():
        if None not in (given, here) and given != here:
            raise InputError(option, given, f"{here}, as {path} says", "leave it out")
    told = {"num_hidden_layers": facts.num_hidden_layers, "model": facts.model}
    changed = {name: value for name, value in told.items() if value not in (None, getattr(found, name))}
    return found.changed(**changed) if changed else found


def _side_file(path: Path) -> SideFile | None:
    if not side_path(path).is_file():
        return None
    side = SideFile.load(side_path(path))
    if side.file_sha256 != sha256(path):
        raise InputError(
            f"{side_path(path)}: file_sha256",
            side.file_sha256,
            f"it describes another version of {path.name}",
            "remove it, and give --ep, --num-hidden-layers and --layer-ids instead",
        )
    return side


def _with_side_file(side: SideFile, facts: Facts) -> Facts:
    known = Facts(
        num_ranks=len(side.slots_per_rank),
        num_experts=side.num_experts,
        layer_ids=tuple(side.layer_ids),
        num_hidden_layers=side.num_hidden_layers,
        model=side.model,
        split=side.split,
        device_uuids=None if side.device_uuids is None else tuple(side.device_uuids),
    )
    given = {key: value for key, value in vars(facts).items() if value is not None}
    return replace(known, **given)


def recorder(source: str, ranks: int | None) -> Engine:
    """The engine, whose recordings can be read; `UnsupportedError` where it makes none.

    ranks: how many must have written; `InputError` where none of its recordings is written by rank.
    """
    engine = get(source)
    if engine.read_traces is None:
        names = ", ".join(e.name for e in engines() if e.read_traces is not None)
        hint = f"its placements: gemopt placement import --from {engine.name}" if engine.read is not None else ""
        raise UnsupportedError("--from", engine.name, f"it records no loads; traces of: {names}", hint)
    if not engine.rank_files:
        refuse_unused({"--ep": ranks}, f"{engine.name} has no recordings that ranks write apart")
    return engine
