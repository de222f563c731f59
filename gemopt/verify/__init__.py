"""Check a certificate from the documents alone, sharing no code with what made it.

What the cost model says of the profile is the question, not the answer: it is fitted again by `gemopt.costs`. All
else, loads, latencies, floors, bounds and search, is written here and in the modules beside once more.
Times are whole picoseconds, rounded down for bounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemopt.certificate import Certificate, LayerProof, Proof, counts_digest
from gemopt.costs import CostModel, fit
from gemopt.exceptions import InputError
from gemopt.latency import Curve
from gemopt.profile import Profile
from gemopt.traces import Traces

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
PS, MOST_PS = 1e6, 1 << 61  # picoseconds in a microsecond; of all steps together: what is longer counts as this
SAFE = 1e-12  # relative: latencies are lowered by more than float64 is off
SAME = 1e-9  # relative: two computations of one number
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


@dataclass(frozen=True, eq=False)
class Case:
    """One layer of the question: counts [T, E], the cost model, slots [G], and how copies share.

    nodes_G: node of each rank. sent_TGE: assignments by the rank that sends them; None where all send alike.
    """

    counts_TE: IntArray
    cost: CostModel
    slots_G: IntArray
    split: str = "even"
    nodes_G: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    sent_TGE: IntArray | None = None

    @cached_property
    def loads_FTE(self) -> IntArray:
        """[F, T, E] features of every expert."""
        return np.stack([feature.of(self.counts_TE).astype(np.int64) for feature in self.cost.features])

    @cached_property
    def spare(self) -> int:
        """Slots beyond one per expert."""
        return int(self.slots_G.sum()) - int(self.counts_TE.shape[1])

    @cached_property
    def most_F(self) -> IntArray:
        """[F] no rank can carry more at any step."""
        return np.asarray(self.loads_FTE.sum(axis=2).max(axis=1) + self.spare)

    def terms(self, g: int, *, low: bool) -> list[list[FloatArray]]:
        """Values in microseconds of every curve of rank g at every whole load; low: of the least of any larger load."""
        return self._low_terms[g] if low else self._exact_terms[g]

    @cached_property
    def like_G(self) -> list[int]:
        """[G] the first rank with the same latency: those share their tables."""
        first: dict[object, int] = {}
        return [first.setdefault(latency.key, g) for g, latency in enumerate(self.cost.latencies)]

    @cached_property
    def _exact_terms(self) -> list[list[list[FloatArray]]]:
        grids = [np.arange(int(most) + 1) for most in self.most_F]
        found: list[list[list[FloatArray]]] = []
        for g, latency in enumerate(self.cost.latencies):
            terms = latency.terms if self.like_G[g] == g else ()
            made = [[value(curve, grid) for curve, grid in zip(term, grids, strict=True)] for term in terms]
            found.append(made or found[self.like_G[g]])
        return found

    @cached_property
    def _low_terms(self) -> list[list[list[FloatArray]]]:
        """Down from what the curve reaches beyond the last whole load: it may still fall to its last point there."""
        found: list[list[list[FloatArray]]] = []
        for g, (latency, tables) in enumerate(zip(self.cost.latencies, self._exact_terms, strict=True)):
            terms = zip(latency.terms, tables, strict=True) if self.like_G[g] == g else ()
            made = [[_least_from(*each) for each in zip(*pair, strict=True)] for pair in terms]
            found.append(made or found[self.like_G[g]])
        return found

    def times_us(self, g: int, loads_F: IntArray, *, low: bool = False) -> FloatArray:
        """Latency of rank g under loads [F, ...] of whole numbers."""
        sums = [
            sum(table[loads] for table, loads in zip(term, loads_F, strict=True)) for term in self.terms(g, low=low)
        ]
        return np.asarray(np.max(np.stack([np.asarray(each) for each in sums]), axis=0))

    def floor_ps(self, times_us: FloatArray) -> IntArray:
        """Whole picoseconds that are surely not above, of which 64 bits hold the sum over the steps."""
        most = MOST_PS // max(1, len(self.counts_TE))
        return np.floor(np.minimum((times_us - SAFE * np.abs(times_us)) * PS, most)).astype(np.int64)

    @cached_property
    def floors_T(self) -> IntArray:
        """[T] picoseconds that no placement's slowest rank stays below: what all ranks hold, and who must share one."""
        ranks = np.flatnonzero(self.slots_G).tolist()
        floors_T = self.carried_ps(ranks)[self.loads_FTE[0].sum(axis=1)]
        if self.spare == 0 and len({int(self.slots_G[g]) for g in ranks}) == 1:
            fastest = np.minimum.reduce([self.alone_ps(g) for g in {self.like_G[g] for g in ranks}])
            floors_T = np.maximum(floors_T, self._shared_T(fastest, len(ranks)))
        return np.asarray(floors_T)

    def alone_ps(self, g: int) -> IntArray:
        """Picoseconds that rank g takes at least under every whole load of the first feature, or any larger one."""
        first = np.arange(int(self.most_F[0]) + 1)
        rest = [np.zeros_like(first)] * (len(self.most_F) - 1)
        return self.floor_ps(self.times_us(g, np.stack([first, *rest]), low=True))

    def carried_ps(self, ranks: list[int]) -> IntArray:
        """Picoseconds before which ranks do not carry so much of the first feature together: from nothing on.

        That is the n-th of the times that one unit more takes on any of them; alike ranks are looked at once.
        """
        kinds = sorted({self.like_G[g] for g in ranks})
        number_K = np.array([sum(self.like_G[g] == kind for g in ranks) for kind in kinds])
        alone = [self.alone_ps(kind) for kind in kinds]
        idle, one_more = max(int(each[0]) for each in alone), np.concatenate([each[1:] for each in alone])
        most = len(one_more) // len(kinds)
        order = np.argsort(one_more, kind="stable")
        carried_N = np.cumsum(np.repeat(number_K, most)[order])
        held_N = one_more[order[np.searchsorted(carried_N, np.arange(1, most + 1))]]
        return np.append(idle, np.maximum(held_N, idle))

    def _shared_T(self, fastest: IntArray, ranks: int) -> IntArray:
        """Of the (q - 1) G + 1 largest experts, q share a rank, which is full of the smallest of the others."""
        size, sorted_TE = int(self.slots_G.max()), np.sort(self.loads_FTE[0], axis=1)
        best_T = np.zeros(len(sorted_TE), np.int64)
        for q in range(1, size + 1):
            top_TM = sorted_TE[:, sorted_TE.shape[1] - ((q - 1) * ranks + 1) :]
            load_T = top_TM[:, :q].sum(axis=1) + sorted_TE[:, : size - q].sum(axis=1)
            best_T = np.maximum(best_T, fastest[load_T])
        return best_T


