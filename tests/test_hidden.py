"""Hidden states beside a trace: what entered the routers, of whole requests, and networks that learn from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cli_inputs import gemopt, gemopt_json  # noqa: E402
from installed_families import INSTALLED  # noqa: E402
from traced import CACHE  # noqa: E402

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import find_moe_layers, tiny  # noqa: E402
from gemopt.predict import Batch, assess, make  # noqa: E402
from gemopt.predict.networks import Lstm, Mlp  # noqa: E402
from gemopt.profile import Profile  # noqa: E402
from gemopt.profiling.generating import load_model, read_prompts, record  # noqa: E402
from gemopt.profiling.tracing import HiddenSample, Tracer  # noqa: E402
from gemopt.profiling.tracing.hidden import Picked, hidden_bytes  # noqa: E402
from gemopt.traces import Traces, concatenate, save_hidden, with_hidden  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = Path(__file__).parent.parent / "examples" / "data" / "prompts.jsonl"
IDS = torch.tensor([[0, 0, 5, 9, 11], [0, 40, 41, 7, 3], [77, 3, 90, 12, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A real recording with the shipped network: the whole trace, and its drawn requests with hidden states."""
    folder = tmp_path_factory.mktemp("recorded") / "t"
    prompts = read_prompts(PROMPTS)[::6]
    record(*load_model("tiny-moe", device="cpu"), prompts, folder, batch_size=8, max_new_tokens=6,
           max_prompt_tokens=120, hidden=1500)  # fmt: skip
    traces = Traces.load(folder)
    return traces, with_hidden(traces, folder / "hidden.safetensors")


@pytest.mark.parametrize("family", INSTALLED)
def test_every_family_keeps_what_entered_its_routers(family, tmp_path):
    network = tiny(family)
    layers, seen = find_moe_layers(network), []
    for layer in layers:
        layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with Tracer(network, tmp_path / "t", hidden=HiddenSample(frozenset({0, 2}), 8)), torch.no_grad():
        network(input_ids=IDS, attention_mask=MASK)
    found = with_hidden(Traces.load(tmp_path / "t"), tmp_path / "t" / "hidden.safetensors").tokens
    real = MASK.bool().flatten()
    drawn = real & torch.tensor([True, False, True]).repeat_interleave(5)
    expected = torch.stack([each.reshape(15, -1)[drawn] for each in seen], dim=1).half().numpy()
    np.testing.assert_array_equal(found.hidden, expected)
    assert found.request.tolist() == [0] * 3 + [2] * 5
    assert expected.nbytes == hidden_bytes(network, 8)


def test_ended_sequences_and_many_batches(tmp_path, monkeypatch):
    """Rows of the record and hidden states stay together where tokens are dropped and counted in between."""
    network = tiny("olmoe")
    monkeypatch.setattr("gemopt.profiling.tracing.PENDING_BYTES", 1)
    with Tracer(network, tmp_path / "t", hidden=HiddenSample(frozenset({1, 3, 5}), 99), eos_token_ids=(9,)) as tracer:
        for _ in range(2):
            with torch.no_grad(), tracer.task("a"):
                cache, mask = network(input_ids=IDS, attention_mask=MASK)[CACHE], MASK
                for fed in ([8, 7, 10], [9, 9, 11], [6, 5, 4]):  # the second and first row end
                    mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
                    network(input_ids=torch.tensor(fed)[:, None], attention_mask=mask, **{CACHE: cache})
    found = with_hidden(Traces.load(tmp_path / "t"), tmp_path / "t" / "hidden.safetensors").tokens
    assert np.unique(found.request, return_counts=True)[1].tolist() == [4 + 1, 3 + 1, 5 + 3]
    routers = [layer.router for layer in find_moe_layers(network)]
    with torch.no_grad():  # what a router chooses for the kept states is what was recorded of these tokens
        chosen = [router(torch.from_numpy(found.hidden[:, i]).float())[-1] for i, router in enumerate(routers)]
    same = np.sort(torch.stack(chosen, dim=1).numpy()) == np.sort(found.ids)
    assert same.mean() > 0.98  # float16 decides a tie otherwise now and then


