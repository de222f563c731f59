"""Scenarios of the executor on groups of processes, as tests ask for them; `executor_ranks.py` runs them."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

EXACT = 5e-6  # relative, float32


@contextmanager
def serving():
    """Within, a call runs a scenario on so many ranks and returns what each saw."""
    path = Path(__file__).with_name("executor_ranks.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(path.parent)}  # where its scenarios lie, PYTHONSAFEPATH or not
    server = subprocess.Popen([sys.executable, str(path)], env=environment, **pipes)

    def run(scenario, ranks, *, limit=300, **args):
        server.stdin.write(json.dumps({"scenario": scenario, "ranks": ranks, "args": args, "limit": limit}) + "\n")
        server.stdin.flush()
        reply = json.loads(server.stdout.readline())
        assert "broken" not in reply, reply
        return reply

    yield run
    server.stdin.close()
    assert server.wait(timeout=300) == 0


def results(reply, *, dead=()):
    """What the ranks returned, all but `dead`; fails with the log of a rank that broke."""
    for rank, code in enumerate(reply["codes"]):
        assert rank in dead or code == 0, f"rank {rank} ended with {code}:\n{reply['logs'][rank]}"
    return [result for rank, result in enumerate(reply["results"]) if rank not in dead]
