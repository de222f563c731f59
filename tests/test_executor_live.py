"""The executor on real gloo groups of 2 and 4 processes: right outputs, right counts, safe while serving."""

import numpy as np
import pytest

pytest.importorskip("transformers")

from ranks_world import EXACT, results

from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.problem import Problem
from gemopt.splits import even_shares, shares, static_shares

pytestmark = pytest.mark.distributed

CASES = [
    ("qwen3_moe", 2, "shared", ["equal-even", "unequal-nearest", "ragged-static"]),
    ("qwen3_moe", 4, "own", ["unequal-even", "copies-even", "empty_rank-static", "copies-nearest"]),
    ("mixtral", 4, "mixed", ["ragged-even", "empty_rank-static", "copies-nearest"]),
    ("mixtral", 4, "shared", ["equal-even", "ragged-nearest", "empty_rank-even"]),
    ("olmoe", 2, "own", ["equal-even", "copies-even"]),
    ("deepseek_v3", 2, "shared", ["equal-even", "ragged-even"]),
    ("gpt_oss", 2, "shared", ["unequal-even", "copies-static"]),
    ("gpt_oss", 4, "own", ["ragged-even"]),
    ("gemma4_text", 2, "shared", ["copies-even"]),
]


@pytest.mark.parametrize(("family", "ranks", "where", "placements"), CASES)
def test_outputs_do_not_depend_on_the_placement(world, family, ranks, where, placements):
    warm = (family, ranks) not in {("olmoe", 2), ("gpt_oss", 2)}  # else the executor comes before any forward pass
    told = results(world("serve", ranks, family=family, where=where, placements=placements, warm=warm))
    for rank, answer in enumerate(told):
        assert len(answer["errors"]) == 2 * len(placements) + 1 + warm
        assert max(answer["errors"].values()) < EXACT, (rank, answer["errors"])
        assert answer["generates"], "generate() gives the tokens of the single process"
    assert len({answer["checksum"] for answer in told}) == 1


def test_outputs_in_bfloat16(world):
    reply = world(
        "serve", 2, family="qwen3_moe", placements=["unequal-even", "copies-even"], config={"dtype": "bfloat16"}
    )
    errors = results(reply)[0]["errors"]
    assert 1e-5 < max(errors.values()) < 0.02, "that is what bfloat16 resolves"


@pytest.mark.parametrize(("family", "where"), [("qwen3_moe", "shared"), ("gpt_oss", "own")])
def test_a_model_loaded_permuted_is_the_same(world, family, where):
    for answer in results(world("at_load", 2, family=family, where=where)):
        assert answer["error"] < EXACT


@pytest.mark.parametrize("where", ["shared", "own", "mixed"])
@pytest.mark.parametrize("split", ["even", "static"])
@pytest.mark.parametrize("kind", ["copies", "ragged"])
def test_every_copy_gets_what_evaluate_assumes(world, where, split, kind):
    ranks = 4
    told = results(world("counts", ranks, family="qwen3_moe", where=where, kind=kind, split=split))
    slots = told[0]["slots"]
    shared_by = {"shared": 4, "own": 1, "mixed": 2}[where]
    for layer, row in enumerate(told[0]["rows"]):
        logical = sum(np.array(answer["logical"][layer]) for answer in told[::shared_by])
        assert logical.sum() == 5 * 11 * 2 * ranks // shared_by
        weights = told[0]["weights"][layer]
        if split == "even":
            expected = even_shares(logical[None], np.array(row))[0]
        else:
            expected = static_shares(logical[None], np.array(row), np.array(weights))[0]
        got = np.concatenate([answer["local"][layer][:size] for answer, size in zip(told, slots, strict=True)])
        assert got.tolist() == expected.tolist()
        copies = np.bincount(row, minlength=8)
        assert copies.max() > 1, "the case has copies to share between"


def test_the_optimal_split_is_that_of_evaluate(world):
    told = results(world("counts", 2, family="qwen3_moe", where="own", kind="copies", split="optimal"))

    latencies = [Latency(((line(10.0, 1.0 + 0.3 * rank),),)) for rank in range(2)]
    for layer, row in enumerate(told[0]["rows"]):
        logical = sum(np.array(answer["logical"][layer]) for answer in told)
        problem = Problem.make(logical[None], (ASSIGNMENTS,), latencies, told[0]["slots"], split="optimal")
        got = np.concatenate([answer["local"][layer] for answer in told])
        assert got.tolist() == shares(problem, np.array(row))[0].tolist()


@pytest.mark.parametrize("where", ["shared", "own"])
def test_nearest_uses_the_copy_of_the_sending_rank(world, where):
    told = results(world("counts", 2, family="qwen3_moe", where=where, kind="copies", split="nearest"))
    if where == "shared":
        totals = [sum(map(sum, answer["local"])) for answer in told]
        assert sum(totals) == 2 * 5 * 11 * 2
        return
    for layer, row in enumerate(told[0]["rows"]):
        on = [set(row[:6]), set(row[6:])]
        for rank, answer in enumerate(told):
            mine = row[6 * rank : 6 * rank + 6]
            for slot, expert in enumerate(mine):
                both = expert in on[0] and expert in on[1]
                senders = [rank] if both else [0, 1]
                assert answer["local"][layer][slot] == sum(told[s]["logical"][layer][expert] for s in senders)


@pytest.mark.parametrize("kind", ["ragged", "empty_rank"])
def test_a_placed_model_can_be_traced(world, kind):
    told = results(world("traced", 2, family="qwen3_moe", kind=kind))
    placed, alone = told[0]["counts"]
    assert placed == alone and sum(map(sum, placed[0])) > 0
    slots = {"ragged": (7, 4), "empty_rank": (0, 8)}[kind]
    assert [answer["layers"][0][:2] for answer in told] == [[8, slots[0]], [8, slots[1]]]
    assert len({answer["layers"][0][2] for answer in told}) == 1, "an expert has the same bytes everywhere"


