"""`gemopt.advise`: which strategy pays on these devices and this traffic, by how much, and how sure that is."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemopt.advise.case import Case, make_case
from gemopt.advise.document import Advice, Option
from gemopt.advise.options import BOUND, CLOSE, Played, options_of
from gemopt.advise.shape import ModelShape, shape_from
from gemopt.advise.sweep import POWERS, SCOUTS, WORTH, Bench, sample, sweeps
from gemopt.advise.variants import drift, skewness
from gemopt.bounds import lower_bound
from gemopt.costs import CostModel
from gemopt.evaluate import check_rules, evaluate
from gemopt.exceptions import InputError, check_kind, check_number
from gemopt.predict import PREDICTORS
from gemopt.predict import make as make_predictor
from gemopt.problem import problems
from gemopt.profile import Profile
from gemopt.replay import Migration
from gemopt.replay.duplication import PREFIX
from gemopt.rules import Rules
from gemopt.traces import Traces
from gemopt.words import counted

DEFAULT_WINDOW = 64
DRIFTS = 0.05
PLAIN = ("contiguous", "fitted-once", "copies", "controller", "free")  # from the simplest on; duplication after them
PRICED = ("expert_bytes", "bytes_per_s", "slowdown", "commit_us", "batch_bytes")  # of a migration and a policy
DISTRIBUTIONS = {"all-past": 1, "window": 64, "dirichlet": 32}  # history that each needs, in steps


def advise(
    profile: Profile | str | os.PathLike[str],
    traces: Traces | str | os.PathLike[str],
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
    rules: Rules | str | os.PathLike[str] | None = None,
    sweep: bool = True,
    names: tuple[str, ...] = ("profile.json", "traces.safetensors"),
    chosen: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Compare strategies on the last steps of recorded traffic, of which none has seen any.

    Where the traffic drifts, on the first steps as well, fitted on the others; then the mean decides.

    Parameters
    ----------
    profile, traces
        Objects or paths.
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
        Names in `gemopt.predict.PREDICTORS` to duplicate by, which may then be recommended. None: those that the traces
        allow, for comparison, since neither our executor nor an engine runs duplication per batch.
    rules
        What placements must keep (`gemopt.Rules`, or its path). Duplication per batch, which knows none, is left out;
        contiguous is not recommended where it breaks one.
    sweep
        Whether to look for the skew, bandwidth, batch and drift from which on it pays.
    names
        Of profile, traces and, where there are any, hidden states in the commands.
    chosen
        Options that chose steps and costs, for the commands: `--phase`, `decode`.

    Raises
    ------
    InputError
        Too few steps for the window; a model that is not the measured one; a predictor without what it needs, or with
        rules.
    InfeasibleError
        Rules that no placement keeps with a slot for each expert.
    """
    profile, traces = Profile.of(profile), Traces.of(traces)
    if traces.num_steps < 4:
        steps = counted(traces.num_steps, "step")
        raise InputError("traces", steps, "at least 4: half are fitted on, half are scored")
    if horizon is not None:
        check_number("--horizon", horizon, "at least 1 step", least=1, whole=True)
    check_number("--seed", seed, "a whole number of at least 0", whole=True)
    predictors = [predictors] if isinstance(predictors, str) else predictors
    if migration is not None:
        check_kind("migration", migration, Migration)
    asked = None if rules is None else Rules.of(rules)
    if predictors is not None and asked is not None:
        raise InputError("--predictors", ", ".join(predictors), "duplication knows no rules", "leave one out")
    case, notes = make_case(profile, traces, horizon, memory_bytes, shape_from(model), migration, non_moe_us, window,
                            seed, cost, asked, SCOUTS[: 1 + (predictors is not None)])  # fmt: skip
    if predictors is not None and not case.spare:
        raise InputError("--predictors", ", ".join(predictors), "no slot to spare for copies", "more --memory")
    cut = round(traces.num_steps * case.fit)
    by = _predictors(traces, cut, predictors) if case.spare and asked is None else []
    moved = drift(traces.counts, cut, seed)
    ways = [case, case.turned()] if moved > DRIFTS else [case]
    still, follow = ["contiguous", "fitted-once"], ["controller", "free", *(PREFIX + name for name in by), BOUND]
    total = len(ways) * (len(still) + len(follow) + case.spare) + (len(POWERS) + 1 if sweep else 0)
    done = [0]

    def advance() -> None:
        done[0] += 1
        if progress is not None:
            progress(min(done[0], total), total)

    played = [_play(way, still, ["copies", *follow] if case.spare else follow, advance) for way in ways]
    broken = _broken_in_order(case)
    barred = {PREFIX + name for name in by if predictors is None} | ({"contiguous"} if broken else set())
    options = options_of(case, played, barred=barred, horizon=horizon)
    choices = [each for each in options if each.strategy not in barred]
    best = _recommended(choices, horizon)
    notes += _warnings(best, choices, traces.num_steps, horizon, moved) + _about_rules(case, broken)
    notes += _about_duplication(best, _recommended(options, horizon), options)
    found = _sweeps(case, choices, best, advance) if sweep else {}
    ruled = [] if rules is None else ["--rules", "rules.json" if isinstance(rules, Rules) else os.fspath(rules)]
    commands = _commands(case, best, names, [*ruled, *chosen])
    return _document(ways, played, options, best, moved, horizon, notes, commands, found)


