"""Arrays that are no counts [steps, layers, experts], by their numbers or their names: refused, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from routed_counts import routed

from gemopt.exceptions import InputError
from gemopt.formats.findings import refuse_parts
from gemopt.traces import Traces


@pytest.mark.parametrize(("axis", "name"), [(0, "step"), (1, "layer"), (2, "expert")])
def test_totals_beside_counts_are_refused(load, tmp_path, axis, name):
    counts = routed(np.random.default_rng(1))
    for joined in ((counts, counts.sum(axis=axis, keepdims=True)), (counts.sum(axis=axis, keepdims=True), counts)):
        np.save(tmp_path / "a.npy", np.concatenate(joined, axis=axis))
        with pytest.raises(InputError, match=rf"{name} that is the sum of the others; counts alone"):
            load(tmp_path / "a.npy", "array")


def test_maps_of_experts_are_no_counts(load, tmp_path):
    rng = np.random.default_rng(4)
    slots = rng.random((6, 4, 32)).argsort(axis=2)  # [steps, layers, slots]
    held = (slots[0].reshape(4, 8, 4)[None] == np.arange(32)[:, None, None, None]).any(axis=3)  # [E, L, ranks]
    redundant = np.concatenate([slots, slots[:, :, :4]], axis=2)
    for each in (slots, redundant, slots[..., None][0], held.transpose(2, 1, 0).astype(int)):
        np.save(tmp_path / "a.npy", each)
        with pytest.raises(InputError, match="a map of experts"):
            load(tmp_path / "a.npy", "array")
    np.save(tmp_path / "a.npy", np.eye(32, dtype=int)[rng.integers(0, 32, (300, 4))])
    assert load(tmp_path / "a.npy", "array")[0].num_steps == 300  # a token after the other


@pytest.mark.parametrize(("experts", "devices", "layers"), [(16, 4, 2), (8, 4, 4), (60, 3, 5), (64, 32, 3)])
def test_devices_of_experts_are_no_counts(load, tmp_path, experts, devices, layers):
    rng = np.random.default_rng(3)
    owners = np.stack([rng.permutation(np.repeat(np.arange(devices), experts // devices)) for _ in range(layers)])
    np.save(tmp_path / "a.npy", owners[None])
    with pytest.raises(InputError, match="a map of experts"):
        load(tmp_path / "a.npy", "array")
    head = ["expert", *(f"layer_{i}" for i in range(layers))]
    lines = [head, *([e, *column] for e, column in enumerate(owners.T.tolist()))]
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    with pytest.raises(InputError, match="a map of experts"):
        load(tmp_path / "a.csv", "csv")
    owners[0, :2] = owners[0, :1] + 1  # one device has more: loads may be so
    np.save(tmp_path / "a.npy", owners[None])
    assert load(tmp_path / "a.npy", "array")[0].num_experts == experts


def test_counts_that_look_like_a_map_are_taken_where_the_file_calls_them_so(load, tmp_path):
    counts = np.random.default_rng(4).random((6, 4, 32)).argsort(axis=2)
    np.save(tmp_path / "a.npy", counts)
    with pytest.raises(InputError, match=r"a map of experts.*np\.savez\(PATH, counts=array\)"):
        load(tmp_path / "a.npy", "array")
    np.savez(tmp_path / "a.npz", load=counts)
    with pytest.raises(InputError, match="a map of experts"):
        load(tmp_path / "a.npz", "array")
    np.savez(tmp_path / "a.npz", counts=counts)
    assert (load(tmp_path / "a.npz", "array")[0].counts == counts).all()


def test_counters_beyond_doubt_are_refused(load, tmp_path):
    counts = routed(np.random.default_rng(4))
    np.save(tmp_path / "a.npy", counts.cumsum(axis=0))
    with pytest.raises(InputError, match=r"counters that add up.*if they do rise so: --layer-ids"):
        load(tmp_path / "a.npy", "array")
    assert "counters that add up?" in load(tmp_path / "a.npy", "array", layer_ids=tuple(range(5)))[1]
    rng = np.random.default_rng(4)
    popular = rng.dirichlet(np.ones(16), 5)
    growing = [[rng.multinomial(2000 * 2**step, row) for row in popular] for step in range(12)]
    np.save(tmp_path / "a.npy", growing)  # a sweep of batch sizes
    assert "counters that add up?" in load(tmp_path / "a.npy", "array")[1]


def test_dense_layers_do_not_turn_the_axes(load, tmp_path):
    counts = routed(np.random.default_rng(6))
    for dense in (2, 4):
        counts[:, :dense] = 0
        np.save(tmp_path / "a.npy", counts)
        assert load(tmp_path / "a.npy", "array")[0].layer_ids == tuple(range(dense, 5))


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [(3000, lambda c: c.astype(np.uint8)), (300_000, lambda c: c % 65536), (3000, lambda c: np.minimum(c, 255))],
)
def test_counts_in_too_small_a_type_are_refused(load, tmp_path, tokens, kept):
    rng, path = np.random.default_rng(5), tmp_path / "a.npz"
    counts = np.concatenate([routed(rng, steps=1, tokens=int(n)) for n in rng.integers(tokens, 2 * tokens, 12)])
    np.savez(path, counts=kept(counts))
    for read in (lambda: load(path, "array"), lambda: Traces.load(path)):
        with pytest.raises(InputError, match=r"counts (that wrapped|cut) at \d+.*a type that holds them"):
            read()
    small = np.minimum(counts // 64, 99)
    small[:, :, 0] += small.sum(axis=2).max(axis=1, keepdims=True) - small.sum(axis=2)  # so that layers agree
    draft = small[:, :1].copy()
    draft[:, :, :3] += [0, 128, 128]  # a draft layer of more tokens
    np.savez(path, counts=np.concatenate([small, draft], axis=1))
    assert "layers 5 have another sum" in load(path, "array")[1]


def test_axes_of_ranks_are_named(load, tmp_path):
    counts = routed(np.random.default_rng(9), steps=1, experts=32).reshape(5, 4, 8)  # [layers, ranks, their experts]
    for array, axes in ((counts, "layers, ranks"), (counts.transpose(1, 0, 2), "ranks, layers")):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(InputError, match=rf"look like \[{axes}, experts of a rank\].*of all ranks side by side"):
            load(tmp_path / "a.npy", "array")
    draft = routed(np.random.default_rng(10), steps=1, layers=1, experts=32, tokens=90).reshape(1, 4, 8)
    for array in (np.concatenate([counts, draft]), np.concatenate([counts, draft]).transpose(1, 0, 2)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(InputError, match=r"ranks.*experts of a rank\]"):
            load(tmp_path / "a.npy", "array")
    np.save(tmp_path / "a.npy", counts.reshape(1, 32, 5))
    assert load(tmp_path / "a.npy", "array")[0].num_experts == 5  # sums of all kinds tell nothing
    np.save(tmp_path / "a.npy", counts.reshape(1, 5, 32).transpose(0, 2, 1))
    with pytest.raises(InputError, match=r"look like \[steps, experts, layers\]"):
        load(tmp_path / "a.npy", "array")
    np.save(tmp_path / "a.npy", counts.reshape(1, 5, 32))
    assert load(tmp_path / "a.npy", "array")[0].num_experts == 32


def test_counts_by_slot_are_refused_by_their_names(load, tmp_path):
    for name in ("expert_load_window", "expert_load_view"):  # vLLM's
        np.save(tmp_path / f"{name}.npy", routed(np.random.default_rng(11)))
        with pytest.raises(InputError, match=f"{name}; counts of logical experts"):
            load(tmp_path / f"{name}.npy", "array")


@pytest.mark.parametrize("name", ["npu{}", "cuda_{}", "rank{}of2", "L{}", "engine-{}", "pod{}", "proc{}"])
def test_names_of_parts(name):
    with pytest.raises(InputError, match="these names tell parts of the same ones"):
        refuse_parts([Path(f"{name.format(i)}.npy") for i in range(2)])
    refuse_parts([Path(f"{each}_{i}.npy") for each in ("level", "cell") for i in range(2)])
    refuse_parts([Path(f"load_on_layer_{1700000000 + 60 * i}.csv") for i in range(2)])  # moments


def test_layers_and_steps_of_constant_batches_are_told_apart(load, tmp_path):
    counts = routed(np.random.default_rng(12))  # 40 tokens at every step: the sums do not tell
    draft = routed(np.random.default_rng(13), layers=1, tokens=30)
    for array in (counts, np.concatenate([counts, draft], axis=1), np.concatenate([counts[:1], draft[:1]], axis=1)):
        np.save(tmp_path / "a.npy", array)
        assert (load(tmp_path / "a.npy", "array")[0].counts == array).all()
        np.save(tmp_path / "a.npy", array.transpose(1, 0, 2))
        if len(array) > 1:
            with pytest.raises(InputError, match=r"axes that look like \[layers, steps, experts\]"):
                load(tmp_path / "a.npy", "array")
    alike = np.random.default_rng(14).multinomial(80, np.full(16, 1 / 16), size=(12, 5))  # layers alike: nothing tells
    np.save(tmp_path / "a.npy", alike.transpose(1, 0, 2))
    assert load(tmp_path / "a.npy", "array")[0].num_steps == 5


@pytest.mark.parametrize("key", ["expert_map", "expert_ids", "slots", "phy_load", "local_counts", "logcnt"])
def test_names_of_slots_and_of_orders_are_refused(load, tmp_path, key):
    np.savez(tmp_path / "a.npz", **{"counts": routed(np.random.default_rng(17)), key: np.arange(16)})
    for read in (lambda: load(tmp_path / "a.npz", "array"), lambda: Traces.load(tmp_path / "a.npz")):
        with pytest.raises(InputError, match=f"{key}.*counts of logical experts"):
            read()


def test_sums_over_the_steps_have_a_way_in(load, tmp_path):
    counts = routed(np.random.default_rng(18)).sum(axis=0)
    np.save(tmp_path / "a.npy", counts)
    with pytest.raises(InputError, match=r"got 2 dimensions.*counts\[None\]"):
        load(tmp_path / "a.npy", "array")
    torch = pytest.importorskip("torch")
    torch.save([torch.from_numpy(layer) for layer in counts], tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"got 2 dimensions.*counts\[None\]"):
        load(tmp_path / "a.pt", "array")
    np.save(tmp_path / "a.npy", counts[None])
    assert (load(tmp_path / "a.npy", "array")[0].counts == counts[None]).all()


@pytest.mark.parametrize("place", [0, -1])
def test_a_bin_of_tokens_without_an_expert_is_refused(load, tmp_path, place):
    rng = np.random.default_rng(4)
    counts, none = routed(rng), rng.integers(1, 9, (12, 5, 1))
    counts = np.concatenate([none, counts] if place == 0 else [counts, none], axis=2)
    counts = np.concatenate([np.zeros_like(counts[:, :1]), counts], axis=1)  # and a dense layer
    np.save(tmp_path / "a.npy", counts)
    np.savez(tmp_path / "a.npz", counts=counts)
    for read in (lambda: load(tmp_path / "a.npy", "array"), lambda: Traces.load(tmp_path / "a.npz")):
        with pytest.raises(InputError, match=r"(first|last) expert without which all layers .*leave it out"):
            read()


@pytest.mark.parametrize("place", [0, -1])
def test_one_hot_expert_beside_loads_that_were_made_is_taken(load, tmp_path, place):
    counts = np.full((8, 5, 16), 3)
    counts[:, :, place] = np.random.default_rng(4).poisson(40, (8, 5))
    np.save(tmp_path / "a.npy", counts)
    assert (load(tmp_path / "a.npy", "array")[0].counts == counts).all()


@pytest.mark.parametrize("layers", [1, 5])
def test_loads_in_rising_order_are_no_offsets(load, tmp_path, layers):
    made = np.broadcast_to(np.arange(1, 17), (6, layers, 16))
    drawn = np.random.default_rng(4).multinomial(128, 1 / np.arange(1, 17) ** 3 / 1.2020, (6, layers))
    for counts in (made, np.sort(drawn, axis=2)):
        assert (counts[:, :, 0] == 0).all() or (counts[:, :, -1] == counts[0, 0, -1]).all()
        np.save(tmp_path / "a.npy", counts)
        loaded, notes = load(tmp_path / "a.npy", "array")[:2]
        assert (loaded.counts == counts).all()
        assert "in the order of their load" in notes


@pytest.mark.parametrize("name", ["capacity_factor", "routed_scaling_factor", "rope_scaling"])
def test_settings_of_the_network_beside_counts_change_nothing(load, tmp_path, name):
    counts = routed(np.random.default_rng(17))
    np.savez(tmp_path / "a.npz", counts=counts, **{name: 1.25})
    assert (load(tmp_path / "a.npz", "array")[0].counts == counts).all()
    assert (Traces.load(tmp_path / "a.npz").counts == counts).all()
    np.savez(tmp_path / "a.npz", counts=counts, scaling_factor=1.25)
    with pytest.raises(InputError, match="scaling_factor beside counts"):
        load(tmp_path / "a.npz", "array")


@pytest.mark.parametrize(
    "offsets",
    [
        lambda c: c.cumsum(axis=2),
        lambda c: c.cumsum(axis=2) - c,
        lambda c: np.concatenate([np.zeros_like(c[:, :, :1]), c.cumsum(axis=2)], axis=2),
    ],
)
def test_offsets_are_refused(load, tmp_path, offsets):
    counts = routed(np.random.default_rng(4))
    np.save(tmp_path / "a.npy", offsets(counts))
    with pytest.raises(InputError, match=r"rise from expert to expert.*take the differences"):
        load(tmp_path / "a.npy", "array")
    np.save(tmp_path / "a.npy", np.sort(counts[:1, :1], axis=2))  # popular ones last
    load(tmp_path / "a.npy", "array")


@pytest.mark.parametrize("name", ["scale", "valid", "is_warmup", "expert_offset", "step_weight", "normalized"])
def test_what_is_to_be_done_to_counts_is_refused(load, tmp_path, name):
    np.savez(tmp_path / "a.npz", **{"counts": routed(np.random.default_rng(4)), name: np.ones(12)})
    for read in (lambda: load(tmp_path / "a.npz", "array"), lambda: Traces.load(tmp_path / "a.npz")):
        with pytest.raises(InputError, match=f"{name}.*do to the counts what it says, and leave it out"):
            read()


def test_arrays_saved_one_after_the_other_into_a_file(load, tmp_path):
    with open(tmp_path / "a.npy", "wb") as stream:
        for step in routed(np.random.default_rng(4)):
            np.save(stream, step[None])
    with pytest.raises(InputError, match=r"bytes after the array of shape \(1, 5, 16\).*read all of them"):
        load(tmp_path / "a.npy", "array")


def test_numbers_below_0_are_told_first(load, tmp_path):
    counts = routed(np.random.default_rng(4))
    counts[:, 0] = -1
    np.save(tmp_path / "a.npy", counts)
    with pytest.raises(InputError, match="counts: got -1; counts from 0; give layers without experts zeros"):
        load(tmp_path / "a.npy", "array")


def test_counts_that_wrapped_and_maps_in_tables(load, tmp_path):
    rng = np.random.default_rng(5)
    steps = [routed(rng, steps=1, tokens=int(n)) for n in rng.integers(900, 1800, 12)]
    wrapped = np.concatenate(steps) % 256
    cells = [f"{t},{i},{e},{n}" for (t, i, e), n in np.ndenumerate(wrapped)]
    (tmp_path / "a.csv").write_text("\n".join(["step,layer,expert,count", *cells]))
    with pytest.raises(InputError, match="counts that wrapped at 256"):
        load(tmp_path / "a.csv", "csv")
    rows = [np.random.default_rng(i).permutation(16) for i in range(9)]
    head = ["layer", *(f"expert_{e}" for e in range(16))]
    table = "\n".join(",".join(map(str, row)) for row in [head, *([i, *row] for i, row in enumerate(rows))])
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(InputError, match=r"a map of experts, by the numbers; .*placement import"):
        load(tmp_path / "a.csv", "csv")
    cells = [f"{i},{e},{n}" for i, row in enumerate(rows) for e, n in enumerate(row)]
    (tmp_path / "a.csv").write_text("\n".join(["layer,expert,count", *cells]))  # which says what they are
    assert (load(tmp_path / "a.csv", "csv")[0].counts == np.array(rows)).all()


def test_statistics_made_of_something_else_are_looked_at(load, tmp_path):
    """Without the rank that SGLang's recorder writes: axes in another order, and counts that wrapped."""
    rng, path = np.random.default_rng(5), tmp_path / "s.json"
    counts = np.concatenate([routed(rng, steps=1, tokens=int(n)) for n in rng.integers(900, 1800, 12)])
    for made, words in (
        (counts.transpose(0, 2, 1), r"axes that look like \[steps, experts, layers\]"),
        (counts.sum(axis=0).T, r"axes that look like \[steps, experts, layers\]"),
        (counts.transpose(1, 0, 2), r"axes that look like \[layers, steps, experts\]"),
        (counts % 256, "counts that wrapped at 256"),
    ):
        path.write_text(json.dumps({"logical_count": made.tolist()}))
        with pytest.raises(InputError, match=words):
            load(path)
    path.write_text(json.dumps({"logical_count": counts.transpose(1, 0, 2).tolist()}))
    assert load(path, num_experts=16, num_hidden_layers=12)[0].num_steps == 5  # as the user says
    path.write_text(json.dumps({"logical_count": counts.tolist()}))
    assert (load(path)[0].counts == counts).all()


