"""`gemopt.replay.replay`: recorded traffic under named strategies, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import counts_digest
from gemopt.costs import CostModel, cost_of
from gemopt.exceptions import ABOVE_0, BELOW_1, InputError, UnsupportedError, check_kind, check_number
from gemopt.latency import FloatArray
from gemopt.placement import Split
from gemopt.problem import slot_counts
from gemopt.profile import Profile
from gemopt.replay.copying import Migration
from gemopt.replay.result import Regime, ReplayResult, ReplayRow, Track
from gemopt.replay.schedule import Schedule
from gemopt.replay.simulate import Course, Playing, World
from gemopt.replay.strategies import STRATEGIES, Eplb, make
from gemopt.replay.strategy import Context, Solved, Strategy
from gemopt.rules import Rules
from gemopt.splits.senders import Senders
from gemopt.traces import Phase, Traces
from gemopt.words import counted

BASELINE = "contiguous"
DEFAULT_WINDOW = 64
DEFAULT_FIT = 0.5


def replay(
    profile: Profile | str | os.PathLike[str],
    traces: Traces | str | os.PathLike[str],
    strategies: Sequence[str | Strategy] | None = None,
    *,
    window: int = DEFAULT_WINDOW,
    fit: float = DEFAULT_FIT,
    slots_per_rank: int | Sequence[int] | None = None,
    migration: Migration | None = None,
    throttle: Schedule | None = None,
    non_moe_us: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    cost: str | CostModel = "auto",
    rules: Rules | str | os.PathLike[str] | None = None,
    split: Split | str = Split.EVEN,
    senders: Senders | str | None = None,
    on_track: Callable[[Track], None] | None = None,
    solved: Solved | None = None,
) -> ReplayResult:
    """Play the last steps of recorded traffic under every strategy.

    Parameters
    ----------
    profile, traces
        Objects or paths.
    strategies
        Names from `STRATEGIES`, or objects that follow `Strategy`. None: all of them, without `eplb-*` where slots are
        unequal.
    window
        Steps between the decisions of `free` and `clairvoyant`, and what they solve on.
    fit
        Share of the steps, the first ones, that `fitted-once` may see and all may have seen; the rest is scored.
    migration
        Cost of copying; defaults with the expert size of the profile when None.
    throttle
        Devices that throttle, fail and return; nobody is told, but latencies show it.
    non_moe_us
        Time of a step outside the MoE layers: in the quantiles, TTFT and TPOT, and transfers go on during it.
    noise
        Standard deviation of the logarithm of the measured latencies that strategies are given; seeded.
    rules
        What placements must keep, except those of `contiguous` and `eplb-*`, which know no rules; nodes are those of
        the profile.
    split, senders
        How copies share under every strategy: `even`, or `nearest` with the senders `uniform`, since strategies see
        counts, which do not say who sends.
    on_track
        Called as soon as a strategy is through.
    solved
        Kept and added to: placements that other replays have solved, which are not searched for again.

    Raises
    ------
    InputError
        For unknown strategies, for windows, shares and events that do not fit the traces, for rules that cannot be
        kept, without a rank that fails, or with experts duplicated per batch, and for other splits and senders.
    """
    profile, traces = Profile.of(profile), Traces.of(traces)
    slots = slot_counts(slots_per_rank, traces.num_experts, profile.num_ranks)
    chosen, schedule = make(usual(slots) if strategies is None else strategies), throttle or Schedule()
    migration = migration or Migration.of(profile)
    check_kind("throttle", schedule, Schedule)
    check_kind("migration", migration, Migration)
    shared = _shared(split, senders, chosen)
    past, _ = _split(traces, fit, window)
    _check_numbers(non_moe_us, noise, seed)
    schedule.check(profile.num_ranks, traces.num_steps, first_failure=past.num_steps)
    model = cost_of(cost, profile)
    known = {} if solved is None else solved
    context = Context(profile, model, past, slots, window, seed, migration, _rules(rules, chosen), shared, known)
    noise_TG = np.exp(noise * np.random.default_rng(seed).standard_normal((traces.num_steps, profile.num_ranks)))
    world = World(context, traces, migration, schedule, non_moe_us, noise_TG)
    tracks = []
    for strategy in chosen:
        tracks.append(_play(strategy, world))
        if on_track is not None:
            on_track(tracks[-1])
    base = next((track for track in tracks if track.strategy == BASELINE), None)
    base = base or Course(make([BASELINE])[0], world).run()
    phases = None if traces.phase is None else np.asarray(traces.phase[past.num_steps :])
    return ReplayResult(
        rows=[_row(track, float(np.sum(base.step_us)), phases, non_moe_us) for track in tracks],
        timeline=tracks,
        baseline_us=base.step_us,
        first_step=past.num_steps,
        num_steps=traces.num_steps,
        num_layers=traces.num_layers,
        num_ranks=profile.num_ranks,
        window=window,
        fit=fit,
        seed=seed,
        noise=noise,
        non_moe_us=non_moe_us,
        cost=model.name,
        migration=migration,
        schedule=schedule,
        regimes=regimes(traces),
        profile_sha256=profile.digest(),
        traces_sha256=counts_digest(traces),
    )


def usual(slots_G: NDArray[np.int64]) -> list[str]:
    """Strategies that run unless some are named: engines with EPLB need as many slots on every rank."""
    unequal = bool((slots_G != slots_G[0]).any())
    return [name for name in STRATEGIES if not (unequal and name.startswith("eplb-"))]


def too_late(names: Sequence[str], num_steps: int) -> list[str]:
    """A line for each engine whose balancer has not yet rearranged when traces of so many steps end."""
    return [
        f"{each.name} rearranges after {each.first_step} steps, and there are {num_steps}: here it stays as it starts"
        for each in make(names)
        if isinstance(each, Eplb) and each.first_step >= num_steps
    ]


def _play(strategy: Strategy, world: World) -> Track:
    return cast(Playing, strategy).play(world) if hasattr(strategy, "play") else Course(strategy, world).run()


def _split(traces: Traces, fit_share: float, window: int) -> tuple[Traces, Traces]:
    limit = "a share strictly between 0 and 1"
    check_number("--fit", fit_share, limit, "for example 0.5", least=ABOVE_0, most=BELOW_1)
    cut = round(traces.num_steps * fit_share)
    if not 0 < cut < traces.num_steps:
        found = f"{counted(traces.num_steps, 'step')} cannot be split so"
        raise InputError("--fit", fit_share, found, "give longer traces")
    left = traces.num_steps - cut
    check_number("--window", window, "a whole number of at least 1", least=1, whole=True)
    if window > left:
        found, limit = f"{counted(left, 'step')} to score", f"at least the {window} of a window"
        raise InputError("traces", found, limit, "give a shorter --window or longer traces")
    return traces.steps(slice(0, cut)), traces.steps(slice(cut, None))


def _shared(given: Split | str, senders: Senders | str | None, chosen: Sequence[Strategy]) -> Split:
    """How copies share."""
    if given not in (Split.EVEN, Split.NEAREST):
        raise InputError("split", given, "replay shares copies even or nearest")
    split = Split(given)
    if Senders.asked_by(senders, split) is not Senders.UNIFORM and split is Split.NEAREST:
        raise InputError("senders", senders, "strategies see counts, which do not say who sends", "--senders uniform")
    deaf = [strategy.name for strategy in chosen if hasattr(strategy, "play")]
    if deaf and split is not Split.EVEN:
        raise UnsupportedError("split", split.value, f"{deaf[0]} has a split of its own", "leave one out")
    return split


def _rules(given: Rules | str | os.PathLike[str] | None, chosen: Sequence[Strategy]) -> Rules | None:
    if given is None:
        return None
    deaf = [strategy.name for strategy in chosen if hasattr(strategy, "play")]
    if deaf:
        raise UnsupportedError("rules", f"with {deaf[0]}", "the two do not go together", "leave one out")
    return Rules.of(given)


def _check_numbers(non_moe_us: float, noise: float, seed: int) -> None:
    check_number("--seed", seed, "a whole number of at least 0", whole=True)
    check_number("--non-moe-us", non_moe_us, "microseconds from 0 to 1e9", most=1e9)
    check_number("--noise", noise, "from 0 to 1; 0.02 is two per cent", most=1)


def _row(track: Track, base_us: float, phases: NDArray[np.int64] | None, non_moe_us: float) -> ReplayRow:
    steps_us = np.array(track.step_us)
    whole_us, total = steps_us + non_moe_us, float(steps_us.sum())
    quantiles = [float(np.quantile(whole_us, q)) for q in (0.5, 0.9, 0.99)]
    prompts = np.zeros(len(whole_us), bool) if phases is None else phases != Phase.DECODE
    nexts = np.ones(len(whole_us), bool) if phases is None else phases != Phase.PREFILL
    return ReplayRow(
        strategy=track.strategy,
        makespan_us=total,
        change=total / base_us - 1 if base_us else None,
        moves=sum(track.moves),
        migration_us=float(sum(track.copying_us)),
        p50_us=quantiles[0],
        p90_us=quantiles[1],
        p99_us=quantiles[2],
        ttft_ms=_mean_ms(whole_us[prompts]),
        tpot_ms=_mean_ms(whole_us[nexts]),
    )


def _mean_ms(steps_us: FloatArray) -> float | None:
    return float(steps_us.mean()) / 1e3 if len(steps_us) else None


def regimes(traces: Traces) -> list[Regime]:
    """Stretches of steps of one task."""
    if traces.task is None:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(traces.task)) + 1).tolist(), traces.num_steps]
    found = [(int(traces.task[start]), start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return [Regime(name=traces.task_names[task], start=a, stop=b) for task, a, b in found if task >= 0]
