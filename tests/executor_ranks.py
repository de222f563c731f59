"""Ranks for the executor's tests: a process that forks real gloo groups and runs one scenario in each.

Started by `executor_world` in conftest-free fashion: one JSON request per line on standard input, one reply per line
on standard output. Forking after the imports makes a group of four cost a second instead of twenty.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gemopt import InputError, Placement
from gemopt.costs import Staircase
from gemopt.executor import Executor, MigrationError
from gemopt.executor.plan import checksum as checksum_of_any
from gemopt.executor.plan import layer_rows
from gemopt.executor.plan import slot_checksum as checksum
from gemopt.latency import Curve, Latency
from gemopt.migration import BATCH_BYTES
from gemopt.models import find_moe_layers, tiny

SCRATCH = Path(tempfile.mkdtemp(prefix="gemopt-ranks-"))
SCENARIOS = {}
GROUP_TIMEOUT_S = 300  # generous: the machine may be busy with something else


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


# The model, once for a group and once for a single process.


def checkpoint(family: str, **config) -> Path:
    folder = SCRATCH / (family + "".join(f"-{k}{v}" for k, v in sorted(config.items())))
    return folder


def make_checkpoint(family: str, **config) -> None:
    folder = checkpoint(family, **config)
    if not folder.exists():
        tiny(family, **{"num_layers": 3, "num_experts": 8, "num_key_value_heads": 4, **config}).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)


def layout(name: str, world: int, implementation: str) -> DistributedConfig:
    sizes = {
        "shared": {"tp_size": world, "tp_plan": "auto"},
        "own": {"fsdp_size": world},
        "mixed": {"tp_size": 2, "tp_plan": "auto", "fsdp_size": world // 2},
    }[name]
    return DistributedConfig(**sizes, ep_size=world, ep_implementation=implementation)


def load(family: str, world: int, where: str = "shared", implementation: str = "gemopt", **config):
    path = checkpoint(family, **config)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=layout(where, world, implementation)).eval()


def batch(rank: int, where: str, rows: int = 3, length: int = 7, seed: int = 0):
    if where == "mixed":
        rank = rank // 2
    generator = torch.Generator().manual_seed(seed if where == "shared" else seed + 100 * (rank + 1))
    return torch.randint(3, 256, (rows, length), generator=generator)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_placement(seed: int, experts: int, layer_ids, slots, *, split: str = "even", fill: float = 1.0) -> Placement:
    """A valid placement whose spare slots hold copies (a share `fill` of them)."""
    rng = np.random.default_rng(seed)
    rows, weights = [], []
    for _ in layer_ids:
        contents = [[] for _ in slots]
        for expert in rng.permutation(experts):
            open_ranks = [g for g, s in enumerate(slots) if len(contents[g]) < s]
            contents[rng.choice(open_ranks)].append(int(expert))
        for rank, size in enumerate(slots):
            others = [e for e in rng.permutation(experts).tolist() if e not in contents[rank]]
            contents[rank] += others[: round(fill * (size - len(contents[rank])))]
            contents[rank] += [-1] * (size - len(contents[rank]))
        row = np.array([e for c in contents for e in c])
        share = rng.uniform(0.2, 1, len(row)) * (row >= 0)
        sums = np.bincount(row[row >= 0], weights=share[row >= 0], minlength=experts)
        rows.append(row)
        weights.append(np.where(row >= 0, share / sums[row], 0))
    return Placement(
        physical_to_logical=rows,
        slots_per_rank=slots,
        num_experts=experts,
        layer_ids=list(layer_ids),
        split=split,
        split_weights=weights if split == "static" else None,
    )


def slots_of(kind: str, experts: int, world: int) -> list[int]:
    each = experts // world
    return {
        "equal": [each] * world,
        "unequal": [each + 2, each, *[each] * (world - 3), each - 2][:world] if world > 2 else [each + 2, each - 2],
        "copies": [each + 2] * world,
        "ragged": [each + 3, *[each + 1] * (world - 2), each],
        "empty_rank": [0, *[-(-experts // (world - 1))] * (world - 1)],
    }[kind]


@scenario
def serve(rank, world, family, placements, where="shared", config=None, warm=True):
    """Relative error of the logits under each placement, and what the executor says of itself."""
    config = config or {}
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family, **config)).eval()
    model = load(family, world, where, **config)
    tokens = batch(rank, where)
    ragged = batch(rank, where, rows=1, length={"shared": 1, "own": 1 + rank, "mixed": 1 + rank // 2}[where])
    with torch.no_grad():
        reference, small = whole(tokens).logits, whole(ragged).logits
        errors = {"untouched": relative(model(tokens).logits, reference)} if warm else {}
        executor = Executor(model, timeout_s=60)
        experts = executor.layers[0].num_experts
        for number, name in enumerate(placements):
            kind, _, split = name.partition("-")
            slots = slots_of(kind, experts, world)
            executor.apply(random_placement(number, experts, executor.layer_ids, slots, split=split))
            executor.verify()
            errors[name] = relative(model(tokens).logits, reference)
            errors[name + " ragged"] = relative(model(ragged).logits, small)
    with_gradients = relative(model(tokens).logits.detach(), reference)
    errors["with gradients"] = with_gradients
    same = (
        model.generate(tokens, max_new_tokens=3, do_sample=False).tolist()
        == whole.generate(tokens, max_new_tokens=3, do_sample=False).tolist()
    )
    return {"errors": errors, "checksum": executor.checksum(), "generates": same}


@scenario
def at_load(rank, world, family, where="shared"):
    """Loading permuted: the same outputs under transformers' own contiguous dispatch, other experts on this rank."""
    from gemopt.executor.load import layout, load_permuted

    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()
    layers = [layer.layer_id for layer in find_moe_layers(whole)]
    placement = random_placement(7, 8, layers, [8 // world] * world)
    model = load_permuted(checkpoint(family), placement, layout(where, world, "all_to_all"))
    tokens = batch(rank, where)
    with torch.no_grad():
        error = relative(model(tokens).logits, whole(tokens).logits)
    mine = placement.physical_to_logical[:, rank * 8 // world : (rank + 1) * 8 // world]
    for row, moved, kept in zip(mine, find_moe_layers(model), find_moe_layers(whole), strict=True):
        for name in kept.expert_tensors:
            assert torch.equal(getattr(moved.experts, name).to_local(), getattr(kept.experts, name)[row.tolist()])
    return {"error": error}


@scenario
def traced(rank, world, family, kind):
    """The routing recorded on a model with a placement in force, and on the network alone."""
    import tempfile

    from gemopt import Traces
    from gemopt.profiling.tracing import Tracer

    tokens = batch(rank, "shared")
    counts = []
    model = load(family, world)
    executor = Executor(model, timeout_s=60)
    executor.apply(random_placement(2, 8, executor.layer_ids, slots_of(kind, 8, world)))
    layers = find_moe_layers(model)
    for network in (model, AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()):
        folder = Path(tempfile.mkdtemp(dir=SCRATCH)) / "traces"
        with torch.no_grad(), Tracer(network, folder):
            network(tokens)
        own = folder / f"rank-{rank:04d}"
        counts.append(Traces.load(own if own.exists() else folder).counts.tolist() if rank == 0 else None)
    return {"counts": counts, "layers": [[x.num_experts, x.num_local_experts, x.expert_bytes] for x in layers]}


def sloped(world: int) -> Staircase:
    """Ranks of different speeds."""
    latencies = [Latency(((Curve(np.zeros(1), np.array([10.0]), 1.0 + 0.3 * rank),),)) for rank in range(world)]
    return Staircase(tuple(latencies), np.full((world, 1, 2), np.nan))


@scenario
def counts(rank, world, family, where, kind, split):
    """Assignments each slot really got, and those of the logical experts, per layer, in one forward pass."""
    model = load(family, world, where)
    executor = Executor(model, timeout_s=60, cost=sloped(world))
    placement = random_placement(5, 8, executor.layer_ids, slots_of(kind, 8, world), split=split)
    executor.apply(placement)
    local, logical = [], []
    for dispatch in executor.layers:
        slots = int(dispatch.row.slots_per_rank[rank])

        def experts_forward(tokens, ids, weights, inner=dispatch.experts_forward, slots=slots):
            local.append(torch.bincount(ids.flatten(), minlength=slots).tolist())
            return inner(tokens, ids, weights)

        def slots_of_ids(routing, ids, inner=dispatch._slots):
            logical.append(torch.bincount(ids.flatten(), minlength=8).tolist())
            return inner(routing, ids)

        dispatch.experts_forward, dispatch._slots = experts_forward, slots_of_ids
    with torch.no_grad():
        model(batch(rank, where, rows=5, length=11))
    rows = [dispatch.row for dispatch in executor.layers]
    return {
        "local": local,
        "logical": logical,
        "rows": [row.row_P.tolist() for row in rows],
        "slots": rows[0].slots_per_rank.tolist(),
        "weights": [None if row.weights_P is None else row.weights_P.tolist() for row in rows],
    }


@scenario
def refuse(rank, world, family):
    """What every rank says to bad input, and whether anything changed."""
    model = load(family, world)
    executor = Executor(model, timeout_s=60)
    before = executor.checksum()
    ids, slots = executor.layer_ids, [8 // world] * world
    good = random_placement(1, 8, ids, slots)
    fields = {name: getattr(good, name) for name in type(good).model_fields}
    broken = SCRATCH / f"broken{rank}.json"
    broken.write_text("{" if rank == 1 else good.model_dump_json())
    missing = good.model_dump_json().replace(
        f"[{good.physical_to_logical[0][0]},", f"[{good.physical_to_logical[0][1]},", 1
    )
    (SCRATCH / "missing.json").write_text(missing)
    cases = {
        "layers": random_placement(1, 8, [*ids, 9], slots),
        "experts": random_placement(1, 4, ids, [4 // world] * world),
        "ranks": random_placement(1, 8, ids, [2, 3, 3]),
        "split": Placement(**{**fields, "split": "optimal"}),
        "model": Placement(**{**fields, "model": "somebody/Another-Model"}),
        "differs": random_placement(rank, 8, ids, slots),
        "broken on one rank": broken,
        "an expert missing": SCRATCH / "missing.json",
        "no file": SCRATCH / "none.json",
    }
    said = {}

    def attempt(name, placement):
        try:
            executor.apply(placement)
            said[name] = "accepted"
        except InputError as error:
            said[name] = str(error)

    for name, placement in cases.items():
        attempt(name, placement)
    import gemopt.executor.apply as module

    real = module.free_bytes
    if rank == world - 1:
        module.free_bytes = lambda device: 10
    attempt("memory", good)
    module.free_bytes = real
    executor.budget_bytes = 10
    attempt("budget", good)
    executor.budget_bytes = 10**9 + rank
    attempt("budgets differ", good)
    executor.budget_bytes = None
    unchanged = executor.checksum() == before
    attempt("good", good)
    try:
        model.state_dict()
        said["state dict"] = "accepted"
    except InputError as error:
        said["state dict"] = str(error)
    return {"said": said, "unchanged": unchanged}


def serve_until_done(job):
    """Forward passes, as far as a migration can tell."""
    while not job.done:
        job.poll()
        time.sleep(0.005)


def states_of(current, steps):
    """Checksums before and after every stage of a plan."""
    states, rows = [checksum(current)], list(steps.current)
    for stage in steps.stages:
        rows[stage.layer] = stage.after
        states.append(checksum(rows))
    return states


def arm(what, layer, council, seen, end):
    """End in the middle of a decision, or of a transfer."""
    if what == "half decided":
        inner, calls = council._call, []

        def call(*args):
            if seen and seen[-1][0] == "decide" and ["decide", layer] in seen:
                calls.append(1)
                if len(calls) == 2:
                    end()
            return inner(*args)

        council._call = call
    if what == "half sent":
        batch_of = dist.batch_isend_irecv

        def half(operations):
            if seen and seen[-1][0] == "transfer" and ["transfer", layer] in seen:
                batch_of(operations[: len(operations) // 2])
                time.sleep(0.2)
                end()
            return batch_of(operations)

        dist.batch_isend_irecv = half


@scenario
def dies(
    rank, world, family, victim, what, layer, kind="equal", how="exit", timeout=40.0, budget=None, late=0.0,
    together=False,
):  # fmt: skip
    """Rank `victim` ends at an event; what the others then say and hold. together: all layers at once, in passing."""

    def end():
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(9)

    def on_event(name, where):
        seen.append([name, where])
        if rank == victim and name == what and where == layer:
            end()

    seen: list = []
    model = load(family, world)
    tokens = batch(rank, "shared")
    with torch.no_grad():
        before = model(tokens).logits
    if rank == victim:
        time.sleep(late)
    executor = Executor(model, timeout_s=timeout, on_event=on_event, budget_bytes=budget)
    placement = random_placement(2, 8, executor.layer_ids, slots_of(kind, 8, world))
    steps = executor.plan(placement)
    states = states_of(executor.rows, steps)
    if rank == victim:
        arm(what, layer, executor._runner.council, seen, end)
    start = time.monotonic()
    error = None
    try:
        if together:
            serve_until_done(executor.start(placement))
        else:
            executor.apply(placement)
    except MigrationError as caught:
        error = {
            "stage": caught.stage,
            "layer": caught.layer,
            "layers": caught.layers,
            "ranks": caught.ranks,
            "text": str(caught),
        }
    elapsed = time.monotonic() - start
    executor.verify()
    del before
    return {
        "state": states.index(checksum(executor.rows)),
        "last": len(states) - 1,
        "stages": [executor.layer_ids[stage.layer] for stage in steps.stages],
        "error": error,
        "elapsed": elapsed,
        "placement": executor.placement.physical_to_logical.tolist(),
    }


@scenario
def resumes(rank, world, family, fault):
    """A stage fails on one rank; the same call again goes on."""
    armed = [True]

    def on_event(name, where):
        seen.append((name, where))
        if fault == "exception" and rank == 1 and (name, where) == ("transfer", 2) and armed:
            armed.clear()
            raise OSError("the cable came loose")

    seen: list = []
    model = load(family, world)
    tokens = batch(rank, "shared")
    executor = Executor(model, timeout_s=12, on_event=on_event)
    placement = random_placement(2, 8, executor.layer_ids, slots_of("ragged", 8, world))
    with torch.no_grad():
        before = model(tokens).logits
    undo = None
    if fault == "wrong weights" and rank == 0:  # somebody wrote to a row that is about to be sent
        dispatch = executor.layers[1]
        name, weight = next(iter(dispatch.weights().items()))
        undo = weight.clone()
        weight += 1
    try:
        executor.apply(placement)
        first = None
    except MigrationError as error:
        first = str(error)
    half_way = executor.placement.physical_to_logical.tolist()
    mixed = executor.checksum()
    if undo is not None:
        executor.layers[1].weights()[name].copy_(undo)
    with torch.no_grad():
        between = relative(model(tokens).logits, before)
    steps = executor.apply(placement)
    executor.verify()
    with torch.no_grad():
        after = relative(model(tokens).logits, before)
    again = executor.apply(placement)
    return {
        "first": first,
        "mixed": mixed,
        "half_way": half_way,
        "left": [stage.layer for stage in steps.stages],
        "between": between,
        "after": after,
        "again": len(again.stages),
        "transfers": sum(name == "transfer" for name, _ in seen),
    }


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
def batch_fails(rank, world, family, fault):
    """One layer of a batch cannot be had, or an interrupt comes while it is committed; then it is tried again."""
    armed = [rank == 1]

    def on_event(name, where):
        if fault == "exception" and (name, where) == ("verify", 2) and armed[0]:
            armed[0] = False
            raise OSError("the cable came loose")

    model = load(family, world)
    tokens = batch(rank, "shared")
    executor = Executor(model, timeout_s=30, on_event=on_event)
    placement = random_placement(2, 8, executor.layer_ids, slots_of("equal", 8, world))
    before, layer = executor.checksum(), executor.layers[1]
    weight = next(iter(layer.weights().values()))
    undo = weight.clone()
    with torch.no_grad():
        reference = model(tokens).logits
    if fault == "wrong weights" and rank == 0:
        weight += 1
    if fault == "interrupt" and rank == 1:
        real = layer.commit

        def pressed(*work):
            if armed[0]:
                armed[0] = False
                raise KeyboardInterrupt("pressed")
            real(*work)

        layer.commit = pressed
    error = ""
    try:
        serve_until_done(executor.start(placement))
    except (MigrationError, KeyboardInterrupt) as caught:
        error = str(caught)
    half_way = executor.checksum()
    if fault == "wrong weights" and rank == 0:
        weight.copy_(undo)
    with torch.no_grad():
        between = relative(model(tokens).logits, reference)
    if fault != "interrupt":
        serve_until_done(executor.start(placement))
    executor.verify()
    with torch.no_grad():
        after = relative(model(tokens).logits, reference)
    there = executor.checksum() == checksum_of_any(layer_rows(placement))
    return {
        "error": error,
        "half_way": half_way,
        "moved": half_way != before,
        "between": between,
        "after": after,
        "there": there,
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
        job = executor.start(random_placement(3, 8, executor.layer_ids, slots_of("equal", 8, world)))
        job.cut()
        while not job.done:
            worst.append(relative(model(tokens).logits, reference))
    executor.verify()
    rows = executor.placement.physical_to_logical
    return {"rows": rows.tolist(), "changed": (rows != before).any(axis=1).tolist(), "worst": max(worst)}


@scenario
def background_dies(rank, world, family, victim):
    """A rank dies while weights travel behind its back; forward passes raise on the others."""
    model = load(family, world)
    tokens = batch(rank, "shared")

    def on_event(name, where):
        if rank == victim and (name, where) == ("transfer", 2):
            os._exit(9)

    executor, job = Executor(model, timeout_s=40, on_event=on_event), None
    with torch.no_grad():
        model(tokens)
        try:
            job = executor.start(random_placement(3, 8, executor.layer_ids, slots_of("equal", 8, world)))
            while not job.done:
                job.poll()
                time.sleep(0.01)
            error = None
        except MigrationError as caught:
            error = str(caught)
    executor.verify()
    started = job is not None  # a late rank may find the others gone while it is still starting
    return {"error": error, "checksum": executor.checksum(), "started": started, "done": not started or job.done}


@scenario
def probes(rank, world, family):
    """A probe that finds another output puts the old placement back."""
    model = load(family, world)
    tokens = batch(rank, "shared")
    executor = Executor(model, timeout_s=60)
    before = executor.checksum()
    first = random_placement(2, 8, executor.layer_ids, slots_of("ragged", 8, world))
    executor.apply(first, probe={"input_ids": tokens})
    good = executor.checksum()
    calls = []

    def drifting():
        calls.append(1)
        return torch.full((3,), float(len(calls)) if rank == 0 else 1.0)

    try:
        executor.apply(random_placement(9, 8, executor.layer_ids, slots_of("equal", 8, world)), probe=drifting)
        error = None
    except MigrationError as caught:
        error = str(caught)
    executor.verify()
    return {"moved": good != before, "back": executor.checksum() == good, "error": error}


class Scripted:
    """A controller that wants these placements one after the other, and remembers what it was shown."""

    def __init__(self, placements, fail_at=None):
        self.script, self.fail_at = list(placements), fail_at
        self.seen, self.confirmed = [], []

    def step(self, counts_NLE, latencies_NG):
        from types import SimpleNamespace

        self.seen.append([counts_NLE.tolist(), bool(np.isfinite(latencies_NG).all() and (latencies_NG > 0).any())])
        if len(self.seen) - 1 == self.fail_at:
            raise RuntimeError("no idea")
        wanted = self.script.pop(0) if self.script else None
        return SimpleNamespace(
            placement=wanted, num_moves=0 if wanted is None else 8, reason=f"window {len(self.seen)}"
        )

    def confirm(self, placement):
        self.confirmed.append(placement)


@scenario
def follow(rank, world, family, where, passes=24, window=3, fail_at=None, wrong=False):
    """Serve under a controller: outputs all along, what it saw, and what is in force in the end."""
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()
    model = load(family, world, where)
    executor = Executor(model, timeout_s=30)
    experts = executor.layers[0].num_experts
    wanted = [random_placement(n, experts, executor.layer_ids, slots_of("equal", experts, world)) for n in range(2)]
    if wrong:
        wanted[0] = random_placement(0, experts, executor.layer_ids, slots_of("equal", experts, 2 * world))
    controller = Scripted(wanted, fail_at) if rank == 0 else None
    follow = executor.follow(controller, window=window)
    errors, asked = [], []
    with torch.no_grad():
        for n in range(passes):
            tokens = batch(rank, where, seed=n)
            reference = whole(tokens).logits
            errors.append(relative(model(tokens).logits, reference))
            if n < window:
                asked.append(counted_by_hand(whole, tokens))
    follow.close()
    executor.verify()
    return {
        "errors": errors,
        "decisions": follow.decisions,
        "checksum": executor.checksum(),
        "meters": [dispatch.meter is None for dispatch in executor.layers],
        "seen": None if controller is None else controller.seen[0],
        "windows": 0 if controller is None else len(controller.seen),
        "confirmed": 0 if controller is None else len(controller.confirmed),
        "asked": asked,
    }


def counted_by_hand(whole, tokens):
    """[L, E] assignments of one batch."""
    logits = whole(tokens, output_router_logits=True).router_logits
    top_k = whole.config.num_experts_per_tok
    return [np.bincount(each.topk(top_k).indices.flatten(), minlength=each.shape[1]).tolist() for each in logits]


# The server.


def rank_main(rank: int, world: int, port: int, request: dict, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    torch.set_num_threads(1)  # makes torch's thread pool anew after the fork, before several threads at once would
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=request.get("group_timeout", GROUP_TIMEOUT_S)))
        result = SCENARIOS[request["scenario"]](rank, world, **request["args"])
        (folder / f"result{rank}").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # as a process that ends by itself would
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked(function, *args) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def run(request: dict) -> dict:
    world = request["ranks"]
    args = request["args"]
    if "family" in args:
        make_checkpoint(args["family"], **(args.get("config") or {}))  # here, so that ranks inherit what it imports
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    port = free_port()
    pids = {forked(rank_main, rank, world, port, request, folder): rank for rank in range(world)}
    codes: dict[int, int | None] = dict.fromkeys(range(world))
    deadline = time.monotonic() + request.get("limit", 300)
    while any(not stopped(pid) for pid in pids) and time.monotonic() < deadline:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    results, logs = [], []
    for rank in range(world):
        path = folder / f"result{rank}"
        results.append(json.loads(path.read_text()) if path.exists() else None)
        logs.append((folder / f"log{rank}").read_text()[-4000:])
    return {"codes": [codes[r] for r in range(world)], "results": results, "logs": logs}


def main() -> None:
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = run(json.loads(line))
        except Exception:
            reply = {"broken": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    shutil.rmtree(SCRATCH)
    os._exit(0)  # nothing is left to do; on a busy machine taking torch apart can last a minute


if __name__ == "__main__":
    main()