def _play(case: Case, still: list[str], follow: list[str], advance: Callable[[], None]) -> Played:
    """The first ones always without copies, to show what memory for copies buys."""
    if not case.spare:
        return [(case.replay(still + follow, case.bare_G, advance), case.bare_G)]
    return [(case.replay(names, slots_G, advance), slots_G)
            for names, slots_G in ((still, case.bare_G), (follow, case.full_G))]  # fmt: skip


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


def _broken_in_order(case: Case) -> str:
    """The rule that contiguous placement breaks; empty where it keeps all."""
    try:
        if case.rules is not None:
            check_rules(case.contiguous, case.rules, case.profile)
    except InputError as error:
        return str(error)
    return ""


def _about_rules(case: Case, broken: str) -> list[str]:
    if case.rules is None:
        return []
    notes = [
        f"rules are kept ({case.rules.brief()}), but by contiguous, which knows none; the ceiling is of all placements"
    ]
    notes += ["duplication per batch knows no rules and is left out"] * case.spare
    return notes + [f"contiguous is no choice, changes are against it all the same: {broken}"] * bool(broken)


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
    bench = Bench(case.profile, case.cost, slots, case.migration, case.non_moe_us, case.seed, case.rules)
    found, drawn = sweeps(bench, case.traces, list(slots), advance)
    return {"sweeps": found, "map": drawn}


def _document(
    ways: list[Case],
    played: list[Played],
    options: list[Option],
    best: Option,
    moved: float,
    horizon: int | None,
    notes: list[str],
    commands: list[str],
    found: dict[str, Any],
) -> Advice:
    case, plain, traces = ways[0], played[0][0][0], ways[0].traces
    last = traces.steps(slice(plain.first_step, None))
    return Advice(
        recommended=best.strategy, predicted_change=best.change, confidence=best.best_share, low=best.low,
        high=best.high, strategies=options, ceiling=float(np.mean(list(map(_ceiling, ways, played)))),
        clairvoyant=float(np.mean([result.row(BOUND).makespan_us / sum(result.baseline_us) - 1
                                   for *_, (result, _) in played])),
        fitted_steps=plain.first_step, scored_steps=last.num_steps,
        horizon_steps=horizon or last.num_steps, window=case.window, seed=case.seed, skew=skewness(traces.counts),
        drift=moved,
        assignments=float(np.asarray(traces.counts).sum(axis=2).mean()),
        outside=evaluate(case.contiguous, None, last, cost=case.cost).outside, non_moe_us=case.non_moe_us,
        migration=case.migration, worth=WORTH, commands=commands, notes=notes, **found,
    )  # fmt: skip


