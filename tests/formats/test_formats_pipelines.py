"""Stages of a pipeline that number their layers from 0 are no data-parallel ranks, and no later steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recordings import write_passes, write_stat

from gemopt.exceptions import InputError

LAYERS, EXPERTS, TOP_K = 3, 16, 4
SIZES = (7, 64, 3, 128, 64, 63)


def chosen(seed, sizes=SIZES):
    """[T, L, E] counts of as many tokens in every layer of a step."""
    rng = np.random.default_rng(seed)
    return np.array([[_layer(rng, tokens) for _ in range(LAYERS)] for tokens in sizes])


def _layer(rng, tokens):
    return np.bincount(rng.random((tokens, EXPERTS)).argsort(axis=1)[:, :TOP_K].ravel(), minlength=EXPERTS)


def write(source, folder, parts, **more):
    """One file of each rank."""
    for rank, counts in enumerate(parts):
        if source == "sglang":
            write_passes(folder, f"{rank}.5", rank, counts.astype(np.int32), **more)
        elif source == "csv":
            lines = (f"{step},{layer},{expert},{n}\n" for (step, layer, expert), n in np.ndenumerate(counts))
            (folder / f"c_rank{rank}.csv").write_text("step,layer,expert,count\n" + "".join(lines))
        else:
            save_file = pytest.importorskip("safetensors.numpy").save_file
            facts = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
            (folder / "meta_info.json").write_text(json.dumps(facts))
            rows = {f"{100 + i}_{j}": np.ascontiguousarray(counts[i, j]) for i, j in np.ndindex(counts.shape[:2])}
            save_file(rows, folder / f"rank{rank}.safetensors")


@pytest.mark.parametrize("source", ["sglang", "csv", "tensorrt-llm"])
@pytest.mark.parametrize("copies", [1, 2])
def test_equal_sums_to_other_experts_are_asked_about(load, folder, source, copies):
    first, other = chosen(0), chosen(1)
    write(source, folder, [*[first] * copies, *[other] * copies])
    said = "ranks 0 and 1" if copies == 1 else "ranks 0 and 2"
    with pytest.raises(InputError, match=f"got {said} have as many assignments in every step.*--no-pipeline"):
        load(folder, source)
    traces, notes = load(folder, source, no_pipeline=True)
    assert (traces.counts == first + other).all() and "as many" not in notes
    write(source, folder, [*[first] * copies, *[chosen(1, SIZES[::-1])] * copies])
    assert "as many" not in load(folder, source)[1]


@pytest.mark.parametrize("column", ["rank", "dp_rank"])
def test_a_column_may_say_that_ranks_are_no_stages(load, folder, column):
    parts = np.array([chosen(seed) for seed in range(2)])
    lines = (f"{','.join(map(str, at))},{n}\n" for at, n in np.ndenumerate(parts))
    (folder / "c.csv").write_text(f"{column},step,layer,expert,count\n" + "".join(lines))
    if column == "rank":
        with pytest.raises(InputError, match="stages of a pipeline"):
            load(folder, "csv")
    else:
        traces, notes = load(folder, "csv")
        assert (traces.counts == parts.sum(axis=0)).all() and "as many" not in notes


def test_data_parallel_groups_of_stages_are_asked_about_too(load, folder):
    write("csv", folder, [chosen(0), chosen(1, SIZES[::-1]), chosen(2), chosen(3, SIZES[::-1])])
    with pytest.raises(InputError, match="ranks 0-1 and 2-3"):
        load(folder, "csv")


def test_steps_that_are_all_alike_do_not_tell(load, folder):
    parts = [chosen(seed, (64,) * 6) for seed in range(2)]
    write("csv", folder, parts)
    traces, notes = load(folder, "csv")
    assert (traces.counts == sum(parts)).all() and "ranks 0 and 1 have as many assignments in every step" in notes


@pytest.mark.parametrize("same", [True, False])
def test_token_ids_tell(load, folder, same):
    parts = [chosen(seed) for seed in range(2)]
    for rank, counts in enumerate(parts):
        words = {"input_ids": lambda step, rank=rank: [0 if same else rank] * SIZES[step]}
        write_passes(folder, f"{rank}.5", rank, counts.astype(np.int32), **words)
    if same:
        with pytest.raises(InputError, match="stages of a pipeline"):
            load(folder)
    else:
        assert (load(folder)[0].counts == sum(parts)).all()


def test_names_tell(load, folder):
    parts = [chosen(0), chosen(1, SIZES[::-1])]
    for stage, counts in enumerate(parts):
        lines = (f"{layer},{expert},{n}\n" for (layer, expert), n in np.ndenumerate(counts[0]))
        (folder / f"pp{stage}_rank0.csv").write_text("layer,expert,count\n" + "".join(lines))
        write_passes(folder, f"pp{stage}_{stage}.5", stage, counts.astype(np.int32))
    for source in ("csv", "sglang"):
        files = sorted(folder.glob("*.csv" if source == "csv" else "*.pt"))
        with pytest.raises(InputError, match="layers 0-2 in 2 stages of a pipeline; stages without a common layer"):
            load(files, source)
    assert (load(files, "sglang", no_pipeline=True)[0].counts == sum(parts)).all()


def test_files_of_the_same_steps_do_not_follow_each_other(load, folder):
    parts = [chosen(seed) for seed in range(2)]
    for stage, counts in enumerate(parts):
        write_stat(folder / f"expert_distribution_recorder_{stage}.5.pt", counts)
        np.save(folder / f"{stage}.npy", counts)
    for files, source in ((folder, "sglang"), (sorted(folder.glob("*.npy")), "array")):
        with pytest.raises(InputError, match="as many assignments in every step as in"):
            load(files, source)
        assert (load(files, source, no_pipeline=True)[0].counts == np.concatenate(parts)).all()


def test_layers_in_files_of_their_own_are_not_called_stages_to_overrule(load, folder):
    counts = chosen(5)
    for name, layer in zip("abc", range(LAYERS), strict=True):
        np.save(folder / f"{name}.npy", counts[:, layer : layer + 1])
        np.save(folder / f"blk.{layer}.npy", counts[:, layer : layer + 1])
    with pytest.raises(InputError, match=r"to other experts.*put layers and stages side by side in one array"):
        load([folder / f"{name}.npy" for name in "abc"], "array")
    joined = load([folder / f"blk.{layer}.npy" for layer in range(LAYERS)], "array", no_pipeline=True)[0]
    assert (joined.counts == counts).all()


@pytest.mark.parametrize("names", [("west", "east"), ("counts_pid41", "counts_pid42"), ("experts_0-7", "experts_8-15")])
def test_files_whose_layers_agree_only_together_are_parts_of_the_same_steps(load, folder, names):
    counts = chosen(5)
    part = np.random.default_rng(0).binomial(counts, 0.5)
    parts = [counts[:, :, :8], counts[:, :, 8:]] if "experts" in names[0] else [part, counts - part]
    for name, each in zip(names, parts, strict=True):
        np.save(folder / f"{name}.npy", each)
    with pytest.raises(InputError, match=r"only when the files are added up|names tell parts of the same"):
        load(sorted(folder.glob("*.npy")), "array", no_pipeline=True)
    for name, each in zip(names, [chosen(6), chosen(7)], strict=True):
        np.save(folder / f"{name}.npy", each)
    if names[0] == "west":
        assert load(sorted(folder.glob("*.npy")), "array", no_pipeline=True)[0].num_steps == 2 * len(SIZES)


@pytest.mark.parametrize("source,suffix", [("array", ".json"), ("csv", ".csv"), ("sglang", ".json")])
def test_steps_of_prefill_and_of_decode_do_not_follow_each_other(load, folder, source, suffix):
    counts = chosen(30)[:4]
    names = {"prefill": counts[:2], "decode": counts[2:]}
    for name, part in names.items():
        rows = [f"{t},{layer},{e},{n}" for (t, layer, e), n in np.ndenumerate(part)]
        texts = {
            "array": json.dumps(part.tolist()),
            "csv": "\n".join(["step,layer,expert,count", *rows]),
            "sglang": json.dumps({"logical_count": part.tolist()}),
        }
        (folder / f"{name}{suffix}").write_text(texts[source])
    for paths in ([folder], sorted(folder.iterdir())):
        with pytest.raises(InputError, match="these names tell prefill and decode; import each apart"):
            load(paths, source)
    (folder / f"decode{suffix}").rename(folder / f"prefill_2{suffix}")
    if source == "array":
        assert (load([folder], source)[0].counts == counts).all()
    (folder / f"prefill{suffix}").rename(folder / f"prefill_decode{suffix}")  # both in one
    if source == "array":
        assert load([folder], source)[0].num_steps == 4
