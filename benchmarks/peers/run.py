"""The public benchmark: published balancers and papers' methods beside gemopt, on one fixed list of cells.

python benchmarks/peers/run.py [--seeds 3] [--only TEXT] [--page] [--record]

Cells that are in benchmarks/results/peers.jsonl already are not run again, so a run may be stopped and started at any
time. `--only`: cells whose name holds the text. `--page`: only write the page and the figure. `--record`: and this
release's row of the history. Needs torch and, the first time, the package index: the wheels of the engines (400 MB).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

RESULTS = HERE.parent / "results" / "peers.jsonl"


def main() -> None:
    """Run what is missing, seed by seed, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("CELL", "SEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    from cells import CELLS

    if asked.one:
        one(next(cell for cell in CELLS if cell.name == asked.one[0]), int(asked.one[1]))
        return
    if not asked.page:
        from engine_wheels import engine_files

        for name in ("sglang", "vllm", "vllm-ascend"):
            engine_files(name)  # once, before the children ask
        wanted = [(cell.name, seed) for seed in range(asked.seeds) for cell in CELLS if asked.only in cell.name]
        for cell, seed in wanted:
            if (cell, seed) not in done():
                run(cell, seed)
    from page import write

    write(RESULTS, record=asked.record)


def one(cell: object, seed: int) -> None:
    """Print the rows of a cell; gemopt and torch keep to one core."""
    import torch
    from methods import rows

    torch.set_num_threads(1)
    for row in rows(cell, seed):
        print(json.dumps(row), flush=True)


def run(cell: str, seed: int) -> None:
    """A cell in a process of its own; its rows are kept when all are there."""
    print(f"{cell}, seed {seed}", flush=True)
    command = [sys.executable, str(HERE / "run.py"), "--one", cell, str(seed)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    with RESULTS.open("a") as file:
        file.write(child.stdout)


def done() -> set[tuple[str, int]]:
    """Cells and seeds that are there."""
    from page import read

    return {(row["cell"], row["seed"]) for row in read(RESULTS)}


if __name__ == "__main__":
    main()
