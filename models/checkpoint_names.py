"""What renumbering the experts of a network means for a tensor of its checkpoint, by the tensor's name.

Quantised checkpoints keep companions beside a weight: scales, zero points, packed words. The names here are those of
FP8 block scales, compressed-tensors, NVFP4 (modelopt), MXFP4, GPTQ, AWQ, bitsandbytes and MLX. What no rule knows has
the role `unknown`; whether it matters is for its shape to say (`gemopt.executor.following`). Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gemopt.models.families import Family

# Companion of a router's weight -> axes that can be of experts. The outputs of a linear layer are on axis 0 of its
# weight and of what belongs to it, but GPTQ and AWQ store the transpose; `scales` alone does not say which it is.
ROUTER_COMPANIONS: Mapping[str, tuple[int, ...]] = {
    "weight": (0,),
    "weight_packed": (0,),
    "weight_scale": (0,),
    "weight_scale_inv": (0,),
    "weight_zero_point": (0,),
    "bias": (0,),
    "SCB": (0,),
    "weight.SCB": (0,),
    "biases": (0,),
    "qweight": (1,),
    "qzeros": (1,),
    "scales": (0, 1),
    "e_score_correction_bias": (0, 1),
}
PACKED = {"weight_packed", "weight_zero_point", "qweight", "qzeros"}  # a word may hold several experts
WEIGHTS = {"weight", "weight_packed", "qweight"}
# Companions that say nothing about outputs: groups of inputs, shapes, code books, formats.
INDEPENDENT = {"g_idx", "weight_g_idx", "weight_shape", "weight_format", "weight.weight_format"}
_PROJECTION = r"(?:gate_up_proj|gate_proj|up_proj|down_proj|w13|w[123])"
_STACKED_COMPANION = (
    r"(?:weight|bias|blocks|scales?|scale_inv|zero_points?|weight_scale|weight_scale_inv|weight_packed|"
    r"weight_zero_point|weight_scale_2|input_scale|qweight|qzeros)"
)
_STACKED = re.compile(rf"{_PROJECTION}(?:[._]{_STACKED_COMPANION})?")
_SINGLE = re.compile(r"(?:[A-Za-z_]\w*\.)?(\d+)\.(.*)")
_PREDICTION = re.compile(r"(?:^|\.)\w*(?:mtp|nextn|eagle)\w*\.")
_TOWER = re.compile(r"(?:^|\.)(?:vision|visual|audio)\w*\.")
_ABOUT_EXPERTS = re.compile(r"expert|rout(?:er|ing)|e_score|tid2eid|moe")
_SHARED = re.compile(r"shared?_(?:expert|mlp|head)\w*")
_MIXERS = re.compile(
    r"attn|attention|norm|mixer|mamba|conv|rotary"
)  # parts of a layer that have nothing to do with experts
_ROUTING = re.compile(r"rout|correction|gate|top_?k")


@dataclass(frozen=True)
class TensorRole:
    """What renumbering the experts of a layer means for one checkpoint tensor.

    `router`, `stacked`: index one of `axes` (a router may have more rows than experts: the rest stays).
    `expert`: all of this tensor belongs to `expert`, so it gets a new name (`renamed`).
    `hash`: the values are expert ids.
    `unknown`: beside the router or the experts, of no known meaning.
    `outside`: in the layer but not beside them, of no known meaning.

    Attributes
    ----------
    layer
        As the file counts; -1 for an unknown tensor outside the layers.
    axes
        Axes that can be of experts, by the name alone.
    module
        Of a router, stacked or single-expert tensor: what it is a part of, `gate` or `down_proj`.
    companion
        Its name in that module.
    stack
        What stands before `layers.N`: which stack of layers of a network of several parts.
    """

    kind: Literal["router", "stacked", "expert", "hash", "unknown", "outside"]
    layer: int
    axes: tuple[int, ...] = (0,)
    expert: int = -1
    module: str = ""
    companion: str = ""
    stack: str = ""

    @property
    def is_weight(self) -> bool:
        """Whether this is the weight itself and no companion of it."""
        return self.companion in WEIGHTS


def tensor_role(family: Family, name: str) -> TensorRole | None:
    """Role of a checkpoint tensor, None where experts have no part (attention, dense and shared layers, ...).

    `layer` counts as the file does. Layers that predict further tokens stay as they are, so their tensors have no role:
    they are named `mtp`, or come after the last decoder layer. So do towers for images and sound.
    """
    if _PREDICTION.search(name) or of_tower(name):
        return None
    blocks = [rf"{block}\." for block in family.checkpoint_blocks] or [rf"(?={family.router}\.|experts\.)"]
    place = re.fullmatch(rf"((?:.+\.)?)layers\.(\d+)\.(?:{'|'.join(blocks)})(.+)", name)
    if place is None:
        return _elsewhere(name)
    stack, layer, rest = place[1], int(place[2]), place[3]
    if _SHARED.match(rest):
        return None
    if rest in family.hash_tensors:
        return TensorRole("hash", layer, stack=stack)
    if rest in family.checkpoint_tensors:
        module, _, companion = rest.rpartition(".")
        return TensorRole(
            "router", layer, (family.checkpoint_tensors[rest],), module=module, companion=companion, stack=stack
        )
    for module in family.checkpoint_experts:
        companion = rest.removeprefix(f"{module}.")
        if re.fullmatch(_STACKED_COMPANION, companion):
            return TensorRole("stacked", layer, module=module, companion=companion, stack=stack)
    if rest.startswith("experts."):
        return _of_experts(rest.removeprefix("experts."), layer, stack)
    return _of_router(family, rest, layer, stack)


def of_tower(name: str) -> bool:
    """Whether a module or tensor is of a tower for images or sound, whose experts are not those of the decoder."""
    return _TOWER.search(name.partition("layers.")[0]) is not None


def _elsewhere(name: str) -> TensorRole | None:
    """A tensor outside the MoE blocks that has something to do with experts, by its name or perhaps its shape."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    own = _SHARED.sub("", name[layer.end() :] if layer else name)  # what stands before is of the network
    if _ABOUT_EXPERTS.search(own):
        return TensorRole("unknown", int(layer[1]) if layer else -1)
    if not _MIXERS.search(own) and (layer or _ROUTING.search(own)):
        return TensorRole("outside", int(layer[1]) if layer else -1)
    return None


