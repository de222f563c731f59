"""Traffic and devices of `follow.py`: shipped traces, and those of a folder with more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemopt.formats.tables.kernel import Fleet, read_fleet
from gemopt.profile import Device, Profile, Sample
from gemopt.replay.workloads import from_requests, from_steps, joined, parse_plan, regimes
from gemopt.traces import Traces

SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "data"
FLEETS = ("longhorn_sgemm", "longhorn_bert", "frontera_resnet")
BASE_US, UNIT_US, UNIT = 60.0, 18.75, 16
LARGEST = 16384
PLAN = "A:256 B:256 A:256 B:256 C:256 A:256"
LONG_PLAN = "A:800 B:800 A:800 B:800 C:800 A:800"
OTHER_PLANS = (  # that nothing was chosen by: other orders and lengths, and other seeds, batches and layers of gpt-oss
    "B:256 A:256 C:256 B:256 C:256 A:256",
    "A:200 C:200 A:200 C:200 B:200 A:200",
    "C:256 A:256 C:256 B:256 A:256 C:256",
    "A:192 B:192 C:192 B:192 A:192 C:192",
)


def fleets(names: list[str]) -> list[Fleet]:
    """Fleets of measured GPUs."""
    return [read_fleet(SHIPPED / "gpu_variability.csv", name) for name in names]


def devices(fleet: Fleet, ranks: int, seed: int = 0) -> Profile:
    """Affine latencies times the relative time of GPUs drawn from a fleet."""
    drawn = fleet.rel_time[fleet.draw(ranks, seed)]
    return Profile(
        devices=[
            Device(
                rank=rank,
                name=fleet.name,
                samples=[
                    Sample(assignments=n, latency_us=float((BASE_US + UNIT_US * n / UNIT) * slower))
                    for n in (0, LARGEST)
                ],
            )
            for rank, slower in enumerate(drawn)
        ],
        source="affine",
    )


def counts(path: Path, layers: int | None) -> Traces:
    """Traces, cut to the first layers where asked."""
    traces = Traces.load(path)
    return traces if layers is None else replace(traces, counts=traces.counts[:, :layers], layer_ids=())


def traffic(data: Path | None, layers: int | None) -> dict[str, dict[str, Callable[[], Traces]]]:
    """Traces by what they are for: loaded when their turn comes."""

    def at(folder: Path, name: str) -> Callable[[], Traces]:
        return lambda: counts(folder / f"{name}.npz", layers)

    ours = {short: at(SHIPPED, f"gptoss20b_trace_{short}") for short in ("shift_b32", "mixed_b64")}
    shifting, calm = {"gpt-oss shift": ours["shift_b32"]}, {"gpt-oss mixed": ours["mixed_b64"]}
    found = {"shift": shifting, "eplb": dict(shifting), "steady": calm, "throttle": dict(calm), "recurring": {},
             "heldout": {}}  # fmt: skip
    if data is None:
        return found
    kinds = {kind: at(data, f"tinymoe_{kind}_b128") for kind in ("prose", "code", "maths")}
    shifting["tiny-MoE shift"] = found["eplb"]["tiny-MoE shift"] = at(data, "tinymoe_shift_open_b128")
    calm |= {f"gpt-oss {kind}": at(data, f"gptoss20b_trace_{kind}_b32") for kind in ("physchem", "biomed")}
    calm |= {f"tiny-MoE {kind}": load for kind, load in kinds.items()}
    found["throttle"]["tiny-MoE code"] = kinds["code"]

    def tiny(plan: str) -> Traces:
        return from_steps(joined({kind: load() for kind, load in kinds.items()}), parse_plan(plan, list(kinds)))

    def domains(plan: str) -> Traces:
        return requests(data / "gptoss20b_tokens.npz", plan, layers)

    found["recurring"] = {"tiny-MoE kinds": lambda: tiny(PLAN), "gpt-oss domains": lambda: domains(PLAN)}
    found["heldout"] = {
        f"tiny-MoE {OTHER_PLANS[0]}": lambda: tiny(OTHER_PLANS[0]),
        f"tiny-MoE {OTHER_PLANS[1]}": lambda: tiny(OTHER_PLANS[1]),
        f"gpt-oss {OTHER_PLANS[2]}": lambda: requests(data / "gptoss20b_tokens.npz", OTHER_PLANS[2], layers, 1, 32, 8),
        f"gpt-oss {OTHER_PLANS[3]}": lambda: requests(data / "gptoss20b_tokens.npz", OTHER_PLANS[3], layers, 2, 64, 16),
    }
    found["eplb"] |= {"tiny-MoE kinds": lambda: tiny(LONG_PLAN), "gpt-oss domains": lambda: domains(LONG_PLAN)}
    return found


def requests(
    path: Path, plan: str, layers: int | None, seed: int = 0, batch_size: int = 32, first_layer: int = 0
) -> Traces:
    """Domains of the token-level record."""
    chosen = slice(None) if layers is None else slice(first_layer, first_layer + layers)
    with np.load(path) as file:
        ids, starts, tasks = file["ids"][:, chosen], file["req_start"], [str(domain) for domain in file["domain"]]
        experts = int(file["num_experts"])
    names = sorted(set(tasks))
    shares = regimes(parse_plan(plan, names), names)
    made = from_requests(ids, starts, tasks, shares, names=names, num_experts=experts,
                         batch_size=batch_size, seed=seed)  # fmt: skip
    return replace(made, tokens=None)
