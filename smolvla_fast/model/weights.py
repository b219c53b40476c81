"""A policy's parameters, gathered under the names the stages use.

Nothing is packed and nothing is kept: every field is the live parameter, in the ``[out, in]`` layout of ``nn.Linear``,
gathered anew for every chunk. So a loaded checkpoint, an optimizer step, an EMA swap (which moves no version counter) or
a replaced parameter is what the next chunk uses. A tier that wants another dtype than a matrix is stored in converts it
when its layer is reached: the vision and text layers one at a time, the expert once a chunk. Converting costs as much
memory traffic as proving that an old copy still holds would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .dims import Dims, PairDims


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    weight: Tensor
    eps: float


class LayerNorm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float


NormT = TypeVar("NormT", Norm, LayerNorm)
Cast = Callable[[Tensor], Any]
"""Gives a matrix in the dtype that a tier wants for its products: the matrix itself where it has it already. One with an
attribute ``group`` (``quantized_weights.IntegerCast``) gives what reads a norm together with a norm that suits it, and has
``plain`` for matrices that are to stay as wide as they were."""


@dataclass(frozen=True)
class VisionLayer:
    norm1: LayerNorm
    q: Affine
    k: Affine
    v: Affine
    out: Affine
    norm2: LayerNorm
    up: Affine
    down: Affine


@dataclass(frozen=True)
class DecoderLayer:
    """A text or an expert layer. ``cross``: its keys and values are projections of the prefix KV."""

    norm1: Norm
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm2: Norm
    gate: Tensor
    up: Tensor
    down: Tensor
    cross: bool


@dataclass(frozen=True)
class Heads:
    """The small projections around the layers, in the dtype they are stored in."""

    state: Affine
    action_in: Affine
    time_in: Affine
    time_out: Affine
    expert_norm: Norm
    action_out: Affine


def representative_weight(model: Any) -> Tensor:
    """The parameter whose dtype and device are taken for the model's: a text layer's, for those of heads may be wider. Where
    that layer is wrapped by something without a ``weight``, any of a floating dtype; the eligibility rules then decide."""
    pair = getattr(model, "vlm_with_expert", model)
    layer = pair.get_vlm_model().text_model.layers[0].self_attn.k_proj
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight
    found = [*(layer.parameters() if isinstance(layer, nn.Module) else ()), *model.parameters()]
    floats = [each for each in found if each.is_floating_point()]
    return next((each for each in floats if not each.is_meta), floats[0])


def _affine(module: Any, cast: Cast) -> Affine:
    return Affine(cast(module.weight), cast(module.bias))


def _layer_norm(module: Any) -> LayerNorm:
    return LayerNorm(module.weight, module.bias, module.eps)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _group(norm: NormT, readers: list[Tensor], cast: Cast) -> tuple[NormT, list[Any]]:
    """A norm and the matrices that read it."""
    group = getattr(cast, "group", None)
    return (norm, [cast(reader) for reader in readers]) if group is None else group(norm, readers)


def read_patch_embedding(vlm: Any, cast: Cast) -> tuple[Affine, Tensor]:
    """The patch convolution and the position table of the vision tower."""
    embeddings = vlm.vision_model.embeddings
    return _affine(embeddings.patch_embedding, cast), embeddings.position_embedding.weight


def read_vision_layers(vlm: Any, cast: Cast) -> Iterator[VisionLayer]:
    for layer in vlm.vision_model.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        norm1, weights = _group(_layer_norm(layer.layer_norm1), [each.weight for each in qkv], cast)
        q, k, v = (Affine(weight, cast(each.bias)) for weight, each in zip(weights, qkv, strict=True))
        norm2, (up,) = _group(_layer_norm(layer.layer_norm2), [mlp.fc1.weight], cast)
        yield VisionLayer(
            norm1=norm1,
            q=q,
            k=k,
            v=v,
            out=_affine(attention.out_proj, cast),
            norm2=norm2,
            up=Affine(up, cast(mlp.fc1.bias)),
            down=_affine(mlp.fc2, cast),
        )


def read_vision_end(vlm: Any, cast: Cast) -> tuple[LayerNorm, Tensor]:
    """The tower's last norm and the connector's projection."""
    plain = getattr(cast, "plain", cast)
    return _layer_norm(vlm.vision_model.post_layernorm), plain(vlm.connector.modality_projection.proj.weight)


def read_decoder_layer(layer: Any, cross: bool, cast: Cast, cast_cross: Cast) -> DecoderLayer:
    """layer  a decoder layer of transformers' Llama, or of ours      cast_cross  for k and v of a cross layer"""
    attention, mlp = layer.self_attn, layer.mlp
    kv = [attention.k_proj.weight, attention.v_proj.weight]
    norm1, (q, *own) = _group(
        _norm(layer.input_layernorm), [attention.q_proj.weight, *([] if cross else kv)], cast
    )
    k, v = [cast_cross(each) for each in kv] if cross else own
    norm2, (gate, up) = _group(
        _norm(layer.post_attention_layernorm), [mlp.gate_proj.weight, mlp.up_proj.weight], cast
    )
    return DecoderLayer(
        norm1=norm1,
        q=q,
        k=k,
        v=v,
        o=cast(attention.o_proj.weight),
        norm2=norm2,
        gate=gate,
        up=up,
        down=cast(mlp.down_proj.weight),
        cross=cross,
    )


