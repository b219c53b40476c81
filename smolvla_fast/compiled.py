"""Backend ``cpu``: the compiled CPU kernels under the signatures of the ops, where they measure faster than torch's own.

Everything not named here is served by the ``torch`` backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See ``reference.attention``."""
    q, k, v = (x.view(*x.shape[:2], heads, -1) for x in (q, k, v))
    return cpu.attention(q, k, v).flatten(2)


def prepare_mask(mask: Tensor) -> Tensor:
    """The kernel reads the bool mask as it is."""
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """See ``reference.masked_attention``; a query narrower than the cross KV is widened to it."""
    return cpu.attention(q.to(k.dtype), k, v, mask).flatten(2)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See ``aten.rms_norm``: from the fp32 residual stream, rounded once to ``dtype``."""
    return cpu.add_rms_norm(x.contiguous(), None, weight.to(x.dtype), eps)[0].to(dtype)
