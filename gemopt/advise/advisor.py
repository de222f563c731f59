"""`gemopt.advise`: which strategy pays on these devices and this traffic, by how much, and how sure that is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.advise.case import Case, make_case
from gemopt.advise.document import Advice, Option
from gemopt.advise.shape import ModelShape, shape_from
from gemopt.advise.sweep import POWERS, WORTH, Bench, sample, sweeps
from gemopt.advise.variants import drift, skewness
from gemopt.bounds import lower_bound
from gemopt.costs import CostModel
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.placement import Placement
from gemopt.predict import PREDICTORS
from gemopt.predict import make as make_predictor
from gemopt.problem import problems
from gemopt.profile import Profile
from gemopt.replay import Migration, ReplayResult
from gemopt.replay.duplication import PREFIX
from gemopt.traces import Traces, concatenate

DEFAULT_WINDOW = 64
CLOSE = 0.01
RESAMPLES = 1000
BLOCKS = 4  # at least, in the bootstrap: long ones, for steps that follow each other are alike
DRIFTS = 0.05
PLAIN = ("contiguous", "fitted-once", "copies", "controller", "free")  # from the simplest on; duplication after them
DISTRIBUTIONS = {"all-past": 1, "window": 64, "dirichlet": 32}  # history that each needs, in steps
BOUND = "clairvoyant"
Results = list[tuple[ReplayResult, NDArray[np.int64]]]  # each with the slots it ran on


def advise(
    profile: Profile,
    traces: Traces,
    *,
    horizon: int | None = None,
    memory_bytes: float = 0.0,
    model: ModelShape | str | os.PathLike[str] | None = None,
    migration: Migration | None = None,
    non_moe_us: float | None = None,
    predictors: Sequence[str] | None = None,
    window: int = DEFAULT_WINDOW,
    seed: int = 0,
    cost: str | CostModel = "auto",
    sweep: bool = True,
    names: tuple[str, ...] = ("profile.json", "traces.safetensors"),
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Compare strategies on the last steps of recorded traffic, of which none has seen any.

    Parameters
    ----------
    horizon
        Steps that the decision has to hold: so many are scored, at most half of them, and the rest is fitted on; what
        has not paid for its first placement by then is not recommended. None: half of the steps.
    memory_bytes
        Free for copies on each rank, over all layers. Without it no copies are considered.
    model
        Sizes an expert where the profile does not, and times a step outside the MoE layers.
    migration
        Cost of copying; a rank's bandwidth is `bytes_per_s`. Defaults, with the size of an expert that is known.
    non_moe_us
        Time of a step outside the MoE layers, in place of what `model` gives; 0 without either.
    predictors
        Names in `gemopt.predict.PREDICTORS` to duplicate by; those that the traces allow when None.
    sweep
        Whether to look for the skew, bandwidth, batch and drift from which on it pays.
    names
        Of profile, traces and, where there are any, hidden states in the commands.

    Raises
    ------
    InputError
        Too few steps for the window; a model that is not the measured one; a predictor without what it needs.
    """
    if traces.num_steps < 4:
        raise InputError("traces", f"{traces.num_steps} steps", "at least 4: half are fitted on, half are scored")
    if horizon is not None and horizon < 1:
        raise InputError("--horizon", horizon, "at least 1 step")
    case, notes = make_case(profile, traces, horizon, memory_bytes, shape_from(model), migration, non_moe_us, window,
                            seed, cost)  # fmt: skip
    spare = bool((case.full_G > case.bare_G).any())
    if predictors is not None and not spare:
        raise InputError("--predictors", ", ".join(predictors), "no slot to spare for copies", "more --memory")
    chosen = _predictors(traces, round(traces.num_steps * case.fit), predictors) if spare else []
    follow = ["controller", "free", *(PREFIX + name for name in chosen), BOUND]
    total = len(follow) + 2 + spare + (len(POWERS) + 1 if sweep else 0)
    done = [0]

    def advance() -> None:
        done[0] += 1
        if progress is not None:
            progress(min(done[0], total), total)

    still = ["contiguous", "fitted-once"]
    results = [(case.replay(still if spare else still + follow, case.bare_G, advance), case.bare_G)]
    if spare:
        results.append((case.replay(["copies", *follow], case.full_G, advance), case.full_G))
    options = _options(case, results)
    best = _recommended(options, horizon)
    moved = drift(traces.counts, results[0][0].first_step, seed)
    seen = [best, _exchanged(case, best)] if moved > DRIFTS and best.strategy != "contiguous" else [best]
    notes += _warnings(seen, options, traces.num_steps, horizon, moved)
    found = _sweeps(case, options, best, advance) if sweep else {}
    return _document(case, results, options, seen, moved, horizon, notes, names, found)


