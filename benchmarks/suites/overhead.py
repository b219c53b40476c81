"""What of a chunk is not arithmetic: time outside the ops, and what each denoise step allocates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch as patched

import torch
from torch import Tensor

from benchmarks.harness.gate import act
from smolvla_fast.measure.rounds import percentile, timed_ms
from smolvla_fast.ops import table
from smolvla_fast.patch import engine_of, patch
from smolvla_fast.testing import policies

Inputs = tuple[dict[str, Tensor], Tensor]
OFF_LOOP = 1
"""The fewest denoise steps: what a chunk of so many allocates is not the loop's."""


def sampler(policy: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """``sample_actions`` of a patched policy on a prepared observation: without what LeRobot does before and after it."""
    observation, noise = inputs
    batch = policy._prepare_batch(dict(observation))
    images, masks = policy.prepare_images(batch)
    language = (batch["observation.language.tokens"], batch["observation.language.attention_mask"])
    call = (images, masks, *language, policy.prepare_state(batch))
    return torch.no_grad()(lambda: policy.model.sample_actions(*call, noise=noise.clone()))


def outside_ops(policy: Any, inputs: Inputs, rounds: int) -> dict[str, float]:
    """Medians over rounds: ms of ``sample_actions``, ms of it outside every op, their ratio, and calls of ops a chunk.

    Outside are the engine's Python, the look through the model before a chunk, the gathering of weights and the small torch
    calls between ops (masks, rope tables, joining the prefix). The Python inside an op's own wrapper counts as the op's.
    """
    sample, engine, inside = sampler(policy, inputs), engine_of(policy.model), []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside.append(1e3 * (time.perf_counter() - start))

        return call

    served = {name: getattr(engine.ops, name) for name in table.NAMES}
    ops = replace(engine.ops, **{name: timed(op) for name, op in served.items() if op is not None})
    wholes, outsides = [], []
    with patched.object(engine, "ops", ops):
        for _ in range(rounds):
            inside.clear()
            wholes.append(timed_ms(sample, "cpu")[0])
            outsides.append(wholes[-1] - sum(inside))
    shares = [outside / whole for outside, whole in zip(outsides, wholes, strict=True)]
    names = ("sample_actions_ms", "outside_ms", "outside_share")
    medians = (percentile(each, 0.5) for each in (wholes, outsides, shares))
    return {**dict(zip(names, medians, strict=True)), "op_calls": len(inside)}


def narrow_ms(policy: Any, precision: str, cameras: int, rounds: int) -> float:
    """Median ms of ``sample_actions`` by the same sequence of calls at widths and images that hardly cost arithmetic:
    Python, torch's dispatch, the start and end of parallel work. So an upper bound of the Python in a chunk."""
    config, vlm = policy.config, policy.model.vlm_with_expert.get_vlm_model()
    layers = len(vlm.text_model.layers)
    narrow = policies.make_policy(
        "tiny", cameras=len(config.image_features), vision=dict(num_hidden_layers=len(vlm.vision_model.encoder.layers)),
        text=dict(num_hidden_layers=layers), num_vlm_layers=layers, chunk_size=config.chunk_size,
        n_action_steps=config.chunk_size, num_steps=config.num_steps,
    )  # fmt: skip
    patch(narrow, precision=precision)
    observation = policies.make_observation(narrow, cameras=cameras)
    sample = sampler(narrow, (observation, policies.make_noise(narrow)))
    sample()
    return percentile([timed_ms(sample, "cpu")[0] for _ in range(rounds)], 0.5)


def allocations(policy: Any, inputs: Inputs) -> tuple[int, int]:
    """How often one chunk asks torch's CPU allocator for memory, and bytes in all. Not seen: what oneDNN and the compiled
    kernels take from the system by themselves."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        act(policy, inputs)
    events = profile.profiler.kineto_results.events()
    taken = [each.nbytes() for each in events if each.name() == "[memory]" and each.nbytes() > 0]
    return len(taken), sum(taken)


def step_allocations(policy: Any, inputs: Inputs) -> dict[str, float]:
    """Allocations and bytes of one denoise step: the difference of two chunks over the difference of their steps."""
    steps, found = max(policy.config.num_steps, OFF_LOOP + 1), []
    for count in (OFF_LOOP, steps):
        with patched.object(policy.config, "num_steps", count):
            act(policy, inputs)  # so that what is made once for a number of steps is there
            found.append(allocations(policy, inputs))
    count, size = ((high - low) / (steps - OFF_LOOP) for low, high in zip(*found, strict=True))
    return {"step_allocations": count, "step_bytes": size, "chunk_allocations": found[1][0]}


def measure(policy: Any, precision: str, cameras: int, inputs: Inputs, rounds: int) -> dict[str, Any]:
    """All of this for one patched policy."""
    act(policy, inputs)
    found: dict[str, Any] = outside_ops(policy, inputs, rounds)
    found["narrow_ms"] = narrow_ms(policy, precision, cameras, max(3, rounds))
    found["narrow_share"] = found["narrow_ms"] / found["sample_actions_ms"]
    return {**found, **step_allocations(policy, inputs)}
