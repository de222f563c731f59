"""Distribution-only predictors: which share of a layer's assignments each expert is going to get.

MoE-GPS estimates it once by maximum likelihood; these follow the traffic. None costs anything per token.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.predict.base import Batch, IntArray, require
from gemopt.traces import Traces

STRENGTHS = (0.25, 1.0, 4.0, 16.0, 64.0)  # of the prior, in windows
BYTES = 8.0  # of a share


class _Shares:
    """What the distribution-only predictors have in common. weight_LE: assignments, of whatever weight."""

    per_token = False
    needs: tuple[str, ...] = ()
    weight_LE: FloatArray

    def __init__(self, name: str) -> None:
        self.name = name

    bytes_per_token = 0.0

    @property
    def bytes_per_batch(self) -> float:
        """One layer's shares."""
        return float(BYTES * self.weight_LE.shape[1])

    def predict(self, context: Batch) -> FloatArray:
        """[E] shares, uniform where nothing is known."""
        return _normalised(self.weight_LE[context.layer])


def _normalised(weight_E: FloatArray) -> FloatArray:
    total = float(weight_E.sum())
    return np.asarray(weight_E / total) if total > 0 else np.full(len(weight_E), 1 / len(weight_E))


class Window(_Shares):
    """Maximum likelihood on the last `steps` steps; `None`: on all of them, as MoE-GPS does."""

    def __init__(self, name: str = "window", *, steps: int | None = 64) -> None:
        super().__init__(name)
        if steps is not None and steps < 1:
            raise InputError("steps", steps, "at least 1")
        self.steps = steps

    def fit(self, history: Traces) -> None:
        """Count the last steps."""
        if self.steps is not None and history.num_steps < self.steps:
            limit = f"the window of the predictor {self.name} is {self.steps} steps"
            raise InputError("history", f"{history.num_steps} steps", limit, "a shorter window or longer traces")
        counts_TLE = np.asarray(history.counts)[-(self.steps or history.num_steps) :]
        self.seen: deque[IntArray] = deque(counts_TLE if self.steps is not None else ())
        self.weight_LE = counts_TLE.sum(axis=0, dtype=np.float64)

    def observe(self, counts_LE: IntArray, task: int = -1) -> None:
        """Add it, and forget the oldest."""
        self.weight_LE = self.weight_LE + counts_LE
        if self.steps is not None:
            self.seen.append(counts_LE)
            self.weight_LE = self.weight_LE - self.seen.popleft()


class Smoothing(_Shares):
    """Exponential smoothing of the shares of each step with a half-life in steps."""

    def __init__(self, *, half_life: float = 32.0) -> None:
        super().__init__("smoothing")
        if not half_life > 0:
            raise InputError("half_life", half_life, "above 0 steps")
        self.keep = 0.5 ** (1 / half_life)

    def fit(self, history: Traces) -> None:
        """Weigh all steps by their age."""
        ages = np.arange(history.num_steps)[::-1]
        self.weight_LE = np.tensordot(self.keep**ages, np.asarray(history.counts, np.float64), axes=1)

    def observe(self, counts_LE: IntArray, task: int = -1) -> None:
        """Forget a little, and add it."""
        self.weight_LE = self.keep * self.weight_LE + counts_LE


class Dirichlet(_Shares):
    """Shrinkage of a window towards the long run: posterior mean under a Dirichlet prior.

    The prior is the history, worth `strength` windows; of some strengths each layer takes the one under which the
    windows of the history were most likely, each given those before it.
    """

    def __init__(self, name: str = "dirichlet", *, steps: int = 32) -> None:
        super().__init__(name)
        self.recent = Window(name, steps=steps)

    def fit(self, history: Traces) -> None:
        """Long run, window, and how much to trust which."""
        self.recent.fit(history)
        counts_TLE = np.asarray(history.counts, dtype=np.float64)
        self.long_LE = counts_TLE.sum(axis=0)
        length = self.recent.steps or 1
        cuts = np.arange(history.num_steps % length, history.num_steps, length)
        windows_WLE = np.add.reduceat(counts_TLE, cuts, axis=0)
        self.strength_L = self._strengths(windows_WLE)
        self.window_L = windows_WLE.sum(axis=2).mean(axis=0)
        self._mix()

    def _strengths(self, windows_WLE: FloatArray) -> FloatArray:
        """[L] the most likely one; the strongest where there are no two windows after the first."""
        if len(windows_WLE) < 3:
            return np.full(windows_WLE.shape[1], STRENGTHS[-1])
        past_WLE = np.cumsum(windows_WLE, axis=0)[:-2] + 1e-3
        past_WLE /= past_WLE.sum(axis=2, keepdims=True)
        now_WLE, next_WLE = windows_WLE[1:-1], windows_WLE[2:]
        size_L = windows_WLE.sum(axis=2).mean(axis=0)[None, :, None]
        likely_SL = []
        for strength in STRENGTHS:
            mixed = strength * size_L * past_WLE + now_WLE + 1e-9
            likely_SL.append((next_WLE * np.log(mixed / mixed.sum(axis=2, keepdims=True))).sum(axis=(0, 2)))
        return np.asarray(np.array(STRENGTHS)[np.argmax(likely_SL, axis=0)])

    def observe(self, counts_LE: IntArray, task: int = -1) -> None:
        """Both remember it."""
        self.recent.observe(counts_LE)
        self.long_LE = self.long_LE + counts_LE
        self._mix()

    def _mix(self) -> None:
        prior_LE = self.long_LE / np.maximum(self.long_LE.sum(axis=1, keepdims=True), 1e-300)
        self.weight_LE = (self.strength_L * self.window_L)[:, None] * prior_LE + self.recent.weight_LE


class PerTask:
    """Exponential smoothing for each task; steps of no or of an unknown task have that of all steps."""

    per_token = False
    needs: tuple[str, ...] = ("task",)

    name = "task"
    bytes_per_token = 0.0

    @property
    def bytes_per_batch(self) -> float:
        """One layer's shares."""
        return self.all.bytes_per_batch

    def fit(self, history: Traces) -> None:
        """Fit one to the steps of each task."""
        require(history, self.needs, self.name)
        assert history.task is not None
        self.all = Smoothing(half_life=64)
        self.all.fit(history)
        self.of_task: dict[int, Smoothing] = {}
        for task in np.unique(history.task[history.task >= 0]).tolist():
            self.of_task[task] = Smoothing(half_life=64)
            self.of_task[task].fit(history.steps(history.task == task))

    def observe(self, counts_LE: IntArray, task: int = -1) -> None:
        """The predictor of its task learns it, and that of all steps."""
        self.all.observe(counts_LE)
        if task in self.of_task:
            self.of_task[task].observe(counts_LE)

    def predict(self, context: Batch) -> FloatArray:
        """[E] shares as in earlier steps of the task."""
        return self.of_task.get(context.task, self.all).predict(context)