def read_text_norms(vlm: Any) -> list[Norm]:
    """The norm at the start of each text layer."""
    return [_norm(layer.input_layernorm) for layer in vlm.text_model.layers]


def read_text_layers(vlm: Any, cast: Cast) -> Iterator[DecoderLayer]:
    for layer in vlm.text_model.layers:
        yield read_decoder_layer(layer, False, cast, cast)


def is_cross(pair: Any, layer: int) -> bool:
    """Whether this layer of the expert attends to the prefix KV alone (LeRobot's rule, on the live ``pair``)."""
    every = pair.self_attn_every_n_layers
    return "cross" in pair.attention_mode and not (every > 0 and layer % every == 0)


def keeps_kv_by_head(pair: Any) -> bool:
    """Whether the prefix KV of stock lies as [B, K, P, D] (transformers' cache, and ours) or as [B, P, K, D] (LeRobot before
    0.6, whose layers take ``fill_kv_cache``)."""
    cls: Any = type(pair)
    return "fill_kv_cache" not in getattr(cls, "stock_class", cls).forward_attn_layer.__code__.co_varnames


def read_expert_layers(pair: Any, cast: Cast, cast_cross: Cast) -> list[DecoderLayer]:
    """All layers of the expert: every denoise step goes through them again. ``cast_cross`` is for the cross K/V."""
    crosses = [is_cross(pair, i) for i in range(len(pair.lm_expert.layers))]
    return [
        read_decoder_layer(layer, cross, cast, cast_cross)
        for layer, cross in zip(pair.lm_expert.layers, crosses, strict=True)
    ]


def read_heads(model: Any) -> Heads:
    def live(module: Any) -> Affine:
        return Affine(module.weight, module.bias)

    return Heads(
        state=live(model.state_proj),
        action_in=live(model.action_in_proj),
        time_in=live(model.action_time_mlp_in),
        time_out=live(model.action_time_mlp_out),
        expert_norm=_norm(model.vlm_with_expert.lm_expert.norm),
        action_out=live(model.action_out_proj),
    )


HEADS = ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")


class Source(NamedTuple):
    """A module whose parameters are read in place of calling it.

    kind    its class: None for an RMSNorm, whose class is the library's
    weight  the shape of its weight; None in it: any size      bias  the shape of its bias, or None where it has none
    """

    name: str
    module: Any
    kind: type | None
    weight: tuple[int | None, ...]
    bias: tuple[int, ...] | None = None


def _linear(name: str, module: Any, inputs: int, outputs: int, bias: bool = False) -> Source:
    return Source(name, module, nn.Linear, (outputs, inputs), (outputs,) if bias else None)


