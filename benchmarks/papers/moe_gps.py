"""MoE-GPS (arXiv:2506.07366): which of its claims follow from its published parameters; prints tables.

python benchmarks/papers/moe_gps.py

The paper's code and its simulator's outputs are not published. What is: Mixtral 8x7B, 4 A100 joined by NVLink (2 TB/s)
or PCIe (32 GB/s), and 600, 200, 64 GB/s between; batch 1, 512 tokens, FP16; skewness (hottest expert over mean) 1.39
MMLU, 1.40 Alpaca, 1.99 SST2; error of the distribution-only estimate 1.8, 0.98, 16 %; a predictor of 4096-128-64-8;
expert time and communication scale with skewness, the latter with (N - 1) skew / N^2; a token-to-expert prediction
skips the scatter. (Read second-hand, from notes on the paper.) Sizes of Mixtral are those of its model card, the
roofline of an A100 (312 TFLOPS FP16, 2039 GB/s) is that of its data sheet. Accuracies and overheads of the paper's
neural predictors are not known to us as numbers: they are swept, and a claim that depends on them is given as the
region where it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RANKS, TOKENS, TOP_K, EXPERTS = 4, 512, 2, 8
HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, BYTES = 4096, 14336, 32, 8, 128, 32, 2
FLOPS, MEMORY = 312e12, 2039e9
SETS = {"MMLU": (1.39, 0.018), "Alpaca": (1.40, 0.0098), "SST2": (1.99, 0.16)}
GBPS = (2000.0, 600.0, 200.0, 64.0, 32.0)
SKEWS = (1.2, 1.4, 1.6, 1.8, 2.0)
ACCURACIES = np.linspace(0.5, 0.99, 50)
CLAIMED = 0.23
NOTED_ATTENTION_US = 12e3 / LAYERS  # "about 12 ms", read as that of the whole network


def roofline_us(operations: float, moved: float) -> float:
    """Microseconds on one A100."""
    return max(operations / FLOPS, moved / MEMORY) * 1e6


def attention_us() -> float:
    """Tensor-parallel attention of a layer by the roofline, without its all-reduces."""
    weights = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) / RANKS
    scores = 4 * TOKENS**2 * HEADS * HEAD_DIM / RANKS
    return roofline_us(2 * TOKENS * weights + scores, BYTES * weights)


def experts_us() -> float:
    """A layer's experts, assignments spread evenly over the ranks."""
    weights = 3 * HIDDEN * INTER
    return roofline_us(2 * TOKENS * TOP_K / RANKS * weights, BYTES * weights * EXPERTS / RANKS)


def mlp_us() -> float:
    """The published predictor on one rank, for all tokens of a layer."""
    weights = HIDDEN * 128 + 128 * 64 + 64 * EXPERTS
    return roofline_us(2 * TOKENS * weights, BYTES * (weights + TOKENS * HIDDEN))


@dataclass(frozen=True)
class System:
    """A layer's parts in microseconds at one bandwidth."""

    gbps: float
    attention: float

    @property
    def reduce_us(self) -> float:
        """Two ring all-reduces of the tensor-parallel attention block, each 2 (N - 1) / N of the activations."""
        return 2 * 2 * (RANKS - 1) / RANKS * TOKENS * HIDDEN * BYTES / (self.gbps * 1e3)

    def scatter_us(self, skew: float) -> float:
        """One all-to-all, (N - 1) skew / N^2 of the assignments' activations; the gather is as long."""
        return (RANKS - 1) * skew / RANKS**2 * TOKENS * TOP_K * HIDDEN * BYTES / (self.gbps * 1e3)

    def baseline(self, skew: float) -> float:
        """No prediction."""
        return self.attention + self.reduce_us + 2 * self.scatter_us(skew) + skew * experts_us()

    def distribution(self, skew: float, error: float) -> float:
        """Experts balanced up to the error, which is spread evenly; communication as without."""
        return self.attention + self.reduce_us + 2 * self.scatter_us(skew) + (1 + error) * experts_us()

    def tokens(self, accuracy: float, overhead_us: float) -> float:
        """Experts balanced up to the wrong ones; the right ones skip the scatter, the gather is balanced."""
        wrong = 1 - accuracy
        sent = wrong * self.scatter_us(1.0) + self.scatter_us(1.0)
        return overhead_us + self.attention + self.reduce_us + sent + (1 + wrong) * experts_us()


def main() -> None:
    """Claims, then the region of the 23 %."""
    systems = {gbps: System(gbps, attention_us()) for gbps in GBPS}
    fast, slow = systems[2000.0].scatter_us(1), systems[32.0].scatter_us(1)
    print(f"A layer, balanced: attention {attention_us():.0f} us by the roofline ({NOTED_ATTENTION_US:.0f} as noted), "
          f"experts {experts_us():.0f}, a scatter {fast:.1f} at 2 TB/s, {slow:.0f} at 32 GB/s. "
          f"The published predictor takes {mlp_us():.1f} us.\n")  # fmt: skip
    claims(systems)
    region(systems)


