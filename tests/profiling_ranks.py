"""What the ranks of `test_profiling_distributed.py` run under torchrun: gemopt under a CPU quota.

    torchrun ... profiling_ranks.py SHARES|- [gemopt arguments]

Libraries are imported before the quota holds, which only saves time. `-` leaves the rank alone.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

import torch

import gemopt.profiling.profiler
import gemopt.profiling.workload  # noqa: F401
from gemopt.cli import main
from gemopt.profiling.throttle import cpu_quota

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    with ExitStack() as stack:
        if sys.argv[1] != "-":
            share = float(sys.argv[1].split(",")[rank])
            cores = sorted(os.sched_getaffinity(0))
            stack.enter_context(cpu_quota(share, cpus=[cores[rank % len(cores)]]))
        main(sys.argv[2:])
