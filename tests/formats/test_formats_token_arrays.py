"""Experts of tokens as arrays, as clients save `routed_experts`: replayed, and refused where nothing says so."""

from __future__ import annotations

import numpy as np
import pytest

from gemopt.exceptions import InputError
from gemopt.traces import Phase

LAYERS, EXPERTS, TOP_K = 3, 16, 2
LENGTHS = (40, 25, 33)
TOLD = {"phase": Phase.MIXED, "num_hidden_layers": LAYERS, "num_experts": EXPERTS}


def routed_tokens(tokens, seed=0):
    """[tokens, layers, K] experts, some of which are hot."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(EXPERTS), size=LAYERS) + 1e-3
    share /= share.sum(axis=1, keepdims=True)
    return np.array([[rng.choice(EXPERTS, TOP_K, replace=False, p=row) for row in share] for _ in range(tokens)])


SEQUENCES = [routed_tokens(length, seed) for seed, length in enumerate(LENGTHS)]


def steps_of(sequences):
    """[T, L, E] counts where each sequence gives a token in every step."""
    counts = np.zeros((max(map(len, sequences)), LAYERS, EXPERTS), np.int64)
    for ids in sequences:
        for step, token in enumerate(ids):
            for layer, chosen in enumerate(token):
                counts[step, layer, chosen] += 1
    return counts


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_files_are_sequences(load, folder, dtype):
    for i, ids in enumerate(SEQUENCES):
        np.save(folder / f"routed_experts_{i}.npy", ids.astype(dtype))
    traces, notes = load(folder, "tokens", **TOLD)
    assert (traces.counts == steps_of(SEQUENCES)).all() and traces.num_hidden_layers == LAYERS
    assert "prompts are replayed as if they had been generated" in notes
    two, _ = load(folder, "tokens", **TOLD, batch_size=2)
    assert two.num_steps == max(LENGTHS[0], LENGTHS[1] + LENGTHS[2])


def test_other_files_and_names(load, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file

    ids = SEQUENCES[0]
    expected = steps_of([ids])
    np.savez(tmp_path / "a.npz", routed_experts=ids, input_ids=np.arange(len(ids)), attention_mask=np.ones(len(ids)))
    traces, notes = load(tmp_path / "a.npz", "tokens", **TOLD)
    assert (traces.counts == expected).all()
    assert "a.npz: input_ids left unread" in notes
    assert "a single sequence: every step is of one token" in notes
    torch.save({"expert_ids": torch.from_numpy(ids)}, tmp_path / "b.pt")
    save_file({"topk_ids": ids}, tmp_path / "c.safetensors")
    torch.save(torch.from_numpy(ids), tmp_path / "d.pt")
    for name in ("b.pt", "c.safetensors", "d.pt"):
        assert (load(tmp_path / name, "tokens", **TOLD)[0].counts == expected).all()


def test_sequences_side_by_side_and_their_padding(load, tmp_path):
    padded = np.zeros((len(LENGTHS), max(LENGTHS), LAYERS, TOP_K), np.uint8)
    for row, ids in zip(padded, SEQUENCES, strict=True):
        row[: len(ids)] = ids
    np.save(tmp_path / "a.npy", padded)
    traces, notes = load(tmp_path / "a.npy", "tokens", **TOLD)
    assert (traces.counts == steps_of(SEQUENCES)).all()
    assert f"left out: {3 * max(LENGTHS) - sum(LENGTHS)} tokens without any expert (padding)" in notes


@pytest.mark.parametrize("hidden", [None, 9])
def test_an_array_for_each_layer(load, tmp_path, hidden):
    arrays = {f"model.layers.{2 * layer + 1}.mlp.gate": SEQUENCES[0][:, layer] for layer in range(LAYERS)}
    np.savez(tmp_path / "a.npz", **arrays)
    traces, _ = load(tmp_path / "a.npz", "tokens", **{**TOLD, "num_hidden_layers": hidden})
    assert (traces.counts == steps_of(SEQUENCES[:1])).all()
    assert traces.layer_ids == (1, 3, 5) and traces.num_hidden_layers == hidden


def test_rows_of_layers_with_experts_alone(load, tmp_path):
    np.save(tmp_path / "a.npy", SEQUENCES[0])
    told = {**TOLD, "num_hidden_layers": 8, "layer_ids": (2, 4, 6)}
    traces, _ = load(tmp_path / "a.npy", "tokens", **told)
    assert traces.layer_ids == (2, 4, 6) and (traces.counts == steps_of(SEQUENCES[:1])).all()
    dense = np.zeros((len(SEQUENCES[0]), LAYERS + 2, TOP_K), int)
    dense[:, 2:] = SEQUENCES[0]
    np.save(tmp_path / "a.npy", dense)
    traces, _ = load(tmp_path / "a.npy", "tokens", **{**TOLD, "num_hidden_layers": LAYERS + 2})
    assert traces.layer_ids == (2, 3, 4) and (traces.counts == steps_of(SEQUENCES[:1])).all()


IDS = SEQUENCES[0]
REFUSED = {
    "nobody says the layers": (
        {"a": IDS},
        {"num_hidden_layers": None},
        "are there 3 layers.*give --num-hidden-layers 3",
    ),
    "layers first": ({"a": IDS.swapaxes(0, 1)}, {}, "--num-hidden-layers is 3; swap the axes"),
    "many tokens in the place of layers": (
        {"a": np.zeros((3, 400, 2), int)},
        {},
        "--num-hidden-layers is 3; swap the axes",
    ),
    "nobody says the phase": ({"a": IDS}, {"phase": None}, "no phase; .*--phase all takes every token"),
    "prompts alone": ({"a": IDS}, {"phase": Phase.PREFILL}, "no phase"),
    "weights": ({"a": IDS / 7.0}, {}, "shares, weights and logits are no counts"),
    "counts": ({"a": steps_of(SEQUENCES)}, {}, "fewer than all experts of each token"),
    "an expert twice": ({"a": IDS * 0 + 3}, {}, "names an expert twice|repeats experts|says nothing|of padding"),
    "masked tokens": ({"topk_ids": IDS, "mask": np.arange(40) < 30}, {}, "a.npz: mask: got tokens that it leaves out"),
    "slots": ({"topk_ids": IDS, "physical_to_logical_map": np.arange(16)}, {}, "experts of the network"),
    "layers that are numbered beside": (
        {"topk_ids": IDS, "layer_ids": [3, 4, 5]},
        {},
        "a.npz: layer_ids: got beside.*--layer-ids",
    ),
    "requests beside": ({"topk_ids": IDS, "request_id": np.arange(40) // 8}, {}, "a.npz: request_id: .*would be lost"),
    "their lengths": ({"topk_ids": IDS, "cu_seqlens": [0, 8, 40]}, {}, "or a file for each sequence, and leave it out"),
    "steps by another name": ({"topk_ids": IDS, "iteration": np.arange(40) // 8}, {}, "iteration: .*would be lost"),
    "samples beside": ({"topk_ids": IDS, "sample_id": np.arange(40) // 8}, {}, "sample_id: .*would be lost"),
    "positions that begin again": (
        {"topk_ids": IDS, "positions": np.arange(40, dtype=np.uint8) % 8},
        {},
        "positions: .*would be lost",
    ),
    "fewer tokens": ({"topk_ids": IDS, "num_tokens": 30}, {}, "num_tokens: got 30; the 40 whose experts are there"),
    "dropped tokens": ({"topk_ids": IDS, "dropped": np.arange(40) < 3}, {}, "dropped: got tokens that it leaves out"),
    "a later stage": ({"topk_ids": IDS, "pp_rank": 1}, {}, "pp_rank: got 1; layers from 0 on; give --layer-ids"),
    "more experts": ({"topk_ids": IDS, "num_experts": 512}, {}, "num_experts: got 512; --num-experts is .*experts 512"),
    "another top-k": ({"topk_ids": IDS, "top_k": 8}, {}, "top_k: got 8; 2 experts of a token, as there are"),
    "two of them": ({"a": IDS, "b": IDS}, {}, "one array called topk_ids"),
    "layers of other tokens": ({"layer_0": IDS[:, 0], "layer_1": IDS[:9, 0]}, {}, "the same tokens in each layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_do_not_say_what_they_are(load, tmp_path, case):
    arrays, told, line = REFUSED[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=line):
        load(tmp_path / "a.npz", "tokens", **{**TOLD, **told})


def test_what_arrays_beside_say_once_more_is_no_hindrance(load, tmp_path):
    np.savez(tmp_path / "a.npz", topk_ids=IDS, layer_ids=[2, 4, 6], seq_len=40, prompt_token_ids=np.arange(40))
    traces, _ = load(tmp_path / "a.npz", "tokens", **{**TOLD, "num_hidden_layers": 8, "layer_ids": (2, 4, 6)})
    assert traces.layer_ids == (2, 4, 6) and (traces.counts == steps_of([IDS])).all()


def test_rows_and_arrays_are_imported_apart(load, tmp_path):
    np.save(tmp_path / "a.npy", IDS)
    (tmp_path / "b.jsonl").write_text('{"step": 0, "layer": 0, "topk_ids": [1, 2]}\n')
    with pytest.raises(InputError, match="rows of tokens, or arrays of them; import each apart"):
        load([tmp_path / "a.npy", tmp_path / "b.jsonl"], "tokens", **TOLD)


def test_other_readers_say_who_reads_them(load, tmp_path):
    np.save(tmp_path / "a.npy", np.stack([IDS, IDS]))
    with pytest.raises(InputError, match=r"4 dimensions; 3-dimensional counts .*--from tokens those"):
        load(tmp_path / "a.npy", "array")


def layers_of_steps(folder, steps=(0, 1), layers=(3, 4, 7)):
    """Files of SGLang's tuning of kernels, and the counts of the tokens in them."""
    counts = np.zeros((len(steps), len(layers), EXPERTS), np.int64)
    for t, step in enumerate(steps):
        for i, layer in enumerate(layers):
            ids = SEQUENCES[t][:, i]
            np.save(folder / f"topk_idx_layer{layer}_idx{step}.npy", ids.astype(np.int32))
            counts[t, i] = np.bincount(ids.ravel(), minlength=EXPERTS)
    return counts


