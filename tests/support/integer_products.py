"""Integer products where the processor has none: the same exact sums in fp64, slowly. So the accuracy of tier int8, its
copies and its freshness are tested on every machine; oneDNN's own product is tested in tests/ops/test_cpu_quantize.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolvla_fast.ops import availability, extension
from smolvla_fast.ops.cpu import int8, int8_attention
from smolvla_fast.ops.reference.quantize import ZERO, IntegerRows, IntegerWeight


def provide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tier int8 be served here, by oneDNN where it can be and in fp64 elsewhere. All but these products is compiled:
    skips the test where that is missing."""
    if missing := extension.why_missing("cpu"):
        pytest.skip(missing)
    monkeypatch.setattr(
        availability, "_why_slow", lambda: None
    )  # whether it was measured here is not the question
    monkeypatch.setattr(int8_attention, "why_slower", lambda *calls: None)  # nor who is faster
    if int8.why_not(torch.device("cpu")) is None:
        return
    monkeypatch.setattr(int8, "why_not", lambda device: None)
    monkeypatch.setattr(int8, "pack_integers", _pack)
    monkeypatch.setattr(int8, "_one_term", _sums)


def _pack(weight: IntegerWeight) -> int8.Packed:
    zero = torch.zeros(len(weight.scale), dtype=torch.int64)
    return int8.Packed(weight.data, weight.scale, zero, weight.data.shape)


def _sums(x: IntegerRows, weight: int8.Packed) -> Tensor:
    return (F.linear(x.data.double() - ZERO, weight.data.double()) * weight.scale.double()).float()
