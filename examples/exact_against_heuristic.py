"""One small layer: what baselines and the search leave, and the optimum that CP-SAT proves."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import gemopt
from gemopt.compare import Comparison
from gemopt.formats.tables.kernel import Unit, read_table, slow_down, what_if

DATA = Path(str(resources.files("gemopt"))) / "data"
SOLVERS = ("linear", "eplb", "lpt", "local-search", "cpsat")


def main() -> list[Comparison]:
    """Compare on 8 steps of one layer of gpt-oss-20b, four ranks of which one is slower."""
    from gemopt.cli.app import show
    from gemopt.cli.tables import comparison_table
    from gemopt.formats.tables.kernel import read_fleet

    table = read_table(DATA / "moe_block_rtxpro6000_qwen3_30b.csv", unit=Unit.TOKENS, top_k=8)
    fleet = read_fleet(DATA / "gpu_variability.csv", "longhorn_sgemm")
    profile = slow_down(what_if(table, fleet, ranks=4, seed=0), 0, 1.3)
    traces = gemopt.Traces.load(DATA / "gptoss20b_trace_mixed_b64.npz").steps(slice(0, 8))
    one = gemopt.Traces(counts=traces.counts[:, :1])
    rows = gemopt.compare(profile, one, solvers=SOLVERS, holdout=0.0, time_limit=8, patience=5)
    show(comparison_table(rows))
    return rows


if __name__ == "__main__":
    main()