def test_files_of_one_layer_and_step_are_counted(load, folder):
    counts = layers_of_steps(folder, steps=(2, 10))
    traces, notes = load(folder, "tokens", num_experts=EXPERTS)
    assert (traces.counts == counts).all() and traces.layer_ids == (3, 4, 7) and traces.top_k == TOP_K
    assert "topk_idx_layer3_idx2.npy is layer 3 of step 2, and so on" in notes
    np.save(folder / "topk_idx_layer3_idx2.npy", np.r_[SEQUENCES[0][:, 0], [[-1, -1]]])
    with pytest.raises(InputError, match="step 2: 40 tokens of 2 and 41 tokens of 2; the same tokens in all layers"):
        load(folder, "tokens")
    for layer, i in ((3, 0), (4, 1), (7, 2)):
        np.save(folder / f"topk_idx_layer{layer}_idx2.npy", np.r_[SEQUENCES[0][:, i], [[-1, -1]]])
    traces, notes = load(folder, "tokens", num_experts=EXPERTS)
    assert (traces.counts == counts).all() and "left out: 3 rows without any expert (padding)" in notes
    np.save(folder / "topk_idx_layer3_idx2.npy", np.full((40, 2), 3))
    with pytest.raises(InputError, match=r"layer3_idx2.npy: experts of tokens: got an expert twice"):
        load(folder, "tokens")
    (folder / "topk_idx_layer3_idx2.npy").unlink()
    with pytest.raises(InputError, match="5 files of 3 layers and 2 steps; a file for each layer of each step"):
        load(folder, "tokens")


