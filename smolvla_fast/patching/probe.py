"""What a transformers version computes inside a layer is not guessed from its number: the live modules run beside the
references on small inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..model.dims import read_pair_dims
from ..model.weights import frozen_sources, read_patch_embedding, read_vision_layers
from ..ops.memory import is_out_of_memory
from ..ops.reference.layer_norm import layer_norm
from ..ops.reference.linear import linear
from ..ops.reference.norm_swiglu import norm_swiglu
from ..ops.reference.patch_embed import patch_embed
from ..ops.reference.pixel_shuffle_linear import pixel_shuffle_linear
from ..ops.reference.rms_norm import rms_norm
from ..ops.select import reference_ops
from ..stages.vision import patch_positions, vision_layer
from .model_rules import code_of, parts_reason


def probe(pair: Any, exact: bool, frozen_only: bool = False) -> str | None:
    """Run the live vision, text and expert modules beside the references on small inputs; None if they agree.

    raises what says that memory is short: another probe may find it

    exact  the ``exact`` tier: bits must be equal. Else a relative difference up to 1e-2 passes: a transformers release
           that reorders roundings stays far below (bf16 rounds at 4e-3), one that computes something else far above.
    frozen_only  leave the expert out: training calls its modules
    """
    try:
        return _probe(pair, exact, frozen_only)
    except Exception as error:  # whatever a foreign module raises on a plain input, stock may well run it
        if is_out_of_memory(error):
            raise
        return f"the modules are not SmolVLA's: {error!r}"


def _probe(pair: Any, exact: bool, frozen_only: bool) -> str | None:
    vlm = pair.get_vlm_model()
    # A dropout layer in train mode would draw: the caller's random state does not move.
    with torch.no_grad(), _random_state_of({each.device for each in pair.parameters()}):
        for name, live, ours in (
            *_probe_vision(vlm),
            *_probe_decoder(vlm.text_model),
            *(() if frozen_only else _probe_decoder(pair.lm_expert)),
        ):
            if exact and not torch.equal(live, ours) and not (live.isnan().any() and ours.isnan().any()):
                return f"{name} of this transformers version rounds otherwise than the reference"
            # On the CPU: not every device has fp64.
            live, ours = live.cpu().double(), ours.cpu().double()
            # Not a number, or infinite, in the same places: weights that make it so in stock make it so here.
            same = (live == ours) | (live.isnan() & ours.isnan())
            difference = (live - ours).masked_fill(same, 0).norm()
            if not difference <= 1e-2 * live[live.isfinite()].norm():
                return f"{name} of this transformers version computes something else than the reference"
    return None


@contextmanager
def _random_state_of(devices: set[torch.device]) -> Iterator[None]:
    """Put back at the end: the CPU's, and that of each device whose module in torch has one."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for device in devices:
            if hasattr(getattr(torch, device.type, None), "set_rng_state"):
                indices = [0 if device.index is None else device.index]
                stack.enter_context(torch.random.fork_rng(indices, device_type=device.type))
        yield


def frozen_reason(pair: Any) -> str | None:
    """Why the engine's ops cannot compute vision tower and text layers where these are frozen, or None."""
    try:
        vlm = pair.get_vlm_model()
        read = frozen_sources(vlm, read_pair_dims(pair))
        reason = parts_reason(vlm, read, (("text", vlm.text_model.layers),))
    except Exception as error:
        return f"the structure is not SmolVLA's: {error!r}"
    return reason or probe(pair, exact=False, frozen_only=True)


def probed_code(pair: Any) -> tuple[Any, ...]:
    """What ``probe`` has run: a replaced class, a patched ``forward`` or another setting asks for another run."""
    vlm = pair.get_vlm_model()
    stacks = (vlm.vision_model.encoder, vlm.text_model, pair.lm_expert)
    return (
        *(code_of(stack.layers[0]) for stack in stacks),
        code_of(vlm.vision_model.embeddings),
        code_of(vlm.connector),
    )


def _ramp(*shape: int, like: Tensor) -> Tensor:
    """Deterministic values in [-1, 1] that move no random state."""
    return (
        torch.arange(torch.Size(shape).numel(), device=like.device).mul(0.7).sin().view(shape).to(like.dtype)
    )


def _probe_vision(vlm: Any) -> Iterable[tuple[str, Tensor, Tensor]]:
    tower, connector = vlm.vision_model, vlm.connector
    patch, position = read_patch_embedding(vlm, lambda x: x)
    side = tower.embeddings.image_size
    pixels = _ramp(1, 3, side, side, like=patch.weight)
    patches = torch.ones(
        1, *(2 * [side // tower.embeddings.patch_size]), dtype=torch.bool, device=pixels.device
    )
    live = tower.embeddings(pixel_values=pixels, patch_attention_mask=patches)
    yield "the patch embedding", live, patch_embed(pixels, *patch, position, patch_positions(vlm, pixels))

    module, layer = tower.encoder.layers[0], next(iter(read_vision_layers(vlm, lambda x: x)))
    x = _ramp(1, 9, position.shape[1], like=patch.weight)
    live = module(x, None)
    ours = vision_layer(reference_ops(), layer, x, module.self_attn.num_heads)
    yield "the vision layer", live[0] if isinstance(live, tuple) else live, ours
    norm = tower.post_layernorm
    yield "the vision norm", norm(x), layer_norm(x, norm.weight, norm.bias, norm.eps)

    factor = connector.scale_factor
    projection = connector.modality_projection.proj.weight
    x = _ramp(1, (2 * factor) ** 2, position.shape[1], like=projection)
    yield "the connector", connector(x), pixel_shuffle_linear(x, projection, factor)


def _probe_decoder(stack: Any) -> Iterable[tuple[str, Tensor, Tensor]]:
    layer = stack.layers[0]
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    x = _ramp(1, 3, norm.weight.shape[0], like=mlp.gate_proj.weight)
    yield "the decoder norm", norm(x), rms_norm(x, norm.weight, norm.variance_epsilon)
    h = norm_swiglu(x, (norm.weight, norm.variance_epsilon), mlp.gate_proj.weight, mlp.up_proj.weight)
    yield "the decoder MLP", mlp(norm(x)), linear(h, mlp.down_proj.weight)
