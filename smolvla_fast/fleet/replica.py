"""One patched policy in a process of Ray's: what one replica of the deployment computes."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
import torch
from lerobot.async_inference.helpers import prepare_image
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from ray import serve
from ray.util import metrics
from torch import Tensor

from ..auto_patch import patch_or_stock
from ..patch import status

# Ray's types know batched methods of one argument alone.
batched: Any = serve.batch

Arrays = dict[str, np.ndarray]
"""Of one observation: the state [1, R] fp32 and each camera's frame [3, H, W] uint8, resized as the policy has it.

Arrays, not tensors: Ray sends arrays beside the pickle of a call, without copying them into it."""


def noise_of(seed: int, config: Any) -> Tensor:
    """[S, A] fp32: what a chunk starts from, by its own seed alone, whatever else is in the batch and on any device."""
    return torch.randn(
        config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(seed)
    )


class Replica:
    """A policy, its processors, and batches. The constructor returns when a chunk has been computed.

    path        of the checkpoint, as ``from_pretrained`` takes it      device  "cpu" or "cuda"
    precision, backend  as ``patch_or_stock`` takes them; where stock serves, ``report`` says why
    max_batch   observations in one batch      wait_s  seconds that the first of a batch waits for others
    """

    def __init__(
        self, path: str, device: str, max_batch: int, wait_s: float,
        precision: str | None = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        self._answer_batch.set_max_batch_size(max_batch)
        self._answer_batch.set_batch_wait_timeout_s(wait_s)
        self._policy = SmolVLAPolicy.from_pretrained(path).to(device).eval()
        self._device = device
        self._config = self._policy.config
        self._not_patched = patch_or_stock(self._policy, precision, backend)
        on_device = {"device_processor": {"device": device}}
        self._preprocess, self._postprocess = make_pre_post_processors(
            self._config, pretrained_path=path, preprocessor_overrides=on_device
        )
        self._chunks = metrics.Counter(
            "smolvla_fast_chunks", description="Chunks computed.", tag_keys=("served_by",)
        )
        # On a GPU a chunk of each batch size is captured once, which takes longer than many chunks.
        for batch in range(1, max_batch + 1) if device == "cuda" else [1]:
            self._compute([self._example()] * batch)

    async def __call__(self, arrays: Arrays, task: str, seed: int) -> np.ndarray:
        """The chunk [S, A] fp32 of one observation, postprocessed: what the policy answers to it alone from this noise.

        raises  what went wrong with this observation; others of its batch are answered
        """
        answer = await self._answer_batch(arrays, task, seed)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @batched
    async def _answer_batch(self, arrays: list[Arrays], tasks: list[str], seeds: list[int]) -> list[Any]:
        # Not in the event loop, in which Ray asks whether the replica is alive. One batch at a time: serve.batch has it so,
        # and LeRobot's processor steps keep what they are working on.
        return await asyncio.to_thread(self._answers, list(zip(arrays, tasks, seeds, strict=True)))

    def _answers(self, asked: list[tuple[Arrays, str, int]]) -> list[Any]:
        """In the order of ``asked``. One batch for all that have the same cameras, of one size."""
        groups: dict[Any, list[int]] = {}
        for place, (arrays, _, _) in enumerate(asked):
            fit = tuple(sorted((name, each.shape, each.dtype.str) for name, each in arrays.items()))
            groups.setdefault(fit, []).append(place)
        answers: list[Any] = [None] * len(asked)
        for places in groups.values():
            for place, answer in zip(places, self._each([asked[i] for i in places]), strict=True):
                answers[place] = answer
        return answers

    def _each(self, group: list[tuple[Arrays, str, int]]) -> list[Any]:
        """A group's chunks; where it cannot be computed, those of its members one by one."""
        try:
            return self._compute(group)
        except Exception as error:  # goes to whom it concerns
            if len(group) == 1:
                return [error]
            return [answer for one in group for answer in self._each([one])]

    def _compute(self, group: list[tuple[Arrays, str, int]]) -> list[np.ndarray]:
        batch: dict[str, Any] = {"task": [task for _, task, _ in group]}
        for name in group[0][0]:
            stacked = torch.from_numpy(np.stack([arrays[name] for arrays, _, _ in group]))
            # As LeRobot's raw_observation_to_observation, on a batch.
            batch[name] = prepare_image(stacked) if "image" in name else stacked[:, 0]
        noise = torch.stack([noise_of(seed, self._config) for _, _, seed in group]).to(self._device)
        before = status(self._policy).calls_fast
        chunk = self._policy.predict_action_chunk(self._preprocess(batch), noise=noise)
        # Step by step, as LeRobot's policy server: a postprocessor's steps may expect [B, A].
        actions = torch.stack([self._postprocess(chunk[:, step]) for step in range(chunk.shape[1])], dim=1)
        served_by = "engine" if status(self._policy).calls_fast > before else "stock"
        self._chunks.inc(len(group), tags={"served_by": served_by})
        return list(actions.detach().cpu().float().numpy())

    def _example(self) -> tuple[Arrays, str, int]:
        frames = {
            name: np.zeros(feature.shape, np.uint8) for name, feature in self._config.image_features.items()
        }
        state = np.zeros((1, *self._config.robot_state_feature.shape), np.float32)
        return {"observation.state": state, **frames}, "wait", 0

    def report(self) -> str:
        """Who computes in this replica, and why stock does where it does."""
        now = status(self._policy)
        why = self._not_patched or now.last_fallback
        served = f"{now.precision} by {now.backend}" if now.active else f"stock, for {why}"
        return f"{served} on {self._device}, process {os.getpid()}"
