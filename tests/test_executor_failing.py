"""The executor on real gloo groups when ranks die, fall silent or fail: the survivors agree, and it can go on."""

import pytest

pytest.importorskip("transformers")

from ranks_world import EXACT, results

pytestmark = pytest.mark.distributed
TIMEOUT_S = 40.0  # of a stage: long enough for a busy machine, since death is noticed at once and not by waiting
WAIT_S = 16.0  # the same where survivors wait half of it for what a rank that has given up will never send

EVENTS = {  # where a rank dies -> does the layer of that moment end up committed? (None: either, but alike)
    "allocate": False,
    "transfer": False,
    "half sent": False,
    "verify": False,
    "vote": False,
    "decide": None,
    "half decided": True,
    "commit": True,
    "committed": True,
}


def check_survivors(reply, victim, *, committed, layer, timeout):
    told = results(reply, dead=(victim,))
    assert all(answer["error"] for answer in told), "every survivor raises"
    for answer in told:
        assert answer["elapsed"] < timeout
        assert str(victim) in answer["error"]["ranks"], answer["error"]
        assert "placement in force" in answer["error"]["text"]
        assert answer["placement"] == told[0]["placement"]
    (state,) = {answer["state"] for answer in told}  # they are on one placement: old or new, stage by stage
    before = told[0]["stages"].index(layer)
    assert state in ({None: (before, before + 1), False: (before,), True: (before + 1,)}[committed])


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("what", EVENTS)
def test_a_rank_of_two_dies(world, what, victim):
    reply = world("dies", 2, family="qwen3_moe", victim=victim, what=what, layer=2, timeout=TIMEOUT_S)
    assert reply["codes"][victim] == 9, "the rank died where it should"
    # Half of the decision of rank 0 is in its own store and dies with it; rank 1 may not have heard its vote by then.
    committed = None if (what, victim) == ("half decided", 0) else EVENTS[what]
    # the last layer: a rank that dies after its commit is noticed when everybody reports the end
    check_survivors(reply, victim, committed=committed, layer=2, timeout=TIMEOUT_S)


@pytest.mark.parametrize("what", EVENTS)
@pytest.mark.parametrize("kind", ["equal", "ragged"])
def test_a_rank_of_four_dies(world, what, kind):
    victim = list(EVENTS).index(what) % 4
    reply = world("dies", 4, family="mixtral", victim=victim, what=what, layer=1, kind=kind, timeout=WAIT_S, how="kill")
    assert reply["codes"][victim] == -9
    check_survivors(reply, victim, committed=EVENTS[what], layer=1, timeout=WAIT_S)


@pytest.mark.parametrize("what", ["check", "finish"])
def test_a_rank_dies_before_the_first_layer_or_after_the_last(world, what):
    reply = world("dies", 4, family="qwen3_moe", victim=2, what=what, layer=None, timeout=TIMEOUT_S)
    told = results(reply, dead=(2,))
    assert {answer["state"] for answer in told} == {0 if what == "check" else told[0]["last"]}
    for answer in told:  # a rank may have been too slow to read the last vote of the victim
        assert answer["error"]["stage"] in ({"check"} if what == "check" else {"vote", "finish"})
        assert answer["error"]["ranks"]["2"] == "died"


def test_a_rank_dies_between_parts_of_a_layer(world):
    reply = world("dies", 2, family="mixtral", victim=1, what="vote", layer=1, timeout=TIMEOUT_S, budget=6144)
    (answer,) = results(reply, dead=(1,))
    assert answer["stages"].count(1) > 1, "the budget cuts layers"
    assert answer["state"] == answer["stages"].index(1) and answer["error"]["layer"] == 1


