"""The kernel that is measured: any callable `(hidden, topk_ids, topk_weights, w13, w2) -> out`.

N tokens, K experts per token, E experts of this rank, D hidden size, I intermediate size:
hidden [N, D], topk_ids [N, K] int32, topk_weights [N, K] float32, w13 [E, 2I, D] (gate above up), w2 [E, D, I].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gemopt.exceptions import InputError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def load_kernel(name: str) -> Kernel:
    """The callable behind `module:callable`, or behind a short name: `vllm`, `sglang`, `per_expert`.

    Raises
    ------
    InputError
        When the module cannot be imported or holds no such callable.
    """
    short = {"vllm": "vllm_fused_experts", "sglang": "sglang_fused_moe", "per_expert": "per_expert"}
    module_name, _, attribute = (f"{__name__}:{short[name]}" if name in short else name).partition(":")
    if not attribute:
        raise InputError("--kernel", name, f"module:callable, or one of {', '.join(short)}")
    try:
        kernel = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InputError("--kernel", name, f"an importable module ({error})") from None
    except AttributeError:
        raise InputError("--kernel", name, f"a callable of module {module_name}") from None
    if not callable(kernel):
        raise InputError("--kernel", name, f"a callable, {attribute} is a {type(kernel).__name__}")
    return kernel  # type: ignore[no-any-return]


def per_expert(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Plain torch: gather the rows of each active expert, two matrix products with SiLU gating, scatter back."""
    out = torch.zeros_like(hidden)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[rows] @ w13[expert].T).chunk(2, dim=-1)
        result = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        out.index_add_(0, rows, result * topk_weights[rows, slots, None].to(out.dtype))
    return out


def vllm_fused_experts(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """vLLM's Triton experts, unquantised (`vllm.model_executor.layers.fused_moe.fused_experts`, 0.33)."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    return fused_experts(hidden, w13, w2, topk_weights=topk_weights, topk_ids=topk_ids)  # type: ignore[no-any-return]


@cache
def _publish_sglang_arguments() -> None:
    """SGLang's kernels read process-wide server arguments; its own kernel benchmarks publish dummy ones like this."""
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))


def sglang_fused_moe(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """SGLang's Triton experts, unquantised (0.5.23); writes its result over `hidden`, as when it serves."""
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_moe
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    _publish_sglang_arguments()
    routing = StandardTopKOutput(topk_weights, topk_ids, topk_weights)  # router logits are not read
    return fused_moe(hidden, w13, w2, routing, MoeRunnerConfig(inplace=True))  # type: ignore[no-any-return]
