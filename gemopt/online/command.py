"""The command that follows a change: run, waited for, and ended in time with all that it began."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from gemopt.exceptions import InputError

LOOK_S = 0.1
GRACE_S = 5.0  # that it has from being told to end until it is killed


def run_command(words: Sequence[str], timeout_s: float, stop: threading.Event) -> None:
    """Run a command to its end; told to end, then killed, when it is late or `stop` is set, or nobody waits any more.

    It has ended when its own process has, whatever it left in the background, which may go on writing: to a file, since
    a pipe would be waited for.

    Raises
    ------
    InputError
        It cannot be run, exits with another code than 0, or did not come to its end.
    """
    name = f"--on-change {words[0]}"
    try:
        with tempfile.TemporaryFile() as errors:
            null = subprocess.DEVNULL
            process = subprocess.Popen(words, stdin=null, stdout=null, stderr=errors, start_new_session=True)
            try:
                code = _code(process, time.monotonic() + timeout_s, stop)
            finally:
                if process.returncode is None:
                    _end(process)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        script = "begin the script with #!/bin/sh or the like" if getattr(error, "errno", None) == errno.ENOEXEC else ""
        raise InputError(name, reason, "a command that can be run", script) from None
    if code is None and stop.is_set():
        raise InputError(name, "still running when the watch was told to end", "told to end as well")
    if code is None:
        raise InputError(name, f"still running after {timeout_s:g} s", "ended")
    if code:
        raise InputError(name, f"exit code {code}", said[-1] if said else "0 is needed")


def _code(process: subprocess.Popen[bytes], deadline: float, stop: threading.Event) -> int | None:
    """Exit code; None where it is not waited for any longer."""
    while True:
        left_s = deadline - time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, min(LOOK_S, left_s)))
        if stop.is_set() or left_s <= 0:
            return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell it, and all that it began, to end; kill what is left after a while. Another user's cannot be told."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
