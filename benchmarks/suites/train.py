"""A training step (forward, backward, AdamW), stock's and ``patch(training=True)``'s, with its gradients beside the time.

The policy is LeRobot's with its defaults: expert, heads and state projection learn, the VLM is frozen. The learning rate is
0, so that every round computes the same step. Stock's loss and gradients in fp32 are compared with the plain PyTorch
implementation's, each other variant's with stock's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import smolvla_fast
from benchmarks.harness.flags import counts
from benchmarks.harness.gate import COMPILED_BOUND, CheckFailed, Unavailable
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import device_of, rounds
from benchmarks.harness.roof import training_costs
from benchmarks.harness.setup import BenchmarkSetup, Case, resident, twin
from smolvla_fast.measure.rounds import synchronize
from smolvla_fast.ops.processor import why_bf16_is_slow
from smolvla_fast.testing import policies

CAMERAS = 2
BATCHES = {"cpu": (1, 2), "cuda": (8,)}
COMPILED = "stock compiled"
CACHED, NEW = "patched, frames known", "patched, frames new"
FUSED = "patched, frames known, AdamW fused"
STOCK = ("stock", "stock bf16")
VARIANTS = ("stock", "patched", CACHED, FUSED, NEW, COMPILED, "stock bf16", "patched bf16")
"""Those in bf16 run under autocast, as accelerate does it. CACHED and NEW have ``image_cache``: a step of a later epoch,
which finds the image tokens of all its frames, and one of the first, which finds none. FUSED is CACHED with the optimizer
that ``smolvla-fast train`` has on the fast path; all others have LeRobot's."""
CACHE_BYTES = {CACHED: 2**28, FUSED: 2**28, NEW: 1}
"""A cache of one byte looks for every frame and keeps none."""
# All gradients as one vector. Another order of sums moves stock's own by 5e-6 (tests/support/train_steps.py).
GRADIENT_BOUND = 1e-5


class TrainCase:
    """A batch of one size, with what all variants share: weights, moments, and stock's gradients."""

    def __init__(self, setup: BenchmarkSetup, size: int) -> None:
        self.setup, self.size, self.device = setup, size, setup.device
        setup.policy.train()
        self.resident = resident(self.device)
        learns = [each for each in setup.policy.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr=0.0)
        self._in_one_pass = torch.optim.AdamW(learns, lr=0.0, fused=True)
        self._stock: dict[bool, list[Tensor]] = {}
        config = setup.policy.config
        self.batch = policies.make_observation(setup.policy, cameras=CAMERAS, batch=size)
        shape = (size, config.chunk_size, config.action_feature.shape[0])
        self.batch["action"] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def loss(self, policy: Any, bf16: bool) -> Tensor:
        """With the same noise and time at every call."""
        devices = [self.device] if self.device.type == "cuda" else []
        autocast = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
        with torch.random.fork_rng(devices=devices), autocast:
            torch.manual_seed(0)
            return policy.forward(dict(self.batch))[0]

    def fused(self) -> torch.optim.AdamW:
        """The fused optimizer over the moments of the other: second ones would count among a variant's peak."""
        for weight, state in self.optimizer.state.items():
            if weight not in self._in_one_pass.state:
                step = state["step"].to(weight.device, copy=True)
                self._in_one_pass.state[weight] = {**state, "step": step}
        return self._in_one_pass

    def stock(self, bf16: bool) -> list[Tensor]:
        if bf16 not in self._stock:
            self._stock[bf16] = Trainee(self, STOCK[bf16]).found()
        return self._stock[bf16]

    def reference(self) -> list[Tensor]:
        """Loss and gradients of the plain PyTorch implementation, in the order of the policy's parameters."""
        other = self.setup.reference.train()
        other.zero_grad()
        loss = self.loss(other, False)
        loss.backward()
        learned = dict(other.named_parameters())
        names = [name for name, each in self.setup.policy.named_parameters() if each.grad is not None]
        return in_host_memory(loss, *(learned[name].grad for name in names))

    def floor_ms(self, dtype: torch.dtype, known: bool) -> float:
        """The least time of the step under this machine's roof. known  no frame is encoded"""
        needed = self.batch["observation.language.attention_mask"].any(dim=0)
        costs = training_costs(self.setup.policy.model, CAMERAS, int(needed.sum()), dtype.itemsize, self.size)
        counted = [cost for part, cost in costs.items() if not (known and part == "vision")]
        return sum(self.setup.ceilings.floor(cost, dtype)["floor_ms"] for cost in counted)


