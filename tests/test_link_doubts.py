"""Links in units that were mistaken for others are taken as they are, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_inputs import gemopt, write_inputs
from timed import timed

from gemopt.topology import Topology
from gemopt.topology.doubts import doubts
from gemopt.topology.named import INSIDE, NETWORK, named

pytestmark = pytest.mark.usefixtures("quick_bounds")

TWO = {"node_of_rank": [0, 0, 1, 1], "within_node": {"bandwidth_gbs": 450.0}, "between_nodes": {"bandwidth_gbs": 50.0}}


@pytest.mark.parametrize(
    ("level", "change", "said"),
    [
        ("between_nodes", {"bandwidth_gbs": 50.0}, ""),
        ("between_nodes", {"bandwidth_gbs": 400.0}, "for 400 Gb/s write 50"),
        ("between_nodes", {"bandwidth_gbs": 100.0, "latency_us": 5.0}, ""),
        ("between_nodes", {"bandwidth_gbs": 200.0, "port_of": "node"}, ""),  # a NIC for each rank
        ("between_nodes", {"bandwidth_gbs": 1600.0, "port_of": "node"}, "for 1600 Gb/s write 200"),
        ("between_nodes", {"bandwidth_gbs": 0.05}, "not in TB/s"),
        ("between_nodes", {"bandwidth_gbs": 50.0, "latency_us": 0.022}, "is that in microseconds"),
        ("between_nodes", {"bandwidth_gbs": 50.0, "latency_us": 2200.0}, "is that in microseconds"),
        ("between_nodes", {"points": [(1.0, 22.0), (16.0, 360.0)]}, "are the bytes bytes"),
        ("between_nodes", {"points": [(1024.0, 22.0), (1e9, 1400.0)]}, ""),  # measured over NVLink, in bytes
        ("within_node", {"bandwidth_gbs": 450.0}, ""),
        ("within_node", {"bandwidth_gbs": 900.0}, "on H100 that of both directions together: 450 in each"),
        ("within_node", {"points": [(0.0, 0.0), (65536.0, 400.0)]}, "are the bytes bytes"),  # KiB
        ("within_node", {"bandwidth_gbs": 7200.0}, "for 7200 Gb/s write 900"),
    ],
)
def test_bandwidths_and_latencies_in_other_units(level: str, change: dict[str, Any], said: str) -> None:
    found = doubts(Topology(**(TWO | {level: change})))
    assert (found == []) if not said else (len(found) == 1 and found[0].startswith(level) and said in found[0])


@pytest.mark.parametrize(
    ("gpu", "number"), [("NVIDIA H200", 1), ("unknown", 1), ("NVIDIA B200", 0), ("NVIDIA GB300", 0)]
)
def test_what_gpus_send_in_each_direction_is_not_doubted(gpu: str, number: int) -> None:
    devices = [each.model_copy(update={"name": gpu}) for each in timed(range(4), lambda n, g: 20 + n).devices]
    assert len(doubts(Topology(**(TWO | {"within_node": {"bandwidth_gbs": 900.0}})), devices)) == number


def test_links_of_pairs() -> None:
    matrix = [[0.0, 900.0, 50.0], [900.0, 0.0, 50.0], [50.0, 400.0, 0.0]]
    (found,) = doubts(Topology(node_of_rank=[0, 0, 1], pair_bandwidth_gbs=matrix))
    assert "for 400 Gb/s write 50" in found
    matrix[2][1] = 50.0
    assert doubts(Topology(node_of_rank=[0, 0, 1], pair_bandwidth_gbs=matrix)) == []
    latency = [[0.0, 0.02, 10.0], [0.02, 0.0, 10.0], [10.0, 10.0, 0.0]]
    (found,) = doubts(Topology(node_of_rank=[0, 0, 1], pair_bandwidth_gbs=matrix, pair_latency_us=latency))
    assert found == "pairs: an exchange of next to nothing takes 0.02 us: is that in microseconds?"
    (found,) = doubts(Topology(node_of_rank=[0, 1], pair_bandwidth_gbs=[[0.0, 0.05], [0.05, 0.0]]))
    assert "pairs: 0.05 GB/s" in found


@pytest.mark.parametrize(
    ("nodes", "inside", "across", "said"),
    [
        (1, 376.0, 0.0, ["2632 GB/s at once within node: were pairs measured one at a time?"]),  # of nvbandwidth
        (2, 376.0, 45.0, ["180 GB/s at once between nodes: were pairs measured one at a time?"]),  # of ib_write_bw
        (1, 64.0, 0.0, []),  # a link of its own for each pair of MI300X
    ],
)
def test_pairs_that_were_measured_one_at_a_time(nodes: int, inside: float, across: float, said: list[str]) -> None:
    node = [rank * nodes // 8 for rank in range(8)]
    matrix = [[0.0 if a == b else inside if node[a] == node[b] else across for b in range(8)] for a in range(8)]
    found = doubts(Topology(node_of_rank=node, pair_bandwidth_gbs=matrix))
    assert len(found) == len(said) and all(part in each for part, each in zip(said, found, strict=True))
    ports = {"within_node": {"bandwidth_gbs": 310.0}} | ({"between_nodes": {"bandwidth_gbs": 47.0}} if across else {})
    assert doubts(Topology(node_of_rank=node, pair_bandwidth_gbs=matrix, **ports)) == []


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (["a", "b", "a", "b"], "ranks 0 and 2 were measured on one host, a, and the topology has them on two nodes"),
        (["a", "a", "b", "b"], ""),
        (["a", "a", "a", "a"], ""),  # what would two nodes do?
        ([None, None, None, None], ""),
        (["a", None, "b", None], ""),
        (["a", "b", "c", "d"], ""),  # hosts that NVLink joins
    ],
)
def test_hosts_that_the_nodes_tear_apart(hosts: list[str | None], said: str) -> None:
    measured = timed(range(len(hosts)), lambda n, g: 20 + n).devices
    devices = [each.model_copy(update={"node": host}) for each, host in zip(measured, hosts, strict=True)]
    found = doubts(Topology(**TWO), devices)
    assert (found == []) if not said else (len(found) == 1 and found[0].startswith(said))


def test_levels_that_may_be_swapped() -> None:
    slow, fast = {"bandwidth_gbs": 47.0, "latency_us": 22.0}, {"bandwidth_gbs": 310.0, "latency_us": 8.0}
    ranks = {"node_of_rank": [0, 0, 1, 1]}
    (said,) = doubts(Topology(**ranks, within_node=slow, between_nodes={**fast, "bandwidth_gbs": 90.0}))
    assert "are the two swapped?" in said
    assert doubts(Topology(**ranks, within_node=fast, between_nodes=slow)) == []
    assert (
        doubts(
            Topology(**ranks, within_node={**slow, "latency_us": 3.0}, between_nodes={**slow, "bandwidth_gbs": 50.0})
        )
        == []
    )


def test_named_ones_are_beyond_doubt() -> None:
    for inside in INSIDE:
        for network in NETWORK:
            assert doubts(named(f"2x4-{network}-{inside}")) == []


def test_commands_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, traces = write_inputs(tmp_path)
    links, said = tmp_path / "t.json", "for 400 Gb/s write 50"
    links.write_text(json.dumps({"node_of_rank": [0, 1], "between_nodes": {"bandwidth_gbs": 400}}))
    wired = ("--topology", links, "--once-per", "assignment", "--token-bytes", "4096")
    placement, brief = tmp_path / "p.json", ("--time-limit", "2", "--patience", "1")
    code, out, err = gemopt(capsys, "topology", links)
    assert code == 0 and "400 GB/s (3200 Gb/s)" in out and said in err
    code, out, _ = gemopt(capsys, "solve", profile, traces, *wired, *brief, "-o", placement)
    assert code == 0 and said in out
    other = tmp_path / "ms.json"
    document = json.loads((tmp_path / "profile.json").read_text())
    for device in document["devices"]:
        for sample in device["samples"]:
            sample["latency_us"] /= 1e3
    other.write_text(json.dumps(document))
    code, out, _ = gemopt(capsys, "solve", other, traces, *wired, *brief)
    assert code == 0 and "is the unit of the times right?" in out
    for command in (("evaluate", placement, profile, traces), ("compare", profile, traces, "--solvers", "lpt")):
        code, _, err = gemopt(capsys, *command, *wired)
        assert code == 0 and said in err
