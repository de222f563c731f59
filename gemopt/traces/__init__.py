"""Routing traces: the document, its files, and the replay of requests as batches."""

from gemopt.traces.batching import from_tokens
from gemopt.traces.document import (
    COUNT_LIMIT,
    SCHEMA_VERSION,
    Phase,
    Tokens,
    Traces,
    concatenate,
    count_assignments,
    one_hot,
)
from gemopt.traces.files import IntArray

__all__ = [
    "COUNT_LIMIT",
    "SCHEMA_VERSION",
    "IntArray",
    "Phase",
    "Tokens",
    "Traces",
    "concatenate",
    "count_assignments",
    "from_tokens",
    "one_hot",
]
