"""Pairs of policies with the same weights, LeRobot's and ours, and everything that is compared between them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig as LeRobotConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy as LeRobotPolicy
from torch import Tensor, nn

from smolvla_fast.smolvla import SmolVLAConfig, SmolVLAPolicy
from smolvla_fast.testing.policies import make_vlm_folder

TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
    patch_size=4,
)  # fmt: skip
VOCAB = 320
# Backbones that differ in what a configuration file can say.
BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": dict(text=dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=20)),
    "biased": dict(text=dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)),
    "ungrouped": dict(text=dict(num_key_value_heads=4), vision=dict(hidden_act="gelu", layer_norm_eps=1e-3)),
    "bf16_text": dict(text=dict(dtype="bfloat16")),
}
CAMERAS = ("observation.images.camera1", "observation.images.camera2")
STATE, ACTION = "observation.state", "action"
TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


def make_backbone(root: Path, kind: str) -> str:
    """The folder of a tiny backbone; "weights" is "plain" with a saved checkpoint of random weights."""
    folder = root / kind
    if folder.is_dir():
        return str(folder)
    sizes = BACKBONES.get(kind, {})
    text, vision = {**TEXT, **sizes.get("text", {})}, {**VISION, **sizes.get("vision", {})}
    make_vlm_folder(folder, text=text, vision=vision, vocab_size=VOCAB)
    if kind == "weights":
        from transformers import AutoConfig, SmolVLMForConditionalGeneration

        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = SmolVLMForConditionalGeneration(AutoConfig.from_pretrained(folder))
            stir(model)
            model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def stir(module: nn.Module) -> None:
    """Weights at which everything matters: attention far from uniform, biases and norms away from their first
    values."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.3 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)


@dataclass
class Pair:
    """The same policy twice."""

    stock: LeRobotPolicy
    ours: SmolVLAPolicy


def lerobot_config(backbone: str, **fields: Any) -> LeRobotConfig:
    """A configuration of LeRobot's own class for tiny models."""
    cameras = fields.pop("cameras", CAMERAS)
    frame = fields.pop("frame", (3, 24, 40))
    dims = fields.pop("state_dim", 6), fields.pop("action_dim", 6)
    settings: dict[str, Any] = dict(
        device="cpu", chunk_size=8, n_action_steps=8, num_steps=3, num_vlm_layers=4,
        resize_imgs_with_padding=(32, 32),
    )  # fmt: skip
    features = {camera: PolicyFeature(FeatureType.VISUAL, frame) for camera in cameras}
    features[STATE] = PolicyFeature(FeatureType.STATE, (dims[0],))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (dims[1],))}
    settings |= dict(vlm_model_name=backbone, input_features=features, output_features=outputs)
    return LeRobotConfig(**settings | fields)


def our_config(config: LeRobotConfig) -> SmolVLAConfig:
    """The same configuration, through the JSON that LeRobot writes."""
    size = config.resize_imgs_with_padding
    # LeRobot accepts None for the size but cannot write it.
    values = draccus.encode(
        dataclasses.replace(config, resize_imgs_with_padding=size or (1, 1)), PreTrainedConfig
    )
    return SmolVLAConfig.from_dict({**values, "resize_imgs_with_padding": size})


def make_pair(config: LeRobotConfig, seed: int = 0, stirred: str = "all") -> Pair:
    """Both policies, weights copied from LeRobot's to ours by name; every name must match.

    stirred  "all" weights, or those of the "expert" alone: the backbone keeps what it was loaded or started with
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):
            stock = LeRobotPolicy(config)
        if config.load_vlm_weights or stirred == "expert":
            stir(stock.model.vlm_with_expert.lm_expert)
        else:
            stir(stock)
        ours = SmolVLAPolicy(our_config(config))
    ours.load_state_dict(stock.state_dict(), strict=True)
    return Pair(stock, ours)


def make_batch(config: LeRobotConfig, size: int = 2, seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """A preprocessed observation; ``cameras`` present, ``frame`` (h, w), ``history`` adds a time dimension."""
    generator = torch.Generator().manual_seed(seed)
    height, width = options.get("frame", (24, 40))
    length = options.get("tokens", 12)
    batch = {}
    for camera in options.get("cameras", [c for c in config.image_features if "empty_camera" not in c]):
        batch[camera] = torch.rand(size, 3, height, width, generator=generator)
    batch[STATE] = torch.randn(size, config.robot_state_feature.shape[0], generator=generator)
    batch[TOKENS] = torch.randint(3, 250, (size, length), generator=generator)
    # A padding token among the valid ones: its row of the embedding gets no gradient.
    backbone = json.loads((Path(config.vlm_model_name) / "config.json").read_text())
    batch[TOKENS][:, 1] = backbone["text_config"]["pad_token_id"]
    batch[MASK] = torch.arange(length)[None, :] < torch.tensor([length - 3 * i for i in range(size)])[:, None]
    if options.get("history"):
        for key in (*[k for k in batch if "images" in k], STATE):
            batch[key] = torch.stack([torch.zeros_like(batch[key]), batch[key]], dim=1)
    return batch


def add_targets(config: LeRobotConfig, batch: dict[str, Tensor], seed: int = 2) -> dict[str, Tensor]:
    """``batch`` with actions, and flags that say which of them lie beyond the end of an episode."""
    generator = torch.Generator().manual_seed(seed)
    size = batch[STATE].shape[0]
    shape = (size, config.chunk_size, config.action_feature.shape[0])
    ends = torch.tensor([config.chunk_size - 2 * i for i in range(size)])
    return {
        **batch,
        ACTION: torch.randn(shape, generator=generator),
        "action_is_pad": torch.arange(config.chunk_size)[None, :] >= ends[:, None],
    }


def make_noise(config: LeRobotConfig, size: int = 2, seed: int = 3) -> Tensor:
    shape = (size, config.chunk_size, config.max_action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    """LeRobot changes some batches in place (Aloha), so each call gets its own."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


def assert_same(quantity: str, of: str, stock: Any, ours: Any) -> None:
    """Two tensors, numbers or Nones are the same bits."""
    assert _same(stock, ours), f"{of}: {quantity} differs by {_difference(stock, ours):.3e}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # torch.equal takes -0.0 for 0.0 and NaN for unequal; bytes do neither.
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and a == b


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def _difference(a: Any, b: Any) -> float:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return (a.double() - b.double()).abs().max().item()
    return abs(a - b) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else float("inf")
