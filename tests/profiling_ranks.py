"""What the ranks of `test_profiling_distributed.py` run under torchrun: gemopt under a CPU quota.

    torchrun ... profiling_ranks.py SHARES|- STARTED|- [gemopt arguments]

Libraries are imported before the quota holds, which only saves time. `-` for the shares leaves the ranks alone; a file
is written beside STARTED by each rank as soon as it measures.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import gemopt.profiling.workload  # noqa: F401
from gemopt.cli import main
from gemopt.profiling import profiler
from gemopt.profiling.throttle import cpu_quota

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    with ExitStack() as stack:
        if sys.argv[1] != "-":
            share = float(sys.argv[1].split(",")[rank])
            # 4 ms at a time: after shorter turns the caches are cold more often for small shares than for large ones.
            stack.enter_context(cpu_quota(share, period_us=round(4000 / share)))
        if sys.argv[2] != "-":
            settle = profiler.settle

            def tell(*arguments: Any, **options: Any) -> float:
                Path(f"{sys.argv[2]}{rank}").touch()
                return settle(*arguments, **options)

            profiler.settle = tell
        main(sys.argv[3:])
