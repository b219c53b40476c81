"""Input for a policy: drawn camera frames, a robot state, a tokenized task, noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .frames import draw_frame

TASK = "pick up the red cube"


def make_observation(
    policy: Any,
    *,
    batch: int = 1,
    seed: int = 0,
    cameras: int | Sequence[str] | None = None,
    task: str | Sequence[str] = TASK,
    language_length: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """A batch for ``predict_action_chunk``: drawn camera frames, a robot state and the tokenized task.

    batch            B
    seed             of frames and state
    cameras          number of the policy's cameras that are present, or their keys; None: all but the empty ones
    task             one text for all samples, or one for each
    language_length  tokens to pad the language to, without ever cutting it; None: the policy's
                     ``tokenizer_max_length``, or the longest text if that is longer
    image_size       height, width of the frames; None: as the policy's configuration declares them
    returns          frames [B, 3, height, width] fp32 in [0, 1], ``observation.state`` [B, state size] fp32,
                     ``observation.language.tokens`` [B, T] int64 and ``.attention_mask`` [B, T] bool
    raises           ValueError for a task count other than B, a length below the text's, or an unknown camera
    """
    config = policy.config
    generator = torch.Generator().manual_seed(seed)
    known = [key for key in config.image_features if "empty_camera" not in key]
    keys = known if cameras is None else known[:cameras] if isinstance(cameras, int) else list(cameras)
    missing = [key for key in keys if key not in config.image_features]
    if missing or (isinstance(cameras, int) and cameras > len(known)):
        raise ValueError(f"cameras={cameras!r}: the policy has {list(config.image_features)}")
    observation: dict[str, Tensor] = {}
    for key in keys:
        height, width = image_size or config.image_features[key].shape[1:]
        observation[key] = torch.stack([draw_frame(height, width, generator) for _ in range(batch)])
    if not keys or config.robot_state_feature is None:
        raise ValueError(
            f"SmolVLA computes with 'observation.state' and at least one camera; the policy's configuration declares "
            f"{list(config.input_features or {})}"
        )
    size = config.robot_state_feature.shape[0]
    observation["observation.state"] = torch.randn(batch, size, generator=generator)
    tokens, mask = tokenize(policy, task, batch, language_length)
    observation["observation.language.tokens"] = tokens
    observation["observation.language.attention_mask"] = mask
    device = next(policy.parameters()).device
    return {key: value.to(device) for key, value in observation.items()}


def make_noise(policy: Any, *, batch: int = 1, seed: int = 0) -> Tensor:
    """The noise a chunk starts from, [B, S, A] fp32 on the policy's device."""
    shape = (batch, policy.config.chunk_size, policy.config.max_action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    return noise.to(next(policy.parameters()).device)


def tokenize(policy: Any, task: str | Sequence[str], batch: int, length: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, T] each, as LeRobot's processor makes them: newline at the end, padding right.

    Uses the policy's own tokenizer, or the bytes of the text for a policy without one.
    """
    texts = [task] * batch if isinstance(task, str) else list(task)
    if len(texts) != batch:
        raise ValueError(f"{len(texts)} tasks for a batch of {batch}; give one text, or one for each sample")
    texts = [text if text.endswith("\n") else text + "\n" for text in texts]
    pair = policy.model.vlm_with_expert
    try:
        tokenizer = getattr(getattr(pair, "processor", None), "tokenizer", None)
    except ImportError:  # needed by the processors of images and videos alone
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(pair.model_id)
    if tokenizer is None:
        ids, pad = [list(text.encode()) for text in texts], 0
    else:
        ids, pad = [tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id
    longest = max(map(len, ids))
    if length is None:
        length = max(longest, policy.config.tokenizer_max_length)
    if length < longest:
        raise ValueError(
            f"language_length={length} would cut a task of {longest} tokens; it must be at least that"
        )
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in ids])
    mask = torch.arange(length)[None, :] < torch.tensor([len(row) for row in ids])[:, None]
    return tokens, mask
