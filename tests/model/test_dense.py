"""Which tensors have memory that a kernel may read; whole policies: tests/patching/test_eligibility_parameters.py."""

from __future__ import annotations

import torch

from smolvla_fast.model.dense import why_not_dense


def test_freed_memory_and_transforms_are_not_dense() -> None:
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    assert "freed" in str(why_not_dense(freed)) and why_not_dense(torch.empty(0)) is None
    seen: list[str | None] = []
    torch.vmap(lambda x: (seen.append(why_not_dense(x)), x)[1])(torch.ones(2, 3))
    assert seen == ["a tensor of a torch.func transform"]