def frozen_sources(vlm: Any, dims: PairDims) -> Iterator[Source]:
    """What ``read_patch_embedding``, ``read_vision_layers``, ``read_vision_end`` and ``read_text_layers`` read."""
    tower, side = vlm.vision_model, dims.patch
    width, hidden = tower.post_layernorm.weight.shape[0], tower.encoder.layers[0].mlp.fc1.weight.shape[0]

    def norm(name: str, module: Any) -> Source:
        return Source(f"vision_model.{name}", module, nn.LayerNorm, (width,), (width,))

    embeddings = tower.embeddings
    path = "vision_model.embeddings."
    yield Source(
        f"{path}patch_embedding", embeddings.patch_embedding, nn.Conv2d, (width, 3, side, side), (width,)
    )
    yield Source(f"{path}position_embedding", embeddings.position_embedding, nn.Embedding, (None, width))
    for i, layer in enumerate(tower.encoder.layers):
        path = f"encoder.layers.{i}."
        for each in ("q_proj", "k_proj", "v_proj", "out_proj"):
            module = getattr(layer.self_attn, each)
            yield _linear(f"vision_model.{path}self_attn.{each}", module, width, width, bias=True)
        yield _linear(f"vision_model.{path}mlp.fc1", layer.mlp.fc1, width, hidden, bias=True)
        yield _linear(f"vision_model.{path}mlp.fc2", layer.mlp.fc2, hidden, width, bias=True)
        yield norm(f"{path}layer_norm1", layer.layer_norm1)
        yield norm(f"{path}layer_norm2", layer.layer_norm2)
    yield norm("post_layernorm", tower.post_layernorm)
    projection = vlm.connector.modality_projection.proj
    yield _linear("connector.modality_projection.proj", projection, width * dims.shuffle**2, dims.text_width)
    table = vlm.text_model.get_input_embeddings()
    yield Source("text_model.embed_tokens", table, nn.Embedding, (None, dims.text_width))
    for i, layer in enumerate(vlm.text_model.layers):
        yield from _decoder_sources(f"text_model.layers.{i}", layer, dims, dims.text_width, cross=False)


def pair_sources(pair: Any, dims: PairDims) -> Iterator[Source]:
    """``frozen_sources``, and what ``read_expert_layers`` reads."""
    expert = dims.expert_width
    yield from frozen_sources(pair.get_vlm_model(), dims)
    for i, layer in enumerate(pair.lm_expert.layers):
        yield from _decoder_sources(f"lm_expert.layers.{i}", layer, dims, expert, is_cross(pair, i))
    yield Source("lm_expert.norm", pair.lm_expert.norm, None, (expert,))


def head_sources(model: Any, dims: Dims) -> Iterator[Source]:
    """What ``read_heads`` reads beside the expert's norm."""
    expert = dims.expert_width
    state, action = (dims.state_width, dims.text_width), (dims.action_width, expert)
    widths = (state, action, (2 * expert, expert), (expert, expert), action[::-1])
    for name, (inputs, outputs) in zip(HEADS, widths, strict=True):
        yield _linear(name, getattr(model, name), inputs, outputs, bias=True)


def _decoder_sources(path: str, layer: Any, dims: PairDims, width: int, cross: bool) -> Iterator[Source]:
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys = dims.query_heads * dims.head_dim, dims.kv_heads * dims.head_dim
    yield Source(f"{path}.input_layernorm", layer.input_layernorm, None, (width,))
    yield _linear(f"{path}.self_attn.q_proj", attention.q_proj, width, queries)
    for each in ("k_proj", "v_proj"):
        yield _linear(f"{path}.self_attn.{each}", getattr(attention, each), keys if cross else width, keys)
    yield _linear(f"{path}.self_attn.o_proj", attention.o_proj, queries, width)
    yield Source(f"{path}.post_attention_layernorm", layer.post_attention_layernorm, None, (width,))
    hidden = mlp.gate_proj.weight.shape[0]
    yield _linear(f"{path}.mlp.gate_proj", mlp.gate_proj, width, hidden)
    yield _linear(f"{path}.mlp.up_proj", mlp.up_proj, width, hidden)
    yield _linear(f"{path}.mlp.down_proj", mlp.down_proj, hidden, width)
