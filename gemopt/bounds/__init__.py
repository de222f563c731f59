"""Lower bounds: what no placement of a problem can beat."""

from __future__ import annotations

from gemopt.bounds.copies import CopiesProof, copies_bound, copies_proof
from gemopt.bounds.simple import lower_bound, spread_bound, spread_bounds, step_bounds, timed_step_bounds, weighted
from gemopt.bounds.together import Together, together_bound

__all__ = [
    "CopiesProof",
    "Together",
    "copies_bound",
    "copies_proof",
    "lower_bound",
    "spread_bound",
    "spread_bounds",
    "step_bounds",
    "timed_step_bounds",
    "together_bound",
    "weighted",
]
