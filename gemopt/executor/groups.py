"""Process groups of an executor, which are used again and never destroyed.

torch names a group by its ranks and by how many groups there are. One that is made after another was destroyed has its
name, finds the addresses of that one in the store, and hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from gemopt.exceptions import missing

try:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

_free: dict[tuple[tuple[int, ...], str | None], list[Any]] = {}


def borrow(ranks: Sequence[int], timeout: timedelta, backend: str | None = None) -> Any:
    """A group that nobody else uses. Collective among its ranks, which borrow and give back in the same order."""
    free = _free.get((tuple(ranks), backend), [])
    while free:
        group = free.pop()
        if group in _world.pg_map:  # else all groups were destroyed since
            _set_pg_timeout(timeout, group)
            return group
    return dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)


def give_back(group: Any, ranks: Sequence[int], backend: str | None = None) -> None:
    """Of a group with which nothing is wrong, and nothing under way."""
    _free.setdefault((tuple(ranks), backend), []).append(group)