class Trainee:
    """One twin in train mode, on the batch of a case."""

    def __init__(self, case: TrainCase, variant: str) -> None:
        self.case, self.variant, self.bf16 = case, variant, variant.endswith("bf16")
        self.policy, self.patched, self.fused = twin(case.setup.policy), variant.startswith("patched"), False

    def prepare(self) -> None:
        if self.patched:
            smolvla_fast.patch(self.policy, training=True, image_cache=CACHE_BYTES.get(self.variant, 0))
        if self.variant == COMPILED:
            mode = "max-autotune" if self.case.device.type == "cuda" else "default"
            self.policy.model.__dict__["forward"] = torch.compile(self.policy.model.forward, mode=mode)

    def step(self) -> Tensor:
        """One step; its loss. Gradients stay until the next one."""
        optimizer = self.case.fused() if self.variant == FUSED else self.case.optimizer
        optimizer.zero_grad(set_to_none=True)
        loss = self.case.loss(self.policy, self.bf16)
        loss.backward()
        optimizer.step()
        self.fused = bool(optimizer.param_groups[0]["fused"])
        synchronize(self.case.device)
        return loss.detach()

    def found(self) -> list[Tensor]:
        """Loss and every gradient of a step."""
        loss = self.step()
        return in_host_memory(loss, *(p.grad for p in self.policy.parameters() if p.grad is not None))

    def check(self) -> dict[str, Any]:
        """Distances from stock in fp32, of the bound (in bf16 twice what stock itself loses). Raises CheckFailed beyond it.

        With a cache the second step is judged, which finds the frames that the first encodes: such a one is timed.
        """
        facts: dict[str, Any] = {}
        if self.variant in CACHE_BYTES:
            self.step()
        hits = self.hits()
        found = self.case.stock(self.bf16) if self.variant in STOCK else self.found()
        truth = self.case.reference() if self.variant == "stock" else self.case.stock(False)
        error, layout = distance(found, truth), self.case.setup.layout
        bound = GRADIENT_BOUND if self.patched and layout == "fp32" else COMPILED_BOUND[layout]
        if self.bf16:
            bound = 2 * distance(self.case.stock(True), self.case.stock(False))["gradient_rel_l2"]
        if self.variant in CACHE_BYTES:
            known, frames = self.hits() - hits, self.case.size * CAMERAS
            if known != (0 if self.variant == NEW else frames):
                raise CheckFailed(f"{known} of {frames} frames were known")
            facts["frames_known"] = known
        if not (apart := error["gradient_rel_l2"]) <= bound:
            raise CheckFailed(f"gradients are {apart:.3g} from stock's in fp32, allowed {bound:.3g}")
        if reason := self.late():
            raise CheckFailed(reason)
        return {**error, **facts, "bound": bound, "peak_bytes": self.peak(), "fused": self.fused}

    def hits(self) -> int:
        return smolvla_fast.status(self.policy).training_cache.get("hits", 0)

    def late(self) -> str | None:
        now = smolvla_fast.status(self.policy)
        as_wished = not self.patched or (now.training_fast and not now.training_stock)
        return None if as_wished else f"stock ran: {now.training_fallback}"

    def peak(self) -> int | None:
        """Of one step of this variant alone, on a GPU: what the twins before it hold is not counted."""
        device = self.case.device
        if device.type != "cuda":
            return None
        before = resident(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.step()
        return torch.cuda.max_memory_allocated(device) - before + self.case.resident


def in_host_memory(*tensors: Tensor) -> list[Tensor]:
    """Copies: on a GPU they would count among a variant's peak."""
    return [each.detach().to("cpu", copy=True) for each in tensors]


def distance(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    if len(found) != len(truth):
        raise CheckFailed(f"{len(found) - 1} parameters have a gradient, {len(truth) - 1} in stock")
    loss, true_loss = float(found[0]), float(truth[0])
    errors = (a.double() - b for a, b in zip(found[1:], truth[1:], strict=True))
    apart, whole = (sum(float(x.double().square().sum()) for x in each) for each in (errors, truth[1:]))
    return {"gradient_rel_l2": (apart / whole) ** 0.5, "loss_rel": abs(loss - true_loss) / abs(true_loss)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = counts(metafunc.config.getoption("--batch"), "--batch", BATCHES[device_of(metafunc.config).type])
    metafunc.parametrize("size", sizes, ids=lambda size: f"batch{size}")


def variant_of(case: TrainCase, name: str, with_compile: bool) -> Variant:
    trainee, setup = Trainee(case, name), case.setup

    def check() -> dict[str, Any]:
        if name == COMPILED and not with_compile:
            raise Unavailable("compiling takes minutes on a CPU; ask for it by --with-compile")
        large = trainee.bf16 and case.device.type == "cpu" and setup.size == "full"
        if large and why_bf16_is_slow():
            raise Unavailable(f"{why_bf16_is_slow()}: a step of stock in bf16 takes many minutes here")
        trainee.prepare()
        return trainee.check()

    dtype = torch.bfloat16 if trainee.bf16 else setup.dtype("stock")
    facts = dict(
        variant=name, ratio_to=STOCK[trainee.bf16], cameras=CAMERAS, batch=case.size, layout=setup.layout,
        floor_ms=case.floor_ms(dtype, known=name in (CACHED, FUSED)),
    )  # fmt: skip
    return Variant(name, check, trainee.step, trainee.late, policy=trainee.policy, facts=facts)


def test_train_step(measure: Any, make_setup: Any, pytestconfig: Any, size: int) -> None:
    case = TrainCase(make_setup(), size)
    with_compile = pytestconfig.getoption("--with-compile")
    variants = [variant_of(case, name, with_compile) for name in VARIANTS]
    group = case.setup.named("train", Case(CAMERAS, size))
    try:
        measure(group, variants, rounds(pytestconfig), suite="train")
    finally:
        case.setup.policy.eval()
