"""Command line.

Exit codes: 0 done, 2 bad input, 3 infeasible, 4 no solution within the limit, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from gemopt.interrupts import LEFT

INTERRUPTED = 130


def load() -> None:
    """Import the commands, which register themselves."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit; bad input prints one line on standard error."""
    try:
        _run(argv)
    except SystemExit as error:
        if argv is None and _would_abort():
            sys.stdout.flush()
            os._exit(int(error.code or 0))
        raise


def _would_abort() -> bool:
    """Whether threads may come back to Python when it has ended: what an interrupt left, and those of torch's ranks."""
    ranks = "TORCHELASTIC_RUN_ID" in os.environ and "torch.distributed" in sys.modules
    return ranks or any(thread.name == LEFT for thread in threading.enumerate())


def _run(argv: list[str] | None) -> None:
    from gemopt.exceptions import EXTRAS, GemoptError, InfeasibleError, InputError, called, missing

    name = "the command line"
    try:
        load()
        from gemopt.cli.app import make

        commands = make()
        name = _named(commands, sys.argv[1:] if argv is None else argv)
        with called(name):
            code = commands(args=argv, standalone_mode=False, prog_name="gemopt")
        print(end="", flush=True)
    except GemoptError as error:
        code = 3 if isinstance(error, InfeasibleError) else 2 if isinstance(error, InputError) else 1
        sys.exit(code if error.told else _complain(error, code))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        sys.exit(_complain(missing(error, name), 2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", INTERRUPTED))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        if error.filename is None:
            _drop_output()
        where = str(error.filename or "standard output")
        sys.exit(_complain(InputError(where, error.strerror, "a file or folder that can be read and written"), 2))
    except UnicodeEncodeError as error:  # a name of a file, under a locale that has no such letters
        shown = ascii(error.object[error.start : error.end])
        sys.exit(_complain(f"{shown}: no such letter in {error.encoding}; set LC_ALL=C.UTF-8 or PYTHONUTF8=1", 2))
    except MemoryError:
        sys.exit(_complain("out of memory: use fewer steps or layers at once", 1))
    except Exception as error:  # click's own errors: typer ships a click of its own, which has no public name
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)
        if type(error).__name__ == "Abort":
            sys.exit(_complain("interrupted", INTERRUPTED))
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_complain(_misused(error), 2))
    if code == INTERRUPTED:  # typer's answer to Ctrl-C
        _complain("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _named(command: Any, words: Sequence[str]) -> str:
    """The command that was typed, as in `gemopt trace import`."""
    name = ["gemopt"]
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        name.append(word)
    return " ".join(name)


def _misused(error: Any) -> str:
    """What typer has to say of options that it refuses."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    if callable(faults := getattr(error.__cause__, "errors", None)):  # pydantic's, which do not say what was given
        (field, _, limit), given = message.partition(": "), faults()[0]["input"]
        limit = limit.removeprefix("Value error, ").replace(f"{given!r} is not one", "One")
        message = f"{field}: got {'nothing' if given == '' else given}; {limit[:1].lower()}{limit[1:]}"
    if context is not None and not message.endswith("?"):
        message += f"; see {context.command_path} --help"
    return str(message)


def _drop_output() -> None:
    """What is still to be written to standard output goes nowhere, so that the end of Python does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: object, code: int) -> int:
    print(f"gemopt: {' '.join(str(message).split())}", file=sys.stderr)
    return code
