"""Commands of `gemopt profile`."""

from __future__ import annotations
