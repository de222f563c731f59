"""Every command that takes latencies and traffic says where they are of different networks, as solve does."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_inputs import gemopt, profile, traces

from gemopt.placement import Placement
from gemopt.profile import MoeShape, Profile, profile_doubts


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "o.json", "p.json", "t.safetensors"),
        ("compare", "p.json", "t.safetensors", "--solvers", "linear"),
        ("compare", "p.json", "t.safetensors", "--current", "o.json", "--moves"),
        ("replay", "t.safetensors", "--profile", "p.json", "--window", "2", "--strategies", "contiguous"),
        ("advise", "p.json", "t.safetensors", "--window", "2", "--no-sweep"),
        ("report", "o.json", "--profile", "p.json", "--traces", "t.safetensors", "-o", "r.html"),
    ],
)
def test_commands_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    if words[0] == "report":
        pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    traces(top_k=2).save("t.safetensors")
    Placement.contiguous(2, 4, 2).save("o.json")
    for top_k, said in ((3, "top-k: 3, not 2"), (2, "")):
        profile().with_model(top_k=top_k).save("p.json")
        code, _, err = gemopt(capsys, *words)
        assert code == 0 and ("another network" in err) == bool(said) and said in err


def test_more_active_experts_than_the_network_has_are_of_another() -> None:
    samples = [{"assignments": 64 * n, "active_experts": n, "latency_us": 9 + n} for n in (2, 5)]
    measured = Profile(devices=[{"rank": 0, "samples": samples}])
    assert profile_doubts(measured, traces(experts=8)) == []
    assert "(up to 5 active experts, of 4)" in profile_doubts(measured, traces(experts=4))[0]
    sized = measured.model_copy(update={"model": MoeShape(num_experts=64, top_k=4)})
    assert "(experts: 64, not 8)" in profile_doubts(sized, traces(experts=8))[0]


def test_ranks_that_cost_the_same_under_any_load_are_named() -> None:
    def doubts(*loads: tuple[int, ...]) -> list[str]:
        samples = [[{"assignments": n, "latency_us": 9.0 + n} for n in each] for each in loads]
        return profile_doubts(
            Profile(devices=[{"rank": rank, "samples": each} for rank, each in enumerate(samples)]), traces()
        )

    assert doubts((0, 8, 16), (1, 2)) == []
    told = "measured under one load: taken to cost the same under any"
    assert doubts((8, 16), (64,), (0,), (0, 64)) == [f"ranks 1, 2 {told}"]
    assert doubts((8,), (8,))[0].startswith("every rank measured under one load")
