"""What the counts of a recording say about the recording itself."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, TraceOptions
from gemopt.formats.recorded_files import names_of
from gemopt.traces.arrays import ENOUGH_SUMS, LOOKED_AT, NOT_IDS, are_ids, is_map, refuse_narrow
from gemopt.words import counted

MANY_CELLS = 16  # steps x layers
MANY_LAYERS = 4096
MOST_SHARED = 8
MANY_ALIKE = 8  # tokens that choose the same experts in all layers
MANY_SHARED = 16  # experts that two layers have in common, never none by chance
MANY_IDS = 16  # that are all below half of the next by chance: less than once in a thousand
TOO_HIGH = (
    "give the right --num-experts; if they are slots of copies, make them logical experts; "
    "if one stands for none, leave it out"
)

_OF_FILE = re.compile(r"[^\s:]+\.[a-z0-9]+: ")
_PART = re.compile(
    r"(?:^|[/_.-])(?:(?:ep|dp|tp|pp)?_?(?:rank|group)|ep|dp|tp|pp|l|"
    r"gpu|npu|cuda|card|device|node|worker|host|server|pod|process|proc|pid|instance|engine|replica|stage|layer|blk|moe|"
    r"decoder|experts?)[_.-]?\d{1,7}(?=[/_.-]|of|$)",  # longer ones are dates and times
    re.I,
)


def ranges(numbers: Iterable[int], most: int = 8) -> str:
    """`0-2, 5` for 0, 1, 2, 5; at most so many pieces."""
    pieces: list[list[int]] = []
    for number in sorted(int(n) for n in numbers):
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1][1:] = [number]
        else:
            pieces.append([number])
    texts = ["-".join(map(str, piece)) for piece in pieces]
    return ", ".join([*texts[:most], *(["..."] if len(texts) > most else [])])


def merged(notes: Iterable[str]) -> tuple[str, ...]:
    """Notes, one for all files of which the same is said, `name.npz: ...`."""
    files: dict[str, list[str]] = {}
    for note in notes:
        *name, text = note.split(": ", 1) if _OF_FILE.match(note) else [note]
        files.setdefault(text, []).extend(name)
    found = []
    for text, names in files.items():
        others = f" and {counted(len(names) - 1, 'other')}" if len(names) > 1 else ""
        found.append(f"{names[0]}{others}: {text}" if names else text)
    return tuple(found)


def as_option(layers: Iterable[int]) -> str:
    """Layers as `--layer-ids` takes them."""
    return ranges(layers, MANY_LAYERS).replace(" ", "")


def experts_of(field: str, experts: Sequence[int], num_experts: int | None, notes: list[str]) -> int:
    """How many experts there are, by their increasing ids; where `num_experts` does not say it, with a note.

    Raises
    ------
    InputError
        Ids beyond `num_experts`, or the highest one far above many others: a mark for none?
    """
    lowest, highest = experts[0], experts[-1]
    if num_experts is not None:
        if highest >= num_experts:
            hint = "numbered from 1? subtract 1" if lowest == 1 and highest == num_experts else TOO_HIGH
            raise InputError(field, highest, f"experts 0 to {num_experts - 1}", hint)
        return num_experts
    if len(experts) > MANY_IDS and highest + 1 >= 2 * (experts[-2] + 1):
        found = f"{highest}, and no other above {experts[-2]}"
        hint = "leave it out, or give --num-experts if it is one"
        raise InputError(field, found, "experts: a number that stands for none?", hint)
    from_1 = "; none is 0: are they numbered from 1?" if lowest == 1 else ""
    notes.append(f"{highest + 1} experts, the highest id seen + 1; give --num-experts if the network has more{from_1}")
    return highest + 1


def refuse_parts(files: Sequence[Path]) -> None:
    """Raise where the names of files tell parts of the same steps, which must not follow each other in time."""
    parts = {found[0] for name in names_of(files) if (found := _PART.search(name))}
    if len(parts) > 1:
        limit = "steps that follow each other: these names tell parts of the same ones"
        hint = "put the stages of a pipeline side by side, add up others, and give one file"
        raise InputError("PATHS", ", ".join(names_of(files)), limit, hint)


def refuse_local(by_rank: IntArray) -> None:
    """Raise where ranks number their own experts. by_rank: [ranks, T, L, E] counts.

    All layers have as many assignments then when all ranks are taken together, but not on a rank; of ranks that count
    their tokens, whoever has the experts, every one has as many in all layers.
    """
    sums = by_rank.sum(axis=3)
    total = sums.sum(axis=0)
    own = (total == total[:, :1]).all() and (sums != sums[:, :, :1]).any()
    everywhere = 2 * np.median(by_rank.any(axis=(1, 2)).sum(axis=0)) > len(by_rank)  # and not copies here and there
    if own and everywhere:
        raise InputError(
            "PATHS: expert", f"{by_rank.shape[3]} experts that are others on every rank, by the sums of the layers",
            "one number for each expert of a layer", "add to an expert those of the ranks before its own",
        )  # fmt: skip


def refuse_no_counts(counts: IntArray, *, mapped: bool, ids: bool) -> None:
    """Raise where the numbers [T, L, E] of tables are no counts.

    mapped: whether they may be a map of experts; ids: whether experts of tokens.
    """
    refuse_narrow("PATHS: counts", counts)
    if ids and are_ids(counts[:, :, counts.any(axis=(0, 1))]):  # columns numbered from 1 leave out the first
        raise InputError("PATHS: counts", "experts that tokens chose, by the numbers", "counts of experts", NOT_IDS)
    if mapped:
        refuse_map(counts)


def refuse_tokens(field: str, counts: IntArray) -> None:
    """Raise where numbers [T, L, E] that are called tokens are the same for all experts: those of a whole step."""
    most_TL1 = counts.max(axis=2, keepdims=True)
    many = np.count_nonzero(most_TL1 > 1) >= ENOUGH_SUMS and counts.shape[2] > 2
    if many and ((counts == most_TL1) | (counts == 0)).all():
        hint = "of the whole step? then a share times them, and top-k, is a count; if they are counts, call them count"
        raise InputError(field, "as many for all experts of a layer", "the tokens of each expert", hint)


def refuse_map(counts: IntArray) -> None:
    """Raise where numbers [T, L, E] of tables, or [ranks, L, E], say where experts are, or their copies."""
    if is_map(counts):
        hint = "gemopt placement import reads maps; of counts write a line for each expert, with a column count"
        raise InputError("PATHS: counts", "a map of experts, by the numbers", "counts of experts", hint)


class Own(NamedTuple):
    """Ranks whose counts are to be added up, how many ranks recorded each of these, and the note on the others."""

    ranks: list[int]
    times: int
    note: str


def own_counts(recorded: Mapping[int, Hashable | None]) -> Own:
    """The ranks without those that saw the tokens of another one.

    recorded: by rank, what tells its counts from others'; None where there are none. All groups of ranks that recorded
    the same must be of one size, as tensor-parallel groups are.
    """
    groups: dict[Hashable, list[int]] = {}
    for rank, counts in sorted(recorded.items()):
        if counts is not None:
            groups.setdefault(counts, []).append(rank)
    sizes = {len(ranks) for ranks in groups.values()}
    if sizes <= {1}:
        return Own(sorted(recorded), 1, "")
    if len(sizes) > 1:
        alike = next(ranks for ranks in groups.values() if len(ranks) > 1)
        note = f"ranks {ranges(alike)} recorded the same counts, others did not: all are added up"
        return Own(sorted(recorded), 1, note)
    size, kept = sizes.pop(), [ranks[0] for ranks in groups.values()]
    who = f"all {size} ranks" if len(kept) == 1 and size == len(recorded) else f"groups of {size} ranks"
    return Own(kept, size, f"{who} recorded the same counts (they saw the same tokens): counted once")


def untouched(rows: IntArray, layer_ids: Sequence[int]) -> str:
    """Which layers of a map [L, P] hold the experts in order; empty where all or none do."""
    in_order = np.arange(rows.shape[1]) % max(1, int(rows.max(initial=0)) + 1)
    plain = np.flatnonzero((rows == in_order).all(axis=1))
    return ranges(layer_ids[int(i)] for i in plain) if len(plain) < len(rows) else ""


def filled(layer_ids: Iterable[int], hidden: int) -> list[str]:
    """The note on decoder layers that a placement has no row for, in a file that has one for each."""
    lacking = set(range(hidden)) - set(layer_ids)
    layers, are, they_have = ("Layer", "is", "it has") if len(lacking) == 1 else ("Layers", "are", "they have")
    return [f"{layers} {ranges(lacking)} {are} not in the placement: right if {they_have} no experts."] * bool(lacking)


def without_drafts(counts: IntArray, options: TraceOptions, notes: list[str]) -> IntArray:
    """[T, rows, E] counts of the decoder layers: rows from `num_hidden_layers` on are left out, with a note."""
    hidden = options.num_hidden_layers
    if hidden is None or counts.shape[1] <= hidden:
        return counts
    note = f"layers from {hidden} on are draft layers: left out"
    if note not in notes:
        notes.append(note)
    return counts[:, :hidden]


def check_loads(load_LE: IntArray, layer_ids: Sequence[int]) -> list[str]:
    """Notes on the total assignments [L, E] of a recording: experts that were never chosen.

    Raises
    ------
    InputError
        A layer that was to be kept has none at all: it is dense, or belongs to a part that was not recorded. Or experts
        are numbered on from layer to layer.
    """
    idle = [layer for layer, row in zip(layer_ids, load_LE, strict=True) if not row.any()]
    if idle:
        busy = as_option(set(layer_ids) - set(idle))
        raise InputError(
            f"counts: layer {idle[0]}",
            "no assignments at any step",
            "some in every MoE layer",
            f"if {ranges(idle)} have no experts, give --layer-ids {busy}" if busy else "record again",
        )
    used_LE = (load_LE > 0).astype(np.int64)
    used_L = used_LE.sum(axis=1)
    meet = (used_L.sum() ** 2 - (used_L**2).sum()) / (2 * load_LE.shape[1])  # pairs of layers share as many by chance
    if used_LE.sum(axis=0).max() == 1 and meet >= MANY_SHARED:
        found, limit = "experts of which none is in two layers", "numbers from 0 in every layer"
        raise InputError("counts: experts", found, limit, "subtract from each those of the layers before")
    return _never_chosen(load_LE, layer_ids) + _twice(load_LE, layer_ids)


def _twice(load_LE: IntArray, layer_ids: Sequence[int]) -> list[str]:
    """The note on layers whose experts have the totals of another layer's, unless they are all the same."""
    _, first, number = np.unique(load_LE, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[number.reshape(-1)] != np.arange(len(load_LE)))
    if not len(again) or len(first) == 1:
        return []
    layers = ranges(layer_ids[int(i)] for i in again)
    return [f"layers {layers} have the totals of an earlier layer, expert by expert: recorded twice?"]


