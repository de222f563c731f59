"""Let a controller follow the traffic of a live model: measure, decide on one rank, move in the background.

All ranks count their assignments and time their experts. Every `window` forward passes they gather both; rank 0 decides
in a thread of its own, while the model serves, and the others learn of it between two later forward passes, all between
the same ones. What has been decided is applied by `Executor.start`; what an earlier decision wanted and has not begun
to travel is forgotten then.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemopt.exceptions import GemoptError, InputError, missing

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch.distributed.constants import default_pg_timeout
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor import groups
from gemopt.executor.checks import check_unwrapped
from gemopt.executor.expert_parallel import SlotDispatch
from gemopt.placement import Placement

if TYPE_CHECKING:
    from gemopt.executor.apply import Executor
    from gemopt.online import Controller

NOTHING, PENDING, KEPT, MOVE = range(4)
ASK_EVERY = 4  # forward passes between two looks at whether rank 0 has decided
EMPTY = b"{}"
UNSEEN_STEPS = 1024  # that are kept for a controller which is busy; older ones are lost to it


class Gauge:
    """Counts and times of the forward passes of one window on this rank.

    counts_WLE: [W, L, E] assignments that this rank's batch made. Between experts that compute, what numpy does to one
    number takes ten times as long as what a list does.
    """

    def __init__(self, layers: list[SlotDispatch], window: int) -> None:
        self._index = {id(dispatch): layer for layer, dispatch in enumerate(layers)}
        self._cuda = layers[0].device.type == "cuda"
        shape = (window, len(layers), layers[0].num_experts)
        self.counts_WLE = torch.zeros(shape, dtype=torch.int64, device=layers[0].device)
        self._rows = [list(counts_LE) for counts_LE in self.counts_WLE]  # views: indexing takes as long as counting
        self._one = torch.ones(1, dtype=torch.int64, device=layers[0].device)
        self._times: list[list[float | None]] = [[None] * len(layers) for _ in range(window)]
        self._events: list[tuple[int, int, Any, Any]] = []
        self.passes = 0

    def begin(self, dispatch: SlotDispatch, top_k_index: Tensor) -> Any:
        """See `Meter`."""
        layer = self._index[id(dispatch)]
        chosen = top_k_index.reshape(-1)
        self._rows[self.passes][layer].scatter_add_(0, chosen, self._one.expand(chosen.shape))
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def end(self, dispatch: SlotDispatch, clock: Any) -> None:
        """See `Meter`."""
        layer = self._index[id(dispatch)]
        if not self._cuda:
            self._add(self.passes, layer, 1e6 * (time.perf_counter() - clock))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((self.passes, layer, clock, event))

    def forget(self) -> None:
        """Drop what a pass that did not end has left."""
        self.counts_WLE[self.passes].zero_()
        self._times[self.passes] = [None] * len(self._times[self.passes])
        self._events = [event for event in self._events if event[0] != self.passes]

    def _add(self, step: int, layer: int, microseconds: float) -> None:
        self._times[step][layer] = (self._times[step][layer] or 0.0) + microseconds

    def read(self) -> tuple[Tensor, Tensor]:
        """Counts [W, L, E] on the CPU and times [W] in microseconds; starts the next window."""
        for step, layer, begin, end in self._events:
            end.synchronize()
            self._add(step, layer, 1e3 * begin.elapsed_time(end))
        counts, times_WL = self.counts_WLE.to("cpu", copy=True), np.array(self._times, dtype=np.float64)
        self.counts_WLE.zero_()
        self._times = [[None] * times_WL.shape[1] for _ in self._times]
        self._events.clear()
        self.passes = 0
        return counts, torch.from_numpy(times_WL.sum(axis=1))


class Follow:
    """A controller in charge of a live model, until `close`. Made and closed by every rank alike.

    Attributes
    ----------
    decisions
        One line for each decision, on every rank: the reasons.
    """

    def __init__(
        self, executor: Executor, controller: Controller | None, window: int, log: Callable[[str], None] | None
    ) -> None:
        self.executor = executor
        self.controller = controller
        self.window = window
        executor.agree("controller", self._ready)
        if executor.rank == 0 and controller is not None:
            controller.warm()  # compiling takes a minute of the core that serves
        self.decisions: list[str] = []
        self._log = log
        self._gauge = Gauge(executor.layers, window)
        self._ranks = dist.get_process_group_ranks(executor.layers[0].ep_mesh.get_group())
        self._root = self._ranks[0]
        self._group: Any = groups.borrow(self._ranks, default_pg_timeout, "gloo")
        self._thread: threading.Thread | None = None
        self._word: tuple[int, bytes] = (NOTHING, EMPTY)
        self._waiting = 0
        self._begun = False  # a forward pass, which may fail
        self._moving: list[bool] = []  # passes of this window with something else in force than is wanted
        self._deciding: list[bool] = []  # and those during which that may have been decided
        self._unseen: deque[tuple[Any, Any]] = deque(maxlen=max(1, UNSEEN_STEPS // window))
        self._background: Any = None
        self._wanted: Placement | None = None  # as soon as the batch that is on its way has been committed
        for dispatch in executor.layers:
            dispatch.meter = self._gauge
        self._hooks = [
            executor.model.register_forward_pre_hook(lambda *_: self._before(), prepend=True),
            executor.model.register_forward_hook(lambda *_: self._after()),
        ]

    def _ready(self) -> dict[str, str]:
        """Refuse what cannot be followed; a controller goes on from what is in force."""
        check_unwrapped(self.executor.model)
        if self.window < 1:
            raise InputError("window", self.window, "forward passes, at least 1")
        if self.controller is not None:
            self.controller.confirm(self.executor.placement)
            self.controller.weigh(max(layer.expert_bytes for layer in self.executor.layers))
        elif self.executor.rank == 0:
            raise InputError("controller", None, "rank 0 decides, and needs one")
        return {"window": str(self.window)}

    def _after(self) -> None:
        self._begun = False
        self._moving.append(self._travels)
        self._deciding.append(self._waiting > 0)
        self._gauge.passes += 1
        if self._gauge.passes == self.window:
            self._gather()

    def _gather(self) -> None:
        counts, times = self._gauge.read()
        layer = self.executor.layers[0]
        share = layer.tp_mesh.size()  # ranks that share a batch count it alike
        if layer.rank % share:
            counts.zero_()
        dist.all_reduce(counts, group=self._group)
        times_G = times.new_empty(layer.num_ranks, len(times))
        dist.all_gather(list(times_G), times, group=self._group)
        deciding = self.controller is not None and self.executor.rank == 0
        if deciding:
            times_WG = times_G.numpy().T.copy()
            times_WG[np.logical_or(self._moving, self._deciding)] = np.nan  # says nothing about how fast a rank is
            self._unseen.append((counts.numpy(), times_WG))
        self._moving, self._deciding = [], []
        if self._waiting or self._wanted is not None:
            return  # one decision at a time; the next sees these steps, too
        self._waiting = ASK_EVERY
        if deciding:
            self._word = (PENDING, EMPTY)
            work = [np.concatenate(each) for each in zip(*self._unseen, strict=True)]
            self._unseen.clear()
            self._thread = threading.Thread(target=self._decide, args=work, daemon=True)
            self._thread.start()

    def _decide(self, counts_NLE: Any, latencies_NG: Any) -> None:
        controller = self.controller
        assert controller is not None
        try:
            decision = controller.step(counts_NLE, latencies_NG)
        except Exception as error:  # whatever it is, the model goes on serving
            self._word = (KEPT, json.dumps({"reason": f"{type(error).__name__}: {error}"}).encode())
            return
        said: dict[str, Any] = {"reason": decision.reason}
        if decision.num_moves:
            said["placement"] = decision.placement.model_dump_json()
        self._word = (MOVE if decision.num_moves else KEPT, json.dumps(said).encode())

    def _before(self) -> None:
        if self._begun:
            self._gauge.forget()
        self._begun = True
        if self._wanted is not None and self._background.done:
            wanted, self._wanted = self._wanted, None
            self._move(wanted)
        if not self._waiting:
            return
        self._waiting -= 1
        if self._waiting:
            return
        state, text = self._hear()
        if state == PENDING:
            self._waiting = ASK_EVERY
            return
        said = json.loads(text)
        self._say(said["reason"])
        if state == MOVE:
            self._move(Placement.model_validate_json(said["placement"]))
        else:
            self._deciding = [False] * len(self._deciding)  # what was in force is what is wanted

    def _hear(self) -> tuple[int, bytes]:
        """What rank 0 has decided so far; every rank asks before the same forward pass."""
        word = self._word
        header = torch.tensor([word[0], len(word[1])])
        dist.broadcast(header, self._root, group=self._group)
        state, size = (int(value) for value in header)
        if state == PENDING:
            return state, EMPTY
        body = torch.zeros(size, dtype=torch.uint8)
        if self.executor.rank == 0:
            body = torch.frombuffer(bytearray(word[1]), dtype=torch.uint8)
        dist.broadcast(body, self._root, group=self._group)
        return state, bytes(body.numpy())

    def _move(self, placement: Placement) -> None:
        if self._background is not None and not self._background.done:
            self._background.cut()
            self._wanted = placement
            return
        old = self.executor.placement
        try:
            self._background = self.executor.start(placement)
        except GemoptError as error:  # refused on every rank alike: what is in force stays
            self._say(f"not applied: {error}")
            if self.controller is not None:
                self.controller.confirm(old)

    def _say(self, text: str) -> None:
        self.decisions.append(text)
        if self._log is not None:
            self._log(text)

    @property
    def _travels(self) -> bool:
        return self._wanted is not None or (self._background is not None and not self._background.done)

    @property
    def at_rest(self) -> bool:
        """Whether nothing travels and nothing is being decided: the same on every rank between two forward passes."""
        return not self._travels and not self._waiting

    def rest(self) -> None:
        """Wait until nothing travels and rank 0 has decided, between two forward passes; collective."""
        if self._background is not None:
            self._background.wait()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Finish what is moving and take the hooks away; collective."""
        for hook in self._hooks:
            hook.remove()
        for dispatch in self.executor.layers:
            dispatch.meter = None
        self.rest()
        if self.controller is not None and (self._waiting or self._wanted is not None):
            self.controller.confirm(self.executor.placement)  # what it last wanted never came into force
        if self._group is not None:
            group, self._group = self._group, None
            with contextlib.suppress(RuntimeError):  # a rank that is gone is not waited for
                dist.barrier(group=group)
                groups.give_back(group, self._ranks, "gloo")
