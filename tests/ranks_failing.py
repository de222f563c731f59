"""Scenarios: ranks die, transfers fail, weights arrive wrong, outputs change."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from ranks_common import batch, load, random_placement, relative, scenario, serve_until_done, slots_of

from gemopt.executor import Executor, MigrationError
from gemopt.executor.plan import checksum as checksum_of_any
from gemopt.executor.plan import layer_rows
from gemopt.executor.plan import slot_checksum as checksum


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
        if fault == "wrong weights" and rank == 0 and (name, where) == ("transfer", 2) and armed:
            armed.clear()  # somebody writes to rows that are about to be sent
            weight.add_(1)

    seen: list = []
    model = load(family, world)
    tokens = batch(rank, "shared")
    executor = Executor(model, timeout_s=12, on_event=on_event)
    placement = random_placement(2, 8, executor.layer_ids, slots_of("ragged", 8, world))
    with torch.no_grad():
        before = model(tokens).logits
    undo = None
    if fault == "wrong weights" and rank == 0:
        weight = next(iter(executor.layers[1].weights().values()))
        undo = weight.clone()
    try:
        executor.apply(placement)
        first = None
    except MigrationError as error:
        first = str(error)
    half_way = executor.placement.physical_to_logical.tolist()
    mixed = executor.checksum()
    if undo is not None:
        weight.copy_(undo)
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
def batch_fails(rank, world, family, fault):
    """One layer of a batch cannot be had, or an interrupt comes while it is committed; then it is tried again."""
    armed, written = [rank == 1], []

    def on_event(name, where):
        if fault == "exception" and (name, where) == ("verify", 2) and armed[0]:
            armed[0] = False
            raise OSError("the cable came loose")
        if fault == "wrong weights" and rank == 0 and (name, where) == ("transfer", 2) and not written:
            written.append(weight.add_(1))

    model = load(family, world)
    tokens = batch(rank, "shared")
    # What an interrupt leaves is noticed by waiting only.
    executor = Executor(model, timeout_s=15 if fault == "interrupt" else 30, on_event=on_event)
    placement = random_placement(2, 8, executor.layer_ids, slots_of("equal", 8, world))
    before, layer = executor.checksum(), executor.layers[1]
    weight = next(iter(layer.weights().values()))
    undo = weight.clone()
    with torch.no_grad():
        reference = model(tokens).logits
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
def background_dies(rank, world, family, victim, late=None):
    """A rank dies while weights travel behind its back; forward passes raise on the others.

    Rank `late` reads what the victim said at the check only when that is dead; the others meet `late` alone.
    """
    model = load(family, world)
    tokens = batch(rank, "shared")

    def on_event(name, where):
        if rank == victim and (name, where) == ("transfer", 2):
            while late is not None and not (council._turn == 2 and council._own.add(council._key("read"), 0) == 2):
                time.sleep(0.01)  # until the two others know that it is not ready
            os._exit(9)
        if rank == late and name == "check":
            council._read = read_the_dead

    executor, job = Executor(model, timeout_s=40, on_event=on_event), None
    council = executor._runner.council
    read = council._read

    def read_the_dead(of, store, key, deadline):
        while of == victim:
            try:
                store.num_keys()
            except dist.DistError:
                break
            time.sleep(0.01)
        return read(of, store, key, deadline)

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
