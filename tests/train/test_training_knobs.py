"""Every knob reaches the run: what it changes is looked for in the run itself, not in its settings."""

from __future__ import annotations

import pytest
import torch

from smolvla_fast.train.data import training_batches
from smolvla_fast.train.log import read_log
from smolvla_fast.training import to_floats, update

pytestmark = pytest.mark.training


def model(run):
    return run.policy.model


def pair(run):
    return run.policy.model.vlm_with_expert


def rates(run, steps=4):
    """Learning rates of the first steps, from the scheduler that sets them."""
    factor, base = run.scheduler.lr_lambdas[0], run.scheduler.base_lrs[0]
    assert run.optimizer.param_groups[0]["lr"] == factor(0) * base
    return [factor(step) * base for step in range(steps)]


def batch(run):
    return run.preprocess(to_floats(next(training_batches(run.settings, run.data.train, 0)), "cpu"))


def trained(run, part):
    return {p.requires_grad for n, p in run.policy.named_parameters() if part in n}


def sees(run):
    return trained(run, "vision_model")


def adam(run, name):
    return run.optimizer.param_groups[0][name]


def frames(run):
    return run.policy.prepare_images(batch(run))[0]


def words(run):
    return batch(run)["observation.language.tokens"].shape[1]


def suffix(run):
    return model(run).embed_suffix(torch.ones(1, 6, 32), torch.tensor([0.3]))[0]


def cross_layers(run):
    """Expert layers whose keys come from the VLM: their k_proj reads its width."""
    return [layer.self_attn.k_proj.in_features for layer in pair(run).lm_expert.layers]


def experts(run):
    return len(pair(run).lm_expert.layers)


