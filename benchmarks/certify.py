"""What `solve` certifies in a time: gaps of the checked bound, by kind of instance; prints a table in Markdown.

python benchmarks/certify.py [--rows tiny slack ...] [--draws N] [--stretch 1.0] [--threads 1] [--together]

Every instance is solved for the row's limit, and its certificate is verified; the gap is that of the bound that the
verifier has checked itself, against the placement of the same call. Latencies are `a + b N` without an offset
(a = 0), where bounds are hardest: `--offset 60` adds 60 us to 0.146 us per assignment. gpt-oss-20b traces are those of
`examples/data`, the others drawn by `instances.routing`. With spare slots the copies bound is in the simple one. On a
machine that others use `--stretch` lengthens the wall limits; CPU seconds are those of the solving process and say what
was really spent. `--draws`: at most so many draws or layers of a row. `--together`: layers of gpt-oss in one call, as a
model is solved, on the first one's ranks, with the limit of each added up; seconds are one layer's.
`--rows`: groups or names. `--threads`: 1, or 2 for layers together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from instances import TILE, TILE_US, routing, speeds
from machine import stamp

import gemopt
from gemopt.certificate import Certificate
from gemopt.profile import Device, Profile, Sample
from gemopt.traces import Traces
from gemopt.verify import verify

ROOT = Path(__file__).resolve().parents[1]
GPTOSS = ROOT / "examples/data/gptoss20b_trace_mixed_b64.npz"
CLOSED = 1e-6


@dataclass(frozen=True)
class Row:
    """One line of the table: experts, ranks, steps; equal ranks; tile of a staircase (1: affine); limit in seconds.

    spare: slots of each rank beyond those that hold the experts.
    """

    name: str
    group: str
    experts: int
    ranks: int
    steps: int
    equal: bool
    tile: int
    limit: float
    draws: int
    asked: str
    spare: int = 0


ROWS = (
    Row("E 16, G 4, T 100, affine, differ", "tiny", 16, 4, 100, False, 1, 2, 10, "0, 95 %"),
    Row("E 16, G 4, T 100, affine, equal", "tiny", 16, 4, 100, True, 1, 2, 10, "0, 95 %"),
    Row("E 16, G 4, T 100, staircase, differ", "tiny", 16, 4, 100, False, TILE, 2, 10, "0, 95 %"),
    Row("E 16, G 4, T 1000, affine, differ", "tiny", 16, 4, 1000, False, 1, 10, 5, "0"),
    Row("E 16, G 4, T 1000, affine, equal", "tiny", 16, 4, 1000, True, 1, 10, 5, "0"),
    Row("E 24, G 4, T 100, affine, equal", "tiny", 24, 4, 100, True, 1, 5, 5, "0"),
    Row("E 8, G 4 (S 3), T 1000, affine, equal", "slack", 8, 4, 1000, True, 1, 10, 4, "0", spare=1),
    Row("E 8, G 4 (S 3), T 1000, affine, differ", "slack", 8, 4, 1000, False, 1, 10, 4, "0", spare=1),
    Row("E 16, G 2 (S 9), T 1000, affine, differ", "slack", 16, 2, 1000, False, 1, 10, 4, "0", spare=1),
    Row("E 16, G 4 (S 5), T 100, affine, equal", "slack", 16, 4, 100, True, 1, 10, 4, "0", spare=1),
    Row("E 16, G 4 (S 5), T 100, affine, differ", "slack", 16, 4, 100, False, 1, 10, 4, "0", spare=1),
    Row("E 16, G 4 (S 5), T 100, staircase, differ", "slack", 16, 4, 100, False, TILE, 10, 4, "0", spare=1),
    Row("E 16, G 4 (S 5), T 1000, affine, equal", "slack", 16, 4, 1000, True, 1, 10, 4, "0", spare=1),
    Row("E 16, G 4 (S 5), T 1000, affine, differ", "slack", 16, 4, 1000, False, 1, 10, 4, "0", spare=1),
    Row("S 2, E 32, T 200, affine, equal", "two slots", 32, 16, 200, True, 1, 60, 2, "0"),
    Row("S 2, E 32, T 200, affine, differ", "two slots", 32, 16, 200, False, 1, 60, 2, "0"),
    Row("gpt-oss-20b mixed, G 16", "gptoss", 32, 16, 400, False, 1, 10, 24, "mean 0.5 %"),
    Row("gpt-oss-20b mixed, G 8", "gptoss", 32, 8, 400, False, 1, 10, 24, "mean 3 %"),
    Row("gpt-oss-20b mixed, G 4", "gptoss", 32, 4, 400, False, 1, 10, 24, "mean 2.5 %"),
    Row("gpt-oss-20b mixed, G 8, staircase of 16", "gptoss", 32, 8, 400, False, 16, 10, 24, "half of 19 %"),
    Row("gpt-oss-20b mixed, G 4, staircase of 16", "gptoss", 32, 4, 400, False, 16, 10, 24, "half of 14 %"),
    Row("E 256, T 1000, G 64 (S 4)", "large", 256, 64, 1000, False, 1, 10, 2, "3 %"),
    Row("E 256, T 1000, G 32 (S 8)", "large", 256, 32, 1000, False, 1, 10, 2, "5 %"),
    Row("E 256, T 1000, G 16 (S 16)", "large", 256, 16, 1000, False, 1, 10, 2, "8 %"),
    Row("E 256, T 1000, G 64 (S 5)", "copies", 256, 64, 1000, False, 1, 10, 2, "-", spare=1),
    Row("E 256, T 1000, G 32 (S 9)", "copies", 256, 32, 1000, False, 1, 10, 2, "-", spare=1),
)


def profile_of(row: Row, draw: int, offset: float) -> Profile:
    """`offset + b N`, or the staircase that it is at the ends of tiles, over the speed of each rank."""
    speed_G = np.ones(row.ranks) if row.equal else speeds(row.ranks, seed=draw)
    largest = 65536
    edges = np.arange(0, largest + 1, row.tile) if row.tile > 1 else np.array([0, largest])
    loads = np.unique(np.concatenate([edges, edges + 1])) if row.tile > 1 else edges
    times = offset + TILE_US / TILE * row.tile * np.ceil(loads / row.tile) + 1e-6
    return Profile(
        devices=[
            Device(
                rank=g,
                samples=[
                    Sample(assignments=int(n), latency_us=float(y / s)) for n, y in zip(loads, times, strict=True)
                ],
            )
            for g, s in enumerate(speed_G)
        ]
    )


def cases(row: Row, most: int, *, together: bool) -> Iterator[tuple[int, Traces]]:
    """Draws, or layers of the recorded trace, one by one or together."""
    draws = range(min(most, row.draws))
    if row.group == "gptoss":
        counts = np.load(GPTOSS)["counts"][: row.steps].astype(np.int64)
        layers = [draw * 11 % 24 for draw in draws]
        for some in [sorted(layers)] if together else [[layer] for layer in layers]:
            yield some[0], Traces(counts=counts[:, some])
    else:
        for draw in draws:
            tokens = 4096 if row.experts == 256 else 64 * row.experts
            top_k = 8 if row.experts == 256 else 4
            yield draw, routing(layers=1, experts=row.experts, steps=row.steps, tokens=tokens, top_k=top_k, seed=draw)


def measure(row: Row, *, most: int, stretch: float, offset: float, threads: int, together: bool, folder: Path) -> str:
    """One line of the table."""
    gaps, claimed, simple, cpus, walls, kinds = [], [], [], [], [], []
    for draw, traces in cases(row, most, together=together):
        profile, path, layers = profile_of(row, draw, offset), folder / "certificate.json", traces.num_layers
        slots = row.experts // row.ranks + row.spare
        wall, cpu = time.monotonic(), time.process_time()
        gemopt.solve(
            profile, traces, cost="staircase", threads=threads, time_limit=row.limit * stretch * layers,
            seed=draw, certificate=path, slots_per_rank=slots,
        )  # fmt: skip
        cpus.append((time.process_time() - cpu) / layers)
        walls.append((time.monotonic() - wall) / layers)
        plain = gemopt.solve(profile, traces, cost="staircase", solver="lpt", threads=1, slots_per_rank=slots)
        for layer, other in zip(verify(path, profile, traces).layers, plain.per_layer, strict=True):
            assert other.bound_us is not None
            gaps.append(1 - layer.checked_us / layer.objective_us)
            claimed.append(1 - layer.claimed_us / layer.objective_us)
            simple.append(1 - other.bound_us / layer.objective_us)
        kinds += [layer.proof.value for layer in Certificate.load(path).layers]
    closed = sum(gap <= CLOSED for gap in claimed)
    return (
        f"| {row.name} | {row.asked} in {row.limit:g} s | {100 * np.mean(simple):.2f} | {100 * np.mean(claimed):.2f} | "
        f"{100 * np.mean(gaps):.2f} | {100 * np.max(gaps):.2f} | {closed} of {len(gaps)} | {np.mean(cpus):.1f} | "
        f"{np.mean(walls):.0f} | {', '.join(sorted(set(kinds)))} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=["tiny", "slack", "two slots", "gptoss", "large", "copies"])
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--offset", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--together", action="store_true")
    given = parser.parse_args()
    options = {"stretch": given.stretch, "offset": given.offset, "together": given.together}
    options["threads"] = given.threads or 1 + given.together
    print(f"{stamp('numpy', 'numba', 'scipy')}; {options}\n")
    print("| instance | asked | simple bound % | claimed % | certified % | worst % | proven | CPU s | wall s | proof |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="gemopt-certify-") as folder:
        for row in ROWS:
            if row.group in given.rows or row.name in given.rows:
                print(measure(row, most=given.draws, **options, folder=Path(folder)), flush=True)


if __name__ == "__main__":
    main()
