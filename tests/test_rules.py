"""Rules: what breaks them, exact solvers against all placements that keep them, smallest conflicts, bad input."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute import cost, random_problem
from cli_inputs import gemopt, profile, traces, write_inputs
from ruled import NODES, Sets, held, sets_of

from gemopt.bounds import lower_bound
from gemopt.evaluate import check, check_rules, evaluate, objective, total
from gemopt.exceptions import InputError
from gemopt.layer_rules import LayerRules, layer_rules
from gemopt.moves import Moves
from gemopt.placement import Placement
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.rules import Rules
from gemopt.solvers import get, hurried
from gemopt.solvers.base import Options
from gemopt.solvers.placing import conflict, first_row
from gemopt.solvers.search.local_search import LocalSearch

pytestmark = pytest.mark.usefixtures("quick_bounds")


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


def random_case(seed: int, **fields: Any) -> tuple[Problem, Rules]:
    """A tiny problem with rules on it."""
    problem = replace(random_problem(seed), **fields)
    rules = random_rules(seed, problem.num_experts, problem.num_ranks)
    (asked,) = layer_rules(rules, [0], problem.num_experts, problem.num_ranks, NODES[: problem.num_ranks])
    return replace(problem, rules=asked), rules


def clash(problem: Problem) -> list[str]:
    assert problem.rules is not None
    return conflict(problem.rules, problem.slots_per_rank, full=problem.full, deadline=time.monotonic() + 60)


def test_what_is_in_conflict_is_not_looked_for_beyond_its_time() -> None:
    """A large network's rules take long to look at, each time: what is not known then counts as possible."""
    looks = []

    class Slow(LayerRules):
        def only(self, names: Sequence[str]) -> LayerRules:
            looks.append(names)
            time.sleep(1.1 * hurried.LEAST_S)
            return super().only(names)

    asked = {"pinned": [{"experts": [0], "ranks": [0]}], "kept_off": [{"experts": [e], "ranks": [0]} for e in range(8)]}
    (rules,) = layer_rules(Rules.model_validate(asked), [0], 8, 2, [0, 0])
    assert rules is not None
    quick = conflict(rules, np.array([8, 8]), full=False)
    slow = Slow(**{each.name: getattr(rules, each.name) for each in fields(rules)})
    assert conflict(slow, np.array([8, 8]), full=False, deadline=time.monotonic()) == rules.names
    assert len(looks) == 1 and len(quick) == 2 and set(quick) < set(rules.names)


SEEDS = [7, 59, 76, 89, 104, 119, 131, 145, 223, 304]  # of rules that leave some placements, without spare slots
SPARE = [26, 31, 43, 46, 67, 80, 166, 178, 189, 220, 237]  # and with


@pytest.mark.parametrize("seed", SEEDS + SPARE)
def test_cpsat_finds_the_best_placement_that_keeps_the_rules(seed: int) -> None:
    problem, rules = random_case(seed)
    kept = [ranks_E for ranks_E in all_placements(problem) if keeps(rules, ranks_E)]
    assert 1 < len(kept) < len(all_placements(problem)) and clash(problem) == []
    best = min(cost(problem, ranks_E) for ranks_E in kept)
    assert lower_bound(problem) <= best * (1 + 1e-9) + 1e-9
    outcome = get("cpsat").solve(problem, Options.lasting(60), None)
    assert outcome.row is not None and outcome.bound_us is not None
    assert keeps(rules, sets_of(problem, outcome.row))
    assert objective(problem, outcome.row) == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert outcome.bound_us <= best * (1 + 1e-9) + 1e-9
    searched = LocalSearch().solve(problem, Options.lasting(60, patience=2), None)
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
        outcome = get(name).solve(problem, Options.lasting(60, patience=2), None)
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
    outcome = get("milp").solve(problem, Options.lasting(60), None)
    assert problem.rules is not None and outcome.row is not None and keeps(rules, sets_of(problem, outcome.row))
    assert objective(problem, outcome.row) == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_a_conflict_is_smallest_and_a_row_keeps_what_has_none(full: bool) -> None:
    contradictory = 0
    for seed in range(60):
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
    assert contradictory > 4


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
    "true for an expert": (
        {"pinned": [{"experts": [True], "ranks": [0]}]},
        "experts.0: got True; input should be a whole",
    ),
    "text for a rank": (
        {"pinned": [{"experts": [1], "ranks": ["0"]}]},
        "ranks.0: got '0'; input should be a whole number",
    ),
    "a negative rank": ({"kept_off": [{"experts": [1], "ranks": [-1]}]}, "Rules.kept_off[0].ranks: got [-1]"),
    "an unknown kind": ({"far": []}, "far"),
    "an unknown key": ({"apart": [{"experts": [0, 1], "rank": 1}]}, "rank"),
    "another version": ({"schema_version": 2}, "this gemopt reads version 1"),
    "a text for the version": ({"schema_version": "1"}, "schema_version: got '1'; this gemopt reads version 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    content, said = WRONG[case]
    (tmp_path / "rules.json").write_text(json.dumps(content))
    code, out, err = gemopt(capsys, "solve", *write_inputs(tmp_path), "--rules", tmp_path / "rules.json")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and said in err


def test_rules_on_nodes_need_the_node_of_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_inputs(tmp_path)
    devices = [d.model_copy(update={"node": "a" if d.rank < 2 else None}) for d in profile(4).devices]
    Profile(devices=devices).save(inputs[0])
    schema = {"$schema": "rules.json"}  # as editors want it
    for content, code in (({"groups": [{"num_groups": 2}]}, 2), ({"pinned": [{"experts": [0], "ranks": [1]}]}, 0)):
        (tmp_path / "rules.json").write_text(json.dumps(schema | content))
        found, _, err = gemopt(capsys, "solve", *inputs, "--rules", tmp_path / "rules.json", "--time-limit", 1)
        assert found == code and ("devices.node: got nothing for ranks [2, 3]" in err) == bool(code)


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