def _predictors(traces: Traces, past_steps: int, wanted: Sequence[str] | None) -> list[str]:
    """Those asked for; else distributions that have enough history, and what is recorded of tokens and tasks."""
    if wanted is not None:
        for name in wanted:
            make_predictor(name)
        return list(dict.fromkeys(wanted))
    found = [name for name, steps in DISTRIBUTIONS.items() if past_steps >= steps]
    if traces.task is not None and len(np.unique(traces.task)) > 1:
        found.append("task")
    if traces.tokens is not None:
        found.append("previous")
        found += [] if traces.tokens.token_ids is None else ["token"]
        found += [] if traces.tokens.hidden is None else ["mlp", "lstm"]
    return [name for name in PREDICTORS if name in found]


def _options(case: Case, results: Results) -> list[Option]:
    """One per strategy, `clairvoyant` left out: nobody can run it."""
    tracks = [(track, slots_G) for result, slots_G in results for track in result.timeline if track.strategy != BOUND]
    base_T = np.array(results[0][0].baseline_us)
    steps_ST = np.array([track.step_us for track, _ in tracks])
    sums_RS, base_R, wider = _resampled(steps_ST, base_T, case.window, case.seed)
    changes_RS = sums_RS / base_R[:, None] - 1
    close_S = (sums_RS <= (1 + CLOSE) * sums_RS.min(axis=1, keepdims=True)).mean(axis=0)
    base_us, rest_us, size = float(base_T.sum()), case.non_moe_us * len(base_T), case.migration.expert_bytes
    found = []
    for s, (track, slots_G) in enumerate(tracks):
        total_us = float(steps_ST[s].sum())
        setup_us = _setup_us(case, track.setup_moves)
        saved_us = (base_us - total_us) / len(base_T)
        change = total_us / base_us - 1
        low, high = (change + wider * (np.quantile(changes_RS[:, s], (0.05, 0.95)) - change)).tolist()
        paid = 0.0 if not setup_us else setup_us / saved_us if saved_us > 0 else None
        found.append(Option(
            strategy=track.strategy, slots_per_rank=slots_G.tolist(), change=change, low=low, high=high,
            step_change=(total_us + rest_us) / (base_us + rest_us) - 1, best_share=float(close_S[s]),
            moves=sum(track.moves), traffic_bytes=sum(track.moves) * size, setup_moves=track.setup_moves,
            setup_bytes=track.setup_moves * size, breakeven_steps=paid,
            memory_bytes=float((slots_G - case.bare_G).max()) * size * case.traces.num_layers,
        ))  # fmt: skip
    return found


def _exchanged(case: Case, best: Option) -> Option:
    """The same strategy on as many first steps, fitted on all others."""
    scored = case.traces.num_steps - round(case.traces.num_steps * case.fit)
    turned = concatenate([case.traces.steps(slice(scored, None)), case.traces.steps(slice(0, scored))])
    slots_G, other = np.array(best.slots_per_rank), replace(case, traces=turned)
    return _options(other, [(other.replay([best.strategy], slots_G, lambda: None), slots_G)])[0]


def _setup_us(case: Case, moves: int) -> float:
    """What moving to a first placement beside serving costs: shared evenly by the ranks, a commit per layer."""
    if not moves:
        return 0.0
    costs = case.migration
    transfer_us = moves / case.profile.num_ranks * costs.expert_bytes / costs.bytes_per_s * 1e6
    return costs.slowdown * transfer_us + costs.commit_us * case.traces.num_layers


