"""nccl-tests and rccl-tests: what `alltoall_perf` and `sendrecv_perf` print, or write as JSON (`-J`), as a topology.

Formats: `src/common.cu` and `src/util.cu` of NVIDIA/nccl-tests 2.0 to 2.20.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError, refuse_unused
from gemopt.formats.links.tables import rising, smoothed
from gemopt.topology import Level, Topology, load
from gemopt.words import counted

RANK_LINE = re.compile(
    r"^#\s+Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+(\d+)\s+on\s+(\S+)\s+device\s+(\d+)(?:\s+\[(\S+?)\])?",
    re.MULTILINE,
)
AGGREGATED = re.compile(r"agg iters: (\d+)")
PER_PROCESS = re.compile(r"nThread (\d+) nGpus (\d+)")
TEST_LINE = re.compile(r"^# Collective test starting: (\w+?)(?:_perf)?\s*$", re.MULTILINE)
HEAD = r"^\s*(\d+)\s+(\d+)\s+(\w+)\s+([a-z]\w*\s+)?"
ROWS = {  # by whether there is a column for the root; else a time of whole microseconds would stand in it
    rooted: re.compile(rf"{HEAD}{root}([\d.]+)\s+([\d.]+)\s+([\d.]+)(?:[^\S\n]+(\S+))?", re.MULTILINE)
    for rooted, root in ((True, r"(?:-?\d+\s+)?"), (False, ""))
}
ROOTLESS = re.compile(r"^#.*\bredop\s+time\b", re.MULTILINE)  # headers of older versions
BEGUN = re.compile(r"^[^\S\n]*\d+[^\S\n]+\d+[^\S\n]+[a-z]\w*.*$", re.MULTILINE)  # also a row cut short
USED = ("alltoall", "sendrecv")
WHOLE = f"the whole output of {' or '.join(test + '_perf' for test in USED)} of nccl-tests"
NO_TYPES = {"", "none"}
OUT_OF_BOUNDS = re.compile(r"Out of bounds values : [1-9]\d* FAILED")
TOLD_GBS, NEAR = 1.0, 0.02  # GB/s from which two digits tell the ratio of speeds, to this part
RIGHT = {"", "0", "0e+00", "N/A", "None", "0.0"}


@dataclass(frozen=True)
class Device:
    """A rank as it is listed: on which device of which host, and by which process."""

    rank: int
    group: str
    process: str
    host: str
    name: str


@dataclass(frozen=True)
class Row:
    """Bytes, type and reduction of a message, microseconds out of place, and how many elements came wrong."""

    size: int
    kind: str
    redop: str
    us: float
    wrong: str


@dataclass(frozen=True)
class Run:
    """What one run of a test says.

    per_process: GPUs of each process; aggregated: exchanges timed together; speeds: of the algorithm and on the bus,
    GB/s, which tell how many ranks there were.
    """

    tests: set[str]
    devices: list[Device]
    rows: list[Row]
    per_process: int
    aggregated: int
    speeds: Sequence[tuple[float, float]] = ()


def printed(text: str, source: str) -> Run:
    """A run as it is printed; `InputError` where rows are cut."""
    pattern = ROWS[not ROOTLESS.search(text)]
    found = pattern.findall(text)
    rows = [Row(int(size), kind, redop.strip(), float(us), wrong) for size, _, kind, redop, us, _, _, wrong in found]
    devices = [
        Device(int(rank), group, pid, host, f"{device} {bus}")
        for rank, group, pid, host, device, bus in RANK_LINE.findall(text)
    ]
    if not devices or not rows:
        hint = "or a document or matrix in .json, or a name such as nvlink-8"
        raise InputError(source, f"{len(devices)} ranks, {len(rows)} rows", WHOLE, hint)
    cut = next((line for line in BEGUN.findall(text) if not pattern.match(line)), None)
    if cut is not None:
        raise InputError(source, cut.strip(), "whole rows of nccl-tests", "was the output cut?")
    if failed := OUT_OF_BOUNDS.search(text):
        raise InputError(source, failed[0], "0: what was received is not what was sent")
    if "cputime" in text:
        raise InputError(source, "cputime", "times of exchanges, not of their launch", "run it without -C 1")
    process, together = PER_PROCESS.search(text), AGGREGATED.search(text)
    per_process = int(process[1]) * int(process[2]) if process else 1
    speeds = [(float(algorithm), float(bus)) for *_, algorithm, bus, _ in found]
    return Run(set(TEST_LINE.findall(text)), devices, rows, per_process, int(together[1]) if together else 1, speeds)


def is_json(content: Any) -> bool:
    """Whether a JSON document is one that a test wrote."""
    return isinstance(content, dict) and {"config", "results", "nccl_version"} <= content.keys()


def written(content: Mapping[str, Any], source: str) -> Run:
    """A run as `-J` writes it."""
    try:
        config = content["config"]
        devices = [
            Device(
                int(each["rank"]), str(each["group"]), str(each["pid"]), str(each["hostname"]),
                f"{each['device']} {each['device_hex']}",
            )
            for each in config["devices"]
        ]  # fmt: skip
        rows = [_row(each) for each in content["results"]]
        per_process = int(config["nthreads"]) * int(config["ngpus"])
        test = Path(str(content["args"][0])).name.removesuffix("_perf") if content.get("args") else ""
        timed = [each["out_of_place"] for each in content["results"]]
        speeds = [(float(each["alg_bw"]), float(each["bus_bw"])) for each in timed]
        failed = int(content.get("out_of_bounds", {}).get("count", 0))
        run = Run({test} - {""}, devices, rows, per_process, int(config["aggregated_iterations"]), speeds)
    except (KeyError, TypeError, ValueError, AttributeError):
        hint = "times out of place, and not those of the host (-C 1); or give what it prints"
        raise InputError(source, "JSON without some of them", "devices, sizes and times of nccl-tests", hint) from None
    if failed:
        raise InputError(source, f"out_of_bounds {failed}", "0: what was received is not what was sent")
    return run


def _row(each: Mapping[str, Any]) -> Row:
    found = each["out_of_place"]
    us, wrong = float(found["time"]), found["nwrong"]
    if not isfinite(us):
        raise ValueError
    return Row(int(each["size"]), str(each["type"]), str(each["redop"]), us, f"{wrong}")


def topology_of(run: Run, source: str, *, inside: str | None, nodes: int | None = None) -> Topology:
    """Measured points within a node, or between nodes where the test ran on several.

    nodes: 1 where NVLink joins the hosts, which are one node then.
    Out-of-place times. Of an all-to-all of S bytes per rank each peer gets S / n, so S (n - smallest node) / n go
    between nodes, or S (n - 1) / n within one; of a send each rank's port carries S.
    """
    test = _checked(run, source)
    hosts = list(dict.fromkeys(device.host for device in run.devices))
    if nodes not in (None, 1, len(hosts)):
        limit = f"the {len(hosts)} hosts of {source}, or 1 where NVLink joins them all"
        raise InputError("--nodes", nodes, limit if len(hosts) > 1 else f"1, the only host of {source}")
    hosts = hosts if nodes != 1 else [""]
    node_of_rank = np.array([hosts.index(device.host) if len(hosts) > 1 else 0 for device in run.devices])
    sizes, total = np.bincount(node_of_rank), len(run.devices)
    size, several = int(sizes.max()), len(hosts) > 1
    most = (total - int(sizes.min()) if several else total - 1) / total  # of what a rank has, through the fullest port
    share = 1.0 if test == "sendrecv" else most
    points = sorted({(row.size * share, row.us) for row in run.rows if row.size > 0})
    level = Level(points=rising(points, source))
    within = None if several else level
    if inside is not None and not (several and size > 1):
        refuse_unused({"--inside": inside}, f"does not apply to {source}")
    if several and size > 1:
        if inside is None:
            limit, hint = "the test ran between nodes; say how fast one is inside", "nvlink-8"
            raise InputError("--inside", None, limit, f"{hint}; where NVLink joins all of them: --nodes 1")
        within = load(inside).within_node
    made = f"{test}_perf of nccl-tests on {counted(total, 'GPU')} of {counted(len(hosts), 'node')}"
    return Topology(
        name=Path(source).stem,
        node_of_rank=node_of_rank,
        within_node=within,
        between_nodes=level if several else None,
        source=f"{made}, {source}{smoothed(points, level)}",
    )


def _checked(run: Run, source: str) -> str:
    """The name of the test; `InputError` where it is no exchange of one kind between known ranks."""
    if run.aggregated != 1:
        raise InputError(source, f"agg iters: {run.aggregated}", "exchanges one after the other", "run it without -m")
    if len({device.group for device in run.devices}) > 1:
        raise InputError(source, "ranks of several groups", "one group of ranks", "run it without NCCL_TESTS_SPLIT")
    for row in run.rows:
        if row.wrong not in RIGHT:
            found = f"#wrong {row.wrong} at {row.size} bytes"
            raise InputError(source, found, "0: what was received is not what was sent")
    test = " and ".join(sorted(run.tests)) or _told_by_name(source)
    if test not in USED:
        hint = "" if test else f"older versions do not name it: name the file after it, {USED[0]}_perf.txt"
        limit = f"the output of {' or '.join(each + '_perf' for each in USED)}"
        raise InputError(source, test or "an unnamed test", limit, hint)
    types = sorted({row.kind for row in run.rows})
    if len(types) > 1:
        raise InputError(source, f"types {', '.join(types)}", "exchanges of one type", "run it with one, as -d float")
    reduced = {row.redop for row in run.rows} - NO_TYPES
    if test == "alltoall" and reduced:
        raise InputError(source, f"a test that takes the {reduced.pop()}", "an all-to-all, which takes none")
    _check_devices(run, source)
    total = len(run.devices)
    per_bus = (total - 1) / total if test == "alltoall" else 1.0
    clear = [pair for pair in run.speeds if pair[0] >= TOLD_GBS]
    told = next((pair for pair in clear if abs(pair[1] - per_bus * pair[0]) > NEAR * pair[0]), None)
    if told is not None:
        found = f"busbw {told[1]:g} for algbw {told[0]:g}"
        limit = f"{per_bus * told[0]:.2f}, as of {test}_perf on the {total} ranks listed"
        raise InputError(source, found, limit, "are ranks missing, or is it another test?")
    return test


def _check_devices(run: Run, source: str) -> None:
    numbers = [device.rank for device in run.devices]
    if numbers != list(range(len(numbers))):
        raise InputError(source, numbers, "ranks 0, 1, ... once each", "one run in a file")
    listed = Counter((device.host, device.process) for device in run.devices)
    if min(listed.values()) < run.per_process:
        found = f"{min(listed.values())} of the {run.per_process} GPUs of a process"
        raise InputError(source, found, "all GPUs listed", "give what it prints, or run a process for each GPU")
    (host, name), times = Counter((device.host, device.name) for device in run.devices).most_common(1)[0]
    if times > 1:
        found = f"{times} ranks on device {name.split()[0]} of {host}"
        raise InputError(source, found, "a device for each rank", "give nodes names of their own in the lines of ranks")


def _told_by_name(source: str) -> str:
    """The test that a file is named after, as older outputs do not say it."""
    name = Path(source).name.lower()
    return next((test for test in USED if re.search(f"{'_?'.join(test)}(?!v)", name)), "")  # alltoallv is another
