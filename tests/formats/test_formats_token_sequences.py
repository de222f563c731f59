"""Sequences of experts of tokens as lists, of lengths of their own: each is a request that is replayed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Phase

LAYERS, EXPERTS = 3, 8
SEQUENCES = [
    np.random.default_rng(n).random((n, LAYERS, EXPERTS)).argsort(axis=2)[..., :2].tolist() for n in (7, 5, 9, 2)
]
ALL = [ids for each in SEQUENCES for ids in each]
TOTAL = np.array([[np.bincount(np.ravel(layer), minlength=EXPERTS) for layer in zip(*each, strict=True)]
                  for each in SEQUENCES]).sum(axis=0)  # fmt: skip
BY_LAYER = {f"layer_{3 + i}": [ids[i] for ids in ALL] for i in range(LAYERS)}
BY_TOKEN = {f"token_{n}": {name: ids[n] for name, ids in BY_LAYER.items()} for n in range(len(ALL))}


def load_all(load, path, **options):
    traces, notes = load(path, "tokens", phase=Phase.MIXED, **options)
    np.testing.assert_array_equal(traces.counts.sum(axis=0), TOTAL)
    return traces, notes


def write(path, value):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value))
    return path


@pytest.mark.parametrize(
    "value",
    [
        SEQUENCES,
        {"model": "m", "routed_experts": SEQUENCES},
        {f"req_{i}": each for i, each in enumerate(SEQUENCES)},
        {str(i): each for i, each in enumerate(SEQUENCES)},
        [{"request_id": f"r{i}", "prompt": "a", "routed_experts": each} for i, each in enumerate(SEQUENCES)],
    ],
)
def test_json(load, tmp_path, value):
    traces, _ = load_all(load, write(tmp_path / "a.json", value))
    assert traces.num_steps == 9 and traces.top_k in (None, 2)  # the longest of four, which are in flight together


def test_one_sequence_of_json_needs_the_number_of_layers(load, tmp_path):
    for value in (ALL, {"experts": ALL}):
        write(tmp_path / "a.json", value)
        assert load_all(load, tmp_path / "a.json", num_hidden_layers=LAYERS)[0].num_steps == len(ALL)
        with pytest.raises(InputError, match=r"are there 3 layers.*give --num-hidden-layers 3"):
            load(tmp_path / "a.json", "tokens", phase=Phase.MIXED)


@pytest.mark.parametrize("value", [BY_LAYER, {k: dict(enumerate(v)) for k, v in BY_LAYER.items()}, BY_TOKEN])
def test_json_by_layer_and_token(load, tmp_path, value):
    assert load_all(load, write(tmp_path / "a.json", value))[0].layer_ids == (3, 4, 5)


def test_rows_of_sequences_and_of_tokens(load, tmp_path):
    rows = [{"id": i, "routed_experts": each} for i, each in enumerate(SEQUENCES)]
    assert "id left unread" in load_all(load, write(tmp_path / "a.jsonl", rows))[1]
    head = {"type": "meta", "num_experts": EXPERTS}
    load_all(load, write(tmp_path / "a.jsonl", [head, *rows]), num_experts=EXPERTS)
    load_all(load, write(tmp_path / "a.json", {"model": "m", "samples": rows}))
    (tmp_path / "a.csv").write_text("id,experts\n" + "\n".join(f'{i},"{each}"' for i, each in enumerate(SEQUENCES)))
    load_all(load, tmp_path / "a.csv")
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    load_all(load, tmp_path / "a.parquet")
    rows = [
        {"req": i, "token_idx": n, "experts": ids} for i, each in enumerate(SEQUENCES) for n, ids in enumerate(each)
    ]
    assert load_all(load, write(tmp_path / "a.jsonl", rows[::-1]))[0].num_steps == 9


def test_lists_of_tensors_and_arrays_by_number(load, tmp_path):
    np.savez(tmp_path / "a.npz", *map(np.array, SEQUENCES))
    load_all(load, tmp_path / "a.npz")
    torch = pytest.importorskip("torch")
    torch.save([torch.tensor(each, dtype=torch.int16) for each in SEQUENCES], tmp_path / "a.pt")
    load_all(load, tmp_path / "a.pt")
    torch.save([torch.tensor(each).transpose(0, 1) for each in SEQUENCES], tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"are there 7 layers.*swap the axes"):
        load(tmp_path / "a.pt", "tokens", phase=Phase.MIXED)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"rank": i, "routed_experts": each} for i, each in enumerate(SEQUENCES)], "rank: got 1; 0, tokens of all"),
        ([{"mask": [1, 0], "routed_experts": SEQUENCES[3]}], "rows of tokens that were computed"),
        ([{"attention_mask": [1, 0], "routed_experts": SEQUENCES[3]}], "rows of tokens that were computed"),
        ([{"token": 0, "experts": SEQUENCES[0][0]}] * 2, "token 0 twice; every token once"),
        ([{"token": 0, "experts": ALL[0]}, {"token": 1, "experts": ALL[0][:2]}], "as many layers in every row"),
        ([{"routed_experts": SEQUENCES[0]}, {"experts": SEQUENCES[1]}], "as in the rows before"),
        ([{"routed_experts": [[[1, 2], [3]]]}], "rectangular"),
        ([{"physical_ids": 1, "routed_experts": SEQUENCES[0]}], "logical experts"),
    ],
)
def test_rows_that_are_refused(load, tmp_path, rows, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.jsonl", rows), "tokens", phase=Phase.MIXED, num_hidden_layers=LAYERS)


def test_a_mask_beside_rows_of_tokens_tells_padding(load, tmp_path):
    rows = [
        {"step": 0, "layer": i, "topk_ids": ids, "attention_mask": 1} for i in range(3) for ids in BY_LAYER["layer_3"]
    ]
    assert load(write(tmp_path / "a.jsonl", rows), "tokens")[0].num_steps == 1
    with pytest.raises(InputError, match="attention_mask 0, 1; rows of tokens that were computed"):
        load(write(tmp_path / "a.jsonl", [*rows, {**rows[0], "attention_mask": 0}]), "tokens")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"0": {"1": [1, 2]}, "1": {"1": [3, 4]}}, "0 lists; one list of rows"),
        ({name: ids[: -1 - i] for i, (name, ids) in enumerate(BY_LAYER.items())}, "the same tokens in each layer"),
        ({"routed_experts": SEQUENCES, "expert_map": [1, 0]}, "expert_map beside routed_experts"),
        ({f"rank_{i}": each for i, each in enumerate(SEQUENCES)}, "lists; one list of rows"),
    ],
)
def test_json_that_is_refused(load, tmp_path, value, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.json", value), "tokens", phase=Phase.MIXED)


def test_padded_sequences_with_their_attention_mask(load, tmp_path):
    """As trainers keep what rollouts routed; what the padding repeats says nothing then."""
    padded, mask = np.zeros((4, 9, LAYERS, 2), np.uint8), np.zeros((4, 9), int)
    for i, each in enumerate(SEQUENCES):
        padded[i, : len(each)], padded[i, len(each) :], mask[i, : len(each)] = each, each[-1], 1
    np.savez(tmp_path / "a.npz", routed_experts=padded, attention_mask=mask, response_mask=mask)
    notes = load_all(load, tmp_path / "a.npz", num_hidden_layers=LAYERS)[1]
    assert "left out: 13 tokens without any expert (padding)" in notes
    np.savez(tmp_path / "a.npz", routed_experts=padded, attention_mask=mask[:, :5])
    with pytest.raises(InputError, match=r"attention_mask: got shape \[4, 5\]; a number for each token, \[4, 9\]"):
        load(tmp_path / "a.npz", "tokens", phase=Phase.MIXED, num_hidden_layers=LAYERS)


@pytest.mark.parametrize("kind", [list, dict])
def test_an_array_of_each_layer_as_routers_return_them(load, tmp_path, kind):
    torch = pytest.importorskip("torch")
    each = [torch.tensor([ids[i] for ids in ALL]) for i in range(LAYERS)]
    torch.save(each if kind is list else dict(enumerate(each)), tmp_path / "a.pt")
    load_all(load, tmp_path / "a.pt", num_hidden_layers=LAYERS)
    with pytest.raises(InputError, match="are there 3 layers"):
        load(tmp_path / "a.pt", "tokens", phase=Phase.MIXED)
    torch.save(dict(zip((3, 4, 6), each, strict=True)), tmp_path / "a.pt")
    with pytest.raises(InputError, match="or layer_0"):
        load(tmp_path / "a.pt", "tokens", phase=Phase.MIXED, num_hidden_layers=LAYERS)


def test_objects_with_tensors_of_a_sequence_each(load, tmp_path):
    torch = pytest.importorskip("torch")
    rows = [{"token_ids": [1, 2], "routed_experts": torch.tensor(each)} for each in SEQUENCES]
    torch.save(rows, tmp_path / "a.pt")
    assert "4 sequences, each replayed as a request" in load_all(load, tmp_path / "a.pt")[1]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_number_of_experts_is_heeded(load, tmp_path, name):
    told = {"num_experts": 32, "top_k": 2}
    rows = [{**told, "routed_experts": each} for each in SEQUENCES]
    path = write(tmp_path / name, rows if name == "a.jsonl" else {**told, "routed_experts": SEQUENCES})
    with pytest.raises(InputError, match=r"num_experts: got 32.*give --num-experts 32"):
        load(path, "tokens", phase=Phase.MIXED)
    assert load(path, "tokens", phase=Phase.MIXED, num_experts=32)[0].num_experts == 32
