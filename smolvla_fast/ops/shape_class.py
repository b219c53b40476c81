"""The shape class of a call: what decides who computes it fastest, and no more.

Counts that change with the prompt (rows, keys) are rounded up to a power of two; widths and dtypes are exact. The text of a
class, ``str(shape)``, is its name in a plan: "256 960>960,320,320 float32".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .next_norm import NextNorm


class Product(NamedTuple):
    """Rows [rows, inputs] times weights [outputs, inputs], with what the op does before and after.

    dtype   of the weights; a name, such as "packed", where these are quantised      x  of the rows
    end     what follows: an activation, the dtype of a residual, "guided"; PREPARED, of rows; "tf32" where fp32 products may
            round to it
    """

    rows: int
    inputs: int
    outputs: tuple[int, ...]
    dtype: Any
    x: Any
    end: tuple[Any, ...] = ()

    def __str__(self) -> str:
        widths = f"{self.inputs}>{','.join(map(str, self.outputs))}"
        return _joined(self.rows, widths, self.dtype, None if self.x == self.dtype else self.x, *self.end)


class Attention(NamedTuple):
    """Queries and keys of one sample or image, heads of both, and their dtypes."""

    batch: int
    queries: int
    keys: int
    heads: str
    head_dim: int
    q: Any
    kv: Any

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.queries}x{self.keys}"
        return _joined(sizes, self.heads, self.head_dim, self.q, None if self.kv == self.q else self.kv)


class Rows(NamedTuple):
    """Rows of one width, from a dtype to another."""

    rows: int
    width: str
    dtype: Any
    out: Any

    def __str__(self) -> str:
        return _joined(self.rows, self.width, self.dtype, None if self.out == self.dtype else self.out)


Shape = Product | Attention | Rows


def _joined(*parts: Any) -> str:
    return " ".join(str(each).removeprefix("torch.") for each in parts if each is not None)


def up(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def _rows(x: Any) -> int:
    if isinstance(x, Tensor):
        return up(x.numel() // max(x.shape[-1], 1))
    return up(x.scale.numel())  # quantised rows have a scale each


def _dtype(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__.lower()


def _product(x: Any, weights: tuple[Any, ...], end: tuple[Any, ...] = (), rows: int | None = None) -> Product:
    # Asked 800 times a chunk: plain loops, and each attribute once.
    outputs, inputs, dtype = [], 0, None
    for weight in weights:
        if weight is not None:
            size, inputs = weight.shape
            outputs.append(size)
            if dtype is None:  # of the first: the folded one of a suffix is always fp32
                dtype = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__.lower()
    # A CPU has no TF32, whatever a process allows its GPU.
    if dtype is torch.float32 and not x.is_cpu and torch.get_float32_matmul_precision() != "highest":
        end = (*end, "tf32")
    if not isinstance(x, Tensor):
        return Product(_rows(x), inputs, tuple(outputs), dtype, _dtype(x), end)
    rows = up(x.numel() // inputs if rows is None else rows)
    return Product(rows, inputs, tuple(outputs), dtype, x.dtype, end)


def _linear(
    x: Any, weight: Any, bias: Any = None, activation: Any = None, residual: Any = None, **_: Any
) -> Product:
    end = () if activation is None else (activation,)
    return _product(x, (weight,), end if residual is None else (*end, residual.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Attention:
    images, tokens, width = q.shape
    return Attention(up(images), tokens, tokens, str(heads), width // heads, q.dtype, k.dtype)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Attention:
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    return Attention(up(batch), up(tokens), up(keys), f"{heads}:{kv_heads}", head_dim, q.dtype, k.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: Any = None, **_: Any) -> Rows:
    return Rows(_rows(x), str(x.shape[-1]), x.dtype, dtype or x.dtype)


def _image_prep(frames: Tensor, height: int, width: int, dtype: Any, **_: Any) -> Rows:
    side = "x".join(map(str, frames.shape[1:]))
    return Rows(up(frames.shape[0]), f"{side}>{height}x{width}", frames.dtype, dtype)


def _attention_residual(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, weight: Any, residual: Tensor, **_: Any
) -> Product:
    batch, tokens, heads = q.shape[:3]
    keys, kv_heads = k.shape[1:3]
    kv = () if k.dtype == q.dtype else (k.dtype,)
    return _product(q, (weight,), (f"{heads}:{kv_heads}", f"keys{up(keys)}", *kv), rows=batch * tokens)


PREPARED = "prepared"
"""What ends the class of an op whose rows were prepared for it: fewer bytes to read, and kernels that take no others."""


def _normed(x: Tensor, weights: tuple[Any, ...], normed: NextNorm | None) -> Product:
    return _product(x, weights, () if normed is None or normed.rows is None else (PREPARED,))


CLASSES: dict[str, Callable[..., Shape]] = {
    "image_prep": _image_prep,
    "patch_embed": lambda pixels, weight, *args, **_: Product(
        up(pixels.shape[0]), weight[0].numel(), (weight.shape[0],), weight.dtype, pixels.dtype
    ),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "attention": _attention,
    "pixel_shuffle_linear": lambda x, weight, factor, **_: _product(
        x, (weight,), rows=x.shape[0] * x.shape[1] // factor**2
    ),
    "norm_qkv_rope": lambda x, norm, weights, rope, slots, normed=None, **_: _normed(x, weights, normed),
    "masked_attention": _masked_attention,
    "attention_residual": _attention_residual,
    "cross_kv": lambda k, v, k_weight, v_weight, dtype=None, **_: _product(
        k, (k_weight, v_weight), () if dtype is None else (dtype,), rows=k.shape[0] * k.shape[1]
    ),
    "linear_residual": lambda x, weight, residual, **_: _product(x, (weight,)),
    "norm_swiglu": lambda x, norm, gate_weight, up_weight, normed=None, **_: _normed(
        x, (gate_weight, up_weight), normed
    ),
    "suffix_embed": lambda x, step, folded, time_out, **_: _product(
        x, (time_out[0], folded.weight), rows=x.shape[0] * x.shape[1]
    ),
    "euler_step": lambda h, norm, action_out, x, dt, guidance=None, **_: _product(
        h, (action_out[0],), () if guidance is None else ("guided",)
    ),
}
"""Arguments of an op -> its shape class. Ops that are not here have one implementation a backend."""
