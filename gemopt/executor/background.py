"""A migration that overlaps with serving: batches of layers travel in a thread and are committed between passes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from gemopt.exceptions import missing

try:
    import torch
    from torch import nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor.plan import Stage
from gemopt.executor.runner import Prepared, StageRunner

PENDING = "pending"


class Background:
    """A migration that overlaps with serving.

    The weights of a batch of layers travel in a thread, on a process group of their own, into buffers of their own.
    Each forward pass of the model first looks whether all ranks have received the batch, and commits all of it then,
    with one vote. All ranks run forward passes alike, as expert parallelism needs anyway.
    """

    def __init__(self, runner: StageRunner, batches: Sequence[Sequence[Stage]], model: nn.Module) -> None:
        self._runner = runner
        self._batches = list(batches)
        self._thread: threading.Thread | None = None
        self._result: tuple[list[Prepared], str] = ([], "")
        self._hook = model.register_forward_pre_hook(lambda *_: self.poll(), prepend=True)
        self._start()

    @property
    def done(self) -> bool:
        """Whether everything is committed, or the migration has failed."""
        return self._thread is None

    def cut(self) -> None:
        """End with the batch that is on its way; every rank calls this between the same forward passes."""
        del self._batches[1:]

    def _start(self) -> None:
        """Begin the next batch, or end."""
        if not self._batches:
            self._end()
            self._runner.finish()
            return
        batch = self._batches[0]

        def work() -> None:
            with _side_stream(self._runner.layers[0].device):
                self._result = self._runner.prepare(batch)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._thread = None
        self._hook.remove()

    def poll(self) -> None:
        """Commit the batch if all ranks are ready; every rank calls this between the same forward passes."""
        if self._thread is None:
            return
        alive = self._thread.is_alive()
        prepared, problem = ([], PENDING) if alive else self._result
        words = self._runner.council.exchange(problem)
        if PENDING in words and set(words) <= {PENDING, ""}:
            return
        try:
            batch = self._batches.pop(0)
            self._runner.settle(batch, prepared, problem, ["" if word == PENDING else word for word in words])
        except BaseException:
            self._end()
            raise
        self._start()

    def wait(self) -> None:
        """Finish without further forward passes; every rank calls this alike."""
        while self._thread is not None:
            self._thread.join()
            self.poll()


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, work beside the stream that serves."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield
