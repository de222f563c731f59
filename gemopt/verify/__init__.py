"""Check a certificate from the documents alone, sharing no code with what made it.

What the cost model says of the profile is the question, not the answer: it is fitted again by `gemopt.costs`. All
else, loads, latencies, floors, bounds and search, is written here and in the modules beside once more.
Times are whole picoseconds, rounded down for bounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemopt.certificate import Certificate, LayerProof, Proof, counts_digest
from gemopt.costs import fit
from gemopt.exceptions import InputError
from gemopt.profile import Profile
from gemopt.traces import Traces
from gemopt.verify.case import SAME, Case, IntArray, floor_bound_us, objective_us
from gemopt.verify.columns import check_columns, no_better_contents
from gemopt.verify.copies import check_copies
from gemopt.verify.dual import check_dual
from gemopt.verify.shares import sent, shares
from gemopt.verify.tree import no_better
from gemopt.verify.tree_copies import no_better_copies

MOST_NODES = 200_000


@dataclass(frozen=True)
class LayerCheck:
    """One layer: objective, the bound checked here and the one that is only claimed, and how it was checked."""

    layer_id: int
    proof: Proof
    objective_us: float
    checked_us: float
    claimed_us: float
    note: str = ""


@dataclass(frozen=True)
class Verified:
    """What holds: sums over the layers, in microseconds."""

    layers: list[LayerCheck]

    @property
    def objective_us(self) -> float:
        """Summed makespan of the placement, computed here."""
        return sum(layer.objective_us for layer in self.layers)

    @property
    def checked_us(self) -> float:
        """What no placement falls below, checked here."""
        return sum(layer.checked_us for layer in self.layers)

    @property
    def checked_gap(self) -> float:
        """`(objective - checked bound) / objective`: what may be called certified."""
        return 1 - self.checked_us / max(self.objective_us, 1e-300)

    @property
    def claimed_gap(self) -> float:
        """The same of the bound that is claimed."""
        return 1 - self.claimed_us / max(self.objective_us, 1e-300)

    @property
    def claimed_us(self) -> float:
        """What the solvers say no placement falls below."""
        return sum(layer.claimed_us for layer in self.layers)


def verify(
    path: str | os.PathLike[str],
    profile: Profile,
    traces: Traces,
    *,
    most_nodes: int = MOST_NODES,
    progress: Callable[[str], None] = lambda line: None,
) -> Verified:
    """Check a certificate against the profile and the traces it is about.

    Raises
    ------
    InputError
        Naming the check that failed: a file that is not whole, another problem's certificate, an edited one, a
        placement that is not feasible, an objective or a bound that is not what it says.
    """
    certificate = Certificate.load(path)
    _check_digests(certificate, profile, traces)
    duals = certificate.duals(path)
    cost, _ = fit(profile, model=certificate.cost)
    slots_G = _slots(certificate)
    ids = [layer.layer_id for layer in certificate.layers]
    if ids != list(traces.layer_ids) or len(slots_G) != len(cost.latencies):
        raise InputError(
            "Certificate.layers",
            ids,
            f"layers {list(traces.layer_ids)} on {len(cost.latencies)} ranks",
            "another problem's",
        )
    checks: list[LayerCheck] = []
    nodes_G = np.array(profile.node_of_rank, np.int64)
    for index, layer in enumerate(certificate.layers):
        sent_TGE = sent(traces, index, len(slots_G)) if certificate.senders == "traces" else None
        case = Case(traces.counts[:, index].astype(np.int64), cost, slots_G, certificate.split, nodes_G, sent_TGE)
        checks.append(_check_layer(case, layer, duals, most_nodes))
        progress(f"layer {layer.layer_id}: {checks[-1].proof.value}")
    found = Verified(checks)
    for name, said, here in (
        ("objective_us", certificate.objective_us, found.objective_us),
        ("bound_us", certificate.bound_us, found.claimed_us),
        ("gap", certificate.gap, 1 - found.claimed_us / max(found.objective_us, 1e-300)),
    ):
        if abs(said - here) > SAME * max(abs(here), 1.0):
            raise InputError(f"Certificate.{name}", said, f"{here!r}, from its layers", "the certificate was edited")
    return found


def _slots(certificate: Certificate) -> IntArray:
    """[G] slots of each rank; every layer has as many."""
    slots = certificate.slots_per_rank
    short = next((layer for layer in certificate.layers if len(layer.row) != sum(slots)), None)
    if min(slots, default=0) < 0 or short is not None:
        found = f"{slots} beside {len(short.row)} slots of layer {short.layer_id}" if short is not None else slots
        raise InputError("Certificate.slots_per_rank", found, "counts >= 0 that sum to the slots of every layer")
    return np.array(slots, dtype=np.int64)


def _check_digests(certificate: Certificate, profile: Profile, traces: Traces) -> None:
    for name, said, here in (
        ("profile_sha256", certificate.profile_sha256, profile.digest()),
        ("traces_sha256", certificate.traces_sha256, counts_digest(traces, certificate.senders)),
    ):
        if said != here:
            raise InputError(f"Certificate.{name}", said, f"{here} is what was given", "it is of another problem")
    if certificate.own_sha256 != certificate.own_digest():
        raise InputError("Certificate.own_sha256", certificate.own_sha256, "the digest of its content", "it was edited")


def _check_layer(case: Case, layer: LayerProof, duals: dict[str, IntArray], most_nodes: int) -> LayerCheck:
    row_P = _feasible(case, layer)
    found_us = objective_us(case, row_P, shares(case, layer, duals))
    name = f"Certificate.layers[{layer.layer_id}]"
    if abs(found_us - layer.objective_us) > SAME * max(found_us, 1.0):
        raise InputError(
            f"{name}.objective_us", layer.objective_us, f"{found_us!r}, from the placement", "it was edited"
        )
    if layer.bound_us > found_us * (1 + SAME):
        raise InputError(f"{name}.bound_us", layer.bound_us, f"at most the objective, {found_us!r}")
    checked_us, note = floor_bound_us(case), "floors of the steps"
    if layer.dual_us is not None:
        dual_us = check_dual(case, layer, duals)
        _check_bound(f"{name}.dual_us", layer.dual_us, dual_us, found_us)
        if dual_us > checked_us:
            checked_us, note = dual_us, "multipliers checked"
    if layer.copies_us is not None:
        copies_us = check_copies(case, layer, duals)
        _check_bound(f"{name}.copies_us", layer.copies_us, copies_us, found_us)
        if copies_us > checked_us:
            checked_us, note = copies_us, "multipliers of copies checked"
    if layer.proof is Proof.DUAL and layer.bound_us > checked_us * (1 + 1e3 * SAME):
        raise InputError(f"{name}.bound_us", layer.bound_us, f"{checked_us!r}, which is proven", "it was edited")
    search: tuple[int, float | None] | None = None
    if layer.columns_us is not None:
        contents = check_columns(case, layer, duals)
        _check_bound(f"{name}.columns_us", layer.columns_us, contents.bound_us, found_us)
        if contents.bound_us > checked_us:
            checked_us, note = contents.bound_us, "contents of ranks priced again"
        if layer.bound_us > checked_us * (1 + 1e3 * SAME):
            search = no_better_contents(case, contents, layer.bound_us, most_nodes)
    elif layer.proof is Proof.TREE:
        search = (no_better_copies if case.spare else no_better)(case, layer.bound_us, most_nodes)
    if search is not None:
        nodes, better = search
        if better is not None:
            raise InputError(
                f"{name}.bound_us", layer.bound_us, f"a placement of {better!r} us exists", "it is no bound"
            )
        if nodes < most_nodes:
            checked_us, note = layer.bound_us * (1 - SAME), f"searched again, {nodes} nodes"
        else:
            note += f"; the search did not end within {most_nodes} nodes"
    return LayerCheck(layer.layer_id, layer.proof, found_us, min(checked_us, found_us), layer.bound_us, note)


def _check_bound(name: str, said_us: float, here_us: float, found_us: float) -> None:
    """What multipliers prove is what was said, and no more than the placement is worth."""
    if abs(here_us - said_us) > SAME * max(abs(here_us), 1.0):
        raise InputError(name, said_us, f"{here_us!r}, from the multipliers", "it was edited")
    if here_us > found_us:
        raise InputError(name, here_us, f"at most the objective, {found_us!r}")


def _feasible(case: Case, layer: LayerProof) -> IntArray:
    """The row, when it holds every expert and none twice on a rank."""
    name, experts = f"Certificate.layers[{layer.layer_id}].row", case.counts_TE.shape[1]
    strange = next((expert for expert in layer.row if not -1 <= expert < experts), None)
    if strange is not None:
        raise InputError(name, strange, f"experts below {experts}, or -1")
    owner_P, row_P = np.repeat(np.arange(len(case.slots_G)), case.slots_G), np.array(layer.row, dtype=np.int64)
    held = row_P >= 0
    if set(row_P[held].tolist()) != set(range(experts)):
        raise InputError(name, "an expert is missing", "every expert has a slot")
    if len(set(zip(owner_P[held].tolist(), row_P[held].tolist(), strict=True))) < held.sum():
        raise InputError(name, "an expert twice on a rank", "at most one copy of an expert per rank")
    return row_P
