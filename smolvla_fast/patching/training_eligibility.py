"""May the fast path compute this training loss? As ``guard`` asks for a chunk: None for yes, or why stock runs instead.

Training asks for less than a chunk does, for what is differentiated runs through the live modules: adapters, biases and
whatever a module computes are its own affair. What is frozen is computed by the engine's ops where ``frozen_reason``
allows it, and by the live modules too where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

from ..model.dense import memory_reason
from ..model.dims import read_dims
from ..model.precision import Tier
from ..model.weights import frozen_sources
from .eligibility import DTYPES, head_reason, hook_reason, parts_reason, probe
from .source_digests import LOSS_METHODS, PAIR_METHODS, unknown_source


def model_reason(model: Any, tier: Tier) -> str | None:
    """Why no loss of this model in this tier is computed by the fast path, or None. Reads structure and source only."""
    try:
        return (
            memory_reason(model)
            or _tier_reason(model, tier)
            or _source_reason(model)
            or _structure_reason(model)
            or _hooks(model)
        )
    except Exception as error:  # whatever a foreign structure raises here, stock may well run it
        return f"the structure is not SmolVLA's: {error!r}"


def _tier_reason(model: Any, tier: Tier) -> str | None:
    if tier.stock_order or tier.quantized:
        return f"precision={tier.name!r} has no training path; accepted are 'auto', 'fp32' and 'bf16'"
    if tier.gemm_dtype is torch.float32:
        for name, parameter in model.named_parameters():
            if parameter.dtype is not torch.float32:
                return (
                    f"precision='fp32' and {name} is {parameter.dtype}: training multiplies in the dtype that "
                    "weights are stored in; accepted is 'auto'"
                )
    return None


def _source_reason(model: Any) -> str | None:
    pair = model.vlm_with_expert
    for owner, names in ((model, LOSS_METHODS), (pair, PAIR_METHODS)):
        replaced = [name for name in names if name in owner.__dict__]
        if replaced:
            return (
                f"{type(owner).__name__}.{replaced[0]} is replaced on the instance (torch.compile does this)"
            )
    return unknown_source(model, methods=LOSS_METHODS)


def _structure_reason(model: Any) -> str | None:
    pair = model.vlm_with_expert
    text, expert = pair.get_vlm_model().text_model.layers, pair.lm_expert.layers
    if len(text) != len(expert):
        return f"{len(expert)} expert layers beside {len(text)} text layers"
    if pair.num_attention_heads % pair.num_key_value_heads:
        return (
            f"{pair.num_attention_heads} query heads are no multiple of {pair.num_key_value_heads} KV heads"
        )
    device = model.action_in_proj.weight.device
    for name, parameter in model.named_parameters():
        if parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}; accepted are float32 and bfloat16"
        if parameter.device != device:
            return f"{name} is on {parameter.device} but action_in_proj on {device}"
    return head_reason(model)


def _hooks(model: Any) -> str | None:
    for name, module in model.named_modules():
        if is_parametrized(module):
            return f"{name} is parametrized: its weight is computed as often as it is read, by stock in another order"
        if module.training and _drops(module):
            return f"{name} drops at random: the fast path would draw in another order than stock"
    return hook_reason(model) or backward_hook_reason(model)


def backward_hook_reason(model: Any) -> str | None:
    """Which module has a backward hook, or None."""
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "a global backward hook is registered; it would not see the fused path"
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"a {type(module).__qualname__} has a backward hook; it would not see the fused path"
    return None


def _drops(module: Any) -> bool:
    """Whether a module in train mode draws random numbers: a dropout layer, or SigLIP's attention."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Llama's attention has the setting too, but LeRobot does not call it.
    vision = hasattr(module, "out_proj") and hasattr(module, "q_proj")
    dropout = getattr(module, "dropout", 0.0)
    return vision and isinstance(dropout, float) and dropout > 0


def frozen_reason(model: Any) -> str | None:
    """Why the engine's ops cannot compute vision tower and text layers where these are frozen, or None."""
    try:
        vlm = model.vlm_with_expert.get_vlm_model()
        read = frozen_sources(vlm, read_dims(model))
        reason = parts_reason(vlm, read, (("text", vlm.text_model.layers),))
        return reason or probe(model, exact=False, frozen_only=True)
    except Exception as error:
        return f"the structure is not SmolVLA's: {error!r}"


def size_reason(model: Any) -> str | None:
    """Why frames of the size that the configuration announces are stock's affair, or None.

    What a batch brings is for ``call_reason`` to judge; this says it before the first one.
    """
    config = model.config
    side = model.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
    if config.resize_imgs_with_padding is not None:
        width, height = config.resize_imgs_with_padding
        if (height, width) != (side, side):
            return f"resize_imgs_with_padding={(width, height)}; accepted is {(side, side)}, what the vision tower is for"
        return None
    for name, feature in (config.image_features or {}).items():
        height, width = feature.shape[-2:]
        if (height, width) != (side, side) and "empty_camera" not in name:  # those get the size of the others
            return (
                f"{name} is {height} x {width} and resize_imgs_with_padding is None; accepted are frames of {side} x "
                f"{side}, what the vision tower is for"
            )
    return None


def call_reason(
    model: Any,
    images: Sequence[Tensor],
    image_masks: Sequence[Tensor],
    tokens: Tensor,
    token_masks: Tensor,
    state: Tensor,
    actions: Tensor,
    noise: Tensor | None,
    time: Tensor | None,
) -> str | None:
    """Why this batch is outside the fast path's range, or None. What stock would refuse is left to stock as well."""
    device, batch, config = state.device, actions.shape[0], model.config
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) is not torch.bfloat16:
        return f"autocast is on in {torch.get_autocast_dtype(device.type)}; accepted is bfloat16"
    side = model.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
    if not images or len(images) != len(image_masks):
        return f"{len(images)} images with {len(image_masks)} masks"
    for image, mask in zip(images, image_masks, strict=True):
        if tuple(image.shape) != (batch, 3, side, side) or not image.is_floating_point():
            return f"images {tuple(image.shape)} {image.dtype}; accepted are {(batch, 3, side, side)}, floats"
        if mask.dtype is not torch.bool or tuple(mask.shape) != (batch,):
            return f"image masks {tuple(mask.shape)} {mask.dtype}; accepted are ({batch},), bool"
    if tokens.ndim != 2 or tokens.shape != token_masks.shape or token_masks.dtype is not torch.bool:
        return "tokens or masks of another rank or dtype than stock's usual ones"
    constants = (*images, actions, *(each for each in (noise, time) if each is not None))
    if torch.is_grad_enabled() and any(each.requires_grad for each in constants):
        return "images, actions, noise or time require a gradient; the fast path takes them for constants"
    width = (batch, config.chunk_size, model.action_in_proj.weight.shape[1])
    given = {"actions": (actions, width), "noise": (noise, width), "time": (time, (batch,))}
    given["state"] = (state, (batch, model.state_proj.weight.shape[1]))
    for name, (tensor, shape) in given.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype is not torch.float32):
            return f"{name} {tuple(tensor.shape)} {tensor.dtype}; accepted is {shape} float32"
    return None
