"""The whole denoise loop as one op: N Euler steps of all expert layers over the prefix KV."""

from __future__ import annotations

import torch
from torch import Tensor

from smolvla_fast.model.dims import Dims
from smolvla_fast.model.kv_cache import LayerKV, PrefixKV
from smolvla_fast.model.weights import Affine, DecoderLayer, Heads, Norm
from smolvla_fast.ops.reference import Cost, randn
from smolvla_fast.ops.reference.euler_step import Guidances
from smolvla_fast.ops.reference.suffix_tokens import suffix_tokens
from smolvla_fast.ops.select import reference_ops
from smolvla_fast.stages.denoise import denoise

# G: 1 where real-time chunking guides the loop. Z: masked tokens in the middle of the prefix. Every Y-th layer is a
# self-attention layer, none where 0.
CASES = (
    dict(B=1, S=50, P=177, E=720, F=2048, H=15, K=5, D=64, A=32, L=16, N=10, Y=2, Z=20, G=0),
    dict(B=1, S=50, P=177, E=480, F=1280, H=15, K=5, D=64, A=32, L=16, N=10, Y=0, Z=20, G=1),
    dict(B=2, S=7, P=19, E=48, F=40, H=3, K=1, D=16, A=5, L=3, N=3, Y=2, Z=4, G=1),
)


def denoise_persistent(
    dims: Dims,
    expert: list[DecoderLayer],
    heads: Heads,
    kv: PrefixKV,
    noise: Tensor,
    times: Tensor,
    guidance: Guidances | None = None,
) -> Tensor:
    """``x ← noise;  x ← x + dt·v(x, t) for t = 1, 1 - 1/N, ..``, the velocity v by the expert over the prefix KV.

    Arguments and result are those of ``stages.denoise``, of which this is every op by its reference.
    """
    return denoise(reference_ops(), dims, expert, heads, kv, noise, times, guidance)[0]


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    """In LeRobot's mixed layout: layers in ``dtype``, heads and the KV of cross layers fp32 at least. Slots of the
    suffix are NaN until they are written."""
    b, s, p, e, f, h, k, d, a = (case[name] for name in "BSPEFHKDA")
    wide = torch.promote_types(dtype, torch.float32)
    dims = Dims(
        layers=case["L"], query_heads=h, kv_heads=k, head_dim=d, text_width=h * d, expert_width=e,
        action_width=a, state_width=a, chunk=s, vision_heads=1, image_side=1, patch=1, shuffle=1,
    )  # fmt: skip

    def matrix(outputs: int, inputs: int, gain: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return randn(outputs, inputs, dtype=kind, generator=generator, scale=gain * inputs**-0.5)

    def norm() -> Norm:
        return Norm(1 + randn(e, dtype=dtype, generator=generator, scale=0.2), 1e-5)

    def affine(outputs: int, inputs: int, gain: float = 1.0) -> Affine:
        return Affine(
            matrix(outputs, inputs, gain, wide), randn(outputs, dtype=wide, generator=generator, scale=0.1)
        )

    expert, caches = [], []
    for index in range(case["L"]):
        cross = case["Y"] == 0 or index % case["Y"] != 0
        inputs = k * d if cross else e
        expert.append(
            DecoderLayer(
                norm1=norm(),
                q=matrix(h * d, e, 1.6),
                k=matrix(k * d, inputs, 1.6),
                v=matrix(k * d, inputs, 1.2),
                o=matrix(e, h * d, 2.0),
                norm2=norm(),
                gate=matrix(f, e, 1.3),
                up=matrix(f, e),
                down=matrix(e, f),
                cross=cross,
            )
        )
        shape, kind = (b, p if cross else p + s, k, d), wide if cross else dtype
        cache = LayerKV(*(randn(*shape, dtype=kind, generator=generator, scale=1.4) for _ in range(2)))
        for slots in cache.suffix(p):
            slots.fill_(torch.nan)
        caches.append(cache)
    seen = torch.ones(b, p, dtype=torch.bool)
    for row in range(b):  # every sample has another number of valid tokens
        seen[row, p // 3 : p // 3 + max(case["Z"] - row, 0)] = False
    guidance = None
    if case["G"]:
        guidance = Guidances(
            previous=randn(b, s, a, dtype=wide, generator=generator),
            weights=torch.linspace(1, 0, s).to(wide)[None, :, None],
            strengths=torch.linspace(5, 0.3, case["N"]).to(wide),
        )
    return {
        "dims": dims,
        "expert": expert,
        "heads": Heads(
            state=affine(e, a),
            action_in=affine(e, a),
            time_in=affine(e, 2 * e, 1.5),
            time_out=affine(e, e, 2.0),
            expert_norm=norm(),
            action_out=affine(a, e),
        ),
        "kv": PrefixKV(caches, seen, *suffix_tokens(seen, s, d)),
        "noise": randn(b, s, a, dtype=wide, generator=generator),
        "times": randn(case["N"], b, e, dtype=wide, generator=generator).clamp(-1, 1),
        "guidance": guidance,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    """Products and attention; weights once a step, the prefix KV once a step."""
    b, s, p, e, f, h, k, d, a, layers = (case[name] for name in "BSPEFHKDAL")
    selves = 0 if case["Y"] == 0 else -(-layers // case["Y"])
    weights = layers * (2 * e * h * d + 3 * e * f) + selves * 2 * e * k * d
    heads = e * e + 2 * a * e
    keys = layers * p + selves * s
    flops = 2.0 * b * s * (weights + heads) + 4.0 * b * s * keys * h * d
    return Cost(
        case["N"] * flops,
        case["N"] * (float(itemsize) * (weights + 2 * b * keys * k * d) + 4.0 * (heads + 2 * b * s * a)),
    )
