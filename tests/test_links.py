"""What links take: against brute force over tokens and hops, bounds against all placements, the search against both."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from brute_links import exchange_times, placements, random_links

from gemopt.bounds import lower_bound
from gemopt.bounds.links import links_bound
from gemopt.evaluate import linked_total
from gemopt.exceptions import InputError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.links import Exchange, Links
from gemopt.placement import Split
from gemopt.problem import Problem
from gemopt.solvers.base import Options
from gemopt.solvers.search.linked import Layers, search_linked
from gemopt.solvers.search.linked_swaps import links_after, promises
from gemopt.solvers.search.state import step_order
from gemopt.solvers.search.stream_swaps import forget
from gemopt.topology import LEVELS, Level, Topology

SLOTS = np.array([2, 1, 1])
SIX = np.array([2, 2, 2])


def problems_of(links: Links, slots: np.ndarray, seed: int) -> list[Problem]:
    rng = np.random.default_rng(seed)
    latencies = [Latency(((line(rng.uniform(0, 9), rng.uniform(0, 2)),),)) for _ in slots]
    counts = links.traces.counts
    return [Problem.make(counts[:, k], (ASSIGNMENTS,), latencies, slots) for k in range(counts.shape[1])]


def linear(links: Links) -> bool:
    """Whether the search sees the ports as they are, not their convex hulls."""
    return all(curve.hull.slope == curve.slope and curve.linear for curve in links.topology.ports.curves)


@pytest.mark.parametrize("seed", range(30))
def test_times_are_those_of_every_token_hop_by_hop(seed: int) -> None:
    links = random_links(seed)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(4), rng.permutation(4)]
    found = links.communication(rows, SLOTS)
    expected = exchange_times(links, rows, SLOTS)
    np.testing.assert_allclose(np.stack([found.dispatch_TL, found.combine_TL], axis=2), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_bound_is_below_every_placement_and_search_never_below_it(seed: int) -> None:
    links = random_links(seed + 1000)
    problems = problems_of(links, SLOTS, seed)
    bound_L, rows = links_bound(problems, links), placements(4, SLOTS)
    compute_L = np.array([lower_bound(problem) for problem in problems])
    together = np.maximum(bound_L, compute_L) if links.exchange.overlap else bound_L + compute_L
    chosen = [rows[k] for k in np.random.default_rng(seed).choice(len(rows), 6, replace=False)]
    values = {}
    for pair in product(range(6), repeat=2):
        picked = [chosen[k] for k in pair]
        sent = links.communication(picked, SLOTS).time_TL.sum(axis=0)
        assert (bound_L <= sent * (1 + 1e-12)).all(), (links.exchange, bound_L, sent)
        values[pair] = linked_total(problems, picked, links)
    assert together.sum() <= min(values.values()) * (1 + 1e-12)


def test_search_finds_the_best_of_all_placements_nearly_always() -> None:
    met = 0
    for seed in range(12):
        links = random_links(seed + 50, steps=4)
        problems = problems_of(links, SLOTS, seed)
        rows = placements(4, SLOTS)
        best = min(linked_total(problems, list(pair), links) for pair in product(rows, repeat=2))
        start = [np.arange(4), np.arange(4)]
        found = search_linked(problems, links, start, Options.lasting(30, patience=5))
        assert found.total_us == pytest.approx(linked_total(problems, found.rows, links))
        assert best * (1 - 1e-12) <= found.total_us <= linked_total(problems, start, links)
        met += found.total_us <= best * (1 + 1e-6)
    assert met >= 10  # a descent by swaps is no proof


@pytest.mark.parametrize("seed", range(20))
def test_the_kernels_count_what_evaluate_counts_after_many_swaps(seed: int) -> None:
    links = random_links(seed + 300, experts=6, layers=3, steps=5)
    slots = np.array([3, 2, 3])  # two slots stay empty
    problems = problems_of(links, slots, seed)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation([0, 1, 2, 3, 4, 5, -1, -1]) for _ in problems]
    search = Layers(problems, links, rows, np.zeros(1, np.uint8))
    search.settle()
    found = links.communication(search.rows(), slots)
    position = np.argsort(step_order(5))
    for layer in range(len(rows)):
        times = sum(stream.times for stream in search.streams(layer))[position]
        if linear(links):
            np.testing.assert_allclose(times, found.time_TL[:, layer], rtol=1e-9, atol=1e-9)
        else:
            assert (times <= found.time_TL[:, layer] + 1e-6).all()  # convex hulls are nowhere above
    for problem, row in zip(problems, search.rows(), strict=True):
        assert sorted(row[row >= 0].tolist()) == list(range(problem.num_experts))


def without_latencies(topology: Topology) -> Topology:
    """The same where a port without bytes takes no less time than one with few: then nothing jumps."""
    levels = {name: getattr(topology, name) for name in LEVELS}
    flat = {name: Level(bandwidth_gbs=0.005, port_of=level.port_of) for name, level in levels.items() if level}
    return topology.model_copy(update=flat | {"pair_latency_us": None})


@pytest.mark.parametrize("seed", range(40))
def test_no_swap_gains_more_on_the_links_than_promised(seed: int) -> None:
    links = random_links(seed + 2000, experts=6, steps=4)
    links = replace(links, topology=without_latencies(links.topology), _cache={})
    problems, rng = problems_of(links, SIX, seed), np.random.default_rng(seed)
    search = Layers(problems, links, [rng.permutation(6) for _ in problems], np.zeros(1, np.uint8))
    for layer in range(2):
        streams, scratches, price, room = search.around(layer, 0.0)
        weights_T, item_P, moved = search.state(layer).weights, search.item_LP[layer], np.empty((6, 3))
        base = promises(price._replace(overlap=False), room, weights_T, streams, scratches, moved)
        for i, j in combinations(range(6), 2):
            a, b = i // 2, j // 2
            if a == b:
                continue
            x, y = item_P[i], item_P[j]
            links_after(streams, scratches, x, y, a, b)
            after = weights_T @ (price.later_combine + sum(scratch.times for scratch in scratches))
            for scratch in scratches:
                forget(scratch)
            assert after >= base + moved[x, b] + moved[y, a] - 1e-9


def test_copies_serve_the_tokens_that_evaluate_counts() -> None:
    links = random_links(7, experts=4, layers=1)
    links = replace(links, exchange=links.exchange.model_copy(update={"once_per": "assignment"}))
    row = np.array([0, 1, 2, 0, 3, 0])
    flow = links.flows(0, [row], np.array([2, 2, 2]))[0]
    from gemopt.splits import even_shares

    shares = even_shares(links.traces.counts[:, 0], row)
    served = np.zeros_like(shares)
    np.add.at(served, (flow.step_N, flow.slot_NK[:, 0]), flow.weight_N)
    np.testing.assert_array_equal(served, shares)


def test_counts_alone_are_enough_for_uniform_senders_once_per_assignment() -> None:
    links = random_links(11)
    exchange = Exchange(dispatch_bytes=5, combine_bytes=3, once_per="assignment", senders="uniform")
    rows = [np.arange(4), np.array([3, 1, 0, 2])]
    with_tokens = Links.of(links.topology, links.traces, 3, exchange=exchange)
    counts_only = Links.of(links.topology, replace(links.traces, tokens=None), 3, exchange=exchange)
    first, second = with_tokens.communication(rows, SLOTS), counts_only.communication(rows, SLOTS)
    np.testing.assert_allclose(first.time_TL, second.time_TL)
    np.testing.assert_allclose(first.bytes_R, second.bytes_R)
    static = np.array([[0.25, 0.5, 1.0, 0.75, 0.5, 1.0]])
    row = np.array([[0, 1, 2, 0, 1, 3]])
    slots = np.array([2, 2, 2])
    first = with_tokens.communication(row, slots, Split.STATIC, static)
    second = counts_only.communication(row, slots, Split.STATIC, static)
    np.testing.assert_allclose(first.time_TL, second.time_TL)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "Traces.ids"),
        ({"once_per": "assignment", "senders": "recorded"}, "Traces.ids"),
        ({"once_per": "assignment", "senders": "previous"}, "Traces.ids"),
    ],
)
def test_what_needs_token_ids_says_so(asked: dict[str, str], said: str) -> None:
    links = random_links(3)
    bare = replace(links.traces, tokens=None)
    with pytest.raises(InputError, match=said):
        Links.of(links.topology, bare, 3, exchange=Exchange(dispatch_bytes=1, **asked))


def test_other_bad_links() -> None:
    links = random_links(3)
    with pytest.raises(InputError, match="the profile has 4 devices"):
        Links.of(links.topology, links.traces, 4, exchange=Exchange(dispatch_bytes=1))
    with pytest.raises(InputError, match="token_bytes"):
        Links.of(links.topology, links.traces, 3)
    tokens = replace(links.traces.tokens, source_rank=None)
    with pytest.raises(InputError, match="source_rank"):
        asked = Exchange(dispatch_bytes=1, senders="recorded")
        Links.of(links.topology, replace(links.traces, tokens=tokens), 3, exchange=asked)
    tokens = replace(links.traces.tokens, source_rank=links.traces.tokens.source_rank + 3)
    with pytest.raises(InputError, match="ranks 0 to 2"):
        Links.of(links.topology, replace(links.traces, tokens=tokens), 3, exchange=Exchange(dispatch_bytes=1))
    tokens = replace(links.traces.tokens, source_rank=links.traces.tokens.source_rank % 2)  # of a run on two ranks?
    with pytest.raises(InputError, match="some token from each of 3 ranks"):
        Links.of(links.topology, replace(links.traces, tokens=tokens), 3, exchange=Exchange(dispatch_bytes=1))
    asked = Exchange(dispatch_bytes=1, senders="recorded")
    assert Links.of(links.topology, replace(links.traces, tokens=tokens), 3, exchange=asked).senders == "recorded"


def test_layers_are_counted_again_only_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    links, counted = random_links(3), []
    flows = Links.flows
    monkeypatch.setattr(Links, "flows", lambda self, layer, *rest: counted.append(layer) or flows(self, layer, *rest))
    rows, other = [np.arange(4), np.arange(4)], np.array([1, 0, 2, 3])
    first = links.communication(rows, SLOTS).time_TL
    assert (links.communication([row.copy() for row in rows], SLOTS).time_TL == first).all()
    assert counted == [0, 1]
    links.communication([rows[0], other], SLOTS)
    links.communication([rows[0], other], SLOTS[::-1].copy())
    assert counted == [0, 1, 1, 0, 1]


def test_search_stops_when_told() -> None:
    links = random_links(5)
    problems = problems_of(links, SLOTS, 5)
    rows = [np.arange(4), np.arange(4)]
    options = Options(deadline=time.monotonic() - 1)
    found = search_linked(problems, links, rows, options)
    assert found.stopped_by is options.cut_by
    assert found.total_us == linked_total(problems, rows, links)


def with_copies(links: Links, seed: int) -> tuple[list[Problem], list[np.ndarray]]:
    """Problems of one spare slot on every rank but one, and every row, with one order of a rank's slots."""
    slots = np.array([2, 2, 1])
    problems = problems_of(links, slots, seed)
    rows = [
        np.array(row)
        for row in product(range(-1, 3), repeat=5)
        if {0, 1, 2} <= set(row) and all(a < b or a == b == -1 for a, b in (row[:2], row[2:4]))
    ]
    return problems, rows


