"""Rules: what breaks them, solvers that keep them against all placements, smallest conflicts, bad input."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute import cost, random_problem
from cli_inputs import gemopt, profile, traces, write_inputs

from gemopt.bounds import lower_bound
from gemopt.costs import fit
from gemopt.evaluate import check, check_rules, evaluate, objective, total
from gemopt.exceptions import InputError, UnsupportedError
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.layer_rules import check_kept, layer_rules, rules_of
from gemopt.links import Exchange
from gemopt.migration import held as held_by
from gemopt.moves import Moves
from gemopt.placement import EMPTY, Placement, Split
from gemopt.problem import Problem
from gemopt.result import Status
from gemopt.rules import Rules
from gemopt.solve import solve
from gemopt.solvers import get, names
from gemopt.solvers.base import Options, require
from gemopt.solvers.placing import conflict, fewest_row, first_row, nearest_row
from gemopt.solvers.search.linked_copies import _changes
from gemopt.solvers.search.local_search import LocalSearch
from gemopt.solvers.search.state import make_costs, make_state
from gemopt.solvers.search.swaps import descend, iterate, total_cost
from gemopt.traces import Tokens, Traces
from gemopt.traces.arrays import count_assignments
from gemopt.verify import verify

NODES = [0, 0, 1]
Sets = tuple[tuple[int, ...], ...]


def random_rules(seed: int, num_experts: int, num_ranks: int) -> Rules:
    """One to three rules, which may contradict each other."""
    rng = np.random.default_rng(seed)

    def some(size: int, least: int = 1, most: int = 3) -> list[int]:
        count = int(rng.integers(min(least, size), min(size, most) + 1))
        return np.sort(rng.choice(size, count, replace=False)).tolist()

    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(int(rng.integers(1, 4))):
        kind = str(rng.choice(["pinned", "kept_off", "reserved", "apart", "together", "groups"]))
        rule: dict[str, Any] = {"experts": some(num_experts, 2 if kind == "apart" else 1)}
        if kind in ("pinned", "kept_off", "reserved"):
            rule["ranks"] = some(num_ranks, most=2)
        if kind == "together" and num_ranks == 3:
            rule["on"] = str(rng.choice(["rank", "node"]))
        if kind == "groups":
            rule = {"num_groups": int(rng.choice([n for n in (1, 2, 3, 4) if num_experts % n == 0]))}
        if (kind == "groups" and num_ranks < 3) or (kind == "apart" and num_experts < 2):
            continue
        found.setdefault(kind, []).append(rule)
    return Rules.model_validate(found)


def keeps(rules: Rules, ranks_E: Sets) -> bool:
    """Whether expert e may sit on the ranks `ranks_E[e]`, straight from the words of the rules."""

    def units(experts: list[int], unit_of: list[int]) -> set[int]:
        return {unit_of[rank] for expert in experts for rank in ranks_E[expert]}

    experts = range(len(ranks_E))
    for rule in rules.pinned:
        if any(set(ranks_E[e]) - set(rule.ranks) for e in rule.experts):
            return False
    for rule in rules.kept_off:
        if any(set(ranks_E[e]) & set(rule.ranks) for e in rule.experts):
            return False
    for rule in rules.reserved:
        if any(set(ranks_E[e]) & set(rule.ranks) for e in experts if e not in rule.experts):
            return False
    for rule in rules.apart:
        if any(set(ranks_E[a]) & set(ranks_E[b]) for a, b in combinations(rule.experts, 2)):
            return False
    for rule in rules.together:
        if len(units(rule.experts, [0, 1, 2] if rule.on == "rank" else NODES)) > 1:
            return False
    for rule in rules.groups:
        size = len(ranks_E) // rule.num_groups
        if any(len(units(list(experts[n : n + size]), NODES)) > 1 for n in range(0, len(ranks_E), size)):
            return False
    return True


def all_placements(problem: Problem) -> list[Sets]:
    most = min(problem.num_ranks, problem.spare_slots + 1)
    sets = [ranks for r in range(1, most + 1) for ranks in combinations(range(problem.num_ranks), r)]
    found = []
    for ranks_E in product(sets, repeat=problem.num_experts):
        used = np.bincount([rank for ranks in ranks_E for rank in ranks], minlength=problem.num_ranks)
        if (used <= problem.slots_per_rank).all() and not (problem.full and used.sum() < problem.num_slots):
            found.append(ranks_E)
    return found


def sets_of(problem: Problem, row: np.ndarray) -> Sets:
    return tuple(tuple(problem.rank_of_slot[row == e].tolist()) for e in range(problem.num_experts))


def random_case(seed: int, **fields: Any) -> tuple[Problem, Rules]:
    """A tiny problem with rules on it."""
    problem = replace(random_problem(seed), **fields)
    rules = random_rules(seed, problem.num_experts, problem.num_ranks)
    (asked,) = layer_rules(rules, [0], problem.num_experts, problem.num_ranks, NODES[: problem.num_ranks])
    return replace(problem, rules=asked), rules


def options(seconds: float = 60.0, **fields: Any) -> Options:
    return Options(deadline=time.monotonic() + seconds, **fields)


def clash(problem: Problem) -> list[str]:
    assert problem.rules is not None
    return conflict(problem.rules, problem.slots_per_rank, full=problem.full, deadline=time.monotonic() + 60)


SEEDS = [7, 59, 76, 89, 104, 119, 131, 145, 223, 304]  # of rules that leave some placements, without spare slots
SPARE = [26, 31, 43, 46, 67, 80, 166, 178, 189, 220, 237]  # and with


@pytest.mark.parametrize("seed", SEEDS + SPARE)
def test_cpsat_finds_the_best_placement_that_keeps_the_rules(seed: int) -> None:
    problem, rules = random_case(seed)
    kept = [ranks_E for ranks_E in all_placements(problem) if keeps(rules, ranks_E)]
    assert 1 < len(kept) < len(all_placements(problem)) and clash(problem) == []
    best = min(cost(problem, ranks_E) for ranks_E in kept)
    assert lower_bound(problem) <= best * (1 + 1e-9) + 1e-9
    outcome = get("cpsat").solve(problem, options(), None)
    assert outcome.row is not None and outcome.bound_us is not None
    assert keeps(rules, sets_of(problem, outcome.row))
    assert objective(problem, outcome.row) == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert outcome.bound_us <= best * (1 + 1e-9) + 1e-9
    searched = LocalSearch().solve(problem, options(patience=2), None)
    assert searched.row is not None and keeps(rules, sets_of(problem, searched.row))
    assert objective(problem, searched.row) >= best * (1 - 1e-9) - 1e-9


@pytest.mark.parametrize("seed", SEEDS[::2] + SPARE[::2])
def test_moves_and_rules_together(seed: int) -> None:
    """Price, limits and rules hold at once; where they leave nothing, that is proven."""
    problem, rules = random_case(seed)
    rng = np.random.default_rng(seed)
    home_GE = held(problem, all_placements(problem)[int(rng.integers(len(all_placements(problem))))])
    most = None if rng.random() < 0.3 else int(rng.integers(0, 4))
    problem = problem.with_moves(Moves.make(home_GE, float(rng.choice([0.0, 1.0, 10.0])), most))
    assert problem.moves is not None
    best = np.inf
    for ranks_E in all_placements(problem):
        moved = int((held(problem, ranks_E) & ~home_GE).sum())
        if keeps(rules, ranks_E) and (most is None or moved <= most):
            best = min(best, cost(problem, ranks_E) + moved * problem.moves.price_us)
    for name in ("cpsat", "local-search"):
        outcome = get(name).solve(problem, options(patience=2), None)
        assert outcome.infeasible == (best == np.inf), outcome.note
        if outcome.row is not None:
            check(problem, outcome.row)
            assert keeps(rules, sets_of(problem, outcome.row))
            assert total(problem, outcome.row) >= best * (1 - 1e-9) - 1e-9
            if name == "cpsat":
                assert total(problem, outcome.row) == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", [67, 145])
def test_milp_finds_it_too(seed: int) -> None:
    problem, rules = random_case(seed)
    best = min(cost(problem, ranks_E) for ranks_E in all_placements(problem) if keeps(rules, ranks_E))
    outcome = get("milp").solve(problem, options(), None)
    assert problem.rules is not None and outcome.row is not None and keeps(rules, sets_of(problem, outcome.row))
    assert objective(problem, outcome.row) == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_a_conflict_is_smallest_and_a_row_keeps_what_has_none(full: bool) -> None:
    contradictory = 0
    for seed in range(150):
        problem, rules = random_case(seed, full=full)
        if problem.rules is None:
            continue
        found, everything = clash(problem), all_placements(problem)

        def possible(some: list[str], problem: Problem = problem, everything: list[Sets] = everything) -> bool:
            assert problem.rules is not None
            part = replace(problem.rules, demands=problem.rules.only(some).demands)
            rows = (held(problem, ranks_E) for ranks_E in everything)
            return any(not any(demand.broken(held_GE) for demand in part.demands) for held_GE in rows)

        if not everything:  # slots that cannot all be full
            continue
        assert possible(problem.rules.names) == (not found), seed
        if found:
            contradictory += 1
            assert not possible(found), seed
            assert all(possible([name for name in found if name != each]) for each in found), seed
        else:
            row = first_row(problem)
            assert keeps(rules, sets_of(problem, row)), seed
            check(replace(problem, full=False), row)
    assert contradictory > 10


def held(problem: Problem, ranks_E: Sets) -> np.ndarray:
    held_GE = np.zeros((problem.num_ranks, problem.num_experts), dtype=bool)
    for expert, ranks in enumerate(ranks_E):
        held_GE[list(ranks), expert] = True
    return held_GE


def larger(seed: int = 0, *, spare: int = 4, **rules: Any) -> Problem:
    """16 experts on 4 ranks of 2 nodes; rank 1 is slower."""
    rng = np.random.default_rng(seed)
    model, _ = fit(profile(4), model="staircase")
    counts = rng.poisson(np.linspace(1, 6, 16), size=(40, 16))
    (asked,) = layer_rules(Rules(**rules), [0], 16, 4, [0, 0, 1, 1])
    slots = np.full(4, 4) + np.array([spare, 0, 0, 0])
    problem = Problem.make(counts, model.features, model.latencies, slots, node_of_rank=[0, 0, 1, 1])
    return replace(problem, rules=asked)


RULES: dict[str, Any] = {
    "apart": [{"experts": [15, 14, 13]}, {"experts": [0, 1]}],
    "pinned": [{"experts": [2, 3], "ranks": [1, 2]}],
    "together": [{"experts": [5, 6]}, {"experts": [7, 8, 9], "on": "node"}],
}


def test_the_search_knows_at_every_swap_what_is_barred() -> None:
    problem = larger(apart=RULES["apart"], pinned=RULES["pinned"])
    costs = make_costs(problem)
    state = make_state(problem, first_row(problem), costs)
    start = total_cost(state)
    descend(costs, state, np.ones(4, bool), True)
    draws = np.random.default_rng(1).random((30, 3, 2))
    iterate(costs, state, draws, total_cost(state), 30, 0)
    check(problem, state.content)
    assert (state.barred == make_state(problem, state.content, costs).barred).all()
    assert total_cost(state) < start


def test_experts_kept_apart_may_change_places() -> None:
    (asked,) = layer_rules(Rules(apart=[{"experts": [0, 1]}]), [0], 4, 2, [0, 0])
    model, _ = fit(profile(2), model="staircase")
    problem = Problem.make([[60, 1, 5, 5]], model.features, model.latencies)
    problem = replace(problem, rules=asked)
    outcome = LocalSearch().solve(problem, options(patience=0), np.array([1, 2, 0, 3]))
    assert outcome.row is not None
    assert sets_of(problem, outcome.row)[0] == (0,), "rank 1 is slower: 0 and 1 change places in one swap"


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("full", [False, True])
def test_every_policy_keeps_the_rules(split: Split, full: bool) -> None:
    problem = replace(larger(**RULES), split=split, full=full)
    start = first_row(problem)
    outcome = LocalSearch().solve(problem, options(patience=2), None)
    assert outcome.row is not None
    check(problem, outcome.row)
    if not full:
        assert objective(problem, outcome.row) < objective(problem, start)


def test_sets_change_their_units() -> None:
    problem = larger(groups=[{"num_groups": 4}], spare=0)
    assert problem.rules is not None
    units = {}
    for order in ((0, 1, 2, 3), (0, 1, 3, 2)):  # the heaviest groups together on a node, at first
        row = np.concatenate([np.arange(4) + 4 * group for group in order])
        outcome = LocalSearch().solve(problem, options(patience=8), row)
        assert outcome.row is not None
        check(problem, outcome.row)
        assert objective(problem, outcome.row) < objective(problem, row)
        units[order] = problem.rules.units(outcome.row, problem.slots_per_rank)
    assert all(sorted(found) == [0, 0, 1, 1] and found[2] != found[3] for found in units.values())


def test_a_warm_start_that_breaks_rules_is_changed_little() -> None:
    problem = larger(apart=[{"experts": [0, 1]}], spare=0)
    row = np.arange(16)
    found = nearest_row(problem, row)
    assert found is not None
    check(problem, found)
    before, after = sets_of(problem, row), sets_of(problem, found)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2


@pytest.mark.parametrize("name", names())
def test_solvers_keep_rules_or_say_that_they_cannot(name: str) -> None:
    problem = larger(apart=[{"experts": [0, 1]}], spare=0)
    if get(name).supports.rules:
        require(get(name), problem, lambda need: [])
        return
    with pytest.raises(UnsupportedError, match=r"rules: got apart\[0\]; .* cannot keep rules; use x"):
        require(get(name), problem, lambda need: ["x"])


def test_rules_hold_for_their_layers_only() -> None:
    found = layer_rules(Rules(apart=[{"experts": [0, 1], "layers": [3, 5]}]), [3, 4, 5], 4, 2, [0, 0])
    assert found[1] is None
    assert found[0] is found[2] is not None


BROKEN = {
    "pinned": ({"experts": [2], "ranks": [1]}, "expert 2 on rank 0; pinned[0]: expert 2 only on rank 1"),
    "kept_off": ({"experts": [2, 0], "ranks": [0]}, "expert 0 on rank 0; kept_off[0]: experts 2, 0 not on rank 0"),
    "reserved": ({"ranks": [0], "experts": [0, 1]}, "expert 2 on rank 0; reserved[0]: rank 0 only for experts 0, 1"),
    "apart": ({"experts": [0, 2]}, "experts 0 and 2 on rank 0; apart[0]: experts 0, 2 on different ranks"),
    "together": ({"experts": [3, 2]}, "expert 2 on rank 0, expert 3 on rank 1; together[0]: experts 3, 2 all on"),
    "groups": ({"num_groups": 1}, "groups[0]: each of 1 groups of 4 experts on one node"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_placement_that_breaks_a_rule_is_refused(kind: str) -> None:
    rule, said = BROKEN[kind]
    placement = Placement(physical_to_logical=[[0, 2, 1, 3]], slots_per_rank=[2, 2], num_experts=4)
    with pytest.raises(InputError) as error:
        check_rules(placement, Rules.model_validate({kind: [rule]}), None, "2x1-ib400")
    assert said in str(error.value) and str(error.value).startswith("physical_to_logical[layer 0]: got expert")
    if kind != "groups":
        with pytest.raises(InputError, match="physical_to_logical"):
            rules = Rules.model_validate({kind: [rule]})
            evaluate(placement, profile(2), traces(layers=1), rules=rules)


WRONG = {
    "an unknown expert": ({"apart": [{"experts": [0, 4]}]}, "rules.apart[0].experts: got 4; experts 0 to 3"),
    "an unknown rank": ({"pinned": [{"experts": [0], "ranks": [2]}]}, "rules.pinned[0].ranks: got 2; ranks 0 to 1"),
    "an unknown layer": ({"together": [{"experts": [0], "layers": [7]}]}, "rules.together[0].layers: got 7; layers"),
    "groups that do not divide": ({"groups": [{"num_groups": 3}]}, "one node; ranks on several nodes"),
    "one expert apart": ({"apart": [{"experts": [1]}]}, "apart"),
    "an expert twice": ({"apart": [{"experts": [1, 1]}]}, "Rules.apart[0].experts: got [1, 1]; numbers from 0"),
    "a negative rank": ({"kept_off": [{"experts": [1], "ranks": [-1]}]}, "Rules.kept_off[0].ranks: got [-1]"),
    "an unknown kind": ({"far": []}, "far"),
    "an unknown key": ({"apart": [{"experts": [0, 1], "rank": 1}]}, "rank"),
    "another version": ({"schema_version": 2}, "this gemopt reads version 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    content, said = WRONG[case]
    (tmp_path / "rules.json").write_text(json.dumps(content))
    code, out, err = gemopt(capsys, "solve", *write_inputs(tmp_path), "--rules", tmp_path / "rules.json")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and said in err


def test_groups_must_divide_the_experts() -> None:
    with pytest.raises(InputError, match=r"rules.groups\[0\].num_groups: got 3; a divisor of 4 experts"):
        layer_rules(Rules(groups=[{"num_groups": 3}]), [0], 4, 2, [0, 1])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, output = write_inputs(tmp_path), tmp_path / "placement.json"
    rules = Rules(pinned=[{"experts": [0, 3], "ranks": [1]}])
    rules.save(tmp_path / "rules.json")
    assert Rules.load(tmp_path / "rules.json") == rules
    given = ("--rules", tmp_path / "rules.json")
    assert gemopt(capsys, "solve", *inputs, *given, "--time-limit", 1, "-o", output)[0] == 0
    assert all(set(row[2:]) == {0, 3} for row in Placement.load(output).physical_to_logical.tolist())
    assert gemopt(capsys, "evaluate", output, *inputs, *given)[0] == 0
    Placement.contiguous(2, 4, 2).save(output)
    code, _, err = gemopt(capsys, "evaluate", output, *inputs, *given)
    assert code == 2 and "pinned[0]: experts 0, 3 only on rank 1" in err
    warm = ("--warm-start", output, "--solver", "local-search", "--time-limit", 1)
    assert gemopt(capsys, "solve", *inputs, *given, *warm)[0] == 0
    code, out, _ = gemopt(capsys, "compare", *inputs, *given, "--solvers", "linear,local-search", "--time-limit", 1)
    assert code == 0 and "cannot keep rules" in out


def test_rules_in_conflict_are_named_with_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = [
        {"experts": [0], "ranks": [1]},
        {"experts": [1], "ranks": [1], "layers": [1]},
        {"experts": [2], "ranks": [0]},
    ]
    Rules(pinned=pinned, apart=[{"experts": [0, 1]}]).save(tmp_path / "rules.json")
    code, out, _ = gemopt(capsys, "solve", *write_inputs(tmp_path), "--rules", tmp_path / "rules.json")
    assert code == 3
    assert "no placement of layer 1 in 2 slots per rank keeps pinned[0]: expert 0 only on rank 1; pinned[1]:" in out
    assert "apart[0]: experts 0, 1 on different ranks" in out and "pinned[2]" not in out


def test_a_memory_budget_keeps_the_rules() -> None:
    rules = Rules(pinned=[{"experts": [0, 1], "ranks": [1, 3]}], apart=[{"experts": [0, 1]}])
    budget = {"memory_budget": 50.0, "expert_bytes": 10, "slots_per_rank": 3}
    result = solve(profile(4), traces(), rules=rules, time_limit=60, patience=1, **budget)
    assert result.placement is not None
    check_rules(result.placement, rules)
    held = (result.placement.physical_to_logical != EMPTY).sum(axis=0)
    assert (np.bincount(result.placement.rank_of_slot, weights=held) <= 5).all()


def test_a_certificate_under_rules_is_one_of_all_placements(tmp_path: Path) -> None:
    rules = Rules(pinned=[{"experts": [0, 1], "ranks": [1]}])
    path = tmp_path / "certificate.json"
    ruled = solve(profile(), traces(), rules=rules, solver="cpsat", time_limit=20, certificate=path)
    free = solve(profile(), traces(), solver="cpsat", time_limit=20)
    assert ruled.bound_us is not None and free.objective_us is not None and ruled.bound_us > free.objective_us
    found = verify(path, profile(), traces())
    assert found.objective_us == pytest.approx(ruled.objective_us)
    assert found.claimed_us <= free.objective_us * (1 + 1e-9)


def test_the_placement_says_which_rules_it_keeps(tmp_path: Path) -> None:
    """Those of the placement in force hold until others are given, and so do a warm start's."""
    rules, path = Rules(pinned=[{"experts": [0], "ranks": [1]}]), tmp_path / "placement.json"
    first = solve(profile(), traces(), rules=rules, time_limit=2, patience=1)
    assert first.placement is not None and first.placement.rules == rules and "1 pinned" in str(first.placement)
    first.placement.save(path)
    for given in ({"current": path, "max_moves": 2}, {"warm_start": path}, {"current": path, "solver": "cpsat"}):
        found = solve(profile(), traces(), time_limit=2, patience=1, **given)
        assert found.placement is not None and found.placement.rules == rules
        assert any(note.startswith("keeps the rules of") for note in found.notes)
        check_rules(found.placement, rules)
    free = solve(profile(), traces(), current=path, rules=Rules(), time_limit=2, patience=1)
    assert free.placement is not None and free.placement.rules is None


