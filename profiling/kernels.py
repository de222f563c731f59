"""The kernel that is measured: any callable `(hidden, topk_ids, topk_weights, w13, w2) -> out`.

N tokens, K experts per token, E experts of this rank, D hidden size, I intermediate size:
hidden [N, D], topk_ids [N, K] int32, topk_weights [N, K] float32, w13 [E, 2I, D] (gate above up), w2 [E, D, I].
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def load_kernel(name: str) -> Kernel:
    """The callable behind `module:callable`, or behind a short name: `vllm`, `sglang`, `per_expert`.

    Raises
    ------
    InputError
        When the module cannot be imported or holds no such callable.
    """
    short = {"vllm": "vllm_fused_experts", "sglang": "sglang_fused_moe", "per_expert": "per_expert"}
    if name in ("vllm", "sglang") and importlib.util.find_spec(name) is None:
        raise InputError("--kernel", name, f"{name} is not installed here", f"pip install {name}")
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
    for expert in sorted(set(topk_ids.flatten().tolist())):
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[rows] @ w13[expert].T).chunk(2, dim=-1)
        result = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        out.index_add_(0, rows, result * topk_weights[rows, slots, None].to(out.dtype))
    return out


def vllm_fused_experts(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """vLLM's Triton experts, unquantised (`vllm.model_executor.layers.fused_moe.fused_experts`, 0.33)."""
    out: Tensor = _vllm()(hidden, w13, w2, topk_weights=topk_weights, topk_ids=topk_ids)
    return out


@cache
def _vllm() -> Any:
    return importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts


def sglang_fused_moe(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """SGLang's Triton experts, unquantised (0.5.23); writes its result over `hidden`, as when it serves."""
    fused_moe, routing_type, config = _sglang()
    routing = routing_type(topk_weights, topk_ids, topk_weights)  # router logits are not read
    out: Tensor = fused_moe(hidden, w13, w2, routing, config)
    return out


@cache
def _sglang() -> tuple[Any, Any, Any]:
    """Entry point, routing type and configuration, after publishing the process-wide arguments that kernels read.

    SGLang's own kernel benchmarks publish dummy arguments in the same way.
    """
    arguments = importlib.import_module("sglang.srt.server_args")
    arguments.set_global_server_args_for_scheduler(arguments.ServerArgs(model_path="dummy"))
    kernels = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
    runner = importlib.import_module("sglang.srt.layers.moe.moe_runner")
    topk = importlib.import_module("sglang.srt.layers.moe.topk")
    return kernels.fused_moe, topk.StandardTopKOutput, runner.MoeRunnerConfig(inplace=True)
