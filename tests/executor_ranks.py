"""Ranks for tests of the executor, profiling and tracing: a process that forks gloo groups, each for one scenario.

Started by `ranks_world.py`: one JSON request per line on standard input, one reply per line
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

import ranks_failing  # noqa: F401  these register their scenarios
import ranks_following  # noqa: F401
import ranks_moving  # noqa: F401
import ranks_profiling  # noqa: F401
import ranks_serving  # noqa: F401
import torch
import torch.distributed as dist
from ranks_common import GROUP_TIMEOUT_S, SCENARIOS, SCRATCH, make_checkpoint


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
