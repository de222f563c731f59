"""What arrays beside counts say of their steps, layers and experts, by names and numbers, whoever reads the counts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError

IntArray = NDArray[np.integer[Any]]
NO_TRAFFIC = {
    "pad", "padding", "padded", "dummy", "dropped", "drop", "overflow", "skip", "skipped", "ignore", "ignored",
    "draft", "drafted", "speculative", "accepted", "rejected", "profiling", "capture", "capturing",
}  # fmt: skip
NETWORKS = {"model", "model_id", "model_name", "network"}
PROCESSES = {
    *("pid", "process", "process_id", "worker", "worker_id", "gpu", "gpu_id", "device", "device_id", "cuda_device"),
    *("host", "hostname", "node", "node_id", "node_rank", "server", "instance", "replica_id"),
}
STEPS = {"step", "steps", "iteration", "iterations", "iter", "iters", "batch", "batches", "forward"}
NUMBERED = {
    *("", "id", "ids", "idx", "index", "indices", "num", "number", "numbers"),
    *("global", "train", "pass", "run"),
}  # words beside those in names of what numbers steps
FOUND = {  # ranks that were found by their loads
    *("slowest", "fullest", "busiest", "hottest", "worst", "straggler", "critical", "bottleneck", "max", "min"),
    "active",
}
AMOUNTS = {"num", "n", "count", "counts", "tokens", "size", "sizes"}
MEASURED = {"us", "ms", "s", "time", "latency", "load", "loads", "mean", "seed", "flops", "params"}
WEIGHTS = {"weight", "weights", "multiplicity", "repeat", "repeats", "occurrences"}
VERSIONS = {"version", "versions", "id", "ids", "update", "updates"}  # of the weights of a network
LAYERS = {"layer", "layers", "block", "blocks"}
EXTENTS = {"offset", "offsets", "start", "starts", "end", "ends", "bytes", "dim", "dims", "width", "freq"}
NO_NUMBERS = AMOUNTS | FOUND | MEASURED | EXTENTS
"""Words of what arrays say of layers besides their numbers."""
SLOTS = {"expert", "experts", "placement", "map", "mapping", "slot", "slots", "assignment", "assignments"}
GROUPED = {"cluster", "clusters", "group", "groups", "label", "labels"}  # of experts, not their copies


def refuse_telling(
    path: str | os.PathLike[str], others: Mapping[str, NDArray[Any]], counts: IntArray, *, layers: bool
) -> None:
    """Refuse arrays beside counts [T, L, E] that put their axes into another order, or tell steps apart.

    layers: whether the file says by a name that has this meaning alone which layers they are.
    """
    for name, given in others.items():
        if given.shape in (counts.shape[2:], counts.shape[1:]) and _has_copies(given, _words(name)):
            hint = "the expert in each slot? call it physical_to_logical_map; else leave it out"
            raise InputError(str(path), f"{name} beside counts", "counts of experts", hint)
        if given.ndim != 1 or given.dtype.kind not in "biu" or len(given) < 2:
            continue
        array, words = given.astype(np.int64), _words(name)
        varies, steps = bool((array != array[0]).any()), len(array) == len(counts)
        if len(array) == counts.shape[2] and _reorders(array, words, counts):
            limit, hint = "experts in order", "does it say which experts they are? then put them in order"
        elif steps and _numbers_steps(array, words, counts) and (np.diff(array) <= 0).any():
            limit, hint = "every step once, in order", "add up those of one step, and put them in order"
        elif steps and words & {"rank", "ranks"} and not words & (FOUND | AMOUNTS) and varies:
            limit, hint = "every step once, of all ranks", "add up the ranks of each step"
        elif steps and name.casefold() in NETWORKS | PROCESSES and varies:
            limit, hint = "steps of one network, of all its processes", "add up processes; keep networks apart"
        elif steps and words & NO_TRAFFIC and not words & AMOUNTS and array.max() == 1 and array.min() >= 0:
            limit, hint = "steps that were served", "leave out the others"
        elif steps and words & WEIGHTS and not words & VERSIONS and varies:
            limit, hint = "steps that count once", "repeat or add up what counts more often"
        elif not (layers or steps) and words & LAYERS and not words & NO_NUMBERS and _rise(array, counts.shape[1]):
            limit, hint = "layer_ids, if it says which layers they are", "call it so, or give --layer-ids"
        else:
            continue
        raise InputError(str(path), f"{name} beside counts", limit, f"{hint}; then leave {name} out")


def _words(name: str) -> set[str]:
    return set(re.split("[^a-z]+", name.lower()))


def _has_copies(array: NDArray[Any], words: set[str]) -> bool:
    """Whether an array [P] or [L, P] is, by name and numbers, the expert in each slot, where some have copies."""
    if array.dtype.kind not in "iu" or not words & SLOTS or words & GROUPED or not array.size:
        return False
    rows = np.sort(np.atleast_2d(array).astype(np.int64), axis=1)
    experts = int(rows[0, -1]) + 1
    ends = (rows[:, 0] == 0).all() and (rows[:, -1] == experts - 1).all()
    return bool(rows.shape[1] < 2 * experts < 2 * rows.shape[1] and ends and (np.diff(rows, axis=1) <= 1).all())


def _rise(array: IntArray, count: int) -> bool:
    """Whether so many numbers are others than 0, 1, ..., in order."""
    return bool(len(array) == count and (np.diff(array) > 0).all() and array[0] >= 0 and array[-1] >= len(array))


def _reorders(array: IntArray, words: set[str], counts: IntArray) -> bool:
    """Whether an array [E] is another order of the experts of counts [T, L, E], and not the one of their loads."""
    if not (np.sort(array) == np.arange(len(array))).all() or (np.diff(array) == 1).all():
        return False
    if len(array) in counts.shape[:2] and not words & {"expert", "experts", "order", "permutation", "perm"}:
        return False  # of steps or layers as well as of experts
    load = counts.sum(axis=(0, 1), dtype=np.int64)
    falls, *found = (
        -np.diff(each) for each in (load, load[array], load[np.argsort(array)])
    )  # an order, or places in it
    by_load = any((each >= 0).all() or (each <= 0).all() for each in found)
    return not (by_load and (falls > 0).any() and (falls < 0).any())


def _numbers_steps(array: IntArray, words: set[str], counts: IntArray) -> bool:
    """Whether an array [T] numbers steps by its name; one that is called batch may hold their tokens."""
    if not words & STEPS or not words <= STEPS | NUMBERED:
        return False
    first, *others = np.unique(array).tolist()
    in_row = first in (0, 1) and [*others] == list(range(first + 1, first + 1 + len(others)))
    tokens = counts[:, :1].sum(axis=(1, 2), dtype=np.int64)
    return bool(not words <= {"batch", "batches"} or (in_row and (tokens * array[0] != array * tokens[0]).any()))