def test_copies_of_experts_and_ranks_that_hold_them_are_no_counts(load, tmp_path):
    rng = np.random.default_rng(6)
    copies = 1 + rng.multinomial(8, np.ones(32) / 32, size=4)  # 40 slots of each layer
    np.save(tmp_path / "a.npy", copies[None])
    with pytest.raises(InputError, match="a map of experts"):
        load(tmp_path / "a.npy", "array")
    head = ["expert", *(f"layer_{i}" for i in range(4))]
    lines = [head, *([e, *column] for e, column in enumerate(copies.T.tolist()))]
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    with pytest.raises(InputError, match=r"a map of experts, by the numbers; .*placement import"):
        load(tmp_path / "a.csv", "csv")
    held = np.stack([[rng.permutation(np.arange(4) < n) for n in row] for row in np.minimum(copies, 4)])  # [L, E, R]
    lines = [["layer", "expert", "rank_0", "rank_1", "rank_2", "rank_3"]]
    lines += [[i, e, *held[i, e].astype(int).tolist()] for i in range(4) for e in range(32)]
    (tmp_path / "a.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    with pytest.raises(InputError, match=r"a map of experts, by the numbers; .*placement import"):
        load(tmp_path / "a.csv", "csv")
    few = routed(rng, steps=1, tokens=20)  # hardly more assignments than experts
    np.save(tmp_path / "a.npy", few)
    assert load(tmp_path / "a.npy", "array")[0].num_experts == few.shape[2]


def test_an_order_of_experts_in_few_rows_is_no_counts_however_it_is_written(load, tmp_path):
    """`argsort(-counts)` of four layers, in lists, in arrays of layers, from 1 on: by chance no counts are so."""
    order = np.stack([np.random.default_rng(i).permutation(16) for i in range(4)])
    np.savez(tmp_path / "a.npz", **{f"layer_{i}": row for i, row in enumerate(order)})
    with pytest.raises(InputError, match="a map of experts"):
        load(tmp_path / "a.npz", "array")
    redundant = np.concatenate([order, order[:, :4]], axis=1)
    for written in (
        order[None].tolist(),
        {f"layer_{i}": row.tolist() for i, row in enumerate(order + 1)},
        {str(i): row.tolist() for i, row in enumerate(order)},
        {f"layer_{i}": {f"expert_{e}": int(n) for e, n in enumerate(row)} for i, row in enumerate(order)},
        redundant[None].tolist(),
    ):
        (tmp_path / "a.json").write_text(json.dumps(written))
        with pytest.raises(InputError, match="a map of experts"):
            load(tmp_path / "a.json", "array")
    (tmp_path / "a.json").write_text(
        json.dumps({"expert_counts": {str(i): row.tolist() for i, row in enumerate(order)}})
    )
    assert (load(tmp_path / "a.json", "array")[0].counts == order).all()  # which says what they are
    few = np.random.default_rng(0).multinomial(30, np.ones(8) / 8, (1, 9))
    (tmp_path / "a.json").write_text(json.dumps(few.tolist()))
    assert (load(tmp_path / "a.json", "array")[0].counts == few).all()
