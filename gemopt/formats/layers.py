"""Layer lists as a user writes them."""

from __future__ import annotations

import re

from gemopt.exceptions import InputError

MAX_LAYERS = 4096


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`3-60`, `0,2,4` or `1,3-5` as increasing layer numbers; None stays None."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        if found is None:
            raise InputError("--layer-ids", text, "numbers and ranges, like 3-60 or 1,3,5")
        layers += range(int(found[1]), int(found[2] or found[1]) + 1)
    if layers != sorted(set(layers)) or not layers or layers[-1] >= MAX_LAYERS:
        raise InputError("--layer-ids", text, f"increasing layers below {MAX_LAYERS}")
    return tuple(layers)
