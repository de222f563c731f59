"""Ctrl-C as a fact to look at instead of an exception anywhere: what was found so far is kept and written whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_held: list[threading.Event] = []
_raising: list[bool] = []


@contextmanager
def held() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C sets the event instead of raising `KeyboardInterrupt`; a second one raises.

    Held again inside, it is the same event. Only the main thread can do this, and only where nobody else handles the
    signal; elsewhere the event stays as it is and Ctrl-C does what it did.
    """
    if _held:
        yield _held[-1]
        return
    event = threading.Event()
    mine = threading.current_thread() is threading.main_thread()
    mine = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set() or _raising:
            raise KeyboardInterrupt
        event.set()

    if mine:
        _held.append(event)
        signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _held.remove(event)


@contextmanager
def raising(event: threading.Event) -> Iterator[None]:
    """Within, Ctrl-C raises even inside `held`, as there is nothing yet that could be kept; so does an earlier one."""
    _raising.append(True)
    try:
        if event.is_set():
            raise KeyboardInterrupt
        yield
    finally:
        _raising.pop()