def prefix(run):
    prepared = batch(run)
    images, masks = run.policy.prepare_images(prepared)
    language = (prepared[f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
    return model(run).embed_prefix(images, masks, *language, run.policy.prepare_state(prepared))[0]


def first_moment_norm(run):
    """After one step Adam's first moment is (1 - 0.9) times the clipped gradient."""
    update(run, training_batches(run.settings, run.data.train, 0))
    moments = [state["exp_avg"].flatten() for state in run.optimizer.state.values()]
    return torch.cat(moments).norm().item()


# Runs of several flags that do not touch one another's probes. flag -> what it must do: a probe of the run, what it gives by
# default and what with the flag. None: only that it differs.
KNOBS = [
    {
        "--policy.optimizer_lr=0.01": (lambda run: rates(run)[0], 0.001, 0.01),
        "--policy.optimizer_weight_decay=0.5": (lambda run: adam(run, "weight_decay"), 1e-10, 0.5),
        "--policy.optimizer_betas=[0.8,0.9]": (lambda run: adam(run, "betas"), (0.9, 0.95), (0.8, 0.9)),
        "--policy.optimizer_eps=1e-5": (lambda run: adam(run, "eps"), 1e-8, 1e-5),
        "--batch_size=3": (lambda run: batch(run)["action"].shape[0], 4, 3),
        "--policy.num_vlm_layers=2": (lambda run: len(pair(run).get_vlm_model().text_model.layers), 4, 2),
        "--policy.vlm_model_name=WIDE": (lambda run: model(run).state_proj.out_features, 48, 64),
        "--policy.max_state_dim=8": (lambda run: model(run).state_proj.in_features, 32, 8),
        "--policy.max_action_dim=9": (lambda run: model(run).action_in_proj.in_features, 32, 9),
        "--policy.chunk_size=8": (lambda run: batch(run)["action"].shape[1], 6, 8),
        "--policy.resize_imgs_with_padding=[64,32]": (lambda run: frames(run)[0].shape[-2:], (32, 32), (32, 64)),
        "--policy.tokenizer_max_length=7": (words, 21, 7),
        "--policy.train_state_proj=false": (lambda run: trained(run, "state_proj"), {True}, {False}),
    },
    {
        "--policy.scheduler_warmup_steps=3": (lambda run: rates(run)[0], 0.001, 0.001 / 4),
        "--gradient_accumulation_steps=2": (lambda run: run.samples, 4, 8),
        "--dataset.episodes=[1,3]": (lambda run: run.data.train.num_episodes, 4, 2),
        "--policy.expert_width_multiplier=0.5": (lambda run: model(run).action_in_proj.out_features, 36, 24),
        "--policy.pad_language_to=max_length": (words, 21, 48),
        "--policy.empty_cameras=1": (lambda run: len(frames(run)), 2, 3),
        "--policy.train_expert_only=false": (lambda run: trained(run, "text_model.layers.0"), {False}, {True}),
    },
    {
        "--policy.scheduler_decay_lr=0.0005": (lambda run: rates(run, 101)[100], 1e-4, 5e-4),
        "--dataset.eval_split=0.25": (lambda run: run.data.train.num_episodes, 4, 3),
        "--policy.attention_mode=self_attn": (cross_layers, [36, 16, 36, 16], [36, 36, 36, 36]),
        "--policy.add_image_special_tokens=true": (lambda run: prefix(run).shape[1], 30, 36),
        "--policy.train_expert_only=false --policy.freeze_vision_encoder=false": (sees, {False}, {True}),
    },
    {
        "--policy.scheduler_decay_steps=2": (lambda run: rates(run)[2], None, 1e-4),
        "--seed=5": (lambda run: batch(run)["index"].tolist(), None, None),
        "--policy.self_attn_every_n_layers=4": (cross_layers, [36, 16, 36, 16], [36, 16, 16, 16]),
        "--policy.prefix_length=40": (lambda run: prefix(run).shape[1], 30, 40),
    },
    {
        '--policy.normalization_mapping={"ACTION":"IDENTITY"}': (lambda run: batch(run)["action"].std().item(), None, None),
        "--policy.min_period=0.04": (lambda run: suffix(run).sum().item(), None, None),
    },
    {
        "--implementation=lerobot": (lambda run: type(run.policy).__module__[:7], "smolvla", "lerobot"),
        "--policy.num_expert_layers=2 --policy.self_attn_every_n_layers=0": (experts, 4, 2),
    },
    {
        "--policy.optimizer_grad_clip_norm=1e-6": (first_moment_norm, None, 1e-7),
    },
]  # fmt: skip
# Schedules of 100 steps, as long as the runs: shorter runs squeeze them.
ALWAYS = (
    "--steps=100", "--policy.scheduler_decay_steps=100", "--policy.scheduler_decay_lr=1e-4",
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(bench_top):
    return bench_top.backbone("wide", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def default(bench_top, tmp_path_factory):
    torch.manual_seed(0)
    return bench_top.prepare(tmp_path_factory.mktemp("default") / "run", *ALWAYS)


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: next(iter(knobs)))
def test_knobs_reach_the_run(knobs, bench_top, default, wide, tmp_path):
    if any("clip" in flag for flag in knobs):  # its probe takes a step
        default = bench_top.prepare(tmp_path / "default", *ALWAYS)
    torch.manual_seed(0)
    changed = bench_top.prepare(
        tmp_path / "run", *ALWAYS, *" ".join(knobs).replace("WIDE", str(wide)).split()
    )
    for flag, (probe, usual, expected) in knobs.items():
        found = probe(default), probe(changed)
        assert found[0] != found[1], flag
        for value, wanted in zip(found, (usual, expected), strict=True):
            # 1e-6: rates and norms are computed in another order than they are written down here.
            near = pytest.approx(wanted, rel=1e-6) if isinstance(wanted, float) else wanted
            assert wanted is None or value == near, flag


def test_bf16_computes_in_bf16_and_close_to_fp32(bench_top, tmp_path):
    seen = {}
    for dtype in ("fp32", "bf16"):
        run = bench_top.prepare(tmp_path / f"{dtype}-parts", f"--dtype={dtype}", "--fast=off")
        kinds = set()
        layer = pair(run).lm_expert.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output, kinds=kinds: kinds.add(output.dtype))
        update(run, training_batches(run.settings, run.data.train, 0))
        assert bench_top.command(tmp_path / dtype, f"--dtype={dtype}", "--log_freq=1", "--fast=off") == 0
        seen[dtype] = kinds, [entry["loss"] for entry in read_log(tmp_path / dtype)]
        assert all(p.dtype is torch.float32 for p in run.policy.parameters())
    assert seen["fp32"][0] == {torch.float32} and seen["bf16"][0] == {torch.bfloat16}
    assert seen["fp32"][1] != seen["bf16"][1]
    # 2 %: bf16 rounds each product by 2^-9, and a dozen layers do not add that up to more than ten times as much.
    assert seen["bf16"][1] == pytest.approx(seen["fp32"][1], rel=0.02)
