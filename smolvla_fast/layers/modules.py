"""Whole decoder layers as modules over the weights of a live one."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import layers as with_grad
from ..model.kv_cache import LayerKV
from ..model.weights import DecoderLayer, read_decoder_layer
from ..ops.reference.rope import rope_tables
from ..ops.reference.suffix_tokens import Tokens
from ..ops.select import check_name, select
from ..stages.layers import decoder_layer

PARTS = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.head_dim",
    *(f"self_attn.{each}_proj.weight" for each in "qkvo"), *(f"mlp.{each}_proj.weight" for each in ("gate", "up", "down")),
)  # fmt: skip
"""What is read of a layer."""


class _Layer(nn.Module):
    """layer    a decoder layer of transformers' Llama or of ours: RMSNorm, projections, SwiGLU MLP. Its
             weights are read at every call and are parameters of this module
    backend  as of ``patch``

    Products run in the dtype of each weight; the residual stream, norms, scores and softmax are fp32. The layer's
    own modules are called, over one fused attention, where gradients are on and something learns, under autocast, and where
    one has a hook, a bias or an adapter.

    raises  TypeError for what is no such layer; ValueError for one of the other kind of attention, or an unknown backend
    """

    cross: bool
    layer: Any

    def __init__(self, layer: nn.Module, backend: str = "auto") -> None:
        name = type(self).__name__
        try:
            attrgetter(*PARTS)(layer)
        except AttributeError as error:
            raise TypeError(
                f"{name} takes a decoder layer as transformers' Llama and SmolVLA's expert have; got a "
                f"{type(layer).__qualname__} ({error})"
            ) from None
        super().__init__()
        self.layer, self.backend = layer, backend
        q, k = (each.weight.shape for each in (self.layer.self_attn.q_proj, self.layer.self_attn.k_proj))
        if k[1] != (k[0] if self.cross else q[1]):
            other, reads = ("Self", "the tokens") if self.cross else ("Cross", "a prefix's keys")
            raise ValueError(
                f"{name}: k_proj of this layer is {tuple(k)} and reads {reads}; give it to {other}AttentionLayer"
            )
        check_name(backend)

    def _read(self) -> DecoderLayer:
        same = lambda matrix: matrix  # noqa: E731
        return read_decoder_layer(self.layer, self.cross, same, same)

    def _ops(self, x: Tensor) -> Any:
        return select(self.backend, x.device, stock_order=False)

    def _head_dim(self) -> int:
        head_dim = self.layer.self_attn.head_dim
        assert isinstance(head_dim, int)
        return head_dim

    def _check(self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor, own: int) -> None:
        attention, head_dim = self.layer.self_attn, self._head_dim()
        width, heads = attention.q_proj.weight.shape[1], attention.k_proj.weight.shape[0] // head_dim
        if x.ndim != 3 or k.ndim != 4:
            raise ValueError(
                f"x is {tuple(x.shape)}, k {tuple(k.shape)}; accepted are [B, T, M] and [B, P, K, D]"
            )
        batch, tokens = x.shape[:2]
        for name, each, shape in (
            ("x", x, (batch, tokens, width)),
            ("k", k, (batch, k.shape[1], heads, head_dim)),
            ("v", v, (batch, k.shape[1], heads, head_dim)),
            ("positions", positions, (batch, tokens)),
            ("mask", mask, (batch, tokens, k.shape[1] + own)),
        ):
            if tuple(each.shape) != shape or (name == "mask" and mask.dtype is not torch.bool):
                kind = " torch.bool" if name == "mask" else ""
                raise ValueError(f"{name} is {tuple(each.shape)} {each.dtype}; accepted is {shape}{kind}")

    def _by_modules(self, *read: Tensor) -> bool:
        """Whether the layer's own modules are called: something learns, or they do more than their weights say."""
        layer, device = self.layer, read[0].device.type
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (*read, *layer.parameters()))
        attention, mlp = layer.self_attn, layer.mlp
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        plain = all(type(each) is nn.Linear and each.bias is None for each in linears)
        hooked = any(
            each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each)
            for each in layer.modules()
        )
        return learns or hooked or not plain or torch.is_autocast_enabled(device)

    def _run(self, x: Tensor, kv: LayerKV, positions: Tensor, mask: Tensor, slots: Any) -> Tensor:
        ops = self._ops(x)
        tokens = Tokens(rope_tables(positions, self._head_dim()), ops.prepare_mask(mask))
        with torch.no_grad():
            return decoder_layer(ops, self._read(), x.float(), tokens, kv, slots)


