"""How many nodes of a chunk on backend ``triton`` belong to no layer: each costs a microsecond or two, whatever it does."""

from __future__ import annotations

import pytest
from support import triton_by
from support.policies import LEROBOT_ONLY, chunk, make_policy

pytest.importorskip("triton")
if triton_by.INTERPRETED:
    pytest.skip("the interpreter computes in torch", allow_module_level=True)
from support.guarded import DEVICE
from support.nodes import nodes_of

import smolvla_fast
from smolvla_fast.ops.table import NAMES
from smolvla_fast.patch import engine_of
from smolvla_fast.testing.policies import make_noise, make_observation

pytestmark = pytest.mark.triton
PRELUDE = ["cat", "_prefix_embed_fwd", "_rope_masks_fwd", "_suffix_fold_fwd"]
"""In their order; ``cat`` joins the cameras' images."""
OF_PRELUDE = (None, "prefix_embed", "rope_masks", "prepare_mask", "suffix_fold")
VISION_ENDS = 3
"""Patches, the last norm and the connector: launches of the vision stage in none of its layers."""


@LEROBOT_ONLY
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("precision", "layout"), [("bf16", "mixed"), ("fp8", "mixed"), ("fp32", "fp32")])
def test_nodes_of_no_layer(precision: str, layout: str, batch: int) -> None:
    if precision == "fp8" and triton_by.FP8:
        pytest.skip("8-bit floats are compiled from sm_89 on")
    policy = make_policy("tiny", device=DEVICE, cameras=2, layout=layout)
    smolvla_fast.patch(policy, precision=precision, backend="triton")
    given, noise = make_observation(policy, batch=batch), make_noise(policy, batch=batch)
    with nodes_of(engine_of(policy.model)) as nodes:
        for _ in range(
            2
        ):  # the first call makes what a warm-up makes: position ids, time embeddings, 8-bit copies
            chunk(policy, given, noise)
    assert smolvla_fast.status(policy).last_fallback is None
    assert [node.name for node in nodes if node.op in OF_PRELUDE] == PRELUDE
    assert {node.op for node in nodes if node.op not in OF_PRELUDE} < set(NAMES)
    ends = [
        node.op
        for node in nodes
        if node.name.startswith("_") and node.op in ("patch_embed", "pixel_shuffle_linear")
    ]
    norms = sum(node.op == "layer_norm" for node in nodes)
    layers = len(policy.model.vlm_with_expert.get_vlm_model().vision_model.encoder.layers)
    assert len(ends) + norms - 2 * layers == VISION_ENDS and len(PRELUDE) + VISION_ENDS <= 10
    if precision != "fp32":  # whose large products torch computes
        # Counters of split sums, which a GPU has once a process.
        assert {
            node.name for node in nodes if node.op not in OF_PRELUDE and not node.name.startswith("_")
        } <= {"zeros"}
