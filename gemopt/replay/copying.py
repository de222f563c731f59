"""What copying experts costs while a model serves: how long a transfer takes and what it stalls."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gemopt.documents import Settings
from gemopt.latency import IntArray
from gemopt.migration import BATCH_BYTES, held
from gemopt.profile import Profile

EXPERT_BYTES = 9.4e6


class Migration(Settings):
    """Cost of moving experts.

    A transfer lasts `max over ranks of max(experts in, experts out) * expert_bytes / bytes_per_s`. Overlapped: the old
    placement of a layer serves until its transfer is done, a step takes `slowdown` longer for the part of it that
    overlaps with a transfer, and a commit between two forward passes, at most one a pass, stalls `commit_us`.
    `gemopt.executor` transfers and commits layers together, as many as keep what a rank receives within `batch_bytes`;
    vLLM's asynchronous EPLB one after the other. Stop-the-world (SGLang's EPLB): the next step waits for the transfers
    and commits of all layers, one after the other.

    Attributes
    ----------
    expert_bytes
        Weights of one expert of one layer. The default is an expert of Qwen3-30B-A3B in bf16.
    bytes_per_s
        What a rank sends, and at the same time receives.
    slowdown
        Fraction by which a transfer in the background slows the step it overlaps with: it shares memory and links.
    commit_us
        Agreement of the ranks and copy into place, per commit.
    batch_bytes
        What a rank receives at most of layers that are copied together; a layer that needs more goes alone.
    reload_bytes_per_s
        What a rank reads from host memory or disk: experts of a failed rank that nobody else holds.
    """

    expert_bytes: float = Field(default=EXPERT_BYTES, gt=0, le=1e12)
    bytes_per_s: float = Field(default=20e9, gt=0, le=1e15)
    slowdown: float = Field(default=0.05, ge=0, le=1)
    commit_us: float = Field(default=100.0, ge=0, le=1e9)
    batch_bytes: float = Field(default=BATCH_BYTES, ge=0, le=1e15)
    reload_bytes_per_s: float = Field(default=2e9, gt=0, le=1e15)

    @classmethod
    def of(cls, profile: Profile) -> Migration:
        """Defaults, with the size of an expert where the profile records it."""
        known = profile.model.expert_bytes
        return cls() if known is None else cls(expert_bytes=known)

    def transfer_us(self, in_G: IntArray, out_G: IntArray) -> float:
        """Microseconds until every rank has sent and received its experts."""
        return float(max(in_G.max(), out_G.max())) * self.expert_bytes / self.bytes_per_s * 1e6

    def reload_us(self, in_G: IntArray) -> float:
        """Microseconds until every rank has read its experts from storage."""
        return float(in_G.max()) * self.expert_bytes / self.reload_bytes_per_s * 1e6


def beside(left_us: float, work_us: float, slowdown: float) -> tuple[float, float]:
    """(what is left of a transfer after a step of `work_us`, by how much the step takes longer)."""
    beside_us = min(work_us, left_us / (1 + slowdown))
    left_us -= beside_us * (1 + slowdown)
    return (0.0 if left_us < 1e-9 * work_us else left_us), beside_us * slowdown


def traffic(
    before_P: IntArray, after_P: IntArray, slots_before: IntArray, slots_after: IntArray
) -> tuple[IntArray, IntArray]:
    """([G] experts that each rank receives, [G] that it sends); of several holders the one that sent least sends."""
    experts = int(max(before_P.max(), after_P.max())) + 1
    before_GE, after_GE = held(before_P, slots_before, experts), held(after_P, slots_after, experts)
    new_GE = after_GE & ~before_GE
    out_G = np.zeros(len(slots_before), dtype=np.int64)
    wanted_E = new_GE.sum(axis=0)
    for expert in sorted(np.flatnonzero(wanted_E), key=lambda e: int(before_GE[:, e].sum())):
        holders = np.flatnonzero(before_GE[:, expert])
        for _ in range(int(wanted_E[expert]) if len(holders) else 0):
            out_G[holders[out_G[holders].argmin()]] += 1
    return new_GE.sum(axis=1), out_G
