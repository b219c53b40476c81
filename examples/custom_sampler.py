"""A sampler of your own on a patched policy: five steps of Heun's second-order method instead of ten of Euler's.

    python examples/custom_sampler.py [--size tiny|full] [--device cpu|cuda]

It calls what LeRobot's own sampler calls, ``embed_prefix``, ``vlm_with_expert.forward`` and ``denoise_step``, so it runs on
stock and on a patched policy alike. Prints how far the two chunks are apart, their times, and who served the calls; exit
status 1 if they are farther apart than fp32 allows, or if stock served a call of the patched policy.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

import smolvla_fast
from smolvla_fast.cli.subject import resolve_device
from smolvla_fast.measure.console import CommandError
from smolvla_fast.measure.rounds import timed_ms
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.verify import rel_l2

BOUND = 1e-5
"""What another order of fp32 sums moves a chunk of these policies; half of it is usual."""


def heun(
    policy: Any, images: list[Tensor], image_masks: list[Tensor], tokens: Tensor, token_masks: Tensor, state: Tensor,
    noise: Tensor, steps: int = 5,
) -> Tensor:  # fmt: skip
    """An action chunk [B, S, A]. A step is ``x + h/2·(v(x, t) + v(x + h·v(x, t), t + h))`` with ``h = -1/steps``.

    The last one is Euler's: the policy was trained on t from 0.001 on, so there is no velocity at 0 to correct it by.
    """
    model = policy.model
    embeddings, pads, blocks = model.embed_prefix(images, image_masks, tokens, token_masks, state=state)
    counts = torch.cumsum(blocks, dim=1)
    mask = (counts[:, None] <= counts[:, :, None]) & pads[:, None] & pads[:, :, None]
    pair = model.vlm_with_expert
    fill = {"fill_kv_cache": True} if "fill_kv_cache" in inspect.signature(pair.forward).parameters else {}
    _, cache = pair.forward(
        attention_mask=mask, position_ids=torch.cumsum(pads, dim=1) - 1, past_key_values=None,
        inputs_embeds=[embeddings, None], use_cache=True, **fill,
    )  # fmt: skip

    def velocity(x: Tensor, t: float) -> Tensor:
        return model.denoise_step(pads, cache, x, torch.full_like(x[:, 0, 0], t))

    x, h = noise, -1.0 / steps
    for step in range(steps):
        t = 1.0 + step * h
        v = velocity(x, t)
        if step < steps - 1:
            v = (v + velocity(x + h * v, t + h)) / 2
        x = x + h * v
    return x


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size", choices=("tiny", "full"), default="tiny", help="of the policy, which has random weights"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(arguments)
    try:
        device = resolve_device(args.device)
    except CommandError as reason:
        parser.error(str(reason))
    policy = make_policy(args.size, device=device)
    batch, noise = make_observation(policy), make_noise(policy)
    images, image_masks = policy.prepare_images(batch)
    tokens, token_masks = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    inputs = (images, image_masks, tokens, token_masks, policy.prepare_state(batch), noise)

    def timed(sampler: Any) -> tuple[Tensor, float]:
        with torch.no_grad():
            sampler(*inputs)  # what is compiled or captured is so now
            ms, chunk = timed_ms(lambda: sampler(*inputs), device)
            return chunk, ms

    stock, stock_ms = timed(lambda *given: heun(policy, *given))
    smolvla_fast.patch(policy)
    # On an NVIDIA GPU one graph replays the whole sampler; elsewhere this is the function itself.
    fast, fast_ms = timed(smolvla_fast.captured(policy, lambda *given: heun(policy, *given)))
    apart, now = rel_l2(fast, stock), smolvla_fast.status(policy)
    print(f"stock {stock_ms:.1f} ms, patched {fast_ms:.1f} ms, relative L2 {apart:.1e}, allowed {BOUND:.0e}")
    print(f"calls by the engine: {now.layers_fast}, by stock: {now.layers_stock}")
    return int(not apart <= BOUND or bool(now.layers_stock))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
