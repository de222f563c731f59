"""Tables of measured exchanges as topologies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_inputs import gemopt, gemopt_json

from gemopt.exceptions import InputError
from gemopt.formats.links import read_links
from gemopt.formats.links.tables import rising, smoothed
from gemopt.topology import Level
from gemopt.topology.named import INSIDE

DATA = Path(__file__).parent / "data" / "links"
NCCL, LOW_LATENCY = str(DATA / "nccl_perf_h100.csv"), str(DATA / "wideep_deepep_ll_perf_h100.csv")
NORMAL, A2A = str(DATA / "wideep_deepep_normal_perf_h100.csv"), str(DATA / "moe_a2a_perf_h100.csv")
HIDDEN, TOP_K, EXPERTS = 7168, 8, 256
ALLTOALL = ("op_name=alltoall", "nccl_dtype=half")


def reached(groups: int) -> float:
    """How likely a token has an expert in one of so many groups, by drawing."""
    rng = np.random.default_rng(0)
    drawn = rng.random((20_000, EXPERTS)).argpartition(TOP_K, axis=1)[:, :TOP_K]
    return float((drawn < EXPERTS // groups).any(axis=1).mean())


def test_messages_of_nccl_are_elements_of_which_all_but_the_own_part_leave() -> None:
    found = read_links(NCCL, where=ALLTOALL)
    level = found.within_node
    assert found.num_ranks == 8 and level is not None and level.points is not None
    assert level.points[0] == (16384 * 2 * 7 / 8, pytest.approx(8.93))
    bytes_each = read_links(NCCL, where=("op_name=alltoall", "nccl_dtype=int8")).within_node
    assert bytes_each is not None and level.curve(4e6) == pytest.approx(bytes_each.curve(4e6), rel=0.1)
    with pytest.raises(InputError, match=r"differ in nccl_dtype, op_name.*--where op_name") as error:
        read_links(NCCL)
    assert "--device-column" not in str(error.value)
    with pytest.raises(InputError, match="op_name=alltoall"):
        read_links(NCCL, where=("op_name=all_gather", "nccl_dtype=half"))
    with pytest.raises(InputError, match="--token-bytes"):
        read_links(NCCL, where=ALLTOALL, token_bytes=7168)


def test_low_latency_sends_a_token_to_each_of_its_experts() -> None:
    found = read_links(LOW_LATENCY, where=("node_num=2", "phase=combine"), inside="nvlink-8")
    assert (found.num_ranks, found.num_nodes, found.within_node) == (16, 2, INSIDE["nvlink"][0])
    assert found.between_nodes is not None and found.between_nodes.points is not None
    size, _ = found.between_nodes.points[-1]  # as its bandwidth says: some tokens of the test chose fewer experts
    assert 0.99 < size / (256 * HIDDEN * 2 * TOP_K / 2) < 1
    inside = read_links(LOW_LATENCY, where=("node_num=1", "version=0.5.12", "phase=dispatch"))
    assert inside.between_nodes is None and inside.within_node is not None and inside.within_node.points is not None
    assert inside.within_node.points[0][0] == pytest.approx((HIDDEN * (1 + 4 / 128) + 16) * TOP_K * 7 / 8, rel=1e-3)
    with pytest.raises(InputError, match="--inside"):
        read_links(LOW_LATENCY, where=("node_num=2", "phase=combine"))
    with pytest.raises(InputError, match="differ in source, version, device, node_num, phase"):
        read_links(LOW_LATENCY)
    with pytest.raises(InputError, match="once per assignment"):
        read_links(LOW_LATENCY, where=("node_num=1", "version=0.5.12", "phase=combine"), once_per="rank")


def test_normal_kernels_send_a_token_once(tmp_path: Path) -> None:
    where = ("node_num=2", "phase=dispatch", "sms=20")
    read_links(LOW_LATENCY, where=("node_num=1", "version=0.5.12", "phase=dispatch")).save(tmp_path / "inside.json")
    found = read_links(NORMAL, where=where, inside=str(tmp_path / "inside.json"))
    assert found.within_node is not None and found.within_node.points is not None and found.between_nodes is not None
    assert found.between_nodes.points is not None
    size, time = found.between_nodes.points[-1]
    assert size == pytest.approx(65536 * HIDDEN * (1 + 4 / 128) * reached(2), rel=0.01)
    assert 30 < size / time / 1e3 < 50  # GB/s of a NIC of 400 Gb/s
    inside = read_links(A2A, where=("comm_backend=trtllm_deepep_ht", "comm_dtype=bfloat16", "phase=combine"))
    assert inside.within_node is not None and inside.within_node.points is not None
    assert inside.within_node.points[-1][0] == pytest.approx(65536 * HIDDEN * 2 * 7 * reached(8), rel=0.01)
    with pytest.raises(InputError, match="up to 4 nodes"):
        read_links(NORMAL, where=("node_num=8", "phase=dispatch", "sms=20"), inside="nvlink-8")


def test_what_a_table_does_not_tell_must_be_said() -> None:
    where = ("comm_backend=trtllm_deepep_ht", "comm_dtype=nvfp4", "phase=dispatch")
    with pytest.raises(InputError, match="give --token-bytes"):
        read_links(A2A, where=where)
    packed = HIDDEN // 2 + HIDDEN // 16
    assert read_links(A2A, where=where, token_bytes=packed).within_node is not None
    unknown = ("comm_backend=deepep_v2_context", "phase=dispatch")
    with pytest.raises(InputError, match="give --once-per"):
        read_links(A2A, where=unknown, token_bytes=packed)
    assert "once per rank" in (read_links(A2A, where=unknown, token_bytes=packed, once_per="rank").source or "")


def test_types_and_routing_that_tables_name(tmp_path: Path) -> None:
    text, path = Path(NCCL).read_text(), tmp_path / "t.csv"
    path.write_text(text.replace(",half,", ",Half,").replace("half,", "Half,"))
    mine = read_links(str(path), where=("op_name=alltoall", "nccl_dtype=Half")).within_node
    assert mine == read_links(NCCL, where=ALLTOALL).within_node
    path.write_text(text.replace("half", "int4"))
    with pytest.raises(InputError, match="nccl_dtype: got int4; one of half, float16") as error:
        read_links(str(path), where=("op_name=alltoall", "nccl_dtype=int4"))
    assert "--token-bytes" not in str(error.value)  # which NCCL's tables refuse
    head, *rows = Path(A2A).read_text().splitlines()
    path.write_text("\n".join([head + ",distribution", *(row + ",power_law_1.2" for row in rows)]))
    with pytest.raises(InputError, match=r"distribution: got power_law_1\.2; uniform routing"):
        read_links(
            str(path), where=("comm_backend=deepep_v2_context", "phase=dispatch"), token_bytes=9, once_per="rank"
        )


def test_parquet_reads_as_csv_does(tmp_path: Path) -> None:
    table = pytest.importorskip("pyarrow.csv").read_csv(NCCL)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "nccl_perf_h100.parquet")
    again = read_links(str(tmp_path / "nccl_perf_h100.parquet"), where=ALLTOALL)
    assert again.within_node == read_links(NCCL, where=ALLTOALL).within_node


def test_failed_and_computed_exchanges_are_refused(tmp_path: Path) -> None:
    def again(name: str, cell: str) -> str:
        lines = [line for line in Path(NCCL).read_text().splitlines() if line]
        (tmp_path / "nccl.csv").write_text("\n".join([f"{lines[0]},{name}", *(f"{each},{cell}" for each in lines[1:])]))
        return str(tmp_path / "nccl.csv")

    for name, cell, said in (("status", "failed", "runs that went well"), ("estimated", "True", "were measured")):
        with pytest.raises(InputError, match=f"{name}: got {cell}; .*{said}.*leave"):
            read_links(again(name, cell), where=ALLTOALL)
    first = read_links(NCCL, where=ALLTOALL).within_node
    assert read_links(again("status", "ok"), where=ALLTOALL).within_node == first


def test_an_outlier_does_not_lift_what_follows() -> None:
    assert rising([(1, 90.0), (2, 10.0), (4, 11.0), (8, 12.0)], "t") == [(1, 11.0), (2, 11.0), (4, 11.0), (8, 12.0)]
    points = [(float(n), float(t)) for n, t in enumerate(np.random.default_rng(1).integers(1, 50, 30))]
    times = [time for _, time in rising(points, "t")]
    assert times == sorted(times) and times[0] < times[-1]
    with pytest.raises(InputError, match="two or more"):
        rising([(1, 2.0)], "t")


def test_times_that_were_smoothed_are_said() -> None:
    points = [(1.0, 10.0), (2.0, 11.0), (4.0, 2.0), (8.0, 12.0)]
    said = smoothed(points, Level(points=rising(points, "t")))
    assert "1 of 4 times smoothed" in said and "4 bytes: 2 us, taken as 10" in said
    assert smoothed(points[:2], Level(points=rising(points[:2], "t"))) == ""


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--where", "op_name=alltoall", "--where", "nccl_dtype=half")
    out = gemopt_json(capsys, "topology", NCCL, *where, "-o", tmp_path / "t.json")
    assert len(out["node_of_rank"]) == 8 and read_links(str(tmp_path / "t.json")).within_node is not None
    for extra, said in (
        ((NCCL, "--where", "op_name=alltoall"), "nccl_dtype"),
        ((NCCL, *where, "--inside", "nvlink-8"), "--inside"),
        ((NCCL, *where, "--like", "nvlink-8"), "--like"),
        (("nvlink-8", *where), "--where"),
        ((NCCL, *where, "--once-per", "expert"), "--once-per"),
    ):
        code, _, err = gemopt(capsys, "topology", *extra)
        assert code == 2 and said in err and err.count("\n") == 1
    table = tmp_path / "other.csv"
    table.write_text("size,us\n1,2\n2,3\n")
    code, _, err = gemopt(capsys, "topology", table)
    assert code == 2 and "wideep_deepep_ll_perf" in err


@pytest.fixture
def sixteen(tmp_path: Path) -> str:
    """NCCL's table of 16 GPUs, which does not tell on how many nodes."""
    rows = "".join(
        f"NCCL,alltoall,half,16,{n},{us / 1e3}\n" for n, us in ((1 << 10, 20), (1 << 20, 50), (1 << 24, 500))
    )
    path = tmp_path / "nccl.csv"
    path.write_text("kernel_source,op_name,nccl_dtype,num_gpus,message_size,latency\n" + rows)
    return str(path)


