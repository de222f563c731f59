"""Tracers that are killed, lose their disk, or run on several ranks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from traced import traced

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gemopt.exceptions import InputError  # noqa: E402
from gemopt.models import tiny  # noqa: E402
from gemopt.profiling._trace_files import TraceFolder  # noqa: E402
from gemopt.profiling.tracing import load_ranks  # noqa: E402
from gemopt.traces import Phase, Tokens, Traces  # noqa: E402

TRACE_FOREVER = """
    import sys, torch
    from gemopt.models import tiny
    from gemopt.profiling.tracing import Tracer

    torch.set_num_threads(1)
    model = tiny("olmoe", num_layers=2)
    batch = {"input_ids": torch.arange(3, 35).view(2, 16)}
    with Tracer(model, sys.argv[1], ids=True, steps_per_file=int(sys.argv[2])), torch.no_grad():
        for step in range(int(sys.argv[3])):
            model(**batch)
"""


def script(tmp_path, text=TRACE_FOREVER):
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_killed_tracer_leaves_readable_traces(tmp_path):
    folder = tmp_path / "t"
    process = subprocess.Popen([sys.executable, script(tmp_path), str(folder), "3", "100000"])
    deadline = time.monotonic() + 120
    while len(list(folder.glob("[0-9]*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    traces = Traces.load(folder)
    assert traces.num_steps >= 12
    assert traces.num_steps % 3 == 0
    assert (traces.counts.sum(axis=2) == 32 * 2).all()
    assert len(traces.tokens.ids) == 32 * traces.num_steps


def test_a_full_disk_is_one_line_and_keeps_what_is_written(tmp_path):
    """The kernel refuses files above a limit: the first part fits, the second does not."""
    folder = tmp_path / "t"
    run = script(
        tmp_path,
        """
        import resource, sys, torch
        from gemopt.exceptions import InputError
        from gemopt.models import tiny
        from gemopt.profiling.tracing import Tracer
        from gemopt.traces import Traces

        torch.set_num_threads(1)
        model = tiny("olmoe", num_layers=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            with Tracer(model, sys.argv[1], ids=True, steps_per_file=1), torch.no_grad():
                model(torch.arange(3, 35).view(2, 16))
                model(torch.ones(16, 500, dtype=torch.long))
                model(torch.arange(3, 35).view(2, 16))
                print("went on")
        except InputError as error:
            print(f"refused: {error}")
        hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        print("hooks left:", len(hooks))
        """,
    )
    done = subprocess.run([sys.executable, run, str(folder)], capture_output=True, text=True, check=True)
    refused, hooks = done.stdout.splitlines()
    assert refused.startswith(f"refused: {folder}/000001.safetensors: got File too large")
    assert hooks == "hooks left: 0"
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]
    assert Traces.load(folder).counts.sum() == 32 * 2 * 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def rank_traces(counts, ids, **fields):
    tokens = Tokens(
        ids=np.array(ids, dtype=np.int16).reshape(-1, 1, 1),
        step_of_token=np.repeat(np.arange(len(ids)), 1),
        request=np.zeros(len(ids), dtype=np.int32),
        token_ids=np.full(len(ids), 7, dtype=np.int32),
    )
    return Traces(counts=np.array(counts)[:, None, :], tokens=tokens, top_k=1, **fields)


def test_ranks_with_batches_of_their_own_are_added_up(tmp_path):
    for rank, (counts, ids, phase) in enumerate(
        [([[1, 0], [1, 0]], [0, 0], [0, 1]), ([[0, 1], [1, 0], [0, 1]], [1, 0, 1], [1, 1, 1])]
    ):
        (tmp_path / "t").mkdir(exist_ok=True)
        TraceFolder(tmp_path / "t", rank=rank).append(
            rank_traces(counts, ids, phase=np.array(phase), task=np.zeros(len(ids)), task_names=("a",))
        )
    traces = load_ranks(tmp_path / "t")
    assert traces.counts[:, 0].tolist() == [[1, 1], [2, 0]]  # the third step was written by one rank only
    assert traces.phase.tolist() == [Phase.MIXED, Phase.DECODE]
    assert traces.task.tolist() == [0, 0]
    assert traces.tokens.source_rank.tolist() == [0, 1, 0, 1]
    assert traces.tokens.ids[:, 0, 0].tolist() == [0, 1, 0, 0]
    assert traces.tokens.request.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="no rank"):
        load_ranks(tmp_path)


@pytest.mark.distributed
def test_expert_parallel_ranks(tmp_path):
    """Two ranks sharing a batch record it once; with batches of their own they record their share each."""
    single = tiny("qwen3_moe")
    single.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parent / "tracing_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    batches = json.loads((tmp_path / "batches.json").read_text())
    expected = [traced(single, tmp_path / f"e{i}", lambda b=b: single(torch.tensor(b))) for i, b in enumerate(batches)]
    shared = Traces.load(tmp_path / "shared")
    np.testing.assert_array_equal(shared.counts, expected[0].counts)
    own = load_ranks(tmp_path / "own")
    np.testing.assert_array_equal(own.counts, expected[0].counts + expected[1].counts)
    np.testing.assert_array_equal(own.pair_counts, expected[0].pair_counts + expected[1].pair_counts)
    assert own.tokens.source_rank.tolist() == [0] * 12 + [1] * 12
