"""From a call's run to its certificate: placements, bounds, and multipliers as whole numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemopt.bounds import CopiesProof, Together
from gemopt.bounds.dual_bound import prices
from gemopt.certificate import UNIT, Certificate, IntArray, LayerProof, Proof, Senders, counts_digest
from gemopt.costs import CostModel, fit
from gemopt.exceptions import InputError
from gemopt.placement import EMPTY, Placement, Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.result import LayerResult, Result, StoppedBy
from gemopt.solvers.base import Options
from gemopt.solvers.exact.column_space import Proven
from gemopt.solvers.exact.share_tree import Covered, bound_of_copies
from gemopt.solving.layers import Layer
from gemopt.splits import optimal_shares
from gemopt.traces import Traces
from gemopt.verify import MOST_NODES
from gemopt.verify.case import MOST_PS, PS, SAME, Case, floor_bound_us, objective_us
from gemopt.verify.columns import LARGEST_PRICE, PART_BITS, check_columns, listed, scanned
from gemopt.verify.copies import check_copies
from gemopt.verify.dual import check_dual, slack, units
from gemopt.verify.share_contents import shared
from gemopt.verify.shares import shares

FALLBACK_S = 5.0


@dataclass(frozen=True)
class Certified:
    """A certificate and the multipliers that go beside it."""

    certificate: Certificate
    duals: dict[str, IntArray]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write both files."""
        self.certificate.write(path, self.duals)


def certify(
    result: Result, layers: Sequence[Layer], profile: Profile, traces: Traces, cost: CostModel, stop: Callable[[], bool]
) -> Certified:
    """The certificate of a result, and the multipliers that go beside it.

    It is one of all placements: under rules, what the solver proved of those that keep them is not in it. Once `stop`
    says so, no more bounds are looked for.

    Raises
    ------
    InputError
        There is no placement, moves have a price or limits, or the cost model is none that `fit` makes of the profile.
    """
    if result.placement is None or any(layer.problem.moves is not None for layer in layers):
        raise InputError(
            "certificate", "moves" if result.placement else "no placement", "placements without moves only"
        )
    _check_cost(profile, cost)
    first = layers[0].problem
    split = first.split if first.spare_slots else Split.EVEN
    senders: Senders = "uniform" if split is not Split.NEAREST or first.senders_TGE is None else "traces"
    proofs: list[LayerProof] = []
    duals: dict[str, IntArray] = {}
    for index, (layer, found) in enumerate(zip(layers, result.per_layer, strict=True)):
        case = _case(layer.problem, cost)
        proof = _placed(case, layer, found, result.placement, index, duals)
        value, outcome = proof.objective_us, layer.outcome
        if outcome is not None and outcome.searched_nodes is not None:
            proof = proof.model_copy(update={"proof": Proof.TREE})
        if layer.together is not None and not layer.problem.spare_slots:
            proof = _with_dual(case, proof, layer.together, duals)
        known = None if outcome is None else outcome.columns
        if outcome is not None and (outcome.searched_nodes or 0) > MOST_NODES and case.spare and shared(case):
            known = _fallback(layer.problem, np.array(proof.row), stop)
        fits = shared(case) if isinstance(known, Covered) else not case.spare
        if outcome is not None and isinstance(known, Proven | Covered) and fits:
            if outcome.stopped_by is not StoppedBy.PROOF and isinstance(known, Proven):  # no search to repeat
                proof = proof.model_copy(
                    update={"bound_us": max(proof.dual_us or 0.0, min(floor_bound_us(case), value))}
                )
            proof = _with_columns(case, proof, known, duals)
        elif layer.contents is not None and proof.proof is not Proof.TREE and (listed(case) or scanned(case)):
            if proof.bound_us <= layer.contents.bound_us:  # it is theirs, as the certificate will say
                floors_us = min(floor_bound_us(case), value)
                proof = proof.model_copy(update={"bound_us": max(proof.dual_us or 0.0, floors_us)})
            proof = _with_columns(case, proof, layer.contents, duals)
        if layer.copies is not None:
            proof = _with_copies(case, proof, layer.copies, duals)
        checked_us = max(proof.dual_us or 0.0, proof.copies_us or 0.0, floor_bound_us(case))
        if proof.proof is Proof.CLAIMED and checked_us >= proof.bound_us * (1 - 1e2 * SAME):
            proof = proof.model_copy(update={"proof": Proof.DUAL})
        proofs.append(proof)
    total, bound = sum(p.objective_us for p in proofs), sum(p.bound_us for p in proofs)
    certificate = Certificate(
        objective_us=total,
        bound_us=bound,
        gap=1 - bound / max(total, 1e-300),
        cost=cost.name,
        slots_per_rank=first.slots_per_rank.tolist(),
        split=split.value,
        senders=senders,
        layers=proofs,
        profile_sha256=profile.digest(),
        traces_sha256=counts_digest(traces, senders),
    )
    return Certified(certificate, duals)


