"""Scenarios: placements change while the network serves."""

from __future__ import annotations

import torch
from ranks_common import batch, load, random_placement, relative, scenario, slots_of

from gemopt.executor import Executor
from gemopt.migration import BATCH_BYTES
from gemopt.rules import Rules


@scenario
def background(rank, world, family, where):
    """Serve while weights travel; count forward passes until all is committed."""
    model = load(family, world, where)
    tokens = batch(rank, where)
    committed = []
    executor = Executor(model, timeout_s=60, on_event=lambda n, at: committed.append(at) if n == "committed" else None)
    placement = random_placement(3, 8, executor.layer_ids, slots_of("ragged", 8, world))
    with torch.no_grad():
        reference = model(tokens).logits
        job = executor.start(placement)
        errors, passes, seen = [], 0, []
        while not job.done and passes < 500:
            errors.append(relative(model(tokens).logits, reference))
            seen.append(len(committed))
            passes += 1
        executor.verify()
        last = relative(model(tokens).logits, reference)
        job = executor.start(random_placement(4, 8, executor.layer_ids, slots_of("equal", 8, world)))
        job.wait()
        executor.verify()
        waited = relative(model(tokens).logits, reference)
    return {
        "worst": max([*errors, last, waited]),
        "passes": passes,
        "seen": seen,
        "committed": sorted(committed[: len(executor.layers)]),
        "layers": executor.layer_ids,
        "buffer": executor.plan(placement).buffer_bytes(BATCH_BYTES),
        "done": job.done,
        "checksum": executor.checksum(),
        "slots": executor.placement.slots_per_rank.tolist(),
    }


@scenario
def batches(rank, world, family, budget):
    """Which layers are committed by one vote, how much memory receives them, and the outputs all along."""
    votes, worst = [], []

    def on_event(name, where):
        if name == "decide":
            if not votes or votes[-1][0] == "committed":
                votes.append(["decide", []])
            votes[-1][1].append(where)
        if name == "committed":
            votes[-1][0] = name

    model = load(family, world)
    tokens = batch(rank, "shared")
    executor = Executor(model, timeout_s=60, on_event=on_event)
    if budget is not None:
        executor.budget_bytes = executor.layers[0].expert_bytes * budget
    placement = random_placement(3, 8, executor.layer_ids, slots_of("equal", 8, world))
    needed = executor.plan(placement).buffer_bytes(executor._batch_bytes)
    with torch.no_grad():
        reference = model(tokens).logits
        job = executor.start(placement)
        while not job.done:
            worst.append(relative(model(tokens).logits, reference))
        worst.append(relative(model(tokens).logits, reference))
    executor.verify()
    pool = executor._runner._pool
    rows = sum(buffer.numel() * buffer.element_size() for buffer in pool._buffers.values())
    assert rows <= needed, (rows, needed)
    return {
        "batches": [layers for _, layers in votes],
        "worst": max(worst),
        "buffer": needed,
        "checksum": executor.checksum(),
    }


@scenario
def cuts(rank, world, family):
    """Three batches of one layer; after the first has begun, nothing more is wanted."""
    model = load(family, world)
    tokens = batch(rank, "shared")
    executor = Executor(model, timeout_s=60)
    executor.budget_bytes = max(dispatch.expert_bytes for dispatch in executor.layers) * 4
    before = executor.placement.physical_to_logical
    worst = []
    with torch.no_grad():
        reference = model(tokens).logits
        wanted = random_placement(3, 8, executor.layer_ids, slots_of("equal", 8, world))
        job = executor.start(wanted.under(Rules(together=[{"experts": [0], "on": "node"}]), range(world)))
        job.cut()
        while not job.done:
            worst.append(relative(model(tokens).logits, reference))
    executor.verify()
    rows = executor.placement.physical_to_logical
    kept = executor.placement
    return {
        "rows": rows.tolist(),
        "changed": (rows != before).any(axis=1).tolist(),
        "worst": max(worst),
        "rules": [kept.rules.brief(), kept.node_of_rank.tolist()],
    }
