"""Random rows of placements with copies and empty slots."""

from __future__ import annotations

import numpy as np

from gemopt.placement import EMPTY


def random_row(rng, slots, experts):
    """A valid row: every expert once where it fits, then copies in some of the free slots."""
    contents = [set() for _ in slots]
    for expert in rng.permutation(experts):
        open_ranks = [g for g, s in enumerate(slots) if len(contents[g]) < s]
        contents[rng.choice(open_ranks)].add(int(expert))
    for rank, size in enumerate(slots):
        others = [e for e in range(experts) if e not in contents[rank]]
        extra = int(rng.integers(0, size - len(contents[rank]) + 1))
        contents[rank] |= {int(e) for e in rng.permutation(others)[:extra]}
    padded = [list(c) + [EMPTY] * (s - len(c)) for c, s in zip(contents, slots, strict=True)]
    return np.array([e for c in padded for e in rng.permutation(c)], dtype=np.int64)
