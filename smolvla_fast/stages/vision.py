"""Stage 2: images -> image tokens, through the SigLIP tower and the connector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.dims import Dims
from ..model.weights import Cast, VisionLayer, read_patch_embedding, read_vision_end, read_vision_layers
from ..ops.memory import Memory
from ..ops.reference.quantize import operand_dtype
from ..ops.stream_offset import StreamOffset
from ..ops.table import Ops
from .layers import given


def encode_images(ops: Ops, vlm: Any, cast: Cast, dims: Dims, images: Tensor, position_ids: Tensor) -> Tensor:
    """Image tokens of every image.

    images        [n, 3, side, side] in [-1, 1]
    position_ids  [1, patches]  which row of the position table each patch takes
    returns       [n, tokens, M]
    replaces      ``embed_image`` of LeRobot's ``SmolVLMWithExpertModel``
    """
    _, connector = read_vision_end(vlm, cast)
    patches = encode_patches(ops, vlm, cast, dims, images, position_ids)
    return ops.pixel_shuffle_linear(patches, connector, dims.shuffle)


def encode_patches(
    ops: Ops, vlm: Any, cast: Cast, dims: Dims, images: Tensor, position_ids: Tensor
) -> Tensor:
    """The tower without the connector: [n, 3, side, side] -> [n, patches, W] in the dtype the connector multiplies in."""
    patch, position = read_patch_embedding(vlm, cast)
    x = ops.patch_embed(images, *patch, position, position_ids)
    offset = StreamOffset() if ops.prepares_norms else None
    # Results of several MiB each, which the system would hand out page by page in every layer.
    memory = Memory() if ops.backend == "cpu" else None
    for layer in read_vision_layers(vlm, cast):
        x = vision_layer(ops, layer, x, dims.vision_heads, offset, memory)
    norm, connector = read_vision_end(vlm, cast)
    return ops.layer_norm(x, *norm, connector.dtype, **given(offset=offset))


def vision_layer(
    ops: Ops,
    layer: VisionLayer,
    x: Tensor,
    heads: int,
    offset: StreamOffset | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """One SigLIP layer: x [n, T, W] -> [n, T, W]; attention and MLP, each behind a norm and added to x.

    offset  of x, and afterwards of the result; x may then be overwritten
    memory  the result is there until the next call
    """

    def beside(place: str, offset: StreamOffset | None = None) -> dict[str, Any]:
        return given(offset=offset, memory=memory and memory.part(place))

    h = ops.layer_norm(x, *layer.norm1, operand_dtype(layer.q.weight), **beside("norm", offset))
    affines = {"q": layer.q, "k": layer.k, "v": layer.v}
    q, k, v = (ops.linear(h, *affine, **beside(name)) for name, affine in affines.items())
    h = ops.attention(q, k, v, heads, **beside("attention"))
    x = ops.linear(h, *layer.out, residual=x, **beside("out", offset))
    h = ops.layer_norm(x, *layer.norm2, operand_dtype(layer.up.weight), **beside("norm", offset))
    h = ops.linear(h, *layer.up, activation="gelu_tanh", **beside("up"))
    return ops.linear(h, *layer.down, residual=x, **beside("down", offset))


class _IndicesOfEmbedding(TorchDispatchMode):
    """Notes the indices of every embedding look-up made inside it, in this thread alone."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.indices.append(args[1])
        return func(*args, **(kwargs or {}))


def patch_positions(vlm: Any, images: Tensor) -> Tensor:
    """Which row of the position table each patch takes: [1, patches], observed in a run of the live module.

    Never a constant: transformers 4.57 with fp32 weights gives other ids than with bf16 weights or in 5.x.
    """
    embeddings = vlm.vision_model.embeddings
    height, width = images.shape[-2:]
    pixels = torch.zeros(
        1, 3, height, width, dtype=embeddings.patch_embedding.weight.dtype, device=images.device
    )
    patches = (1, height // embeddings.patch_size, width // embeddings.patch_size)
    with torch.no_grad(), _IndicesOfEmbedding() as seen:
        embeddings(
            pixel_values=pixels,
            patch_attention_mask=torch.ones(patches, dtype=torch.bool, device=images.device),
        )
    return seen.indices[-1]


Positions = dict[tuple[int, torch.dtype, torch.device], Tensor]
"""``patch_positions`` by the size of images, the dtype of the patch embedding and the device."""


def kept_patch_positions(known: Positions, vlm: Any, images: Tensor) -> Tensor:
    """``patch_positions``, observed once for a key; the first stays where threads race: a captured graph may read it."""
    key = (images.shape[-1], vlm.vision_model.embeddings.patch_embedding.weight.dtype, images.device)
    return known[key] if key in known else known.setdefault(key, patch_positions(vlm, images))
