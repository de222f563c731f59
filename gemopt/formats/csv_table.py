"""A plain CSV, one line per slot: for spreadsheets, and for engines we do not know."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from gemopt.documents import read_bytes, write_text
from gemopt.exceptions import InputError
from gemopt.formats import count_csv
from gemopt.formats.engine import Engine, Export, Facts, WriteOptions, check_layers
from gemopt.formats.files import JSON_LIMIT
from gemopt.placement import EMPTY, Placement, Split

COLUMNS = ("layer", "rank", "slot", "expert", "weight")


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
    columns, rows = _table(path)
    layers = sorted({int(row[0]) for row in rows})
    index = {layer: i for i, layer in enumerate(layers)}
    slots, ranks = (max(int(row[column]) for row in rows) + 1 for column in (2, 1))
    if len(rows) != len(layers) * slots or slots > 1 << 20 or ranks > 1 << 20:
        raise InputError(str(path), f"{len(rows)} lines", f"one for each of {len(layers)} layers x {slots} slots")
    owner = np.full(slots, -1)
    table = np.full((len(layers), slots), EMPTY - 1)
    weights = np.zeros(table.shape)
    for line, row in enumerate(rows, start=2):
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
    try:
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
    except InputError as error:
        error.args = (f"{path}: {error}",)
        raise


def _table(path: Path) -> tuple[int, list[list[str]]]:
    """How many columns there are, and the lines with their cells in the order of COLUMNS."""
    try:
        text = read_bytes(path, limit_bytes=JSON_LIMIT).decode("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        lines = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=separator) if row]
        header, *given = lines
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise InputError(str(path), str(error) or "an empty file", "a CSV table") from None
    names = [name.casefold() for name in header]
    if sorted(names) not in (sorted(COLUMNS), sorted(COLUMNS[:-1])) or not given:
        raise InputError(f"{path}: columns", ",".join(header), ",".join(COLUMNS[:-1]) + " and perhaps weight")
    order = [names.index(name) for name in COLUMNS[: len(names)]]
    rows = []
    for line, cells in enumerate(given, start=2):
        row = [cells[i] for i in order] if len(cells) == len(order) else []
        whole = all(cell.isascii() and cell.removeprefix("-").isdigit() and len(cell) < 8 for cell in row[:4])
        if not row or not whole or any(cell.startswith("-") for cell in row[:3]):
            raise InputError(f"{path}: line {line}", ",".join(cells), f"{len(header)} numbers: {','.join(header)}")
        if len(row) == len(COLUMNS) and not _is_number(row[4]):
            raise InputError(f"{path}: line {line}", row[4], "a weight")
        rows.append(row)
    return len(header), rows


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


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
        dumps=count_csv.SUFFIXES,
        read_traces=count_csv.read_traces,
    )
}