def test_nodes_stay_with_the_rules_that_ask_for_them() -> None:
    """Rules on the nodes of a topology hold later, where only the profile is there, which knows one node."""
    rules = Rules(groups=[{"num_groups": 2}])
    first = solve(profile(4), traces(), rules=rules, topology="2x2-ib400", time_limit=2, patience=1,
                  exchange=Exchange(dispatch_bytes=64, once_per="assignment")).placement  # fmt: skip
    assert first is not None and first.node_of_rank is not None
    assert first.node_of_rank.tolist() == [0, 0, 1, 1]
    found = solve(profile(4), traces(), current=first, time_limit=2, patience=1).placement
    assert found is not None
    check_kept(found)
    assert found.node_of_rank is not None and found.node_of_rank.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"node_of_rank.*the profile knows others"):
        solve(profile(5), traces(), current=first, add_ranks=[4], time_limit=2)


def test_ranks_leave_and_join_under_rules() -> None:
    """Rules name ranks as the placement in force does, new ones after those; the new placement counts anew."""
    rules = Rules(
        pinned=[{"experts": [0], "ranks": [1, 3]}],
        kept_off=[{"experts": [1], "ranks": [3]}, {"experts": [2], "ranks": [1]}],
        apart=[{"experts": [2, 3]}],
    )
    current = Placement(physical_to_logical=[[2, 1, 0, -1, 3, -1, -1, -1]] * 2, slots_per_rank=[2] * 4, num_experts=4)
    found = solve(profile(4), traces(), current=current, exclude_ranks=[1], rules=rules, time_limit=2, patience=1)
    assert found.placement is not None and found.moves is not None
    asked = Rules(pinned=[{"experts": [0], "ranks": [2]}], kept_off=[{"experts": [1], "ranks": [2]}],
                  apart=[{"experts": [2, 3]}])  # fmt: skip
    assert found.placement.rules == asked and found.moves.moves == 2
    check_rules(found.placement, asked)
    without = solve(profile(4), traces(), current=current, exclude_ranks=[1, 3], rules=rules, time_limit=2)
    assert without.status is Status.INFEASIBLE and "pinned[0] asks for ranks none of which is left" in without.notes[0]
    with pytest.raises(InputError, match=r"rules.kept_off\[0\].ranks: got \[4\]; ranks 0 to 3"):
        solve(profile(4), traces(), current=current, exclude_ranks=[1],
              rules=Rules(kept_off=[{"experts": [0], "ranks": [4]}]))  # fmt: skip
    joined = solve(
        profile(5), traces(), current=current, add_ranks=[4], exclude_ranks=[0], time_limit=2, patience=1,
        rules=Rules(pinned=[{"experts": [1], "ranks": [4]}, {"experts": [3], "ranks": [0, 2]}]),
    )  # fmt: skip
    assert joined.placement is not None
    check_rules(joined.placement, Rules(pinned=[{"experts": [1], "ranks": [3]}, {"experts": [3], "ranks": [1]}]))


