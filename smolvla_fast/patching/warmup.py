"""A chunk before the first real one, so that this is not slow: what is built, compiled or captured is so by then."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from .rtc import guidance_reason, guided
from .served import uncounted


def warm_up(policy: Any, example: Any) -> None:
    """One chunk and, with real-time chunking on, a guided one: the two graphs that a robot replays.

    None where every chunk goes to stock: RTC's debug tracker would keep a record of these, RTC without a processor raises.
    """
    model = policy.model
    device = model.state_proj.weight.device
    if guidance_reason(model, {}, 1, device) is not None:
        return
    calls: list[dict[str, Any]] = [{}]
    # Guidance is data of one shape: leftovers are padded to a chunk, so one number stands for any of them.
    left = dict(inference_delay=0, prev_chunk_left_over=torch.ones(1, 1, device=device))
    if guided(model, left) and guidance_reason(model, left, 1, device) is None:
        calls.append(left)
    for kwargs in calls:
        with uncounted():
            _one(policy, example, kwargs)


def _one(policy: Any, example: Any, kwargs: dict[str, Any]) -> None:
    """One chunk of an example batch, or of drawn numbers where it is True."""
    model = policy.model
    device, config = model.state_proj.weight.device, model.config
    if example is True:
        side = model.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        # Of numbers that differ: where the warm-up is a trial, a fault that zeros would hide is to show.
        empty = [("empty_camera" in name) for name in config.image_features]
        images = [
            torch.full_like(x, -1.0) if none else x.tanh()
            for none in empty
            for x in [drawn(1, 3, side, side)]
        ]
        masks = [torch.full((1,), not none, dtype=torch.bool, device=device) for none in empty]
        length = config.tokenizer_max_length
        rows = model.vlm_with_expert.get_vlm_model().text_model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(rows, (1, length), generator=generator).to(device)
        token_masks = torch.ones_like(tokens, dtype=torch.bool)
        if getattr(config, "pad_language_to", None) == "max_length":
            token_masks[:, length // 2 :] = False
        state, noise = drawn(1, config.max_state_dim), drawn(1, config.chunk_size, config.max_action_dim)
        with torch.no_grad():
            model.sample_actions(images, masks, tokens, token_masks, state, noise=noise, **kwargs)
    else:
        batch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in example.items()}
        shape = (batch["observation.state"].shape[0], config.chunk_size, config.max_action_dim)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        policy.predict_action_chunk(batch, noise=noise, **kwargs)


def took(device: torch.device, started: float, checked: float) -> str:
    """How long a warm-up took, in its parts: a look through the model; the first chunk, which compiles and captures."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ended = time.perf_counter()
    return f"; warm-up {ended - started:.2f} s (checks {checked - started:.2f} s, first chunk {ended - checked:.2f} s)"
