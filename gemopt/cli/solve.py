"""Commands of `gemopt solve`."""

from __future__ import annotations
