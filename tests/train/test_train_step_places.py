"""Where training steps run in real life: LoRA, DDP, accelerate, torch.compile, validation; and when stock runs instead."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import tv_tensors

pytest.importorskip(
    "lerobot.policies.smolvla.modeling_smolvla", reason="parity is against LeRobot's own classes"
)

from support.train_steps import (
    Step,
    assert_same,
    copied,
    distance,
    gradients_of,
    make_batch,
    other_order,
    step,
)

import smolvla_fast
from smolvla_fast.loss import engine as loss_module
from smolvla_fast.testing.policies import make_policy

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]
ALL = dict(train_expert_only=False, freeze_vision_encoder=False)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy() -> Any:
    return make_policy("tiny").train()


def lora(policy: Any, targets: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = peft.get_peft_model(policy, peft.LoraConfig(r=4, target_modules=targets, **settings))
        for name, parameter in found.named_parameters():
            if "lora_B" in name:  # starts at zero, and then half of the gradients are zero
                nn.init.normal_(parameter, std=0.1)
    return found


EXPERT = r".*(lm_expert\..*\.(q|v)_proj|state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out)"
VLM = r".*text_model\..*\.(q|v|up)_proj"


@pytest.mark.parametrize(
    "targets", [EXPERT, VLM, EXPERT + "|" + VLM], ids=["LeRobot's own", "the VLM's", "both"]
)
def test_lora_trains_as_in_stock(policy: Any, targets: str) -> None:
    """Adapters are called as modules: the expert's and the heads' beside a frozen prefix, the VLM's under its full graph."""
    _check_lora(policy, targets)


def test_lora_on_the_last_text_layer_under_joint_attention() -> None:
    """Of a last self-attention layer stock's queries get zeros, not None, which plain DDP would wait for."""
    policy = make_policy("tiny", num_vlm_layers=3).train()
    stock = _check_lora(policy, VLM)
    last = [g for name, g in stock.gradients.items() if "text_model.layers.2.self_attn.q_proj" in name]
    assert len(last) == 2 and not any(g.any() for g in last)


def _check_lora(policy: Any, targets: str) -> Step:
    adapted = lora(policy, targets)
    batch = make_batch(policy)
    stock = step(policy, batch)
    noise = other_order(policy, batch, stock)
    assert all("lora" in name for name in stock.gradients)
    smolvla_fast.patch(adapted, training=True)
    assert_same(step(policy, batch), stock, noise)
    now = smolvla_fast.status(adapted)
    assert (now.training_fast, now.training_stock) == (1, 0)
    assert ("frozen prefix" in now.training_fallback_reasons) == (targets != EXPERT)
    return stock


def test_accelerate_trains_as_in_stock(policy: Any) -> None:
    """Prepared by an Accelerator in bf16 with two batches an optimizer step, as lerobot-train does it."""
    accelerate = pytest.importorskip("accelerate")
    batches = [make_batch(policy, seed=seed) for seed in (0, 10)]

    def run(patched: bool) -> dict[str, torch.Tensor]:
        mine = copy.deepcopy(policy)
        if patched:
            smolvla_fast.patch(mine, training=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=0.0)
        prepared, optimizer = accelerator.prepare(mine, optimizer)
        torch.manual_seed(0)
        for batch in batches:
            with accelerator.accumulate(prepared):
                loss, _ = prepared.forward(copied(batch))
                accelerator.backward(loss)
        if patched:
            assert smolvla_fast.status(mine).training_fast == 2, smolvla_fast.status(mine).training_fallback
        return gradients_of(mine)

    with torch.random.fork_rng(devices=[]):
        stock, ours = run(False), run(True)
        torch.manual_seed(0)
        for batch in batches:
            (policy.forward(copied(batch))[0] / 2).backward()
    truth = gradients_of(policy)
    assert ours.keys() == stock.keys()
    # In bf16 one policy's error is a draw; where the processor has no fast bf16, products run in fp32 and this is far below.
    assert distance(ours, truth) <= 1.25 * distance(stock, truth) < 0.5