def test_a_silent_rank_counts_as_dead_after_the_timeout(world):
    """It also comes late, which is no reason to give it up: ranks take longer than `timeout` to load a model."""
    timeout = 10.0
    reply = world(
        "dies", 4, family="qwen3_moe", victim=3, what="vote", layer=2, how="stop", timeout=timeout, late=timeout + 2
    )
    assert reply["codes"][3] is None, f"it was stopped, not dead: {reply['codes']}\n{reply['logs'][3]}"
    told = results(reply, dead=(3,))
    assert len({answer["state"] for answer in told}) == 1
    for answer in told:
        assert "rank 3: did not answer" in answer["error"]["text"]
        assert answer["elapsed"] > timeout / 2, "it had its time to answer"


def test_a_failed_transfer_is_resumed(world):
    told = results(world("resumes", 2, family="qwen3_moe", fault="exception"))
    for answer in told:
        assert "transfer, layer 2" in answer["first"] and "rank 1: transfer: the cable came loose" in answer["first"]
        assert answer["left"] == [1], "the first layer is not moved again"
        assert answer["again"] == 0, "what is in force is not moved at all"
        assert max(answer["between"], answer["after"]) < EXACT
    assert told[0]["mixed"] == told[1]["mixed"] and told[0]["half_way"] == told[1]["half_way"]


def test_canaries_catch_wrong_weights(world):
    told = results(world("resumes", 2, family="qwen3_moe", fault="wrong weights"))
    for answer in told:
        assert "verify, layer 2" in answer["first"] and "are not theirs" in answer["first"]
        assert answer["left"] == [1] and max(answer["between"], answer["after"]) < EXACT


@pytest.mark.parametrize("what", ["half sent", "verify", "half decided", "commit"])
def test_a_rank_of_four_dies_within_a_batch(world, what):
    """The survivors hold all layers of the batch or none, alike."""
    victim = list(EVENTS).index(what) % 4
    reply = world(
        "dies", 4, family="mixtral", victim=victim, what=what, layer=1, timeout=WAIT_S, how="kill", together=True
    )
    assert reply["codes"][victim] == -9
    told = results(reply, dead=(victim,))
    last = told[0]["last"]
    (state,) = {answer["state"] for answer in told}
    assert state in {None: (0, last), False: (0,), True: (last,)}[EVENTS[what]] and last == 3
    for answer in told:
        assert str(victim) in answer["error"]["ranks"] and answer["placement"] == told[0]["placement"]
        named = answer["error"]["layers"]  # none where the death was only noticed when everybody reported the end
        assert named == [0, 1, 2] or (state and named == [])


@pytest.mark.parametrize("fault", ["exception", "wrong weights", "interrupt"])
def test_a_fault_in_one_layer_of_a_batch_stops_all_of_it_on_every_rank(world, fault):
    told = results(world("batch_fails", 2, family="mixtral", fault=fault))
    assert told[0]["half_way"] == told[1]["half_way"]
    for answer in told:
        assert answer["moved"] == (fault == "interrupt"), "what was decided is carried out, interrupt or not"
        assert max(answer["between"], answer["after"]) < EXACT and answer["there"]
    said = {"exception": "the cable came loose", "wrong weights": "are not theirs", "interrupt": "pressed"}[fault]
    assert said in told[1]["error"] and (fault == "interrupt" or "layers 0, 1, 2" in told[0]["error"])


@pytest.mark.parametrize("late", [None, 3])
def test_a_rank_that_dies_in_the_background_stops_all(world, late):
    """Each survivor names it, also one that only met a rank that had given up because of it."""
    told = results(world("background_dies", 4, family="qwen3_moe", victim=2, late=late), dead=(2,))
    assert len({answer["checksum"] for answer in told}) == 1
    assert all(answer["error"] and answer["done"] for answer in told)
    started = [answer["error"] for answer in told if answer["started"]]
    assert started and all("rank 2: died" in error for error in started)


def test_a_probe_that_changes_rolls_back(world):
    for answer in results(world("probes", 2, family="qwen3_moe")):
        assert answer["moved"] and answer["back"] and "probe: rank 0: output differs" in answer["error"]
