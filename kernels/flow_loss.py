"""The ends of a training step, elementwise: the point on the path from actions to noise, and the squared velocity error.

Three tensors in and one out in a launch, forward and backward. The backward saves nothing of its own: it forms the error
again from what the caller holds anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check, refuse_graph

BLOCK = 1024


@triton.jit
def _flow_point_fwd(actions_ptr, noise_ptr, time_ptr, out_ptr, size, per_sample, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    t = tl.load(time_ptr + place // per_sample, mask=inside, other=0.0)
    noise = tl.load(noise_ptr + place, mask=inside, other=0.0)
    actions = tl.load(actions_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, t * noise + (1.0 - t) * actions, mask=inside)


@triton.jit
def _flow_loss_fwd(v_ptr, actions_ptr, noise_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(noise_ptr + place, mask=inside, other=0.0) - tl.load(
        actions_ptr + place, mask=inside, other=0.0
    )
    tl.store(out_ptr + place, (u - v) * (u - v), mask=inside)


@triton.jit
def _flow_loss_bwd(
    grad_ptr,
    v_ptr,
    actions_ptr,
    noise_ptr,
    to_v_ptr,
    size,
    steps,
    width,
    grad_batch_stride,
    grad_step_stride,
    grad_action_stride,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    action, row = place % width, place // width
    grad_place = (
        row // steps * grad_batch_stride + row % steps * grad_step_stride + action * grad_action_stride
    )
    grad = tl.load(grad_ptr + grad_place, mask=inside, other=0.0)
    v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(noise_ptr + place, mask=inside, other=0.0) - tl.load(
        actions_ptr + place, mask=inside, other=0.0
    )
    tl.store(to_v_ptr + place, (-2.0 * (u - v) * grad).to(to_v_ptr.dtype.element_ty), mask=inside)


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward(v, actions, noise)
        out = torch.empty_like(actions)
        if out.numel():
            _flow_loss_fwd[(triton.cdiv(out.numel(), BLOCK),)](
                v, actions, noise, out, out.numel(), BLOCK=BLOCK
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("flow_loss")
        (grad,) = grads
        v, actions, noise = ctx.saved_tensors
        to_v = torch.empty_like(v)
        if v.numel():
            # Of a mean it is one number with strides of 0, and of a cut of the action width a view: read as it lies.
            _flow_loss_bwd[(triton.cdiv(v.numel(), BLOCK),)](
                grad, v, actions, noise, to_v, v.numel(), *v.shape[1:], *grad.stride(), BLOCK=BLOCK
            )
        needs = ctx.needs_input_grad
        wide = to_v.to(actions.dtype) if needs[1] or needs[2] else None
        return (
            to_v if needs[0] else None,
            wide if needs[1] else None,
            -wide if needs[2] and wide is not None else None,
        )


def flow_point(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """``x_t = t·noise + (1 - t)·actions``.

    actions, noise  [B, S, A]  fp32      time  [B]  fp32
    returns         [B, S, A]  fp32, without a graph
    errors          ValueError for other shapes or dtypes, or inputs that require a gradient
    replaces        the first lines of ``forward`` of LeRobot's ``VLAFlowMatching``
    """
    _check("flow_point", actions, noise)
    check("flow_point", "time", time, (actions.shape[0],), like=actions)
    if time.dtype is not torch.float32 or time.requires_grad or actions.requires_grad or noise.requires_grad:
        raise ValueError(
            f"flow_point: time is {time.dtype}; accepted is torch.float32, and inputs without a gradient"
        )
    actions, noise, time = actions.contiguous(), noise.contiguous(), time.contiguous()
    out = torch.empty_like(actions)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        per_sample = out.shape[1] * out.shape[2]
        _flow_point_fwd[grid](actions, noise, time, out, out.numel(), per_sample, BLOCK=BLOCK)
    return out


def flow_loss(v: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
    """``(noise - actions - v)²``, with a backward.

    v               [B, S, A]  fp32 | bf16 | fp16
    actions, noise  [B, S, A]  fp32
    returns         [B, S, A]  fp32, unreduced
    numerics        all in fp32; the gradient to v is rounded once, to the dtype of v
    errors          ValueError for other shapes or dtypes
    replaces        ``u_t = noise - actions`` and ``F.mse_loss(u_t, v_t, reduction="none")`` there
    """
    _check("flow_loss", actions, noise)
    check("flow_loss", "v", v, tuple(actions.shape), like=actions)
    out: Tensor = _FlowLoss.apply(v.contiguous(), actions.contiguous(), noise.contiguous())
    return out


def _check(op: str, actions: Tensor, noise: Tensor) -> None:
    if actions.ndim != 3:
        raise ValueError(f"{op}: actions have shape {list(actions.shape)}; accepted is [B, S, A]")
    check(op, "noise", noise, tuple(actions.shape), like=actions)
    for name, each in (("actions", actions), ("noise", noise)):
        if each.dtype is not torch.float32:
            raise ValueError(f"{op}: {name} is {each.dtype}; accepted is torch.float32, as they are drawn")