def test_more_gpus_than_a_node_has_ask_for_the_nodes(sixteen: str) -> None:
    with pytest.raises(InputError, match="num_gpus: got 16; the table does not tell on how many nodes; give --nodes 2"):
        read_links(sixteen)
    one = read_links(sixteen, nodes=1)
    assert one.num_nodes == 1 and one.within_node is not None and one.within_node.points is not None
    assert one.within_node.points[-1] == (pytest.approx((1 << 24) * 2 * 15 / 16), pytest.approx(500))
    with pytest.raises(InputError, match="--inside"):
        read_links(sixteen, nodes=2)
    two = read_links(sixteen, nodes=2, inside="nvlink-8")
    assert two.node_of_rank.tolist() == [0] * 8 + [1] * 8 and two.within_node == INSIDE["nvlink"][0]
    assert two.between_nodes is not None and two.between_nodes.points is not None
    assert two.between_nodes.points[-1] == (pytest.approx((1 << 24) * 2 * 8 / 16), pytest.approx(500))
    with pytest.raises(InputError, match="--nodes: got 3; as many of the 16 GPUs on each node"):
        read_links(sixteen, nodes=3)


def test_nodes_of_what_tells_them_are_refused() -> None:
    with pytest.raises(InputError, match=r"--nodes: got 2; .* tells: node_num"):
        read_links(LOW_LATENCY, where=("node_num=2", "phase=combine"), inside="nvlink-8", nodes=2)
    with pytest.raises(InputError, match="--nodes: got 2; does not apply to nvlink-8"):
        read_links("nvlink-8", nodes=2)


@pytest.mark.parametrize("cells", ["[[false, true], [true, false]]", '[["0", "1"], ["1", "0"]]'])
def test_costs_are_numbers(tmp_path: Path, cells: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(cells)
    with pytest.raises(InputError, match="flags or texts; a square of numbers"):
        read_links(str(path), like="nvlink-8")
    path.write_text('{"rank_cost_matrix": 3.5}')
    with pytest.raises(InputError, match=r"got 3\.5; a square of numbers"):
        read_links(str(path), like="nvlink-8")
