"""What exchanges take by brute force: token by token, hop by hop, straight from the definition in docs/topology.md."""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations, product

import numpy as np

from gemopt.evaluate import linked_total
from gemopt.links import Exchange, Links
from gemopt.problem import Problem
from gemopt.topology import Level, Topology
from gemopt.traces import Traces
from gemopt.traces.arrays import count_assignments
from gemopt.traces.tokens import Tokens

RACKED = ["node", "rack"]


def random_topology(rng: np.random.Generator, ranks: int) -> Topology:
    """Nodes of any size, racks, shared ports, measured points, links of pairs: whatever a document can say."""
    nodes = int(rng.integers(1, ranks + 1))
    node_of_rank = np.concatenate([np.arange(nodes), rng.integers(0, nodes, ranks - nodes)])
    rng.shuffle(node_of_rank)
    racks = rng.integers(0, 2, nodes) if nodes > 1 and rng.random() < 0.4 else np.zeros(nodes, np.int64)
    racks = np.unique(racks, return_inverse=True)[1]

    def level(port_of: str) -> Level:
        if rng.random() < 0.3:
            points = np.sort(rng.integers(1, 200, (3, 2)), axis=0).cumsum(axis=0)
            return Level(points=[(float(a), float(b)) for a, b in points], port_of=port_of)
        return Level(
            bandwidth_gbs=float(rng.choice([0.01, 0.1])), latency_us=float(rng.integers(0, 5)), port_of=port_of
        )

    within, between, racked = level("rank"), level(str(rng.choice(["rank", "node"]))), level(str(rng.choice(RACKED)))
    fields: dict[str, object] = {"within_node": within}
    if nodes > 1:
        fields["between_nodes"] = between
    if racks.max() > 0:
        fields["between_racks"] = racked
    if rng.random() < 0.3:
        fields["pair_bandwidth_gbs"] = rng.uniform(0.01, 0.2, (ranks, ranks))
        fields["pair_latency_us"] = rng.uniform(0.01, 4, (ranks, ranks))
        if rng.random() < 0.5:
            fields = {name: value for name, value in fields.items() if name.startswith("pair")}
    return Topology(node_of_rank=node_of_rank, rack_of_node=racks, **fields)


def random_traces(rng: np.random.Generator, *, ranks: int, experts: int, layers: int, top_k: int, steps: int) -> Traces:
    """Tokens with different experts each, some with fewer, and the rank they come from."""
    count = int(rng.integers(steps, 5 * steps))
    step = np.sort(rng.integers(0, steps, count))
    ids = np.stack([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(count)])
    ids[:, :, 1:][rng.random((count, layers, top_k - 1)) < 0.2] = -1
    counts = count_assignments(ids, step, steps, experts)
    return Traces(counts=counts, tokens=Tokens(ids, step, source_rank=rng.integers(0, ranks, count)))


def hops(topology: Topology, sender: int, ranks: set[int], once_per: str) -> list[tuple[int, int]]:
    """(from, to) of every message of one token."""
    node = topology.node_of_rank
    if once_per != "node":
        return [(sender, rank) for rank in ranks if rank != sender]
    found = [(sender, rank) for rank in ranks if node[rank] == node[sender] and rank != sender]
    members = np.flatnonzero(node == node[sender]).tolist()
    for other in {int(node[rank]) for rank in ranks} - {int(node[sender])}:
        there = np.flatnonzero(node == other).tolist()
        gate = there[members.index(sender) % len(there)]
        found.append((sender, gate))
        found += [(gate, rank) for rank in ranks if node[rank] == other and rank != gate]
    return found


def port_times(topology: Topology, sent: dict[tuple[int, int], float]) -> float:
    """Microseconds of the fullest port for bytes by (from, to)."""
    node, rack = topology.node_of_rank, topology.rack_of_rank
    full: dict[object, float] = defaultdict(float)
    for (g, h), size in sent.items():
        if size <= 0:
            continue
        used = [("within_node", topology.within_node)] if node[g] == node[h] else []
        if node[g] != node[h]:
            used.append(("between_nodes", topology.between_nodes))
        if rack[g] != rack[h]:
            used.append(("between_racks", topology.between_racks))
        for name, level in used:
            if level is not None:
                owner = {"rank": np.arange(len(node)), "node": node, "rack": rack}[level.port_of]
                full[name, "out", int(owner[g])] += size
                full[name, "in", int(owner[h])] += size
        if topology.pair_bandwidth_gbs is not None:
            full["pair", g, h] += size
    worst = 0.0
    for key, size in full.items():
        if key[0] == "pair":
            latency = 0.0 if topology.pair_latency_us is None else topology.pair_latency_us[key[1], key[2]]
            worst = max(worst, latency + size * 1e-3 / topology.pair_bandwidth_gbs[key[1], key[2]])
        else:
            worst = max(worst, float(getattr(topology, key[0]).curve(size)))
    return worst


