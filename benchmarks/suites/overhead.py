"""What of a chunk is not arithmetic: time outside the ops, and what each denoise step allocates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.gate import act as chunk
from smolvla_fast.measure.rounds import percentile, timed_ms
from smolvla_fast.ops import table
from smolvla_fast.patch import engine_of, patch
from smolvla_fast.testing import policies

CPU = torch.device("cpu")
OFF_LOOP = 1
"""The fewest denoise steps: what a chunk of so many allocates is not the loop's."""


class Stopwatch:
    """Seconds inside functions, and calls of them."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


@contextmanager
def watched(policy: Any) -> Iterator[Stopwatch]:
    """Inside, all ops of a patched policy's engine are timed; yields the stopwatch."""
    engine, inside = engine_of(policy.model), Stopwatch()
    before = engine.ops
    served = {name: getattr(before, name) for name in table.NAMES}
    engine.ops = replace(before, **{name: inside.around(op) for name, op in served.items() if op is not None})
    try:
        yield inside
    finally:
        engine.ops = before


def sampler(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> Callable[[], Tensor]:
    """``sample_actions`` of a patched policy on a prepared observation: without what LeRobot does before and after it."""
    observation, noise = inputs
    batch = policy._prepare_batch(dict(observation))
    images, masks = policy.prepare_images(batch)
    language = (batch["observation.language.tokens"], batch["observation.language.attention_mask"])
    call = (images, masks, *language, policy.prepare_state(batch))

    def sample() -> Tensor:
        with torch.no_grad():
            return policy.model.sample_actions(*call, noise=noise.clone())

    return sample


def outside_ops(policy: Any, inputs: tuple[dict[str, Tensor], Tensor], rounds: int) -> dict[str, float]:
    """Medians over rounds: ms of ``sample_actions``, ms of it outside every op, their ratio, and calls of ops a chunk.

    Outside are the engine's Python, the look through the model before a chunk, the gathering of weights and the small torch
    calls between ops (masks, rope tables, joining the prefix). The Python inside an op's own wrapper counts as the op's.
    """
    sample = sampler(policy, inputs)
    wholes, outsides, calls = [], [], 0
    for _ in range(rounds):
        with watched(policy) as inside:
            whole_ms, _chunk = timed_ms(sample, CPU)
        wholes.append(whole_ms)
        outsides.append(whole_ms - 1e3 * inside.seconds)
        calls = inside.calls
    shares = [outside / whole for outside, whole in zip(outsides, wholes, strict=True)]
    return {
        "sample_actions_ms": percentile(wholes, 0.5),
        "outside_ms": percentile(outsides, 0.5),
        "outside_share": percentile(shares, 0.5),
        "op_calls": calls,
    }


def narrow_policy(policy: Any) -> Any:
    """As many layers, actions and steps, cameras too, at widths and images that hardly cost arithmetic."""
    config = policy.config
    vlm = policy.model.vlm_with_expert.get_vlm_model()
    return policies.make_policy(
        "tiny",
        cameras=len(config.image_features),
        vision={"num_hidden_layers": len(vlm.vision_model.encoder.layers)},
        text={"num_hidden_layers": len(vlm.text_model.layers)},
        num_vlm_layers=len(vlm.text_model.layers),
        chunk_size=config.chunk_size,
        n_action_steps=config.chunk_size,
        num_steps=config.num_steps,
    )


def narrow_ms(policy: Any, precision: str, cameras: int, rounds: int) -> float:
    """Median ms of ``sample_actions`` by the same sequence of calls on a ``narrow_policy``: Python, torch's dispatch, the
    start and end of parallel work, and what little arithmetic is left. So an upper bound of the Python in a chunk."""
    narrow = narrow_policy(policy)
    patch(narrow, precision=precision)
    sample = sampler(
        narrow, (policies.make_observation(narrow, cameras=cameras), policies.make_noise(narrow))
    )
    sample()
    return percentile([timed_ms(sample, CPU)[0] for _ in range(rounds)], 0.5)


def allocations(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> tuple[int, int]:
    """How often one chunk asks torch's CPU allocator for memory, and bytes in all. Not seen: what oneDNN and the compiled
    kernels take from the system by themselves."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        chunk(policy, inputs)
    sizes = [
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    taken = [size for size in sizes if size > 0]
    return len(taken), sum(taken)


def step_allocations(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> dict[str, float]:
    """Allocations and bytes of one denoise step: the difference of two chunks over the difference of their steps."""
    config = policy.config
    before = config.num_steps
    steps = max(before, OFF_LOOP + 1)
    found = {}
    try:
        for count in (OFF_LOOP, steps):
            config.num_steps = count
            chunk(policy, inputs)  # so that what is made once for a number of steps is there
            found[count] = allocations(policy, inputs)
    finally:
        config.num_steps = before
    each = [
        (high - low) / (steps - OFF_LOOP) for low, high in zip(found[OFF_LOOP], found[steps], strict=True)
    ]
    return {"step_allocations": each[0], "step_bytes": each[1], "chunk_allocations": found[steps][0]}


def measure(
    policy: Any, precision: str, cameras: int, inputs: tuple[dict[str, Tensor], Tensor], rounds: int
) -> dict[str, Any]:
    """All of this for one patched policy."""
    timed_ms(lambda: chunk(policy, inputs), CPU)
    found: dict[str, Any] = outside_ops(policy, inputs, rounds)
    found["narrow_ms"] = narrow_ms(policy, precision, cameras, max(3, rounds))
    found["narrow_share"] = found["narrow_ms"] / found["sample_actions_ms"]
    return {**found, **step_allocations(policy, inputs)}