DDP = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from support.train_steps import copied, distance, gradients_of, make_batch
import smolvla_fast
from smolvla_fast.testing.policies import make_policy

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for settings in ({}, dict(train_expert_only=False, freeze_vision_encoder=False)):
    found = {}
    for kind in ("stock", "fast"):
        policy = make_policy("tiny", **settings).train()
        if kind == "fast":
            smolvla_fast.patch(policy, training=True)
        wrapped = DistributedDataParallel(policy)  # every parameter that learns must get its gradient
        torch.manual_seed(rank)
        for turn in range(2):
            loss, _ = wrapped(copied(make_batch(policy, seed=10 * rank + turn)))
            loss.backward()
        found[kind] = gradients_of(policy)
    assert smolvla_fast.status(policy).training_fast == 2, smolvla_fast.status(policy)
    assert found["stock"].keys() == found["fast"].keys()
    apart = distance(found["fast"], found["stock"])
    assert apart <= 2e-5, apart  # the average of two draws, and 1e-5 is the bound of one
    total = torch.stack([g.double().sum() for g in found["fast"].values()])
    both = [torch.empty_like(total) for _ in range(2)]
    dist.all_gather(both, total)
    assert torch.equal(*both), "the processes hold different gradients"
dist.destroy_process_group()  # its threads would end a process that ends before them
print("same", rank)
"""


@pytest.mark.long
@pytest.mark.slow
def test_ddp_of_two_processes(tmp_path: Path) -> None:
    """Gradients averaged over two gloo processes with different batches, against stock's; no unused parameter is left."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        messages = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, text) in enumerate(zip(processes, messages, strict=True)):
        assert process.returncode == 0 and f"same {rank}" in text, text[-3000:]


