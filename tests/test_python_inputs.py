"""Arrays as others hold them: tensors, data frames and masked arrays are read as they are meant, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from one_liners import one_line

from gemopt.exceptions import InputError
from gemopt.placement import Placement
from gemopt.profile import Sample
from gemopt.rules import Pinned
from gemopt.traces import Traces
from gemopt.traces.batching import from_tokens

COUNTS = np.random.default_rng(0).poisson(9, (5, 2, 8))
MAP = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]])


def placed(rows: object) -> Placement:
    return Placement(physical_to_logical=rows, slots_per_rank=[4, 4], num_experts=8)


def frames(**labels: object) -> list[Any]:
    pandas = pytest.importorskip("pandas")
    return [pandas.DataFrame(step, **labels) for step in COUNTS]


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"columns": [f"expert_{e}" for e in range(8)]},
        {"columns": [f"expert_{e:02d}" for e in range(8)]},
        {"columns": np.arange(8.0)},
        {"columns": list("01234567"), "index": ["layer0", "layer1"]},
    ],
)
def test_data_frames_in_order_are_their_numbers(labels: dict[str, object]) -> None:
    np.testing.assert_array_equal(Traces(counts=frames(**labels)).counts, COUNTS)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"columns": [3, 1, 0, 2, 4, 5, 6, 7]}, "columns 3, 1, 0, 2"),
        ({"index": [1, 0]}, "index 1, 0"),
        ({"index": [3, 4]}, "layer_ids"),
        ({"columns": ["layer", *range(7)]}, "columns layer, 0, 1"),
    ],
)
def test_labels_that_tell_another_order_are_not_read_over(labels: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        Traces(counts=frames(**labels))
    one_line(error)


def test_some_steps_of_a_frame_are_its_rows() -> None:
    pandas = pytest.importorskip("pandas")
    times = np.random.default_rng(2).random((20, 3))
    for index in (None, pandas.date_range("2026-01-01", periods=20, freq="s")):
        some = pandas.DataFrame(times, index=index)[10:15]
        np.testing.assert_array_equal(Traces(counts=COUNTS, rank_us=some).rank_us, times[10:15])
        with pytest.raises(InputError, match=r"Traces\.rank_us: got index"):
            Traces(counts=COUNTS, rank_us=some[::-1])
        with pytest.raises(InputError, match=r"Traces\.rank_us: got columns 2, 1, 0"):
            Traces(counts=COUNTS, rank_us=some[[2, 1, 0]])
    tasks = pandas.Series([1, 0, 0, 1, 0])
    some = Traces(counts=COUNTS, task=tasks, task_names=("a", "b"), layer_ids=pandas.Series([7, 4, 9])[[0, 2]])
    assert (some.layer_ids, some.task.tolist()) == ((7, 9), tasks.tolist())


def test_columns_of_slots_in_another_order() -> None:
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(placed(pandas.DataFrame(MAP)).physical_to_logical, MAP)
    with pytest.raises(InputError, match="columns 1, 0"):
        placed(pandas.DataFrame(MAP, columns=[1, 0, *range(2, 8)]))


def test_masks_within_a_list() -> None:
    whole = [np.ma.masked_array(step, mask=False) for step in COUNTS]
    np.testing.assert_array_equal(Traces(counts=whole).counts, COUNTS)
    with pytest.raises(InputError, match="masked values"):
        Traces(counts=[np.ma.masked_array(step, mask=step > 9) for step in COUNTS])


@pytest.mark.parametrize("of", [lambda t: t, lambda t: t.int(), lambda t: t.float(), lambda t: t.flip(0).flip(0)])
def test_placements_of_tensors(of: Callable[[Any], object]) -> None:
    torch = pytest.importorskip("torch")
    placement = placed(of(torch.tensor(MAP)))
    np.testing.assert_array_equal(placement.physical_to_logical, MAP)
    assert placement.layer_ids == [0, 1]


@pytest.mark.parametrize("of", [lambda n: n, np.array, lambda n: pytest.importorskip("torch").tensor(n)])
def test_a_number_is_no_placement(of: Callable[[Any], object]) -> None:
    with pytest.raises(InputError, match="2-dimensional"):
        placed(of(3))


@pytest.mark.parametrize(("made", "words"), [("bfloat16", "BFloat16"), ("sparse", "to_dense"), ("grad", "detach")])
def test_what_a_tensor_lacks_is_said(made: str, words: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(COUNTS)
    kinds = {"bfloat16": tensor.bfloat16(), "sparse": tensor.to_sparse(), "grad": tensor.float().requires_grad_()}
    with pytest.raises(InputError, match=words) as error:
        Traces(counts=kinds[made])
    one_line(error)


@pytest.mark.parametrize("wrong", [2.0, 2.5, "2", True, 0, 9])
@pytest.mark.parametrize("name", ["top_k", "num_hidden_layers"])
def test_numbers_of_the_network_are_whole(name: str, wrong: Any) -> None:
    if (name, wrong) == ("num_hidden_layers", 9):
        wrong = -1
    with pytest.raises(InputError, match=f"Traces.{name}"):
        Traces(counts=COUNTS, **{name: wrong})


def test_numpys_numbers_are_read_back(tmp_path: Any) -> None:
    Traces(counts=COUNTS, top_k=np.int64(2), num_hidden_layers=np.int32(4)).save(tmp_path / "t.safetensors")
    found = Traces.load(tmp_path / "t.safetensors")
    assert (found.top_k, found.num_hidden_layers) == (2, 4)


def test_pairs_given_as_lists() -> None:
    pairs = np.zeros((2, 8, 8), int)
    np.testing.assert_array_equal(Traces(counts=COUNTS, pair_counts=pairs.tolist()).pairs(), pairs)


def test_a_mask_is_no_list_of_experts() -> None:
    torch = pytest.importorskip("torch")
    ids = np.array([4, 6])
    for given in (ids, torch.tensor(ids), ids.astype(float), range(4, 7, 2)):
        assert Pinned(experts=given, ranks=[0]).experts == [4, 6]
    for mask in (np.isin(np.arange(8), ids), torch.isin(torch.arange(8), torch.tensor(ids))):
        with pytest.raises(InputError, match=r"Pinned\.experts"):
            Pinned(experts=mask, ranks=[0])


def test_one_step_is_given_in_a_list() -> None:
    traces = Traces(counts=COUNTS)
    with pytest.raises(InputError, match="in a list"):
        traces.steps(3)  # type: ignore[arg-type]
    np.testing.assert_array_equal(traces.steps([3]).counts, COUNTS[3:4])


def test_masked_tokens_are_not_counted() -> None:
    ids = np.random.default_rng(1).random((20, 2, 8)).argsort(axis=2)[:, :, :2]
    given = {"request_starts": [0, 9], "num_experts": 8, "batch_size": 2}
    np.testing.assert_array_equal(from_tokens(ids.tolist(), **given).counts, from_tokens(ids, **given).counts)
    for wrong, words in ((np.ma.masked_array(ids, mask=ids == 7), "masked values"), ([[[0, 1], [2]]], "ids: got")):
        with pytest.raises(InputError, match=words):
            from_tokens(wrong, **given)


@pytest.mark.parametrize("flag", [True, np.True_, np.bool_(False)])
def test_flags_are_no_numbers_of_a_sample(flag: object) -> None:
    with pytest.raises(InputError, match=r"Sample\.assignments.*whole number"):
        Sample(assignments=flag, latency_us=3.0)
