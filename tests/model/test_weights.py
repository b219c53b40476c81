"""Parameters under the names that stages use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smolvla_fast.model.dims import read_dims
from smolvla_fast.model.weights import (
    head_sources,
    pair_sources,
    read_expert_layers,
    read_heads,
    read_patch_embedding,
    read_text_layers,
    read_vision_end,
    read_vision_layers,
)


def test_what_is_read_is_what_is_checked(policy: Any) -> None:
    """Each tensor that a stage reads is a parameter of a module in the sources, and there is nothing else in those."""
    model = policy.model
    pair = model.vlm_with_expert
    vlm = pair.get_vlm_model()
    read: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            read.append(value)
        elif hasattr(value, "__dataclass_fields__"):
            walk(list(vars(value).values()))
        elif isinstance(value, list | tuple):
            for each in value:
                walk(each)

    walk([
        read_patch_embedding(vlm, lambda x: x), list(read_vision_layers(vlm, lambda x: x)),
        read_vision_end(vlm, lambda x: x), list(read_text_layers(vlm, lambda x: x)),
        read_expert_layers(pair, lambda x: x, lambda x: x), read_heads(model),
        vlm.text_model.get_input_embeddings().weight,
    ])  # fmt: skip
    dims = read_dims(model)
    sources = (*pair_sources(pair, dims), *head_sources(model, dims))
    checked = [p for source in sources for p in source.module.parameters()]
    assert {id(x) for x in read} == {id(x) for x in checked}
