"""Commands of `gemopt export`."""

from __future__ import annotations
