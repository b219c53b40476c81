"""Every CUDA C++ kernel on small inputs, each result held to its reference: what compute-sanitizer watches.

``PYTHONPATH=tests python -m gpu.every_kernel`` ends with status 0. With ``--overrun`` one kernel gets a row count beyond its
tensors have, which a sanitizer that watches our kernels must see.
"""

from __future__ import annotations

import sys

import torch
from support import denoise_loop as loop
from support.contract import check, mapped, reference_module
from support.prepared import by_prepared_rows
from torch import Tensor

from smolvla_fast.ops.cuda import library
from smolvla_fast.ops.cuda.prepared_rows import why_no_norm_products
from smolvla_fast.ops.select import reference_ops, select
from smolvla_fast.ops.table import Ops

SINGLE_OPS = ("image_prep", "masked_attention", "euler_step", "linear_residual")
MORE = {
    "linear_residual": [dict(rows=3, inputs=2120, outputs=8)],
    "norm_swiglu": [dict(rows=5, inputs=720, outputs=20), dict(rows=70, inputs=72, outputs=4)],
    "norm_qkv_rope": [dict(B=1, T=3, M=720, H=1, K=1, D=20)],
}
"""Small, and with more of K than is in flight at once."""
SMALL_FLOPS = 3e7
"""Under a sanitizer a kernel takes tens to hundreds of times as long; of these sizes it is done in seconds."""


def single_ops(ops: Ops, device: torch.device) -> None:
    for op in SINGLE_OPS:
        for case in [*reference_module(op).CASES, *MORE.get(op, ())]:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if reference_module(op).cost(case, 4).flops <= SMALL_FLOPS:
                    check(reference_ops(), ops, op, case, dtype, device=device)


def normed_products(ops: Ops, device: torch.device) -> None:
    """Of prepared rows, where the device begins launches early."""
    if why_no_norm_products(device) is not None:
        return
    for op in ("norm_swiglu", "norm_qkv_rope"):
        for case in MORE[op]:
            check(reference_ops(), by_prepared_rows(ops), op, case, torch.bfloat16, device=device)


def whole_loop(ops: Ops, device: torch.device) -> None:
    """Its smallest case, which has layers of both kinds, two samples, padding and guidance, under the contract."""
    assert ops.denoise_persistent is not None and ops.why_not_persistent is not None
    given = loop.make_inputs(loop.CASES[-1], torch.bfloat16, torch.Generator().manual_seed(0))
    there = mapped(given, *2 * [lambda tensor: tensor.to(device, copy=True)])
    reason = ops.why_not_persistent(**there)
    assert reason is None, f"the loop is not served, so nothing is watched: {reason}"
    ours = ops.denoise_persistent(**there).cpu().double()
    eager = loop.denoise_persistent(**mapped(given, Tensor.clone)).double()
    truth = loop.denoise_persistent(**mapped(given, Tensor.double))
    error, eager_error = ((x - truth).abs().max().item() for x in (ours, eager))
    print(f"denoise_persistent: error {error:.3g}, eager {eager_error:.3g}")
    assert error <= 2 * eager_error


def overrun(device: torch.device) -> None:
    h, x, out = (torch.zeros(size, device=device) for size in (8, 4, 4))
    library.library(device).euler_step(
        inputs=[library.address(h)] * 4, dtypes=[0] * 4, x=library.address(x), guidance=[0] * 3, strides=(0,) * 4,
        new_x=library.address(out), v=library.address(out), sizes=(4096, 4096, 8, 1), eps=1e-5, dt=-0.1, time=0.0,
        stream=library.stream(device),
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    device = torch.device("cuda")
    if "--overrun" in arguments:
        overrun(device)
    else:
        ops = select("cuda", device, stock_order=False)
        single_ops(ops, device)
        normed_products(ops, device)
        whole_loop(ops, device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
