"""What `make demo` takes from a fresh clone: installing, compiling, solving, page, in wall and CPU seconds.

    python benchmarks/first_minutes.py [--scratch FOLDER]

Asked: under 5 minutes on 2 cores, solving under 30 s. CPU seconds are those of all processes and threads together, and
hold on a machine with other load as well. The install takes wheels from pip's cache where they are there.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
PARTS = """
import time
from pathlib import Path
from gemopt.cli import demo

def told(name, work):
    def timed(*given, **named):
        wall, cpu = time.monotonic(), time.process_time()
        made = work(*given, **named)
        print(f"PART {name} {time.monotonic() - wall:.1f} {time.process_time() - cpu:.1f}", flush=True)
        return made
    return timed

for name in ("_warm_up", "plot", "_report"):
    setattr(demo, name, told(name, getattr(demo, name)))
Path("out").mkdir(exist_ok=True)
told("main", demo.main)(Path("out"))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the clone (1 GB)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().scratch) as folder:
        clone, rows = Path(folder) / "clone", {}
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        with timed(rows, "venv and pip"):
            subprocess.run(["make", "--silent", ".venv/.core"], cwd=clone, check=True)
        with timed(rows, "gemopt demo"):
            command = [str(clone / ".venv/bin/python"), "-c", PARTS]
            said = subprocess.run(command, cwd=clone, check=True, stdout=subprocess.PIPE, text=True).stdout
        size = int(subprocess.check_output(["du", "-sm", clone / ".venv"]).split()[0])
    print(machine.stamp("numba", "ortools"), f"load {os.getloadavg()[1]:.0f}\n")
    print(said, "\n| part | wall s | CPU s |\n|---|---|---|", sep="")
    names = {"_warm_up": "compiling", "plot": "picture", "_report": "page", "main": "all of the demo, without imports"}
    parts = {names[name]: (float(wall), float(cpu)) for name, wall, cpu in re.findall(r"PART (\S+) (\S+) (\S+)", said)}
    for name, (wall, cpu) in {**rows, **parts}.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} |")
    print(f"\n.venv: {size} MB")


@contextmanager
def timed(rows: dict[str, tuple[float, float]], name: str) -> Iterator[None]:
    """Note wall and CPU seconds of the processes that run inside."""
    wall, cpu = time.perf_counter(), _cpu()
    yield
    rows[name] = (time.perf_counter() - wall, _cpu() - cpu)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
