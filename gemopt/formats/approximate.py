"""The nearest placement that an engine can express, what changed, and what that costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError, UnsupportedError
from gemopt.formats.engine import Engine
from gemopt.formats.registry import obstacles
from gemopt.layer_rules import check_kept, rules_of
from gemopt.placement import EMPTY, Placement, Split
from gemopt.words import counted

Table = list[list[list[int]]]  # experts by layer and rank
Cost = Callable[[Placement], float]
BARRED = 1e30  # load of an expert that rules keep off a rank: it is there only where no other may be


def approximate(
    placement: Placement,
    engine: Engine,
    *,
    loads: NDArray[np.float64] | None = None,
    cost: Cost | None = None,
) -> tuple[Placement, list[str]]:
    """Convert `placement` into one that `engine` can express.

    Ranks are made equally full either by more copies (of the experts with least load) or by moving experts; with
    `cost`, the cheaper of the two is taken, else the one that changes fewer slots. Only what keeps the rules of the
    placement counts.

    Parameters
    ----------
    loads
        [L, E] mean assignments, which decide whom to copy, move or drop; equal loads when None.
    cost
        Microseconds of a placement.

    Raises
    ------
    InputError
        The engine takes none, cannot hold the experts evenly, or no conversion keeps the rules.

    Returns
    -------
    Placement, list of str
        The placement, and one sentence per change; no sentence when nothing had to change.
    """
    lacking = {lack for lack, *_ in obstacles(placement, engine)}
    if not lacking:
        return placement, []
    if engine.write is None:
        raise UnsupportedError("--to", engine.name, engine.note, "nothing to approximate")
    loads_LE = np.ones((placement.num_layers, placement.num_experts)) if loads is None else loads
    if loads_LE.shape != (placement.num_layers, placement.num_experts):
        wanted = f"{placement.num_layers} layers of {placement.num_experts} experts"
        raise InputError("traces", f"{loads_LE.shape[0]} layers of {loads_LE.shape[1]}", wanted)
    notes: list[str] = []
    table = _by_rank(placement)
    options: list[tuple[Table, str]] = []
    if "replicas" in lacking:
        dropped = _drop_copies(table, loads_LE)
        notes.append(f"{counted(dropped, 'copy')} dropped: {engine.name} holds every expert once")
    if lacking & {"unequal_slots", "empty_slots", "replicas"}:
        options = _levelled(table, placement, loads_LE, copies_allowed=engine.replicas)
        if not options:
            raise UnsupportedError(
                "num_experts",
                placement.num_experts,
                f"{engine.name} cannot hold them evenly on {placement.num_ranks} ranks",
                "use another number of ranks, or --to csv",
            )
    split = placement.split
    if "splits" in lacking or split is Split.STATIC:
        split = engine.splits[0]
        notes.append(f"split {placement.split.value} became {split.value}")
    tables: list[tuple[Table | None, str]] = [*options] or [(None, "")]
    candidates = [(_rebuild(placement, t, split), said) for t, said in tables]
    candidates = _kept(candidates)
    chosen, said = min(candidates, key=lambda c: cost(c[0])) if cost and len(candidates) > 1 else candidates[0]
    return chosen, [*notes, *([said] if said else [])]


def _by_rank(placement: Placement) -> Table:
    ends = np.cumsum(placement.slots_per_rank)[:-1]
    return [
        [[e for e in part.tolist() if e != EMPTY] for part in np.split(row, ends)]
        for row in placement.physical_to_logical
    ]


def _flat(layer: list[list[int]]) -> list[int]:
    return [expert for held in layer for expert in held]


def _drop_copies(table: Table, loads_LE: NDArray[np.float64]) -> int:
    """Keep of each expert, heaviest first, the copy on the rank with least load so far."""
    dropped = 0
    for ranks, loads in zip(table, loads_LE, strict=True):
        homes: dict[int, list[int]] = {}
        for rank, experts in enumerate(ranks):
            for expert in experts:
                homes.setdefault(expert, []).append(rank)
        busy = np.zeros(len(ranks))
        for expert in sorted(homes, key=lambda e: (len(homes[e]) > 1, -loads[e])):
            home = min(homes[expert], key=busy.__getitem__)
            busy[home] += loads[expert]
            for rank in homes[expert]:
                if rank != home:
                    ranks[rank].remove(expert)
                    dropped += 1
    return dropped


def _levelled(
    table: Table, placement: Placement, loads_LE: NDArray[np.float64], *, copies_allowed: bool
) -> list[tuple[Table, str]]:
    """The ways to fill all ranks equally, fewest changes first."""
    found: list[tuple[int, Table, str]] = []
    experts, ranks = placement.num_experts, placement.num_ranks
    single = all(len(_flat(layer)) == experts for layer in table)
    if single and experts % ranks == 0:
        moved, count = _move(table, loads_LE, experts // ranks)
        found.append((count, moved, f"{counted(count, 'expert')} moved, so that every rank holds {experts // ranks}"))
    if copies_allowed:
        width = max(len(held) for layer in table for held in layer)
        filled, count = _fill(table, placement, loads_LE, width)
        found.append(
            (count, filled, f"{counted(count, 'slot')} added or filled with copies, so that every rank holds {width}")
        )
    return [(t, said) for _, t, said in sorted(found, key=lambda option: option[0])]


def _move(table: Table, loads_LE: NDArray[np.float64], size: int) -> tuple[Table, int]:
    """Move the least loaded experts of ranks with more than `size` experts to those with fewer."""
    result, count = [[list(held) for held in layer] for layer in table], 0
    for layer, loads in zip(result, loads_LE, strict=True):
        spare = [held.pop(held.index(min(held, key=loads.__getitem__))) for held in layer for _ in held[size:]]
        count += len(spare)
        for expert in sorted(spare, key=lambda e: -loads[e]):
            needy = min((held for held in layer if len(held) < size), key=lambda held: float(loads[held].sum()))
            needy.append(expert)
    return result, count


def _kept(candidates: list[tuple[Placement, str]]) -> list[tuple[Placement, str]]:
    """Those that keep the rules; `InputError` of the last where there are none."""
    found = []
    for candidate in candidates:
        try:
            check_kept(candidate[0])
            found.append(candidate)
        except InputError as error:
            broken = error
    if not found:
        raise InputError(f"--approximate, {broken.field}", broken.value, broken.limit, "solve with --engine")
    return found


def _fill(table: Table, placement: Placement, loads_LE: NDArray[np.float64], width: int) -> tuple[Table, int]:
    """Fill every rank up to `width` slots with copies of the experts with least load per copy it does not hold."""
    result, count = [[list(held) for held in layer] for layer in table], 0
    each = zip(result, placement.physical_to_logical, rules_of(placement), loads_LE, strict=True)
    for layer, row, rules, loads in each:
        copies = np.bincount(_flat(layer), minlength=len(loads))
        kept = None if rules is None else rules.settled(rules.units(row, placement.slots_per_rank))
        for rank, held in enumerate(layer):
            while len(held) < width:
                share = np.where(np.isin(np.arange(len(loads)), held), np.inf, loads / copies)
                if kept is not None:
                    share += np.where(kept.closed_GE[rank] | kept.clash_EE[held].any(axis=0), BARRED, 0.0)
                expert = int(share.argmin())
                held.append(expert)
                copies[expert] += 1
                count += 1
    return result, count


def _rebuild(placement: Placement, table: Table | None, split: Split) -> Placement:
    """The placement of `table`, whose ranks are all as full; None: with the slots as they are."""
    slots, rows = placement.slots_per_rank, placement.physical_to_logical
    if table is not None:
        slots, rows = np.full(placement.num_ranks, len(table[0][0])), np.array([_flat(layer) for layer in table])
    return placement.changed(slots_per_rank=slots, physical_to_logical=rows, split=split, split_weights=None)
