"""The arithmetic and the checks of routing arrays, below the document.

Files keep every array in the smallest integer type that holds it, and NumPy computes in the type of the array: a step
of type uint8 times 256 experts wraps. So `widened` comes before any arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from gemopt.documents.arrays import plain_array
from gemopt.exceptions import InputError
from gemopt.traces.axes import IN_ORDER, MOST_LAYERS, other_order
from gemopt.traces.files import IntArray

COUNT_LIMIT = 2**31 - 1
MAX_EXPERTS = 8192
ENOUGH_SUMS, FEWEST_SLOTS, MANY_EXPERTS = 8, 8, 64  # that are no accident
FEWEST_STEPS = 4
LOOKED_AT, MOST_CHOSEN = 512, 64  # rows, experts of a token
ENDS = (127, 255, 32767, 65535)  # of small types
ENOUGH_TIES = 10  # that none comes by chance is then unlikely (e^-10)
ENOUGH_NUMBERS = 32  # in which counts are never all as often
NOT_IDS = (
    "ids of tokens: gemopt.traces.batching.from_tokens counts [tokens, layers, top-k], --from tokens those or rows"
)
FloatArray = NDArray[np.float64]
_made: WeakValueDictionary[int, IntArray] = WeakValueDictionary()  # arrays that were frozen here, by their id


def widened(array: object, dtype: type[np.signedinteger[Any]] = np.int64) -> Any:
    """Integers in a type whose sums and products do not wrap; anything else as it is, for the checks to refuse."""
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.dtype.itemsize < np.dtype(dtype).itemsize:
        return array.astype(dtype)
    if isinstance(array, np.ndarray) and array.dtype.kind == "u":  # uint64 minus anything is a float or wraps
        return array.astype(np.int64)
    return array


def one_hot(ids: IntArray, num_experts: int) -> NDArray[np.float32]:
    """[N, E] 1 where a token chose the expert; ids [N, K], -1 is skipped."""
    hot = np.zeros((len(ids), num_experts), dtype=np.float32)
    rows, cols = np.nonzero(ids >= 0)
    hot[rows, ids[rows, cols].astype(np.int64)] = 1
    return hot


def count_assignments(ids: IntArray, step: IntArray, num_steps: int, num_experts: int) -> IntArray:
    """[T, L, E] assignments from token-level `ids` [N, L, K] and the step [N] of each token; -1 is skipped."""
    counts = np.empty((num_steps, ids.shape[1], num_experts), dtype=np.int32)
    for layer, counts_TE in enumerate(_each_layer(ids, step, num_steps, num_experts)):
        counts[:, layer] = counts_TE
    return _frozen(counts)


def _each_layer(ids: IntArray, step: IntArray, num_steps: int, num_experts: int) -> Iterator[IntArray]:
    """[T, E] what `count_assignments` counts, layer by layer: of long records all of them are gigabytes."""
    check_ids(ids, num_experts)
    first_key = step.astype(np.int64) * num_experts
    for layer in range(ids.shape[1]):
        experts = ids[:, layer].astype(np.int64)
        keys = (first_key[:, None] + experts)[experts >= 0]
        yield np.bincount(keys, minlength=num_steps * num_experts).reshape(num_steps, num_experts)


def check_ids(ids: IntArray, num_experts: int) -> None:
    """`InputError` for an id outside -1 to E-1."""
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < -1 or high >= num_experts:
        raise InputError("Traces.ids", low if low < -1 else high, f"experts 0 to {num_experts - 1}, -1 for none")


def checked_counts(value: object) -> IntArray:
    """[T, L, E] counts as read-only int32; `InputError` unless they are whole numbers that fit."""
    limit = "whole numbers >= 0 [steps, layers, experts]"
    array = plain_array("Traces.counts", value, limit)
    if array.ndim != 3 or array.dtype.kind not in "iuf":
        raise InputError("Traces.counts", f"{array.dtype} array of shape {array.shape}", limit)
    if not array.size:
        raise InputError("Traces.counts", f"shape {array.shape}", "at least one step, layer and expert")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise InputError("Traces.counts", "fractions or NaN", limit, "give assignments, not shares")
    if array.min() < 0:
        raise InputError("Traces.counts", int(array.min()), limit)
    largest = float(array.sum(axis=2, dtype=np.float64).max())
    if largest > COUNT_LIMIT:
        raise InputError("Traces.counts", largest, f"at most {COUNT_LIMIT} assignments per step and layer")
    if _settled(array) and array.dtype == np.int32 and array.flags.c_contiguous:
        return array
    return _frozen(np.array(array, dtype=np.int32, order="C"))


def _frozen(array: IntArray) -> IntArray:
    """An array made here, which nobody else has a view of, read-only from now on."""
    array.setflags(write=False)
    _made[id(array)] = array
    return array


def _settled(array: IntArray) -> bool:
    """Whether nobody can write into an array, so that it need not be copied: counts of long records are gigabytes.

    Of arrays that were frozen elsewhere somebody may have a view from before, into which writing goes on.
    """
    owner = array if array.base is None else array.base
    return not array.flags.writeable and _made.get(id(owner)) is owner


def stretch(chosen: NDArray[Any]) -> slice | NDArray[Any]:
    """Increasing indices as they are, or as a slice where they are one after the other: then nothing is copied."""
    first, last = int(chosen[0]), int(chosen[-1])
    return slice(first, last + 1) if last - first + 1 == len(chosen) else chosen


def checked_times(value: object, num_steps: int) -> FloatArray | None:
    """[T, G] microseconds as they are; `InputError` unless there is a row per step, of numbers >= 0 or NaN."""
    if value is None:
        return None
    limit = f"floats [{num_steps} steps, ranks]"
    array = plain_array("Traces.rank_us", value, limit, by_row=True)
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) != num_steps or not array.shape[1]:
        raise InputError("Traces.rank_us", f"{array.dtype} array of shape {array.shape}", limit)
    if (array < 0).any() or np.isinf(array).any():
        raise InputError(
            "Traces.rank_us", "negative or infinite", "microseconds >= 0, or NaN where a rank said nothing"
        )
    return array.astype(np.float64)


def check_counted(counts: IntArray, ids: IntArray, step: IntArray) -> None:
    """`InputError` unless the token-level record makes exactly the counts [T, L, E]."""
    for layer, counted_TE in enumerate(_each_layer(ids, step, len(counts), counts.shape[2])):
        wrong = np.argwhere(counted_TE != counts[:, layer])
        if len(wrong):
            at, expert = map(int, wrong[0])
            raise InputError(
                "Traces.counts",
                int(counts[at, layer, expert]),
                f"the token-level ids make {counted_TE[at, expert]} at step {at}, layer {layer}, expert {expert}",
                "leave the ids out, or count them again",
            )


def totals(counts: IntArray) -> str:
    """What the numbers [T, L, E] say of a first or last step, layer or expert that is the sum of the others."""
    busy = counts.sum(axis=0, dtype=np.int64).any(axis=1)
    kept = counts[:, busy] if busy.any() and not busy.all() else counts  # dense layers are no parts of a sum
    for axis, name in enumerate(("step", "layer", "expert")):
        counts = kept if axis == 1 else counts
        added = counts.sum(axis=axis, dtype=np.int64)
        for place, index in (("first", 0), ("last", -1)):
            one = counts.take(index, axis=axis)
            enough = counts.shape[axis] > 2 and np.count_nonzero(one) >= ENOUGH_SUMS
            if enough and (2 * one.astype(np.int64) == added).all() and _varied(counts, axis, one):
                return f"a {place} {name} that is the sum of the others"
    return ""


def _varied(counts: IntArray, axis: int, one: IntArray) -> bool:
    """Whether counts along an axis are others at enough of the places where `one` is not 0: no balance of all alike."""
    rows = np.moveaxis(counts, axis, -1)[tuple(np.argwhere(one)[:LOOKED_AT].T)]
    return len(np.unique(rows, axis=0)) >= ENOUGH_SUMS


def refuse_totals(field: str, counts: IntArray) -> None:
    """Refuse counts [T, L, E] with `totals` among them, or a bin of no expert, or that are sums themselves."""
    if total := totals(counts):
        raise InputError(field, total, "counts alone", "leave the totals out")
    if bin_of_none := no_expert(counts):
        raise InputError(field, bin_of_none, "counts of experts alone: dropped tokens or padding?", "leave it out")
    if are_offsets(counts):
        found = "numbers that rise from expert to expert: where each one's rows begin or end"
        hint = "take the differences, which need one number more than there are experts"
        raise InputError(field, found, "assignments of each expert", hint)


def no_expert(counts: IntArray) -> str:
    """What the numbers [T, L, E] say of a first or last expert that is none, as a bin of dropped tokens.

    Without it every layer of a step has as many assignments, on other experts, and with it few have.
    """
    counts = counts[:LOOKED_AT]
    sums_TL = counts.sum(axis=2, dtype=np.int64)
    kept = sums_TL.any(axis=0)
    for place, index in (("first", 0), ("last", -1)):
        one_TL = counts[:, kept, index].astype(np.int64)
        rest_TL = sums_TL[:, kept] - one_TL
        rest_TLE = np.delete(counts[:, kept], index, axis=2)
        if (rest_TLE == rest_TLE[:, :1]).all():  # made, not routed
            continue
        uneven = 2 * np.count_nonzero((one_TL != one_TL[:, :1]).any(axis=1)) > len(one_TL)
        if uneven and np.count_nonzero(one_TL) >= ENOUGH_SUMS and rest_TL.any() and (rest_TL == rest_TL[:, :1]).all():
            return f"a {place} expert without which all layers have as many assignments"
    return ""


def are_offsets(counts: IntArray) -> bool:
    """Whether numbers [T, L, E] are sums over the experts so far: they never fall and begin at 0, or end at one sum.

    Loads that were sorted, or made so, may; but those add up to one sum in all layers.
    """
    if counts.shape[2] < FEWEST_SLOTS or counts[:, :, 0].size < 2:
        return False
    if any((part[:, :, 1:] < part[:, :, :-1]).any() for part in (counts[:FEWEST_STEPS], counts)):  # few mostly tell
        return False
    if np.count_nonzero(counts[:, :, 1:] > counts[:, :, :-1]) < ENOUGH_SUMS:
        return False
    busy = counts[:, counts.any(axis=(0, 2))]
    ends_TL, sums_TL = busy[:, :, -1], busy.sum(axis=2, dtype=np.int64)
    if (sums_TL == (sums_TL[:, :1] if sums_TL.shape[1] > 1 else sums_TL[0])).all():
        return False
    return not busy[:, :, 0].any() or (ends_TL.shape[1] > 1 and bool((ends_TL == ends_TL[:, :1]).all()))


def too_narrow(counts: IntArray) -> str:
    """What the numbers [T, L, E] say of a type too small to count in; empty where it seems large enough.

    What layers lack of the fullest one are multiples of 256 or 65536 then, and at every step other layers do; or many
    counts are the largest of a type.
    """
    sums_TL = counts.sum(axis=2, dtype=np.int64)
    sums_TL = sums_TL[:, sums_TL.any(axis=0)]
    lacking_TL = (sums_TL.max(axis=1, keepdims=True, initial=0) - sums_TL) * (sums_TL > 0)  # idle layers lack none
    largest = int(counts.max())
    if np.count_nonzero(lacking_TL) < ENOUGH_SUMS:
        return ""
    varying = len(np.unique(lacking_TL > 0, axis=0)) > 1  # unlike draft layers
    for bits in (8, 16):
        if varying and largest < 1 << bits and not (lacking_TL % (1 << bits)).any():
            return f"counts that wrapped at {1 << bits}, by the sums of the layers"
    ends, near = (int((counts > n).sum()) for n in (largest - 1, largest - largest // 8))
    return f"counts cut at {largest}" if largest in ENDS and ends >= max(ENOUGH_SUMS, near - ends) else ""


def refuse_narrow(field: str, counts: IntArray) -> None:
    """Refuse counts [T, L, E] that were kept in a type too small for them."""
    if narrow := too_narrow(counts):
        raise InputError(field, narrow, "counts in a type that holds them", "record again in 64 bits")


def add_up(counts: IntArray) -> bool:
    """Whether numbers [T, L, E] are counters since the start: none ever falls, and some rise at every step."""
    few = counts[:FEWEST_STEPS]
    if len(few) < FEWEST_STEPS or counts[0].size < ENOUGH_SUMS or (few[1:] < few[:-1]).any():
        return False
    return not (counts[1:] < counts[:-1]).any() and bool((counts[1:] > counts[:-1]).any(axis=(1, 2)).all())


def is_map(counts: IntArray) -> bool:
    """Whether numbers say where experts are: all from 0 on in every row, or a 1 where a device has an expert.

    Or each number as often as any other in every row: the devices of experts. Or the same numbers one after the other:
    their order. Or hardly any but 1: their copies.
    """
    rows = np.sort(counts[:LOOKED_AT], axis=2)
    last, slots = int(rows[0, 0, -1]), rows.shape[2]
    each, rest = divmod(slots, last + 1) if last > 1 else (0, 0)  # experts on a device
    owners = each > 1 and not rest and (rows[0, 0] == np.repeat(np.arange(last + 1), each)).all()
    order = slots >= FEWEST_SLOTS and (np.diff(rows[0, 0]) == 1).all() and (counts[:LOOKED_AT] != rows).any()
    if (owners or order) and rows.size >= ENOUGH_NUMBERS and (rows == rows[0, 0]).all():
        return True
    numbered = (
        slots >= FEWEST_SLOTS and 2 * (last + 1) > slots and (rows[:, :, -1] == last).all() and not rows[:, :, 0].any()
    )
    enough = rows[:, :, 0].size >= ENOUGH_SUMS or (4 * (last + 1) >= 3 * slots and rows.size >= MANY_EXPERTS)
    if numbered and enough and (np.diff(rows, axis=2) <= 1).all():
        return True
    held = counts.sum(axis=0, dtype=np.int64) if counts.max() == 1 else counts
    return bool(held.min() == 1 and held.mean() < 1.5 and held.size >= MANY_EXPERTS)


def are_ids(counts: IntArray) -> bool:
    """Whether numbers [N, L, K] are the experts that tokens chose: no row has one twice, though chance would have it.

    A -1 is none, and a token whose numbers are all the same in each layer is padding, unless these are but two. Numbers
    of which as many add up to as much, as layers of a step do, are counts. A few steps again and again tell nothing.
    """
    if not 2 <= counts.shape[2] <= MOST_CHOSEN:
        return False
    padded = (counts == counts[:, :, :1]).all(axis=(1, 2)) & (counts[0].size > 2)
    rows = counts[~padded][:LOOKED_AT].astype(np.int64)
    rows = rows[:, rows.any(axis=(0, 2))]  # dense layers have rows of zeros
    if not rows.size or _add_up_alike(rows) or rows.min() < -1 or rows.max() >= MAX_EXPERTS:
        return False
    rows = np.unique(rows, axis=1)
    if len(np.unique(rows, axis=0)) < ENOUGH_SUMS:
        return False
    rows = np.where(rows < 0, MAX_EXPERTS + np.arange(rows.shape[2]), rows)  # so that none equals no other
    if (np.diff(np.sort(rows, axis=2), axis=2) == 0).any():
        return False
    expected = 0.0  # pairs of one row that are equal, were the columns independent
    for layer in rows.transpose(1, 2, 0):
        share_KV = np.stack([np.bincount(column, minlength=int(rows.max()) + 1) / len(column) for column in layer])
        expected += len(rows) * float((share_KV.sum(axis=0) ** 2 - (share_KV**2).sum(axis=0)).sum()) / 2
    return expected >= ENOUGH_TIES


def _add_up_alike(rows: IntArray) -> bool:
    """Whether numbers [N, L, K] add up to as much: the columns of every row, or most layers or rows, as of drafts."""
    sums, across = rows.sum(axis=2), rows.sum(axis=1)
    of_tokens = rows.shape[1] == 1 or len(rows) > MOST_LAYERS  # no layers in another order
    as_rows = (sums == sums[:1]).all() if of_tokens else _mostly_alike(sums.T)
    return bool(as_rows or _mostly_alike(across) or (rows.shape[1] > 1 and _mostly_alike(sums)))


def _mostly_alike(sums: IntArray) -> bool:
    """Whether in every row more than half of the numbers are the same."""
    middle = np.sort(sums, axis=1)[:, sums.shape[1] // 2]
    return bool(((sums == middle[:, None]).mean(axis=1) > 0.5).all())


def as_ids(counts: IntArray) -> IntArray | None:
    """The numbers as [N, L, K] experts that tokens chose, in which order they may be; None where they are none."""
    orders = (0, 1, 2), (1, 0, 2), (0, 2, 1)
    return next((ids for order in orders if are_ids(ids := counts.transpose(order))), None)


def refuse_misread(counts: IntArray) -> None:
    """Refuse counts up to COUNT_LIMIT whose numbers say that they are something else, where nothing says otherwise."""
    if int(counts.max()) > COUNT_LIMIT:
        return
    refuse_totals("Traces.counts", counts)
    if add_up(counts):
        hint = "subtract from each step the one before, or say layer_ids beside it"
        raise InputError("Traces.counts", "counters that add up, by the numbers", "assignments of each step", hint)
    refuse_turned(counts)
    refuse_narrow("Traces.counts", counts)


def refuse_turned(counts: IntArray) -> None:
    """Refuse counts whose numbers say that their axes are in another order, or that they are experts of tokens."""
    if as_ids(counts) is not None:
        raise InputError("Traces.counts", "experts of tokens, by the numbers", "[steps, layers, experts]", NOT_IDS)
    if order := other_order(counts):
        raise InputError("Traces.counts", order, "[steps, layers, experts]", f"{IN_ORDER}, or say layer_ids beside it")
