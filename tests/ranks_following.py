"""Scenarios: a controller is in charge."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from ranks_common import batch, checkpoint, load, random_placement, relative, scenario, slots_of
from transformers import AutoModelForCausalLM

from gemopt.costs import CostModel
from gemopt.exceptions import InputError
from gemopt.executor import Executor
from gemopt.latency import ASSIGNMENTS, Latency, line
from gemopt.online import Controller
from gemopt.placement import Placement


class Scripted:
    """A controller that wants these placements one after the other, and remembers what it was shown."""

    def __init__(self, placements, fail_at=None):
        self.script, self.fail_at = list(placements), fail_at
        self.seen, self.confirmed = [], []

    def warm(self):
        """Nothing is compiled here."""

    def weigh(self, expert_bytes):
        self.expert_bytes = expert_bytes

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


def fails_after_its_experts(model, tokens):
    hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(tokens)
    except ZeroDivisionError:
        hook.remove()


@scenario
def follow(rank, world, family, where, passes=24, window=3, fail_at=None, wrong=False, moves=2, broken=None):
    """Serve under a controller: outputs all along, what it saw, and what is in force in the end."""
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()
    model = load(family, world, where)
    executor = Executor(model, timeout_s=30)
    experts = executor.layers[0].num_experts
    wanted = [random_placement(n, experts, executor.layer_ids, slots_of("equal", experts, world)) for n in range(moves)]
    if wrong:
        wanted[0] = random_placement(0, experts, executor.layer_ids, slots_of("equal", experts, 2 * world))
    controller = Scripted(wanted, fail_at) if rank == 0 else None
    groups = dist.get_pg_count()
    follow = executor.follow(controller, window=window)
    assert controller is None or controller.expert_bytes == executor.layers[0].expert_bytes
    errors, asked = [], []
    with torch.no_grad():
        for n in range(passes):
            tokens = batch(rank, where, seed=n)
            reference = whole(tokens).logits
            if n == broken:
                fails_after_its_experts(model, tokens)
            errors.append(relative(model(tokens).logits, reference))
            if n < window:
                asked.append(counted_by_hand(whole, tokens))
    follow.close()
    follow.close()  # once more changes nothing
    executor.verify()
    return {
        "groups left": dist.get_pg_count() - groups,
        "errors": errors,
        "decisions": follow.decisions,
        "checksum": executor.checksum(),
        "meters": [dispatch.meter is None for dispatch in executor.layers],
        "seen": None if controller is None else controller.seen[0],
        "heard in full": None if controller is None else [full for _, full in controller.seen],
        "windows": 0 if controller is None else len(controller.seen),
        "confirmed": 0 if controller is None else len(controller.confirmed),
        "asked": asked,
    }


@scenario
def follow_refused(rank, world, family):
    """What every rank is told where one cannot go on."""
    executor = Executor(load(family, world, "shared"), timeout_s=30)
    rows = executor.placement.physical_to_logical
    latencies = (Latency(((line(1.0, 1.0),),)),) * world
    costs = CostModel("alike", (ASSIGNMENTS,), latencies, np.full((world, 1, 2), np.nan))
    layers = Placement.contiguous(len(rows) + 1, executor.layers[0].num_experts, world)
    told = []
    asked = [(None, 4), (Controller(costs, layers), 4), (Scripted([]), 4 + rank), (Scripted([]), 0), (Scripted([]), 4)]
    for controller, window in asked:
        if len(told) == 4:
            executor.model.compile(backend="eager")  # nothing is compiled before a forward pass
        try:
            executor.follow(controller if rank == 0 else None, window=window)
            told.append("")
        except InputError as error:
            told.append(str(error))
    for whole in (lambda: executor.apply(executor.placement), lambda: Executor(executor.model)):
        try:
            whole()
            told.append("")
        except InputError as error:
            told.append(str(error))
    return told


def counted_by_hand(whole, tokens):
    """[L, E] assignments of one batch."""
    logits = whole(tokens, output_router_logits=True).router_logits
    top_k = whole.config.num_experts_per_tok
    return [np.bincount(each.topk(top_k).indices.flatten(), minlength=each.shape[1]).tolist() for each in logits]
