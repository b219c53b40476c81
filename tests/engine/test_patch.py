"""patch, unpatch, status: what they promise about the object, its weights, its copies and the global state."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import pickle
import re
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast.patch import engine_of
from smolvla_fast.testing import make_noise, make_observation

from .conftest import LEROBOT_ONLY, chunk, make_policy, rel_l2

TIERS = ["exact", "fp32", "bf16"]


def test_returns_the_same_object_and_says_one_line(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        assert smolvla_fast.patch(policy) is policy
    assert len(caplog.records) == 1
    assert "fp32 on cpu" in caplog.text


@LEROBOT_ONLY
def test_identity_and_interface_are_unchanged(policy: Any) -> None:
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching

    def seen(policy: Any) -> tuple[Any, ...]:
        state = policy.state_dict()
        return (
            type(policy),
            inspect.signature(policy.predict_action_chunk),
            inspect.signature(policy.select_action),
            [(key, value.data_ptr(), value.dtype) for key, value in state.items()],
            [name for name, _ in policy.named_modules()],
            [name for name, _ in policy.named_parameters()],
            [name for name, _ in policy.named_buffers()],
        )

    before = seen(policy)
    smolvla_fast.patch(policy)
    assert seen(policy) == before
    assert isinstance(policy, PreTrainedPolicy) and isinstance(policy, SmolVLAPolicy)
    assert isinstance(policy.model, VLAFlowMatching)


def test_unpatch_restores_class_attributes_and_bits(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    stock = chunk(policy, observation, noise)
    cls, attributes = type(policy.model), list(policy.model.__dict__)
    smolvla_fast.unpatch(policy)  # of an unpatched policy: nothing
    for _ in range(2):
        smolvla_fast.patch(policy, precision="bf16")
        smolvla_fast.patch(policy, precision="bf16")
        chunk(policy, observation, noise)
        assert smolvla_fast.unpatch(policy) is policy
    assert type(policy.model) is cls and list(policy.model.__dict__) == attributes
    assert torch.equal(chunk(policy, observation, noise), stock)


def test_only_this_policy_changes(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    other = make_policy("tiny", num_steps=3)
    smolvla_fast.patch(policy)
    assert "sample_actions" in vars(type(policy.model).__mro__[1])
    assert not smolvla_fast.status(other).active
    smolvla_fast.patch(other, precision="exact")
    first, second = chunk(policy, observation, noise), chunk(other, observation, noise)
    assert torch.equal(first, chunk(policy, observation, noise))
    assert torch.equal(second, chunk(other, observation, noise))
    assert smolvla_fast.status(policy).precision == "fp32" and smolvla_fast.status(other).precision == "exact"


def test_patching_again_changes_the_settings(policy: Any, observation: dict[str, Tensor]) -> None:
    for precision in TIERS:
        smolvla_fast.patch(policy, precision=precision)
        assert smolvla_fast.status(policy).precision == precision


@pytest.mark.parametrize("precision", TIERS)
def test_status_counts(policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str) -> None:
    assert smolvla_fast.status(policy).last_fallback == "the policy is not patched"
    smolvla_fast.patch(policy, precision=precision)
    for _ in range(3):
        chunk(policy, observation, noise)
    now = smolvla_fast.status(policy)
    assert now.active and (now.calls_fast, now.calls_stock) == (3, 0)
    assert now.graphs == 0 and now.last_fallback is None
    assert set(now.to_dict()) == {
        "active", "precision", "backend", "stages", "passed_over", "calls_fast", "calls_stock", "last_fallback",
        "graphs", "graph_bytes", "graph_nodes", "step_launches", "extra_bytes",
    }  # fmt: skip


@pytest.mark.parametrize("precision", TIERS)
def test_extra_bytes_are_all_that_a_chunk_leaves_behind(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str
) -> None:
    """No copy of a weight survives a chunk, not even in a tier of another dtype: every live tensor is counted."""

    def live() -> dict[int, int]:
        gc.collect()
        tensors = (x for x in gc.get_objects() if isinstance(x, Tensor))
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    smolvla_fast.patch(policy, precision=precision)
    before = live()
    chunk(policy, observation, noise)
    left = sum(size for address, size in live().items() if address not in before)
    extra = smolvla_fast.status(policy).extra_bytes
    # The loop's buffers are rows of an action chunk, which beside these tiny weights is not little.
    workspace = engine_of(policy.model)._workspace
    sets = [] if workspace is None else workspace._sets
    buffers = [each for held in sets for each in held.values()]
    assert all(each.shape[:2] == (1, policy.config.chunk_size) for each in buffers), "a matrix in a buffer"
    assert left <= extra < sum(x.nbytes for x in buffers) + 1e-2 * sum(x.nbytes for x in policy.parameters())


# Weights ------------------------------------------------------------------------------------------------------------


def _ema_swap(policy: Any, other: Any) -> None:
    for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def _load(policy: Any, other: Any) -> None:
    policy.load_state_dict(other.state_dict())


def _replace_parameters(policy: Any, other: Any) -> None:
    for mine, theirs in zip(policy.modules(), other.modules(), strict=True):
        for name, parameter in list(mine._parameters.items()):
            if parameter is not None:
                setattr(mine, name, nn.Parameter(getattr(theirs, name).detach().clone()))


@pytest.mark.parametrize("change", [_ema_swap, _load, _replace_parameters])
@pytest.mark.parametrize("precision", TIERS)
def test_next_chunk_uses_changed_weights(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str, change: Any
) -> None:
    """However the weights change, a chunk afterwards is the one that a policy patched afresh gives."""
    other = make_policy("tiny", seed=1)
    smolvla_fast.patch(policy, precision=precision)
    before = chunk(policy, observation, noise)
    change(policy, other)
    after = chunk(policy, observation, noise)
    wanted = chunk(smolvla_fast.patch(other, precision=precision), observation, noise)
    assert torch.equal(after, wanted)
    assert rel_l2(before, wanted) > 1e-2


def test_every_parameter_that_stock_uses_is_read_live() -> None:
    """Nudge one parameter at a time: the fp32 chunk follows stock's each time."""
    policy = make_policy("tiny", num_steps=2)
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


