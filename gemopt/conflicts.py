"""Which experts are hot in the same steps: the conflict graph of a layer, consistent and temporal experts.

Two experts conflict when they are loaded in the same steps more than their shares and the sizes of the steps explain:
on one rank they make a straggler. GEM (Wawdhane, Kumar, Das, arXiv:2605.19945) tells consistent experts, used most of
the time, from temporal ones, often used together for the rest, and separates both; it names no thresholds, so those
here are ours.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import check_number
from gemopt.latency import FloatArray
from gemopt.traces import Traces
from gemopt.words import counted

Graph: TypeAlias = Any  # networkx.Graph, whose stubs do not know what a view of one attribute yields

HOT = 1.5  # times the load of an expert under equal shares
MOSTLY = 0.75  # share of the windows in which a consistent expert is hot
BEYOND_CHANCE = 3.0  # standard deviations
WINDOW_STEPS = 64
SHOWN = 8


class ExpertClass(StrEnum):
    """How an expert is used over time, by its load in windows of steps.

    `consistent`: hot (1.5 times an equal share) in at least three quarters of the windows. `temporal`: not consistent,
    but in some window hot, and above 1.5 times its own mean by more than three standard deviations of independent
    steps. `ordinary`: the rest.
    """

    CONSISTENT = "consistent"
    TEMPORAL = "temporal"
    ORDINARY = "ordinary"


def excess_coload(load_TE: NDArray[Any], weights_T: FloatArray | None = None) -> FloatArray:
    """[E, E] mean product of two experts' loads beyond their shares; the diagonal is each one's own variance.

    `mean_t (n_ti - N_t p_i)(n_tj - N_t p_j)` with N_t the load of the step and p_i the share of the expert in all
    steps. The size of a step, which no placement changes, so makes no conflict.
    """
    load = np.asarray(load_TE, dtype=np.float64)
    weights = np.full(len(load), 1 / len(load)) if weights_T is None else weights_T / max(weights_T.sum(), 1e-300)
    residual = load - load.sum(axis=1, keepdims=True) * shares(load)
    return np.asarray((residual * weights[:, None]).T @ residual)


def shares(load_TE: FloatArray) -> FloatArray:
    """[E] share of each expert in the load of all steps; zeros when there is none."""
    total_E = np.asarray(load_TE, dtype=np.float64).sum(axis=0)
    return np.asarray(total_E / max(total_E.sum(), 1e-300))


def correlation(excess_EE: FloatArray) -> FloatArray:
    """[E, E] excess co-load divided by both experts' deviations; 0 for an expert that never varies."""
    deviation = np.sqrt(excess_EE.diagonal().clip(0.0))
    scale = np.outer(deviation, deviation)
    return np.divide(excess_EE, scale, out=np.zeros_like(excess_EE), where=scale > 0)


def significant(excess_EE: FloatArray, num_steps: int) -> NDArray[np.bool_]:
    """[E, E] pairs whose correlation over so many steps is more than three standard errors away from 0."""
    mask = np.abs(correlation(excess_EE)) > BEYOND_CHANCE / np.sqrt(num_steps)
    np.fill_diagonal(mask, False)
    return np.asarray(mask)


