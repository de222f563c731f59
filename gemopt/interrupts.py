"""Ctrl-C as a fact to look at instead of an exception anywhere: what was found so far is kept and written whole."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LEFT = "gemopt-left"  # name of threads that an interrupt leaves to end by themselves
_held: list[Interrupted] = []
_raising: list[bool] = []


class Interrupted(threading.Event):
    """Set by an interrupt; `number`: that of its signal."""

    number: int = signal.SIGINT


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """A handler: raises `KeyboardInterrupt`, which tells the signal."""
    raise KeyboardInterrupt(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM does what Ctrl-C does, unless somebody else handles it."""
    mine = _in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def held() -> Iterator[Interrupted]:
    """Within, the first Ctrl-C sets the event instead of raising `KeyboardInterrupt`; a second one raises.

    Held again inside, it is the same event. Only the main thread can do this, and only where nobody else handles the
    signal; elsewhere the event stays as it is and Ctrl-C does what it did. SIGTERM is held where `terminable`.
    """
    if _held:
        yield _held[-1]
        return
    event = Interrupted()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = (signal.default_int_handler, interrupt)
    mine = [number for number, handler in before.items() if _in_main_thread() and handler in ours]

    def handle(number: int, frame: FrameType | None) -> None:
        event.number = number
        again = event.is_set() or _raising
        event.set()
        if again:
            raise KeyboardInterrupt(number)

    if mine:
        _held.append(event)
    for number in mine:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number in mine:
            signal.signal(number, before[number])
        if mine:
            _held.remove(event)


@contextmanager
def raising(event: Interrupted) -> Iterator[None]:
    """Within, Ctrl-C raises even inside `held`, as there is nothing yet that could be kept; so does an earlier one.

    What a callback of a compiler drops, as ctypes does, is raised at the end, in place of the error that it led to.
    """
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            before(lost)

    _raising.append(True)
    sys.unraisablehook = hook
    try:
        if not event.is_set():
            yield
    except Exception:
        if not event.is_set():
            raise
    finally:
        sys.unraisablehook = before
        _raising.pop()
    if event.is_set():
        raise KeyboardInterrupt(event.number)
