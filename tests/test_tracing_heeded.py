"""A tracer refuses blocks whose experts compute others than their router chose, and those alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import find_moe_layers, tiny  # noqa: E402
from gemopt.profiling.tracing import Tracer  # noqa: E402
from gemopt.traces import Traces  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.tensor([[5, 9, 11, 200, 31, 7], [0, 0, 0, 0, 40, 41], [0, 0, 77, 3, 90, 12]])
INPUTS = {"input_ids": TOKENS, "attention_mask": (TOKENS > 0).long()}


@pytest.mark.parametrize("anew", [False, True])
def test_a_block_that_does_not_heed_its_router_is_refused(tmp_path, anew):
    """One of a user's own, that drops some of what was chosen or chooses anew."""
    network = tiny("qwen3_moe")
    block = find_moe_layers(network)[1].block

    def own(hidden):
        flat = hidden.reshape(-1, 32)
        _, weights, ids = block.gate(flat)
        ids, weights = ((ids + 1) % 8, weights) if anew else (ids[:, :1], weights[:, :1])
        return block.experts(flat, ids, weights).view_as(hidden)

    block.forward = own
    limit = r"layers\.2\.mlp: got Qwen3MoeSparseMoeBlock gives its experts other numbers than Qwen3MoeTopKRouter chose"
    with pytest.raises(InputError, match=limit), Tracer(network, tmp_path / "t"), torch.no_grad():
        network(**INPUTS)


def test_blocks_may_sort_what_was_chosen_and_give_masks_and_no_experts_to_padding(tmp_path):
    network = tiny("qwen3_moe")
    layer = find_moe_layers(network)[1]
    block, real = layer.block, (TOKENS > 0).flatten()
    experts = layer.experts.forward
    layer.experts.forward = lambda flat, mask, ids, weights: experts(flat, ids, weights)

    def own(hidden):
        flat = hidden.reshape(-1, 32)
        _, weights, ids = block.gate(flat)
        mask = torch.nn.functional.one_hot(ids, 8).amax(dim=1)
        ids, order = ids.masked_fill(~real[:, None], 0).sort(dim=1)
        return block.experts(flat, mask, ids, weights.gather(1, order)).view_as(hidden)

    def steps(path):
        with Tracer(network, path), torch.no_grad():
            network(**INPUTS)
        return Traces.load(path).counts

    block.forward = own
    own_counts = steps(tmp_path / "own")
    del block.forward, layer.experts.forward
    assert (own_counts == steps(tmp_path / "t")).all()


def test_compiled_layers_are_not_compiled_anew_in_every_step(tmp_path):
    from torch._dynamo.utils import counters

    network = tiny("qwen3_moe")
    for layer in network.model.layers:
        layer.compile(backend="eager")
    counters.clear()
    found = []
    with Tracer(network, tmp_path / "t"), torch.no_grad():
        for _ in range(3):
            network(**INPUTS)
            found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[-1] and Traces.load(tmp_path / "t").num_steps == 3
