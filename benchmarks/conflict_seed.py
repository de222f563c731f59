"""Does the conflict graph help local search? Local search from the cut of the graph, and from LPT, its own start.

    python benchmarks/conflict_seed.py --traces examples/data/*.npz -o benchmarks/results/conflict_seed.md

Placements are fitted on the first half of the steps and scored on both halves, as the change of the summed step
latency against contiguous placement. `descent` stops at the first optimum of single exchanges; `iterated` goes on,
with the same kicks from both starts, until 60 in a row gain nothing. Iterated figures are the mean over the seeds;
seconds are those of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemopt.costs import CostModel, fit
from gemopt.documents import write_text
from gemopt.evaluate import total_objective
from gemopt.formats.tables.kernel import Unit, read_fleet, read_table, slow_down, what_if
from gemopt.problem import Problem, problems
from gemopt.profile import Profile
from gemopt.solvers import get
from gemopt.solvers.base import Options, Row
from gemopt.traces import Traces

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
COLUMNS = [
    "traces",
    "latency",
    "start",
    "start fitted",
    "descent fitted",
    "held out",
    "seconds",
    "iterated fitted",
    "held out",
    "seconds",
]


@dataclass(frozen=True)
class Scores:
    """Changes against contiguous on the two halves, and seconds."""

    fitted: float
    held_out: float
    seconds: float = 0.0


def clusters(ranks: int) -> dict[str, Profile]:
    """Measured latencies on devices as different as those of a measured fleet; in the second, one is 30 % slower."""
    fleet = read_fleet(DATA / "gpu_variability.csv", "longhorn_sgemm")
    memory = read_fleet(DATA / "gpu_variability.csv", "longhorn_bert")
    h100 = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    surface = read_table(DATA / "moe_block_rtxpro6000_qwen3_30b.csv", unit=Unit.TOKENS, top_k=8)
    return {
        "H100": what_if(h100, fleet, ranks=ranks, seed=0),
        "RTX PRO 6000, one slow": slow_down(what_if(surface, fleet, ranks=ranks, seed=0, memory=memory), 0, 1.3),
    }


class Case:
    """Both halves of some traces under one cost model."""

    def __init__(self, traces: Traces, cost: CostModel) -> None:
        fitted, held_out = traces.split(0.5)
        self.fitted, self.held_out = problems(cost, fitted), problems(cost, held_out)
        contiguous = [np.arange(problem.num_experts) for problem in self.fitted]
        self.base = total_objective(self.fitted, contiguous), total_objective(self.held_out, contiguous)

    def score(self, rows: list[Row], seconds: float = 0.0) -> Scores:
        """Changes against contiguous placement."""
        values = total_objective(self.fitted, rows), total_objective(self.held_out, rows)
        return Scores(values[0] / self.base[0] - 1, values[1] / self.base[1] - 1, seconds)


def run(solver: str, layers: list[Problem], starts: list[Row] | None, *, seed: int, patience: int) -> list[Row]:
    """Rows of all layers; no time limit."""
    rows = []
    for index, problem in enumerate(layers):
        options = Options(deadline=time.monotonic() + 3600, seed=seed, patience=patience)
        row = get(solver).solve(problem, options, None if starts is None else starts[index]).row
        assert row is not None
        rows.append(row)
    return rows


def ablation(case: Case, seeds: int) -> Iterator[tuple[str, Scores, Scores, Scores]]:
    """(start, its score, after descent, after iterated search) for both starts."""
    for start in ("lpt", "conflict"):
        begin = time.perf_counter()
        rows = run(start, case.fitted, None, seed=0, patience=0)
        started = case.score(rows, time.perf_counter() - begin)
        begin = time.perf_counter()
        descended = run("local-search", case.fitted, rows, seed=0, patience=0)
        descent = case.score(descended, started.seconds + time.perf_counter() - begin)
        begin = time.perf_counter()
        found = [case.score(run("local-search", case.fitted, rows, seed=s, patience=60)) for s in range(seeds)]
        seconds = started.seconds + (time.perf_counter() - begin) / seeds
        means = [float(np.mean([getattr(each, half) for each in found])) for half in ("fitted", "held_out")]
        yield start, started, descent, Scores(means[0], means[1], seconds)


def main() -> None:
    """Print the table; write it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, nargs="+", default=sorted(DATA.glob("*trace*.npz")))
    parser.add_argument("--profile", type=Path, help="profile.json instead of the two what-if clusters")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.profile:
        profiles = {arguments.profile.stem: Profile.load(arguments.profile)}
    else:
        profiles = clusters(arguments.ranks)
    few = Traces.load(arguments.traces[0]).steps(slice(8))
    run("local-search", Case(few, fit(next(iter(profiles.values())))[0]).fitted, None, seed=0, patience=1)  # compiles
    table = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    for path in arguments.traces:
        for name, profile in profiles.items():
            case = Case(Traces.load(path), fit(profile)[0])
            for start, started, descent, iterated in ablation(case, arguments.seeds):
                cells = [f"{100 * started.fitted:+.2f}"]
                for scores in (descent, iterated):
                    cells += [f"{100 * scores.fitted:+.2f}", f"{100 * scores.held_out:+.2f}", f"{scores.seconds:.1f}"]
                table += f"| {path.stem} | {name} | {start} | {' | '.join(cells)} |\n"
    print(table)
    if arguments.output:
        write_text(arguments.output, f"# Local search from the conflict graph's cut\n\n{__doc__.strip()}\n\n{table}")


if __name__ == "__main__":
    main()
