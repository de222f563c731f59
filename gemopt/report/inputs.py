"""What a report is made of, read and held against each other before anything is drawn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemopt.certificate import counts_digest
from gemopt.costs import CostModel, fit
from gemopt.documents import Document, read_json, sha256
from gemopt.evaluate import Evaluation, check_agreement, evaluate
from gemopt.exceptions import InputError, check_kind
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.replay.result import ReplayResult
from gemopt.result import Result
from gemopt.splits.senders import Senders
from gemopt.traces import Traces

AGREES = 1e-6  # relative: a result's objective is that of its own traces to this much
Source = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that a report shows or is computed from.

    Attributes
    ----------
    placement, result
        What is reported, and the result that it came in, when it came in one.
    fitted, held
        Steps that the answer was made on (all given ones, where that is not known), and steps that it did not see.
    known
        Whether it is known that the answer was made on `fitted`.
    before, before_name
        What it is compared with, and in words.
    cost, cost_summary
        The cost model of all latencies here, and how far it is off.
    replay
        A replay of strategies on recorded traffic, when one was given.
    replay_of
        What the replay is of that the page is not: `other traces`, `another profile`.
    senders
        Whose the assignments are, for copies that share by the `nearest` split.
    digests
        sha256 of every file, or of the canonical form of a document that came as an object, by name.
    """

    placement: Placement
    result: Result | None
    profile: Profile
    fitted: Traces
    held: Traces | None
    known: bool
    before: Placement
    before_name: str
    cost: CostModel
    cost_summary: str
    replay: ReplayResult | None = None
    replay_of: tuple[str, ...] = ()
    senders: Senders | str | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def evaluate(self, placement: Placement, traces: Traces) -> Evaluation:
        """What a placement costs on these steps, on these devices."""
        return evaluate(placement, self.profile, traces, cost=self.cost, senders=self.senders)


def gather(
    answer: Result | Placement | Source,
    profile: Profile | Source,
    traces: Traces | Source,
    *,
    baseline: Result | Placement | Source | None = None,
    holdout: Traces | Source | None = None,
    replay: ReplayResult | Source | None = None,
    cost: str | None = None,
    senders: Senders | str | None = None,
    choose: Callable[[Traces], Traces] = lambda traces: traces,
) -> Inputs:
    """Read what was given and refuse what does not belong together.

    Parameters
    ----------
    baseline
        What the answer is compared with; contiguous placement when None.
    holdout
        Steps that the solver did not see. Where a result was made on the first of the given steps, the others are.
    cost
        Cost model; that of the result, or `auto`, when None.
    senders
        Who sends the assignments, where copies share by the `nearest` split; see `gemopt.evaluate`.
    choose
        Applied to both traces: the steps of one task or phase.

    Raises
    ------
    InputError
        The result is of other traces or another profile, has no placement, or the documents are of another network.
    """
    digests = _digests(answer=answer, profile=profile, traces=traces, baseline=baseline, holdout=holdout, replay=replay)
    found, placement = read_answer(answer)
    measured, steps = Profile.of(profile), choose(Traces.of(traces))
    check_agreement(placement, steps, measured)
    chosen = cost if cost is not None else (found.cost if found is not None else "") or "auto"
    model, report = fit(measured, model=chosen)
    Senders.asked_by(senders, placement.split)
    fitted, rest = (steps, None) if found is None else _own_steps(found, placement, measured, steps, model, senders)
    held = rest if holdout is None else choose(Traces.of(holdout))
    if held is not None:
        check_agreement(placement, held, measured)
    if holdout is not None and held is not None and (known := _known(held, fitted)) * 2 > held.num_steps:
        said = f"{known} of {held.num_steps} steps are among those given as --traces"
        raise InputError("--holdout", said, "steps that the solver did not see")
    before, name = _before(baseline, steps, placement, measured)
    return Inputs(
        placement=placement,
        result=found,
        profile=measured,
        fitted=fitted,
        held=held,
        known=found is not None,
        before=before,
        before_name=name,
        cost=model,
        cost_summary=report.summary(),
        replay=None if replay is None else ReplayResult.of(replay),
        replay_of=() if replay is None else _elsewhere(ReplayResult.of(replay), measured, steps),
        senders=senders,
        digests=digests,
    )


