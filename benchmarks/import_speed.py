"""How fast recordings of engines import, and with how much memory: `python benchmarks/import_speed.py --gigabytes 2`.

Makes dumps of a 61-layer, 256-expert network of each kind (a few files, repeated as hard links under new names), reads
each in a process of its own on one core, and prints a table. CPU seconds are counted, so other work on the machine does
not matter much; the files are in the page cache, so the disk does not either.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np

LAYERS, EXPERTS, SLOTS, STEPS, TOP_K = 61, 256, 288, 400, 8
RNG = np.random.default_rng(0)

_CHILD = """
import json, resource, sys, time
from pathlib import Path
source, target, *paths = sys.argv[1:]
if source == "sglang":
    import torch
    torch.set_num_threads(1)
from gemopt.formats.importing import import_traces
def memory(key):  # of this program; ru_maxrss would still know the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))
usage, before = resource.getrusage(resource.RUSAGE_SELF), memory("VmRSS")
wall = time.perf_counter()
import_traces([Path(p) for p in paths], source=source, destination=target)
wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
print(json.dumps([cpu, wall, memory("VmHWM") - before]))
"""


def counts(experts: int = EXPERTS) -> np.ndarray:
    """[steps, layers, experts] int32, the first three layers dense."""
    made = RNG.poisson(40, (STEPS, LAYERS, experts)).astype(np.int32)
    made[:, :3] = 0
    return made


def many(make: Callable[[Path, int], None], names: Iterator[str], folder: Path, size: float, distinct: int = 2) -> None:
    """Files of `size` bytes in all: `distinct` of them, then links."""
    first: list[Path] = []
    total = 0
    for number, name in enumerate(names):
        path = folder / name
        if number < distinct:
            make(path, number)
            first.append(path)
        else:
            os.link(first[number % distinct], path)
        total += path.stat().st_size
        if total >= size:
            return


def stat(folder: Path, size: float) -> None:
    """SGLang stat: one file per dump."""
    import torch

    def make(path: Path, number: int) -> None:
        torch.save({"rank": 0, "logical_count": torch.from_numpy(counts())}, path)

    many(make, (f"expert_distribution_recorder_{1000 + n}.pt" for n in range(10**6)), folder, size)


def per_pass(folder: Path, size: float, *, tokens: int = 0) -> None:
    """SGLang per_pass or per_token: one file per rank, as many ranks as the size needs."""
    import torch

    table = torch.from_numpy(
        np.stack([np.append(RNG.permutation(EXPERTS), RNG.permutation(32)) for _ in range(LAYERS)])
    )
    total, rank = 0, 0
    while total < size:
        records = []
        for step, made in enumerate(counts(SLOTS)):
            record = {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary"}
            record["global_physical_count"] = torch.from_numpy(made)
            if tokens:
                ids = RNG.integers(0, SLOTS, (LAYERS, tokens, TOP_K)).astype(np.int32)
                record |= {
                    "input_ids": list(range(tokens)),
                    "positions": list(range(tokens)),
                    "extend_seq_lens": None,
                    "forward_mode": 2,
                    "topk_ids_of_layer": torch.from_numpy(ids),
                    "misc_objects": [],
                }
            records.append(record)
        path = folder / f"expert_distribution_recorder_{1000 + rank}_{rank}.pt"
        torch.save({"records": records, "last_physical_to_logical_map": table}, path)
        total, rank = total + path.stat().st_size, rank + 1


def per_token(folder: Path, size: float) -> None:
    """SGLang per_token with 64 tokens per pass and rank."""
    per_pass(folder, size, tokens=64)


def statistic(folder: Path, size: float) -> None:
    """TensorRT-LLM's expert statistic."""
    from safetensors.numpy import save_file

    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))

    def make(path: Path, number: int) -> None:
        made = counts().astype(np.int64)
        arrays = {f"{step}_{layer}": made[step, layer] for step in range(STEPS) for layer in range(3, LAYERS)}
        save_file(arrays, path)

    many(make, (f"rank{n}.safetensors" for n in range(10**6)), folder, size)


def array(folder: Path, size: float) -> None:
    """Plain .npy arrays, int32."""
    many(lambda path, _: np.save(path, counts()), (f"{n:06d}.npy" for n in range(10**6)), folder, size)


def responses(folder: Path, size: float) -> None:
    """vLLM responses: 512 tokens each, uint8 ids as base64 .npy, one per line."""
    lines = []
    for _ in range(20):
        ids = np.argsort(RNG.random((512, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.uint8)
        ids[:, :3] = 0
        buffer = io.BytesIO()
        np.save(buffer, ids)
        encoded = base64.b64encode(buffer.getvalue()).decode()
        lines.append(json.dumps({"choices": [{"routed_experts": encoded}], "usage": {"completion_tokens": 400}}))
    text = "\n".join(lines) + "\n"
    with (folder / "responses.jsonl").open("w") as stream:
        for _ in range(max(1, int(size / len(text)))):
            stream.write(text)


CASES = [
    ("SGLang stat (.pt)", "sglang", stat, 1.0),
    ("SGLang per_pass (.pt)", "sglang", per_pass, 1.0),
    ("SGLang per_token (.pt), counts", "sglang", per_token, 1.0),
    ("TensorRT-LLM statistic (.safetensors)", "tensorrt-llm", statistic, 1.0),
    ("array (.npy, int32)", "array", array, 1.0),
    ("vLLM responses (.jsonl)", "vllm", responses, 0.01),
]


def measure(source: str, folder: Path, target: Path) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and added memory (KiB) of one import in its own process."""
    paths = [folder] if source != "vllm" else [folder / "responses.jsonl"]
    command = [sys.executable, "-c", _CHILD, source, str(target), *map(str, paths)]
    pinned = {"preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, **pinned)
    return tuple(json.loads(done.stdout))


def report(rows: list[str], gigabytes: float) -> str:
    """The table with its circumstances."""
    import safetensors
    import torch

    versions = f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    lines = [
        "# Import speed",
        "",
        f"{date.today()}, {versions}, safetensors {safetensors.__version__}, {platform.machine()} with",
        f"{os.cpu_count()} cores, one used. {LAYERS} layers, {EXPERTS} experts ({SLOTS} slots), {gigabytes:g} GB of",
        "dumps (responses: 1 %). MB/s are of CPU time (user and system), files in the page cache; memory is what the",
        "import added to the process at most, mapped pages of the file being read included.",
        "",
        "| recording | files | MB | CPU s | MB/s of CPU | wall s | added memory MB | largest file MB | output MB |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases, or those named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the dumps")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--output", type=Path, default=None, help="also write the table here")
    arguments = parser.parse_args()
    rows = []
    for name, source, make, share in CASES:
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            folder = Path(scratch) / "dumps"
            folder.mkdir()
            make(folder, arguments.gigabytes * share * 1e9)
            sizes = [path.stat().st_size for path in folder.iterdir()]
            target = Path(scratch) / "traces.safetensors"
            cpu, wall, added = measure(source, folder, target)
            total = sum(sizes) / 1e6
            rows.append(
                f"| {name} | {len(sizes)} | {total:.0f} | {cpu:.1f} | {total / cpu:.0f} | {wall:.1f} "
                f"| {added * 1.024e-3:.0f} | {max(sizes) / 1e6:.0f} | {target.stat().st_size / 1e6:.0f} |"
            )
            print(rows[-1], flush=True)
    text = report(rows, arguments.gigabytes)
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
