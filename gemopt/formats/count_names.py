"""What columns and arrays of counts are called, and those that are none."""

from __future__ import annotations

import re

PARALLEL = ("ep_rank", "dp_rank", "tp_rank")
COLUMNS = {
    "layer": ("layer_id", "layer", "layer_idx", "layer_index", "moe_layer", "moe_layer_id"),
    "expert": ("expert_id", "expert", "expert_idx", "expert_index", "logical_expert", "logical_expert_id"),
    "count": (
        *("count", "counts", "num_tokens", "token_count", "tokens", "num_assignments", "assignments"),
        *("activations", "activation_count", "num_activations", "expert_count", "hits", "load"),
    ),
    "step": (
        *("step", "step_id", "iteration", "iter", "forward_pass_id", "forward_pass", "global_step", "train_step"),
        *("eplb_step", "batch_id", "batch_idx"),
    ),
    "rank": ("rank", "rank_id", *PARALLEL),
}
COUNTING = {"count", "counts", "frequency", "freq", "hits", "load", "loads", "tokens", "total", "activations"}
TIMES = {"time", "timestamp", "ts", "date", "datetime", "elapsed", "us", "ms", "sec", "seconds"}
SCORES = {"logits", "probs", "weights", "scores"}
MEASURED = {
    "us",
    "ms",
    "latency",
    "time",
    "times",
    "utilization",
    "balancedness",
    "entropy",
    "transitions",
    "coactivation",
}
NO_COUNTS = {"ids", "indices", "topk", "selected", "routed", *SCORES, *MEASURED}
MOST_LAYERS = 256  # of any network known
COUNTED = {"count", "counts", "load", "loads", "tokens", "assignments"}

DERIVED = {  # that name what was made of counts
    *("percent", "percents", "percentage", "percentages", "pct", "share", "shares", "ratio", "ratios", "fraction"),
    *("mean", "means", "avg", "average", "averages", "ema", "median", "std", "normalized", "normalised"),
    *("cumulative", "cumsum"),
}


def words_of(name: str) -> set[str]:
    """Words of a name, in small letters."""
    return set(re.split("[^a-z]+", name.lower()))