def exchange_times(links: Links, rows: list[np.ndarray], slots_G: np.ndarray) -> np.ndarray:
    """[T, L, 2] microseconds of dispatch and combine; one copy of every expert."""
    tokens, topology = links.traces.tokens, links.topology
    ranks = topology.num_ranks
    rank_of = [{int(e): int(r) for e, r in zip(row, np.repeat(np.arange(ranks), slots_G), strict=True)} for row in rows]
    result = np.zeros((links.traces.num_steps, len(rows), 2))
    for t in range(links.traces.num_steps):
        for layer in range(len(rows)):
            sent: list[dict[tuple[int, int], float]] = [defaultdict(float), defaultdict(float)]
            for n in np.flatnonzero(tokens.step_of_token == t).tolist():
                chosen = [int(e) for e in tokens.ids[n, layer] if e >= 0]
                where = [rank_of[layer][e] for e in chosen]
                source = [int(tokens.source_rank[n])] if tokens.source_rank is not None else list(range(ranks))
                start, end = source, source
                if links.senders == "uniform":
                    start = end = list(range(ranks))
                elif links.senders == "previous":
                    end = [where[0]]
                    if layer:
                        start = [rank_of[layer - 1][int(next(e for e in tokens.ids[n, layer - 1] if e >= 0))]]
                visits = [{rank} for rank in where] if links.exchange.once_per == "assignment" else [set(where)]
                for side, senders in enumerate((start, end)):
                    size = (links.dispatch_bytes, links.combine_bytes)[side]
                    for sender, to in product(senders, visits):
                        for g, h in hops(topology, sender, to, links.exchange.once_per):
                            sent[side][(g, h) if side == 0 else (h, g)] += size / len(senders)
            result[t, layer] = [port_times(topology, each) for each in sent]
    return result


def placements(experts: int, slots_G: np.ndarray) -> list[np.ndarray]:
    """Every row without copies, up to the order of slots on a rank."""
    starts = np.cumsum(slots_G) - slots_G
    held = [*range(experts), *([-1] * (int(slots_G.sum()) - experts))]
    found = {}
    for order in permutations(held):
        parts = tuple(tuple(sorted(order[s : s + n])) for s, n in zip(starts, slots_G, strict=True))
        found[parts] = np.array([e for part in parts for e in part])
    return list(found.values())


def pair_totals(problems: list[Problem], rows: list[np.ndarray], links: Links, pairs: np.ndarray) -> np.ndarray:
    """Of pairs of rows, [N, 2], what each takes in two layers; those of layers that are not coupled add up."""

    def worth(i: int, j: int) -> float:
        return linked_total(problems, [rows[i], rows[j]], links)

    if links.coupled:
        return np.array([worth(i, j) for i, j in pairs])
    first, second = (
        np.array([worth(*at) for at in each])
        for each in ([(i, 0) for i in range(len(rows))], [(0, i) for i in range(len(rows))])
    )
    return first[pairs[:, 0]] + second[pairs[:, 1]] - first[0]


def random_links(seed: int, *, experts: int = 4, layers: int = 2, ranks: int = 3, steps: int = 3) -> Links:
    """Any topology, any way to exchange."""
    rng = np.random.default_rng(seed)
    traces = random_traces(rng, ranks=ranks, experts=experts, layers=layers, top_k=2, steps=steps)
    exchange = Exchange(
        dispatch_bytes=int(rng.integers(1, 40)),
        combine_bytes=int(rng.integers(1, 40)),
        once_per=str(rng.choice(["assignment", "rank", "node"])),
        senders=str(rng.choice(["recorded", "uniform", "previous"])),
        overlap=bool(rng.random() < 0.4),
    )
    return Links.of(random_topology(rng, ranks), traces, ranks, exchange=exchange)
