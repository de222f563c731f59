"""How many of a token's experts each predictor names, layer by layer, beside frequency; tables.

python benchmarks/predictors.py [--data FOLDER] [--requests 120] [--hidden 20000]

A quarter of the requests is held out, never single tokens. First the token-level record of gpt-oss-20b in the folder
(`gptoss20b_tokens.npz`), then recordings made here of the shipped prompts, with hidden states: through the shipped
tiny-moe (of Qwen3's family, trained), and through networks of other families and the same size with random weights.
Layer 0 has nothing before it: the networks and `previous` fall back on frequencies there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from follow_cases import SHIPPED
from machine import stamp

from gemopt.exceptions import InputError
from gemopt.predict import PREDICTORS, Assessment, Predictor, assess, make
from gemopt.predict.networks import Lstm, Mlp
from gemopt.traces import Traces, from_tokens, with_hidden

FAMILIES = ("olmoe", "deepseek_v3")
SIZES = {"num_layers": 5, "num_experts": 64, "top_k": 4, "hidden_size": 96, "intermediate_size": 24, "vocab_size": 264,
         "initializer_range": 0.2}  # fmt: skip
TOKENS, MEMORY_GBPS = 512, 3350.0  # of a batch on a rank; an H100


def shared(path: Path, requests: int) -> Traces:
    """The first requests of the record, as batches of 32."""
    with np.load(path) as file:
        ends = file["req_start"][: requests + 1]
        tasks = [str(each) for each in file["domain"][:requests]]
        return from_tokens(file["ids"][: ends[-1]], ends[:-1], num_experts=32, batch_size=32, request_tasks=tasks)


def recorded(hidden: int, family: str | None = None) -> Traces:
    """The shipped prompts through the shipped network, or a random one: drawn requests with their hidden states."""
    from gemopt.models import tiny
    from gemopt.profiling.generating import load_model, read_prompts, record

    model, tokenizer = load_model("tiny-moe", device="cpu")
    model = model if family is None else tiny(family, **SIZES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        record(model, tokenizer, read_prompts(SHIPPED / "prompts.jsonl"), path, hidden=hidden)
        return with_hidden(Traces.load(path), path / "hidden.safetensors")


def table(traces: Traces, makers: dict[str, Callable[[], Predictor]]) -> None:
    """A row per layer; below, mean, error and what a prediction takes."""
    found: dict[str, Assessment] = {}
    left_out = []
    for name, maker in makers.items():
        try:
            found[name] = assess(maker(), traces)
        except InputError as error:
            left_out.append(f"{name} ({error.field} not recorded)")
    print("| layer | " + " | ".join(found) + " |\n" + "|---" * (len(found) + 1) + "|")
    rows: dict[str, Callable[[Assessment], str]] = {
        **{str(layer): (lambda a, i=layer: f"{100 * a.accuracy_L[i]:.1f}") for layer in range(traces.num_layers)},  # type: ignore[misc]
        "mean": lambda a: f"{100 * a.accuracy_L.mean():.1f}",
        "error %": lambda a: f"{100 * a.error_L.mean():.1f}",
        "us a token and layer here": lambda a: f"{a.us_per_token:.2f}",
        "bytes a token": lambda a: f"{a.bytes_per_token:.0f}",
        "bytes a batch": lambda a: f"{a.bytes_per_batch:.0f}",
        f"us a layer on {MEMORY_GBPS:.0f} GB/s, {TOKENS} tokens": lambda a: f"{a.device_us(TOKENS, MEMORY_GBPS):.2f}",
    }
    for head, value in rows.items():
        print(f"| {head} | " + " | ".join(map(value, found.values())) + " |")
    if left_out:
        print(f"\nLeft out: {', '.join(left_out)}.")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gptoss20b_tokens.npz")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--hidden", type=int, default=20000)
    options = parser.parse_args()
    print(f"{stamp('numpy', 'torch')}\n")
    print("Per cent of a token's experts among as many named; a quarter of the requests held out.")
    if options.data is not None:
        print(f"\n### gpt-oss-20b, {options.requests} requests, top 4 of 32\n")
        table(shared(options.data / "gptoss20b_tokens.npz", options.requests),
              {name: (lambda n=name: make(n)) for name in PREDICTORS})  # type: ignore[misc]  # fmt: skip
    traces = recorded(options.hidden)
    assert traces.tokens is not None and traces.tokens.request is not None
    drawn, tokens = len(np.unique(traces.tokens.request)), len(traces.tokens.ids)
    print(f"\n### tiny-moe, {drawn} requests, {tokens} tokens, top 4 of 64\n")
    table(traces, {name: (lambda n=name: make(n)) for name in PREDICTORS})  # type: ignore[misc]
    print("\n### tiny-moe, known more layers ahead\n")
    table(traces, {f"{kind.__name__.lower()}, {k} ahead": (lambda c=kind, k=k: c(ahead=k))  # type: ignore[misc]
                   for kind in (Mlp, Lstm) for k in (1, 2, 3)})  # fmt: skip
    for family in FAMILIES:
        print(f"\n### {family}, random weights, top 4 of 64\n")
        table(recorded(options.hidden, family), {name: (lambda n=name: make(n)) for name in PREDICTORS})  # type: ignore[misc]


if __name__ == "__main__":
    main()
