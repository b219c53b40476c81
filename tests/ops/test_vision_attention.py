"""The vision tower's attention as a Triton kernel; the compiled one is tests/ops/test_masked_attention.py without a mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
from support.contract import check, in_dtypes, inputs_in, run
from support.guarded import DEVICE, guarded

from smolvla_fast.kernels import attention as vision_module
from smolvla_fast.ops.select import reference_ops

pytestmark = pytest.mark.triton

attention = guarded(vision_module.attention)
OPS = SimpleNamespace(attention=attention)
# The interpreter's bf16 products are wrong, so bf16 is a device's to judge.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=triton_by.BF16)]
VISION = (
    dict(N=2, T=64, H=3, D=16),
    dict(N=1, T=37, H=2, D=24),
    dict(N=1, T=200, H=2, D=64),
    dict(N=2, T=130, H=1, D=72),
    dict(N=1, T=1, H=3, D=8),
)


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(VISION, everywhere=VISION[3:]))
def test_vision_attention(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "attention", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vision_attention_of_a_joint_projection(dtype: torch.dtype) -> None:
    values, _ = inputs_in("attention", dict(N=2, T=37, H=3, D=16), dtype, seed=0)
    want = run(OPS, "attention", values)["y"]
    joint = torch.cat([values[name] for name in "qkv"], dim=2).to(DEVICE)
    got = attention(*joint.split(48, dim=2), 3)
    assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy under the interpreter
def test_vision_attention_keeps_images_and_heads_apart() -> None:
    values, _ = inputs_in("attention", dict(N=2, T=37, H=3, D=16), torch.float32, seed=0)
    want = run(OPS, "attention", values)["y"]
    values["v"][1, 5, 20] = torch.nan  # image 1, head 1
    got = run(OPS, "attention", values)["y"]
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[1, :, 20] = True
    assert got[hit].isnan().all() and torch.equal(got[~hit], want[~hit])


def test_vision_attention_refuses_what_it_cannot_do() -> None:
    x = torch.zeros(1, 5, 48, device=DEVICE)
    refused = vision_module.attention
    with pytest.raises(
        ValueError, match=r"q has shape \[1, 5, 48\] and heads is 5; accepted is \[N, T, H·D\]"
    ):
        refused(x, x, x, 5)
    with pytest.raises(ValueError, match="v is torch.float16, q is torch.float32; accepted is one dtype"):
        refused(x, x, x.half(), 3)
    with pytest.raises(ValueError, match=r"k has shape \[1, 4, 48\]; accepted is \[1, 5, 48\]"):
        refused(x, x[:, 1:], x, 3)
    assert refused(x[:0], x[:0], x[:0], 3).shape == (0, 5, 48)
