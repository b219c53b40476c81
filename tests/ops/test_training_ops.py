"""The ops of a training step, torch's and Triton's: forward and backward against autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from support.contract import check, in_dtypes, inputs_in, sizes, to_device
from support.guarded import DEVICE, guarded

from smolvla_fast.kernels import flow_loss as flow_module
from smolvla_fast.kernels import masked_attention_backward as attention_module
from smolvla_fast.loss.layers import rotate
from smolvla_fast.ops.reference.flow_loss import flow_loss, flow_point
from smolvla_fast.ops.reference.masked_attention import masked_attention
from smolvla_fast.ops.reference.masked_attention_backward import masked_attention_backward
from smolvla_fast.ops.reference.rope import apply_rope, rope_tables
from smolvla_fast.ops.select import reference_ops
from smolvla_fast.ops.torch.masked_attention import attention_with_grad as by_torch

pytestmark = [pytest.mark.triton, pytest.mark.training]
FLOW = (dict(B=1, S=50, A=32), dict(B=3, S=7, A=5), dict(B=2, S=1, A=1))
# Small, for the interpreter is slow; a device runs the real ones in tests/gpu. Grouped and not, more rows and keys than a
# tile has, one token, one key, big heads.
ATTENTION = (
    dict(B=1, T=13, S=37, H=3, K=1, D=24),
    dict(B=2, T=3, S=19, H=4, K=2, D=16),
    dict(B=1, T=1, S=9, H=2, K=2, D=8),
    dict(B=1, T=4, S=18, H=3, K=1, D=96),
    dict(B=1, T=3, S=1, H=2, K=2, D=40),
)


def gradients(
    function: Callable[..., Tensor], given: dict[str, Any], names: str, grad: Tensor
) -> list[Tensor]:
    """Of ``function(**given)`` to the inputs named, by autograd."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names.split()}
    out = function(**{**given, **leaves})
    return list(torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)))


def within(
    ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], dtype: torch.dtype, units: int = 1
) -> None:
    """The contract of every op, for gradients: at most twice eager's error in the same dtype and a unit in the last place of
    the largest.

    units  4 for attention: a score's gradient is the difference of two sums, ``g·v`` and ``g·out``, each with a rounding of
           its own, where eager subtracts a sum of the very products; over one key eager's is 0 and theirs is not
    """
    largest = max(want.abs().max().item() for want in truth)
    for found, plain, want in zip(ours, eager, truth, strict=True):
        assert found.dtype is plain.dtype and found.shape == want.shape and found.isfinite().all()
        error, eager_error = ((x.cpu().double() - want).abs().max().item() for x in (found, plain))
        assert error <= 2 * eager_error + units * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(FLOW, everywhere=FLOW[1:]))
def test_flow_loss(case: dict[str, int], dtype: torch.dtype) -> None:
    ops = SimpleNamespace(flow_loss=guarded(flow_module.flow_loss))
    check(reference_ops(), ops, "flow_loss", case, dtype)


@pytest.mark.parametrize("lies", ["mean", "cut", "whole"])
@pytest.mark.parametrize(("case", "dtype"), in_dtypes(FLOW, everywhere=FLOW[1:]))
def test_flow_loss_backward(case: dict[str, int], dtype: torch.dtype, lies: str) -> None:
    """With the gradients that a policy sends back: of a mean (one number), of the first actions alone (a cut), any."""
    narrow, wide = inputs_in("flow_loss", case, dtype, seed=0)
    shape = narrow["actions"].shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if lies == "mean":
        grad = torch.tensor(0.25).expand(shape)
    if lies == "cut":
        grad = torch.cat([grad, grad], dim=-1)[..., : shape[-1]]
    names = "v actions noise"
    truth = gradients(flow_loss, wide, names, grad.double())
    eager = gradients(flow_loss, narrow, names, grad)
    ours = gradients(flow_module.flow_loss, to_device(narrow, DEVICE), names, grad.to(DEVICE))
    within(ours, eager, truth, dtype)


@pytest.mark.parametrize("case", FLOW, ids=sizes)
def test_flow_point(case: dict[str, int]) -> None:
    given, _ = inputs_in("flow_loss", case, torch.float32, seed=0)
    actions, noise = given["actions"], given["noise"]
    time = torch.linspace(0, 1, case["B"]) if case["B"] > 1 else torch.tensor([0.3])
    ours = guarded(flow_module.flow_point)(actions, noise, time)
    # A compiler may fuse one product with the sum: half a unit in the last place of each term.
    torch.testing.assert_close(ours, flow_point(actions, noise, time), rtol=0, atol=2 * 2**-24 * 8)
    assert torch.equal(ours[time == 0], actions[time == 0]) and torch.equal(ours[time == 1], noise[time == 1])


def test_flow_refuses_what_it_cannot_do() -> None:
    x = torch.zeros(2, 3, 4, device=DEVICE)
    time = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"noise has shape \[2, 3\]; accepted is \[2, 3, 4\]"):
        flow_module.flow_loss(x, x, x[..., 0])
    with pytest.raises(ValueError, match="actions is torch.float16; accepted is torch.float32"):
        flow_module.flow_loss(x, x.half(), x)
    with pytest.raises(ValueError, match="inputs without a gradient"):
        flow_module.flow_point(x.clone().requires_grad_(), x, time)
    with pytest.raises(ValueError, match=r"time has shape \[3\]; accepted is \[2\]"):
        flow_module.flow_point(x, x, torch.zeros(3, device=DEVICE))


