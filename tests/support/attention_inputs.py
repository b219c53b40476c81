"""What the two files of attention tests share: launchers between guards, dtypes, inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smolvla_fast.ops.cuda import masked_attention as module
from support.contract import inputs_in
from support.guarded import guarded

masked_attention = guarded(module.masked_attention)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Queries, then keys and values; the second is LeRobot's default layout, whose cross KV is fp32.
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
PAIRED = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(d)[6:] for d in pair))
SMALL = dict(B=2, T=7, S=83, H=6, K=2, D=24)


def inputs(
    case: dict[str, int], dtype: torch.dtype, cache: torch.dtype | None = None, seed: int = 0
) -> dict[str, Any]:
    """Queries in ``dtype``; keys and values too, or in fp32 with more bits than that holds."""
    values = inputs_in("masked_attention", case, dtype, seed)[0]
    for name in ("k", "v") if cache is torch.float32 else ():
        generator = torch.Generator().manual_seed(seed + ord(name))
        values[name] = torch.randn(values[name].shape, generator=generator)
    return values
