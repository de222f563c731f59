"""Errors a user can meet. Each prints as one line: field, value, limit, way out."""

from __future__ import annotations


class GemoptError(Exception):
    """Base of every error that gemopt raises on purpose."""


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
        self.value = value
        self.limit = limit
        self.hint = hint
        try:
            shown = " ".join((value if isinstance(value, str) else repr(value)).split())
        except ValueError:  # an integer of thousands of digits
            shown = type(value).__name__
        if len(shown) > 120:
            shown = shown[:117] + "..."
        message = f"{field}: got {shown or 'nothing'}; {limit}"
        super().__init__(" ".join(f"{message}; {hint}".split()) if hint else message)


class UnsupportedError(InputError):
    """A solver, an engine or a format cannot express what was asked; the message names one that can."""


class SolverError(GemoptError, RuntimeError):
    """A solver returned something that `evaluate` refutes, or died. Always a defect, never bad input."""