def _case(problem: Problem, cost: CostModel) -> Case:
    """A layer's problem as the verifier states it."""
    split = problem.split.value if problem.spare_slots else "even"
    sent_TGE = None if split != "nearest" or problem.senders_TGE is None else problem.senders_TGE.astype(np.int64)
    return Case(problem.counts_TE.astype(np.int64), cost, problem.slots_per_rank, split, problem.node_of_rank, sent_TGE)


def _placed(
    case: Case, layer: Layer, found: LayerResult, placement: Placement, index: int, duals: dict[str, IntArray]
) -> LayerProof:
    """A layer's placement, what it is worth with its weights or shares, and its bound, of which nothing is proven."""
    row_P, weights, mine = placement.physical_to_logical[index], [], {}
    shared_P = (row_P != EMPTY) & (np.bincount(row_P[row_P != EMPTY])[row_P] > 1)
    if case.split == "static" and placement.split_weights is not None:
        weights = placement.split_weights[index].tolist()
    if case.split == "optimal" and shared_P.any():
        mine[f"part.{found.layer_id}"] = np.ascontiguousarray(optimal_shares(layer.problem, row_P)[:, shared_P])
    placed = LayerProof(
        layer_id=found.layer_id, proof=Proof.CLAIMED, row=row_P.tolist(), weights=weights, objective_us=0, bound_us=0
    )
    value = objective_us(case, row_P, shares(case, placed, mine))
    duals.update(mine)
    bound_us = max(_of_all_placements(layer, found), floor_bound_us(case))  # its own may have been cut
    return placed.model_copy(update={"objective_us": value, "bound_us": min(bound_us, value)})


def _of_all_placements(layer: Layer, found: LayerResult) -> float:
    """A bound in microseconds of placements that keep rules and of those that do not, as a certificate states it."""
    return found.bound_us or 0.0 if layer.problem.rules is None else layer.bound_us


def _check_cost(profile: Profile, cost: CostModel) -> None:
    """Refuse a cost model that nobody can make of the profile again."""
    try:
        again, _ = fit(profile, model=cost.name)
    except InputError:
        again = None
    points = [(c.x.tobytes(), c.y.tobytes(), c.slope) for each in cost.latencies for term in each.terms for c in term]
    if again is None or points != [
        (c.x.tobytes(), c.y.tobytes(), c.slope) for each in again.latencies for term in each.terms for c in term
    ]:
        raise InputError("certificate", cost.name, "a cost model as fitted to the profile", "name one, as --cost does")


def _fallback(problem: Problem, row_P: IntArray, stop: Callable[[], bool]) -> Covered | None:
    """What contents prove, until stopped, where a search with copies has more nodes than the verifier looks at."""
    with Options.lasting(FALLBACK_S, stop=stop).alarm() as stopped:
        search = bound_of_copies(problem, row_P, np.inf, stopped)
    return None if search is None or search.bound_us <= 0 else search.covered()