def value(curve: Curve, loads: IntArray) -> FloatArray:
    """A piecewise-linear curve at whole loads, and beyond its last point along its slope."""
    inside = np.interp(loads, curve.x, curve.y)
    return np.asarray(np.where(loads > curve.x[-1], curve.y[-1] + curve.slope * (loads - curve.x[-1]), inside))


def _least_from(curve: Curve, table: FloatArray) -> FloatArray:
    beyond = curve.y[curve.x >= len(table) - 1]
    least = min(float(table[-1]), float(beyond.min()) if len(beyond) else np.inf)
    return np.asarray(np.minimum.accumulate(np.append(table, least)[::-1])[::-1][:-1])


def floor_bound_us(case: Case) -> float:
    """What the floors of the steps prove, in microseconds; rounded down."""
    return float(case.floors_T.sum()) / PS * (1 - SAME)


def objective_us(case: Case, row_P: IntArray, shares_TP: IntArray) -> float:
    """Summed makespan in microseconds of a row whose slots take these shares."""
    owner_P = np.repeat(np.arange(len(case.slots_G)), case.slots_G)
    loads_GFT = np.zeros((len(case.slots_G), *case.loads_FTE.shape[:2]), np.int64)
    for slot in np.flatnonzero(row_P >= 0):
        for f, feature in enumerate(case.cost.features):
            loads_GFT[owner_P[slot], f] += feature.of(shares_TP[:, slot]).astype(np.int64)
    return float(np.max([case.times_us(g, loads_GFT[g]) for g in range(len(case.slots_G))], axis=0).sum())


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
    from gemopt.verify.shares import sent

    certificate = Certificate.load(path)
    _check_digests(certificate, profile, traces)
    duals = certificate.duals(path)
    cost, _ = fit(profile, model=certificate.cost)
    slots_G = np.array(certificate.slots_per_rank, dtype=np.int64)
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
    from gemopt.verify.columns import check_columns, no_better_contents
    from gemopt.verify.copies import check_copies
    from gemopt.verify.dual import check_dual
    from gemopt.verify.shares import shares
    from gemopt.verify.tree import no_better
    from gemopt.verify.tree_copies import no_better_copies

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
    name, row_P = f"Certificate.layers[{layer.layer_id}].row", np.array(layer.row, dtype=np.int64)
    owner_P = np.repeat(np.arange(len(case.slots_G)), case.slots_G)
    experts = case.counts_TE.shape[1]
    if row_P.shape != owner_P.shape or (row_P < -1).any() or (row_P >= experts).any():
        raise InputError(name, f"{len(row_P)} slots", f"{len(owner_P)} slots of experts below {experts}, or -1")
    held = row_P >= 0
    if set(row_P[held].tolist()) != set(range(experts)):
        raise InputError(name, "an expert is missing", "every expert has a slot")
    if len(set(zip(owner_P[held].tolist(), row_P[held].tolist(), strict=True))) < held.sum():
        raise InputError(name, "an expert twice on a rank", "at most one copy of an expert per rank")
    return row_P