def _elsewhere(replay: ReplayResult, profile: Profile, traces: Traces) -> tuple[str, ...]:
    """See `Inputs.replay_of`; of older documents it is not known."""
    same = {
        "other traces": replay.traces_sha256 in ("", counts_digest(traces)),
        "another profile": replay.profile_sha256 in ("", profile.digest()),
    }
    return tuple(name for name, alike in same.items() if not alike)


def read_answer(given: Result | Placement | Source) -> tuple[Result | None, Placement]:
    """A result and its placement, or a placement alone; a file is told apart by its keys.

    Raises
    ------
    InputError
        The result has no placement.
    """
    check_kind("answer", given, Result, Placement, str, os.PathLike)
    if not isinstance(given, (Result, Placement)):
        keys = read_json(given)
        given = (Placement if isinstance(keys, dict) and "physical_to_logical" in keys else Result).load(given)
    if isinstance(given, Placement):
        return None, given
    if given.placement is None:
        raise InputError("result", given.status.value, "a result with a placement", "there is nothing to draw")
    return given, given.placement


def _own_steps(
    result: Result,
    placement: Placement,
    profile: Profile,
    traces: Traces,
    cost: CostModel,
    senders: Senders | str | None,
) -> tuple[Traces, Traces | None]:
    """The steps that a result was made on, and those after them; refused where they are not among the given ones."""
    if not 1 <= result.num_steps <= traces.num_steps:
        limit = f"the traces have {traces.num_steps} steps of the kind asked for"
        raise InputError("result.num_steps", result.num_steps, limit, "give the traces that it was solved on")
    cut = result.num_steps
    fitted = traces if cut == traces.num_steps else traces.steps(slice(0, cut))
    found = evaluate(placement, profile, fitted, cost=cost, senders=senders).objective_us
    expected = result.objective_us or 0.0
    expected -= 0.0 if result.links is None else result.links.exposed_us
    if abs(found - expected) > AGREES * max(expected, 1e-300):
        raise InputError(
            "result.objective_us",
            f"{expected:.1f}",
            f"its placement takes {found:.1f} us on these {cut} steps and devices: it is of other traces or profiles",
            "give the profile, traces, --task, --phase and --cost that it was solved with",
        )
    return fitted, None if cut == traces.num_steps else traces.steps(slice(cut, None))


def _known(held: Traces, fitted: Traces) -> int:
    """How many steps have the counts of a fitted one."""
    seen = {step.tobytes() for step in fitted.counts.astype(np.int64)}
    return sum(step.tobytes() in seen for step in held.counts.astype(np.int64))


def _before(
    baseline: Result | Placement | Source | None, traces: Traces, placement: Placement, profile: Profile
) -> tuple[Placement, str]:
    if baseline is None:
        layer_ids = list(traces.layer_ids)
        shape = (traces.num_layers, traces.num_experts, placement.num_ranks)
        return Placement.contiguous(*shape, layer_ids=layer_ids), "contiguous placement"
    found = read_answer(baseline)[1]
    if found.num_ranks != profile.num_ranks:
        limit = f"{profile.num_ranks}, as what the page is about"
        raise InputError(
            "baseline", f"{found.num_ranks} ranks", limit, "leave it out: the page tells the moves of a result"
        )
    check_agreement(found, traces, profile)
    file = f" {Path(baseline).name}" if isinstance(baseline, (str, os.PathLike)) else ""
    return found, f"the baseline{file}"


def _digests(**given: Document | Traces | Source | None) -> dict[str, str]:
    found = {}
    for name, each in given.items():
        if isinstance(each, (str, os.PathLike)):
            found[f"the file {Path(each)} ({name})"] = sha256(each) if Path(each).exists() else ""
        elif isinstance(each, Document):
            found[f"the {name}'s content"] = each.digest()
    return {name: digest for name, digest in found.items() if digest}
