"""Our SmolVLA against LeRobot's own class on the same weights, bit by bit, over a grid of configurations.

Both run the same ATen calls in the same order on the same CPU, so no tolerance is needed anywhere in this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig as LeRobotRTCConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig as LeRobotConfig
from support.smolvla_pairs import (
    ACTION,
    CAMERAS,
    STATE,
    Pair,
    add_targets,
    assert_same,
    copied,
    lerobot_config,
    make_batch,
    make_noise,
    make_pair,
    our_config,
)

pytestmark = pytest.mark.reference

SCHEDULES = ("ZEROS", "ONES", "LINEAR", "EXP")


def _rtc(**fields: Any) -> LeRobotRTCConfig:
    return LeRobotRTCConfig(**fields)


# name -> fields of SmolVLAConfig. Prefixed with _: the backbone, and what the batch looks like.
GRID: dict[str, dict[str, Any]] = {
    "default": {},
    "batch_of_one": dict(_size=1),
    "frames_with_history": dict(_history=True),
    "upright_frames": dict(_frame=(50, 30)),
    "long_language": dict(_tokens=60),
    "chunk_size": dict(chunk_size=5, n_action_steps=5),
    "chunk_of_one": dict(chunk_size=1, n_action_steps=1),
    "n_action_steps": dict(n_action_steps=3),
    "max_state_dim": dict(max_state_dim=9),
    "max_action_dim": dict(max_action_dim=11),
    "unpadded_dims": dict(max_state_dim=6, max_action_dim=6),
    "larger_images": dict(resize_imgs_with_padding=(48, 48)),
    "unresized_images": dict(resize_imgs_with_padding=None, _frame=(32, 32)),
    "empty_camera": dict(empty_cameras=1),
    "two_empty_cameras": dict(empty_cameras=2),
    "one_camera_missing": dict(_cameras=CAMERAS[:1]),
    "one_camera_replaced": dict(empty_cameras=1, _cameras=CAMERAS[:1]),
    "camera_masks": dict(_masks=True),
    "aloha": dict(adapt_to_pi_aloha=True, state_dim=14, action_dim=14),
    "num_steps": dict(num_steps=7),
    "one_step": dict(num_steps=1),
    "no_cache": dict(use_cache=False, _no_sampling=True),
    "train_vision": dict(freeze_vision_encoder=False),
    "train_vlm": dict(train_expert_only=False),
    "train_everything": dict(train_expert_only=False, freeze_vision_encoder=False),
    "frozen_state_proj": dict(train_state_proj=False),
    "special_tokens": dict(add_image_special_tokens=True),
    "prefix_length": dict(prefix_length=40),
    "prefix_length_too_short": dict(prefix_length=4),
    "fewer_expert_layers": dict(num_expert_layers=2, self_attn_every_n_layers=0),
    "one_expert_layer": dict(num_expert_layers=1, self_attn_every_n_layers=4),
    "fewer_expert_layers_trained": dict(
        num_expert_layers=2, attention_mode="self_attn", train_expert_only=False, _no_sampling=True
    ),
    "num_vlm_layers": dict(num_vlm_layers=3),
    "one_vlm_layer": dict(num_vlm_layers=1),
    "all_vlm_layers": dict(num_vlm_layers=0),
    "more_vlm_layers_than_there_are": dict(num_vlm_layers=16),
    "every_layer_cross": dict(self_attn_every_n_layers=0),
    "every_layer_cross_negative": dict(self_attn_every_n_layers=-1),
    "every_layer_self": dict(self_attn_every_n_layers=1),
    "every_third_layer_self": dict(self_attn_every_n_layers=3),
    "narrow_expert": dict(expert_width_multiplier=0.5),
    "wide_expert": dict(expert_width_multiplier=1.0),
    "self_attn": dict(attention_mode="self_attn"),
    "periods": dict(min_period=2e-2, max_period=9.0),
    "rtc_disabled": dict(rtc_config=_rtc(enabled=False, debug=True)),
    "vlm_weights": dict(_backbone="weights", load_vlm_weights=True),
    "vlm_weights_trained": dict(_backbone="weights", load_vlm_weights=True, train_expert_only=False),
    "odd_backbone": dict(_backbone="odd", expert_width_multiplier=0.5),
    "biased_backbone": dict(_backbone="biased"),
    "ungrouped_backbone": dict(_backbone="ungrouped"),
    "bf16_text_backbone": dict(_backbone="bf16_text"),
    "mixture": dict(
        chunk_size=6, n_action_steps=4, num_steps=4, num_vlm_layers=3, self_attn_every_n_layers=3, empty_cameras=1,
        add_image_special_tokens=True, prefix_length=50, expert_width_multiplier=0.5, train_expert_only=False,
        freeze_vision_encoder=False, max_state_dim=20, max_action_dim=7, _cameras=CAMERAS[1:], _size=3,
    ),
    "everything": dict(
        _backbone="biased", attention_mode="self_attn", add_image_special_tokens=True, min_period=1e-2, max_period=2.0,
        train_expert_only=False, adapt_to_pi_aloha=True, state_dim=14, action_dim=14, max_action_dim=16,
    ),
}  # fmt: skip

# Fields that no forward pass depends on, and where they are compared.
ELSEWHERE = {
    "tokenizer_max_length": "test_smolvla_processors",
    "pad_language_to": "test_smolvla_processors",
    "normalization_mapping": "test_smolvla_processors",
    "compile_model": "test_compile_model_compiles_the_same_functions",
    "compile_mode": "test_compile_model_compiles_the_same_functions",
    **dict.fromkeys(
        (f.name for f in dataclasses.fields(LeRobotConfig) if f.name.startswith(("optimizer_", "scheduler_"))),
        "test_smolvla_config",
    ),
    **dict.fromkeys(
        ("n_obs_steps", "device", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license"),
        "test_smolvla_config",
    ),
    **dict.fromkeys(("pretrained_path", "pretrained_revision", "use_delta_joint_actions_aloha"), "test_smolvla_config"),
}  # fmt: skip


@dataclasses.dataclass
class Case:
    name: str
    config: LeRobotConfig
    pair: Pair
    options: dict[str, Any]

    def batch(self, seed: int = 1) -> dict[str, torch.Tensor]:
        options = {
            key: self.options[key] for key in ("cameras", "frame", "history", "tokens") if key in self.options
        }
        batch = make_batch(self.config, self.options.get("size", 2), seed, **options)
        if self.options.get("masks"):
            batch[f"{CAMERAS[1]}_padding_mask"] = torch.tensor([0, 1])
        return batch

    def noise(self, seed: int = 3) -> torch.Tensor:
        return make_noise(self.config, self.options.get("size", 2), seed)


def make_case(name: str, backbones) -> Case:
    fields = dict(GRID[name])
    options = {key[1:]: fields.pop(key) for key in list(fields) if key.startswith("_")}
    config = lerobot_config(backbones(options.get("backbone", "plain")), **fields)
    return Case(name, config, make_pair(config), options)


_CASES: dict[str, Case] = {}


@pytest.fixture
def case(request, backbones) -> Case:
    """A configuration of the grid and its two policies, made once."""
    if request.param not in _CASES:
        _CASES[request.param] = make_case(request.param, backbones)
    return _CASES[request.param]


every_case = pytest.mark.parametrize("case", list(GRID), indirect=True)
# LeRobot cannot sample with the others.
sampling_case = pytest.mark.parametrize(
    "case", [name for name in GRID if not GRID[name].get("_no_sampling")], indirect=True
)

# All four by the first case, two in turn by the others.
LOSS_CASES = [
    pytest.param(
        name, reduction, padded,
        marks=pytest.mark.long if i and (padded == (reduction == "mean")) != bool(i % 2) else (),
        id=f"{name}-{reduction}-{'padded' if padded else 'whole'}",
    )
    for i, name in enumerate(GRID)
    for reduction in ("mean", "none")
    for padded in (True, False)
]  # fmt: skip

# test_chunks_equal_lerobots compares chunks of every case; the queue and the drawing of noise depend on these cases alone.
QUEUES = {
    "default", "batch_of_one", "frames_with_history", "chunk_size", "chunk_of_one", "n_action_steps", "max_action_dim",
    "one_camera_missing", "aloha", "rtc_disabled", "mixture", "everything",
}  # fmt: skip
queue_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name in QUEUES else pytest.mark.long)
        for name in GRID
        if not GRID[name].get("_no_sampling")
    ],
    indirect=True,
)

# Frozen parameters and modes depend on these fields alone, and on the backbone.
FREEZING = {
    "train_expert_only", "freeze_vision_encoder", "train_state_proj", "num_expert_layers", "num_vlm_layers",
    "self_attn_every_n_layers", "attention_mode", "load_vlm_weights", "_backbone",
}  # fmt: skip
freezing_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name == "default" or FREEZING & fields.keys() else pytest.mark.long)
        for name, fields in GRID.items()
    ],
    indirect=True,
)

# The first case takes all schedules, the others one in turn: a schedule weights the chunk, whatever the policy. Guidance
# depends on a policy by its chunks alone, so every second case will do.
RTC_CASES = [
    pytest.param(name, schedule, marks=() if i % 2 == 0 else pytest.mark.long)
    for i, name in enumerate(name for name in GRID if not GRID[name].get("_no_sampling"))
    for schedule in (SCHEDULES if i == 0 else [SCHEDULES[i // 2 % len(SCHEDULES)]])
]


def test_grid_covers_every_field():
    """Each field at a value other than its default, in the grid or in the named test."""
    defaults = {f.name: f for f in dataclasses.fields(LeRobotConfig)}
    changed = {key for fields in GRID.values() for key in fields if not key.startswith("_")}
    always = {"input_features", "output_features", "vlm_model_name"}
    uncovered = set(defaults) - changed - always - set(ELSEWHERE)
    assert not uncovered, f"no configuration changes {sorted(uncovered)}"
    reference = LeRobotConfig(device="cpu")
    for name, fields in GRID.items():
        for key, value in fields.items():
            if key in defaults and len(fields) == 1:
                changed_here = value != getattr(reference, key) or key == "num_vlm_layers"
                assert changed_here, f"{name} leaves {key} at its default"


@sampling_case
def test_chunks_equal_lerobots(case):
    pair = case.pair
    for seed in (3, 4):
        stock = pair.stock.predict_action_chunk(copied(case.batch(seed)), noise=case.noise(seed))
        ours = pair.ours.predict_action_chunk(copied(case.batch(seed)), noise=case.noise(seed))
        assert stock.abs().max() > 0.1, "the chunk says nothing"
        assert_same("chunks", case.name, stock, ours)


@queue_case
def test_chunks_with_drawn_noise_equal_lerobots(case):
    pair = case.pair
    chunks = []
    for policy in (pair.stock, pair.ours):
        torch.manual_seed(11)
        chunks.append(policy.predict_action_chunk(copied(case.batch())))
    assert_same("chunks", case.name, *chunks)


@queue_case
def test_queue_serves_lerobots_actions(case):
    """Two refills, then a reset in mid-queue."""
    pair = case.pair
    torch.manual_seed(12)
    start = torch.get_rng_state()
    actions = []
    for policy in (pair.stock, pair.ours):
        torch.set_rng_state(start)
        policy.reset()
        served = [policy.select_action(copied(case.batch(i))) for i in range(case.config.n_action_steps + 2)]
        policy.reset()
        served.append(policy.select_action(copied(case.batch())))
        actions.append(served)
    for stock, ours in zip(*actions, strict=True):
        assert_same("actions", case.name, stock, ours)


@pytest.mark.training
@pytest.mark.parametrize(("case", "reduction", "padded"), LOSS_CASES, indirect=["case"])
def test_losses_and_gradients_equal_lerobots(case, reduction, padded):
    batch = add_targets(case.config, case.batch())
    if not padded:
        del batch["action_is_pad"]
    time = torch.linspace(0.1, 0.9, case.noise().shape[0])
    results = []
    for policy in (case.pair.stock, case.pair.ours):
        policy.train()
        policy.zero_grad(set_to_none=True)
        loss, record = policy(copied(batch), noise=case.noise(), time=time, reduction=reduction)
        loss.sum().backward()
        results.append((loss, record, {name: p.grad for name, p in policy.named_parameters()}))
        policy.zero_grad(set_to_none=True)
        policy.eval()
    (loss, record, grads), (our_loss, our_record, our_grads) = results
    assert_same("losses", case.name, loss, our_loss)
    assert record.keys() == our_record.keys()
    for key in record:
        assert_same("logged losses", case.name, record[key], our_record[key])
    assert grads.keys() == our_grads.keys()
    assert any(g is not None and g.abs().max() > 0 for g in grads.values())
    for name in grads:
        assert_same("gradients", f"{case.name}", grads[name], our_grads[name])


@every_case
@pytest.mark.training
def test_losses_with_drawn_noise_and_time_equal_lerobots(case):
    losses = []
    for policy in (case.pair.stock, case.pair.ours):
        torch.manual_seed(13)
        with torch.no_grad():
            losses.append(policy(add_targets(case.config, case.batch()))[0])
    assert_same("losses", case.name, *losses)


@freezing_case
def test_frozen_parameters_and_modes_equal_lerobots(case):
    """requires_grad of every parameter, and the mode of every submodule after construction, train() and eval()."""
    stock, ours = make_pair(case.config).stock, case.pair.ours.__class__(our_config(case.config))
    wanted, got = (dict(p.named_parameters()) for p in (stock, ours))
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert_same("requires_grad", case.name, wanted[name].requires_grad, got[name].requires_grad)
        assert wanted[name].dtype == got[name].dtype, name
    for change in (lambda p: None, lambda p: p.train(), lambda p: p.eval(), lambda p: p.train(True)):
        change(stock), change(ours)
        # Lists of layers do nothing in either mode; stock leaves one behind in training mode when it cuts the
        # VLM.
        modes, ours_modes = (
            {n: m.training for n, m in p.named_modules() if not isinstance(m, torch.nn.ModuleList)}
            for p in (stock, ours)
        )
        for name in ours_modes.keys() & modes.keys():
            assert_same("training flags", case.name, modes[name], ours_modes[name])
        # Stock has modules of its own for activations and rotary tables, which hold no parameters.
        extra = {
            name
            for name in modes.keys() - ours_modes.keys()
            if not name.endswith(("activation_fn", "act_fn"))
        }
        assert all("rotary_emb" in name or name.endswith(".act") for name in extra), extra


@pytest.mark.parametrize(("case", "schedule"), RTC_CASES, indirect=["case"])
def test_rtc_chunks_equal_lerobots(case, schedule):
    """Guided chunks over delays, horizons and lengths of what is left of the previous chunk."""
    pair = case.pair
    size, length = case.noise().shape[:2]
    kept = pair.stock.config.rtc_config, pair.ours.config.rtc_config
    settings = _rtc(
        prefix_attention_schedule=schedule, max_guidance_weight=4.0, execution_horizon=max(1, length // 2)
    )
    for policy in (pair.stock, pair.ours):
        policy.config.rtc_config = settings
        policy.init_rtc_processor()
    previous = make_noise(case.config, size, 7)
    action_dim = case.config.action_feature.shape[0]
    asked = [
        dict(inference_delay=0, prev_chunk_left_over=None),
        dict(inference_delay=2, prev_chunk_left_over=previous),
        dict(
            inference_delay=1,
            prev_chunk_left_over=previous[:, : length // 2 + 1, :action_dim],
            execution_horizon=4,
        ),
        dict(inference_delay=length, prev_chunk_left_over=previous[0] if size == 1 else previous),
    ]
    try:
        for kwargs in asked:
            stock = pair.stock.predict_action_chunk(copied(case.batch()), noise=case.noise(), **kwargs)
            ours = pair.ours.predict_action_chunk(copied(case.batch()), noise=case.noise(), **kwargs)
            assert_same("RTC chunks", case.name, stock, ours)
    finally:
        for policy, config in zip((pair.stock, pair.ours), kept, strict=True):
            policy.config.rtc_config = config
            policy.init_rtc_processor()
            policy.model.rtc_processor = policy.rtc_processor


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (40, 40), None])
@pytest.mark.parametrize("frame", [(24, 40), (50, 30), (32, 32), (7, 90), (480, 640)])
def test_prepared_images_equal_lerobots(backbones, size, frame):
    """Frames of any shape into any size: the width comes first in the setting."""
    config = lerobot_config(backbones(), resize_imgs_with_padding=size, empty_cameras=1)
    pair = _prepare_only(config)
    batch = make_batch(config, cameras=CAMERAS[:1], frame=frame)
    (stock, stock_masks), (ours, our_masks) = (p.prepare_images(dict(batch)) for p in (pair.stock, pair.ours))
    assert len(stock) == len(ours) == 2
    for a, b in zip([*stock, *stock_masks], [*ours, *our_masks], strict=True):
        assert_same("prepared images", f"resize_{size}", a, b)


def _prepare_only(config: LeRobotConfig) -> Pair:
    """Policies without a model, for the methods that need none."""
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy as LeRobotPolicy

    from smolvla_fast.smolvla import SmolVLAPolicy

    pair = Pair(LeRobotPolicy.__new__(LeRobotPolicy), SmolVLAPolicy.__new__(SmolVLAPolicy))
    for policy, settings in ((pair.stock, config), (pair.ours, our_config(config))):
        torch.nn.Module.__init__(policy)
        settings.validate_features()
        policy.config, policy._warned_cameras = settings, False
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frame", [(32, 32), (16, 16), (48, 48), (64, 64), (20, 36)])
def test_patch_positions_equal_lerobots(backbones, frame, dtype):
    """Patch embeddings, whose positions depend on the frame's size and on the dtype the fractions are rounded to."""
    pair = _cached_default(backbones)
    image = torch.rand(2, 3, *frame, dtype=dtype)
    mask = torch.ones(2, frame[0] // 4, frame[1] // 4, dtype=torch.bool)
    outputs = []
    for policy in (pair.stock, pair.ours):
        embeddings = policy.model.vlm_with_expert.get_vlm_model().vision_model.embeddings.to(dtype)
        outputs.append(embeddings(pixel_values=image, patch_attention_mask=mask))
        embeddings.to(torch.float32)
    assert_same("patch embeddings", f"frame_{frame}", *outputs)


_DEFAULT: list[Pair] = []


def _cached_default(backbones) -> Pair:
    if not _DEFAULT:
        _DEFAULT.append(make_pair(lerobot_config(backbones())))
    return _DEFAULT[0]


def test_denoise_step_and_embed_prefix_equal_lerobots(backbones):
    """Some callers use denoise_step and embed_prefix themselves."""
    pair = _cached_default(backbones)
    batch, x, time = make_batch(pair.stock.config), make_noise(pair.stock.config), torch.tensor([0.7, 0.3])
    velocities = []
    for policy in (pair.stock, pair.ours):
        model = policy.model
        images, masks = policy.prepare_images(batch)
        prefix, pad, att = model.embed_prefix(
            images, masks, batch["observation.language.tokens"], batch["observation.language.attention_mask"],
            state=policy.prepare_state(batch),
        )  # fmt: skip
        blocks = torch.cumsum(att, dim=1)
        visible = (blocks[:, None, :] <= blocks[:, :, None]) & pad[:, None, :] & pad[:, :, None]
        _, cache = model.vlm_with_expert.forward(
            attention_mask=visible, position_ids=torch.cumsum(pad, dim=1) - 1, inputs_embeds=[prefix, None],
            use_cache=True,
        )  # fmt: skip
        first = model.denoise_step(prefix_pad_masks=pad, past_key_values=cache, x_t=x, timestep=time)
        again = model.denoise_step(prefix_pad_masks=pad, past_key_values=cache, x_t=x, timestep=time)
        velocities.append((prefix, pad, att, *model.embed_suffix(x, time), first, again))
    for stock, ours in zip(*velocities, strict=True):
        assert_same("denoise_step", "default", stock, ours)


def test_rtc_debug_record_equals_lerobots(backbones):
    """What the tracker keeps of each step, and which steps it drops."""
    config = lerobot_config(backbones(), rtc_config=_rtc(debug=True, debug_maxlen=4), num_steps=6)
    pair = make_pair(config)
    for policy in (pair.stock, pair.ours):
        policy.predict_action_chunk(
            make_batch(config),
            noise=make_noise(config),
            inference_delay=1,
            prev_chunk_left_over=make_noise(config, 2, 9),
        )
    stock, ours = (policy.rtc_processor.get_all_debug_steps() for policy in (pair.stock, pair.ours))
    assert len(stock) == len(ours) == 4
    for a, b in zip(stock, ours, strict=True):
        for entry in dataclasses.fields(a):
            assert_same("RTC debug record", "rtc_debug", getattr(a, entry.name), getattr(b, entry.name))
    pair.ours.rtc_processor.reset_tracker()
    assert pair.ours.rtc_processor.get_all_debug_steps() == []


def test_compile_model_compiles_the_same_functions(backbones, monkeypatch):
    """Both hand sampling and the loss to torch.compile with the mode asked for; ours leaves global settings alone."""
    asked: list[tuple[str, str]] = []

    def compile(function, mode):
        asked.append((function.__name__, mode))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    precision = torch.get_float32_matmul_precision()
    try:
        config = lerobot_config(backbones(), compile_model=True, compile_mode="reduce-overhead")
        make_pair(config)
        wanted = [("sample_actions", "reduce-overhead"), ("forward", "reduce-overhead")]
        assert asked == wanted * 2
        torch.set_float32_matmul_precision("highest")
        from smolvla_fast.smolvla import SmolVLAPolicy

        SmolVLAPolicy(our_config(config))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_batch_is_left_as_it_was(backbones):
    """Unlike LeRobot's Aloha conversion, which changes the caller's tensors, so that a batch used twice is wrong."""
    config = lerobot_config(backbones(), adapt_to_pi_aloha=True, state_dim=14, action_dim=14)
    pair = make_pair(config)
    batch = add_targets(config, make_batch(config))
    before = copied(batch)
    noise = make_noise(config)
    first = pair.ours.predict_action_chunk(batch, noise=noise)
    pair.ours(batch, noise=noise, time=torch.tensor([0.5, 0.5]))
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in (STATE, ACTION))
    assert torch.equal(first, pair.ours.predict_action_chunk(batch, noise=noise))


