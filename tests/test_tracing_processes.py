"""Tracers that are killed, lose their disk, or run on several ranks."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from ranks_world import results
from traced import traced

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import tiny  # noqa: E402
from gemopt.profiling.tracing import load_ranks  # noqa: E402
from gemopt.profiling.tracing.files import TraceFolder  # noqa: E402
from gemopt.traces import Phase, Tokens, Traces  # noqa: E402


@pytest.mark.distributed
def test_a_killed_tracer_leaves_readable_traces(world, tmp_path):
    assert world("trace_is_killed", 1, folder=str(tmp_path / "t"))["codes"] == [-signal.SIGKILL]
    traces = Traces.load(tmp_path / "t")
    assert traces.num_steps >= 12
    assert traces.num_steps % 3 == 0
    assert (traces.counts.sum(axis=2) == 32 * 2).all()
    assert len(traces.tokens.ids) == 32 * traces.num_steps


@pytest.mark.distributed
def test_a_full_disk_is_one_line_and_keeps_what_is_written(world, tmp_path):
    folder = tmp_path / "t"
    ((said, hooks),) = results(world("trace_on_a_full_disk", 1, folder=str(folder)))
    assert said.startswith(f"{folder}/000001.safetensors: got File too large") and "\n" not in said
    assert hooks == 0
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]
    assert Traces.load(folder).counts.sum() == 32 * 2 * 2


def rank_traces(counts, ids, sender, **fields):
    tokens = Tokens(
        ids=np.array(ids, dtype=np.int16).reshape(-1, 1, 1),
        step_of_token=np.repeat(np.arange(len(ids)), 1),
        request=np.zeros(len(ids), dtype=np.int32),
        token_ids=np.full(len(ids), 7, dtype=np.int32),
        source_rank=None if sender is None else np.full(len(ids), sender),
    )
    return Traces(counts=np.array(counts)[:, None, :], tokens=tokens, top_k=1, **fields)


@pytest.mark.parametrize("known", [True, False])
def test_ranks_with_batches_of_their_own_are_added_up(tmp_path, known):
    for rank, (counts, ids, phase) in enumerate(
        [([[1, 0], [1, 0]], [0, 0], [0, 1]), ([[0, 1], [1, 0], [0, 1]], [1, 0, 1], [1, 1, 1])]
    ):
        (tmp_path / "t").mkdir(exist_ok=True)
        TraceFolder(tmp_path / "t", rank=rank).append(
            rank_traces(
                counts, ids, rank if known else None, phase=np.array(phase), task=np.zeros(len(ids)), task_names=("a",)
            )
        )
    traces = load_ranks(tmp_path / "t")
    assert traces.counts[:, 0].tolist() == [[1, 1], [2, 0]]  # the third step was written by one rank only
    assert traces.phase.tolist() == [Phase.MIXED, Phase.DECODE]
    assert traces.task.tolist() == [0, 0]
    assert (traces.tokens.source_rank is None) is not known
    assert not known or traces.tokens.source_rank.tolist() == [0, 1, 0, 1]
    assert traces.tokens.ids[:, 0, 0].tolist() == [0, 1, 0, 0]
    assert traces.tokens.request.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="no rank"):
        load_ranks(tmp_path)


@pytest.mark.distributed
def test_expert_parallel_ranks(world, tmp_path):
    """Two ranks sharing a batch record it once; with batches of their own they record their share each."""
    single = tiny("qwen3_moe")
    single.save_pretrained(tmp_path / "model")
    batches = results(world("traces", 2, folder=str(tmp_path)))[0]
    expected = [traced(single, tmp_path / f"e{i}", lambda b=b: single(torch.tensor(b))) for i, b in enumerate(batches)]
    shared = Traces.load(tmp_path / "shared")
    np.testing.assert_array_equal(shared.counts, expected[0].counts)
    assert shared.tokens.source_rank is None  # which rank sends which rows is for the dispatch to say
    own = load_ranks(tmp_path / "own")
    np.testing.assert_array_equal(own.counts, expected[0].counts + expected[1].counts)
    np.testing.assert_array_equal(own.pair_counts, expected[0].pair_counts + expected[1].pair_counts)
    assert own.tokens.source_rank.tolist() == [0] * 12 + [1] * 12
