"""Lower bounds: what no placement of a problem can beat."""

from __future__ import annotations

from gemopt.bounds.simple import lower_bound, step_bounds, timed_step_bounds, weighted

__all__ = ["lower_bound", "step_bounds", "timed_step_bounds", "weighted"]
