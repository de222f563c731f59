"""Scenarios: ranks that profile and trace together."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks_common import scenario
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gemopt.cli import main
from gemopt.exceptions import GemoptError, InputError
from gemopt.models import find_moe_layers, tiny
from gemopt.profiling.group import Group
from gemopt.profiling.tracing import Tracer

BATCHES = [[[5, 9, 11, 200, 31, 7], [40, 41, 8, 9, 10, 11]], [[77, 3, 90, 12, 6, 6], [1, 2, 3, 4, 5, 6]]]
STORE = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # there is one, as under torchrun


@scenario
def profiles_twice(rank, world):
    """What rank 0 hears in two groups, one after the other."""
    os.environ.update(STORE)
    heard = []
    for turn in ("first", "second"):
        group = Group()

        def answer(question, turn=turn, group=group):
            return [turn, question, group.rank]

        with group.watch():
            if group.rank:
                group.serve(answer)
            else:
                heard.append(group.ask(turn + "?", answer))
                group.dismiss()
    dist.barrier()  # rank 0 has the store, which torchrun's agent has otherwise
    return heard


@scenario
def one_rank_fails(rank, world):
    """Who says what where rank 1 fails alone."""
    os.environ.update(STORE)
    group = Group()
    try:
        with group.watch():
            if group.rank:
                raise InputError("device", "none", "one per rank")
            group.ask("?", lambda question: None)
    except GemoptError as error:
        said = f"{'told' if error.told else 'tells'} {error}"
    dist.barrier()
    return said


@scenario
def command(rank, world, words):
    """Exit code of gemopt on every rank; what it says is in their logs."""
    os.environ.update(STORE)
    try:
        main(words)
    except SystemExit as stop:
        code = stop.code
    dist.barrier()
    return code


@scenario
def traces(rank, world, folder):
    """Trace a model whose ranks share a batch, then one whose do not; returns the batches."""
    folder = Path(folder)
    for name, config in (
        ("shared", DistributedConfig(tp_size=2, tp_plan="auto", ep_size=2)),
        ("own", DistributedConfig(fsdp_size=2, ep_size=2)),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config, dtype=torch.float32)
        layer = find_moe_layers(model)[0]
        assert (layer.num_experts, layer.num_local_experts, layer.expert_bytes) == (8, 4, 4 * 3 * 32 * 16)
        with Tracer(model, folder / name, ids=True), torch.no_grad():
            model(torch.tensor(BATCHES[rank if name == "own" else 0]))
        dist.barrier()
    return BATCHES


@scenario
def trace_is_killed(rank, world, folder):
    """Killed once there are some files, wherever it is then."""

    def kill():
        while len(list(Path(folder).glob("[0-9]*"))) < 4:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    model = tiny("olmoe", num_layers=2)
    with Tracer(model, folder, ids=True, steps_per_file=3), torch.no_grad():
        for tokens in itertools.repeat(torch.arange(3, 35).view(2, 16), 100_000):
            model(tokens)


@scenario
def trace_on_a_full_disk(rank, world, folder):
    """The kernel refuses files above a limit: the first part fits, the second does not. (said, hooks left)."""
    small, large = torch.arange(3, 35).view(2, 16), torch.ones(16, 500, dtype=torch.long)
    model = tiny("olmoe", num_layers=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    said = "went on"
    try:
        with Tracer(model, folder, ids=True, steps_per_file=1), torch.no_grad():
            for tokens in (small, large, small):
                model(tokens)
    except InputError as error:
        said = str(error)
    return said, sum(bool(m._forward_hooks or m._forward_pre_hooks) for m in model.modules())
