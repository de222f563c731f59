"""What the load of a kernel table counts: tokens of one rank or all, sequences, and columns that tell the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_inputs import gemopt, traces
from kernel_tables import loads, written
from one_liners import one_line

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit, read_table

NS = (1, 2, 4, 8)


def table(folder: Path, header: str, more: str = "") -> Path:
    return written(folder, f"{header}\n" + "".join(f"{n},{50 + n}{more}\n" for n in NS))


@pytest.mark.parametrize(
    ("load", "unit", "said"),
    [
        ("tokens_per_rank", Unit.GROUP_TOKENS, "the tokens of all ranks together; --unit tokens"),
        ("num_tokens_per_gpu", Unit.GROUP_TOKENS, "the tokens of all ranks together; --unit tokens"),
        ("local_tokens_device", Unit.GROUP_TOKENS, "the tokens of all ranks together; --unit tokens"),
        ("global_num_tokens", Unit.TOKENS, "the load of one device; --unit group-tokens"),
        ("Global Batch", Unit.ASSIGNMENTS, "the load of one device; --unit group-tokens"),
    ],
)
def test_a_load_of_one_rank_or_of_all_by_its_name(tmp_path: Path, load: str, unit: Unit, said: str) -> None:
    path = table(tmp_path, f"{load},time_us")
    with pytest.raises(InputError) as error:
        read_table(path, load=load, unit=unit, top_k=8, ep=8 if unit is Unit.GROUP_TOKENS else None)
    assert f"--load-column: got {load}; {said}" in one_line(error)


def test_units_may_be_named_by_a_text(tmp_path: Path) -> None:
    path = table(tmp_path, "tokens,time_us")
    assert read_table(path, unit="group-tokens", top_k=8, ep=4) == read_table(
        path, unit=Unit.GROUP_TOKENS, top_k=8, ep=4
    )
    with pytest.raises(InputError, match="--unit: got token; one of assignments, tokens, group-tokens"):
        read_table(path, unit="token", top_k=8)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ep": 2.5}, "--ep: got 2.5; the ranks of the measured group, at least 1"),
        ({"ep": True}, "--ep: got True"),
        ({"ep": "8"}, "--ep: got '8'; the ranks"),
        ({"top_k": "8"}, "--top-k: got '8'; the experts per token, at least 1"),
        ({"top_k": float("nan")}, "--top-k: got nan"),
        ({"path": [[1, 5.0]]}, "table: got list; the path of a table; save a data frame: its to_csv"),
    ],
)
def test_wrong_input_in_python(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    given = {"path": table(tmp_path, "tokens,time_us"), "unit": "group-tokens", "top_k": 8, "ep": 2, **asked}
    with pytest.raises(InputError) as error:
        read_table(**given)
    assert said in one_line(error)


def test_one_choice_needs_no_list(tmp_path: Path) -> None:
    path = written(tmp_path, "assignments,dtype,us\n8,fp8,5\n8,bf16,7\n")
    assert loads(read_table(path, where="dtype=fp8")) == [(8, None, 5)]
    assert loads(read_table(path, repeat="dtype")) == [(8, None, 6)]
    assert read_table(path, device="dtype").num_ranks == 2


def test_ranks_that_send_alike_get_what_they_send(tmp_path: Path) -> None:
    """As many tokens on each of 8 ranks, 8 experts each: 8 n 8 / 8 assignments on a rank, though it has 32 of 256."""
    path = table(tmp_path, "tokens_per_rank,time_us,num_experts,num_local_experts", ",256,32")
    found = read_table(path, load="tokens_per_rank", unit=Unit.TOKENS, top_k=8)
    assert loads(found) == [(8 * n, None, 50.0 + n) for n in NS]


@pytest.mark.parametrize(
    "name",
    ["speculative_num_draft_tokens", "spec_steps", "q_seqlen", "query_length", "Input Length", "prompt_tokens", "seq"],
)
def test_sequences_of_several_tokens_by_more_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"with {name} 4, does batch_size count tokens, or sequences"):
        read_table(table(tmp_path, f"batch_size,time_us,{name}", ",4"), top_k=2)
    assert loads(read_table(table(tmp_path, f"batch_size,time_us,{name}", ",1"), top_k=2))[0] == (2, None, 51.0)


@pytest.mark.parametrize("name", ["context_len", "max_seq_len", "kv_len", "cache_len", "output_len"])
def test_lengths_of_what_came_before_are_no_tokens_of_a_step(tmp_path: Path, name: str) -> None:
    assert loads(read_table(table(tmp_path, f"batch_size,time_us,{name}", ",4096"), top_k=2))[0] == (2, None, 51.0)


@pytest.mark.parametrize(
    ("load", "beside", "value", "said"),
    [
        ("seq_len", "batch_size", "4", ["beside batch_size 4: does seq_len count all tokens?"]),
        ("bs", "seq_len", "512", ["beside seq_len 512: does bs count all tokens?"]),
        ("batch", "num_draft_tokens", "3", ["beside num_draft_tokens 3: does batch count all tokens?"]),
        ("batch", "seq_len", "1", []),
        ("num_tokens", "batch_size", "4", []),
        ("num_tokens", "seq_len", "512", []),
        ("M", "num_groups", "16", ["num_groups is 16: does M count the rows of all groups together?"]),
        ("M", "num_groups", "1", []),
    ],
)
def test_what_multiplies_a_load_is_named(tmp_path: Path, load: str, beside: str, value: str, said: list[str]) -> None:
    notes: list[str] = []
    path = table(tmp_path, f"{load},time_us,{beside}", f",{value}")
    read_table(path, load=load, unit=Unit.TOKENS, top_k=2, notes=notes)
    assert notes == said


@pytest.mark.parametrize(
    "name", ["moe_router_topk", "Top-K", "num_experts_per_tok", "n_activated_experts_per_token", "top_k_experts"]
)
def test_a_column_that_tells_the_experts_of_a_token_is_heeded(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f"tokens,time_us,{name},topk_group", ",4,3")
    with pytest.raises(InputError, match=f"--top-k: got 8; {name} is 4"):
        read_table(path, unit=Unit.TOKENS, top_k=8)
    assert loads(read_table(path, unit=Unit.TOKENS))[0] == (4, None, 51.0)


@pytest.mark.parametrize(
    ("local", "every"), [("experts_per_rank", "n_routed_experts"), ("n_local_experts", "expert_num")]
)
def test_columns_that_tell_the_experts_on_the_device_are_heeded(tmp_path: Path, local: str, every: str) -> None:
    path = table(tmp_path, f"tokens,time_us,{local},{every},topk", ",64,256,8")
    with pytest.raises(InputError, match="one in 4 of the experts is on the device"):
        read_table(path, unit=Unit.TOKENS)
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS)) == [(2 * n, None, 50.0 + n) for n in NS]


@pytest.mark.parametrize("name", ["expert_parallel_degree", "EP World Size", "num_ep_ranks"])
def test_a_column_that_tells_the_ranks_of_the_group_is_heeded(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, f"tokens,time_us,{name}", ",8")
    with pytest.raises(InputError, match=f"--ep: got 4; {name} is 8"):
        read_table(path, unit=Unit.GROUP_TOKENS, top_k=8, ep=4)
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS, top_k=8)) == [(n, None, 50.0 + n) for n in NS]


@pytest.mark.parametrize(
    ("experts", "top_k", "without"), [(257, 9, 8), (33, 9, 8), (162, 8, 6), (256, 8, None), (60, 4, None), (8, 2, None)]
)
def test_shared_experts_among_those_counted_are_named(
    tmp_path: Path, experts: int, top_k: int, without: int | None
) -> None:
    head, more = "token,us,model_dim,inter_dim,expert,topk", f",6144,256,{experts},{top_k}"
    notes: list[str] = []
    options: dict[str, Any] = {"notes": notes}
    assert loads(read_table(table(tmp_path, head, more), **options))[0] == (top_k, None, 51.0)
    shared = [note for note in notes if "shared" in note]
    assert [note.partition("write ")[2] for note in shared] == ([f"{without} for {top_k} then"] if without else [])


@pytest.mark.parametrize("name", ["unique_experts", "experts_hit", "num_activated_experts", "Distinct Experts"])
def test_experts_that_were_active_by_more_names(tmp_path: Path, name: str) -> None:
    """They were other rows of one load, and their median the hint."""
    rows = "".join(f"{n},{active},{50 + n + active}\n" for n in (8, 16, 32) for active in (10, 20, 30))
    path = written(tmp_path, f"tokens,{name},time_us\n{rows}")
    found = read_table(path, unit=Unit.TOKENS, top_k=8)
    assert loads(found)[:4] == [(64, 10, 68.0), (64, 20, 78.0), (64, 30, 88.0), (128, 10, 76.0)]
    read_over = read_table(path, unit=Unit.TOKENS, top_k=8, repeat=[name])
    assert loads(read_over) == [(64, None, 78.0), (128, None, 86.0), (256, None, 102.0)]


def test_experts_that_were_active_on_all_ranks_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"{n},{active},{50 + n},256\n" for n, active in ((64, 30), (128, 100)))
    path = written(tmp_path, f"tokens,active_experts,time_us,num_experts\n{rows}")
    group: dict[str, Any] = {"unit": Unit.GROUP_TOKENS, "top_k": 8, "ep": 8}
    with pytest.raises(InputError, match="line 3, active_experts: got 100; at most the 32 experts on the device"):
        read_table(path, **group)
    assert loads(read_table(path, **group, repeat=["active_experts"])) == [(64, None, 114.0), (128, None, 178.0)]
    assert loads(read_table(path, unit=Unit.TOKENS, top_k=8))[1] == (1024, 100, 178.0)


def test_a_job_names_its_keys_where_the_command_names_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path, "tokens,time_us")
    (tmp_path / "job.json").write_text(
        '{"profile": {"table": "table.csv", "top_k": 8, "ranks": 2}, "traces": "t.safetensors", "output": "o"}'
    )
    traces().save("t.safetensors")
    code, _, err = gemopt(capsys, "run", "job.json")
    assert code == 2 and "gemopt: profile.unit: got nothing; " in err and "give profile.unit tokens" in err


@pytest.mark.parametrize("name", ["expert", "experts", "E"])
def test_a_column_that_numbers_experts_counts_none(tmp_path: Path, name: str) -> None:
    rows = "".join(f"{n},{expert},{50 + n}\n" for n in NS for expert in ("0", "1"))
    path = written(tmp_path, f"assignments,{name},time_us\n{rows}")
    with pytest.raises(InputError, match=f"rows that differ in {name}"):
        read_table(path)
    assert loads(read_table(path, repeat=[name])) == [(n, None, 50.0 + n) for n in NS]


def test_loads_beside_those_of_each_rank_and_more_experts_than_there_are(tmp_path: Path) -> None:
    lines = "".join(f"{8 * n},{n},{40 + n}\n" for n in (1, 2, 16))
    path, notes = written(tmp_path, "num_tokens,num_tokens_per_rank,time_us\n" + lines), list[str]()
    read_table(path, unit=Unit.TOKENS, top_k=4, notes=notes)
    assert "num_tokens is 8 times num_tokens_per_rank: are they those of the whole group?" in " ".join(notes)
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS, top_k=4, ep=8, notes=(of_group := []))) == [
        (4 * n, None, 40 + n) for n in (1, 2, 16)
    ]
    assert "of the whole group" not in " ".join(of_group)
    path = written(tmp_path, "M,time_us,total_M\n" + "".join(f"{n},{40 + n},{32 * n}\n" for n in (1, 2, 16)))
    read_table(path, load="M", unit=Unit.ASSIGNMENTS, notes=(of_one := []))
    assert of_one == ["total_M is 32 times M: is M that of one expert, or of one rank?"]
    read_table(path, load="total_M", unit=Unit.ASSIGNMENTS, notes=(of_all := []))
    assert of_all == []
    path = written(tmp_path, "num_tokens,num_experts,time_us\n8,2,40\n16,2,41\n")
    with pytest.raises(InputError, match=r"--top-k: got 4; at most the 2 experts .*then --unit group-tokens"):
        read_table(path, unit=Unit.TOKENS, top_k=4)
    assert loads(read_table(path, unit=Unit.GROUP_TOKENS, top_k=4, ep=4)) == [(8, None, 40), (16, None, 41)]


@pytest.mark.parametrize("name", ["beam_width", "best_of"])
def test_beams_of_a_sequence_are_tokens_too(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, f"batch_size,{name},time_us\n8,4,40\n16,4,41\n")
    with pytest.raises(InputError, match=f"with {name} 4, does batch_size count tokens, or sequences"):
        read_table(path, top_k=4)