def classify(counts_TE: NDArray[Any], *, window: int | None = None) -> list[ExpertClass]:
    """Class of each expert.

    Parameters
    ----------
    window
        Steps of a window; default 64, or an eighth of shorter traces.
    """
    counts = np.asarray(counts_TE, dtype=np.float64)
    steps = len(counts)
    length = max(1, min(WINDOW_STEPS, steps // 8)) if window is None else window
    check_number("window", length, f"from 1 to the number of steps, {steps}", least=1, most=steps, whole=True)
    cuts = np.arange(0, steps - length + 1, length)
    load_WE = np.stack([counts[i : i + length].sum(axis=0) for i in cuts])
    total_W1 = load_WE.sum(axis=1, keepdims=True)
    hot_WE = (load_WE >= HOT * total_W1 / counts.shape[1]) & (total_W1 > 0)
    own_WE = total_W1 * shares(counts)
    chance_E = BEYOND_CHANCE * np.sqrt(length * excess_coload(counts).diagonal())
    burst_E = (hot_WE & (load_WE > HOT * own_WE) & (load_WE > own_WE + chance_E)).any(axis=0)
    consistent_E = hot_WE.mean(axis=0) >= MOSTLY
    names = np.where(consistent_E, "consistent", np.where(burst_E, "temporal", "ordinary"))
    return [ExpertClass(str(name)) for name in names]


def conflict_graph(traces: Traces | str | os.PathLike[str], layer: int, *, window: int | None = None) -> Graph:
    """Conflict graph of one layer (an index, not a layer id) of traces or of the traces at a path.

    Nodes are experts with `share` (1: an equal share of the load) and `expert_class`. Edges are significant pairs with
    `excess` (assignments squared per step; negative for experts that take turns) and `correlation`. The graph itself
    carries `layer_id` and `num_steps`.
    """
    traces = Traces.of(traces)
    limit = f"an index from 0 to {traces.num_layers - 1}; its layers are {traces.layer_ids}"
    check_number("layer", layer, limit, most=traces.num_layers - 1, whole=True)
    counts_TE = traces.counts[:, layer]
    excess_EE = excess_coload(counts_TE)
    correlation_EE = correlation(excess_EE)
    classes = classify(counts_TE, window=window)
    relative_E = shares(counts_TE) * traces.num_experts
    graph: Graph = nx.Graph(layer_id=traces.layer_ids[layer], num_steps=traces.num_steps)
    for expert, kind in enumerate(classes):
        graph.add_node(expert, share=float(relative_E[expert]), expert_class=kind)
    for i, j in np.argwhere(np.triu(significant(excess_EE, traces.num_steps))).tolist():
        graph.add_edge(i, j, excess=float(excess_EE[i, j]), correlation=float(correlation_EE[i, j]))
    return graph


def conflict_groups(graph: Graph) -> list[list[int]]:
    """Experts that are hot together, largest group first: communities of the conflicts between non-ordinary experts.

    Greedy modularity (Clauset, Newman, Moore, Physical Review E 70, 2004) over edges of positive correlation.
    """
    hot = [expert for expert, kind in graph.nodes(data="expert_class") if kind is not ExpertClass.ORDINARY]
    edges = [(i, j, c) for i, j, c in graph.subgraph(hot).edges(data="correlation") if c > 0]
    positive: Graph = nx.Graph()
    positive.add_weighted_edges_from(edges)
    if not edges:
        return []
    found = nx.community.greedy_modularity_communities(positive, weight="weight")
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


def summary(graph: Graph) -> str:
    """A few lines for people: classes, the strongest conflicts, groups of experts that are hot together."""
    lines = [f"layer {graph.graph['layer_id']}: {len(graph)} experts, {counted(graph.graph['num_steps'], 'step')}"]
    share = dict(graph.nodes(data="share"))
    for kind in (ExpertClass.CONSISTENT, ExpertClass.TEMPORAL):
        chosen = [expert for expert, value in graph.nodes(data="expert_class") if value is kind]
        chosen.sort(key=lambda expert: -share[expert])
        listed = ", ".join(f"{expert} ({share[expert]:.1f}x)" for expert in chosen[:SHOWN])
        more = f", {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
        lines.append(f"  {kind.value}: " + (f"{counted(len(chosen), 'expert')}: {listed}{more}" if chosen else "none"))
    edges = sorted(graph.edges(data=True), key=lambda edge: (-edge[2]["excess"], edge[0], edge[1]))
    strongest = [edge for edge in edges if edge[2]["excess"] > 0]
    listed = ", ".join(f"{i}-{j} ({data['correlation']:+.2f})" for i, j, data in strongest[:SHOWN])
    lines.append(
        f"  conflicts: {len(strongest)} of {len(graph) * (len(graph) - 1) // 2} pairs"
        + f", most excess load first: {listed}" * bool(listed)
    )
    groups = [group for group in conflict_groups(graph) if len(group) > 1][:SHOWN]
    if groups:
        lines.append("  hot together: " + "; ".join(" ".join(map(str, group)) for group in groups))
    return "\n".join(lines)


def as_dict(graph: Graph) -> dict[str, Any]:
    """The graph as plain lists, for JSON: `layer_id`, `num_steps`, `experts`, `conflicts`, `groups`."""
    return {
        **graph.graph,
        "experts": [
            {"expert": expert, "share": data["share"], "class": data["expert_class"].value}
            for expert, data in graph.nodes(data=True)
        ],
        "conflicts": [{"experts": [i, j], **data} for i, j, data in graph.edges(data=True)],
        "groups": conflict_groups(graph),
    }


def plot_conflicts(graph: Graph, *, ax: Any = None) -> Any:
    """Draw the graph on a circle, experts that are hot together side by side.

    Area is the share of an expert, colour its class; lines are the strongest conflicts, three per expert on average.
    Returns the matplotlib axes.
    """
    from gemopt.plotting import subplots

    ax = subplots(size=(7, 7))[1] if ax is None else ax
    positive = [(i, j, data["correlation"]) for i, j, data in graph.edges(data=True) if data["correlation"] > 0]
    positive.sort(key=lambda edge: -edge[2])
    grouped = [expert for group in conflict_groups(graph) for expert in group]
    drawn: Graph = nx.Graph()
    drawn.add_nodes_from([*grouped, *(expert for expert in graph if expert not in grouped)])
    drawn.add_weighted_edges_from(positive[: 3 * len(graph)])
    place: Any = nx.circular_layout(drawn)
    widths = [3.0 * weight for _, _, weight in drawn.edges(data="weight")]
    nx.draw_networkx_edges(drawn, place, ax=ax, width=widths, edge_color="#8d99ae", alpha=0.6)
    colours = {ExpertClass.CONSISTENT: "#d1495b", ExpertClass.TEMPORAL: "#edae49", ExpertClass.ORDINARY: "#cfd8dc"}
    for kind, colour in colours.items():
        nodes = [expert for expert, value in graph.nodes(data="expert_class") if value is kind]
        sizes = [40 + 4000 / len(graph) * graph.nodes[expert]["share"] for expert in nodes]
        nx.draw_networkx_nodes(
            drawn,
            place,
            nodelist=nodes,
            node_size=sizes,
            node_color=colour,
            ax=ax,
            label=f"{kind.value} ({len(nodes)})",
        )
    nx.draw_networkx_labels(drawn, place, ax=ax, font_size=7)
    told = f"area: share of the load; width: correlation, strongest {len(widths)} of {len(positive)} conflicts"
    ax.set_title(f"layer {graph.graph['layer_id']}: experts hot in the same steps\n{told}", fontsize=10)
    ax.legend(loc="lower left", fontsize=8, markerscale=0.5)
    ax.set_axis_off()
    return ax
