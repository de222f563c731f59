"""Scenarios: outputs and counts under a placement, and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from ranks_common import SCRATCH, batch, checkpoint, load, random_placement, relative, scenario, slots_of
from transformers import AutoModelForCausalLM

from gemopt import InputError, Profile
from gemopt.costs import CostModel
from gemopt.executor import Executor
from gemopt.latency import ASSIGNMENTS, Curve, Latency
from gemopt.models import find_moe_layers
from gemopt.online import Controller


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


def sloped(world: int) -> CostModel:
    """Ranks of different speeds."""
    latencies = [Latency(((Curve(np.zeros(1), np.array([10.0]), 1.0 + 0.3 * rank),),)) for rank in range(world)]
    return CostModel("staircase", (ASSIGNMENTS,), tuple(latencies), np.full((world, 1, 2), np.nan))


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
        "split": good.changed(split="optimal"),
        "model": good.changed(model="somebody/Another-Model"),
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
    experts = {name: weight for name, weight in model.named_parameters() if ".experts." in name}
    rest = {name: weight for name, weight in model.named_parameters() if ".experts." not in name}
    saving = {
        "state dict": model.state_dict,
        "experts loaded": lambda: model.load_state_dict(experts, strict=False),
        "others loaded": lambda: model.load_state_dict(rest, strict=False),
    }
    for name, call in saving.items():
        try:
            call()
            said[name] = "accepted"
        except InputError as error:
            said[name] = str(error)
    with torch.no_grad():
        executor.layers[1].weights()["down_proj"].mul_(2)
    attempt("weights changed", random_placement(2, 8, ids, slots))
    model.to(torch.bfloat16)
    attempt("weights cast", random_placement(2, 8, ids, slots))
    return {"said": said, "unchanged": unchanged, "layers": list(executor.layer_ids)}


@scenario
def again(rank, world, family):
    """Executors and followers made, closed and made again: placements in force, outputs, files that stay open."""
    model, tokens = load(family, world), batch(0, "shared")
    profile = Profile(
        devices=[
            {"rank": g, "samples": [{"assignments": n, "latency_us": 30 + n} for n in (0, 64)]} for g in range(world)
        ]
    )
    errors, files, reference = [], [], model(tokens).logits
    for turn in range(4):
        with Executor(model) as executor:
            slots = [8 // world + turn % 2, *[8 // world] * (world - 2), 8 // world - turn % 2]
            executor.apply(random_placement(turn, 8, executor.layer_ids, slots))
            executor.verify()
            for _ in range(2):
                executor.follow(Controller(profile, executor.placement) if rank == 0 else None, window=2).close()
        errors.append(relative(model(tokens).logits, reference))
        files.append(len(list(Path("/proc/self/fd").iterdir())))
    try:
        executor.apply(random_placement(9, 8, executor.layer_ids, [8 // world] * world))
        said = "accepted"
    except InputError as error:
        said = str(error)
    return {"errors": errors, "files": files, "said": said}
