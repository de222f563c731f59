"""Tokens on their way as the compiled search over links reads them.

An item is what a slot held when the search began: an expert, or one copy with the tokens dealt to it. A stream counts
the bytes on every port at every step; a swap changes those of the tokens that go to either item, and of the tokens
whose sender is where an item is. Tokens stand in words, a bit each: those of a word are of one step, and of one sender
or of senders that go with one item, so that counting bits counts visits. Where each token goes to one item, a word is
their number instead.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gemopt.compiling import njit
from gemopt.kernels import put
from gemopt.latency import Curve
from gemopt.links.flows import Flow, Routes
from gemopt.solvers.search.state import Array

MOST_LINES = 6
WORD = 64
Ways = tuple[Array, Array, Array, Array, Array, Array]  # `start` to `bytes_of` of a stream


class Stream(NamedTuple):
    """Tokens between senders and items. C senders, D destinations, R ports (all directions), Q items, W words.

    counted: whether words are numbers of tokens. to_start, to_word, to_bits: words of each item, and its tokens there.
    step, group: [W]; from_start: [F + 1] first word of each group; home: [F] sender of each group. itself: whether
    groups are the items that the stream goes to. rank: [Q] of each item. node: [G]. per_node: whether nodes are
    destinations as well. inner: whether ways to ranks, beside those, use any ports. start, port, bytes: sparse rows
    [C * D]; by_port [R + 1], row_of, bytes_of: the same by port. ends: [directions + 1] ports of each.
    lines: [lines, 2, R] microseconds of a port: the largest of intercept + slope * bytes. loads: [T, R]; times: [T].
    """

    counted: bool
    to_start: Array
    to_word: Array
    to_bits: Array
    step: Array
    group: Array
    from_start: Array
    home: Array
    itself: bool
    rank: Array
    node: Array
    destinations: int
    per_node: bool
    inner: bool
    start: Array
    port: Array
    bytes: Array
    by_port: Array
    row_of: Array
    bytes_of: Array
    ends: Array
    lines: Array
    loads: Array
    times: Array


class Scratch(NamedTuple):
    """Room for one swap of ranks a and b: what changes, and the times [T] afterwards.

    own: whether the items that are swapped are those the stream goes to, else only its senders are where they are.
    once, twice: [W, D] tokens with an item at each destination, and with two or more. held: [2, W] of either item.
    columns: [T, 4, C] tokens of each sender to a, b, and their nodes. rows: [T, 2, D] tokens of senders a and b to each
    destination. loads: [T, R]. changed: [T] steps. slopes: [T, C, D], see `linked_tangents`.
    """

    own: bool
    once: Array
    twice: Array
    held: Array
    columns: Array
    rows: Array
    loads: Array
    changed: Array
    times: Array
    slopes: Array


def make_stream(flow: Flow, position_T: Array, rank_Q: Array, home_F: Array, *, itself: bool) -> Stream:
    """The stream of a flow whose steps are at other positions in the search.

    `rank_Q` and `home_F` are shared with the search: ranks of the items, and of the groups, which are the items that
    senders follow or else the senders.
    """
    route, counted = flow.routes[0], flow.slot_NK.shape[1] == 1
    group_N = flow.sender_N if flow.follow_N is None else flow.follow_N
    key_N = group_N.astype(np.int64) * flow.num_steps + position_T[flow.step_N]
    order = np.argsort(key_N, kind="stable")
    keys, first, size = np.unique(key_N[order], return_index=True, return_counts=True)
    place_N = np.arange(len(order)) - np.repeat(first, size)
    words = np.ones_like(size) if counted else -(-size // WORD)
    word_N = np.repeat(np.cumsum(words) - words, size) + (0 if counted else place_N // WORD)
    bits_N = flow.weight_N[order].astype(np.uint64) if counted else np.uint64(1) << (place_N % WORD).astype(np.uint64)
    group_W = np.repeat(keys // flow.num_steps, words)
    ways, ends, lines = _ways(flow.routes)
    used_CD = np.diff(ways[0]).reshape(-1, route.destinations)
    inner = bool(used_CD[:, : len(route.node_of_rank)].any())
    stream = Stream(
        counted, *_lists(flow.slot_NK[order], word_N, bits_N, len(group_W), len(rank_Q), counted=counted),
        np.repeat(keys % flow.num_steps, words), group_W, np.searchsorted(group_W, np.arange(len(home_F) + 1)), home_F,
        itself, rank_Q, route.node_of_rank.astype(np.int32), route.destinations,
        route.destinations > len(route.node_of_rank), inner, *ways, ends, lines,
        np.zeros((flow.num_steps, int(ends[-1]))), np.zeros(flow.num_steps),
    )  # fmt: skip
    set_loads(stream, make_scratch(stream, own=True))
    return stream


def _lists(
    items_NK: Array, word_N: Array, bits_N: Array, words: int, size: int, *, counted: bool
) -> tuple[Array, Array, Array]:
    """`Stream.to_start`, `to_word` and `to_bits` of tokens in the order of their words."""
    token, place = np.nonzero(items_NK >= 0)
    key = items_NK[token, place].astype(np.int64) * words + word_N[token]
    order = np.argsort(key, kind="stable")
    keys, first = np.unique(key[order], return_index=True)
    gather = np.add if counted else np.bitwise_or
    bits = gather.reduceat(bits_N[token[order]], first) if len(first) else np.zeros(0, np.uint64)
    return np.searchsorted(keys, np.arange(size + 1) * words), keys % max(words, 1), bits


@lru_cache(maxsize=4)
def _ways(routes: tuple[Routes, ...]) -> tuple[Ways, Array, Array]:
    """One sparse row per sender and destination with the ports of all directions, the same by port; `ends`, `lines`.

    The streams of all layers share them.
    """
    from scipy.sparse import hstack

    table = hstack([each.matrix[:, : each.num_ports] for each in routes], format="csr")
    ends = np.concatenate([[0], np.cumsum([each.num_ports for each in routes])]).astype(np.int64)
    lines = _lines([each.curves[k] for each in routes for k in each.curve_of])
    return (*_arrays(table), *_arrays(table.tocsc())), ends, lines


def _arrays(table: Any) -> tuple[Array, Array, Array]:
    return table.indptr.astype(np.int64), table.indices.astype(np.int32), table.data.astype(np.float64)


def _lines(curves: list[Curve]) -> Array:
    """[lines, 2, R] convex hull of each curve; of one with many corners only some lines, which are nowhere above it."""
    found = np.full((len(curves), MOST_LINES, 2), (-1e30, 0.0))
    for r, curve in enumerate(curves):
        pieces: list[Any] = curve.hull.pieces()
        if len(pieces) > MOST_LINES:
            pieces = [pieces[i] for i in np.unique(np.linspace(0, len(pieces) - 1, MOST_LINES).round().astype(int))]
        found[r, : len(pieces)] = pieces
    used = int((found[:, :, 0] > -1e29).sum(axis=1).max()) if len(curves) else 1
    return np.ascontiguousarray(found[:, :used].transpose(1, 2, 0))


def make_scratch(stream: Stream, *, own: bool) -> Scratch:
    """Room for the changes of one stream, whose items are where they are now."""
    (steps, ports), words = stream.loads.shape, len(stream.step)
    senders = (len(stream.start) - 1) // stream.destinations
    scratch = Scratch(
        own, np.zeros((words, stream.destinations), np.uint64), np.zeros((words, stream.destinations), np.uint64),
        np.zeros((2, words), np.uint64), np.zeros((steps, 4, senders), np.int32),
        np.zeros((steps, 2, stream.destinations), np.int32), np.zeros((steps, ports)), np.zeros(steps, np.uint8),
        np.zeros(steps), np.zeros((steps, senders, stream.destinations)),
    )  # fmt: skip
    for destination in range(stream.destinations):
        mark(stream, scratch, destination)
    return scratch


@njit(nogil=True, inline="always")
def number(stream: Stream, word: Any) -> Any:
    """Tokens of a word: its bits, as compilers know how to count them."""
    if not stream.counted:
        word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
        word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
        word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        word = (word * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return np.int64(word)


@njit(nogil=True, inline="always")
def beyond(stream: Stream, bits: Any, others: Any) -> Any:
    """How many of the tokens in a word are not among others; where each goes to one item, none is."""
    return number(stream, bits if stream.counted else bits & ~others)


@njit(nogil=True)
def mark(stream: Stream, scratch: Scratch, destination: int) -> None:
    """Bring `once` and `twice` of a destination up to date with the ranks of the items."""
    once, twice, node, num_ranks = scratch.once, scratch.twice, stream.node, stream.node.shape[0]
    once[:, destination] = 0
    twice[:, destination] = 0
    for x in range(stream.rank.shape[0]):
        rank = stream.rank[x]
        if destination != (rank if destination < num_ranks else num_ranks + node[rank]):
            continue
        for at in range(stream.to_start[x], stream.to_start[x + 1]):
            word, bits = stream.to_word[at], stream.to_bits[at]
            if stream.counted:
                once[word, destination] += bits
            else:
                twice[word, destination] |= once[word, destination] & bits
                once[word, destination] |= bits


@njit(nogil=True)
def set_loads(stream: Stream, scratch: Scratch) -> None:
    """Fill the stream's loads and times."""
    stream.loads[:] = 0.0
    scratch.changed[:] = 1
    for w in range(stream.step.shape[0]):
        first = stream.home[stream.group[w]] * stream.destinations
        for d in range(stream.destinations):
            tokens = number(stream, scratch.once[w, d])
            for k in range(stream.start[first + d], stream.start[first + d + 1]):
                stream.loads[stream.step[w], stream.port[k]] += tokens * stream.bytes[k]
    set_times(stream, scratch)
    put(stream.times, scratch.times)


