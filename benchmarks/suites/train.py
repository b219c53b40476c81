"""A training step (forward, backward, AdamW), stock's and ``patch(training=True)``'s, with its gradients beside the time.

The policy is LeRobot's with its defaults: expert, heads and state projection learn, the VLM is frozen. The learning rate is
0, so that every round computes the same step. Each variant's loss and gradients are compared with stock's in fp32 first, and
before each of its rounds stock takes one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.account import training_costs
from benchmarks.harness.gate import COMPILED_BOUND, Red, timed
from benchmarks.harness.machine import Ceilings
from benchmarks.harness.plugin import rounds
from smolvla_fast.measure.rounds import synchronize

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


class Trainee:
    """The subject's policy in train mode, with its optimizer, and stock's gradients by batch size.

    fused  of the last step: whether AdamW was
    """

    def __init__(self, subject: Any) -> None:
        self.policy, self.device = subject.policy, subject.device
        self.policy.train()
        learns = [each for each in self.policy.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr=0.0)
        self._in_one_pass = torch.optim.AdamW(learns, lr=0.0, fused=True)
        self.fused = False
        self._batches: dict[int, dict[str, Tensor]] = {}
        self.truth: dict[tuple[int, bool], list[Tensor]] = {}

    def batch(self, size: int) -> dict[str, Tensor]:
        from smolvla_fast.testing import policies

        if size not in self._batches:
            found = policies.make_observation(self.policy, cameras=CAMERAS, batch=size)
            config = self.policy.config
            shape = (size, config.chunk_size, config.action_feature.shape[0])
            found["action"] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
            self._batches[size] = found
        return self._batches[size]

    def step(self, size: int, bf16: bool, fused: bool = False) -> Tensor:
        """One step with the same noise and time as any other; its loss. Gradients stay until the next one."""
        optimizer = self._fused() if fused else self.optimizer
        optimizer.zero_grad(set_to_none=True)
        devices = [self.device] if self.device.type == "cuda" else []
        narrow = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            with narrow:
                loss, _ = self.policy.forward(dict(self.batch(size)))
        loss.backward()
        optimizer.step()
        self.fused = bool(optimizer.param_groups[0]["fused"])
        synchronize(self.device)
        return loss.detach()

    def _fused(self) -> torch.optim.AdamW:
        """The fused optimizer over the moments of the other: second ones would count among a variant's peak."""
        for weight, state in self.optimizer.state.items():
            if weight not in self._in_one_pass.state:
                step = state["step"].to(weight.device, copy=True)
                self._in_one_pass.state[weight] = {**state, "step": step}
        return self._in_one_pass

    def gradients(self, size: int, bf16: bool) -> list[Tensor]:
        """Loss and every gradient of a step, in the host's memory: on a GPU they would count among a variant's peak."""
        loss = self.step(size, bf16)
        found = (loss, *(p.grad for p in self.policy.parameters() if p.grad is not None))
        return [each.detach().to("cpu", copy=True) for each in found]

    def stock(self, size: int, bf16: bool) -> list[Tensor]:
        if (size, bf16) not in self.truth:
            with _unpatched(self.policy):
                self.truth[size, bf16] = self.gradients(size, bf16)
        return self.truth[size, bf16]

    def check(self, size: int, variant: str, bound: float | None) -> dict[str, Any]:
        """Distances from stock in fp32; bound None: twice what stock itself loses in bf16. Raises Red beyond it.

        With a cache the second step is judged, which finds the frames that the first encodes: such a one is timed.
        """
        import smolvla_fast

        facts: dict[str, Any] = {"bound": bound}
        if variant in CACHE_BYTES:
            self.step(size, False)
            hits = smolvla_fast.status(self.policy).training_cache["hits"]
        bf16 = variant.endswith("bf16")
        truth = self.stock(size, False)
        found = self.stock(size, bf16) if variant in STOCK else self.gradients(size, bf16)
        error = _distance(found, truth)
        if variant in CACHE_BYTES:
            facts["frames_known"] = smolvla_fast.status(self.policy).training_cache["hits"] - hits
            if facts["frames_known"] != (0 if variant == NEW else size * CAMERAS):
                raise Red(f"{facts['frames_known']} of {size * CAMERAS} frames were known")
        if bound is None:
            facts["bound"] = bound = 2 * _distance(self.stock(size, True), truth)["gradient_rel_l2"]
        if not error["gradient_rel_l2"] <= bound:
            raise Red(
                f"gradients are {error['gradient_rel_l2']:.3g} from stock's in fp32, allowed {bound:.3g}"
            )
        now = smolvla_fast.status(self.policy)
        if variant.startswith("patched") and (now.training_stock or not now.training_fast):
            raise Red(f"stock ran: {now.training_fallback}")
        return {**error, **facts}