def test_ranks_that_leave_may_move_what_rules_ask_for() -> None:
    """Without a limit of the caller's, as many moves as it takes, and no more: here expert 1 makes room for 0 and 3."""
    rules = Rules(together=[{"experts": [0, 3]}])
    current = Placement(physical_to_logical=[[3, 1, 2, -1, 0, -1]] * 2, slots_per_rank=[2] * 3, num_experts=4)
    found = solve(profile(3), traces(), current=current, exclude_ranks=[2], rules=rules, time_limit=2, patience=1)
    assert found.placement is not None and found.moves is not None and found.moves.moves == 4
    check_rules(found.placement, rules)


@pytest.mark.parametrize(("solver", "slots"), [("local-search", 3), ("cpsat", 2)])
def test_links_and_groups_together(solver: str, slots: int) -> None:
    """The nodes are those of the topology; ranks change places along the transitions only where rules let them."""
    ids = np.random.default_rng(2).permuted(np.tile(np.arange(8), (60, 2, 1)), axis=2)[:, :, :2]
    tokens = Tokens(ids, np.arange(60) // 10, source_rank=None)
    seen = Traces(counts=count_assignments(ids, tokens.step_of_token, 6, 8), tokens=tokens)
    rules = Rules(groups=[{"num_groups": 2}], apart=[{"experts": [0, 1]}], pinned=[{"experts": [4], "ranks": [0, 1]}])
    exchange = Exchange(dispatch_bytes=2048, combine_bytes=4096, senders="previous" if slots == 3 else None)
    result = solve(
        profile(4), seen, rules=rules, topology="2x2-ib400", exchange=exchange, time_limit=3, patience=2,
        solver=solver, slots_per_rank=slots,
    )  # fmt: skip
    assert result.placement is not None and result.links is not None
    check_rules(result.placement, rules, topology="2x2-ib400")
    held_LP = result.placement.physical_to_logical[:, : 2 * slots]
    assert all(set(row) - {EMPTY} == {4, 5, 6, 7} for row in held_LP.tolist())


def test_copies_under_links_keep_the_rules() -> None:
    problem = larger(apart=RULES["apart"], pinned=RULES["pinned"], reserved=[{"ranks": [0], "experts": list(range(9))}])
    row = np.array([0, 4, 6, 8, EMPTY, EMPTY, EMPTY, EMPTY, 1, 2, 9, 15, 3, 5, 10, 14, 7, 11, 12, 13])
    check(problem, row)
    changes = list(_changes(problem, row))
    assert changes
    for changed in changes:
        check(problem, changed)


def test_few_moves_under_rules() -> None:
    """Two layers share moves: the rules ask for one exchange in each, which is two moves."""
    rules, seen = Rules(pinned=[{"experts": [0], "ranks": [1]}]), traces()
    current = Placement.contiguous(2, 4, 2)
    few = solve(profile(), seen, rules=rules, current=current, max_moves=3, solver="local-search", time_limit=2)
    assert few.status is Status.INFEASIBLE and "4 moves" in few.notes[0]
    for fields in ({"max_moves": 4}, {"max_moves_per_layer": 2}, {"move_price": 1e6}, {}):
        result = solve(
            profile(), seen, rules=rules, current=current, solver="local-search", time_limit=4, patience=2, **fields
        )
        assert result.placement is not None and result.moves is not None
        check_rules(result.placement, rules)
        assert result.moves.moves == 4 or not fields


def test_the_fewest_moves_are_proven_for_many_experts() -> None:
    """128 experts at random places, which groups put on two nodes: about half of them must change their node."""
    row = np.random.default_rng(0).permutation(128)
    placed = Placement(physical_to_logical=[row], slots_per_rank=np.full(8, 16), num_experts=128)
    (asked,) = rules_of(
        placed.under(Rules(groups=[{"num_groups": 8}], apart=[{"experts": [1, 2, 3]}]), [0] * 4 + [1] * 4)
    )
    problem = replace(
        Problem.make(np.ones((1, 128), int), (ASSIGNMENTS,), [Latency(((line(1, 1),),))] * 8, 16), rules=asked
    )
    moves = Moves(held_by(row, problem.slots_per_rank, 128))
    fewest, nearest = fewest_row(problem.with_moves(moves)), nearest_row(problem, row)
    assert asked is not None and fewest is not None and nearest is not None
    assert asked.broken(fewest, problem.slots_per_rank) is None
    assert 40 < moves.count(fewest, problem.slots_per_rank) == moves.count(nearest, problem.slots_per_rank) < 70


@pytest.mark.parametrize("name", ["branch", "columns"])
def test_provers_without_rules_refuse_them_also_when_called_directly(name: str) -> None:
    problem = random_problem(3, spare=False)
    rules = Rules(pinned=[{"experts": [0], "ranks": [0]}])
    (asked,) = layer_rules(rules, [0], problem.num_experts, problem.num_ranks, NODES[: problem.num_ranks])
    with pytest.raises(UnsupportedError, match="rules"):
        get(name).solve(replace(problem, rules=asked), Options(deadline=np.inf), None)
