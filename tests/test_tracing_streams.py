"""Which forwards go on from one another: batches computed in turn, caches that are copied, reset, static or hybrid."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from traced import CACHE, traced

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import tiny  # noqa: E402
from gemopt.profiling.tracing import Tracer  # noqa: E402
from gemopt.profiling.tracing.streams import CACHES, cache_in, cache_of  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
END, LENGTH = 99, 6
PREFILL, DECODE, MIXED = 0, 1, 2


def prompt(rows=2, length=LENGTH):
    return torch.arange(3, 3 + rows * length).view(rows, length)


def fed(*tokens):
    return torch.tensor(tokens)[:, None]


def requests_by_step(traces):
    return [
        sorted(set(traces.tokens.request[traces.tokens.step_of_token == step].tolist()))
        for step in range(traces.num_steps)
    ]


def test_batches_that_are_computed_in_turn_end_each_for_itself(model, tmp_path):
    def run():
        first, second = (DynamicCache(config=model.config) for _ in range(2))
        model(prompt(), **{CACHE: first})
        model(prompt(), **{CACHE: second})
        for tokens, cache in (((7, 8), first), ((END, 8), second), ((7, 8), first), ((5, 8), second), ((7, 8), first)):
            model(fed(*tokens), **{CACHE: cache})

    traces = traced(model, tmp_path / "t", run, ids=True, eos_token_ids=(END,))
    assert traces.counts[:, 0].sum(axis=1).tolist() == [24, 24, 4, 2, 4, 2, 4]
    assert requests_by_step(traces) == [[0, 1], [2, 3], [0, 1], [3], [0, 1], [3], [0, 1]]


def test_a_cache_that_the_model_made_itself_is_known_again(model, tmp_path):
    def run():
        first = model(prompt(1), use_cache=True)[CACHE]
        second = model(prompt(1), use_cache=True, return_dict=False)[1]
        model(fed(7), **{CACHE: first})
        model(prompt(1, 3), **{CACHE: second})

    traces = traced(model, tmp_path / "t", run, ids=True)
    assert requests_by_step(traces) == [[0], [1], [0], [1]]
    assert traces.phase.tolist() == [PREFILL, PREFILL, DECODE, PREFILL]


def test_a_copy_of_a_cache_is_another_request(model, tmp_path):
    """The recipe for a common prefix: computed once, its cache copied for each prompt."""

    def run():
        prefix = DynamicCache(config=model.config)
        model(prompt(1), **{CACHE: prefix})
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            model(prompt(1, 2), **{CACHE: cache})
            model(fed(8), **{CACHE: cache})

    traces = traced(model, tmp_path / "t", run, ids=True)
    assert requests_by_step(traces) == [[0], [1], [1], [2], [2]]
    assert traces.phase.tolist() == [PREFILL, PREFILL, DECODE, PREFILL, DECODE]


@pytest.mark.parametrize("wide", [False, True])
def test_a_static_cache(model, tmp_path, wide):
    """Its mask may be as wide as the cache; prompts of one token and in chunks; reset for another batch."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :2] = 0
    cache = StaticCache(config=model.config, max_cache_len=16)

    def forward(ids):
        seen = forward.seen = forward.seen + ids.shape[1]
        columns = mask if wide else mask[:, :seen]
        model(ids, attention_mask=torch.where(torch.arange(columns.shape[1]) < seen, columns, 0), **{CACHE: cache})

    def run():
        forward.seen = 0
        model(prompt(), attention_mask=mask[:, :LENGTH])  # another batch
        for ids in (prompt()[:, :4], prompt()[:, 4:], fed(7, 8)):
            forward(ids)
        cache.reset()
        forward.seen = 0
        forward(prompt()[:, :1])
        forward(fed(7, 8))

    traces = traced(model, tmp_path / "t", run, ids=True)
    assert traces.counts[:, 0].sum(axis=1).tolist() == [20, 12, 8, 4, 2, 2]
    assert traces.phase.tolist() == [PREFILL, PREFILL, PREFILL, DECODE, PREFILL, DECODE]
    assert requests_by_step(traces) == [[0, 1], [2, 3], [2, 3], [2, 3], [5], [5]]


def test_a_mask_that_does_not_cover_what_is_cached_is_refused(model, tmp_path):
    cache = DynamicCache(config=model.config)
    with pytest.raises(
        InputError, match=r"attention_mask: got shape \[2, 1\]; at least \[2, 7\]: of 6 cached and 1 new"
    ):
        traced(
            model,
            tmp_path / "t",
            lambda: [
                model(prompt(), **{CACHE: cache}),
                model(fed(7, 8), attention_mask=torch.ones(2, 1), **{CACHE: cache}),
            ],
        )


