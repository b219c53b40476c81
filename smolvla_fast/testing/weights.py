"""Random weights that behave like trained ones, and the dtypes of real checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..model.weights import is_cross

LAYOUTS = ("fp32", "mixed", "bf16_text", "bf16")


class SkipRandomFill(TorchFunctionMode):
    """Skips the constructors' random initialisation, which is slow and overwritten by ``fill_weights``."""

    # By name, since transformers replaces torch's functions while it constructs.
    fills = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.fills:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# Standard deviation of a matrix's entries times sqrt(inputs). With these, a query attends to about a third of its keys; the
# average over so many is small, and the output projections restore its size.
GAINS = {
    "q_proj": 1.6, "k_proj": 1.6, "v_proj": 1.2, "o_proj": 2.0, "out_proj": 2.0, "gate_proj": 1.3,
    "action_time_mlp_in": 1.5, "action_time_mlp_out": 2.0, "state_proj": 6.0,
}  # fmt: skip


@torch.no_grad()
def fill_weights(model: Any, seed: int) -> None:
    """Overwrites every parameter of a ``VLAFlowMatching`` (LeRobot's or ours) with seeded random values."""
    generator = torch.Generator().manual_seed(seed)
    width = model.vlm_with_expert.get_vlm_model().text_model.norm.weight.shape[0]
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2]
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
        if name.endswith("bias"):
            values *= 0.1
        elif values.ndim == 1:
            values = 1 + 0.2 * values
        elif owner in ("embed_tokens", "proj"):
            # SmolVLA multiplies the prefix by sqrt(width); a residual stream much larger than what the layers add would
            # hide their errors.
            inputs = 1 if owner == "embed_tokens" else values.shape[1]
            values *= 2.0 / math.sqrt(width * inputs)
        elif owner == "position_embedding":
            values *= 0.5
        else:
            values *= GAINS.get(owner, 1.0) / math.sqrt(values[0].numel())
        parameter.copy_(values)


def cast(policy: Any, layout: str) -> None:
    """Casts the parameters to the dtypes of a layout. Buffers keep theirs, as in LeRobot."""
    pair = policy.model.vlm_with_expert
    if layout == "fp32":
        return
    stays: set[int] = set()
    if layout != "bf16":
        for name, parameter in policy.model.named_parameters():
            if not name.startswith("vlm_with_expert."):
                stays.add(id(parameter))
        for index, layer in enumerate(pair.lm_expert.layers):
            if is_cross(pair, index):
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    stays.update(map(id, projection.parameters()))
    if layout == "bf16_text":
        vlm = pair.get_vlm_model()
        for module in (vlm.vision_model, vlm.connector, pair.vlm.lm_head):
            stays.update(map(id, module.parameters()))
    for parameter in policy.parameters():
        if id(parameter) not in stays:
            parameter.data = parameter.data.to(torch.bfloat16)
