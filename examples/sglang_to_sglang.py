"""A dump of SGLang's recorder in, a map that SGLang starts with out; here the dump is made up."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import gemopt
from gemopt.formats.engine import TraceOptions
from gemopt.formats.importing import import_traces
from gemopt.formats.registry import export

LAYERS, EXPERTS, RANKS = 3, 16, 4  # layer 0 is dense


def dump(path: Path) -> None:
    """Statistics as `/dump_expert_distribution_record` writes them: [steps, decoder layers, logical experts]."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.linspace(1, 40, EXPERTS), size=(120, LAYERS, EXPERTS))
    counts[:, 0] = 0
    path.write_text(json.dumps({"logical_count": counts.tolist()}))


def main(folder: Path | None = None) -> list[list[int]]:
    """Import, solve, export; returns the map's rows, one per decoder layer."""
    folder = Path(tempfile.mkdtemp(prefix="gemopt-sglang-")) if folder is None else folder
    dump(folder / "dump.json")
    options = TraceOptions(num_hidden_layers=LAYERS, model="my-org/my-moe")
    traces = folder / "traces.safetensors"
    found = import_traces([folder / "dump.json"], source="sglang", destination=traces, options=options)
    print("\n".join(found.notes))
    loads = [{"assignments": n, "latency_us": 30 + n / 10} for n in (0, 500, 1000)]
    devices = [{"rank": rank, "uuid": f"GPU-{rank}", "samples": loads} for rank in range(RANKS)]
    result = gemopt.solve(gemopt.Profile(devices=devices), traces, time_limit=3, patience=3)
    print(result.summary())
    assert result.placement is not None
    written = export(result.placement, to="sglang", path=folder / "map.json")
    print(f"wrote {', '.join(written.files)}\nstart: {written.command}")
    rows: list[list[int]] = json.loads((folder / "map.json").read_text())["physical_to_logical_map"]
    return rows


if __name__ == "__main__":
    main()