def _distance(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    if len(found) != len(truth):
        raise Red(f"{len(found) - 1} parameters have a gradient, {len(truth) - 1} in stock")
    loss, *gradients = (x.double() for x in found)
    true_loss, *true_gradients = (x.double() for x in truth)
    apart = sum(float((a - b).square().sum()) for a, b in zip(gradients, true_gradients, strict=True)) ** 0.5
    whole = sum(float(x.square().sum()) for x in true_gradients) ** 0.5
    return {
        "gradient_rel_l2": apart / whole,
        "loss_rel": float((loss - true_loss).abs() / true_loss),
    }


@contextmanager
def _unpatched(policy: Any) -> Iterator[None]:
    """Stock's forward for the length of a block, whatever is patched."""
    model, cls = policy.model, type(policy.model)
    hidden = model.__dict__.pop("forward", None)
    model.__class__ = getattr(cls, "stock_class", cls)
    try:
        yield
    finally:
        model.__class__ = cls
        if hidden is not None:
            model.__dict__["forward"] = hidden


@pytest.fixture(scope="module")
def trainee(subject: Any) -> Iterator[Trainee]:
    yield Trainee(subject)
    subject.policy.eval()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    metafunc.parametrize("size", BATCHES[torch.device(name).type], ids=lambda size: f"batch{size}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_step(benchmark, trainee, ceilings, pytestconfig, subject, variant, size):
    import smolvla_fast
    from smolvla_fast.ops.processor import why_bf16_is_slow

    bf16, device = variant.endswith("bf16"), trainee.device
    if variant == COMPILED and not pytestconfig.getoption("--with-compile"):
        pytest.skip("compiling takes minutes on a CPU; ask for it by --with-compile")
    if bf16 and device.type == "cpu" and why_bf16_is_slow() and subject.size == "full":
        pytest.skip(f"{why_bf16_is_slow()}: a step of stock in bf16 takes many minutes here")
    benchmark.group = f"train: {subject.group.rsplit(',', 1)[0]}, {CAMERAS} cameras, batch {size}"
    policy, fused = trainee.policy, variant == FUSED
    if variant.startswith("patched"):
        smolvla_fast.patch(policy, training=True, image_cache=CACHE_BYTES.get(variant, 0))
    if variant == COMPILED:
        mode = "max-autotune" if device.type == "cuda" else "default"
        policy.model.__dict__["forward"] = torch.compile(policy.model.forward, mode=mode)
    bound = None if bf16 else COMPILED_BOUND[subject.layout] if variant == COMPILED else GRADIENT_BOUND
    if subject.layout != "fp32" and variant in ("patched", *CACHE_BYTES):
        bound = COMPILED_BOUND[subject.layout]

    def forget_peak() -> None:
        if device.type == "cuda":  # it is to be that of the variant's own step
            torch.cuda.reset_peak_memory_stats(device)

    def check() -> dict[str, Any]:
        facts = trainee.check(size, variant, bound)
        forget_peak()
        return facts

    def stock_step() -> None:
        before = smolvla_fast.status(policy).training_fast
        with _unpatched(policy):
            trainee.step(size, bf16)
        if smolvla_fast.status(policy).training_fast != before:
            raise Red("the engine computed what was to be stock's step")
        forget_peak()

    try:
        timed(
            benchmark, check, lambda: trainee.step(size, bf16, fused), rounds(pytestconfig),
            beside=None if variant in STOCK else stock_step,
        )  # fmt: skip
    finally:
        policy.model.__dict__.pop("forward", None)
        smolvla_fast.unpatch(policy)
        gc.collect()
    benchmark.extra_info.setdefault("ratio", 1.0)  # stock's to itself
    benchmark.extra_info.update(
        suite="train", variant=variant, cameras=CAMERAS, batch=size, layout=subject.layout, fused=trainee.fused,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        **_share(benchmark, trainee, ceilings, torch.bfloat16 if bf16 else subject.compute_dtype(variant), size,
                 known=variant in CACHE_BYTES and variant != NEW),
    )  # fmt: skip


def _share(
    benchmark: Any, trainee: Trainee, ceilings: Ceilings, dtype: torch.dtype, size: int, known: bool
) -> dict[str, float]:
    """The least time of the step under this machine's roof, and its share of the median. ``known``: no frame is encoded."""
    needed = trainee.batch(size)["observation.language.attention_mask"].any(dim=0)
    costs = training_costs(trainee.policy.model, CAMERAS, int(needed.sum()), dtype.itemsize, size)
    floor_ms = sum(
        ceilings.floor_ms(cost.flops, cost.bytes, dtype)
        for part, cost in costs.items()
        if not (known and part == "vision")
    )
    return {"floor_ms": floor_ms, "share_of_floor": floor_ms / benchmark.extra_info["p50_ms"]}