def _resampled(
    steps_ST: FloatArray, base_T: FloatArray, window: int, seed: int
) -> tuple[FloatArray, FloatArray, float]:
    """Sums over recordings made of blocks of consecutive steps, drawn with replacement; the same for all strategies.

    And how much wider than their spread is that of another recording of N blocks around this one: both vary, and few
    blocks show too little of it: sqrt(2 N / (N - 1)) and Student's quantile over the normal one.
    """
    from scipy.special import ndtri, stdtrit

    steps = steps_ST.shape[1]
    length = max(1, min(window, steps // BLOCKS))
    cuts = np.arange(0, steps, length)
    free = max(1, len(cuts) - 1)
    blocks_SB, base_B = np.add.reduceat(steps_ST, cuts, axis=1), np.add.reduceat(base_T, cuts)
    drawn_RB = np.random.default_rng(seed).integers(0, len(cuts), (RESAMPLES, len(cuts)))
    wider = float(np.sqrt(2 * len(cuts) / free) * stdtrit(free, 0.95) / ndtri(0.95))
    return blocks_SB[:, drawn_RB].sum(axis=2).T, base_B[drawn_RB].sum(axis=1), wider


def _recommended(options: list[Option], horizon: int | None) -> Option:
    """The simplest within `WORTH` of the best of those that pay for their first placement in time."""
    able = [each for each in options if horizon is None or (each.breakeven_steps or 0.0) <= horizon]
    able = [each for each in able if each.breakeven_steps is not None] or options[:1]
    limit = (1 + WORTH) * (1 + min(each.change for each in able)) - 1
    order = {name: place for place, name in enumerate(PLAIN)}
    near = [each for each in able if each.change <= limit]
    return min(near, key=lambda each: (order.get(each.strategy, len(PLAIN)), each.change))


def _sweeps(case: Case, options: list[Option], best: Option, advance: Callable[[], None]) -> dict[str, Any]:
    """Sweeps of what moves once, what follows, and the best duplication that needs no tokens."""
    half = sample(case.traces).num_steps // 2
    duplicated = [each for each in options if each.strategy.startswith(PREFIX)
                  and DISTRIBUTIONS.get(each.strategy.removeprefix(PREFIX), 2**31) <= half]  # fmt: skip
    shown = [each for each in options if each.strategy in PLAIN[:4] or each.strategy == best.strategy]
    if duplicated:
        shown.append(min(duplicated, key=lambda each: each.change))
    slots = {each.strategy: np.array(each.slots_per_rank) for each in shown}
    slots = {name: each for name, each in slots.items()
             if not name.startswith(PREFIX) or name in {d.strategy for d in duplicated}}  # fmt: skip
    bench = Bench(case.profile, case.cost, slots, case.migration, case.non_moe_us, case.seed)
    found, drawn = sweeps(bench, case.traces, list(slots), advance)
    return {"sweeps": found, "map": drawn}


def _document(
    case: Case,
    results: Results,
    options: list[Option],
    seen: list[Option],
    moved: float,
    horizon: int | None,
    notes: list[str],
    names: tuple[str, ...],
    found: dict[str, Any],
) -> Advice:
    plain, traces = results[0][0], case.traces
    past = traces.steps(slice(plain.first_step, None))
    bound_us = sum(map(lower_bound, problems(case.cost, past, case.room_G)))
    base_us = sum(plain.baseline_us)
    contiguous = Placement.contiguous(
        traces.num_layers, traces.num_experts, case.profile.num_ranks, layer_ids=list(traces.layer_ids)
    )
    best, apart = seen[0], seen[-1].change - seen[0].change
    return Advice(
        recommended=best.strategy, predicted_change=float(np.mean([each.change for each in seen])),
        confidence=best.best_share, low=min(each.low for each in seen) - abs(apart) / 2,
        high=max(each.high for each in seen) + abs(apart) / 2, strategies=options, ceiling=bound_us / base_us - 1,
        clairvoyant=results[-1][0].row(BOUND).makespan_us / base_us - 1,
        fitted_steps=plain.first_step, scored_steps=past.num_steps,
        horizon_steps=horizon or past.num_steps, window=case.window, seed=case.seed, skew=skewness(traces.counts),
        drift=moved,
        assignments=float(np.asarray(traces.counts).sum(axis=2).mean()),
        outside=evaluate(contiguous, None, past, cost=case.cost).outside, non_moe_us=case.non_moe_us,
        migration=case.migration, worth=WORTH, commands=_commands(case, best, names), notes=notes, **found,
    )  # fmt: skip


def _warnings(seen: list[Option], options: list[Option], steps: int, horizon: int | None, moved: float) -> list[str]:
    best, notes = seen[0], []
    if moved > DRIFTS:
        notes.append("the traffic changed while it was recorded: how much is gained in regimes to come is not known, "
                     "and may be outside of what is given")  # fmt: skip
    if len(seen) > 1:
        found = f"{100 * seen[1].change:+.1f} % there, {100 * best.change:+.1f} % on the last"
        notes.append(f"so {best.strategy} was played on the first steps too, fitted on the others: {found}; "
                     "the mean is predicted")  # fmt: skip
    if horizon is not None and horizon > steps // 2:
        notes.append(f"the horizon is {horizon} steps, {steps // 2} could be scored: drift beyond them is not in this")
    if best.strategy.startswith(PREFIX):
        able = min((each for each in options if each.strategy in PLAIN), key=lambda each: each.change)
        notes.append(
            "duplication per batch is judged by replay only, our executor and engines do not run it so; "
            f"of what they run, {able.strategy} changes {100 * able.change:+.1f} %"
        )
    return notes


def _commands(case: Case, best: Option, names: tuple[str, ...]) -> list[str]:
    """What to run next."""
    profile, traces, *hidden = names
    slots = best.slots_per_rank
    spare = f" --slots-per-rank {','.join(map(str, slots))}" if slots != case.bare_G.tolist() else ""
    tried = ",".join(dict.fromkeys(("contiguous", best.strategy)))
    again = f"gemopt replay {traces} --profile {profile} --strategies {tried} --fit {case.fit:.6g}"
    costs = case.migration
    again += f" --window {case.window} --gbps {costs.bytes_per_s / 1e9:.6g} --non-moe-us {case.non_moe_us:.6g}"
    again += f" --expert-bytes {costs.expert_bytes:.10g}{spare}" + "".join(f" --hidden {path}" for path in hidden)
    if best.strategy == "contiguous":
        return [again]
    solve = f"gemopt solve {profile} {traces} -o placement.json{spare}"
    if best.strategy == "controller":
        return [again, solve, f"gemopt watch TRACES_FOLDER --profile {profile} --placement placement.json"]
    return [again, solve]
