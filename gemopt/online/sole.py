"""One watch for each file that it writes: two would undo each other's decisions."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemopt.exceptions import InputError


@contextmanager
def sole(path: Path) -> Iterator[None]:
    """Hold a file until the block or the process ends, by a lock on a hidden file beside it, which stays.

    On a file system without locks nothing is held.

    Raises
    ------
    InputError
        Another process holds it, or the folder cannot be written.
    """
    target = path.resolve()
    beside = target.with_name(f".{target.name}.lock")
    try:
        stream = beside.open("ab")
    except OSError as error:
        raise InputError(str(beside), error.strerror or str(error), "a folder that can be written") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            limit = "one watch for each file that it writes"
            raise InputError(str(path), "a file that another watch writes", limit, "give this one its own") from None
        except OSError:  # no locks here
            pass
        yield