def _with_columns(case: Case, proof: LayerProof, known: Proven | Covered, duals: dict[str, IntArray]) -> LayerProof:
    """The proof with its multipliers of all contents of a rank, rounded."""
    if isinstance(known, Covered):
        levels_LT, mu, pi = known.floor_T[None], known.mu_NET, known.pi_NE
    else:
        levels_LT, mu, pi = known.levels_LT, known.mu_LET, known.pi_E
    floor_LT = np.floor(np.minimum(levels_LT * PS, MOST_PS // len(case.counts_TE)))
    levels = np.maximum.accumulate(floor_LT.astype(np.int64))
    levels[0] = np.minimum(levels[0], case.floors_T)
    most = float(LARGEST_PRICE)  # any prices prove a bound
    mine = {
        f"level.{proof.layer_id}": levels,
        f"share.{proof.layer_id}": np.ascontiguousarray(np.floor(mu * UNIT), np.int64),
        f"price.{proof.layer_id}": np.round(pi * PS * (1 << PART_BITS)).clip(-most, most).astype(np.int64),
    }
    if isinstance(known, Covered):
        mine[f"copies.{proof.layer_id}"] = np.stack([known.low_NE, known.high_NE], axis=1).astype(np.int64)
    columns_us = check_columns(case, proof, mine).bound_us
    duals.update(mine)
    best = max(proof.bound_us, min(columns_us, proof.objective_us))
    return proof.model_copy(update={"proof": Proof.COLUMNS, "columns_us": columns_us, "bound_us": best})


def _with_copies(case: Case, proof: LayerProof, known: CopiesProof, duals: dict[str, IntArray]) -> LayerProof:
    """The proof with its multipliers of copies, rounded; its bound is theirs where no more than rounding is between."""
    share_N = np.floor(known.share_N * UNIT).astype(np.int64)
    mine = {
        f"pair.{proof.layer_id}": np.stack([known.step_N, known.expert_N, share_N], axis=1)[share_N > 0],
        f"slot.{proof.layer_id}": np.array([round(known.price * PS)]),
    }
    copies_us = check_copies(case, proof, mine)
    duals.update(mine)
    same = copies_us >= proof.bound_us * (1 - 1e3 * SAME)
    best = min(copies_us, proof.objective_us) if same else proof.bound_us
    return proof.model_copy(update={"copies_us": copies_us, "bound_us": best})


def _with_dual(case: Case, proof: LayerProof, known: Together, duals: dict[str, IntArray]) -> LayerProof:
    """The proof with its multipliers, rounded; as it was where there are none, or none that fit in 63 bits."""
    p, found = known.programme, known.multipliers
    if p is None or found is None or len(p.weights_T) < len(case.counts_TE) or (p.weights_T != 1).any():
        return proof
    mu_TKE, v_CE = found
    wide = {"v": v_CE, "y": prices(p, mu_TKE, v_CE)} | ({} if known.prices_E is None else {"pi": known.prices_E})
    if not all((np.abs(each) * (PS * UNIT) < 2**63).all() for each in wide.values()):
        return proof
    exact = {name: np.round(each * (PS * UNIT)).astype(np.int64) for name, each in wide.items()}
    exact["mu"] = np.ascontiguousarray(np.rint(np.maximum(mu_TKE, 0.0) * UNIT), np.int64)
    over_T = np.maximum(exact["mu"].sum(axis=(1, 2)) - UNIT, 0)
    for t in np.flatnonzero(over_T):
        heaviest = np.unravel_index(exact["mu"][t].argmax(), exact["mu"][t].shape)
        exact["mu"][(t, *heaviest)] -= over_T[t]
    if (exact["mu"] < 0).any():
        return proof
    factor = [units(float(each)) for each in p.factor_G]
    planes = [[[units(float(x) * PS) for x in plane] for plane in group] for group in p.planes_CKF]
    busy = np.flatnonzero(case.slots_G)
    for index, g in enumerate(busy):
        for plane in planes[p.group_G[index]]:
            low = slack(case, int(g), plane, factor[index])
            if low < 0:  # rounding has put it above: lower it by as much, and one more
                plane[0] -= int(-low * UNIT * UNIT / factor[index]) + 1
    mine = {f"{name}.{proof.layer_id}": array for name, array in exact.items()}
    stated = proof.model_copy(update={"planes": planes, "group": p.group_G.tolist(), "factor": factor})
    dual_us = check_dual(case, stated, mine)
    duals.update(mine)
    best = max(proof.bound_us, min(dual_us, proof.objective_us))
    return stated.model_copy(update={"dual_us": dual_us, "bound_us": best})
