"""Errors a user can meet. Each prints as one line: field, value, limit, way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from math import nextafter
from numbers import Integral, Rational, Real
from os import PathLike
from sys import float_info
from typing import Any

ABOVE_0, BELOW_1, LARGEST = nextafter(0.0, 1.0), nextafter(1.0, 0.0), float_info.max


class GemoptError(Exception):
    """Base of every error that gemopt raises on purpose. `told`: another rank says it, so that this one need not."""

    told = False


class InputError(GemoptError, ValueError):
    """Something given to gemopt cannot be used (exit code 2).

    Parameters
    ----------
    field
        What is wrong, as the user wrote it: an option, a key of a document, an array.
    value
        What was found there; long values are shortened.
    limit
        What would have been accepted.
    hint
        The way out.
    """

    def __init__(self, field: str, value: object, limit: str, hint: str = "") -> None:
        self.field = field
        self.value = value = str(value) if isinstance(value, PathLike) else value
        self.limit = limit
        self.hint = hint
        try:
            shown = "" if value is None else " ".join((value if isinstance(value, str) else repr(value)).split())
        except ValueError:  # an integer of thousands of digits
            shown = type(value).__name__
        if len(shown) > 120:
            shown = shown[:117] + "..."
        message = f"{field}: got {shown or 'nothing'}; {limit}"
        super().__init__(" ".join((f"{message}; {hint}" if hint else message).split()))

    def about(self, field: str) -> InputError:
        """The same of a field that the user knows by another name."""
        return InputError(field, self.value, self.limit, self.hint)


def refuse_unused(options: Mapping[str, object], limit: str) -> None:
    """Refuse options that were given (are not None) and say nothing here: an option is never ignored."""
    for name, value in options.items():
        if value is not None:
            raise InputError(name, value, limit, "leave it out")


def check_number(
    field: str,
    value: Any,
    limit: str,
    hint: str = "",
    *,
    least: float = 0.0,
    most: float = LARGEST,
    whole: bool = False,
) -> None:
    """Refuse what is no finite number from `least` to `most`, or no whole one where it must be."""
    kind: Any = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(field, repr(value) if isinstance(value, str) else value, limit, hint)  # '3' is none
    exact: Any = value if isinstance(value, Rational) else float(value)  # limits would be rounded to a shorter float
    if not least <= exact <= most:
        raise InputError(field, value, limit, hint)


def check_flags(**given: object) -> None:
    """Refuse what is neither True nor False: any text counts as True."""
    for field, value in given.items():
        if not isinstance(value, bool):
            raise InputError(field, value, "True or False")


def check_kind(field: str, value: object, kind: type, *or_kinds: type) -> None:
    """Refuse what is of none of these types; PathLike and str stand for paths."""
    if not isinstance(value, (kind, *or_kinds)):
        names = [each.__name__ for each in (kind, *or_kinds) if each not in (str, PathLike)]
        paths = ["the path of one"] if str in or_kinds else []
        raise InputError(field, value, " or ".join([*(f"a {name} of gemopt" for name in names), *paths]))


@contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """Within, an error of input begins with the file that it is about."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith(str(path)):
            error.args = (f"{path}: {error}",)
        raise


class InfeasibleError(InputError):
    """No placement is all that was asked for (exit code 3)."""


class UnsupportedError(InputError):
    """A solver, an engine or a format cannot express what was asked; the message names one that can."""


# Optional package -> the extra of gemopt that brings it.
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "accelerate": "torch",
    "matplotlib": "report",
    "plotly": "report",
    "pandas": "tables",
    "yaml": "yaml",
    "ortools": "exact",
    "pulp": "exact",
    "highspy": "exact",
    "pyarrow": "tables",
    "prometheus_client": "watch",
    "joblib": "cluster",
    "dask": "cluster",
}


class MissingPackageError(InputError, ImportError):
    """An optional package is not installed (exit code 2); the message is one line with the command that helps.

    Parameters
    ----------
    package
        As it is imported.
    purpose
        What needs it.
    state
        What is wrong with it.
    """

    def __init__(self, package: str, purpose: str, state: str = "not installed") -> None:
        super().__init__(package, state, f"{purpose} needs it", install_hint(EXTRAS[package]))
        self.args = (f"{package}: {state}; {self.limit}; {self.hint}",)
        self.msg = self.args[0]
        self.name = package
        self.purpose, self.state = purpose, state

    def needed_by(self, called: str) -> MissingPackageError:
        """The error in the words of whoever called something, where all that it names is a module of gemopt's own."""
        known = not self.purpose.startswith("gemopt.")
        return self if known else MissingPackageError(str(self.name), called, self.state)


@contextmanager
def called(name: str) -> Iterator[None]:
    """Within, what is missing is needed by what was called, whichever module imports it."""
    try:
        yield
    except MissingPackageError as error:
        raise error.needed_by(name) from None


def install_hint(extra: str) -> str:
    """How to install an extra of gemopt, from an index or from a clone."""
    return f"pip install 'gemopt[{extra}]' (from a clone: pip install '.[{extra}]')"


def missing(error: ImportError, purpose: str) -> ImportError:
    """The error to raise for an import that failed: one line where an extra of gemopt brings the package."""
    package, _, part = (error.name or "").partition(".")
    whole = isinstance(error, ModuleNotFoundError)  # or a name in it is what is missing
    if package not in EXTRAS or not (part or whole):
        return error
    old = part and find_spec(package) is not None
    lacks = f"has {'no' if whole else 'not all of'} {part}, perhaps too old"
    return MissingPackageError(package, purpose, lacks if old else "not installed")


class SolverError(GemoptError, RuntimeError):
    """A solver returned something that `evaluate` refutes, or died. Always a defect, never bad input."""
