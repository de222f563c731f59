"""What each strategy of an advice does in the replays, and how sure that is."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from gemopt.advise.case import Case
from gemopt.advise.document import Option
from gemopt.latency import FloatArray
from gemopt.replay import ReplayResult

CLOSE = 0.01
RESAMPLES = 1000
BLOCKS = 4  # at least, in the bootstrap: long ones, for steps that follow each other are alike
BOUND = "clairvoyant"
Played = list[tuple[ReplayResult, NDArray[np.int64]]]  # replays of the same steps, each with the slots it ran on


def options_of(
    case: Case, ways: Sequence[Played], *, barred: Collection[str] = (), horizon: int | None = None
) -> list[Option]:
    """One per strategy, `clairvoyant` left out: nobody can run it.

    ways: the last steps played, and any others. barred: strategies that are no choice, as are those whose first
    placement has not paid for itself within the horizon.
    """
    tracks = [[(track, slots_G) for result, slots_G in played for track in result.timeline if track.strategy != BOUND]
              for played in ways]  # fmt: skip
    steps_WST = np.array([[track.step_us for track, _ in each] for each in tracks])
    base_WT = np.array([played[0][0].baseline_us for played in ways])
    base_W1, rest_us = base_WT.sum(axis=1)[:, None], case.non_moe_us * base_WT.shape[1]
    changes_WS = steps_WST.sum(axis=2) / base_W1 - 1
    step_S = (changes_WS * base_W1 / (base_W1 + rest_us)).mean(axis=0)
    saved_S = -(changes_WS * base_W1).mean(axis=0) / base_WT.shape[1]
    paid_S = [_breakeven(_setup_us(case, track.setup_moves), float(saved_us))
              for (track, _), saved_us in zip(tracks[0], saved_S, strict=True)]  # fmt: skip
    allowed_S = np.array([track.strategy not in barred for track, _ in tracks[0]])
    choice_S = allowed_S & [horizon is None or (paid is not None and paid <= horizon) for paid in paid_S]
    choice_S = choice_S if choice_S.any() else allowed_S
    low_S, high_S, share_S = _spread(steps_WST, base_WT, case.window, case.seed, choice_S)
    size, found = case.migration.expert_bytes, []
    for s, (track, slots_G) in enumerate(tracks[0]):
        found.append(Option(
            strategy=track.strategy, slots_per_rank=slots_G.tolist(), change=float(changes_WS[:, s].mean()),
            changes=changes_WS[:, s].tolist(), low=float(low_S[s]), high=float(high_S[s]),
            step_change=float(step_S[s]), best_share=float(share_S[s]),
            moves=sum(track.moves), traffic_bytes=sum(track.moves) * size, setup_moves=track.setup_moves,
            setup_bytes=track.setup_moves * size, breakeven_steps=paid_S[s],
            memory_bytes=float((slots_G - case.bare_G).max()) * size * case.traces.num_layers,
        ))  # fmt: skip
    return found


def _breakeven(setup_us: float, saved_us: float) -> float | None:
    """Steps until what a first placement costs is saved; None: never."""
    if not setup_us:
        return 0.0
    return setup_us / saved_us if saved_us > 0 else None


def _setup_us(case: Case, moves: int) -> float:
    """What moving to a first placement beside serving costs: shared evenly by the ranks, a commit per layer."""
    if not moves:
        return 0.0
    costs = case.migration
    transfer_us = moves / case.profile.num_ranks * costs.expert_bytes / costs.bytes_per_s * 1e6
    return costs.slowdown * transfer_us + costs.commit_us * case.traces.num_layers


def _spread(
    steps_WST: FloatArray, base_WT: FloatArray, window: int, seed: int, choice_S: NDArray[np.bool_]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[S] low and high ends of the changes of other recordings, and the share in which a strategy is close to the best
    choice.

    A recording is made of blocks of consecutive steps, drawn with replacement, the same for all strategies. Two ways
    are two regimes: in logarithms the next one is at their mean and sqrt(3) t times half of what they are apart, t of
    Student's distribution with one degree of freedom (the prediction from two observations: it is as likely beyond
    either of them as between them). The ends are those of each way, and half of what they are apart more. Another
    recording of N blocks varies as this one does, and few blocks show too little of it: the spread is widened by
    sqrt(2 N / (N - 1)) and Student's quantile over the normal one.
    """
    steps = steps_WST.shape[2]
    cuts = np.arange(0, steps, max(1, min(window, steps // BLOCKS)))
    free = max(1, len(cuts) - 1)
    wider = float(np.sqrt(2 * len(cuts) / free) * stdtrit(free, 0.95) / ndtri(0.95))
    blocks_WSB, base_WB = np.add.reduceat(steps_WST, cuts, axis=2), np.add.reduceat(base_WT, cuts, axis=1)
    rng = np.random.default_rng(seed)
    each_WSR = []
    for blocks_SB, base_B in zip(blocks_WSB, base_WB, strict=True):
        drawn_RB = rng.integers(0, len(cuts), (RESAMPLES, len(cuts)))
        each_WSR.append(blocks_SB[:, drawn_RB].sum(axis=2) / base_B[drawn_RB].sum(axis=1))
    first_SR, then_SR = np.log(each_WSR[0]), np.log(each_WSR[-1])
    next_SR = first_SR + (then_SR - first_SR) * (1 + np.sqrt(3) * rng.standard_cauchy(RESAMPLES)) / 2
    share_S = (next_SR <= next_SR[choice_S].min(axis=0) + np.log(1 + CLOSE)).mean(axis=1)
    mean_WS = steps_WST.sum(axis=2) / base_WT.sum(axis=1)[:, None]
    ends_2WS = mean_WS + wider * (np.quantile(each_WSR, (0.05, 0.95), axis=2) - mean_WS)
    apart_S = np.ptp(mean_WS, axis=0)
    return ends_2WS[0].min(axis=0) - apart_S / 2 - 1, ends_2WS[1].max(axis=0) + apart_S / 2 - 1, share_S
