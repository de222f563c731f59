"""Local search under the true objective, and what it and others share."""
