"""patch, unpatch, status: what they promise about the object, its weights, its copies and the global state."""

from __future__ import annotations

import copy
import gc
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, rel_l2
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast.patch import engine_of
from smolvla_fast.testing.policies import make_noise, make_observation

TIERS = ["exact", "fp32", "bf16"]


@pytest.mark.check(61)
@pytest.mark.parametrize("precision", TIERS)
def test_extra_bytes_are_all_that_a_chunk_leaves_behind(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str
) -> None:
    """No copy of a weight survives a chunk, not even in a tier of another dtype: every live tensor is counted."""

    def live() -> dict[int, int]:
        gc.collect()
        # By type: dynamo leaves fake ones behind, which have no memory.
        tensors = (x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    smolvla_fast.patch(policy, precision=precision)
    before = live()
    chunk(policy, observation, noise)
    left = sum(size for address, size in live().items() if address not in before)
    extra = smolvla_fast.status(policy).extra_bytes
    # The loop's buffers are rows of an action chunk, which beside these tiny weights is not little.
    workspace = engine_of(policy.model)._workspace
    buffers = [] if workspace is None else workspace.tensors
    assert all(each.shape[:2] == (1, policy.config.chunk_size) for each in buffers), "a matrix in a buffer"
    assert left <= extra < sum(x.nbytes for x in buffers) + 1e-2 * sum(x.nbytes for x in policy.parameters())


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.check(37)
def test_every_parameter_that_stock_uses_is_read_live() -> None:
    """Nudge one parameter at a time: the fp32 chunk follows stock's each time."""
    policy = make_policy("tiny", num_steps=1, cameras=1)
    observation, noise = make_observation(policy), make_noise(policy)
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy)
    base = chunk(twin, observation, noise)
    used = 0
    for (name, mine), theirs in zip(policy.named_parameters(), twin.parameters(), strict=True):
        kept = mine.data.clone()
        for parameter in (mine, theirs):
            parameter.data.mul_(1.25).add_(0.01)
        stock = chunk(twin, observation, noise)
        # Where stock ignores a parameter (lm_head, the last text layer's queries) ours must ignore it too. The bound is
        # fp32 reassociation on a chunk; a parameter read stale leaves the change itself, four orders larger.
        assert rel_l2(chunk(policy, observation, noise), stock) < 1e-5, name
        used += not torch.equal(stock, base)
        for parameter in (mine, theirs):
            parameter.data.copy_(kept)
    assert used > 100


@pytest.mark.parametrize("precision", TIERS)
def test_a_weight_transposed_where_it_lies(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str
) -> None:
    """``weight.data = weight.data.T``: the same object at the same address, another matrix. Stock runs, with a receipt."""
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision=precision)
    before = chunk(policy, observation, noise)
    for each in (policy, twin):
        weight = each.model.action_time_mlp_out.weight
        weight.data = weight.data.T
    after = chunk(policy, observation, noise)
    assert torch.equal(after, chunk(twin, observation, noise)) and rel_l2(before, after) > 1e-2
    assert "not contiguous" in str(smolvla_fast.status(policy).last_fallback)


# Warm-up ---------------------------------------------------------------------------------------------------------------


@pytest.mark.check(57)
def test_warmup_counts_nothing_and_leaves_the_batch(policy: Any, observation: dict[str, Tensor]) -> None:
    kept = {key: value.clone() for key, value in observation.items()}
    for warmup in (True, observation):
        smolvla_fast.patch(policy, warmup=warmup)
        assert smolvla_fast.status(policy).calls_fast == 0
    assert all(torch.equal(observation[k], kept[k]) for k in kept)
    assert len(policy._queues["action"]) == 0


def test_a_warmup_that_stock_served_is_said(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "smolvla_fast"), torch.autocast("cpu"):
        smolvla_fast.patch(policy, warmup=True)
    (line,) = (each for each in caplog.records if "smolvla_fast: on" in each.getMessage())
    assert line.levelname == "WARNING"
    assert "but calls like the warm-up's run stock: autocast is on" in line.getMessage()


# Errors ---------------------------------------------------------------------------------------------------------------


def test_patch_refuses_bad_arguments(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="precision='fp8' cannot serve.*run on an NVIDIA GPU"):
        smolvla_fast.patch(policy, precision="fp8")
    with pytest.raises(TypeError, match="SmolVLAPolicy"):
        smolvla_fast.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got builtins.NoneType"):
        smolvla_fast.patch(None)
    with pytest.raises(ValueError, match="'fp16'.*accepted are 'auto', 'exact', 'fp32', 'bf16'"):
        smolvla_fast.patch(policy, precision="fp16")
    with pytest.raises(ValueError, match="backend='tpu'.*accepted are"):
        smolvla_fast.patch(policy, backend="tpu")
    with pytest.raises(RuntimeError, match="triton"):
        smolvla_fast.patch(policy, backend="triton")
    with pytest.raises(RuntimeError, match="not patched"):
        smolvla_fast.verify(policy, {})
    assert not smolvla_fast.status(policy).active


