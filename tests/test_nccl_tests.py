"""nccl-tests and rccl-tests as topologies: what they print, what they write as JSON, and what is none of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemopt.exceptions import InputError
from gemopt.formats.links import read_links

NCCL = """# nccl-tests version 2.17.8 nccl-headers=23004 nccl-library=23004
# Collective test starting: {test}_perf
# nThread 1 nGpus 1 minBytes 1024 maxBytes 4096 step: 2(factor) warmup iters: 1 iters: 10 agg iters: 1 validation: 1
#
# Using devices
#  Rank  0 Group  0 Pid 2380523 on    Node1 device  0 [0000:4e:00] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid 2380524 on    {host} device  1 [0000:5f:00] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
        1024           128     float    none      -1    12.50    0.08    0.04       0    12.00    0.08    0.04    N/A
        2048           256     float    none      -1    12.25    0.17    0.08       0    12.00    0.17    0.08    N/A
        4096           512     float    none      -1    20.00    0.20    0.10       0    19.00    0.20    0.10    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 0.1
"""


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("12.25    0.17    0.08", "1.2e+01    0.17    0.08", "got 2048 256 float none -1 1.2e"),
        ("12.25    0.17    0.08       0    12.00    0.17    0.08    N/A", "12.25", "was the output cut"),
        ("none      -1", "sum      -1", "a test that takes the sum"),
        ("time   algbw", "cputime   algbw", "without -C 1"),
        ("256     float", "256      half", "types float, half"),
        ("agg iters: 1", "agg iters: 4", "without -m"),
        ("Rank  1 Group  0", "Rank  1 Group  1", "without NCCL_TESTS_SPLIT"),
        ("nGpus 1", "nGpus 2", "1 of the 2 GPUs of a process; all GPUs listed"),
        ("device  1 [0000:5f:00]", "device  0 [0000:4e:00]", "2 ranks on device 0 of Node1; a device for each rank"),
    ],
)
def test_other_nccl_tests_output_is_refused(tmp_path: Path, old: str, new: str, word: str) -> None:
    path = tmp_path / "alltoall.txt"
    path.write_text(NCCL.format(test="alltoall", host="Node1").replace(old, new))
    with pytest.raises(InputError, match=word):
        read_links(str(path))


@pytest.mark.parametrize(
    "tag",
    ["[1,0]<stdout>:", "0: ", "2026-01-02T03:04:05.6Z ", "[pod/nccl-launcher/nccl] ", "[pod/a] 2026-01-02T03:04:05Z "],
)
def test_nccl_tests_output_with_the_launchers_tags(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "run.txt"
    path.write_text("".join(tag + line + "\n" for line in NCCL.format(test="alltoall", host="Node1").splitlines()))
    level = read_links(str(path)).within_node
    assert level is not None and level.points == [(512.0, 12.375), (1024.0, 12.375), (2048.0, 20.0)]


def test_nccl_tests_output(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(NCCL.format(test="alltoall", host="Node1"))
    one = read_links(str(path))
    assert one.within_node is not None and one.num_nodes == 1
    assert one.within_node.points == [(512.0, 12.375), (1024.0, 12.375), (2048.0, 20.0)]  # half leaves a rank
    path.write_text(NCCL.format(test="sendrecv", host="Node2"))
    two = read_links(str(path))
    assert two.between_nodes is not None and two.num_nodes == 2
    assert two.between_nodes.points == [(1024.0, 12.375), (2048.0, 12.375), (4096.0, 20.0)]
    path.write_text(NCCL.format(test="all_reduce", host="Node2"))
    with pytest.raises(InputError, match="alltoall_perf or sendrecv_perf"):
        read_links(str(path))
    path.write_text(NCCL.format(test="alltoall", host="Node1").replace("0.20    0.10       0", "0.20    0.10       7"))
    with pytest.raises(InputError, match="#wrong 7 at 4096 bytes"):
        read_links(str(path))
    path.write_text("nothing of the kind")
    with pytest.raises(InputError, match="whole output"):
        read_links(str(path))


def test_hosts_that_nvlink_joins_are_one_node(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(NCCL.format(test="alltoall", host="Node2"))
    one = read_links(str(path), nodes=1)
    assert one.num_nodes == 1 and one.between_nodes is None and one.within_node is not None
    assert one.within_node.points == [(512.0, 12.375), (1024.0, 12.375), (2048.0, 20.0)]
    assert read_links(str(path), nodes=2).num_nodes == 2
    with pytest.raises(InputError, match="--nodes: got 3; the 2 hosts"):
        read_links(str(path), nodes=3)


def test_older_versions_have_no_root(tmp_path: Path) -> None:
    """A time of whole microseconds stands where newer ones have the root."""
    header = (
        "#       size         count      type   redop     time   algbw   busbw  error     time   algbw   busbw  error\n"
    )
    lines = [line for line in clear_run(8, 7 / 8).splitlines(keepends=True)[1:] if line.startswith("#")]
    rows = [
        f"{size:12d} {size // 32:10d}     float          {us:>8} {size / float(us) / 1e3:7.2f} "
        f"{7 / 8 * size / float(us) / 1e3:7.2f}  0e+00 {us:>8} 1.0 1.0  1e+00\n"
        for size, us in ((1 << 20, "23.5"), (1 << 24, "75.92"), (1 << 28, "5211"))
    ]
    path = tmp_path / "alltoall_perf.txt"
    path.write_text("".join([*lines, header, *rows]))
    level = read_links(str(path)).within_node
    assert level is not None and level.points is not None
    assert level.points[-1] == (7 / 8 * (1 << 28), 5211.0)


def test_two_tests_in_one_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "alltoall.txt"
    path.write_text(NCCL.format(test="alltoall", host="Node1") + "# Collective test starting: all_reduce_perf\n")
    with pytest.raises(InputError, match="got all_reduce and alltoall; the output of alltoall_perf or sendrecv_perf"):
        read_links(str(path))


def test_nccl_tests_output_that_a_windows_shell_wrote(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(NCCL.format(test="alltoall", host="Node1"), encoding="utf-16")
    assert read_links(str(path)).num_ranks == 2


def as_json(
    test: str = "alltoall",
    host: str = "Node1",
    time: str = "time",
    failed: int = 0,
    bus_bw: float = 0.1,
    **changes: Any,
) -> str:
    """What `-J` writes of the same run."""
    hosts = ("Node1", host)
    devices = [
        {"rank": g, "group": 0, "pid": 5 + g, "hostname": hosts[g], "device": g, "device_hex": f"0000:{g}e:00"}
        for g in range(2)
    ]
    config = {"nthreads": 1, "ngpus": 1, "aggregated_iterations": 1, "devices": devices} | changes
    rows = [
        {"size": size, "count": size // 8, "type": "float", "redop": "none", "root": "    -1",
         "out_of_place": {time: us, "alg_bw": 2 * bus_bw, "bus_bw": bus_bw, "nwrong": 0.0}, "in_place": None}
        for size, us in ((1024, 12.5), (2048, 12.25), (4096, 20.0))
    ]  # fmt: skip
    args = [f"./build/{test}_perf", "-J", "run.json"]
    found = {"version": 2, "args": args, "nccl_version": 22907, "config": config, "results": rows}
    return json.dumps({**found, "out_of_bounds": {"count": failed, "okay": str(not failed).lower()}})


def test_the_json_of_nccl_tests_reads_as_what_it_prints(tmp_path: Path) -> None:
    path, text = tmp_path / "run.json", tmp_path / "run.txt"
    for test, host in (("alltoall", "Node1"), ("sendrecv", "Node2")):
        path.write_text(as_json(test, host))
        text.write_text(NCCL.format(test=test, host=host))
        found, known = read_links(str(path)), read_links(str(text))
        assert (found.within_node, found.between_nodes) == (known.within_node, known.between_nodes)
    for content, said in (
        (as_json("all_reduce"), "got all_reduce; the output of alltoall_perf"),
        (as_json(time="cpu_time"), "not those of the host"),
        (as_json(ngpus=8), "1 of the 8 GPUs of a process"),
        (as_json(aggregated_iterations=4), "without -m"),
        (as_json().replace('"nwrong": 0.0', '"nwrong": 3.0'), "#wrong 3.0 at 1024 bytes"),
        (as_json(failed=12), "out_of_bounds 12; 0: what was received"),
        (as_json("sendrecv", bus_bw=90.0), "as of sendrecv_perf on the 2 ranks listed; are ranks missing"),
        (as_json().replace("12.25", '"nan"'), "JSON without some of them"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=said):
            read_links(str(path))
    with pytest.raises(InputError, match="--like"):
        read_links(str(path), like="nvlink-2")


def test_one_host_is_one_node(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(as_json())
    with pytest.raises(InputError, match=f"--nodes: got 2; 1, the only host of {path}"):
        read_links(str(path), nodes=2)
    assert "on 2 GPUs of 1 node, " in read_links(str(path), nodes=1).source


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV18\t0-63\t0\n", "how GPUs are linked, not how fast"),
        ("[rank 1] Dispatch + combine bandwidth: 42.2 GB/s, avg_t=521.97 us\n", "a log of DeepEP's tests"),
        ("[config] num_tokens=4096, hidden=7168\n[tuning] Best dispatch (FP8): SMs 24\n", "a log of DeepEP's tests"),
        ("numCycle,collective,ranks,size,inplace,time\n0,AlltoAll,8,1024,0,20.1\n", "give what they print"),
    ],
)
def test_what_others_print_is_called_by_its_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "other.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_links(str(path), like=None if "numCycle" in text else "2x2-ib400")


def test_the_fullest_port_is_on_the_smallest_node(tmp_path: Path) -> None:
    path, third = (
        tmp_path / "run.txt",
        "#  Rank  2 Group  0 Pid 2380525 on    Node2 device  0 [0000:4e:00] NVIDIA H100\n#\n",
    )
    path.write_text(NCCL.format(test="alltoall", host="Node1").replace("#\n#        ", third + "#        ", 1))
    between = read_links(str(path), inside="nvlink-2").between_nodes
    assert between is not None and between.points is not None
    assert [size for size, _ in between.points] == pytest.approx([1024 * 2 / 3, 2048 * 2 / 3, 4096 * 2 / 3])


def clear_run(ranks: int, per_algorithm: float, test: str = "alltoall") -> str:
    """What a test prints on one node at speeds that two digits tell."""
    listed = "".join(f"#  Rank {r} Group 0 Pid {r} on a device {r} [0x{r:02x}] NVIDIA H100\n" for r in range(ranks))
    rows = "".join(
        f"{size:12d} {size // 4:10d} float none -1 {us:8.2f} {size / us / 1e3:7.2f} "
        f"{per_algorithm * size / us / 1e3:7.2f} 0 {us:8.2f} 1.0 1.0 N/A\n"
        for size, us in ((1 << 20, 23.5), (1 << 24, 75.92), (1 << 28, 914.78))
    )
    return f"# Collective test starting: {test}_perf\n# Using devices\n{listed}#\n{rows}"


@pytest.mark.parametrize(("ranks", "per_algorithm", "test"), [(8, 7 / 8, "alltoall"), (4, 1.0, "sendrecv")])
def test_bus_bandwidth_that_fits_the_ranks_is_read(tmp_path: Path, ranks: int, per_algorithm: float, test: str) -> None:
    path = tmp_path / "run.txt"
    path.write_text(clear_run(ranks, per_algorithm, test))
    level = read_links(str(path)).within_node
    assert level is not None and level.points is not None
    assert level.points[-1] == (pytest.approx(per_algorithm * (1 << 28)), 914.78)


@pytest.mark.parametrize(
    ("ranks", "per_algorithm", "test"), [(4, 7 / 8, "alltoall"), (8, 15 / 16, "alltoall"), (8, 1.75, "alltoall")]
)
def test_lost_ranks_and_other_tests_show_in_the_bus_bandwidth(
    tmp_path: Path, ranks: int, per_algorithm: float, test: str
) -> None:
    path = tmp_path / "run.txt"
    path.write_text(clear_run(ranks, per_algorithm, test))
    with pytest.raises(InputError, match=f"as of {test}_perf on the {ranks} ranks listed; are ranks missing"):
        read_links(str(path))


def test_failed_checks_and_times_that_differ_manyfold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(clear_run(8, 7 / 8) + "# Out of bounds values : 3 FAILED\n")
    with pytest.raises(InputError, match="Out of bounds values : 3 FAILED"):
        read_links(str(path))
    text = clear_run(8, 7 / 8)
    path.write_text(text + text[text.index("     1048576") :].replace("   23.50 ", "  235.00 "))
    with pytest.raises(InputError, match=r"got 23\.5 and 235 us for 917504 bytes; repeats that agree"):
        read_links(str(path))
    path.write_text(text + text[text.index("     1048576") :].replace("   23.50 ", "   60.00 "))
    said = "; repeats of 1 size are apart, as at 917504 bytes: 23.5 to 60 us"
    assert said in str(read_links(str(path)).source)
    path.write_text(clear_run(8, 7 / 8).replace("  914.78 ", "    0.91 ").replace("   75.92 ", "    0.07 "))
    with pytest.raises(InputError, match="bytes and microseconds"):
        read_links(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:\n8192 | 50.1 | 0.16 | success\n",
            "HCCL",
        ),
        ("===== Link Type between two GPUs =====\n      GPU0  GPU1\nGPU0  0     XGMI\n", "how GPUs are linked"),
        ("       NPU0   NPU1   CPU Affinity\nNPU0   X      HCCS   0-23\n", "how GPUs are linked"),
        ("nvbandwidth Version: v0.8\n 0  N/A  26.34\n", "copies between pairs"),
        ("[P2P (Peer-to-Peer) GPU Bandwidth Latency Test]\n", "copies between pairs"),
        ("RocmBandwidthTest Version: 2.6.0\n\nD/D  0  1\n0  N/A  26.1\n", "copies between pairs"),
        ("#bytes #iterations BW peak[Gb/sec] BW average[Gb/sec]\n65536 5000 391 390\n", "a network card's test"),
        ("# OSU MPI-CUDA All-to-All Personalized Exchange Latency Test v7.3\n1024 20.1\n", "OSU's benchmark"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X\n", "not how fast"),
        ("ACCESS TABLE:\n 0000:05:00.0\n\nWEIGHT TABLE:\n0000:05:00.0 0 15\n", "not how fast"),
        ("Unidirectional P2P=Enabled Bandwidth (P2P Writes) Matrix (GB/s)\n D\\D 0 1\n", "copies between pairs"),
        ("memcpy CE GPU(row) <- GPU(column) bandwidth (GB/s)\n  0  1\n0 N/A 397.61\n", "copies between pairs"),
        ("#bytes #iterations t_min[usec] t_max[usec]\n2 1000 1.80 4.05\n", "a network card's test"),
        ("EP: 4/16 | expanded dispatch: 115 GB/s (SO), 1064.000 us\n", "DeepEP's tests"),
    ],
)
def test_what_other_tools_print_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_links(str(path))


def test_outputs_without_the_name_of_the_test_are_told_by_the_file(tmp_path: Path) -> None:
    text = clear_run(8, 7 / 8).partition("\n")[2]  # as older versions print it
    (tmp_path / "run.txt").write_text(text)
    with pytest.raises(InputError, match=r"an unnamed test.*name the file after it, alltoall_perf\.txt"):
        read_links(str(tmp_path / "run.txt"))
    (tmp_path / "alltoallv_perf.txt").write_text(text)
    with pytest.raises(InputError, match="an unnamed test"):
        read_links(str(tmp_path / "alltoallv_perf.txt"))
    (tmp_path / "h100_all_to_all_v2.txt").write_text(text)
    assert read_links(str(tmp_path / "h100_all_to_all_v2.txt")).within_node is not None
    (tmp_path / "alltoall_perf.txt").write_text(text)
    level = read_links(str(tmp_path / "alltoall_perf.txt")).within_node
    assert level is not None and level.points is not None and len(level.points) == 3