def _never_chosen(load_LE: IntArray, layer_ids: Sequence[int]) -> list[str]:
    experts = load_LE.shape[1]
    never = np.flatnonzero(~load_LE.any(axis=0))
    why = "a short recording, or only one rank's experts were counted"
    if len(never):
        return [f"{len(never)} of {experts} experts were never chosen in any layer ({ranges(never)}): {why}"]
    used = (load_LE > 0).sum(axis=1)
    few = np.flatnonzero(2 * used <= experts)
    if not len(few):
        return []
    worst = int(few[used[few].argmin()])
    layers = ranges(layer_ids[int(i)] for i in few)
    return [f"layers {layers} use half of their {experts} experts or fewer ({int(used[worst])} at least): {why}"]


def check_steps(total_TL: IntArray, layer_ids: Sequence[int]) -> list[str]:
    """Notes on steps whose layers have none or other sums: every token of a step goes through all of them."""
    none_TL = (total_TL == 0) & total_TL.any(axis=1, keepdims=True)
    usual_T1 = np.sort(total_TL, axis=1)[:, total_TL.shape[1] // 2, None]
    other_TL = (total_TL != usual_T1) & total_TL.all(axis=1, keepdims=True)
    parts = "parts of a recording that do not belong to the same steps"
    whose = "steps of one layer, " if len(total_TL) == 1 and 4 * other_TL.sum() > other_TL.size else ""
    found = [
        (none_TL, f"no assignments, though others have: draft layers, or {parts}"),
        (
            other_TL,
            f"another sum than others: {whose}draft layers, dropped or padded tokens, or ranks that did not record",
        ),
    ]
    return [
        f"in {int(odd_TL.any(axis=1).sum())} of {len(odd_TL)} steps layers "
        f"{ranges(layer_ids[int(i)] for i in np.flatnonzero(odd_TL.any(axis=0)))} have {what}"
        for odd_TL, what in found
        if odd_TL.any()
    ]


def same_for_all(counts: IntArray, most_TL: IntArray, total_TL: IntArray) -> IntArray:
    """Steps of counts [T, L, E] whose tokens all choose the same experts in every layer; most_TL: largest of each."""
    few = np.flatnonzero((most_TL[:, 0] >= MANY_ALIKE) & (2 * counts.shape[2] * most_TL[:, 0] >= 3 * total_TL[:, 0]))
    used_TL = np.count_nonzero(counts[few], axis=2)
    same: IntArray = few[(total_TL[few] == most_TL[few] * used_TL).all(axis=1)]
    return same


def made_up(same_LE: IntArray, load_LE: IntArray) -> bool:
    """Whether experts that all tokens of some steps chose, with same_LE there, have less than half of the rest."""
    rest_LE = load_LE - same_LE
    chosen_L = (rest_LE * (same_LE > 0)).sum(axis=1)
    return bool((2 * chosen_L < rest_LE.sum(axis=1)).any())  # else many tokens choose them anyway


def fewer(sizes: IntArray) -> list[str]:
    """The note on tokens that name fewer experts in a layer than others do; sizes: how many each does, 0 for none."""
    most = int(sizes.max(initial=0))
    few = int(((sizes > 0) & (sizes < most)).sum())
    told = f"{few} of {len(sizes)} choices of tokens in a layer are of fewer than {most} experts"
    return [f"{told}: dropped, cut, or chosen so?"] if few else []


def fullest(counts: IntArray, total_TL: IntArray) -> list[str]:
    """The note on counts [T, L, E] of as many experts in all layers and steps, whose sums differ: the fullest ones."""
    used = set(np.count_nonzero(counts[:LOOKED_AT], axis=2).ravel().tolist()) - {0}
    apart = 2 * np.count_nonzero((total_TL != total_TL[:, :1]).any(axis=1)) > len(total_TL)
    if not apart or len(used) > 1 or used == {counts.shape[2]} or total_TL.size < ENOUGH_SUMS:
        return []
    few = f"{max(used)} of {counts.shape[2]} experts have counts in every layer and step, whose sums differ"
    return [f"{few}: a list of the fullest ones alone?"]


class Shares:
    """Experts whose share of the assignments is one and the same in all layers of all steps added so far.

    Also the last 2 to 8 together: where shared experts are served as routed ones, a token may take any copy of them.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts, self.cells = num_experts, 0
        self.groups = [range(e, e + 1) for e in range(num_experts)]
        self.groups += [range(num_experts - n, num_experts) for n in range(2, min(MOST_SHARED, num_experts - 1) + 1)]
        self.times: list[int] = []  # how many assignments there are to one of theirs

    def add(self, counts: IntArray, total_TL: IntArray) -> None:
        """Keep those for which it holds in [T, L, E] counts too."""
        busy = np.argwhere(total_TL > 0)
        if not self.cells and len(busy):
            first, total = counts[*busy[0]].astype(np.int64), int(total_TL[*busy[0]])
            sums = [int(first[group.start : group.stop].sum()) for group in self.groups]
            kept = [(g, total // n) for g, n in zip(self.groups, sums, strict=True) if n and total % n == 0]
            self.groups, self.times = [g for g, _ in kept], [times for _, times in kept]
        self.cells += len(busy)
        same = [
            bool((counts[:, :, g.start : g.stop].sum(axis=2, dtype=np.int64) * times == total_TL).all())
            for g, times in zip(self.groups, self.times, strict=True)
        ]
        self.groups, self.times = list(compress(self.groups, same)), list(compress(self.times, same))

    def notes(self) -> list[str]:
        """Their notes, unless there are too few counts to tell."""
        alone = {group.start for group in self.groups if len(group) == 1}
        return [
            f"{_called(group)} of every {times} assignments in all layers and steps: shared by all tokens, or "
            "the total of the others? then leave it out"
            for group, times in zip(self.groups, self.times, strict=True)
            if self.cells >= MANY_CELLS and 1 < times < self.num_experts
            if len(group) == 1 or self.num_experts - 1 not in alone
        ]


def _called(group: range) -> str:
    if len(group) == 1:
        return f"expert {group.start} gets one"
    return f"experts {group.start} to {group.stop - 1} together get one"