def test_dtype_change_under_a_patched_policy(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    policy.model.vlm_with_expert.to(torch.bfloat16)
    chunk(policy, observation, noise)
    assert smolvla_fast.status(policy).precision == "bf16"
    policy.float()
    chunk(policy, observation, noise)
    assert smolvla_fast.status(policy).precision == "fp32"


# Copies and threads ---------------------------------------------------------------------------------------------------


def _pickled(policy: Any) -> Any:
    return pickle.loads(pickle.dumps(policy))


def _saved(policy: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(policy, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, _pickled, _saved])
def test_copies_run_fast_and_apart(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, make: Any
) -> None:
    smolvla_fast.patch(policy)
    wanted = chunk(policy, observation, noise)
    twin = make(policy)
    assert torch.equal(chunk(twin, observation, noise), wanted)
    assert smolvla_fast.status(twin).calls_fast == 1 and smolvla_fast.status(policy).calls_fast == 1
    for parameter in twin.parameters():
        parameter.data.mul_(1.1)
    chunk(twin, observation, noise)
    assert torch.equal(chunk(policy, observation, noise), wanted)
    assert type(smolvla_fast.unpatch(twin).model) is type(policy.model).stock_class
    assert smolvla_fast.status(policy).active


def test_shallow_copy_has_its_own_queue(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    smolvla_fast.patch(policy)
    twin = copy.copy(policy)
    twin.reset()
    policy.select_action(dict(observation), noise=noise)
    assert len(policy._queues["action"]) == policy.config.n_action_steps - 1
    assert len(twin._queues["action"]) == 0


def test_deepcopy_sharing_parameters(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    smolvla_fast.patch(policy)
    twin = copy.deepcopy(policy, {id(p): p for p in policy.parameters()})
    for parameter in policy.parameters():
        parameter.data.mul_(1.05)
    assert torch.equal(chunk(twin, observation, noise), chunk(policy, observation, noise))


def test_threads_get_their_own_right_answer(policy: Any, observation: dict[str, Tensor]) -> None:
    smolvla_fast.patch(policy)
    noises = [make_noise(policy, seed=i) for i in range(8)]
    wanted = [chunk(policy, observation, noise) for noise in noises]
    got: list[Tensor | None] = [None] * len(noises)

    def work(first: int) -> None:
        for i in range(first, len(noises), 4):
            got[i] = chunk(policy, observation, noises[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert smolvla_fast.status(policy).calls_fast == 16


# Outputs, noise and global state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TIERS)
def test_output_contract(policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str) -> None:
    smolvla_fast.patch(policy, precision=precision)
    kept_inputs, kept_noise = {k: v.clone() for k, v in observation.items()}, noise.clone()
    first = chunk(policy, observation, noise)
    held = first.clone()
    second = chunk(policy, observation, make_noise(policy, seed=5))
    assert first.shape == (1, policy.config.chunk_size, 6) and first.dtype is torch.float32
    assert not first.requires_grad and not first.is_inference()
    assert torch.equal(first, held) and not torch.equal(first, second)
    assert torch.equal(noise, kept_noise)
    assert all(torch.equal(observation[k], kept_inputs[k]) for k in observation)
    first.mul_(2)  # Aloha's encoding writes in place


def test_queue_runs_the_model_once_a_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    for _ in range(policy.config.n_action_steps):
        assert torch.equal(
            policy.select_action(dict(observation), noise=noise),
            twin.select_action(dict(observation), noise=noise),
        )
    assert smolvla_fast.status(policy).calls_fast == 1


@pytest.mark.parametrize("precision", TIERS)
def test_noise_is_drawn_as_stock_draws_it(
    policy: Any, observation: dict[str, Tensor], precision: str
) -> None:
    torch.manual_seed(3)
    stock = chunk(policy, observation)
    state = torch.get_rng_state()
    smolvla_fast.patch(policy, precision=precision)
    torch.manual_seed(3)
    fast = chunk(policy, observation)
    assert torch.equal(torch.get_rng_state(), state)
    assert rel_l2(fast, stock) < 0.1  # the same noise; another draw gives a distance near 1.4


def test_no_global_state_moves(observation: dict[str, Tensor], noise: Tensor) -> None:
    def seen() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            list(warnings.filters),
            logging.getLogger().handlers[:],
        )

    before = seen()
    policy = make_policy("tiny")
    for precision in TIERS:
        smolvla_fast.patch(policy, precision=precision, warmup=True)
        chunk(policy, observation, noise)
        smolvla_fast.verify(policy, observation)
    smolvla_fast.unpatch(policy)
    assert seen() == before


def test_live_config(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    for steps in (4, 1, 10):
        policy.config.num_steps = twin.config.num_steps = steps
        assert torch.equal(chunk(policy, observation, noise), chunk(twin, observation, noise))


def test_warmup_counts_nothing_and_leaves_the_batch(policy: Any, observation: dict[str, Tensor]) -> None:
    kept = {key: value.clone() for key, value in observation.items()}
    for warmup in (True, observation):
        smolvla_fast.patch(policy, warmup=warmup)
        assert smolvla_fast.status(policy).calls_fast == 0
    assert all(torch.equal(observation[k], kept[k]) for k in kept)
    assert len(policy._queues["action"]) == 0


# Errors ---------------------------------------------------------------------------------------------------------------


def test_bad_arguments(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_saves_and_loads_without_us(policy: Any, tmp_path: Any) -> None:
    policy.save_pretrained(tmp_path / "before")
    smolvla_fast.patch(policy).save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_peft(observation: dict[str, Tensor], noise: Tensor) -> None:
    """Unmerged LoRA is not ignored: stock runs, and says so. Merged, the merged weights are what the engine reads."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = make_policy("tiny")
    plain = chunk(policy, observation, noise)
    config = peft.LoraConfig(r=4, target_modules=r".*lm_expert.*\.(q|v)_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(policy, config).eval()
    adapted = chunk(wrapped.get_base_model(), observation, noise)
    smolvla_fast.patch(wrapped)
    assert torch.equal(chunk(wrapped.get_base_model(), observation, noise), adapted)
    assert not torch.equal(adapted, plain)
    now = smolvla_fast.status(wrapped)
    assert not now.active and now.calls_stock == 1 and "lora" in now.last_fallback
    merged = wrapped.merge_and_unload()
    assert (
        rel_l2(chunk(merged, observation, noise), adapted) < 1e-5
    )  # merging reassociates W·x + B·A·x in fp32
    assert smolvla_fast.status(merged).active and smolvla_fast.status(merged).calls_fast == 1


@LEROBOT_ONLY
@pytest.mark.slow
def test_peak_memory_full_size() -> None:
    """Matching dtypes: the peak of a patched chunk is at most stock's + 10 %; measured in fresh processes."""
    import subprocess
    import sys

    code = (
        "import sys, torch, smolvla_fast; from smolvla_fast.testing import *;"
        "from smolvla_fast.cli.measure import PeakMemory;"
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


def test_observation_of_another_camera_count(policy: Any, noise: Tensor) -> None:
    """Cameras that come and go between calls."""
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    for cameras in (2, 1, 2):
        observation = make_observation(policy, cameras=cameras)
        assert torch.equal(chunk(policy, observation, noise), chunk(twin, observation, noise))


def test_bf16_leaves_the_cross_kv_as_they_are_stored(policy: Any, observation: Any, noise: Tensor) -> None:
    smolvla_fast.patch(policy, precision="bf16")
    engine, seen = smolvla_fast.patch.__globals__["engine_of"](policy.model), []
    spied = engine.ops.cross_kv
    engine.ops = replace(engine.ops, cross_kv=lambda k, v, *w: (seen.extend(w), spied(k, v, *w))[1])
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
    with pytest.raises(KeyError):
        smolvla_fast.patch(policy, precision="fp32", warmup={})
    now = smolvla_fast.status(policy)
    assert (now.active, now.precision, now.calls_fast) == (True, "exact", 1)


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


@pytest.mark.parametrize("value", ["false", "No", "off", "0", ""])
def test_disable_knows_its_negations(policy: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", value)
    assert smolvla_fast.status(smolvla_fast.patch(policy)).active


def test_verify_names_what_it_accepts(policy: Any, observation: Any) -> None:
    smolvla_fast.patch(policy)
    with pytest.raises(TypeError, match="batch is a list; accepted is a dict"):
        smolvla_fast.verify(policy, [observation])
    with pytest.raises(
        ValueError, match=r"noise is \(1, 3, 2\) torch.float32; accepted is \(batch, 10, 32\)"
    ):
        smolvla_fast.verify(policy, observation, noise=torch.zeros(1, 3, 2))
