"""Traces whose requests meet others: the same tokens, together with those of their request, in steps as large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt
from timed import timed

from gemopt import solve
from gemopt.exceptions import InputError
from gemopt.traces import Phase, Traces, from_tokens, regrouped


def recorded(phase: Phase, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, 40)
    ids = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(lengths.sum())])
    starts = np.append(0, np.cumsum(lengths))
    batch = 8 if phase is Phase.DECODE else 1000
    found = from_tokens(ids, starts, num_experts=8, batch_size=batch, phase=phase, prefill_tokens=30)
    assert found.tokens is not None and found.tokens.request is not None
    return replace(found, tokens=replace(found.tokens, source_rank=found.tokens.request % 4))


@pytest.mark.parametrize("phase", [Phase.DECODE, Phase.PREFILL])
def test_every_repeat_has_the_same_tokens_in_other_company(phase: Phase) -> None:
    given = recorded(phase)
    found = regrouped(given, 3, seed=1)
    before, after = given.tokens, found.tokens
    assert before is not None and after is not None and after.request is not None and after.source_rank is not None
    assert found.num_steps <= 3 * given.num_steps and found.num_steps > 2 * given.num_steps
    np.testing.assert_array_equal(found.counts.sum(axis=0), 3 * given.counts.sum(axis=0))
    np.testing.assert_array_equal(found.counts[: given.num_steps], given.counts)
    assert (after.source_rank == after.request % 4).all()
    np.testing.assert_array_equal(np.bincount(after.request), 3 * np.bincount(before.request))
    assert found.phase is not None and (found.phase == int(phase)).all()
    if phase is Phase.PREFILL:  # whole requests stay whole
        assert len(np.unique(np.stack([after.request, after.step_of_token]), axis=1).T) == 3 * 40
    sizes, most = (np.bincount(each.step_of_token) for each in (after, before))
    assert sizes.max() <= most.max() + 9
    again = regrouped(given, 3, seed=1)
    assert np.array_equal(again.counts, found.counts)
    assert not np.array_equal(regrouped(given, 3, seed=2).counts, found.counts)
    assert np.array_equal(regrouped(given, 1).counts, given.counts)


def test_steps_of_a_task_stay_among_themselves() -> None:
    given = recorded(Phase.PREFILL)
    task = np.arange(given.num_steps) % 2
    given = replace(given, task=task, task_names=("a", "b"))
    found = regrouped(given, 4)
    for name in given.task_names:
        mine, theirs = (each.select(task=name).counts.sum(axis=0) for each in (given, found))
        np.testing.assert_array_equal(theirs, 4 * mine)


def test_what_cannot_be_regrouped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = recorded(Phase.PREFILL)
    with pytest.raises(InputError, match="times: got 0"):
        regrouped(given, 0)
    with pytest.raises(InputError, match=r"Traces\.request"):
        regrouped(replace(given, tokens=None), 2)
    given.save(tmp_path / "t.safetensors")
    code, out, _ = gemopt(capsys, "trace", "regroup", tmp_path / "t.safetensors", "-o", tmp_path / "more.safetensors")
    assert code == 0 and f"the requests of {given.num_steps}" in out
    assert np.array_equal(Traces.load(tmp_path / "more.safetensors").counts, regrouped(given, 4).counts)
    replace(given, tokens=None).save(tmp_path / "counts.safetensors")
    code, _, err = gemopt(
        capsys, "trace", "regroup", tmp_path / "counts.safetensors", "-o", tmp_path / "no.safetensors"
    )
    assert code == 2 and "request" in err and err.count("\n") == 1 and not (tmp_path / "no.safetensors").exists()


def test_fitting_few_steps_is_said_with_the_way_out() -> None:
    given, profile = recorded(Phase.PREFILL), timed(range(4), lambda n, _: 10.0 + n, (0, 400))
    unknown = Traces(counts=given.counts)

    def said(traces: Traces) -> list[str]:
        return [note for note in solve(profile, traces, solver="lpt").notes if "others it may do worse" in note]

    assert [note.partition("worse: ")[2] for note in (*said(given), *said(unknown))] == [
        "`gemopt trace regroup` makes more of the same requests",
        "record more",
    ]
    assert said(regrouped(given, 6)) == []
