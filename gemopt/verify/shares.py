"""What each slot takes of its expert's assignments, as whole numbers, under the split that a certificate names.

Even and static shares follow from the counts, nearest ones from who sends them. Those of the optimal split are stated
beside the certificate, for no search is repeated here: a placement takes no longer than with any shares.
"""

from __future__ import annotations

import numpy as np

from gemopt.certificate import IntArray, LayerProof
from gemopt.exceptions import InputError
from gemopt.latency import FloatArray
from gemopt.traces import Traces
from gemopt.verify.case import Case
from gemopt.verify.dual import array

CLOSE = 1e-6  # to one, of the weights of an expert


def shares(case: Case, layer: LayerProof, duals: dict[str, IntArray]) -> IntArray:
    """[T, P] assignments of every slot of a layer, whose row is feasible.

    Raises
    ------
    InputError
        Weights or shares that are missing, of other shapes or negative, or do not add up.
    """
    row_P = np.array(layer.row, np.int64)
    owner_P = np.repeat(np.arange(len(case.slots_G)), case.slots_G)
    shares_TP = np.where(row_P >= 0, case.counts_TE[:, row_P], 0)
    number_E = np.bincount(row_P[row_P >= 0], minlength=case.counts_TE.shape[1])
    shared_C = np.flatnonzero((row_P >= 0) & (number_E[row_P] > 1))
    weight_P = _weights(case, layer)
    if case.split == "optimal":
        shares_TP[:, shared_C] = _stated(case, layer, duals, len(shared_C))
    for expert in np.flatnonzero(number_E > 1):
        slots, count_T = np.flatnonzero(row_P == expert), case.counts_TE[:, expert]
        if case.split == "even":
            part_TC = (count_T[:, None] + len(slots) - 1 - np.arange(len(slots))) // len(slots)
        elif case.split == "static":
            part_TC = _in_proportion(count_T, weight_P[slots].tolist())
        elif case.split == "nearest":
            part_TC = _nearest(case, int(expert), owner_P[slots])
        else:
            part_TC = shares_TP[:, slots]
        beyond = (part_TC < 0) | (part_TC > count_T[:, None])
        if beyond.any() or (part_TC.sum(axis=1) != count_T).any():
            name = f"Certificate.layers[{layer.layer_id}]: shares"
            raise InputError(name, f"expert {expert}", "whole parts >= 0 of its assignments at every step")
        shares_TP[:, slots] = part_TC
    return shares_TP


def sent(traces: Traces, layer: int, num_ranks: int) -> IntArray:
    """[T, G, E] assignments of one layer by the rank that sends them.

    Raises
    ------
    InputError
        Nothing says which of these ranks sends each token.
    """
    tokens = traces.tokens
    ranks_N = None if tokens is None else tokens.source_rank
    if tokens is None or ranks_N is None or (ranks_N < 0).any() or (ranks_N >= num_ranks).any():
        raise InputError("Traces.source_rank", "nothing" if ranks_N is None else "others", f"ranks below {num_ranks}")
    found_TGE = np.zeros((traces.num_steps, num_ranks, traces.num_experts), np.int64)
    for ids_N in tokens.ids[:, layer].T:
        made = ids_N >= 0
        np.add.at(found_TGE, (tokens.step_of_token[made], ranks_N[made], ids_N[made]), 1)
    return found_TGE


def _weights(case: Case, layer: LayerProof) -> FloatArray:
    """[P] static weights, where the split asks for them."""
    weight_P, row_P = np.array(layer.weights), np.array(layer.row, np.int64)
    if case.split != "static":
        return weight_P
    name = f"Certificate.layers[{layer.layer_id}].weights"
    if weight_P.shape != row_P.shape or (weight_P < 0).any():
        raise InputError(name, f"{len(weight_P)} weights", f"{len(row_P)} weights >= 0")
    sum_E = np.bincount(row_P[row_P >= 0], weight_P[row_P >= 0], case.counts_TE.shape[1])
    if (np.abs(sum_E - 1) > CLOSE).any():
        raise InputError(name, float(sum_E[np.abs(sum_E - 1).argmax()]), "sums of 1 over the copies of every expert")
    return weight_P


def _stated(case: Case, layer: LayerProof, duals: dict[str, IntArray], copies: int) -> IntArray:
    """[T, C] shares of the slots whose experts have others."""
    if not copies:
        return np.zeros((len(case.counts_TE), 0), np.int64)
    part_TC = array(duals, f"part.{layer.layer_id}")
    if part_TC.shape != (len(case.counts_TE), copies):
        name = f"Certificate.layers[{layer.layer_id}]: part"
        raise InputError(name, str(part_TC.shape), f"shares of {copies} slots at {len(case.counts_TE)} steps")
    return part_TC


def _in_proportion(count_T: IntArray, weights: list[float]) -> IntArray:
    """[T, C] rounded cumulated parts of the counts."""
    ends = [0.0]
    for weight in weights[:-1]:
        ends.append(min(1.0, ends[-1] + weight))
    edge_TC: IntArray = np.floor(count_T[:, None] * np.array([*ends, 1.0]) + 0.5).astype(np.int64)
    return np.asarray(edge_TC[:, 1:] - edge_TC[:, :-1])


def _nearest(case: Case, expert: int, rank_C: IntArray) -> IntArray:
    """[T, C] what the ranks send that use each copy: their own, else those of their node, else all, in turn by rank."""
    used = []
    for g, node in enumerate(case.nodes_G):
        own, close = np.flatnonzero(rank_C == g), np.flatnonzero(case.nodes_G[rank_C] == node)
        near = own if len(own) else close if len(close) else np.arange(len(rank_C))
        used.append(int(near[g % len(near)]))
    if case.sent_TGE is None:
        return _in_proportion(case.counts_TE[:, expert], [used.count(c) / len(used) for c in range(len(rank_C))])
    uses_GC = np.array(used)[:, None] == np.arange(len(rank_C))
    return np.asarray(case.sent_TGE[:, :, expert] @ uses_GC)
