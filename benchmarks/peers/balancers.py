"""The balancers of SGLang, vLLM and vllm-ascend as published: each from the file in its wheel, nothing rewritten.

What the files import of their packages and of Ascend's torch is stood in for; none of it takes part in balancing.
Each is a function of what was counted, [T, L, E] assignments, and the table in force, [L, G, S] experts, every slot
filled; it gives the table wanted. Copies of one expert may share a rank.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine_wheels import WHEELS, engine_files
from numpy.typing import NDArray

from gemopt.migration import count_moves
from gemopt.placement import EMPTY, Placement
from gemopt.traces import Traces

IntArray = NDArray[np.int64]
Balance = Callable[[IntArray, IntArray], IntArray]
NPUS_PER_HOST = 8
VERSIONS = ", ".join(WHEELS[name][0].replace("==", " ") for name in ("sglang", "vllm", "vllm-ascend"))


def published() -> dict[str, Callable[[], Balance]]:
    """The balancers by name, each made anew by a call: some remember what they saw."""
    _stand_in()
    sglang, vllm, ascend = (engine_files(name) for name in ("sglang", "vllm", "vllm-ascend"))
    policies = ascend / "vllm_ascend/eplb/core/policy"
    return {
        "EPLB (vLLM)": lambda: _vllm(_module(vllm / "vllm/distributed/eplb/policy/default.py").DefaultEplbPolicy),
        "EPLB (SGLang)": lambda: _deepseek(_module(sglang / "sglang/srt/eplb/eplb_algorithms/deepseek.py")),
        "deepseek_vec": lambda: _deepseek_vec(_module(sglang / "sglang/srt/eplb/eplb_algorithms/deepseek_vec.py")),
        "FlashLB": lambda: _flashlb(_module(policies / "policy_flashlb.py").FlashLB()),
        "SwiftBalancer": lambda: _swift(_module(policies / "policy_swift_balancer.py").SwiftBalanceEplb()),
    }


def ranks_serving(count: int) -> None:
    """Tell FlashLB how many ranks there are: its thresholds depend on it."""
    group = SimpleNamespace(world_size=count)
    sys.modules["vllm_ascend.distributed.parallel_state"].get_dynamic_eplb_group = lambda: group  # type: ignore[attr-defined]


def _stand_in() -> None:
    quiet = SimpleNamespace(info=lambda *_: None, warning=lambda *_: None)
    attributes: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.logger": {"logger": quiet}, "vllm_ascend": {}, "vllm_ascend.distributed": {},
        "vllm_ascend.distributed.parallel_state": {"get_dynamic_eplb_group": None}, "torch_npu": {},
    }  # fmt: skip
    for name, given in attributes.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(given)
    torch.npu = SimpleNamespace(device_count=lambda: NPUS_PER_HOST)


def _module(path: Path) -> ModuleType:
    """The file as a module of a package that has its folder and nothing else."""
    package = ModuleType("published_" + path.stem)
    package.__path__ = [str(path.parent)]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{path.stem}")


def _vllm(policy: Any) -> Balance:
    def balance(counts_TLE: IntArray, table_LGS: IntArray) -> IntArray:
        layers, ranks, _ = table_LGS.shape
        old_LP = torch.from_numpy(table_LGS.reshape(layers, -1))
        weight_LE = torch.from_numpy(counts_TLE.sum(axis=0))
        found = policy.rebalance_experts(weight_LE, old_LP.shape[1], 1, 1, ranks, old_LP)
        return np.asarray(found.numpy()).reshape(table_LGS.shape)

    return balance


def _deepseek(module: Any) -> Balance:
    def balance(counts_TLE: IntArray, table_LGS: IntArray) -> IntArray:
        _, ranks, slots = table_LGS.shape
        weight_LE = torch.from_numpy(counts_TLE.sum(axis=0))
        found, _, _ = module.rebalance_experts(weight_LE, ranks * slots, None, 1, ranks, False)
        return np.asarray(found.numpy()).reshape(table_LGS.shape)

    return balance


def _deepseek_vec(module: Any) -> Balance:
    def balance(counts_TLE: IntArray, table_LGS: IntArray) -> IntArray:
        _, ranks, slots = table_LGS.shape
        found, _, _ = module.rebalance_experts(torch.from_numpy(counts_TLE), ranks * slots, slots, None, 1, False)
        return np.asarray(found.numpy()).reshape(table_LGS.shape).astype(np.int64)

    return balance


def on_first_copy(counts_TLE: IntArray, table_LGS: IntArray) -> IntArray:
    """[T, L, G, S] what the slots were sent: vllm-ascend adds it up by expert, so it may all be the first copy's."""
    layers = len(table_LGS)
    sent_TLP = np.zeros((len(counts_TLE), layers, table_LGS[0].size), np.int64)
    for layer, row in enumerate(table_LGS.reshape(layers, -1)):
        experts, slots = np.unique(row, return_index=True)
        sent_TLP[:, layer, slots] = counts_TLE[:, layer, experts]
    return sent_TLP.reshape(len(counts_TLE), *table_LGS.shape)


def _flashlb(policy: Any) -> Balance:
    def balance(counts_TLE: IntArray, table_LGS: IntArray) -> IntArray:
        ranks_serving(table_LGS.shape[1])
        _, _, found = policy.rebalance_experts(table_LGS, on_first_copy(counts_TLE, table_LGS))
        return np.array(found, np.int64)

    return balance


def _swift(policy: Any) -> Balance:
    def balance(counts_TLE: IntArray, table_LGS: IntArray) -> IntArray:
        sent_LGS = on_first_copy(counts_TLE.sum(axis=0, keepdims=True), table_LGS)[0]
        _, _, found = policy.rebalance_experts(torch.from_numpy(table_LGS), torch.from_numpy(sent_LGS))
        return np.array(found, np.int64)

    return balance


class Table:
    """Tables of experts, and the placements that they mean."""

    def __init__(self, traces: Traces, ranks: int, slots: int) -> None:
        self.traces, self.ranks, self.slots = traces, ranks, slots
        self.counts_TLE = traces.counts.astype(np.int64)
        experts, layers = traces.num_experts, traces.num_layers
        start_GS = (np.arange(ranks)[:, None] * (experts // ranks) + np.arange(slots)) % experts
        self.spread = np.tile(start_GS, (layers, 1, 1))
        """Contiguous, and in spare slots the next rank's first experts: how vllm-ascend starts."""
        alone_GS = np.where(np.arange(slots) < experts // ranks, start_GS, EMPTY)
        self.contiguous = self.placement(np.tile(alone_GS, (layers, 1, 1)))

    def placement(self, table_LGS: IntArray) -> Placement:
        """A second copy of an expert on a rank serves nobody and is left out."""
        table_LGS = table_LGS.copy()
        for held in table_LGS.reshape(-1, self.slots):
            _, first = np.unique(held, return_index=True)
            again = np.setdiff1d(np.arange(self.slots), first)
            held[again] = EMPTY
        return Placement(
            physical_to_logical=table_LGS.reshape(len(table_LGS), -1),
            slots_per_rank=np.full(self.ranks, self.slots),
            num_experts=self.traces.num_experts,
            layer_ids=list(self.traces.layer_ids),
        )

    def moves(self, placement: Placement) -> int:
        """Experts to move there from contiguous placement."""
        pairs = zip(self.contiguous.physical_to_logical, placement.physical_to_logical, strict=True)
        return sum(count_moves(before, after, placement.slots_per_rank) for before, after in pairs)
