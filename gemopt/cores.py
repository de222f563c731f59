"""How many cores a call may use: numerical libraries start a thread per core of the machine unless they are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gemopt.exceptions import check_number

MOST = 1 << 16


def check(threads: object) -> None:
    """Refuse what is no number of threads."""
    limit = f"a whole number of at least 1, at most {MOST}"
    check_number("threads", threads, limit, least=1, most=MOST, whole=True)


def available() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Within, BLAS and OpenMP libraries use at most so many threads; the limit is of the process, not of the caller."""
    import numpy as np  # noqa: F401 (its BLAS must be loaded to be limited)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=int(threads)):  # which refuses NumPy's numbers
        yield


def in_this_thread(threads: int) -> None:
    """The same for OpenMP in a thread made within `at_most`: OpenMP keeps its limit thread by thread."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=threads, user_api="openmp")