def test_files_of_layers_and_steps_heed_no_phase(load, folder):
    layers_of_steps(folder)
    with pytest.raises(InputError, match="--phase"):
        load(folder, "tokens", phase=Phase.MIXED)


@pytest.mark.parametrize("told", ["rank", "tp", "prompt", "top"])
def test_numbers_of_files_that_are_no_steps(load, folder, told):
    for number in (0, 1):
        np.save(folder / f"topk_layer3_{told}{number}.npy", SEQUENCES[0][:, number])
    with pytest.raises(InputError, match="a name that says layer and step, topk_layer3_step0; of ranks with tokens"):
        load(folder, "tokens")


def test_files_of_layers_and_steps_hold_choices(load, folder):
    layers_of_steps(folder)
    with pytest.raises(InputError, match="--top-k: got 4; 2 experts of a token, as in the files"):
        load(folder, "tokens", top_k=4)
    every = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (40, 1)), axis=1)
    for path in folder.iterdir():
        np.save(path, every)
    with pytest.raises(InputError, match="all 16 of a token; those that it chose"):
        load(folder, "tokens")


def test_layers_on_another_axis_than_the_option_says(load, tmp_path):
    ids = np.random.default_rng(2).random((6, 20, 16)).argsort(axis=2)[..., :2]  # [layers, tokens, K]
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(InputError, match=r"got shape \[6, 20, 2\]; .*--num-hidden-layers is 6; swap the axes"):
        load(tmp_path / "a.npy", "tokens", num_hidden_layers=6, phase=Phase.MIXED)
    np.save(tmp_path / "a.npy", ids.swapaxes(0, 1))
    counts, _ = load(tmp_path / "a.npy", "tokens", num_hidden_layers=6, phase=Phase.MIXED, num_experts=16)
    assert (counts.counts.sum(axis=0) == [np.bincount(row.reshape(-1), minlength=16) for row in ids]).all()


