"""Train the small mixture-of-experts language model that gemopt ships: byte level, four kinds of text.

    python examples/train_tiny_moe.py --out models/tiny_moe

The text is whatever this machine has of Python's standard library and of Debian's package documentation, so another
machine gives other weights. About eight minutes on one CPU core (a second one makes it little faster);
`models/tiny_moe/README.md` is written by this script and holds its figures.
"""

from __future__ import annotations

import argparse
import gzip
import math
import random
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

STDLIB = Path(sysconfig.get_paths()["stdlib"])
DOC = Path("/usr/share/doc")
SPECIAL = ("<pad>", "<bos>", "<eos>")
LENGTH, SEQUENCES_PER_KIND = 256, 4
BYTES_PER_KIND = 8_000_000
BALANCE_WEIGHT = 0.005
CONFIG = {
    "vocab_size": 264,  # 3 special tokens, 256 bytes, 5 unused: divisible by 8 ranks
    "hidden_size": 96,
    "intermediate_size": 192,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sources() -> dict[str, list[Path]]:
    """Files of each kind of text found on this machine."""
    code = [p for p in STDLIB.rglob("*.py") if not {"test", "tests", "site-packages", "idlelib"} & set(p.parts)]
    tables = [STDLIB / "test" / name for name in ("cmath_testcases.txt", "floating_points.txt", "math_testcases.txt")]
    maths = [*(STDLIB / "test" / "decimaltestdata").glob("*.decTest"), *tables]
    maths += [p for folder in ("mathdata", "test/mathdata") for p in (STDLIB / "test" / folder).glob("*.txt")]
    names = ("copyright", "README*", "*.txt", "*.md", "*.rst", "NEWS.Debian.gz")
    prose = [*Path("/usr/share/common-licenses").glob("*"), *(p for name in names for p in DOC.rglob(name))]
    return {"prose": prose, "code": code, "maths": maths, "changelog": list(DOC.rglob("changelog*"))}


def read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def corpus(paths: Iterable[Path], *, seed: int) -> dict[str, np.ndarray]:
    """Token ids to train on and held-out ones (every 20th file), paragraphs that were seen before left out."""
    files = sorted({p.resolve() for p in paths if p.is_file()})
    random.Random(seed).shuffle(files)
    parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
    size = 0
    seen: set[int] = set()
    for number, path in enumerate(files):
        paragraphs = [p for p in read(path).split(b"\n\n") if p.strip()]
        new = [p for p in paragraphs if zlib.crc32(p) not in seen]
        seen.update(map(zlib.crc32, new))
        text = b"\n\n".join(new)[:200_000]
        parts["held_out" if number % 20 == 7 else "train"].append(text)
        size += len(text)
        if size > BYTES_PER_KIND:
            break
    return {
        name: np.frombuffer(b"\n\n\n".join(texts), np.uint8).astype(np.int64) + len(SPECIAL)
        for name, texts in parts.items()
    }


def batch(corpora: dict[str, np.ndarray], rng: np.random.Generator) -> Tensor:
    """[kinds x 4, LENGTH] windows, as many of each kind."""
    rows = []
    for tokens in corpora.values():
        for start in rng.integers(0, len(tokens) - LENGTH, SEQUENCES_PER_KIND):
            rows.append(tokens[start : start + LENGTH])
    return torch.from_numpy(np.stack(rows))


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """E x sum over experts of (share of assignments) x (mean probability), averaged over layers.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, for top-k instead of top-1.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(dim=-1)
        chosen = torch.zeros_like(probability).scatter_(1, probability.topk(top_k, dim=-1).indices, 1.0 / top_k)
        losses.append(logits.shape[-1] * (chosen.mean(0) * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def train(train_data: dict[str, np.ndarray], *, steps: int, minutes: float, seed: int) -> Qwen3MoeForCausalLM:
    """AdamW, warm-up and cosine; ends after `steps` or `minutes`, whichever comes first."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0.05)
    begin = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - begin) / (60 * minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 60) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        tokens = batch(train_data, rng)
        output = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
        language = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        balance = balance_loss(output.router_logits, CONFIG["num_experts_per_tok"])
        (language + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == steps - 1:
            seconds = time.monotonic() - begin
            print(f"step {step:4d}  {seconds:5.0f} s  loss {language:.3f}  balance {balance:.3f}", flush=True)
    model.tokens_seen = (step + 1) * tokens.numel()
    return model


def windows(tokens: np.ndarray, count: int) -> Iterator[Tensor]:
    for start in np.linspace(0, len(tokens) - LENGTH - 1, count).astype(int):
        yield torch.from_numpy(tokens[start : start + LENGTH])[None]


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, held_out: dict[str, np.ndarray]) -> dict[str, tuple[float, np.ndarray]]:
    """Bits per byte of held-out text, and [L, E] share of assignments, of each kind."""
    result = {}
    for kind, tokens in held_out.items():
        nats, loads = [], np.zeros((CONFIG["num_hidden_layers"], CONFIG["num_experts"]))
        for window in windows(tokens, 60):
            output = model(input_ids=window, labels=window, output_router_logits=True, use_cache=False)
            nats.append(torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), window[0, 1:]).item())
            for layer, logits in enumerate(output.router_logits):
                chosen = logits.topk(CONFIG["num_experts_per_tok"], dim=-1).indices.flatten().numpy()
                loads[layer] += np.bincount(chosen, minlength=CONFIG["num_experts"])
        result[kind] = (float(np.mean(nats)) / math.log(2), loads / loads.sum(axis=1, keepdims=True))
    return result


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: id = byte + 3."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shown = {byte: chr(byte) for byte in printable}  # the alphabet of tokenizers' ByteLevel
    for extra, byte in enumerate(b for b in range(256) if b not in shown):
        shown[byte] = chr(256 + extra)
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {shown[byte]: len(SPECIAL) + byte for byte in range(256)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, padding_side="left", model_max_length=CONFIG["max_position_embeddings"], **names
    )


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, byte-level]
---
# tiny-moe