@njit(nogil=True, fastmath=True)
def fullest(base: Array, slope: Array, load: Array, more: Array) -> float:
    """Microseconds of the fullest port, each with one line; a port without bytes takes none."""
    worst = 0.0
    for r in range(load.shape[0]):
        total = load[r] + more[r]
        value = base[r] + slope[r] * total
        worst = max(worst, value if total > 0.5 else 0.0)
    return worst


@njit(nogil=True)
def set_times(stream: Stream, scratch: Scratch) -> None:
    """Fill `scratch.times` with the steps' times after the listed changes."""
    ends, lines = stream.ends, stream.lines
    for t in range(scratch.times.shape[0]):
        if scratch.changed[t] == 0:
            scratch.times[t] = stream.times[t]
            continue
        total = 0.0
        for n in range(ends.shape[0] - 1):
            lo, hi = ends[n], ends[n + 1]
            load, more = stream.loads[t, lo:hi], scratch.loads[t, lo:hi]
            if lines.shape[0] == 1:
                total += fullest(lines[0, 0, lo:hi], lines[0, 1, lo:hi], load, more)
                continue
            worst = 0.0
            for r in range(hi - lo):
                value = -1e30
                for k in range(lines.shape[0]):
                    value = max(value, lines[k, 0, lo + r] + lines[k, 1, lo + r] * (load[r] + more[r]))
                worst = max(worst, value if load[r] + more[r] > 0.5 else 0.0)
            total += worst
        scratch.times[t] = total