def test_parts_that_are_joined_keep_them(recorded):
    whole, sampled = recorded
    first, then = sampled.steps(slice(0, 9)), sampled.steps(slice(9, None))
    np.testing.assert_array_equal(concatenate([first, then]).tokens.hidden, sampled.tokens.hidden)
    assert concatenate([first, whole.steps(slice(9, None))]).tokens.hidden is None


def test_whole_requests_within_the_bound():
    sizes = [5, 7, 10, 3, 9]
    drawn = {HiddenSample.draw(sizes, 20, seed) for seed in range(40)}
    assert len({sample.requests for sample in drawn}) > 3
    for sample in drawn:
        assert sample.tokens == sum(sizes[i] for i in sample.requests) <= 20
    assert HiddenSample.draw(sizes, 20, 0) == HiddenSample.draw(sizes, 20, 0)
    assert HiddenSample.draw(sizes, 1000, 0).requests == frozenset(range(5))
    with pytest.raises(InputError, match="hidden: got 2; at least"):
        HiddenSample.draw(sizes, 2, 0)


def test_the_bound_holds_and_nothing_is_kept_unasked(tmp_path):
    network = tiny("olmoe")
    with (
        pytest.raises(InputError, match="hidden: got 8 tokens; at most 7"),
        Tracer(network, tmp_path / "t", hidden=HiddenSample(frozenset({0, 2}), 7)),
        torch.no_grad(),
    ):
        network(input_ids=IDS, attention_mask=MASK)
    with Tracer(network, tmp_path / "u", ids=True), torch.no_grad():
        assert not any(layer.router._forward_pre_hooks for layer in find_moe_layers(network))
        network(input_ids=IDS, attention_mask=MASK)
    assert [path.name for path in (tmp_path / "u").iterdir()] == ["000000.safetensors"]


def test_what_float16_does_not_hold_is_refused_at_once_and_a_failed_forward_counts_not(tmp_path):
    with pytest.raises(InputError, match="hidden states of MoE layer 1: got infinite or NaN"):
        Picked(torch.tensor([1]), torch.empty(2, 1, 1, dtype=torch.float16)).take(1, torch.tensor([[0.0], [1e6]]))
    network = tiny("olmoe")
    with Tracer(network, tmp_path / "t", hidden=HiddenSample(frozenset({0}), 3)), torch.no_grad():
        with pytest.raises(IndexError):
            network(input_ids=torch.full((1, 3), 10_000))
        network(input_ids=IDS, attention_mask=MASK)
    assert len(with_hidden(Traces.load(tmp_path / "t"), tmp_path / "t" / "hidden.safetensors").tokens.ids) == 3


def test_a_wrong_pairing_is_refused(recorded, tmp_path):
    whole, sampled = recorded
    path = tmp_path / "t.hidden.safetensors"
    tokens = whole.tokens
    rows = np.flatnonzero(np.isin(tokens.request, sampled.tokens.request))
    save_hidden(path, whole, rows, sampled.tokens.hidden)
    np.testing.assert_array_equal(with_hidden(whole, path).counts, sampled.counts)
    whole.save(tmp_path / "t.safetensors")  # smaller integers, the same record
    with_hidden(Traces.load(tmp_path / "t.safetensors"), path)
    ids = tokens.ids.copy()
    ids[0, 0, :2] = ids[0, 0, 1::-1]
    for other in (replace(whole, tokens=replace(tokens, ids=ids)), whole.steps(slice(1, None))):
        with pytest.raises(InputError, match="hidden states of other traces"):
            with_hidden(other, path)
    with pytest.raises(InputError, match="hidden states of gemopt trace --hidden"):
        with_hidden(whole, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=r"Traces\.ids"):
        with_hidden(replace(whole, tokens=None), path)
    save_hidden(path, whole, rows[::-1].copy(), sampled.tokens.hidden)
    with pytest.raises(InputError, match="increasing rows"):
        with_hidden(whole, path)
    with pytest.raises(InputError, match="infinite or NaN"):
        save_hidden(path, whole, rows, np.full_like(sampled.tokens.hidden, np.inf))


