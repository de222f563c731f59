"""Fewest bytes between nodes for a little compute: against all placements, through `solve`, jobs and the commands."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute_links import placements, random_links
from cli_inputs import gemopt, gemopt_json, profile
from test_links import SLOTS, problems_of
from test_topology import EXCHANGE, HALF, OTHER, token_traces

from gemopt.evaluate import evaluate, linked_total, objective, total_objective
from gemopt.exceptions import InputError
from gemopt.solve import solve
from gemopt.solvers.base import Options
from gemopt.solvers.search.fewest import _best, _Fewest, search_fewest
from gemopt.topology.named import named

SLACK = 0.3


def test_the_fewest_of_all_placements_are_found_nearly_always_and_never_for_more_compute() -> None:
    met = tried = 0
    for seed in range(16):
        links = random_links(seed + 50, steps=4)
        if links.topology.num_nodes == 1:
            continue
        problems, rows = problems_of(links, SLOTS, seed), placements(4, SLOTS)
        pairs = [list(pair) for pair in product(rows, repeat=2)]
        compute = np.array([total_objective(problems, pair) for pair in pairs])
        sent = np.array([links.communication(pair, SLOTS).cross_node_bytes for pair in pairs])
        start = int(compute.argmin())
        options = Options.lasting(300)
        options.compute_slack, options.patience = SLACK, 2
        found = search_fewest(problems, links, pairs[start], options)
        assert total_objective(problems, found.rows) <= (1 + SLACK) * compute[start] * (1 + 1e-12)
        assert found.total_us == pytest.approx(linked_total(problems, found.rows, links))
        least = sent[compute <= (1 + SLACK) * compute[start]].min()
        tried += 1
        met += links.communication(found.rows, SLOTS).cross_node_bytes <= least * (1 + 1e-9)
    assert tried >= 6 and met >= 0.8 * tried, (met, tried)


def test_solve_says_what_it_saved_and_for_how_much_compute() -> None:
    traces, devices = token_traces(), profile(4)
    exchange = EXCHANGE.model_copy(update={"once_per": "node"})
    given: dict[str, Any] = {
        "cost": "staircase",
        "time_limit": 20.0,
        "patience": 1,
        "topology": "2x2-ib400",
        "exchange": exchange,
    }
    for slack in (0.0, 0.5):
        result = solve(devices, traces, compute_slack=slack, **given)
        assert result.placement is not None and result.links is not None and result.links.saved is not None
        saved, now = result.links.saved, evaluate(
            result.placement, devices, traces, cost="staircase", topology="2x2-ib400", exchange=exchange
        )  # fmt: skip
        assert now.communication is not None and result.objective_us == pytest.approx(now.objective_us)
        assert saved.compute_us[1] == pytest.approx(now.compute_us)
        assert saved.compute_us[1] <= (1 + slack) * saved.compute_us[0] * (1 + 1e-12)
        assert saved.cross_node_bytes[1] == now.communication.cross_node_bytes <= saved.cross_node_bytes[0]
        assert saved.fullest[1] == now.communication.fullest_bytes["between_nodes"]
        assert result.bound_us is not None and result.bound_us <= result.objective_us
        assert "of bytes between nodes" in result.links.summary(traces.num_steps)
    assert saved.cross_node_bytes[1] < saved.cross_node_bytes[0]
    for row in result.placement.physical_to_logical:  # each token's experts on one node
        assert {frozenset(row[:4].tolist()), frozenset(row[4:].tolist())} == {HALF, OTHER}


def test_a_node_may_have_no_slots() -> None:
    found = solve(
        profile(4), token_traces(), topology="2x2-ib400", exchange=EXCHANGE, slots_per_rank=[0, 0, 5, 5],
        compute_slack=0.1, patience=1, time_limit=20.0,
    )  # fmt: skip
    assert found.placement is not None and found.links is not None and found.links.saved is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"topology": None, "exchange": None}, "give a topology"),
        ({"topology": "nvlink-4"}, "there is one"),
        ({"solver": "cpsat"}, "use local-search or auto"),
        ({"solver": "moetuner"}, "use local-search or auto"),
        ({"compute_slack": 1.0}, "below 1"),
        ({"compute_slack": -0.1}, "from 0"),
        ({"compute_slack": True}, "a fraction"),
        ({"compute_slack": "0.5%"}, "a fraction"),
    ],
)
def test_wrong_use_is_refused(given: dict[str, object], said: str) -> None:
    options = {"topology": "2x2-ib400", "exchange": EXCHANGE, "compute_slack": 0.01, "time_limit": 1.0, **given}
    with pytest.raises(InputError, match=f"compute_slack.*{said}") as caught:
        solve(profile(4), token_traces(), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(4).save(tmp_path / "profile.json")
    token_traces().save(tmp_path / "traces.safetensors")
    named("2x2-ib400").save(tmp_path / "topology.json")
    inputs = ("solve", tmp_path / "profile.json", tmp_path / "traces.safetensors", "--cost", "staircase")
    wired = ("--topology", tmp_path / "topology.json", "--token-bytes", "4000", "--patience", "0")
    found = gemopt_json(capsys, *inputs, *wired, "--compute-slack", "0.2")
    saved = found["links"]["saved"]
    assert saved["compute_slack"] == 0.2 and saved["cross_node_bytes"][1] == found["links"]["cross_node_bytes"]
    assert gemopt_json(capsys, *inputs, *wired)["links"]["saved"] is None
    code, out, _ = gemopt(capsys, *inputs, *wired, "--compute-slack", "0.2")
    assert code == 0 and "at most +20 %" in out
    code, _, err = gemopt(capsys, *inputs, "--compute-slack", "0.2")
    assert code == 2 and "give a topology" in err and err.count("\n") == 1


@pytest.mark.parametrize("seed", [n for n in range(200, 230) if random_links(n, steps=4).topology.num_nodes > 1])
def test_points_are_what_their_rows_compute_and_send_and_seeds_repeat(seed: int) -> None:
    links = random_links(seed, steps=4)
    problems, rows = problems_of(links, SLOTS, seed), placements(4, SLOTS)
    start, stop = [rows[seed % len(rows)], rows[seed % 7]], np.zeros(1, np.uint8)
    options = Options.lasting(300)
    options.compute_slack, options.patience = SLACK, 1
    first, again = (_Fewest(problems, links, start, options) for _ in range(2))
    for search in (first, again):
        search.run(stop)
    assert all(map(np.array_equal, first.found.rows, again.found.rows))
    begun = first._begun(start, stop)
    for layer, front in enumerate(() if links.coupled else first.fronts):
        for point in _best(front):
            changed = [*start[:layer], point.row, *start[layer + 1 :]]
            loads = point.loads + begun.loads(1 - layer, first.ports)
            assert point.compute == pytest.approx(objective(problems[layer], point.row), rel=1e-5)
            assert first._sent(changed) == pytest.approx([loads.sum() / 2, loads.max()])
