"""The tensors of DeepSeek's EPLB: phy2log [L, P], log2phy [L, E, X] (-1 padded), logcnt [L, E], int64.

What `rebalance_experts` of `eplb.py` (github.com/deepseek-ai/EPLB) returns, for engines that take its output.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.documents import replacing
from gemopt.exceptions import InputError
from gemopt.formats.engine import Engine, Export, Facts, WriteOptions, copy_slots, make_placement, moe_rows
from gemopt.formats.files import as_array, load_torch, numpy_arrays, safetensors_arrays, torch_module
from gemopt.formats.findings import ranges
from gemopt.placement import Placement, Split
from gemopt.traces.files import meant

SUFFIXES = (".safetensors", ".npz", ".pt")
TABLES = ("phy2log", "log2phy", "logcnt")
NAMED = "numpy.savez('NAME.npz', phy2log=TABLE) names the expert in each slot"


def tensors(placement: Placement) -> dict[str, NDArray[np.int64]]:
    """The three tables of a placement."""
    logcnt = placement.copies()
    log2phy = np.full((*logcnt.shape, int(logcnt.max())), -1, np.int64)
    for layer, row in enumerate(placement.physical_to_logical):
        for expert, slots in enumerate(copy_slots(row, placement.num_experts)):
            log2phy[layer, expert, : len(slots)] = slots
    return {"phy2log": np.array(placement.physical_to_logical), "log2phy": log2phy, "logcnt": logcnt.astype(np.int64)}


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write the three tables as .safetensors, .npz or .pt."""
    arrays = tensors(placement)
    with replacing(path) as stream:
        if path.suffix == ".pt":
            torch = torch_module("writing .pt files")
            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, stream)
        elif path.suffix == ".npz":
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            stream.write(buffer.getbuffer())
        else:
            from safetensors.numpy import save

            stream.write(save(arrays))
    notes = (f"Rows are MoE layers {ranges(placement.layer_ids)} in order, none for dense layers.",)
    return Export(files=(str(path),), command="", notes=notes)


def read(path: Path, facts: Facts) -> Placement:
    """Read phy2log and check the other two tables against it."""
    if path.suffix not in SUFFIXES:
        raise InputError(str(path), path.suffix or "no suffix", "a .safetensors, .npz or .pt file", NAMED)
    told: dict[str, Any] = {}
    data: Any
    if path.suffix == ".safetensors":
        data, told = safetensors_arrays(path)
    else:
        data = load_torch(path) if path.suffix == ".pt" else numpy_arrays(path)
    if isinstance(data, list | tuple) and len(data) == len(TABLES):  # as `rebalance_experts` returns them
        data = dict(zip(TABLES, data, strict=True))
    if not isinstance(data, dict) or "phy2log" not in data:
        raise InputError(f"{path}: phy2log", "missing", "a table [layers, slots]", NAMED)
    table = as_array(data["phy2log"], name=f"{path}: phy2log", ndim=2)
    ids = moe_rows(facts, len(table))
    placement = make_placement(path, table, facts, layer_ids=ids, num_hidden_layers=facts.num_hidden_layers)
    if "logcnt" in data:
        counts = as_array(data["logcnt"], name=f"{path}: logcnt", ndim=2)
        if counts.shape != placement.copies().shape or (counts != placement.copies()).any():
            raise InputError(f"{path}: logcnt", f"shape {counts.shape}", "the copies that phy2log has")
    if "log2phy" in data:
        slots = as_array(data["log2phy"], name=f"{path}: log2phy", ndim=3)
        mine = tensors(placement)["log2phy"]
        pad = np.full((*mine.shape[:2], max(slots.shape[2] - mine.shape[2], 0)), -1)
        if not np.array_equal(np.sort(slots), np.sort(np.concatenate([mine, pad], axis=2))):
            raise InputError(f"{path}: log2phy", f"shape {slots.shape}", "the slots that phy2log has")
    others = {str(name): value for name, value in {**told, **data}.items() if name not in (*TABLES, "format")}
    for name, value in others.items():
        found = str(value if name in told else np.asarray(value).tolist())
        if meant(name) == "layer_ids" and found.replace(" ", "") != str(ids).replace(" ", ""):
            raise InputError(f"{path}: {name}", found, f"{ids}, as they are read", "give --layer-ids")
        ranks = re.sub(r"[\[\]]|\.0", "", found)
        if re.fullmatch(r"(num_)?(gpus|ranks)|(ep|world)_size", name) and ranks != str(placement.num_ranks):
            hint = "" if name != "world_size" else "if it counts stages of a pipeline too, save the tables without it"
            raise InputError("--ep", placement.num_ranks, f"{name} is {found} in {path}", hint)
    if others:
        facts.notes.append(f"{', '.join(others)} left unread")
    return placement


ENGINES = {
    "deepseek-eplb": Engine(
        name="deepseek-eplb",
        versions="EPLB 2025-02",
        placement="phy2log, log2phy, logcnt .safetensors, .npz or .pt",
        replicas=True,
        splits=(Split.EVEN, Split.NEAREST, Split.OPTIMAL),
        suffixes=SUFFIXES,
        note="tables only; how copies are used is up to who reads them",
        write=write,
        read=read,
    )
}
