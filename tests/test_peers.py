"""The public benchmark: verdicts from rows, and the published balancers called as they are meant to be."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "peers"))
import balancers
import cells
import page
from timed import timed

from gemopt.costs import fit
from gemopt.evaluate import evaluate
from gemopt.problem import problems
from gemopt.solvers import get
from gemopt.solvers.base import Options
from gemopt.traces import Traces

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"


def test_lost_and_ahead_mean_in_every_seed() -> None:
    names = [cell.name for cell in cells.CELLS[:3]]
    assert len({cell.name for cell in cells.CELLS}) == len(cells.CELLS)
    held = {  # by cell, method and seed
        names[0]: {"gemopt": (-0.2, -0.3), "FlashLB": (-0.1, -0.2), "contiguous": (0.0, 0.0)},
        names[1]: {"gemopt": (-0.2, -0.1), "FlashLB": (-0.25, -0.3), "contiguous": (0.0, 0.0)},
        names[2]: {"gemopt": (0.1, -0.1), "FlashLB": (0.3, 0.2), "contiguous": (0.0, 0.0)},
    }
    rows = [
        {"cell": cell, "seed": seed, "method": method, "held": value}
        for cell, by_method in held.items()
        for method, values in by_method.items()
        for seed, value in enumerate(values)
    ]
    found = page.verdicts(rows)
    assert [(each.cell, each.word, each.best) for each in found] == [
        (names[1], "lost", "FlashLB"),
        (names[2], "level", "contiguous"),
        (names[0], "ahead", "FlashLB"),
    ]


def test_the_committed_page_is_of_the_committed_rows() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [row for row in rows if row["release"] == rows[-1]["release"]]
    assert {row["cell"] for row in rows} <= {cell.name for cell in cells.CELLS}
    text, found = RESULTS.with_suffix(".md").read_text(), page.verdicts(rows)
    assert all(line in text for line in page.summary(found, rows))
    *_, last = csv.DictReader(RESULTS.with_name("peers_history.csv").open())
    readme, docs = ((ROOT / name).read_text() for name in ("README.md", "docs/benchmark.md"))
    assert "on {cells} fixed cells".format(**last) in readme
    assert "in {ahead}, level in {level}, behind in {lost}.".format(**last) in readme
    assert "Of {cells} cells gemopt is ahead of the best of all in {ahead}, level in {level} ".format(**last) in docs


@pytest.mark.engines
@pytest.mark.parametrize("slots", [4, 5])
def test_published_balancers_balance(slots: int) -> None:
    """Each gives a table that holds every expert and is better than contiguous; EPLB's is that of our own."""
    rng = np.random.default_rng(0)
    mean_LE = rng.permuted(np.tile(np.linspace(1, 40, 16), (3, 1)), axis=1)
    traces = Traces(counts=rng.poisson(mean_LE, (40, 3, 16)))
    profile = timed(range(4), lambda n, _: 10.0 + n, (0, 4000))
    table = balancers.Table(traces, 4, slots)
    before = evaluate(table.contiguous, profile, traces).objective_us
    after: dict[str, Any] = {}
    for name, make in balancers.published().items():
        wanted_LGS = make()(table.counts_TLE, table.spread)
        assert wanted_LGS.shape == (3, 4, slots)
        after[name] = evaluate(table.placement(wanted_LGS), profile, traces).objective_us
        assert after[name] < before, name
    each = problems(fit(profile)[0], traces, slots)
    rows = [get("eplb").solve(problem, Options.lasting(60), None).row for problem in each]
    ours = evaluate(table.placement(np.reshape(rows, (3, 4, slots))), profile, traces).objective_us
    assert ours == pytest.approx(after["EPLB (vLLM)"], rel=0.02)
