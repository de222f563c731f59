"""A plain CSV, one line per slot: for spreadsheets, and for engines we do not know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemopt.documents import write_text
from gemopt.exceptions import InputError, naming
from gemopt.formats.counts import csv_files, json_files
from gemopt.formats.counts.lines import lines_of
from gemopt.formats.engine import Engine, Export, Facts, Recording, TraceOptions, WriteOptions, check_layers
from gemopt.formats.engines import array
from gemopt.placement import EMPTY, Placement, Split

COLUMNS = ("layer", "rank", "slot", "expert", "weight")
WHOLE = re.compile(r"-?\d{1,7}(?:\.0*)?", re.ASCII)


def write(placement: Placement, path: Path, options: WriteOptions) -> Export:
    """Write `layer,rank,slot,expert[,weight]`: decoder layer, slot within the layer, -1 for an empty slot."""
    weights = placement.split_weights
    lines = [",".join(COLUMNS if weights is not None else COLUMNS[:-1])]
    for index, (layer, row) in enumerate(zip(placement.layer_ids, placement.physical_to_logical, strict=True)):
        for slot, (rank, expert) in enumerate(zip(placement.rank_of_slot.tolist(), row.tolist(), strict=True)):
            weight = "" if weights is None else f",{float(weights[index, slot])!r}"
            lines.append(f"{layer},{rank},{slot},{expert}{weight}")
    write_text(path, "\n".join([*lines, ""]))
    return Export(files=(str(path),), command="")


def read(path: Path, facts: Facts) -> Placement:
    """Read such a table. Ranks without slots at the end need `--ep`."""
    columns, lines = _table(path, facts.notes)
    rows = [row for _, row in lines]
    layers = sorted({int(row[0]) for row in rows})
    index = {layer: i for i, layer in enumerate(layers)}
    slots, ranks = (max(int(row[column]) for row in rows) + 1 for column in (2, 1))
    if len(rows) != len(layers) * slots or slots > 1 << 20 or ranks > 1 << 20:
        raise InputError(
            str(path),
            f"{len(rows)} lines",
            f"one for each of {len(layers)} layers x {slots} slots",
            "slots are numbered over all ranks, 0 to their number less one",
        )
    owner = np.full(slots, -1)
    table = np.full((len(layers), slots), EMPTY - 1)
    weights = np.zeros(table.shape)
    for line, row in lines:
        layer, rank, slot, expert = index[int(row[0])], int(row[1]), int(row[2]), int(row[3])
        if owner[slot] not in (-1, rank) or table[layer, slot] != EMPTY - 1:
            raise InputError(f"{path}: line {line}", f"slot {slot} of rank {rank}", "each slot once, on one rank")
        owner[slot], table[layer, slot] = rank, expert
        weights[layer, slot] = float(row[4]) if columns == len(COLUMNS) else 0.0
    if (np.diff(owner) < 0).any():
        raise InputError(f"{path}: rank", "slots out of rank order", "the slots of rank 0 first, then rank 1, ...")
    if facts.num_ranks is not None and facts.num_ranks < ranks:
        raise InputError("--ep", facts.num_ranks, f"at least the {ranks} ranks in {path}")
    check_layers(path, facts, layers)
    if 0 not in owner:
        facts.notes.append("rank 0 has no slots: are the ranks numbered from 1?")
    weighted = columns == len(COLUMNS)
    with naming(path):
        return Placement(
            physical_to_logical=table,
            slots_per_rank=np.bincount(owner, minlength=facts.num_ranks or ranks),
            num_experts=facts.num_experts or int(table.max()) + 1,
            split=facts.split or (Split.STATIC if weighted else Split.EVEN),
            split_weights=weights if weighted else None,
            layer_ids=layers,
            num_hidden_layers=facts.num_hidden_layers,
            model=facts.model,
            device_uuids=None if facts.device_uuids is None else list(facts.device_uuids),
        )


def _table(path: Path, notes: list[str]) -> tuple[int, list[tuple[int, list[str]]]]:
    """How many columns there are, and the number and cells of each line in the order of COLUMNS."""
    lines = ((number, [cell.strip() for cell in cells]) for number, cells in lines_of(path))
    header = next(lines, (1, [""]))[1]
    names = [name.casefold().removesuffix("_id") for name in header]  # layer_id, as in a data frame
    given = [(number, cells) for number, cells in lines if any(cells)]
    wanted = COLUMNS if COLUMNS[-1] in names else COLUMNS[:-1]
    limit = ",".join(COLUMNS[:-1]) + " and perhaps weight"
    if not given or any(names.count(name) != 1 for name in wanted):
        raise InputError(f"{path}: columns", ",".join(header), limit)
    rows = []
    for line, cells in given:
        row = [cells[names.index(name)] for name in wanted] if len(cells) == len(header) else []
        if not row or not all(map(WHOLE.fullmatch, row[:4])) or any(cell.startswith("-") for cell in row[:3]):
            raise InputError(f"{path}: line {line}", ",".join(cells), f"{len(header)} numbers: {','.join(header)}")
        if len(row) == len(COLUMNS) and not _is_number(row[4]):
            raise InputError(f"{path}: line {line}", row[4], "a weight")
        rows.append((line, [cell.partition(".")[0] for cell in row[:4]] + row[4:]))
    for at, name in ((i, header[i]) for i in range(len(header)) if names[i] not in wanted):
        told = [cells[at] for _, cells in given]
        if len(set(told)) == 1:
            notes.append(f"{path.name}: {name or f'column {at + 1}'} is {told[0] or 'empty'} in all lines: left unread")
        elif name or not all(map(str.isdigit, told)) or len(set(told)) < len(told):  # no index, as pandas saves it
            hint = "remove it if the placement does not depend on it"
            raise InputError(f"{path}: columns", name or f"column {at + 1}", limit, hint)
    return len(wanted), rows


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def read_traces(paths: Sequence[Path], options: TraceOptions) -> Recording:
    """Read count tables; JSON that is an array is read as one."""
    inside = [part for path in paths if path.is_dir() for part in path.iterdir()]
    found = [*paths, *inside]
    tables = any(path.suffix in csv_files.SUFFIXES and not json_files.is_json(path) for path in found)
    arrays = any(path.name.endswith(array.SUFFIXES) for path in found)
    read = array.read_traces if arrays and not tables else csv_files.read_traces
    return read(paths, options)


ENGINES = {
    "csv": Engine(
        name="csv",
        versions="any",
        placement="layer,rank,slot,expert[,weight] .csv",
        traces=("layer_id,expert_id,count",),
        replicas=True,
        unequal_slots=True,
        empty_slots=True,
        splits=tuple(Split),
        suffixes=(".csv",),
        note="for other programs",
        write=write,
        read=read,
        dumps=(*csv_files.SUFFIXES, *json_files.SUFFIXES),
        rank_files=True,
        read_traces=read_traces,
    )
}
