"""What a kernel table says of all rows and nothing reads is said, and so are repeats that chance does not explain."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_tables import loads, written
from one_liners import one_line

from gemopt.exceptions import InputError
from gemopt.formats.tables.kernel import Unit, read_table

NS = (1, 2, 4, 8)


def notes_of(folder: Path, more: str, **options: object) -> list[str]:
    header, cells = (more.replace("=", ",").split(",")[i::2] for i in (0, 1))
    rows = "".join(",".join([str(n), str(50 + n), *cells]) + "\n" for n in NS)
    path = written(folder, ",".join(["assignments", "time_us", *header]) + f"\n{rows}")
    notes: list[str] = []
    assert loads(read_table(path, notes=notes, **options)) == [(n, None, 50.0 + n) for n in NS]  # type: ignore[arg-type]
    return notes


@pytest.mark.parametrize(
    "more", ["scale=1000", "inner_loops=10", "load_unit=tokens", "agg=sum", "clock=cpu", "blocks=48", "cold=True"]
)
def test_columns_with_one_value_that_nothing_reads_are_named(tmp_path: Path, more: str) -> None:
    assert notes_of(tmp_path, more) == [
        f"columns that say the same in all rows are left unread: {more.replace('=', ' ')}"
    ]
    assert notes_of(tmp_path, more, where=[more]) == []


@pytest.mark.parametrize(
    "more",
    [
        "hidden_size=2880,dtype=bf16,num_experts=32,warmup=5,iters=100,version=0.14.0,seq_len=512",
        "padded=False,note=,num_groups=1,std_us=0.5,tflops=123,gpu_name=H100,driver=580,date=2026-11-30",
        "E=128,valid=1,is_correct=yes,status=PASS,state=completed,stat=median,aggregation=p50,num_runs=20,timeout=600",
        "python=3.11,power_w=700,sm_clock_mhz=1980,mem_clock=2619,topk_normalized=True,timer=events,gpu=P40",
    ],
)
def test_what_was_measured_and_on_what_goes_without_saying(tmp_path: Path, more: str) -> None:
    assert notes_of(tmp_path, more) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("estimated=True", "estimated: got True; times that were measured; if they were: --repeat-column 'estimated'"),
        ("normalized=1", "normalized: got 1; times that were measured"),
        ("is_valid=0", "is_valid: got 0; rows of runs that went well"),
        ("latency_unit=ticks", "latency_unit: got ticks; a unit of time: us, ms, ns, s"),
        ("gpu=all", "gpu: got all; one device"),
        ("device=mean", "device: got mean; one device"),
    ],
)
def test_what_they_say_of_the_times_is_heeded(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        notes_of(tmp_path, more)
    assert said in one_line(error)


def repeated(folder: Path, column: str, factors: dict[str, list[float]], repeat: str | None = None) -> list[str]:
    rows = [f"{n},{(50 + n) * by},{name}\n" for name, each in factors.items() for n, by in zip(NS, each, strict=True)]
    notes: list[str] = []
    path = written(folder, f"assignments,time_us,{column}\n{''.join(rows)}")
    read_table(path, unit=Unit.ASSIGNMENTS, repeat=[repeat] if repeat else [], notes=notes)
    return notes


def test_a_run_that_is_slower_under_every_load_is_named(tmp_path: Path) -> None:
    """As runs on two GPUs are, whose median is the time of neither."""
    slower = {"0": [1.0] * 4, "1": [1.35] * 4}
    said = " 1 takes 1.35 times what 0 takes, and longer under every load: repeats of one kind?"
    assert repeated(tmp_path, "run", slower) == [f"run{said}"]
    assert repeated(tmp_path, "batch_kind", slower, "batch_kind") == [f"batch_kind{said}"]
    assert repeated(tmp_path, "run", {"0": [1.0, 1.2, 1.0, 1.2], "1": [1.2, 1.0, 1.2, 1.0]}) == []
    assert repeated(tmp_path, "run", {"0": [1.0] * 4, "1": [1.05] * 4, "2": [1.02] * 4}) == []


def test_times_that_were_rounded_are_named(tmp_path: Path) -> None:
    """As milliseconds with two decimals."""
    for times, said in (
        (
            (0.03, 0.03, 0.03, 0.05),
            ["times are multiples of 10 us, and the shortest is 30: rounded? write more digits"],
        ),
        ((0.031, 0.031, 0.034, 0.052), []),
        ((0.03, 0.04, 0.05, 0.07), []),  # no two are alike
    ):
        notes: list[str] = []
        rows = "".join(f"{n},{ms}\n" for n, ms in zip(NS, times, strict=True))
        read_table(written(tmp_path, f"assignments,time_ms\n{rows}"), notes=notes)
        assert notes == said


@pytest.mark.parametrize(
    ("name", "share", "said"),
    [
        ("max_tokens_rank", 14, "max_tokens_rank is 1.4 times an even share of num_tokens: were ranks given more"),
        ("tokens_per_rank", 10, ""),
        ("max_tokens_rank", 10.5, ""),
    ],
)
def test_tokens_of_a_rank_beside_those_of_the_group_may_be_more(
    tmp_path: Path, name: str, share: float, said: str
) -> None:
    rows = "".join(f"{80 * n},{int(share * n)},{50 + n}\n" for n in (2, 4, 8, 16))
    notes: list[str] = []
    path = written(tmp_path, f"num_tokens,{name},time_us\n{rows}")
    read_table(path, unit=Unit.GROUP_TOKENS, top_k=4, ep=8, notes=notes)
    assert [each.startswith(said) for each in notes] == ([True] if said else [])


def test_ranks_by_two_numbers_are_refused_where_these_differ(tmp_path: Path) -> None:
    def path(ep_rank: str) -> Path:
        rows = "".join(f"{r},{ep_rank[r]},{n},{50 + n + 9 * r}\n" for r in range(2) for n in NS)
        return written(tmp_path, f"rank,ep_rank,assignments,time_us\n{rows}")

    with pytest.raises(InputError, match=r"got rank 0 beside ep_rank 1; .* --device-column ep_rank"):
        read_table(path("10"))
    assert loads(read_table(path("10"), device=["ep_rank"]))[0] == (1, None, 60.0)
    assert loads(read_table(path("01")))[0] == (1, None, 51.0)


@pytest.mark.parametrize(
    "more",
    [
        "num_expert_parallel_workers=4",
        "ep_group_size=8",
        "gpu_count=8",
        "num_device=2",
        "parallel_config=TP1-EP8",
        "gpu=8xH100",
        "device=H20x16",
        "num_data_parallel_workers=2",
    ],
)
def test_what_says_that_loads_may_be_those_of_several_devices_is_named(tmp_path: Path, more: str) -> None:
    said = f"{more.replace('=', ' is ')}: are loads those of one device? of all: --unit group-tokens"
    notes = tokens_of(tmp_path, more)
    assert notes == [said]
    assert tokens_of(tmp_path, "model=deepseek-v3-0324,config=step8,kernel=dp4a") == []
    assert tokens_of(tmp_path, "gpu_pcie=Gen5x16,gpu_serial=16XK2,host=dgx-h100x8,hostname=ep-12") == []


@pytest.mark.parametrize("name", ["num_tensor_parallel_workers", "tensor_model_parallel_size", "etp_size", "tp_degree"])
def test_what_says_that_experts_were_parted_is_named(tmp_path: Path, name: str) -> None:
    assert tokens_of(tmp_path, f"{name}=8") == [
        f"{name} is 8: times are those of a part of each expert, right where it is served so"
    ]


def tokens_of(folder: Path, more: str) -> list[str]:
    header, cells = (more.replace("=", ",").split(",")[i::2] for i in (0, 1))
    rows = "".join(",".join([str(n), str(50 + n), *cells]) + "\n" for n in NS)
    notes: list[str] = []
    path = written(folder, ",".join(["num_tokens", "time_us", *header]) + f"\n{rows}")
    read_table(path, unit=Unit.TOKENS, top_k=8, notes=notes)
    return notes


@pytest.mark.parametrize("more", ["expert_imbalance=2.0", "max_min_ratio=3.0", "is_outlier=True", "topk_override=1"])
def test_usual_words_do_not_hide_what_a_column_says(tmp_path: Path, more: str) -> None:
    assert notes_of(tmp_path, more) == [
        f"columns that say the same in all rows are left unread: {more.replace('=', ' ')}"
    ]


@pytest.mark.parametrize("name", ["latency_units", "unit_of_time", "timing_unit_of_latency"])
def test_units_of_times_are_heeded_however_they_are_called(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: got ms; the unit that time_us is read in"):
        notes_of(tmp_path, f"{name}=ms")


def test_a_unit_that_times_are_read_in_goes_without_saying(tmp_path: Path) -> None:
    assert notes_of(tmp_path, "unit=us,latency_units=usec") == []
