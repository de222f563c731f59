"""Conflict graph, classes of experts, and the cut that places by them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json

from gemopt.conflicts import (
    ExpertClass,
    classify,
    conflict_graph,
    conflict_groups,
    correlation,
    excess_coload,
    plot_conflicts,
    significant,
    summary,
)
from gemopt.evaluate import check, objective
from gemopt.exceptions import InputError
from gemopt.latency import ACTIVE, ASSIGNMENTS, Latency, line
from gemopt.problem import Problem
from gemopt.result import StoppedBy
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.solvers.baselines.conflict import cut_graph
from gemopt.traces import Traces


def affine(intercept=10.0, slope=2.0):
    return Latency(((line(intercept, slope),),))


def place(problem, seed=0):
    return get("conflict").solve(problem, Options.lasting(60, seed=seed), None).row


def bursts(rng, steps=512, experts=16):
    """Experts 0, 1 always hot; 2, 3, 4 hot together in the second quarter; 5, 6 hot together in the last quarter."""
    rate = np.full((steps, experts), 4.0)
    rate[:, :2] = 40
    rate[steps // 4 : steps // 2, 2:5] = 40
    rate[3 * steps // 4 :, 5:7] = 40
    return rng.poisson(rate)


def test_excess_is_what_shares_and_step_sizes_do_not_explain():
    rng = np.random.default_rng(0)
    size = rng.integers(1, 20, 200)
    proportional = size[:, None] * np.array([[1, 2, 3, 10]])
    np.testing.assert_allclose(excess_coload(proportional), 0, atol=1e-9)
    turns = np.array([[10, 0, 5], [0, 10, 5]] * 50)
    excess = excess_coload(turns)
    np.testing.assert_allclose(excess, [[25, -25, 0], [-25, 25, 0], [0, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(correlation(excess)[0], [1, -1, 0])


def test_excess_weighs_steps():
    rng = np.random.default_rng(1)
    load = rng.integers(0, 9, (3, 4))
    same_total = load * 0 + np.array([[1, 5, 2, 2], [4, 2, 3, 1], [2, 2, 2, 4]])
    doubled = np.vstack([same_total, same_total[:1]])
    shares_differ = excess_coload(doubled)
    assert not np.allclose(shares_differ, excess_coload(same_total))
    zero = excess_coload(doubled, np.array([1.0, 1.0, 1.0, 0.0]))
    assert zero.shape == (4, 4) and np.isfinite(zero).all()


def test_chance_makes_no_conflicts():
    rng = np.random.default_rng(2)
    counts = rng.poisson(6, (400, 40))
    mask = significant(excess_coload(counts), len(counts))
    assert mask.sum() < 0.02 * mask.size
    assert not mask.diagonal().any()


def test_classes():
    classes = classify(bursts(np.random.default_rng(3)))
    assert classes[:2] == [ExpertClass.CONSISTENT] * 2
    assert classes[2:7] == [ExpertClass.TEMPORAL] * 5
    assert set(classes[7:]) == {ExpertClass.ORDINARY}
    assert set(classify(np.zeros((20, 3), int))) == {ExpertClass.ORDINARY}
    assert classify(np.full((1, 4), 3)) == [ExpertClass.ORDINARY] * 4


def test_noise_is_not_a_burst():
    counts = np.random.default_rng(4).poisson(5, (600, 32))
    assert set(classify(counts)) == {ExpertClass.ORDINARY}


def test_graph_finds_what_is_hot_together():
    traces = Traces(counts=bursts(np.random.default_rng(5))[:, None], layer_ids=(7,))
    graph = conflict_graph(traces, 0)
    assert sum(share for _, share in graph.nodes(data="share")) == pytest.approx(16)
    assert graph.edges[2, 3]["correlation"] > 0.8 and graph.edges[2, 5]["correlation"] < -0.1
    groups = conflict_groups(graph)
    assert [2, 3, 4] in groups and [5, 6] in groups
    text = summary(graph)
    assert text.startswith("layer 7: 16 experts, 512 steps")
    assert "consistent: 2 experts: " in text and "temporal: 5 experts: " in text and "2 3 4" in text


def test_graph_of_nothing():
    graph = conflict_graph(Traces(counts=np.zeros((2, 1, 3), int), allow_idle=True), 0)
    assert len(graph) == 3 and not graph.edges and not conflict_groups(graph)
    assert "conflicts: 0 of 3 pairs" in summary(graph) and "temporal: none" in summary(graph)  # 0 is an expert
    with pytest.raises(InputError, match="layer"):
        conflict_graph(Traces(counts=np.ones((2, 1, 3), int)), 1)
    with pytest.raises(InputError, match="window"):
        conflict_graph(Traces(counts=np.ones((2, 1, 3), int)), 0, window=3)


def test_plot_draws_every_expert():
    graph = conflict_graph(Traces(counts=bursts(np.random.default_rng(6))[:, None]), 0)
    axes = plot_conflicts(graph)
    assert len(axes.texts) == 16
    assert next(text.get_text() for text in axes.get_legend().get_texts()) == "consistent (2)"


def random_problem(rng, *, experts=None, spare=0):
    ranks = int(rng.integers(1, 5))
    experts = int(rng.integers(1, 14)) if experts is None else experts
    slots = np.zeros(ranks, int)
    for _ in range(experts + spare):
        open_ranks = np.flatnonzero(slots < experts)
        if len(open_ranks):
            slots[rng.choice(open_ranks)] += 1
    counts = rng.poisson(rng.gamma(1.0, 8.0, (int(rng.integers(1, 30)), experts)))
    latencies = [
        Latency(((line(rng.uniform(0, 30), rng.uniform(0.5, 2)), line(0, rng.uniform(0, 5))),)) for _ in range(ranks)
    ]
    return Problem.make(counts, (ASSIGNMENTS, ACTIVE), latencies, slots)


@pytest.mark.parametrize("spare", [0, 3])
def test_rows_are_feasible_for_any_slots(spare):
    rng = np.random.default_rng(spare)
    for _ in range(60):
        problem = random_problem(rng, spare=spare)
        row = place(problem)
        check(problem, row)
        assert (row >= 0).sum() == problem.num_experts  # spare slots stay empty
        np.testing.assert_array_equal(row, place(problem))


def test_no_exchange_lowers_the_cut():
    rng = np.random.default_rng(11)
    for _ in range(12):
        problem = random_problem(rng, experts=9, spare=2)
        graph, row = cut_graph(problem), place(problem)
        rank_I = np.empty(problem.num_slots, int)
        spare = iter(range(problem.num_experts, problem.num_slots))
        for expert, rank in zip(row, problem.rank_of_slot, strict=True):
            rank_I[expert if expert >= 0 else next(spare)] = rank
        cost = graph.cost(rank_I)
        for i, j in itertools.combinations(range(problem.num_slots), 2):
            turned = rank_I.copy()
            turned[i], turned[j] = rank_I[j], rank_I[i]
            assert graph.cost(turned) >= cost * (1 - 1e-7)


def test_the_cut_is_the_levelling_of_squared_times():
    """Up to a constant, the weight inside the ranks is sum_g (o_g + s_g load_g)^2 / s_g when every pair counts."""
    rng = np.random.default_rng(12)
    counts = np.repeat(rng.integers(0, 400, (1, 8)), 64, axis=0)  # no variation: only the mean products remain
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine(5, 1), affine(30, 1.5)])
    graph = cut_graph(problem)
    slope, scale = graph.slope_G, 1.25  # microseconds per load, mean over the ranks
    costs, squares = [], []
    for chosen in itertools.combinations(range(8), 4):
        rank_I = np.isin(np.arange(8), chosen).astype(int)
        load = np.array([counts[0, rank_I == g].sum() for g in range(2)]) * scale
        costs.append(graph.cost(rank_I))
        squares.append(((np.array([0, 25]) + slope * load) ** 2 / slope).sum())
    np.testing.assert_allclose(np.diff(costs), np.diff(squares), rtol=1e-6)


def test_conflicting_experts_are_separated():
    """Two pairs that are hot in turn, all with the same mean: only the graph knows which may share a rank."""
    turns = np.tile(np.repeat([[20, 20, 0, 0], [0, 0, 20, 20]], 5, axis=0), (20, 1))
    problem = Problem.make(turns, (ASSIGNMENTS,), [affine(), affine()])
    row = place(problem)
    assert {frozenset(row[:2].tolist()), frozenset(row[2:].tolist())} <= {
        frozenset(pair) for pair in [(0, 2), (0, 3), (1, 2), (1, 3)]
    }
    assert objective(problem, row) == pytest.approx(200 * (10 + 2 * 20))


def test_slow_ranks_get_less():
    counts = np.random.default_rng(13).poisson(10, (50, 24))
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine(0, 1), affine(0, 1), affine(0, 3)], [24, 24, 24])
    row = place(problem)
    held = [(row[problem.rank_of_slot == g] >= 0).sum() for g in range(3)]
    assert held[2] <= 5 and abs(held[0] - held[1]) <= 2


def test_the_deadline_holds():
    counts = np.random.default_rng(14).poisson(10, (50, 64))
    problem = Problem.make(counts, (ASSIGNMENTS,), [affine(), affine(5, 3)])
    outcome = get("conflict").solve(problem, Options(deadline=time.monotonic() - 1), None)
    assert outcome.stopped_by is StoppedBy.TIME_LIMIT
    check(problem, outcome.row)


@pytest.fixture
def traces_file(tmp_path):
    counts = np.stack([bursts(np.random.default_rng(i)) for i in range(2)], axis=1)
    Traces(counts=counts, layer_ids=(3, 5)).save(tmp_path / "traces.safetensors")
    return tmp_path / "traces.safetensors"


def test_command_prints_and_draws(traces_file, tmp_path, capsys):
    code, printed, _ = gemopt(capsys, "conflicts", traces_file, "--plot", tmp_path / "graph.png")
    assert code == 0 and "layer 3: 16 experts" in printed and "layer 5: 16 experts" in printed
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    (layer,) = gemopt_json(capsys, "conflicts", traces_file, "--layer", 5)
    assert layer["layer_id"] == 5 and [e["class"] for e in layer["experts"][:3]] == ["consistent"] * 2 + ["temporal"]
    assert [2, 3, 4] in layer["groups"]


def test_command_refuses_bad_input(traces_file, capsys):
    for arguments, word in [(("--layer", 4), "--layer"), (("--window", 0), "window"), (("--plot", "x.doc"), "--plot")]:
        code, _, printed = gemopt(capsys, "conflicts", traces_file, *arguments)
        assert code == 2 and word in printed and len(printed.strip().splitlines()) == 1
    assert gemopt(capsys, "conflicts", "missing.npz")[0] == 2