def error_at(skew: float) -> float:
    """Error of the distribution-only estimate between the published points."""
    points = sorted(SETS.values())
    return float(np.interp(skew, [s for s, _ in points], [e for _, e in points]))


def lead(system: System, skew: float, accuracy: float, overhead_us: float) -> float:
    """How much sooner distribution-only is than token-to-expert, as a share of the latter."""
    return 1 - system.distribution(skew, error_at(skew)) / system.tokens(accuracy, overhead_us)


def claims(systems: dict[float, System]) -> None:
    """Each claim with what the model gives."""
    fast, slow, o = systems[2000.0], systems[32.0], mlp_us()
    gains = {name: 1 - fast.distribution(s, e) / fast.baseline(s) for name, (s, e) in SETS.items()}
    falling = [lead(systems[g], 1.4, 0.8, o) for g in GBPS]
    by_skew = [lead(slow, s, 0.8, o) for s in SKEWS]
    cross = next((float(a) for a in ACCURACIES if lead(fast, 1.39, float(a), o) < 0), None)
    rows = [
        ("distribution-only beats no prediction, the more the more skew", gains["SST2"] > gains["MMLU"] > 0,
         ", ".join(f"{name} {100 * gain:.0f} %" for name, gain in gains.items())),
        ("its error grows with skewness", SETS["SST2"][1] > SETS["MMLU"][1], "published; Alpaca's is smallest"),
        ("low skew and fast links favour distribution-only (MMLU, 2 TB/s, the published predictor)",
         cross is None or cross > 0.9,
         f"ahead below an accuracy of {cross:.2f}" if cross is not None else "ahead at every accuracy up to 0.99"),
        ("slower links favour token-to-expert (skew 1.4, accuracy 0.8)", all(np.diff(falling) < 0),
         ", ".join(f"{g:g} GB/s {100 * v:+.0f} %" for g, v in zip(GBPS, falling, strict=True))),
        ("more skew favours token-to-expert (32 GB/s, accuracy 0.8)", all(np.diff(by_skew) < 0),
         ", ".join(f"{s:g} {100 * v:+.0f} %" for s, v in zip(SKEWS, by_skew, strict=True))),
        ("high skew and slow links: token-to-expert wins (SST2, 32 GB/s)", lead(slow, 1.99, 0.8, o) < 0,
         f"{100 * lead(slow, 1.99, 0.8, o):+.0f} %"),
    ]  # fmt: skip
    print("| claim | direction follows | lead of distribution-only, unless said |\n|---|---|---|")
    for claim, holds, what in rows:
        print(f"| {claim} | {'yes' if holds else 'no'} | {what} |")
    print()


def region(systems: dict[float, System]) -> None:
    """Overhead from which distribution-only is 23 % ahead on MMLU."""
    print("## 23 % on Mixtral 8x7B, MMLU\n\nOverhead of a token-to-expert prediction, in us a layer and as a share of "
          "the layer without prediction, from which distribution-only is 23 % sooner; the published predictor has "
          f"{mlp_us():.1f} us.\n")  # fmt: skip
    accuracies = (0.6, 0.8, 0.95, 1.0)
    print("| GB/s | attention | " + " | ".join(f"accuracy {a:g}" for a in accuracies) + " |\n" + "|---" * 6 + "|")
    follows = True
    for gbps in (2000.0, 32.0):
        for name, attention in (("roofline", attention_us()), ("as noted", NOTED_ATTENTION_US)):
            system, (skew, error) = System(gbps, attention), SETS["MMLU"]
            wanted = system.distribution(skew, error) / (1 - CLAIMED)
            least = [wanted - system.tokens(a, 0.0) for a in accuracies]
            follows &= max(least) <= mlp_us()
            cells = [f"{us:.0f} ({100 * us / system.baseline(skew):.0f} %)" for us in least]
            print(f"| {gbps:g} | {name} | " + " | ".join(cells) + " |")
    system, (skew, error) = systems[2000.0], SETS["MMLU"]
    wanted = system.distribution(skew, error) / (1 - CLAIMED)
    below = max((float(a) for a in ACCURACIES if system.tokens(float(a), mlp_us()) >= wanted), default=0.0)
    print(f"\nFollows from the published parameters, whatever the accuracy: {'yes' if follows else 'no'}.\n"
          "With the overhead of the published predictor, at 2 TB/s and with attention by the roofline: "
          f"at accuracies up to {below:.2f}.")  # fmt: skip


if __name__ == "__main__":
    main()