def _ceiling(case: Case, played: Played) -> float:
    """Change that no placement can pass on the scored steps."""
    plain = played[0][0]
    scored = case.traces.steps(slice(plain.first_step, None))
    return sum(map(lower_bound, problems(case.cost, scored, case.room_G))) / sum(plain.baseline_us) - 1


def _warnings(best: Option, options: list[Option], steps: int, horizon: int | None, moved: float) -> list[str]:
    notes = []
    if moved > DRIFTS:
        notes.append("the traffic changed while it was recorded: how much is gained in regimes to come is not known, "
                     "and may be outside of what is given")  # fmt: skip
        notes.append("so all strategies were played on the first steps too, fitted on the others; changes are means of "
                     f"both, {best.strategy} {100 * best.changes[0]:+z.1f} % on the last, "
                     f"{100 * best.changes[1]:+z.1f} % on the first")  # fmt: skip
        for way, where in enumerate(("last", "first")):
            first = min(options, key=lambda each: each.changes[way])
            if 1 + best.changes[way] > (1 + CLOSE) * (1 + first.changes[way]):
                notes.append(f"on the {where} steps {first.strategy} is best: {100 * first.changes[way]:+z.1f} %")
    first = _recommended(options, None)
    if horizon is not None and first.strategy != best.strategy:
        late = f"only after {first.breakeven_steps:.0f} steps its first placement has paid for itself"
        notes.append(f"{first.strategy} would change {100 * first.change:+z.1f} %, but {late}: more than --horizon")
    if best.strategy == "free":
        notes.append("free solves afresh every window, which no command does by itself: solve and export as often on "
                     "new traces; gemopt watch follows with few moves")  # fmt: skip
    if horizon is not None and horizon > steps // 2:
        notes.append(f"the horizon is {horizon} steps, {steps // 2} could be scored: drift beyond them is not in this")
    return notes


def _about_duplication(best: Option, first: Option, options: list[Option]) -> list[str]:
    """What nobody runs yet, where it is recommended since it was asked for, or would be: then it is `first`."""
    if not first.strategy.startswith(PREFIX):
        return []
    if first.strategy == best.strategy:
        able = min((each for each in options if each.strategy in PLAIN), key=lambda each: each.change)
        more = f"; of what they run, {able.strategy} changes {100 * able.change:+z.1f} %"
    else:
        more = f": without --predictors it is no choice; {first.strategy} would change {100 * first.change:+z.1f} %"
    return [f"duplication per batch is judged by replay only, our executor and engines do not run it so{more}"]


def _commands(case: Case, best: Option, names: tuple[str, ...], chosen: Sequence[str]) -> list[str]:
    """What to run next. chosen: options of both a replay and a solve."""
    profile, traces, *hidden = map(shlex.quote, names)
    more, slots = "".join(f" {shlex.quote(word)}" for word in chosen), best.slots_per_rank
    spare = f" --slots-per-rank {','.join(map(str, slots))}" if slots != case.bare_G.tolist() else ""
    tried = ",".join(dict.fromkeys(("contiguous", best.strategy)))
    again = f"gemopt replay {traces} --profile {profile} --strategies {tried} --fit {case.fit:.6g}"
    costs = case.migration
    again += f" --window {case.window} --bandwidth {costs.bytes_per_s / 1e9:.6g} --non-moe-us {case.non_moe_us:.6g}"
    again += f" --expert-bytes {costs.expert_bytes:.10g}{spare}{more}" + "".join(f" --hidden {path}" for path in hidden)
    if best.strategy == "contiguous":
        return [again]
    solve = f"gemopt solve {profile} {traces} -o placement.json{spare}{more}"
    if best.strategy != "controller":
        return [again, solve]
    watch = f"gemopt watch TRACES_FOLDER --profile {profile} --placement placement.json"
    usual = Migration.of(case.profile).model_dump()
    priced = {name: costs.model_dump()[name] for name in PRICED if costs.model_dump()[name] != usual[name]}
    policy = [f"echo {shlex.quote(json.dumps(priced))} > prices.json"] * bool(priced)
    return [again, solve, *policy, watch + " --policy prices.json" * bool(priced)]