def test_torch_compile_around_a_policy_breaks_the_graph_there(policy: Any) -> None:
    """Dynamo leaves the fast path alone and compiles around it: same gradients."""
    batch = make_batch(policy)
    stock = step(policy, batch)
    noise = other_order(policy, batch, stock)
    smolvla_fast.patch(policy, training=True)
    policy.zero_grad(set_to_none=True)
    compiled = torch.compile(lambda each: policy.forward(each)[0], backend="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        loss = compiled(copied(batch))
        random = torch.get_rng_state()
    loss.backward()
    assert_same(Step(loss.detach(), gradients_of(policy), random), stock, noise)
    assert smolvla_fast.status(policy).training_fast == 1


def test_compile_model_hides_the_fast_path(caplog: pytest.LogCaptureFixture) -> None:
    """LeRobot's own compiled forward lies on the instance, before any class; patch says so at once."""
    policy = make_policy("tiny").train()
    policy.model.forward = torch.compile(
        policy.model.forward, backend="eager"
    )  # what compile_model=True does
    with caplog.at_level(logging.WARNING, "smolvla_fast"):
        smolvla_fast.patch(policy, training=True)
    reason = smolvla_fast.status(policy).training_fallback
    assert reason is not None and "forward is replaced on the instance (torch.compile does this)" in reason
    assert any("training runs stock" in record.message for record in caplog.records)


def test_validation_computes_the_loss_without_a_graph(policy: Any) -> None:
    batch = make_batch(policy)
    smolvla_fast.patch(policy, training=True)
    with_graph = step(policy, batch)
    policy.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with torch.random.fork_rng(devices=[]), context():
            torch.manual_seed(7)
            loss, _ = policy.forward(copied(batch))
        assert not loss.requires_grad
        torch.testing.assert_close(loss, with_graph.loss, rtol=1e-5, atol=0)  # the bound of tier fp32
    policy.train()
    assert_same(step(policy, batch), with_graph)
    assert smolvla_fast.status(policy).training_fast == 4


def test_only_what_learns_is_kept_for_the_backward(policy: Any) -> None:
    """The graph holds no activation of the frozen prefix but its keys and values: less than a third of stock's bytes."""

    def held() -> int:
        sizes: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss, _ = policy.forward(copied(batch))
        del loss
        return sum(sizes.values())

    batch = make_batch(policy)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    stock = held()
    smolvla_fast.patch(policy, training=True)
    assert held() < stock / 3


def test_weights_are_read_at_every_step(policy: Any) -> None:
    """An optimizer step on the expert and an EMA swap in the frozen VLM, which moves no version counter."""
    batch = make_batch(policy)
    smolvla_fast.patch(policy, training=True)
    before = step(policy, batch).loss
    pair = policy.model.vlm_with_expert
    for weight in (
        pair.lm_expert.layers[0].mlp.up_proj.weight,
        pair.get_vlm_model().text_model.layers[1].self_attn.k_proj.weight,
        pair.get_vlm_model().vision_model.encoder.layers[0].mlp.fc1.weight,
    ):
        weight.data.copy_(weight.data * 1.5)
        after = step(policy, batch)
        assert not torch.isclose(after.loss, before, rtol=1e-5)
        before = after.loss
    smolvla_fast.unpatch(policy)
    stock = step(policy, batch)
    assert_same(after, stock, other_order(policy, batch, stock))


def test_patch_is_undone_copied_and_pickled(policy: Any) -> None:
    batch, stock_class = make_batch(policy), type(policy.model)
    smolvla_fast.patch(policy)
    assert type(policy.model).forward is stock_class.forward, "without training=True nothing touches forward"
    smolvla_fast.patch(policy, training=True)
    names = set(vars(policy.model))
    ours = step(policy, batch)
    assert set(vars(policy.model)) == names
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert_same(step(twin, batch), ours)
        assert smolvla_fast.status(twin).training_fast == 1
        smolvla_fast.unpatch(twin)
        assert type(twin.model) is stock_class
    smolvla_fast.patch(policy)
    assert type(policy.model).forward is stock_class.forward
    smolvla_fast.unpatch(policy)
    assert type(policy.model) is stock_class and "_smolvla_fast" not in vars(policy.model)


def test_inference_goes_on_being_fast(policy: Any) -> None:
    smolvla_fast.patch(policy, training=True)
    step(policy, make_batch(policy))
    policy.eval()
    batch = {key: value for key, value in make_batch(policy).items() if not key.startswith("action")}
    policy.predict_action_chunk(batch)
    now = smolvla_fast.status(policy)
    assert (now.calls_fast, now.calls_stock, now.training_fast) == (1, 0, 1)


def _hook(policy: Any) -> None:
    policy.model.vlm_with_expert.lm_expert.layers[1].mlp.register_forward_hook(lambda *_: None)


def _backward_hook(policy: Any) -> None:
    policy.model.action_out_proj.register_full_backward_hook(lambda *_: None)


def _dropout(policy: Any) -> None:
    attention = policy.model.vlm_with_expert.get_vlm_model().vision_model.encoder.layers[0].self_attn
    attention.dropout = 0.5
    attention.training = True


def _lora_dropout(policy: Any) -> None:
    lora(policy, EXPERT, lora_dropout=0.5)


def _foreign(policy: Any) -> None:
    class Mine(type(policy.model)):  # type: ignore[misc]
        def embed_suffix(self, *args: Any) -> Any:
            return super().embed_suffix(*args)

    policy.model.__class__ = Mine


def _nothing(policy: Any) -> None: ...


REASONS: dict[str, tuple[Callable[[Any], None], dict[str, Any], str]] = {
    "a forward hook": (_hook, {}, "has a forward hook"),
    "a backward hook": (_backward_hook, {}, "has a backward hook"),
    "dropout in the vision tower": (_dropout, {}, "drops at random"),
    "dropout of an adapter": (_lora_dropout, {}, "drops at random"),
    "a subclass": (_foreign, {}, "embed_suffix is .*, not the source this release knows"),
    "exact": (_nothing, dict(precision="exact"), "precision='exact' has no training path"),
}


@pytest.mark.parametrize("name", REASONS)
def test_stock_runs_with_a_receipt(policy: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Stock's bits, a count, the reason, and one line in the log however often it happens."""
    change, settings, reason = REASONS[name]
    change(policy)
    batch = make_batch(policy)
    stock = step(policy, batch)
    with caplog.at_level(logging.WARNING, "smolvla_fast"):
        smolvla_fast.patch(policy, training=True, **settings)
        for _ in range(2):
            ours = step(policy, batch)
    now = smolvla_fast.status(policy)
    assert (now.training_fast, now.training_stock) == (0, 2)
    assert now.training_fallback is not None and re.search(reason, now.training_fallback)
    assert torch.equal(ours.loss, stock.loss)
    assert all(torch.equal(ours.gradients[key], value) for key, value in stock.gradients.items())
    messages = [record for record in caplog.records if "training" in record.message]
    assert len(messages) == 1, [record.message for record in messages]


@pytest.mark.parametrize("name", ["a forward hook", "a backward hook", "dropout in the vision tower"])
def test_what_changes_later_is_noticed(policy: Any, name: str) -> None:
    change, _, reason = REASONS[name]
    batch = make_batch(policy)
    smolvla_fast.patch(policy, training=True)
    step(policy, batch)
    change(policy)
    step(policy, batch)
    now = smolvla_fast.status(policy)
    assert (now.training_fast, now.training_stock) == (1, 1) and re.search(reason, str(now.training_fallback))


@pytest.mark.parametrize("name", ["embed_prefix", "embed_suffix", "sample_time"])
def test_a_method_replaced_on_the_class_is_noticed(
    policy: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps, as a plugin does it: what the fast path replaces sends it to stock, what it calls does not."""
    batch, cls = make_batch(policy), type(policy.model)
    smolvla_fast.patch(policy, training=True)
    step(policy, batch)
    stock = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    step(policy, batch)
    now = smolvla_fast.status(policy)
    assert (now.training_fast, now.training_stock) == ((2, 0) if name == "sample_time" else (1, 1))


CALLS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a frame that learns": (lambda given: given["images"][0].requires_grad_(), "require a gradient"),
    "a frame of a class of its own": (
        lambda given: given["images"].__setitem__(0, tv_tensors.Image(given["images"][0])),
        "image 0 is a torchvision.tv_tensors._image.Image, not a plain tensor",
    ),
    "actions that learn": (lambda given: given["actions"].requires_grad_(), "require a gradient"),
}


@pytest.mark.parametrize("name", CALLS)
def test_stock_runs_for_this_batch(policy: Any, name: str) -> None:
    change, reason = CALLS[name]
    batch = make_batch(policy)
    images, masks = policy.prepare_images(batch)
    given = dict(
        images=images, img_masks=masks, lang_tokens=batch["observation.language.tokens"],
        lang_masks=batch["observation.language.attention_mask"], state=policy.prepare_state(batch),
        actions=policy.prepare_action(batch), noise=torch.zeros(2, 10, 32), time=torch.tensor([0.5, 0.1]),
    )  # fmt: skip
    change(given)
    stock = policy.model.forward(**given)
    smolvla_fast.patch(policy, training=True)
    assert torch.equal(policy.model.forward(**given), stock)
    assert re.search(reason, str(smolvla_fast.status(policy).training_fallback))


def test_autocast_in_half_runs_stock(policy: Any) -> None:
    smolvla_fast.patch(policy, training=True)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        policy.forward(make_batch(policy))
    assert "torch.float16; accepted is bfloat16" in str(smolvla_fast.status(policy).training_fallback)


def test_switched_off_by_the_environment(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    smolvla_fast.patch(policy, training=True)
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    step(policy, make_batch(policy))
    now = smolvla_fast.status(policy)
    assert (now.training_stock, now.training_fallback) == (1, "SMOLVLA_FAST_DISABLE is set")


def test_a_frame_is_encoded_once(policy: Any) -> None:
    """Same loss and gradients from tokens looked up, whatever prompt and state; a limit and a moved weight forget."""
    batch = make_batch(policy)  # two samples of two cameras
    smolvla_fast.patch(policy, training=True)
    plain = step(policy, batch)
    smolvla_fast.patch(policy, training=True, image_cache=2**20)

    def counts() -> tuple[int, int, int]:
        now = smolvla_fast.status(policy).training_cache
        return now["frames"], now["hits"], now["misses"]

    assert_same(step(policy, batch), plain)
    assert counts() == (4, 0, 4)
    assert_same(step(policy, batch), plain)
    assert counts() == (4, 4, 4)
    other = make_batch(policy, task="another prompt", seed=3)
    other.update({key: batch[key].flip(0) for key in batch if "images" in key})
    found = step(policy, other)
    assert counts() == (4, 8, 4)
    smolvla_fast.patch(policy, training=True)
    assert_same(found, step(policy, other))

    one = 4 * 48 * 4  # tokens, width, bytes of a number
    smolvla_fast.patch(policy, training=True, image_cache=3 * one)
    step(policy, batch)
    assert counts()[0] == 3 and smolvla_fast.status(policy).training_cache["bytes"] == 3 * one
    connector = policy.model.vlm_with_expert.get_vlm_model().connector.modality_projection.proj.weight
    connector.data.copy_(connector.data * 1.5)
    moved = step(policy, batch)
    assert counts()[1:] == (0, 8)
    smolvla_fast.patch(policy, training=True)
    assert_same(moved, step(policy, batch))


def test_tokens_do_not_depend_on_the_frames_beside_them(policy: Any) -> None:
    """Found or encoded anew, alone or among others: the same bits, or a resumed run would end elsewhere."""
    many, few = make_batch(policy, batch=3), make_batch(policy, batch=1)
    few.update({key: many[key][1:2] for key in many if "images" in key})
    smolvla_fast.patch(policy, training=True, image_cache=2**20)
    step(policy, many)
    found = step(policy, few)
    assert smolvla_fast.status(policy).training_cache["hits"] == 2
    smolvla_fast.patch(policy, training=True, image_cache=2**21)  # another cache, empty
    anew = step(policy, few)
    assert smolvla_fast.status(policy).training_cache["misses"] == 2
    assert torch.equal(anew.loss, found.loss)
    assert all(torch.equal(anew.gradients[name], found.gradients[name]) for name in found.gradients)


def test_tokens_of_another_dtype_are_others(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in autocast and a validation without it share a cache and no token."""
    monkeypatch.setattr(loss_module, "why_bf16_is_slow", lambda: None)
    batch = make_batch(policy)
    smolvla_fast.patch(policy, training=True)
    plain = step(policy, batch)
    smolvla_fast.patch(policy, training=True, image_cache=2**20)
    step(policy, batch, autocast=True)
    assert_same(step(policy, batch), plain)


def test_an_image_cache_where_it_cannot_serve(policy: Any) -> None:
    for wish, training in ((1024, False), ("8GB", True), (None, True)):
        said = f"image_cache={wish!r}; accepted are bytes, 0 or more, together with training=True"
        with pytest.raises(ValueError, match=said):
            smolvla_fast.patch(policy, image_cache=wish, training=training)
    learning = make_policy("tiny", **ALL).train()
    smolvla_fast.patch(learning, training=True, image_cache=2**20)
    step(learning, make_batch(learning))
    now = smolvla_fast.status(learning)
    assert now.training_cache["frames"] == 0 and "learn" in now.training_fallback_reasons["image cache"]


def test_an_image_cache_beside_adapters_of_the_vlm_has_a_receipt(policy: Any) -> None:
    """Said at patching, and gone with its cause."""
    adapted = lora(policy, VLM)
    smolvla_fast.patch(adapted, training=True, image_cache=2**20)
    batch = make_batch(policy)
    receipt = smolvla_fast.status(adapted).training_fallback_reasons["image cache"]
    step(policy, batch)
    now = smolvla_fast.status(adapted)
    assert now.training_fallback_reasons["image cache"] == receipt and "modules themselves" in receipt
    assert now.training_cache["frames"] == 0
    policy = adapted.merge_and_unload().train()
    policy.model.action_out_proj.requires_grad_(True)
    step(policy, batch)
    now = smolvla_fast.status(policy)
    assert now.training_fallback_reasons == {} and now.training_cache["frames"] == 4


def test_an_old_receipt_does_not_outlive_its_cause(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "why_bf16_is_slow", lambda: "no bf16 here")
    smolvla_fast.patch(policy, training=True, image_cache=2**20)
    connector = policy.model.vlm_with_expert.get_vlm_model().connector
    connector.requires_grad_(True)
    step(policy, make_batch(policy), autocast=True)
    assert smolvla_fast.status(policy).training_fallback_reasons.keys() == {"bf16 products", "image cache"}
    connector.requires_grad_(False)
    step(policy, make_batch(policy))
    assert smolvla_fast.status(policy).training_fallback_reasons == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            dict(resize_imgs_with_padding=(64, 64)),
            r"resize_imgs_with_padding=\(64, 64\); accepted is \(32, 32\)",
        ),
        (dict(resize_imgs_with_padding=None), r"is \d+ x \d+ and resize_imgs_with_padding is None"),
    ],
    ids=["resized", "as they come"],
)
def test_frames_of_another_size_are_said_at_patching(settings: dict[str, Any], reason: str) -> None:
    """Not at the first step alone: who asked for ``--fast=on`` is told before it."""
    policy = make_policy("tiny").train()
    for name, value in settings.items():
        setattr(policy.config, name, value)
    smolvla_fast.patch(policy, training=True)
    assert re.search(reason, str(smolvla_fast.status(policy).training_fallback))


@pytest.mark.long
@pytest.mark.triton
def test_triton_kernels_under_a_step() -> None:
    """In fp32, the smallest policy there is: attention with its backward, flow loss, and the frozen prefix.

    tests/compiled_kernels/test_compiled_chunk.py has the step in bf16.
    """
    pytest.importorskip("triton")
    policy = make_policy(
        "tiny", cameras=1, num_vlm_layers=2, chunk_size=4, tokenizer_max_length=8,
        vision=dict(image_size=16, num_hidden_layers=1),
    ).train()  # fmt: skip
    batch = make_batch(policy, batch=1, padded=False, task="go", language_length=4)
    stock = step(policy, batch)
    noise = other_order(policy, batch, stock)
    smolvla_fast.patch(policy, training=True, backend="triton")
    assert_same(step(policy, batch), stock, noise)
    assert smolvla_fast.status(policy).training_fast == 1
