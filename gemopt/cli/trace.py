"""Commands of `gemopt trace`."""

from __future__ import annotations
