"""58 layers of 256 experts on 512 ranks: what a solve takes; prints a table in Markdown.

python benchmarks/scale.py [--layers 58] [--steps 200] [--slots 1 2] [--topology none 64x8-ib400] [--limit 120]

What-if of 64 nodes of 8: links by name, ranks drawn from U[0.9, 1.1], a staircase of 128 assignments, steps of
32768 tokens with 8 assignments each (`instances.routing`). One process for each row, so that the peak is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from instances import BASE_US, TILE, TILE_US, routing, speeds
from machine import stamp

import gemopt
from gemopt.links import Exchange
from gemopt.profile import Device, Profile, Sample

RANKS, TOKENS, TOKEN_BYTES = 512, 32768, 14336
LOADS = np.unique([*range(0, 2049, TILE), *range(1, 2050, TILE), 4096, 8192, 16384, 32768, 65536])


def profile() -> Profile:
    """512 ranks, each with the staircase over its speed."""
    latency_us = BASE_US + TILE_US * np.ceil(LOADS / TILE)
    return Profile(
        devices=[
            Device(
                rank=rank,
                samples=[
                    Sample(assignments=int(n), latency_us=float(us / speed))
                    for n, us in zip(LOADS, latency_us, strict=True)
                ],
            )
            for rank, speed in enumerate(speeds(RANKS))
        ],
        source="synthetic",
    )


def one(layers: int, steps: int, slots: int, topology: str, limit: float, threads: int) -> dict[str, object]:
    """One row."""
    given, measured = routing(layers=layers, steps=steps, tokens=TOKENS), profile()
    linked = topology != "none"
    exchange = Exchange(dispatch_bytes=TOKEN_BYTES, once_per="assignment") if linked else None
    loaded_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    cpu, begin = time.process_time(), time.monotonic()
    result = gemopt.solve(
        measured, given, slots_per_rank=slots, time_limit=limit, threads=threads,
        topology=topology if linked else None, exchange=exchange,
    )  # fmt: skip
    assert result.placement is not None and result.ceiling is not None and result.objective_us is not None
    held = (result.placement.physical_to_logical >= 0).sum(axis=1)
    return {
        "layers": layers, "steps": steps, "slots per rank": slots, "topology": topology, "limit s": limit,
        "threads": threads,
        "reached": sum(layer.reached for layer in result.per_layer),
        "copies per layer": round(float(held.mean()) - given.num_experts, 1),
        "change %": None if result.change is None else round(100 * result.change, 1),
        "gap %": None if result.gap is None else round(100 * result.gap, 1),
        "by copies %": round(100 * result.ceiling.copies_us / result.objective_us, 1),
        "wall s": round(time.monotonic() - begin, 1), "CPU s": round(time.process_time() - cpu, 1),
        "loaded MB": round(loaded_mb), "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }  # fmt: skip


def main() -> None:
    """Run the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--topology", nargs="+", default=["none", "64x8-ib400"])
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(one(**json.loads(given.row))))
        return
    print(stamp())
    shared = {"layers": given.layers, "steps": given.steps, "limit": given.limit, "threads": given.threads}
    for number, (topology, slots) in enumerate((name, slots) for name in given.topology for slots in given.slots):
        asked = json.dumps(shared | {"slots": slots, "topology": topology})
        done = subprocess.run([sys.executable, __file__, "--row", asked], stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout)
        if number == 0:
            print("|", " | ".join(row), "|\n|", " | ".join("---" for _ in row), "|", sep="")
        print("|", " | ".join(map(str, row.values())), "|", flush=True)


if __name__ == "__main__":
    main()