@pytest.mark.check(61)
@LEROBOT_ONLY
@pytest.mark.long
@pytest.mark.slow
def test_peak_memory_full_size() -> None:
    """Matching dtypes: the peak of a patched chunk is at most stock's + 10 %; measured in fresh processes."""
    import subprocess
    import sys

    code = (
        "import sys, torch, smolvla_fast; from smolvla_fast.testing.policies import *;"
        "from smolvla_fast.measure.rounds import PeakMemory;"
        "p = make_policy('full', num_steps=1); o = make_observation(p);"
        "smolvla_fast.patch(p, precision=sys.argv[1]) if sys.argv[1] != 'stock' else None;"
        "memory = PeakMemory('cpu'); p.predict_action_chunk(o, noise=make_noise(p)); print(memory.bytes)"
    )
    peak = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
            ).stdout
        )
        for name in ("stock", "fp32")
    }
    assert peak["fp32"] <= 1.10 * peak["stock"], peak


def test_bf16_leaves_the_cross_kv_as_they_are_stored(policy: Any, observation: Any, noise: Tensor) -> None:
    smolvla_fast.patch(policy, precision="bf16")
    engine, seen = smolvla_fast.patch.__globals__["engine_of"](policy.model), []
    spied = engine.ops.cross_kv
    engine.ops = replace(engine.ops, cross_kv=lambda k, v, *w: (seen.extend(w[:2]), spied(k, v, *w))[1])
    chunk(policy, observation, noise)
    live = {p.data_ptr() for p in policy.parameters()}
    assert seen and all(w.dtype is torch.float32 and w.data_ptr() in live for w in seen)


@pytest.mark.parametrize("warmup", [5, 0, "x", [1]], ids=str)
def test_another_warmup_is_named_and_changes_nothing(policy: Any, warmup: Any) -> None:
    for precision in (None, "exact"):
        if precision is not None:
            smolvla_fast.patch(policy, precision=precision)
        before = smolvla_fast.status(policy).to_dict()
        with pytest.raises(TypeError, match=f"warmup={re.escape(repr(warmup))}; accepted are True"):
            smolvla_fast.patch(policy, precision="fp32", warmup=warmup)
        assert smolvla_fast.status(policy).to_dict() == before


def test_a_failing_warmup_leaves_an_earlier_patch(policy: Any, observation: Any, noise: Tensor) -> None:
    smolvla_fast.patch(policy, precision="exact")
    chunk(policy, observation, noise)
    raw = {**observation, "observation.state": observation["observation.state"][0]}
    for batch, says in (({}, "no 'observation.state'"), (raw, r"'observation.state' has the shape \(")):
        with pytest.raises(ValueError, match=f"{says}.*what the policy's preprocessor returns"):
            smolvla_fast.patch(policy, precision="fp32", warmup=batch)
    now = smolvla_fast.status(policy)
    assert (now.active, now.precision, now.calls_fast) == (True, "exact", 1)


def test_a_status_is_printed_in_a_few_lines(policy: Any, observation: Any, noise: Tensor) -> None:
    assert str(smolvla_fast.status(policy)).startswith("stock runs: the policy is not patched\nchunks: 0 by")
    smolvla_fast.patch(policy, precision="fp32")
    chunk(policy, observation, noise)
    on, chunks, *rest = str(smolvla_fast.status(policy)).splitlines()
    assert on == f"on: fp32 by {smolvla_fast.status(policy).backend}" and len(rest) <= 4
    assert chunks == "chunks: 1 by the engine, 0 by stock"
    with torch.autocast("cpu"):
        chunk(policy, observation, noise)
    assert "1 by stock, the last for: " in str(smolvla_fast.status(policy))


def test_warming_up_again_keeps_the_counters(policy: Any, observation: Any, noise: Tensor) -> None:
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    smolvla_fast.patch(policy, warmup=True)
    assert smolvla_fast.status(policy).calls_fast == 1


def test_unpatching_while_a_chunk_is_computed(policy: Any, observation: Any) -> None:
    """As another thread may: the chunk under way comes to its end."""
    smolvla_fast.patch(policy)
    stock = policy.model.stock_class.sample_noise

    def sample_noise(*args: Any, **kwargs: Any) -> Any:
        smolvla_fast.unpatch(policy)
        return stock(policy.model, *args, **kwargs)

    policy.model.__dict__["sample_noise"] = sample_noise
    try:
        assert torch.isfinite(chunk(policy, observation)).all()
    finally:
        del policy.model.__dict__["sample_noise"]
    assert not smolvla_fast.status(policy).active


@pytest.mark.check(5)
@pytest.mark.parametrize("value", ["false", "No", "off", "0", ""])
def test_disable_knows_its_negations(policy: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", value)
    assert smolvla_fast.status(smolvla_fast.patch(policy)).active


def test_verify_names_what_it_accepts(policy: Any, observation: Any) -> None:
    smolvla_fast.patch(policy)
    with pytest.raises(TypeError, match="batch is a list; accepted is a dict"):
        smolvla_fast.verify(policy, [observation])
    with pytest.raises(ValueError, match=r"noise is \(1, 3, 2\) torch.float32; accepted is \(1, 10, 32\)"):
        smolvla_fast.verify(policy, observation, noise=torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match=r"noise is \(3, 10, 32\)"):
        smolvla_fast.verify(policy, observation, noise=torch.zeros(3, 10, 32))
    del observation["observation.language.tokens"]
    with pytest.raises(ValueError, match=r"batch has no 'observation.language.tokens'"):
        smolvla_fast.verify(policy, observation)
