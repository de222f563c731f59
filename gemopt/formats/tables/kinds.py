"""Kinds of kernel tables that are known: how each is told, what its columns count, and what is known of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gemopt.exceptions import InputError
from gemopt.formats.tables.columns import values
from gemopt.formats.tables.files import Row, Table
from gemopt.profile import MoeShape


class Unit(StrEnum):
    """What the load column counts.

    `assignments`: rows of the expert GEMMs on the measured device. `tokens`: tokens whose experts are all on the
    device, so assignments are tokens x top-k. `group-tokens`: tokens of the whole expert-parallel group of N ranks,
    so a rank gets tokens x top-k / N assignments.
    """

    ASSIGNMENTS = "assignments"
    TOKENS = "tokens"
    GROUP_TOKENS = "group-tokens"


def named_unit(name: str | None) -> Unit | None:
    """The unit of that name; `InputError` where there is none."""
    if name is not None and name not in list(Unit):
        raise InputError("--unit", name, f"one of {', '.join(Unit)}")
    return None if name is None else Unit(name)


@dataclass(frozen=True)
class Layout:
    """A known kind of table: how it is told (`header`), its columns, what they count, and which are results.

    `tuned` columns name the kernel that was found best for a load.
    """

    name: str
    header: frozenset[str]
    load: str
    unit: Unit
    times: tuple[str, ...]  # the first that the table has, with its unit
    tuned: frozenset[str] = frozenset()
    devices: bool = True  # whether columns like `device` number devices, instead of naming their kind


AICONFIGURATOR = Layout(
    "aiconfigurator",
    frozenset({"num_tokens", "topk", "moe_ep_size", "distribution"}),
    "num_tokens",
    Unit.GROUP_TOKENS,
    ("latency_ms", "latency:ms"),
    devices=False,
)
AITER = Layout(
    "aiter",
    frozenset({"token", "model_dim", "inter_dim", "expert", "topk", "us"}),
    "token",
    Unit.TOKENS,
    ("us",),
    frozenset({"block_m", "ksplit", "kernelId", "kernelName", "kernelName1", "kernelName2", "run_1stage", "xbf16"})
    | {"flat", "_tag", "us_default", "candidates_timed", "mega"},
)
BENCHMARK_MOE = Layout(
    "benchmark_moe",
    frozenset({"batch_size", "kernel_time_us", "config", "part"}),
    "batch_size",
    Unit.TOKENS,
    ("kernel_time_us",),
    frozenset({"config"}),
)
FLASHINFER = Layout(
    "flashinfer_benchmark",
    frozenset({"routine", "median_time", "num_tokens", "num_experts", "top_k", "local_num_experts"}),
    "num_tokens",
    Unit.GROUP_TOKENS,
    ("median_time:ms",),
    frozenset({"case_tag", "repro_command", "resolved_backend"}),
    devices=False,
)
AITER_EP = replace(AITER, header=AITER.header | {"ep"}, unit=Unit.GROUP_TOKENS)  # `expert`: those of one rank
NONE = {"0", "0.0", ""}  # as aiter writes times that it did not take
LAYOUTS = (AICONFIGURATOR, AITER_EP, AITER, BENCHMARK_MOE, FLASHINFER)


def kernel(table: Table) -> str | None:
    """Engine, version and kernel, where the table names one of each."""
    named = [values(table.rows, name) for name in ("framework", "version", "kernel_source") if name in table.header]
    return " ".join(found[0] for found in named if len(found) == 1) or None


def shape(table: Table, layout: Layout | None, top_k: int | None) -> MoeShape:
    """The measured layer, as far as aiconfigurator's columns tell it."""
    if layout is not AICONFIGURATOR or not {"hidden_size", "inter_size", "num_experts"} <= set(table.header):
        return MoeShape(top_k=top_k)
    cells = table.rows[0].cells
    experts = int(cells["num_experts"])
    slots = int(cells.get("num_slots") or experts)  # with copies
    return MoeShape(
        hidden_size=int(cells["hidden_size"]),
        intermediate_size=int(cells["inter_size"]) // int(cells.get("moe_tp_size") or 1),
        num_experts=experts,
        num_local_experts=max(1, slots // int(cells["moe_ep_size"])),
        top_k=top_k,
        dtype=cells.get("moe_dtype"),
    )


def settled(table: Table, layout: Layout | None, load: str | None) -> Table:
    """The rows of a known kind with the time of a whole layer, and a load that they tell; `load`: the column asked for.

    aiter leaves `us` at 0 where one kernel does both stages; its time is in `us1`.

    Raises
    ------
    InputError
        aiter's second stages alone, told by the column `a2_layout`; tokens of rank 0 in TensorRT-LLM's wide EP, of
        which nothing tells how many experts are its own.
    """
    if layout is not None and layout.name == AITER.name:
        return _both_stages(table)
    if layout is AICONFIGURATOR and load is None and {"rank0_num_tokens", "simulation_mode"} <= set(table.header):
        told = next((each for each in values(table.rows, "simulation_mode") if each != "simple"), None)
        if told is not None:
            limit = "rows that tell how many assignments the rank had: these do not"
            raise InputError(f"{table.path}, simulation_mode", told, limit, "--where simulation_mode=simple")
    return table


def _both_stages(table: Table) -> Table:
    if "a2_layout" in table.header:
        found, hint = "the second of two stages", "add the times of the first, and leave a2_layout out"
        raise InputError(f"{table.path}, a2_layout", found, "times of whole MoE layers", hint)
    rows = []
    for row in table.rows:
        if (
            {"us1", "us2"} <= {*table.header}
            and row.cells["us"] in NONE
            and not {row.cells["us1"], row.cells["us2"]} & NONE
        ):
            found, hint = f"{row.cells['us'] or 'nothing'} beside us1 and us2", "--time-column us1+us2"
            raise InputError(f"{table.path} {row.where}, us", found, "the time of both stages", hint)
        one = row.cells.get("run_1stage") in ("1", "True") and row.cells["us"] in NONE
        rows.append(Row(row.where, {**row.cells, "us": row.cells.get("us1", "0")}) if one else row)
    return Table(table.path, table.header, rows)


def refuse_fused(table: Table, time: str, asked: str | None) -> None:
    """Raise where aiconfigurator timed a kernel that exchanges tokens too, unless its time was asked for."""
    kernels = values(table.rows, "kernel_source") if "kernel_source" in table.header else []
    if asked is None and any("megamoe" in each.lower() for each in kernels):
        limit = "times without the exchange of tokens, which this kernel does too"
        raise InputError(f"{table.path}, kernel_source", "megamoe", limit, f"to take them so: --time-column {time}:ms")


def as_if_balanced(column: str, told: str) -> str:
    """The sentence on rows of uneven loads that were asked for."""
    return f"{column} is {told}: taken as if balanced, though the rank may have had more assignments: times too long"


def refuse_skewed(table: Table, where: Sequence[str]) -> list[str]:
    """aiconfigurator's skewed rows time the rank with most load, and do not say how much that is.

    Refused unless they were asked for, then a sentence.
    """
    found = values(table.rows, "distribution")[0]
    asked = any(text.partition("=")[0].strip() == "distribution" for text in where)
    if found in ("balanced", "uniform") or all(row.cells["moe_ep_size"] == "1" for row in table.rows):
        return []
    if not asked:
        raise InputError(
            f"{table.path}, distribution",
            found,
            "balanced rows: others time the rank with the most load, which the table does not tell",
            f"--where distribution=balanced; to take them as if balanced (too slow): --where distribution={found}",
        )
    return [as_if_balanced("distribution", found)]
