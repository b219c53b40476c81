"""The emulator in place of a GPU: product code knows nothing of it, so it is put where that asks for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smolvla_fast.ops import availability
from smolvla_fast.ops.cuda import library


def install(monkeypatch: pytest.MonkeyPatch, emulator: Any) -> None:
    """Backend ``cuda`` serves CPU tensors by ``emulator``, which is told what may be read and written."""
    of_device, why_not_cuda = library.library, availability._why_not_cuda

    def allowed(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.device.type == "cpu" and tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            span = 1 + sum((size - 1) * stride for size, stride in steps)
            settled = isinstance(tensor, nn.Parameter)  # no launch writes a parameter
            emulator.allow(tensor.data_ptr(), span * tensor.element_size(), settled)
        return tensor.data_ptr()

    def here(device: torch.device) -> bool:
        return device.type == "cpu"

    monkeypatch.setattr(library, "address", allowed)
    monkeypatch.setattr(library, "library", lambda device: emulator if here(device) else of_device(device))
    monkeypatch.setattr(
        availability, "_why_not_cuda", lambda device: None if here(device) else why_not_cuda(device)
    )
