"""Routing traces: the document, its files, and the replay of requests as batches."""

from gemopt.traces.arrays import COUNT_LIMIT, count_assignments
from gemopt.traces.batching import from_tokens
from gemopt.traces.document import SCHEMA_VERSION, Phase, Traces
from gemopt.traces.hidden import hidden_path, of_tokens, save_hidden, with_hidden
from gemopt.traces.joining import concatenate, redrawn
from gemopt.traces.regrouping import regrouped
from gemopt.traces.tokens import Tokens

__all__ = [
    "COUNT_LIMIT",
    "SCHEMA_VERSION",
    "Phase",
    "Tokens",
    "Traces",
    "concatenate",
    "count_assignments",
    "from_tokens",
    "hidden_path",
    "of_tokens",
    "redrawn",
    "regrouped",
    "save_hidden",
    "with_hidden",
]