def test_networks_name_more_experts_than_frequency(recorded):
    _, sampled = recorded
    assert len(set(sampled.tokens.request)) >= 8
    base = assess(make("frequency"), sampled).accuracy_L
    for name in ("mlp", "lstm"):
        found = assess(make(name), sampled)
        assert found.accuracy_L[0] == base[0]  # nothing is known before the first layer
        assert (found.accuracy_L[1:] > base[1:] + 0.05).all(), name
        assert found.device_us(1000, 2000) > found.device_us(1, 2000) > 0
        other = assess(make(name), sampled)
        assert (other.accuracy_L == found.accuracy_L).all() and (other.error_L == found.error_L).all()


@pytest.mark.parametrize("kind", [Mlp, Lstm])
def test_nothing_later_is_read(recorded, kind):
    """What enters routers later than `ahead` layers before plays no role, neither in training nor in predicting."""
    _, sampled = recorded
    hidden = sampled.tokens.hidden.copy()
    hidden[:, 2:] = 7.0
    seen = []
    for states in (sampled.tokens.hidden, hidden):
        network = kind(ahead=2)
        network.fit(replace(sampled, tokens=replace(sampled.tokens, hidden=states)))
        shown = Batch(3, 40, previous=sampled.tokens.ids[:10, :3], hidden=states[:10, :3])
        seen.append(network.predict(shown))
    np.testing.assert_array_equal(*seen)


def test_hidden_states_on_the_command_line(recorded, tmp_path, capsys):
    """What was recorded is replayed and advised on; the commands to run next name both files."""
    whole, sampled = recorded
    whole.save(tmp_path / "t.safetensors")
    rows = np.flatnonzero(np.isin(whole.tokens.request, sampled.tokens.request))
    save_hidden(tmp_path / "h.safetensors", whole, rows, sampled.tokens.hidden)
    samples = [{"assignments": n, "latency_us": 10.0 + n} for n in (1, 8, 4000)]
    Profile(devices=[{"rank": rank, "samples": samples} for rank in range(4)]).save(tmp_path / "p.json")
    given = (tmp_path / "p.json", tmp_path / "t.safetensors", "--hidden", tmp_path / "h.safetensors")
    found = gemopt_json(capsys, "advise", *given, "--memory", 0.04, "--no-sweep", "--window", 4)
    named = {each["strategy"] for each in found["strategies"]}
    assert {"duplication-mlp", "duplication-lstm", "duplication-previous"} <= named
    assert found["scored_steps"] == sampled.num_steps // 2
    assert f"--hidden {tmp_path / 'h.safetensors'}" in found["commands"][0]
    code, _, line = gemopt(capsys, *found["commands"][0].split()[1:])
    assert code == 0, line
    code, _, line = gemopt(capsys, "advise", *given[:2], "--predictors", "mlp", "--memory", 0.04, "--window", 4)
    assert code == 2 and "Traces.hidden: got nothing" in line


def test_what_networks_cannot_learn_from_is_said(recorded):
    whole, sampled = recorded
    with pytest.raises(InputError, match=r"Traces\.hidden: got nothing; the predictor mlp needs it; gemopt trace"):
        make("mlp").fit(whole)
    with pytest.raises(InputError, match="ahead: got 0"):
        Mlp(ahead=0)
    with pytest.raises(InputError, match="ahead: got 4; fewer than the 4 layers"):
        Lstm(ahead=4).fit(sampled)
