"""Ranks for the executor's tests: a process that forks real gloo groups and runs one scenario in each.

Started by `executor_world` in conftest-free fashion: one JSON request per line on standard input, one reply per line
on standard output. Forking after the imports makes a group of four cost a second instead of twenty.
"""

from __future__ import annotations

import json
import os
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

from gemopt import GemoptError, InputError, Placement
from gemopt.executor import Executor, MigrationError
from gemopt.executor.expert_parallel import dispatches
from gemopt.models import tiny

SCRATCH = Path(tempfile.mkdtemp(prefix="gemopt-ranks-"))
SCENARIOS = {}


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
        tiny(family, **{"num_layers": 3, "num_experts": 8, **config}).save_pretrained(folder)


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
            contents[rank] += others[: int(round(fill * (size - len(contents[rank]))))]
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
def serve(rank, world, family, where="shared", kinds=(), splits=("even",), config=None):
    """Relative error of the logits under each placement, and what the executor says of itself."""
    config = config or {}
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family, **config)).eval()
    model = load(family, world, where, **config)
    tokens = batch(rank, where)
    ragged = batch(rank, where, rows=1, length=1 if where == "shared" else 1 + rank)
    with torch.no_grad():
        reference, small = whole(tokens).logits, whole(ragged).logits
        errors = {"untouched": relative(model(tokens).logits, reference)}
        executor = Executor(model, timeout_s=30)
        experts = executor.layers[0].num_experts
        for number, kind in enumerate(kinds):
            for split in splits:
                placement = random_placement(number, experts, executor.layer_ids, slots_of(kind, experts, world), split=split)
                executor.apply(placement)
                executor.verify()
                name = f"{kind}-{split}"
                errors[name] = relative(model(tokens).logits, reference)
                errors[name + "-ragged"] = relative(model(ragged).logits, small)
        errors["again"] = relative(model(tokens).logits, reference)
    with_gradients = relative(model(tokens).logits.detach(), reference)
    errors["with gradients"] = with_gradients
    same = model.generate(tokens, max_new_tokens=5, do_sample=False).tolist() == whole.generate(
        tokens, max_new_tokens=5, do_sample=False
    ).tolist()
    return {"errors": errors, "checksum": executor.checksum(), "generates": same}


# The server.


def rank_main(rank: int, world: int, port: int, request: dict, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=request.get("group_timeout", 60)))
        result = SCENARIOS[request["scenario"]](rank, world, **request["args"])
        (folder / f"result{rank}").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        code = 1
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


def run(request: dict) -> dict:
    world = request["ranks"]
    args = request["args"]
    if "family" in args:
        pid = forked(lambda: make_checkpoint(args["family"], **(args.get("config") or {})))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    port = free_port()
    pids = {forked(rank_main, rank, world, port, request, folder): rank for rank in range(world)}
    codes: dict[int, int | None] = dict.fromkeys(range(world))
    deadline = time.monotonic() + request.get("limit", 120)
    while pids and time.monotonic() < deadline:
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


if __name__ == "__main__":
    main()
