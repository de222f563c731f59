"""What tests of documents share."""

from __future__ import annotations

import pytest

from gemopt.exceptions import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 600
    return text