def test_arrays_beside_that_change_nothing_and_padding_that_repeats(load, tmp_path):
    ids = np.random.default_rng(3).random((3, 12, 4, 16)).argsort(axis=3)[..., :2]  # [sequences, tokens, layers, K]
    options = {"num_hidden_layers": 4, "phase": Phase.MIXED, "num_experts": 16}
    beside = {"is_padding": np.zeros(12, bool), "num_tokens": 12, "positions": np.arange(12), "pp_rank": 0, "top_k": 2}
    np.savez(tmp_path / "a.npz", topk_ids=ids, num_experts=16, **beside)
    traces, notes = load(tmp_path / "a.npz", "tokens", **options)
    assert int(traces.counts.sum()) == ids.size and "padding?" not in notes
    ids[0, 8:], ids[1, 5:] = ids[0, 7], ids[1, 4]
    np.save(tmp_path / "a.npy", ids)
    told = "at the ends of sequences 11 tokens choose what the one before"
    assert told in load(tmp_path / "a.npy", "tokens", **options)[1]
    np.save(tmp_path / "a.npy", ids[:, ::-1])  # padded on the left
    told = "where sequences begin 11 tokens choose what the next one chose"
    assert told in load(tmp_path / "a.npy", "tokens", **options)[1]
    alone = np.concatenate([ids[2], np.tile(ids[2, -1], (9, 1, 1))])
    np.save(tmp_path / "a.npy", alone)
    assert "at the ends of sequences 9 tokens choose" in load(tmp_path / "a.npy", "tokens", **options)[1]
    one = {**options, "num_hidden_layers": 1}
    np.save(tmp_path / "a.npy", alone[:, :1])  # of one layer as well, but where chance does it
    assert "at the ends of sequences 9 tokens choose" in load(tmp_path / "a.npy", "tokens", **one)[1]
    np.save(tmp_path / "a.npy", alone[:-5, :1])
    assert "padding?" not in load(tmp_path / "a.npy", "tokens", **one)[1]


def test_what_is_said_of_many_files_alike_is_said_once(load, folder):
    for i, ids in enumerate(SEQUENCES):
        np.savez(folder / f"request_{i}.npz", routed_experts=ids, input_ids=np.arange(len(ids)))
    _, notes = load(folder, "tokens", **TOLD)
    assert notes.count("left unread") == 1 and "request_0.npz and 2 others: input_ids left unread" in notes