class SelfAttentionLayer(_Layer):
    """``y = x + Wo·attention(rope(Wq·n), [k | rope(Wk·n)], [v | Wv·n])`` with ``n = norm(x)``, then
    ``y + Wdown·(silu(Wgate·norm(y)) * Wup·norm(y))``.

    Replaces ``forward_attn_layer`` of LeRobot's ``SmolVLMWithExpertModel`` and what ``forward`` does behind it; Llama's
    decoder layer with LeRobot's own RoPE (wavelength 10 000).
    """

    cross = False

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x          [B, T, M]  any float dtype
        k, v       [B, P, K, D]  of the tokens before, rotated; P may be 0
        positions  [B, T]  integers      mask  [B, T, P + T]  bool, True where a token may look
        returns    [B, T, M] fp32, and k, v [B, P + T, K, D] with those of x appended
        raises     ValueError for other shapes, TypeError of the ops for other dtypes
        """
        self._check(x, k, v, positions, mask, own=x.shape[1])
        before = k.shape[1]
        if self._by_modules(x, k, v):
            rope = rope_tables(positions, self._head_dim())
            q, own_k, own_v = with_grad.qkv(self.layer, x.float(), rope, self._head_dim())
            k, v = torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)
            return (
                with_grad.finish(self.layer, x.float(), with_grad.attention(self._ops(x), q, k, v, mask)),
                k,
                v,
            )
        shape = (len(x), x.shape[1], *k.shape[2:])
        k, v = (torch.cat([each, each.new_empty(shape)], dim=1) for each in (k.detach(), v.detach()))
        return self._run(x, LayerKV(k, v), positions, mask, (k[:, before:], v[:, before:])), k, v


class CrossAttentionLayer(_Layer):
    """``y = x + Wo·attention(rope(Wq·norm(x)), k, v)``, then ``y + Wdown·(silu(Wgate·norm(y)) * Wup·norm(y))``.

    k and v are the layer's own projections of a prefix's keys and values.

    Replaces the expert's half of ``forward_cross_attn_layer`` of LeRobot's ``SmolVLMWithExpertModel`` and what ``forward``
    does behind it, in a layer whose ``k_proj`` and ``v_proj`` read keys and values (SmolVLA, arXiv 2506.01844, section 3).
    """

    cross = True

    def keys_and_values(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``Wk·k, Wv·v`` over the joined heads: once for a prefix, for nothing in them depends on the step.

        k, v  [B, P, K, D], rotated      returns  k, v [B, P, K, D] in the dtype of the weights
        """
        if self._by_modules(k, v):
            return with_grad.cross_kv(self.layer, k, v, self._head_dim())
        record = self._read()
        with torch.no_grad():
            return self._ops(k).cross_kv(k, v, record.k, record.v)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x          [B, S, E]  any float dtype
        k, v       [B, P, K, D]  from ``keys_and_values``
        positions  [B, S]  integers; LeRobot counts them from 0      mask  [B, S, P]  bool, True where a token may look
        returns    [B, S, E] fp32
        raises     ValueError for other shapes, TypeError of the ops for other dtypes
        """
        self._check(x, k, v, positions, mask, own=0)
        if self._by_modules(x, k, v):
            rope = rope_tables(positions, self._head_dim())
            q, _, _ = with_grad.qkv(self.layer, x.float(), rope, self._head_dim(), keys=False)
            return with_grad.finish(self.layer, x.float(), with_grad.attention(self._ops(x), q, k, v, mask))
        return self._run(x, LayerKV(k, v), positions, mask, None)