def test_bad_input_is_refused_alike_on_every_rank(world):
    first, second = results(world("refuse", 2, family="qwen3_moe"))
    assert first["said"] == second["said"]
    assert first["unchanged"] and second["unchanged"]
    said = dict(first["said"])
    assert said.pop("good") == said.pop("others loaded") == "accepted"
    for name, words in {
        "layers": "layer_ids",
        "experts": "num_experts",
        "ranks": "3 ranks",
        "split": "latencies of the ranks",
        "model": "Another-Model",
        "differs": "different ones on ranks [0] and [1]",
        "broken on one rank": "(rank 1)",
        "an expert missing": "every expert needs a slot",
        "no file": "none.json",
        "memory": "10 bytes free",
        "budget": "budget_bytes: got 10",
        "budgets differ": "budget_bytes",
        "state dict": "model.state_dict",
        "experts loaded": "model.load_state_dict: got experts placed by gemopt",
        "weights changed": f"in layer {first['layers'][1]} than when it got an Executor",
        "weights cast": f"in layer {first['layers'][0]} than when it got an Executor",
    }.items():
        assert words in said.pop(name)
    assert not said


def test_an_executor_may_be_closed_and_another_made(world):
    for answer in results(world("again", 2, family="mixtral")):
        assert max(answer["errors"]) < EXACT
        assert answer["files"][-1] <= answer["files"][0] + 2, "connections are let go of"
        assert answer["said"].startswith("executor: got closed")


@pytest.mark.parametrize("where", ["shared", "own"])
def test_layers_are_committed_while_serving(world, where):
    told = results(world("background", 2, family="qwen3_moe", where=where))
    assert told[0]["checksum"] == told[1]["checksum"]
    for answer in told:
        assert answer["worst"] < EXACT and answer["done"] and answer["slots"] == [4, 4]
        assert answer["seen"] == told[0]["seen"], "all ranks commit at the same forward pass"
        assert answer["seen"] == sorted(answer["seen"])
        assert answer["committed"] == answer["layers"], "each layer once"
    assert told[0]["buffer"] <= 1 << 26


def test_layers_are_committed_together_within_a_bound(world):
    """All layers of the model fit the bound, or only one does: then one vote is enough, or each needs its own."""
    for budget in (None, 4):
        told = results(world("batches", 2, family="mixtral", budget=budget))
        votes = told[0]["batches"]
        assert [layer for vote in votes for layer in vote] == [0, 1, 2] and (len(votes) == 1) == (budget is None)
        for answer in told:
            assert answer["batches"] == votes
            assert answer["worst"] < EXACT and answer["checksum"] == told[0]["checksum"]
            assert answer["buffer"] == told[0]["buffer"]


def test_what_has_not_begun_is_forgotten_when_something_else_is_wanted(world):
    told = results(world("cuts", 2, family="mixtral"))
    assert told[0]["rows"] == told[1]["rows"]
    for answer in told:
        assert answer["changed"] == [True, False, False] and answer["worst"] < EXACT
        assert answer["rules"] == ["1 together", [0, 1]], "what follows keeps the rules of what was wanted"


# A controller in charge.


@pytest.mark.parametrize(("ranks", "where"), [(2, "shared"), (2, "own"), (4, "mixed")])
def test_decisions_are_applied_while_serving(world, ranks, where):
    told = results(world("follow", ranks, family="qwen3_moe", where=where))
    assert max(error for answer in told for error in answer["errors"]) < EXACT
    assert len({answer["checksum"] for answer in told}) == 1
    assert all(answer["decisions"] == told[0]["decisions"] for answer in told)
    assert told[0]["decisions"][:2] == ["window 1", "window 2"]
    assert told[0]["windows"] >= 2
    assert all(all(answer["meters"]) for answer in told)
    assert [answer["groups left"] for answer in told] == [0] * ranks


@pytest.mark.parametrize(("ranks", "where"), [(2, "shared"), (2, "own"), (4, "mixed")])
def test_the_controller_sees_every_assignment_once(world, ranks, where):
    told = results(world("follow", ranks, family="qwen3_moe", where=where, passes=8, broken=1))  # and run again
    counts, timed = told[0]["seen"]
    batches = {"shared": told[:1], "own": told, "mixed": told[::2]}[where]
    assert timed
    np.testing.assert_array_equal(counts, np.sum([answer["asked"] for answer in batches], axis=0))


def test_passes_during_a_decision_that_moves_nothing_are_heard(world):
    told = results(world("follow", 2, family="qwen3_moe", where="own", passes=48, window=16, moves=0))
    assert told[0]["heard in full"] == [True] * 3


def test_what_cannot_be_followed_is_refused_on_every_rank(world):
    for told in results(world("follow_refused", 2, family="qwen3_moe")):
        said = [
            "controller: got nothing; rank 0 decides",
            "placement: got layers",
            "window: got different ones",
            "window: got 0",
            *["model: got compiled as a whole"] * 3,
        ]
        assert all(each.startswith(start) for each, start in zip(told, said, strict=True)), told


def test_a_controller_that_fails_or_asks_the_impossible_changes_nothing(world):
    told = results(world("follow", 2, family="qwen3_moe", where="own", fail_at=0, wrong=True))
    assert max(error for answer in told for error in answer["errors"]) < EXACT
    assert told[0]["decisions"][0] == "RuntimeError: no idea"
    assert any(text.startswith("not applied: ") for text in told[0]["decisions"])
    assert told[0]["confirmed"] >= 2, "at the start, and when what it asked for was not applied"
    assert len({answer["checksum"] for answer in told}) == 1
