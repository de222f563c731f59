"""Counts of tokens that chose experts, for tests of what counts tell."""

from __future__ import annotations

import numpy as np


def routed(rng, steps=12, layers=5, experts=16, top_k=2, tokens=40):
    """[T, L, E] counts of tokens that choose by layers' own popularities."""
    popular = rng.dirichlet(np.full(experts, 0.7), size=layers)
    return np.stack([[rng.multinomial(tokens * top_k, row) for row in popular] for _ in range(steps)])
