"""Topologies: documents, names, what others measured; solve, compare and the commands under them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json, profile

from gemopt.compare import compare
from gemopt.evaluate import evaluate
from gemopt.exceptions import InputError
from gemopt.formats.links import read_links
from gemopt.links import Exchange
from gemopt.solve import solve
from gemopt.solvers.base import Options
from gemopt.solvers.baselines.moetuner import MoeTuner, fullest, solve_child
from gemopt.topology import Level, Topology
from gemopt.topology.named import INSIDE, NETWORK, named
from gemopt.traces import Traces
from gemopt.traces.arrays import count_assignments
from gemopt.traces.tokens import Tokens

pytestmark = pytest.mark.usefixtures("quick_bounds")

EXCHANGE = Exchange(dispatch_bytes=4000)
HALF, OTHER = frozenset({0, 4, 1, 5}), frozenset({2, 6, 3, 7})


def token_traces(*, steps: int = 12, layers: int = 2, experts: int = 8, ranks: int = 4) -> Traces:
    """Experts 0-3 are chosen together, and 4-7; tokens come from all ranks."""
    rng = np.random.default_rng(3)
    count = 10 * steps
    half = rng.integers(0, 2, count)[:, None, None] * 4
    ids = np.stack([[rng.permutation(4)[:2] for _ in range(layers)] for _ in range(count)]) + half
    ids = np.array([0, 4, 1, 5, 2, 6, 3, 7])[ids]  # interleaved, so that contiguous placement tears them apart
    step = np.repeat(np.arange(steps), 10)
    counts = count_assignments(ids, step, steps, experts)
    return Traces(counts=counts, tokens=Tokens(ids, step, source_rank=rng.integers(0, ranks, count)))


def test_names_say_what_they_are_and_where_figures_come_from() -> None:
    two = named("2x8-ib400")
    assert (two.num_ranks, two.num_nodes) == (16, 2)
    assert two.gates[3].tolist() == [3, 11] and two.gates[11].tolist() == [3, 11]
    out, into, *_ = two.ports.of_pair[0, 1]
    assert two.ports.names[out] == "within_node out of rank 0" and two.ports.names[into] == "within_node into rank 1"
    assert (two.ports.of_pair[5, 5] == -1).all()
    assert named("nvlink-8").between_nodes is None
    for inside in INSIDE:
        assert named(f"{inside}-2").source
    for network in NETWORK:
        assert "between: " in (named(f"2x2-{network}-pcie4").source or "")
    shared = named("2x4-shared-ib400").ports
    assert len({int(shared.of_pair[g, 4 + h, k]) for g in range(4) for h in range(4) for k in range(4)} - {-1}) == 2
    for wrong in ("2x8-wifi", "nvlink", "0x8-ib400", "8"):
        with pytest.raises(InputError, match="topology"):
            named(wrong)


def test_round_trip(tmp_path: Path) -> None:
    topology = Topology(
        node_of_rank=[0, 0, 1], within_node=Level(points=[(10, 3.0), (100, 5.0)]), name="mine",
        between_nodes=Level(bandwidth_gbs=10, port_of="node"), pair_bandwidth_gbs=np.full((3, 3), 2.0),
    )  # fmt: skip
    topology.save(tmp_path / "t.json")
    again = Topology.load(tmp_path / "t.json")
    assert again == topology
    curve = again.within_node.curve  # type: ignore[union-attr]
    assert curve([0, 10, 55, 100, 190]).tolist() == pytest.approx([3, 3, 4, 5, 7])


def test_copies_with_other_speeds_forget_what_was_computed() -> None:
    fast = named("2x2-ib400")
    assert fast.between_nodes is not None and fast.between_nodes.curve.slope == pytest.approx(1e-3 / 47)
    assert len(fast.ports.curves) == 2
    level = fast.between_nodes.model_copy(update={"bandwidth_gbs": 1.0})
    slow = fast.model_copy(update={"between_nodes": level})
    assert level.curve.slope == slow.ports.curves[1].slope == pytest.approx(1e-3)
    assert fast.ports.curves[1].slope == pytest.approx(1e-3 / 47)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"node_of_rank": [0, 2]}, "without gaps"),
        ({"node_of_rank": [0, 1]}, "between_nodes"),
        ({"rack_of_node": [0, 1]}, "one rack per node"),
        ({"within_node": {"bandwidth_gbs": 0}}, "above 0"),
        ({"within_node": {"bandwidth_gbs": -3}}, "above 0"),
        ({"within_node": {}}, "measured points"),
        ({"within_node": {"points": [[1, 5], [2, 4]]}}, "increasing"),
        ({"within_node": {"points": [[1, 5]]}}, "two or more"),
        ({"within_node": {"bandwidth_gbs": 1, "latency_us": -1}}, "latency_us"),
        ({"pair_bandwidth_gbs": [[1, 1]]}, "every rank to every other"),
        ({"pair_bandwidth_gbs": [[0, 1], [0, 0]]}, "above 0"),
        ({"pair_latency_us": [[0, 1], [1, 0]]}, "need their bandwidths"),
        ({"speed": 3}, "speed"),
        ({"within_node": {"bandwidth_gbs": 4.7e4}}, "GB/s"),
        ({"within_node": {"bandwidth_gbs": 4.7e10, "port_of": "node"}}, "GB/s"),
        ({"within_node": {"bandwidth_gbs": True}}, "bandwidth_gbs"),
        ({"within_node": {"bandwidth_gbs": "47"}}, "bandwidth_gbs"),
        ({"within_node": {"bandwidth_gbs": 1, "latency_us": 2.2e-5}}, "microseconds"),
        ({"within_node": {"bandwidth_gbs": 1, "latency_us": 2.2e7}}, "microseconds"),
        ({"within_node": {"points": [[1024, 2.2e-5], [1048576, 4.4e-5]]}}, "microseconds"),
        ({"within_node": {"points": [[1024, 22], [1048576, 44]], "latency_us": 22}}, "hold the latency"),
        ({"within_node": {"bandwidth_gbs": 1, "port_of": "rack"}}, "rank or node"),
        ({"between_nodes": {"bandwidth_gbs": 1}}, "several groups of node_of_rank"),
        ({"between_racks": {"bandwidth_gbs": 1}}, "several groups of rack_of_node"),
        ({"pair_bandwidth_gbs": [[0, 5e10], [5e10, 0]]}, "GB/s"),
        ({"pair_bandwidth_gbs": [[0, 1], [1, 0]], "pair_latency_us": [[0, 2e-5], [2e-5, 0]]}, "microseconds"),
    ],
)
def test_documents_that_cannot_be(change: dict[str, object], said: str, tmp_path: Path) -> None:
    data = {"node_of_rank": [0, 0], "within_node": {"bandwidth_gbs": 1}} | change
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=said) as error:
        Topology.load(path)
    assert "\n" not in str(error.value)


def test_a_cost_matrix_makes_groups_and_takes_speeds(tmp_path: Path) -> None:
    node = np.array([0, 1, 0, 1])
    cost = np.where(node[:, None] == node[None], 1.0, 7.5)
    np.fill_diagonal(cost, 0)
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"rank_cost_matrix": cost.tolist()}))
    found = read_links(str(path), like="2x8-ib400")
    assert found.node_of_rank.tolist() == [0, 1, 0, 1] and found.between_nodes == NETWORK["ib400"][0]
    with pytest.raises(InputError, match="--like"):
        read_links(str(path))
    for change, said in (((0, 1, 8.0), "symmetric"), ((0, 0, 1.0), "itself"), ((0, 1, -1.0), "negative")):
        wrong = cost.copy()
        wrong[change[0], change[1]] = change[2]
        path.write_text(json.dumps(wrong.tolist()))
        with pytest.raises(InputError, match=said):
            read_links(str(path), like="2x8-ib400")
    torn = cost.copy()
    torn[0, 1] = torn[1, 0] = 1.0  # 0 is near 1 and 2, which are not near each other
    path.write_text(json.dumps(torn.tolist()))
    with pytest.raises(InputError, match="no groups"):
        read_links(str(path), like="2x8-ib400")


@pytest.mark.parametrize("name", ["t.yaml", "t.yml"])
def test_topologies_in_yaml_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("node_of_rank: [0, 0]\n")
    with pytest.raises(InputError, match="a document in"):
        read_links(str(tmp_path / name))


def test_solve_puts_together_what_goes_together() -> None:
    traces, devices = token_traces(), profile(4)
    slow = named("2x2-ib100-pcie4")
    given = {"cost": "staircase", "time_limit": 20.0, "patience": 1, "seed": 1}
    exchange = EXCHANGE.model_copy(update={"once_per": "node", "dispatch_bytes": 400_000})
    blind = solve(devices, traces, solver="local-search", **given)
    joint = solve(devices, traces, solver="local-search", topology=slow, exchange=exchange, **given)
    assert blind.placement is not None and joint.placement is not None and joint.links is not None
    scored = [
        evaluate(p, devices, traces, cost=None, topology=slow, exchange=exchange)
        for p in (blind.placement, joint.placement)
    ]
    assert joint.objective_us == pytest.approx(scored[1].objective_us)
    assert scored[1].objective_us < scored[0].objective_us
    assert scored[1].communication.cross_node_bytes < scored[0].communication.cross_node_bytes  # type: ignore[union-attr]
    assert joint.bound_us is not None and 0 < joint.bound_us <= joint.objective_us
    assert joint.links.exposed_us == pytest.approx(joint.objective_us - scored[1].compute_us)
    assert "between nodes" in joint.links.summary(traces.num_steps)
    for row in joint.placement.physical_to_logical:  # each token's experts on one node
        assert {frozenset(row[:4].tolist()), frozenset(row[4:].tolist())} == {HALF, OTHER}
    for solver in ("linear", "moetuner", "auto"):
        found = solve(devices, traces, solver=solver, topology=slow, exchange=exchange, **given)
        assert found.objective_us is not None and found.bound_us is not None
        assert found.bound_us <= joint.objective_us * (1 + 1e-9)


def test_a_topology_that_misses_ranks_is_refused() -> None:
    with pytest.raises(InputError, match="8 ranks; the profile has 4 devices"):
        solve(profile(4), token_traces(), topology="nvlink-8", exchange=EXCHANGE)


def test_compare_counts_links_for_everybody() -> None:
    traces, devices = token_traces(steps=16), profile(4)
    rows = compare(
        devices, traces, solvers=("linear", "moetuner", "local-search"), topology="2x2-ib400", exchange=EXCHANGE,
        time_limit=8.0, patience=0, cost="staircase",
    )  # fmt: skip
    bare = compare(devices, traces, solvers=("linear",), time_limit=8.0, cost="staircase")
    assert rows[0].holdout_us is not None and bare[0].holdout_us is not None
    assert rows[0].holdout_us > bare[0].holdout_us and rows[0].change == pytest.approx(0)
    assert all(row.objective_us is not None and row.bound_us is not None for row in rows)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_moetuner_places_clusters_where_their_traffic_goes(backend: str) -> None:
    solver, options = MoeTuner(backend), Options.lasting(300)
    request = {"kind": "clusters", "loads": [5, 4, 3, 3, 2, 1], "slots": [2, 2, 2], "gap": 0.0}
    found = solve_child(request, backend, options)
    assert found is not None
    loads = np.bincount(found["cluster"], weights=[5, 4, 3, 3, 2, 1])
    assert loads.tolist() == [6, 6, 6]
    flow = np.array([[0, 9, 1], [9, 0, 1], [1, 1, 8]])
    cost = np.array([[0.0, 1, 4], [1, 0, 4], [4, 4, 0]])
    request = {"kind": "ranks", "flows": [flow.tolist()] * 2, "cost": cost.tolist(), "slots": [2, 2, 2], "gap": 0.0}
    found = solve_child(request | {"first": None}, backend, options)
    assert found is not None
    best = fullest([flow, flow], cost, [np.array(each) for each in found["ranks"]])
    from itertools import permutations, product

    every = [np.array(p) for p in permutations(range(3))]
    assert best == pytest.approx(min(fullest([flow, flow], cost, list(way)) for way in product(every, repeat=3)))
    assert solver.supports.links


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(4).save(tmp_path / "profile.json")
    token_traces().save(tmp_path / "traces.safetensors")
    inputs = (tmp_path / "profile.json", tmp_path / "traces.safetensors")
    written = tmp_path / "topology.json"
    assert gemopt(capsys, "topology", "2x2-ib400", "-o", written)[0] == 0
    wired = ("--topology", written, "--token-bytes", "4000,8000", "--once-per", "node")
    out = gemopt_json(
        capsys, "solve", *inputs, "--solver", "linear", *wired, "--cost", "staircase", "-o", tmp_path / "p.json"
    )
    assert out["links"]["combine_bytes"] == 8000 and out["links"]["once_per"] == "node"
    scored = gemopt_json(capsys, "evaluate", tmp_path / "p.json", *inputs, *wired, "--cost", "staircase")
    assert scored["objective_us"] == pytest.approx(out["objective_us"])
    assert scored["cross_node_bytes"] == out["links"]["cross_node_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--once-per", "node"), "--topology"),
        (("--topology", "2x2-ib400"), "token_bytes"),
        (("--topology", "2x2-ib400", "--once-per", "token"), "assignment, rank, node"),
        (("--topology", "2x2-ib400", "--token-bytes", "0"), "--token-bytes"),
        (("--topology", "2x4-ib400", "--token-bytes", "9"), "4 devices"),
        (("--topology", "nowhere", "--token-bytes", "9"), "nvlink"),
        (("--topology", "2x2-ib400", "--token-bytes", "9", "--tokens-from", "me"), "--tokens-from"),
    ],
)
def test_commands_refuse_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile(4).save(tmp_path / "profile.json")
    token_traces().save(tmp_path / "traces.safetensors")
    code, _, err = gemopt(capsys, "solve", tmp_path / "profile.json", tmp_path / "traces.safetensors", *words)
    assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.distributed
def test_links_are_measured_under_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "gemopt"]
    words = ["profile", "links", "-o", str(path), "--max-bytes", "65536", "--repeats", "2", "--device", "cpu"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Topology.load(path)
    assert found.num_ranks == 2 and found.within_node is not None and found.within_node.points is not None
    assert [size for size, _ in found.within_node.points] == [1024, 4096, 16384, 65536]
    assert (found.ports.curves[0]([1024, 65536]) > 0).all()
