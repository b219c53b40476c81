"""The roof under which every figure is put: the least work of each stage, and what this machine can do at best.

Work is from shapes alone: operations of the matrix products, and bytes to be read, which are weights, once a stage (once a
step in the denoise loop), and the prefix KV that every step reads. Activations are left out: they fit into caches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from benchmarks.harness.run import write_whole
from smolvla_fast.model.dims import read_dims
from smolvla_fast.model.weights import is_cross
from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import int16, quantize
from smolvla_fast.ops.reference import Cost
from smolvla_fast.ops.torch.linear import linear

# Large enough to reach a machine's top speed, small enough for a second on two cores.
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
ADAMW_NUMBERS = 7
"""Of a parameter: it, its gradient and both moments are read, all but the gradient written."""


@dataclass(frozen=True)
class Ceilings:
    """This machine's best: operations a second in matrix products by dtype, bytes a second in copying.

    int8 is missing where torch has no such product here; int16 is our own product's.
    """

    gemm_flops: dict[str, float]
    copy_bytes: float

    def floor(self, cost: Cost, dtype: torch.dtype) -> dict[str, float]:
        """The least time for so much work: whichever of arithmetic and memory takes longer."""
        least = max(cost.flops / self.best(dtype), cost.bytes / self.copy_bytes)
        return dict(flops=cost.flops, bytes=cost.bytes, floor_ms=1e3 * least)

    def best(self, dtype: torch.dtype) -> float:
        """Operations a second of the fastest product that is no narrower: fp32 serves bf16 on a processor that multiplies
        it no slower; integers serve floats never."""
        rates = {getattr(torch, name): rate for name, rate in self.gemm_flops.items()}
        floats = dtype.is_floating_point
        return max(
            rate
            for each, rate in rates.items()
            if each.itemsize >= dtype.itemsize and each.is_floating_point >= floats
        )


def product_of_roof(device: torch.device, dtype: torch.dtype, small: bool) -> tuple[Callable[[], Any], float]:
    """The large matrix product that a roof is the best of, and its operations."""
    side = GEMM_SIDE[device.type] // (4 if small else 1)
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    # torch's own fp32 path is MKL, far from the roof on other makers' processors; oneDNN is near it.
    return partial(linear, x, weight), 2.0 * side**3


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """A large matrix product in fp32, bf16 and on a CPU in 8 bits, and a large copy; the best of a few seconds of rounds.

    small  of a sixteenth of the elements and for a twentieth of the time: for tiny policies, whose times say nothing
    """
    # Timer waits for the device before and after each block of calls.
    side, budget = GEMM_SIDE[device.type] // (4 if small else 1), 0.05 if small else 1.0

    def rate(work: float, function: Callable[[], Any]) -> float:
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return work / min(timer.blocked_autorange(min_run_time=budget).times)

    flops = {}
    for dtype in ("float32", "bfloat16"):
        product, work = product_of_roof(device, getattr(torch, dtype), small)
        flops[dtype] = rate(work, product)
    if device.type == "cpu":
        # uint8 activations by a prepacked int8 weight, as oneDNN multiplies them fastest.
        x = torch.randint(0, 255, (side, side), dtype=torch.uint8)
        weight = torch.randint(-127, 127, (side, side), dtype=torch.int8)
        scales, zeros = torch.ones(side), torch.zeros(side, dtype=torch.int32)
        with suppress(AttributeError, RuntimeError):  # where torch has no such product
            packed = torch.ops.onednn.qlinear_prepack(weight, [side, side])
            given = (x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            flops["int8"] = rate(2.0 * side**3, partial(torch.ops.onednn.qlinear_pointwise, *given))
        if extension.available("cpu"):  # no library multiplies 16-bit integers: ours is the best there is
            rows, wide = (
                quantize.quantize_rows(torch.randn(side, side), torch.int16),
                int16.pack(torch.randn(side, side)),
            )
            flops["int16"] = rate(2.0 * side**3, partial(int16.linear, rows, wide))
    source = torch.ones(COPY_BYTES[device.type] // (64 if small else 4), device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, rate(2.0 * source.nbytes, lambda: target.copy_(source)))


def ceilings_once(path: Path | None, device: torch.device, small: bool) -> Ceilings:
    """Measured by the first suite of a run that asks, and read from this file by the others."""
    if path is not None and path.is_file():
        return Ceilings(**json.loads(path.read_text()))
    ceilings = measure_ceilings(device, small)
    if path is not None:
        write_whole(path, asdict(ceilings))
    return ceilings


class Work:
    """Weights and operations of one sample's forward.

    cameras, language  of the prefix: images, and padded tokens that any sample needs      step  one pass of the expert
    """

    def __init__(self, model: Any, cameras: int, language: int) -> None:
        d = self.dims = read_dims(model)
        pair = model.vlm_with_expert
        vlm, expert = pair.get_vlm_model(), pair.lm_expert
        self.crosses = sum(is_cross(pair, i) for i in range(d.layers))
        self.selfs = d.layers - self.crosses
        self.prefix = cameras * d.image_tokens + language + 1
        q, kv = self.queries, self.kv = d.query_heads * d.head_dim, d.kv_heads * d.head_dim

        tower, width = vlm.vision_model, vlm.vision_model.post_layernorm.weight.shape[0]
        hidden = tower.encoder.layers[0].mlp.fc1.weight.shape[0]
        layers, patches = len(tower.encoder.layers), (d.image_side // d.patch) ** 2
        of_patches = 3 * d.patch**2 * width + layers * (4 * width**2 + 2 * width * hidden)
        connector = d.shuffle**2 * width * d.text_width
        self.vision_weights = of_patches + connector
        attention = 4.0 * layers * patches**2 * width
        self.vision_flops = cameras * (2.0 * (patches * of_patches + d.image_tokens * connector) + attention)

        mlp = vlm.text_model.layers[0].mlp.gate_proj.weight.shape[0]
        self.cross_weights = 2 * self.crosses * kv * kv  # the expert's projections of the prefix KV
        text_layer = 2 * d.text_width * (kv + q) + 3 * d.text_width * mlp
        # Of the last layer only keys and values are used.
        self.prefix_weights = (d.layers - 1) * text_layer + 2 * d.text_width * kv + self.cross_weights
        attention = 4.0 * (d.layers - 1) * self.prefix**2 * q
        self.prefix_flops = 2.0 * self.prefix * self.prefix_weights + attention

        mlp = expert.layers[0].mlp.gate_proj.weight.shape[0]
        expert_layer = 2 * d.expert_width * q + 3 * d.expert_width * mlp
        ends = d.expert_width * (2 * d.action_width + d.expert_width)
        self.step_weights = d.layers * expert_layer + self.selfs * 2 * d.expert_width * kv + ends
        # That a suffix row sees.
        self.keys = self.selfs * (self.prefix + d.chunk) + self.crosses * self.prefix
        self.step_flops = 2.0 * d.chunk * self.step_weights + 4.0 * d.chunk * self.keys * q

    def before_suffix(self, itemsize: int, batch: int) -> dict[str, Cost]:
        return {
            "vision": Cost(batch * self.vision_flops, float(itemsize * self.vision_weights)),
            "prefix": Cost(batch * self.prefix_flops, float(itemsize * self.prefix_weights)),
        }


def stage_costs(model: Any, cameras: int, language: int, itemsize: int, batch: int = 1) -> dict[str, Cost]:
    """Cost of "vision", "prefix" and "denoise" (all steps) for a batch. itemsize  bytes of a weight in its product"""
    work, steps = Work(model, cameras, language), model.config.num_steps
    step_bytes = itemsize * (work.step_weights + batch * 2 * work.keys * work.kv)
    denoise = Cost(steps * batch * work.step_flops, float(steps * step_bytes))
    return {**work.before_suffix(itemsize, batch), "denoise": denoise}


def training_costs(model: Any, cameras: int, language: int, itemsize: int, batch: int = 1) -> dict[str, Cost]:
    """Cost of "vision", "prefix" and "expert" of one training step of a batch, with LeRobot's defaults: expert, heads and
    state projection learn. The expert's bytes are its weights, forward and backward, and AdamW's traffic.

    A product of what learns costs three times its forward, one of the prefix once: of its rows the state's alone has a
    gradient. Keys and values that nothing learns from have none. Arguments as in ``stage_costs``.
    """
    work = Work(model, cameras, language)
    d = work.dims
    # Inference folds the actions' half of the MLP of action and time into their projection; weights that learn cannot be.
    halves = 2 * d.expert_width**2
    weights = work.step_weights + halves
    linear = 6.0 * d.chunk * (work.step_weights + halves / 2) + 4.0 * halves / 2
    linear -= 2.0 * d.chunk * d.action_width * d.expert_width  # no gradient of actions
    learning_keys = work.selfs * (d.chunk + 1) + work.crosses * work.prefix
    attention = (8.0 * work.keys + 4.0 * learning_keys) * d.chunk * work.queries
    # The state's row, and cross KV.
    of_prefix = 2.0 * (work.prefix_weights + work.prefix * work.cross_weights)
    learns = weights + work.cross_weights + d.state_width * d.text_width
    stored = model.vlm_with_expert.lm_expert.layers[0].mlp.gate_proj.weight.element_size()
    expert_bytes = 2 * itemsize * weights + ADAMW_NUMBERS * stored * learns
    expert = Cost(batch * (linear + attention + of_prefix), float(expert_bytes))
    return {**work.before_suffix(itemsize, batch), "expert": expert}
