"""One patched policy in a process of Ray's: what one replica of the deployment computes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from lerobot.async_inference.helpers import prepare_image
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import OBS_STATE
from ray import serve
from ray.util import metrics
from torch import Tensor

from ..auto_patch import load, patch_or_stock
from ..patch import status

# Ray's types know batched methods of one argument alone.
batched: Any = serve.batch

logger = logging.getLogger("ray.serve")

Arrays = dict[str, np.ndarray]
"""Of one observation: the state [1, R] fp32 and each camera's frame [3, H, W] uint8, resized as the policy has it.

Arrays, not tensors: Ray sends arrays beside the pickle of a call, without copying them into it."""

Answer = np.ndarray | str
"""The chunk [S, robot's actions] fp32 of one observation, postprocessed; or why the policy fails on it, and on it alone."""


def noise_of(seed: int, config: Any) -> Tensor:
    """[S, A] fp32: what a chunk starts from, by its own seed alone, whatever else is in the batch and on any device."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(config.chunk_size, config.max_action_dim, generator=drawn)


class Replica:
    """A policy, its processors, and batches. The constructor returns when a chunk has been computed.

    path        of the checkpoint, as ``from_pretrained`` takes it      device  "cpu" or "cuda"
    how         precision and backend, as ``patch_or_stock`` takes them; where stock serves, ``report`` says why
    max_batch   observations in one batch      wait_s  seconds that the first of a batch waits for others
    """

    def __init__(self, path: str, device: str, max_batch: int, wait_s: float, *how: str | None) -> None:
        self.__call__.set_max_batch_size(max_batch)
        self.__call__.set_batch_wait_timeout_s(wait_s)
        self._policy = load(path).to(device).eval()
        self._device, self._config = device, self._policy.config
        self._not_patched = patch_or_stock(self._policy, *how)
        self._preprocess, self._postprocess = make_pre_post_processors(
            self._config, path, preprocessor_overrides={"device_processor": {"device": device}}
        )
        self._chunks = metrics.Counter("smolvla_fast_chunks", "Chunks computed.", ("served_by",))
        # On a GPU a chunk of each batch size is captured once, which takes longer than many chunks.
        for batch in range(1, max_batch + 1) if device == "cuda" else [1]:
            self._compute([self._example()] * batch)

    @batched
    async def __call__(self, arrays: list[Arrays], tasks: list[str], seeds: list[int]) -> list[Answer]:
        """Called with one observation, its task and seed; ``serve.batch`` makes lists of these. Answers each as if alone."""
        # Not in the event loop, in which Ray asks whether the replica is alive. One batch at a time: serve.batch has it so,
        # and LeRobot's processor steps keep what they are working on.
        return await asyncio.to_thread(self._answers, list(zip(arrays, tasks, seeds, strict=True)))

    def _answers(self, asked: list[tuple[Arrays, str, int]]) -> list[Answer]:
        """In the order of ``asked``. One batch for all that have the same cameras, of one size."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, (arrays, _, _) in enumerate(asked):
            groups[frozenset((name, each.shape, each.dtype) for name, each in arrays.items())].append(place)
        answers: dict[int, Answer] = {}
        for places in groups.values():
            answers |= zip(places, self._each([asked[i] for i in places]), strict=True)
        return [answers[place] for place in range(len(asked))]

    def _each(self, group: list[tuple[Arrays, str, int]]) -> list[Answer]:
        """A group's chunks; where it cannot be computed, those of its members one by one."""
        try:
            return self._compute(group)
        except Exception as error:  # goes to whom it concerns
            logger.exception("a batch of %d has failed", len(group))
            if len(group) > 1:
                return [self._each([one])[0] for one in group]
            try:
                self._compute([self._example()])
            except Exception:  # not the observation's fault, such as a GPU that is gone
                logger.critical("this replica fails on its own observation too, and ends")
                os._exit(1)  # Ray starts another; the front asks that one
            return [f"{type(error).__name__}: {error}"]

    def _compute(self, group: list[tuple[Arrays, str, int]]) -> list[Answer]:
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
        cameras, state = self._config.image_features, self._config.robot_state_feature
        frames = {name: np.zeros(camera.shape, np.uint8) for name, camera in cameras.items()}
        return {OBS_STATE: np.zeros((1, *state.shape), np.float32), **frames}, "wait", 0

    def report(self) -> str:
        """Who computes in this replica, and why stock does where it does."""
        now = status(self._policy)
        why = self._not_patched or now.last_fallback
        served = f"{now.precision} by {now.backend}" if now.active else f"stock, for {why}"
        return f"{served} on {self._device}, process {os.getpid()}"