A byte-level mixture-of-experts language model of {parameters:,} parameters that really routes: {layers} layers of
{experts} experts, top-{top_k}, hidden size {hidden}, expert size {inner}; architecture `Qwen3MoeForCausalLM`, bfloat16.
It exists for gemopt's tests and demonstrations, where a random network would route all text alike. It writes no
useful text.

## Training

{tokens:,} bytes in {seconds:.0f} s on {threads} CPU core(s), AdamW, cross-entropy plus {weight} times the
load-balancing loss of Switch Transformers (arXiv 2101.03961) per layer.
Script: `examples/train_tiny_moe.py`, seed {seed}.

| kind | text | licence of the text | bytes trained on | held-out loss, bits per byte |
|---|---|---|---|---|
{rows}

The text itself is not part of this model. Licence of the weights: Apache-2.0.

## Routing

Hottest expert's load over the mean, on held-out text of one kind, layer 0 to {last}; a balanced router has 1.

| kind | hottest / mean |
|---|---|
{skews}

Cosine distance between the loads (all layers) of two kinds; within a kind, between the first and the second half of
{half} windows of {length} bytes, it is {within}.

{distances}
"""
TEXTS = {
    "prose": ("copyright files, READMEs and notes of Debian packages, common licences", "that of each package"),
    "code": ("Python's standard library", "PSF-2.0"),
    "maths": ("CPython's tables of decimal and complex arithmetic tests", "PSF-2.0 (the decimal ones © IBM)"),
    "changelog": ("changelogs of Debian packages", "that of each package"),
}


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    return max(0.0, 1 - float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))


def card(model: Qwen3MoeForCausalLM, data: dict[str, dict[str, np.ndarray]], *, seconds: float, seed: int) -> str:
    held_out = {kind: parts["held_out"] for kind, parts in data.items()}
    whole = measure(model, held_out)
    first, second = (
        measure(model, {kind: half[i * len(half) // 2 :][: len(half) // 2] for kind, half in held_out.items()})
        for i in range(2)
    )
    within = max(cosine_distance(first[kind][1], second[kind][1]) for kind in data)
    rows = [
        f"| {kind} | {TEXTS[kind][0]} | {TEXTS[kind][1]} | {len(data[kind]['train']):,} | {whole[kind][0]:.2f} |"
        for kind in data
    ]
    skews = [
        f"| {kind} | {', '.join(f'{layer.max() * layer.size:.1f}' for layer in whole[kind][1])} |" for kind in data
    ]
    table = [f"| | {' | '.join(data)} |", "|---" * (len(data) + 1) + "|"]
    for kind in data:
        distances = (f"{cosine_distance(whole[kind][1], whole[other][1]):.2f}" for other in data)
        table.append(f"| {kind} | {' | '.join(distances)} |")
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=CONFIG["num_hidden_layers"],
        last=CONFIG["num_hidden_layers"] - 1,
        experts=CONFIG["num_experts"],
        top_k=CONFIG["num_experts_per_tok"],
        hidden=CONFIG["hidden_size"],
        inner=CONFIG["moe_intermediate_size"],
        tokens=model.tokens_seen,
        seconds=seconds,
        threads=torch.get_num_threads(),
        weight=BALANCE_WEIGHT,
        seed=seed,
        rows="\n".join(rows),
        skews="\n".join(skews),
        half=60,
        length=LENGTH,
        within=f"at most {within:.2f}",
        distances="\n".join(table),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the tokenizer and the card")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--minutes", type=float, default=7.5, help="at most this long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = {kind: corpus(paths, seed=arguments.seed) for kind, paths in sources().items()}
    for kind, parts in data.items():
        print(f"{kind}: {len(parts['train']):,} bytes, {len(parts['held_out']):,} held out", flush=True)
    begin = time.monotonic()
    model = train(
        {kind: parts["train"] for kind, parts in data.items()},
        steps=arguments.steps,
        minutes=arguments.minutes,
        seed=arguments.seed,
    )
    seconds = time.monotonic() - begin
    model = model.eval().bfloat16()
    model.save_pretrained(arguments.out)
    tokenizer().save_pretrained(arguments.out)
    (arguments.out / "README.md").write_text(card(model, data, seconds=seconds, seed=arguments.seed))


if __name__ == "__main__":
    main()