def test_a_gradient_penalty_is_refused() -> None:
    """The gradient of a gradient would leave out whatever comes through these."""
    x = torch.ones(1, 2, 1, 8, device=DEVICE, requires_grad=True)
    mask = torch.ones(1, 2, 2, device=DEVICE, dtype=torch.bool)
    for out in (attention_module.attention_with_grad(x, x, x, mask), flow_module.flow_loss(x[0], x[0], x[0])):
        with pytest.raises(RuntimeError, match="accepted is create_graph=False"):
            torch.autograd.grad(out.sum(), x, create_graph=True)
        torch.autograd.grad(out.sum(), x)


def attention_inputs(
    case: dict[str, int], dtype: torch.dtype, blind: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """With a row that sees nothing if wanted, and if there is more than one."""
    narrow, _ = inputs_in("masked_attention_backward", case, dtype, seed=0)
    if blind and case["T"] > 1:
        narrow["mask"][0, 0] = False
    forward = {name: narrow[name] for name in ("q", "k", "v", "mask")}
    narrow["out"] = masked_attention(**forward)
    return narrow, {name: x.double() if x.is_floating_point() else x for name, x in narrow.items()}


@pytest.mark.parametrize("case", ATTENTION, ids=sizes)
def test_the_reference_is_autograds_gradient(case: dict[str, int]) -> None:
    _, wide = attention_inputs(case, torch.float32)
    wide["out"] = masked_attention(**{name: wide[name] for name in ("q", "k", "v", "mask")})
    forward = {name: wide[name] for name in ("q", "k", "v", "mask")}
    truth = gradients(masked_attention, forward, "q k v", wide["grad"])
    for found, want in zip(masked_attention_backward(**wide), truth, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)  # fp64 against fp64


@pytest.mark.parametrize("kind", ["torch", "triton"])
@pytest.mark.parametrize(("case", "dtype"), in_dtypes(ATTENTION, everywhere=ATTENTION[::2]))
def test_attention_backward(case: dict[str, int], dtype: torch.dtype, kind: str) -> None:
    narrow, wide = attention_inputs(case, dtype, blind=kind == "triton")
    forward = {name: narrow[name] for name in ("q", "k", "v", "mask")}
    truth = gradients(masked_attention, {name: wide[name] for name in forward}, "q k v", wide["grad"])
    eager = gradients(masked_attention, forward, "q k v", narrow["grad"])
    if kind == "torch":
        ours = gradients(by_torch, forward, "q k v", narrow["grad"])
    else:
        backward = guarded(attention_module.masked_attention_backward)
        ours = list(backward(**narrow))
        again = backward(**narrow)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "other bits the second time"
        whole = gradients(
            attention_module.attention_with_grad,
            to_device(forward, DEVICE),
            "q k v",
            narrow["grad"].to(DEVICE),
        )
        # Through autograd; its forward is the kernel's, whose last bits differ from those of the reference's.
        within(whole, eager, truth, dtype, units=4)
    # torch's fused attention has an exponential of its own, and measures up to 10 units on a CPU: theirs, taken as it is.
    within(ours, eager, truth, dtype, units=12 if kind == "torch" else 4)


def test_attention_of_unlike_dtypes() -> None:
    """Where LeRobot's expert multiplies the cross KV in fp32 and queries in bf16; halves stand in under the interpreter."""
    narrow, wide = attention_inputs(ATTENTION[1], torch.float16, blind=False)
    mixed = {
        **{name: narrow[name] for name in ("q", "v", "k", "mask")},
        "k": narrow["k"].float(),
        "v": narrow["v"].float(),
    }
    truth = gradients(masked_attention, {name: wide[name] for name in mixed}, "q k v", wide["grad"])
    for function in (by_torch, attention_module.attention_with_grad):
        found = gradients(function, to_device(mixed, DEVICE), "q k v", narrow["grad"].to(DEVICE))
        assert [x.dtype for x in found] == [torch.float16, torch.float32, torch.float32]
        for ours, want in zip(found, truth, strict=True):
            # The forward's result is rounded to half once, and so is dq: a few units of 2^-11.
            error = (ours.cpu().double() - want).abs().max() / want.abs().max()
            assert error <= 4 * 2**-11


def test_a_blind_row_stays_a_number() -> None:
    """In torch's attention too, forward and backward, and the other rows do not notice."""
    narrow, _ = attention_inputs(ATTENTION[1], torch.float32)
    forward = {name: narrow[name] for name in ("q", "k", "v", "mask")}
    grad = narrow["grad"].clone()
    grad[0, 0] = 0
    found = gradients(by_torch, forward, "q k v", grad)
    truth = gradients(masked_attention, forward, "q k v", grad)
    for ours, want in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)  # two orders of summation in fp32
    assert by_torch(**forward).isfinite().all()


def test_rotation_is_the_references() -> None:
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    tables = rope_tables(torch.arange(10).view(2, 5), 16)
    assert torch.equal(rotate(x, tables), apply_rope(x, *tables))
    assert torch.equal(rotate(x.bfloat16(), tables), apply_rope(x.bfloat16(), *tables))