@pytest.mark.parametrize("seed", range(12))
def test_with_copies_bounds_hold_and_the_search_finds_the_best(seed: int) -> None:
    links = random_links(seed + 700, experts=3, layers=1, steps=3)
    problems, rows = with_copies(links, seed)
    bound, values = links_bound(problems, links)[0], []
    for row in rows:
        sent = links.communication([row], problems[0].slots_per_rank)
        assert bound <= sent.time_TL.sum() * (1 + 1e-12)
        values.append(linked_total(problems, [row], links))
    start = rows[seed % len(rows)]
    found = search_linked(problems, links, [start], replace(Options.lasting(300), patience=5))
    assert found.total_us == pytest.approx(linked_total(problems, found.rows, links))
    assert found.total_us == pytest.approx(min(values))


def test_copies_that_cost_more_to_reach_than_they_save_are_dropped() -> None:
    links = random_links(5, experts=3, layers=2, steps=3)
    exchange = Exchange(dispatch_bytes=4000, combine_bytes=4000, senders="previous", overlap=False)
    links = Links.of(links.topology, links.traces, 3, exchange=exchange)
    problems, _ = with_copies(links, 5)
    start = [np.array([0, 1, 1, 2, 0]), np.array([0, 2, 0, 1, 2])]
    found = search_linked(problems, links, start, Options.lasting(300, patience=5))
    assert found.total_us < linked_total(problems, start, links)
    assert min(int((row >= 0).sum()) for row in found.rows) < 5


