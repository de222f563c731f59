"""Pictures of the experts: classes by layer, and which are hot in the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from gemopt.conflicts import ExpertClass, classify, correlation, excess_coload, shares, significant
from gemopt.latency import FloatArray, IntArray
from gemopt.placement import Placement
from gemopt.report.inputs import Inputs
from gemopt.report.style import (
    AFTER,
    ALL_LAYERS,
    BEFORE,
    BOUND,
    LAYERS,
    SKY,
    SLOWEST,
    Section,
    changes,
    figure,
    graph_objects,
    small,
)

EDGES = 200  # drawn of one layer, the strongest
LOOKS = {
    ExpertClass.CONSISTENT: (SLOWEST, "square", ""),
    ExpertClass.TEMPORAL: (AFTER, "diamond", "/"),
    ExpertClass.ORDINARY: (BOUND, "circle-open", "."),
}


@dataclass(frozen=True, eq=False)
class LayerConflicts:
    """One layer: classes and shares [E], the strongest conflicts [N, 2], and where the experts are drawn.

    place: [E, 2], NaN for ordinary experts without such a conflict, which are not drawn.
    """

    classes: list[ExpertClass]
    share_E: FloatArray
    place: FloatArray
    pairs: IntArray
    num_pairs: int


def layer_conflicts(counts_TE: NDArray[Any]) -> LayerConflicts:
    """As `gemopt.conflicts.conflict_graph` says it, for drawing."""
    excess_EE = excess_coload(counts_TE)
    correlation_EE = correlation(excess_EE)
    strong_EE = np.triu(significant(excess_EE, len(counts_TE)) & (correlation_EE > 0), 1)
    pairs = np.argwhere(strong_EE)
    values = correlation_EE[strong_EE]
    most = np.argsort(-values, kind="stable")[:EDGES]
    classes = classify(counts_TE)
    return LayerConflicts(
        classes=classes,
        share_E=shares(counts_TE) * counts_TE.shape[1],
        place=_places(classes, pairs[most], values[most]),
        pairs=pairs[most],
        num_pairs=len(pairs),
    )


def _places(classes: list[ExpertClass], pairs: IntArray, correlations: FloatArray) -> FloatArray:
    """[E, 2] by springs along the conflicts (Fruchterman and Reingold, 1991), and hot experts without one around them.

    The springs are stretched to fill a square.
    """
    place_E2 = np.full((len(classes), 2), np.nan)
    graph: Any = nx.Graph()
    graph.add_weighted_edges_from((int(i), int(j), float(c)) for (i, j), c in zip(pairs, correlations, strict=True))
    for expert, at in nx.spring_layout(graph, k=0.4, weight=None, seed=0, iterations=60).items():
        place_E2[expert] = at
    if graph:
        low, high = np.nanmin(place_E2, axis=0), np.nanmax(place_E2, axis=0)
        place_E2 = 2 * (place_E2 - low) / np.maximum(high - low, 1e-9) - 1
    alone = [e for e, kind in enumerate(classes) if kind is not ExpertClass.ORDINARY and e not in graph]
    angle = 2 * np.pi * np.arange(len(alone)) / max(1, len(alone))
    place_E2[alone] = 1.25 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return place_E2


def classes(inputs: Inputs, layers: list[LayerConflicts]) -> Section:
    """How many experts of each class every layer has."""
    go = graph_objects()
    names = [str(i) for i in inputs.fitted.layer_ids]
    traces = []
    for kind, (colour, _, shape) in LOOKS.items():
        count = np.array([sum(each is kind for each in layer.classes) for layer in layers])
        if kind is ExpertClass.ORDINARY:
            continue
        traces.append(go.Bar(x=names, y=small(count), name=kind.value, marker={"color": colour, "pattern": {
            "shape": shape}}, hovertemplate="layer %{x}: %{y}<extra>%{fullData.name}</extra>"))  # fmt: skip
    shown = figure(*traces, barmode="stack", height=300, xaxis=LAYERS,
                   yaxis={"title": "experts", "rangemode": "tozero"})  # fmt: skip
    experts = inputs.fitted.num_experts
    text = (
        f"Of {experts} experts in a layer. Consistent: hot (1.5 times an equal share) in three quarters of the time. "
        "Temporal: in bursts, beyond chance. The rest is ordinary."
    )
    return Section("classes", "Classes of experts", text, shown)


def conflicts(inputs: Inputs, layers: list[LayerConflicts]) -> Section:
    """Experts of a layer, those that are hot together side by side, with the strongest conflicts."""
    if not any(layer.num_pairs for layer in layers):
        return Section("conflicts", "Conflict graph", "No two experts are loaded in the same steps beyond chance.")
    names = [f"layer {layer_id}" for layer_id in inputs.fitted.layer_ids]
    worst = int(np.argmax([layer.num_pairs for layer in layers]))
    drawn = {name: changes(*_graph(layer, inputs.placement, i))
             for i, (name, layer) in enumerate(zip(names, layers, strict=True))}  # fmt: skip
    choices = {ALL_LAYERS: drawn[names[worst]], **drawn}
    hidden = {"visible": False, "range": [-1.35, 1.35]}
    shown = figure(*_graph(layers[worst], inputs.placement, worst), height=560, xaxis=hidden,
                   yaxis=hidden, margin={"l": 8, "r": 8, "t": 28, "b": 8})  # fmt: skip
    most = layers[worst].num_pairs
    drawn_pairs = f"The {EDGES} strongest of a layer are" if most > EDGES else "All are"
    text = (
        "Lines join experts that are loaded in the same steps beyond chance: on one rank they make a straggler. "
        f"{drawn_pairs} drawn; hot experts without one stand around, other ordinary ones are left out. "
        f"Size is the share of the load. Without a layer chosen this is {names[worst]}, "
        f"which has the most such pairs ({most})."
    )
    return Section("conflicts", "Conflict graph", text, shown, choices, "layer")


def _graph(layer: LayerConflicts, placement: Placement, index: int) -> list[Any]:
    go = graph_objects()
    place_E2, drawn_E = layer.place, np.isfinite(layer.place[:, 0])
    traces = []
    half = np.array_split(np.arange(len(layer.pairs)), 2)
    for chosen, width, colour in ((half[0], 2.0, BEFORE), (half[1], 0.8, SKY)):
        ends = place_E2[layer.pairs[chosen]]  # [N, 2, 2]
        gaps = np.full((len(chosen), 1, 2), np.nan)
        path = np.concatenate([ends, gaps], axis=1).reshape(-1, 2)
        name = "strongest half" if width > 1 else "weaker half"
        traces.append(go.Scatter(x=small(path[:, 0]), y=small(path[:, 1]), mode="lines", name=name, hoverinfo="skip",
                                 opacity=0.6, line={"width": width, "color": colour}))  # fmt: skip
    holders = _holders(placement, index)
    told = "expert %{customdata[0]} on rank %{text}: %{customdata[1]:.1f} times an equal share<extra>"
    for kind, (colour, symbol, _) in LOOKS.items():
        mine = np.array([expert for expert in np.flatnonzero(drawn_E) if layer.classes[expert] is kind], dtype=np.int64)
        known = np.stack([mine, layer.share_E[mine]], axis=1)
        size = np.clip(4 + 5 * np.sqrt(layer.share_E[mine]), 5, 24)
        traces.append(go.Scatter(x=small(place_E2[mine, 0]), y=small(place_E2[mine, 1]), mode="markers",
                                 text=[holders[e] for e in mine], customdata=small(known),
                                 name=f"{kind.value} ({len(mine)})",
                                 marker={"color": colour, "symbol": symbol, "size": small(size)},
                                 hovertemplate=told + kind.value + "</extra>"))  # fmt: skip
    return traces


def _holders(placement: Placement, layer: int) -> dict[int, str]:
    found: dict[int, list[str]] = {}
    for rank, expert in zip(placement.rank_of_slot, placement.physical_to_logical[layer], strict=True):
        found.setdefault(int(expert), []).append(str(rank))
    return {expert: " and ".join(held) for expert, held in found.items()}
