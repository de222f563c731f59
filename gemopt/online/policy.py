"""What the controller may do and what it assumes: every knob, with its unit."""

from __future__ import annotations

from pydantic import Field

from gemopt.documents import Settings
from gemopt.migration import BATCH_BYTES

TICK = 8  # steps that are remembered, compared and forgotten together


class Policy(Settings):
    """Knobs of `Controller`.

    Attributes
    ----------
    expert_bytes, bytes_per_s
        Weights of one expert of one layer, and what a rank receives while it sends as much. None: of the live model
        that is followed, else of the profile where it records it, else 9.4 MB (an expert of Qwen3-30B-A3B in bf16).
    slowdown, commit_us
        A transfer in the background makes the steps it overlaps with longer by this fraction; putting layers in force
        stalls the group once for this many microseconds. Every layer that moves must pay for as much by itself.
    batch_bytes
        What a rank receives at most of layers that travel and are put in force together.
    horizon_steps
        Steps that a placement is expected to serve before any change of traffic was seen; what is seen takes over.
    least_gain
        Fraction of a layer's makespan by which a swap, judged by 64 steps, gains less than it promises; what is seen
        while serving takes over. A swap must promise more.
    dead_zone
        Slowest over mean rank of a layer below which nothing moves.
    cool_down_steps
        Steps for which a layer that moved stays as it is, unless the traffic changes.
    max_moves, max_swaps
        Experts moved per decision, those that gain most first; swaps per layer and decision.
    moves_per_1000_steps
        Experts moved over all steps so far, at most; what is not used is saved. A rank that fails is left all the same.
    fast_steps, slow_steps
        Time constants of the two memories that forget.
    keep_steps, plan_steps
        Steps kept in memory, and at most how many of them a plan is judged by.
    plan_every_steps
        Steps from one plan to the next while nothing changes. Steps are looked at whenever they are told, which takes a
        fraction of a plan, and a change of traffic, speeds or ranks, or of what is in force, is planned for at once.
    threads
        Layers planned at once while a step is decided, which has ended before `step` returns; decisions do not depend
        on it.
    speed_tolerance
        Relative change of a rank's speed that is acted upon.
    dead_after_steps
        Steps without a latency of a rank, while others report, after which it is treated as failed.
    """

    expert_bytes: float | None = Field(default=None, gt=0, le=1e12)
    bytes_per_s: float = Field(default=20e9, gt=0, le=1e15)
    slowdown: float = Field(default=0.05, ge=0, le=1)
    commit_us: float = Field(default=100.0, ge=0, le=1e9)
    batch_bytes: float = Field(default=BATCH_BYTES, ge=0, le=1e15)
    horizon_steps: int = Field(default=256, ge=1, le=10**9)
    least_gain: float = Field(default=0.008, ge=0, le=1)
    dead_zone: float = Field(default=1.03, ge=1, le=100)
    cool_down_steps: int = Field(default=32, ge=0, le=10**9)
    max_moves: int | None = Field(default=None, ge=0)
    moves_per_1000_steps: float | None = Field(default=None, ge=0, le=1e9)
    max_swaps: int = Field(default=64, ge=1, le=10**6)
    fast_steps: int = Field(default=32, ge=1, le=10**9)
    slow_steps: int = Field(default=192, ge=1, le=10**9)
    keep_steps: int = Field(default=1024, ge=64, le=2**20)
    plan_steps: int = Field(default=256, ge=16, le=2**20)
    plan_every_steps: int = Field(default=1, ge=1, le=10**9)
    threads: int = Field(default=1, ge=1, le=1024)
    speed_tolerance: float = Field(default=0.02, gt=0, le=1)
    dead_after_steps: int = Field(default=64, ge=1, le=10**9)