def test_a_cache_that_does_not_tell_its_length_is_refused(model, tmp_path):
    """Tuples, as networks of others have: a next token was a prompt, and padding that of its first tokens."""
    keys = torch.zeros(2, 4, LENGTH, 8)
    stateful = SimpleNamespace(layers=[SimpleNamespace(state=keys)])
    for number, (cache, name) in enumerate((([(keys, keys)] * 3, "list"), (stateful, "SimpleNamespace"))):
        limit = f"({'|'.join(CACHES)}): got {name}; .*tells how many tokens.*use_cache=False"
        with pytest.raises(InputError, match=limit):
            traced(model, tmp_path / str(number), lambda cache=cache: model(fed(7, 8), **{CACHE: cache}))
    assert cache_of(SimpleNamespace(past_key_values=((keys, keys),))) is None
    assert cache_in({"past_key_values": None}) == (None, 0)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "a later name"])
def test_a_cache_is_known_by_whatever_name(model, name):
    """transformers 5.24 calls it by another one: every token of an answer was a prompt."""
    found = model(prompt(), use_cache=True)
    cache = cache_of(found)
    assert cache_in({"input_ids": prompt(), name: cache}) == (cache, LENGTH)
    assert cache_of(SimpleNamespace(**{name: cache})) is cache_of({name: cache}) is cache_of((prompt(), cache)) is cache


def test_a_mask_of_tokens_that_no_cache_holds_is_refused(model, tmp_path):
    tracer, limit = Tracer(model, tmp_path / "t"), r"attention_mask: got shape \[2, 7\]; \[2, 1\]: there is no cache"
    with pytest.raises(InputError, match=limit), tracer:
        model(fed(7, 8), attention_mask=torch.ones(2, 7), use_cache=False)
    with pytest.raises(InputError, match="no forward"), tracer:  # a later block has not been refused
        pass


def test_layers_that_keep_a_state_only_count_no_tokens(tmp_path):
    """MiniMax's first layers are linear attention, whose cache says that it is empty."""
    network = tiny("minimax")
    network.generation_config.eos_token_id = None
    answer = []
    run = lambda: answer.append(network.generate(prompt(), max_new_tokens=4, do_sample=False))  # noqa: E731
    traces = traced(network, tmp_path / "t", run, ids=True, eos_token_ids=())
    assert traces.phase.tolist() == [PREFILL, DECODE, DECODE, DECODE]
    assert requests_by_step(traces) == [[0, 1]] * 4
    end = int(answer[0][0, LENGTH])  # what the first row feeds first: it counts no more
    ended = traced(network, tmp_path / "u", run, eos_token_ids=(end,))
    alive = [(row != end).cumprod(0)[:3] for row in answer[0][:, LENGTH:]]
    assert ended.counts[1:, 0].sum(axis=1).tolist() == (2 * sum(alive)).tolist()


def test_packed_sequences_have_no_requests(model, tmp_path):
    """Rows of a packed batch are not requests: none are recorded, rather than one for each step."""
    ends = torch.tensor([0, 4, LENGTH], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    traces = traced(model, tmp_path / "t", lambda: model(prompt(1), use_cache=False, **packed), ids=True)
    assert traces.phase.tolist() == [MIXED] and traces.tokens.request is None
    np.testing.assert_array_equal(traces.tokens.token_ids, prompt(1)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_network_that_runs_again_for_its_gradients_counts_once(tmp_path, reentrant):
    network = tiny("mixtral").train()
    embedded = network.get_input_embeddings()(prompt())
    with Tracer(network, tmp_path / "t"):
        forward = lambda hidden: network(inputs_embeds=hidden, use_cache=False).logits  # noqa: E731
        checkpoint(forward, embedded, use_reentrant=reentrant).sum().backward()
        network(prompt(), use_cache=False)
    assert Traces.load(tmp_path / "t").counts[:, 0].sum(axis=1).tolist() == [24, 24]


def in_a_thread(action):
    """The error that an action ends with in another thread."""
    errors = []

    def work():
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return errors[0] if errors else None


def test_a_second_thread_at_a_time_is_refused_and_spoils_nothing(model, tmp_path):
    """It comes while the first one is between two routers."""
    errors = []

    def meet(*_):
        if not errors:
            errors.append(in_a_thread(lambda: model(prompt())))

    hook = model.model.layers[1].register_forward_pre_hook(meet)
    try:
        traces = traced(model, tmp_path / "t", lambda: [model(prompt()), model(prompt(1))])
    finally:
        hook.remove()
    assert isinstance(errors[0], InputError) and "forwards in two threads" in str(errors[0])
    assert traces.counts.sum(axis=2).tolist() == [[24] * 3, [12] * 3]


def test_threads_take_turns_also_after_a_failure(model, tmp_path):
    errors = []

    def run():
        errors.append(in_a_thread(lambda: model(torch.tensor([[10_000]]))))
        errors.append(in_a_thread(lambda: model(prompt(1))))
        model(prompt())

    traces = traced(model, tmp_path / "t", run)
    assert isinstance(errors[0], IndexError) and errors[1] is None
    assert traces.counts.sum(axis=2).tolist() == [[12] * 3, [24] * 3]
