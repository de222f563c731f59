"""Commands of `gemopt apply`."""

from __future__ import annotations
