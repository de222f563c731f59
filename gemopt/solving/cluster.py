"""Layers solved in other processes or on other machines: where `joblib.parallel_config` names a backend that has some.

    with joblib.parallel_config("dask"):  # after dask.distributed.Client(...); "ray" and "loky" alike
        result = gemopt.solve(profile, traces)

A task is one layer, pickled whole, and the seconds it may take: clocks of machines differ. Its problem, which is most
of it, does not come back.
"""

from __future__ import annotations

import io
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gemopt.problem import Problem
from gemopt.solvers.base import Solver
from gemopt.solving.first_use import ready

WAIT_S = 0.2
ENDED = object()


class Cluster:
    """The workers of the joblib backend in force, `count` of them."""

    def __init__(self, backend: Any, count: int) -> None:
        self.backend, self.count = backend, count

    @classmethod
    def in_force(cls) -> Cluster | None:
        """That of `joblib.parallel_config`; None without one, and where its workers are threads of this process."""
        if "joblib" not in sys.modules:  # nobody can have configured it
            return None
        from joblib.parallel import get_active_backend

        backend, jobs = get_active_backend(prefer="threads")
        if getattr(backend, "supports_sharedmem", False):
            return None
        return cls(backend, backend.effective_n_jobs(-1 if jobs is None else jobs))

    def ready(self, solver: Solver, problem: Problem, interrupted: threading.Event) -> float:
        """Load or compile the kernels of the workers, as `first_use.ready` does here; returns the seconds it took."""
        begin, few = time.monotonic(), problem.select(np.arange(min(2, problem.num_steps)))
        for _ in self.each(ready, [(solver, few)] * self.count, interrupted):
            pass
        return time.monotonic() - begin

    def each(
        self, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], interrupted: threading.Event
    ) -> Iterator[Any]:
        """Results of `work(*task)` as they come; a task is asked for when there is a worker for it.

        On an interrupt it ends with what is there. What still runs is left alone: it ends with its own time.
        """
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(
            target=self._drive, args=(work, tasks, results, interrupted), name="gemopt-cluster", daemon=True
        ).start()
        while True:
            try:
                found = results.get(timeout=WAIT_S)
            except queue.Empty:
                if interrupted.is_set():
                    return
                continue
            if found is ENDED:
                return
            if isinstance(found, BaseException):
                raise found
            yield found

    def _drive(
        self,
        work: Callable[..., Any],
        tasks: Iterable[tuple[Any, ...]],
        results: queue.SimpleQueue[Any],
        interrupted: threading.Event,
    ) -> None:
        from joblib import Parallel, delayed

        one_by_one = "generator_unordered" if self.backend.supports_return_generator else "list"
        calls = (delayed(work)(*task) for task in tasks if not interrupted.is_set())
        try:
            run = Parallel(self.count, backend=self.backend, return_as=one_by_one, pre_dispatch="n_jobs", batch_size=1)
            for result in run(calls):
                results.put(result)
            results.put(ENDED)
        except BaseException as error:  # of a task, or of the cluster: raised where it is waited for
            results.put(error)


class _Pickler(pickle.Pickler):
    """Pickles what is known of a problem without the problem."""

    problem: Problem

    def persistent_id(self, thing: Any) -> str | None:
        return "problem" if thing is self.problem else None


class _Unpickler(pickle.Unpickler):
    problem: Problem

    def persistent_load(self, name: str) -> Problem:
        return self.problem


def packed(thing: Any, problem: Problem) -> bytes:
    """A pickle of something that refers to a problem, without it."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=5)
    pickler.problem = problem
    pickler.dump(thing)
    return buffer.getvalue()


def unpacked(data: bytes, problem: Problem) -> Any:
    """What was `packed`, referring to this problem."""
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.problem = problem
    return unpickler.load()
