"""The fixed list of cells: traffic, devices and slots. A seed draws GPUs, and synthetic traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from follow_cases import SHIPPED, devices, fleets
from instances import routing, speeds, staircase_profile

from gemopt.formats.tables.kernel import Unit, read_table, slow_down, what_if
from gemopt.profile import Profile
from gemopt.traces import Traces

DATA = Path(__file__).parent / "data"
SLOWER = 1.3
SHIFT_LAYERS = slice(0, 24, 4)  # of gpt-oss under replay


@dataclass(frozen=True)
class Cell:
    """One comparison: `traffic` and `fleet` of a seed, slots on every rank; `replay` follows the traffic."""

    name: str
    traffic: Callable[[int], Traces]
    fleet: Callable[[int], Profile]
    slots: int
    replay: bool = False


def synthetic(seed: int) -> Traces:
    """58 layers x 256 experts, 500 steps to fit and 500 to score."""
    return routing(seed=seed)


def synthetic_decode(seed: int) -> Traces:
    """The same with 128 tokens a step in place of 4096: a layer activates about 200 of its experts."""
    return routing(seed=seed, tokens=128)


def recorded(folder: Path, name: str) -> Callable[[int], Traces]:
    """A trace from its file, whatever the seed."""
    return lambda seed: Traces.load(folder / f"{name}.npz")


MIXED, SHIFT = (recorded(SHIPPED, f"gptoss20b_trace_{name}") for name in ("mixed_b64", "shift_b32"))
TINY, TINY_SHIFT = (recorded(DATA, f"tinymoe_{name}_b128") for name in ("code", "shift_open"))


def shift_of_some_layers(seed: int) -> Traces:
    """Every fourth layer of the trace that shifts."""
    whole = SHIFT(seed)
    return replace(whole, counts=whole.counts[:, SHIFT_LAYERS], layer_ids=())


def differing(ranks: int, slow: float | None = None) -> Callable[[int], Profile]:
    """Synthetic GPUs, U[.9, 1.1] in speed, tiles of 128."""
    return lambda seed: staircase_profile(speeds(ranks, seed=seed, slow=slow))


def measured(ranks: int, slow: float = 1.0) -> Callable[[int], Profile]:
    """GPUs drawn from a measured fleet, tiles of 16; the middle one slower."""

    def make(seed: int) -> Profile:
        fleet = fleets(["longhorn_sgemm"])[0]
        profile = staircase_profile(1 / fleet.rel_time[fleet.draw(ranks, seed)], largest=2048, tile=16)
        return profile if slow == 1.0 else slow_down(profile, ranks // 2, slow)

    return make


def h100(seed: int) -> Profile:
    """The measured kernel table of gpt-oss-20b on an H100, as fast as eight GPUs of the fleet."""
    table = read_table(SHIPPED / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=8)
    return what_if(table, fleets(["longhorn_sgemm"])[0], ranks=8, seed=seed)


def roofline(ranks: int) -> Callable[[int], Profile]:
    """Latency by assignments and activated experts, measured on an RTX PRO 6000."""

    def make(seed: int) -> Profile:
        surface = read_table(SHIPPED / "moe_block_rtxpro6000_qwen3_30b.csv", unit=Unit.TOKENS, top_k=8)
        compute, memory = fleets(["longhorn_sgemm", "longhorn_bert"])
        return what_if(surface, compute, ranks=ranks, seed=seed, memory=memory)

    return make


def affine(seed: int) -> Profile:
    """Eight GPUs of the fleet, latency in proportion to load above a constant."""
    fleet = fleets(["longhorn_sgemm"])[0]
    return devices(fleet, 8, seed)


CELLS = [
    *(Cell(f"58 x 256, G={g}", synthetic, differing(g), 256 // g) for g in (8, 16, 32, 64)),
    Cell("58 x 256, G=8, one GPU 30 % slower", synthetic, differing(8, SLOWER), 32),
    *(
        Cell(f"58 x 256, G={g}, {g * slots} slots", synthetic, differing(g), slots)
        for g, slots in ((8, 36), (16, 18), (32, 9), (64, 5))
    ),
    Cell("58 x 256, G=16, roofline", synthetic_decode, roofline(16), 16),
    Cell("58 x 256, G=16, roofline, 288 slots", synthetic_decode, roofline(16), 18),
    *(Cell(f"gpt-oss mixed, G={g}", MIXED, measured(g), 32 // g) for g in (4, 8, 16)),
    *(Cell(f"gpt-oss shift, G={g}", SHIFT, measured(g), 32 // g) for g in (4, 8)),
    Cell("gpt-oss mixed, G=8, one GPU 30 % slower", MIXED, measured(8, SLOWER), 4),
    Cell("gpt-oss mixed, G=8, H100 table", MIXED, h100, 4),
    Cell("gpt-oss mixed, G=8, H100 table, 40 slots", MIXED, h100, 5),
    Cell("gpt-oss mixed, G=8, roofline", MIXED, roofline(8), 4),
    *(Cell(f"gpt-oss mixed, G={g}, roofline, {32 + g} slots", MIXED, roofline(g), 32 // g + 1) for g in (4, 8)),
    *(Cell(f"tiny-MoE code, G={g}", TINY, measured(g), 64 // g) for g in (8, 16)),
    Cell("tiny-MoE shift, G=8", TINY_SHIFT, measured(8), 8),
    Cell("replay: gpt-oss shift, G=8", shift_of_some_layers, affine, 4, replay=True),
    Cell("replay: tiny-MoE shift, G=8", TINY_SHIFT, affine, 8, replay=True),
]  # fmt: skip
