"""What columns and arrays of counts are called, and those that are none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gemopt.exceptions import InputError
from gemopt.traces import Phase
from gemopt.traces.files import ALTERING

PARALLEL = ("ep_rank", "dp_rank", "tp_rank")
COLUMNS = {
    "layer": (
        *("layer_id", "layer", "layer_idx", "layer_index"),
        *("moe_layer", "moe_layer_id", "moe_layer_idx", "moe_layer_index"),
    ),
    "expert": ("expert_id", "expert", "expert_idx", "expert_index", "logical_expert", "logical_expert_id"),
    "count": (
        *("count", "counts", "num_tokens", "token_count", "tokens", "num_assignments", "assignments"),
        *("activations", "activation_count", "num_activations", "expert_count", "hits", "hit_count", "load"),
        *("selection_count", "selected_count", "num_selected", "times_selected"),
    ),
    "step": (
        *("step", "step_id", "iteration", "iter", "forward_pass_id", "forward_pass", "global_step", "train_step"),
        *("eplb_step", "batch_id", "batch_idx", "_step", "step_idx", "step_index", "step_num", "step_number"),
        *("pass", "pass_id", "forward_step", "engine_step", "time_step", "timestep", "iter_id", "iteration_id"),
        *("forward", "forward_id", "forward_idx"),
    ),
    "rank": ("rank", "rank_id", *PARALLEL),
    "phase": ("phase", "stage", "mode", "forward_mode", "is_prefill", "is_prompt", "is_decode"),
}
PERHAPS = {  # that mean it where no other column does
    *("hit_count", "selection_count", "selected_count", "num_selected", "times_selected"),
    *("pass", "pass_id", "engine_step", "time_step", "timestep", "forward", "forward_id", "forward_idx"),
    *("stage", "mode", "forward_mode", "is_prefill", "is_prompt", "is_decode"),
}
TOKENS = {"tokens", "num_tokens", "token_count"}  # of an expert, or of a whole step
PHASES = {
    **dict.fromkeys(("prefill", "prompt", "extend", "context"), Phase.PREFILL),
    **dict.fromkeys(("decode", "decoding", "generation", "generate"), Phase.DECODE),
    "mixed": Phase.MIXED,
}
FLAGS = {  # what they say of a row where they are true, and where false
    **dict.fromkeys(("is_prefill", "is_prompt"), ("prefill", "decode")),
    "is_decode": ("decode", "prefill"),
}
TRUTH = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "t", "y"), 0),
    **dict.fromkeys(("false", "0", "0.0", "no", "f", "n"), 1),
}
NUMBERS = {
    "num_experts": ("num_experts", "n_experts", "num_routed_experts", "n_routed_experts", "num_logical_experts"),
    "top_k": ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "router_topk"),
}
HEEDED = set().union(*NUMBERS.values())
TABLES = {name: meaning for meaning, names in COLUMNS.items() for name in names}
_KEY = re.compile(r"([A-Za-z_./\[ -]*)(\d{1,9})([\]A-Za-z_./ ]*)", re.ASCII)  # layer_3, model.layers.3.mlp
_LAYERS = dict.fromkeys(("layers", "blk", "block", "l"), "layer")
COUNTING = {"count", "counts", "frequency", "freq", "hits", "load", "loads", "tokens", "total", "activations"}
TIMES = {"time", "timestamp", "ts", "date", "datetime", "elapsed", "us", "ms", "sec", "seconds", "runtime", "duration"}
SIZES = {  # of a step, which change nothing where steps are numbered
    *("batch_size", "batchsize", "num_seqs", "num_sequences", "num_reqs", "num_requests", "running_requests"),
    *("total_tokens", "tokens_in_step", "seq_len", "max_seq_len", "context_len", "kv_len", "epoch", "train_epoch"),
    *("train_global_step", "trainer_global_step", "consumed_samples", "consumed_tokens", "num_input_tokens_seen"),
}
WEIGHTS = {"weight", "weights"}  # of steps: they change what the counts mean
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
DRAFTS = {"mtp", "nextn", "draft", "eagle"}  # whose layers are numbered anew
_FIRST = re.compile(r"top_?\d+", re.IGNORECASE)
_SEVERAL = re.compile(r"top_?(?:[2-9]|\d\d+)", re.IGNORECASE)
_FRACTION = re.compile(r"-?(?:\d*\.\d*[1-9]\d*(?:[eE][+-]?\d+)?|\d+[eE]-\d+)", re.ASCII)
_SHARE = re.compile(r"\d*\.\d+(?:[eE][+-]?\d+)?|\d+(?:\.\d+)? ?%", re.ASCII)
COUNTED = {"count", "counts", "load", "loads", "tokens", "assignments"}

SHARES = {
    *("percent", "percents", "percentage", "percentages", "pct", "share", "shares", "ratio", "ratios", "fraction"),
    *("fractions", "frac"),
}
FRACTIONS = SHARES | {"frequency", "frequencies", "freq", "probability", "proportion", "utilization"}  # beside counts
DERIVED = SHARES | {  # that name what was made of counts
    *("mean", "means", "avg", "average", "averages", "ema", "median", "std", "normalized", "normalised"),
    *("cumulative", "cumsum"),
    *("dropped", "overflow", "skipped", "miss", "misses", "evicted", "prefetched", "predicted", "forecast", "expected"),
    *("target", "capacity", "max", "min", "padded"),
}
UNDERSTOOD = COUNTED | COUNTING | FRACTIONS | {
    "", "expert", "experts", "moe", "layer", "layers", "step", "steps", "pass", "iter", "num", "n", "number", "per",
    "of", "by", "in", "for", "and", "all", "global", "logical", "routed", "routing", "router", "route", "gate", "token",
    "assignment", "activation", "activations", "activated", "selection", "selections", "selected", "choice", "choices",
    "chosen", "usage", "used", "use", "hit", "hist", "histogram", "histograms", "histories", "history", "distribution",
    "dist", "stat", "stats", "statistics", "record", "records", "recorded", "topk", "k", "top", "array", "data",
    "arr", "matrix", "tensor", "values", "value", "e", "l", "t", "le", "tle", "table", "window", "raw", "run", "v",
    "sum", "summed", "accumulated", "aggregated", "model", "mlp", "ffn", "block", "blk", "feed",
    "forward", "sparse", "language", "decoder", "prefill", "decode",
}  # fmt: skip
"""Words of names that leave no doubt, with all others known, that they hold the assignments of experts."""


def sure(names: Iterable[str]) -> list[str]:
    """Of some names of one meaning those that always have it, if there are any."""
    found = list(names)
    return [name for name in found if re.sub(r"\W+", "_", name.casefold()) not in PERHAPS] or found


def phase_of(where: str, name: str, cell: Any, first: Any) -> Phase | None:
    """The phase that a cell of a column tells, None where all say one other word; first: what the first one says."""
    text, before = (str(each).strip().casefold() for each in (cell, first))
    if (told := FLAGS.get(name.casefold())) is not None:
        text, before = (told[TRUTH[each]] if each in TRUTH else each for each in (text, before))
    if (text in PHASES) != (before in PHASES) or (text not in PHASES and text != before):
        limit = (
            f"one of {', '.join(PHASES if told is None else TRUTH)}" if before in PHASES else str(first) or "nothing"
        )
        raise InputError(f"{where}: {name}", str(cell)[:100], limit)
    return PHASES.get(text)


def layer_doubts(name: str, first: int) -> list[str]:
    """What there is to say of layers that begin with `first` in a column of this name."""
    if first == 1:
        return ["layer 0 is not there: without experts, or are the layers numbered from 1?"]
    if first == 0 and name.casefold().startswith("moe_layer"):
        return [
            f"{name} begins with 0: if dense layers come before, number all layers of the network, and call it layer"
        ]
    return []


def words_of(name: str) -> set[str]:
    """Words of a name, in small letters."""
    return set(re.split("[^a-z]+", name.lower()))


def numbered(value: dict[str, Any]) -> tuple[str, list[int]] | None:
    """What the keys of an object count (`layer`, ..., empty where they are numbers alone), and the numbers.

    The nearest word before the number tells: `model.layers.3.mlp.experts` is a layer.
    """
    parts = [_KEY.fullmatch(str(key)) for key in value]
    around = {(part[1], part[3]) for part in parts if part}
    if not value or not all(parts) or len(around) > 1:
        return None
    before, after = (re.findall("[a-z]+", text.lower()) for text in around.pop())
    names = [_LAYERS.get(name, name.removesuffix("s")) for name in before[::-1] + after]
    found = next((TABLES[name] for name in names if name in TABLES), "")
    known = (found in ("layer", "expert", "step", "rank") and not DRAFTS & set(names)) if names else True
    return (found, [int(part[2]) for part in parts if part]) if known else None


def derived(name: str) -> str:
    """The word of a name that says that it holds what was made of counts, or some of them alone; else nothing."""
    first = _FIRST.search(name)
    return first[0] if first else min(words_of(name) & DERIVED, default="")


def refuse_derived(where: object, name: str) -> None:
    """Raise for what was made of counts, by its name; `top2` may be all choices there are."""
    if (word := derived(name)) and not _SEVERAL.fullmatch(word):
        raise InputError(str(where), name, "counts themselves", f"is {word} no word for it? rename it")


def doubts_of(name: str) -> list[str]:
    """The note on counts whose name says more than is understood: `remote_counts`, `top2_counts`."""
    whole = words_of(name) <= UNDERSTOOD and not derived(name)
    return [] if whole else [f"{name} taken for the assignments of experts: is it all of them?"]


def is_result(name: str, first: str, text: str, has_steps: bool) -> bool:
    """Whether a column holds shares, or of numbered steps sizes, times or any fractions: nothing it tells apart."""
    words, cells = words_of(name), (first, text)
    if ALTERING.search(name) or words & WEIGHTS:
        return False
    if words & FRACTIONS and any(map(_SHARE.fullmatch, cells)):
        return True
    return has_steps and (name in SIZES or bool(words & TIMES) or any(map(_FRACTION.fullmatch, cells)))