def _of_experts(rest: str, layer: int, stack: str) -> TensorRole:
    # Either form occurs in every family: files of some publishers stack the experts or take them apart.
    if single := _SINGLE.fullmatch(rest):
        module = rest[: single.start(1)] + single[2].partition(".")[0]
        return TensorRole("expert", layer, expert=int(single[1]), module=module, companion=single[2], stack=stack)
    if _STACKED.fullmatch(rest):
        bare = re.fullmatch(rf"{_PROJECTION}(?:[._](?:weight|weight_packed|blocks|qweight))?", rest)
        return TensorRole("stacked", layer, companion="weight" if bare else rest, module=rest, stack=stack)
    return TensorRole("unknown", layer, stack=stack)


def _of_router(family: Family, rest: str, layer: int, stack: str) -> TensorRole | None:
    routers = [known.removesuffix(".weight") for known in family.checkpoint_tensors if known.endswith(".weight")]
    for module in routers:
        companion = rest.removeprefix(f"{module}.")
        if companion in INDEPENDENT and companion != rest:
            return None
        if companion in ROUTER_COMPANIONS and companion != rest:
            axes = ROUTER_COMPANIONS[companion]
            return TensorRole("router", layer, axes, module=module, companion=companion, stack=stack)
    if rest.rpartition(".")[2] == "e_score_correction_bias":
        return TensorRole("router", layer, (0, 1), companion="e_score_correction_bias", stack=stack)
    return TensorRole("unknown", layer, stack=stack)


def renamed(name: str, expert: int) -> str:
    """Name of a per-expert checkpoint tensor when it becomes that of `expert`."""
    found = re.fullmatch(r"(.*\.experts\.(?:[A-Za-z_]\w*\.)?)\d+(\..*)", name)
    assert found is not None, f"{name} is not the name of a tensor of one expert"
    return f"{found[1]}{expert}{found[2]}"
