"""Memory for what a rank receives: how much is left, and rows of it that are quick to touch first."""

from __future__ import annotations

import contextlib
import math
import mmap
from pathlib import Path

from gemopt.exceptions import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

HUGE_PAGE = 1 << 21


def zeros(rows: int, like: Tensor) -> Tensor:
    """[rows, ...] zeros for rows like those of a tensor.

    On CPU from huge pages where the system has them, touched here: the first touch of small ones takes as long as a
    transfer, and a socket that has to wait for it drops what arrives meanwhile.
    """
    shape = (rows, *like.shape[1:])
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8)[::HUGE_PAGE].zero_()
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [left for left in (_available(), _left_in_cgroup()) if left is not None]
    return min(limits, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_cgroup() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