def test_rtc_works_where_autograd_is_off(backbones):
    """LeRobot's RTC raises under inference mode; ours gives the chunk it gives elsewhere."""
    config = lerobot_config(backbones(), rtc_config=_rtc())
    pair = make_pair(config)
    asked = dict(noise=make_noise(config), inference_delay=2, prev_chunk_left_over=make_noise(config, 2, 9))
    wanted = pair.stock.predict_action_chunk(make_batch(config), **asked)
    with torch.inference_mode():
        assert torch.equal(wanted, pair.ours.predict_action_chunk(make_batch(config), **asked))


@pytest.mark.long
@pytest.mark.slow
def test_full_size_chunk_equals_lerobots(tmp_path_factory, monkeypatch):
    """One chunk of the 450 million parameter model, two cameras of 480x640, ten steps, in one batch."""
    from smolvla_fast.smolvla import SmolVLAPolicy
    from smolvla_fast.testing.policies import make_vlm_folder

    torch.set_num_threads(2)
    # Random values are about to be replaced, and LeRobot builds all of the backbone's layers before it cuts them.
    monkeypatch.setattr("smolvla_fast.smolvla.smolvlm.initialise_weights", lambda module, std: None)
    folder = make_vlm_folder(tmp_path_factory.mktemp("full"), text={"num_hidden_layers": 16})
    config = lerobot_config(
        str(folder), num_vlm_layers=16, chunk_size=50, n_action_steps=50, num_steps=10, frame=(3, 480, 640),
        resize_imgs_with_padding=(512, 512),
    )  # fmt: skip
    pair = make_pair(config, stirred="expert")
    assert sum(p.numel() for p in pair.ours.parameters()) == 450_046_176
    assert isinstance(pair.ours, SmolVLAPolicy)
    batch = make_batch(config, 1, frame=(480, 640), tokens=48)
    stock = pair.stock.predict_action_chunk(dict(batch), noise=make_noise(config, 1))
    ours = pair.ours.predict_action_chunk(dict(batch), noise=make_noise(config, 1))
    assert_same("chunks", "full_size", stock, ours)