@pytest.mark.parametrize("seed", [914, 919, 924])
def test_with_copies_the_search_goes_on_from_placements_that_no_single_change_betters(seed: int) -> None:
    links = random_links(seed, experts=4, layers=1, steps=3)
    problems = problems_of(links, np.array([2, 2, 2]), seed - 900)
    rows = [
        np.array([e for held in ranks for e in held])
        for ranks in product([(-1, -1), *((e, -1) for e in range(4)), *combinations(range(4), 2)], repeat=3)
        if {0, 1, 2, 3} <= {e for held in ranks for e in held}
    ]
    best = min(linked_total(problems, [row], links) for row in rows)
    start = np.array([0, 1, 2, -1, 3, -1])
    found = search_linked(problems, links, [start], Options(deadline=np.inf, patience=5))
    assert found.total_us == pytest.approx(best)


@pytest.mark.parametrize("seed", [4023, 4029])
def test_layers_follow_each_other_to_placements_that_no_change_of_one_layer_betters(seed: int) -> None:
    """Senders follow experts: what one layer gains by a change, the next one loses until it has changed as well."""
    links = random_links(seed, experts=3, layers=2, steps=3)
    assert links.coupled
    problems, rows = with_copies(links, seed)
    best = min(linked_total(problems, list(pair), links) for pair in product(rows, repeat=2))
    found = search_linked(problems, links, [rows[0]] * 2, Options.lasting(300, patience=5))
    assert found.total_us == pytest.approx(best)