def test_tensors_beside_the_experts_are_looked_at(load, tmp_path):
    torch = pytest.importorskip("torch")
    options = {"num_hidden_layers": 3, "phase": Phase.MIXED, "num_experts": 16}
    taken = {"weights": torch.rand(40, requires_grad=True), "h": torch.rand(40).bfloat16(), "padding": "right"}
    torch.save({"topk_ids": torch.tensor(IDS), **taken}, tmp_path / "a.pt")
    assert int(load(tmp_path / "a.pt", "tokens", **options)[0].counts.sum()) == IDS.size
    for name, each in {"request_id": torch.arange(40) // 8, "num_tokens": torch.tensor(30)}.items():
        torch.save({"topk_ids": torch.tensor(IDS), name: each}, tmp_path / "a.pt")
        with pytest.raises(InputError, match=f"{name}: got"):
            load(tmp_path / "a.pt", "tokens", **options)


@pytest.mark.parametrize("name", ["step_{}.npy", "iter{:04}.npz", "forward_{}.pt"])
def test_files_of_all_layers_that_a_step_each_has(load, tmp_path, name):
    rng = np.random.default_rng(4)
    steps = [rng.random((tokens, 3, 8)).argsort(axis=2)[..., :2] for tokens in (3, 1, 7, 2, 9, 4, 1, 1, 5, 2, 6)]
    files = [tmp_path / name.format(step) for step in range(len(steps))]
    for path, ids in zip(files, steps, strict=True):
        if path.suffix == ".pt":
            pytest.importorskip("torch").save({"topk_ids": pytest.importorskip("torch").tensor(ids)}, path)
        else:
            (np.save if path.suffix == ".npy" else np.savez)(path, ids)
    traces, notes = load(files, "tokens", num_hidden_layers=3)
    counts = [[np.bincount(layer.ravel(), minlength=8) for layer in ids.transpose(1, 0, 2)] for ids in steps]
    assert (traces.counts == counts).all() and "11 files, a step each, in the order of their numbers" in notes
    traces, _ = load(files, "tokens", layer_ids=(3, 4, 5))
    assert traces.layer_ids == (3, 4, 5) and (traces.counts == counts).all()
    with pytest.raises(InputError, match="are there 3 layers"):
        load(files, "tokens")
    with pytest.raises(InputError, match="--phase: got decode; does not apply"):
        load(files, "tokens", num_hidden_layers=3, phase=Phase.DECODE)


@pytest.mark.parametrize(
    "prompt", [{"prompt_token_ids": np.arange(3)}, {"prompt_len": 3}, {"prompt_len": np.array([3])}]
)
def test_prompts_beside_a_sequence_tell_the_phases(load, folder, prompt):
    options = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS}
    for i, ids in enumerate(SEQUENCES):
        np.savez(folder / f"{i}.npz", routed_experts=ids, output_token_ids=np.arange(len(ids) - 2), **prompt)
    assert (load(folder, "tokens", **options)[0].counts == steps_of([ids[3:] for ids in SEQUENCES])).all()
    prefill, _ = load(folder, "tokens", **options, phase=Phase.PREFILL)
    assert (prefill.counts == steps_of([ids[:3] for ids in SEQUENCES]).sum(axis=0)).all() and (prefill.phase == 0).all()
    assert (load(folder, "tokens", **TOLD)[0].counts == steps_of(SEQUENCES)).all()


@pytest.mark.parametrize("prompt", [{"prompt_len": 0.5}, {"prompt_len": [3, 4]}, {"prompt_len": 3, "prompt_ids": [1]}])
def test_prompts_that_tell_nothing_certain(load, tmp_path, prompt):
    np.savez(tmp_path / "a.npz", routed_experts=SEQUENCES[0], **prompt)
    with pytest.raises(InputError, match="no phase; prefill or decode"):
        load(tmp_path / "a.npz", "tokens", num_hidden_layers=LAYERS)
    np.savez(tmp_path / "a.npz", routed_experts=np.stack([SEQUENCES[0]] * 2), prompt_len=3)
    with pytest.raises(InputError, match="2 sequences and one prompt; one of each; --phase all"):
        load(tmp_path / "a.npz", "tokens", num_hidden_layers=LAYERS)


def test_an_answer_beside_a_sequence_says_where_it_begins(load, tmp_path):
    def saved(ids, **beside):
        np.savez(tmp_path / "a.npz", routed_experts=ids, **beside)
        return tmp_path / "a.npz"

    options = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS}
    ids, answer = SEQUENCES[0], np.arange(len(SEQUENCES[0]) - 2)
    for alone in (ids[3:], ids[2:]):  # the last token of an answer is fed to no layer, unless it was asked for
        with pytest.raises(
            InputError, match=r"the 3 of the prompt \+ \d+ of the answer - 1; experts of the answer alone"
        ):
            load(saved(alone, prompt_ids=np.arange(3), token_ids=answer), "tokens", **options)
    padded = np.concatenate([0 * ids[:2], ids])
    with pytest.raises(InputError, match="padding before the prompt; its tokens from the first on"):
        load(saved(padded, prompt_len=3), "tokens", **options)
    assert (
        load(saved(padded, prompt_len=3, output_ids=answer), "tokens", **options)[0].counts == steps_of([ids[3:]])
    ).all()
    with pytest.raises(
        InputError, match="prompt_length: got beside the experts"
    ):  # of two sequences, one after another
        load(saved(ids, prompt_length=[3, 1]), "tokens", **options, phase=Phase.MIXED)
