"""A training step (forward, backward, AdamW), stock's and ``patch(training=True)``'s, with its gradients beside the time.

The policy is LeRobot's with its defaults: expert, heads and state projection learn, the VLM is frozen. The learning rate is
0, so that every round computes the same step. Stock's loss and gradients in fp32 are compared with the plain PyTorch
implementation's, each other variant's with stock's.

Then whole steps of ``smolvla_fast.training`` on a video dataset, its reading apart: LeRobot's policy, optimizer and reader,
ours, and ours where the frames' image tokens are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smolvla_fast
from benchmarks.harness.flags import counts
from benchmarks.harness.gate import COMPILED_BOUND, CheckFailed, Unavailable, check_late
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import rounds
from benchmarks.harness.roof import training_costs
from benchmarks.harness.setup import BenchmarkSetup, Case, twin
from smolvla_fast.cli.subject import resolve_device
from smolvla_fast.measure.rounds import PeakMemory, synchronize
from smolvla_fast.ops.processor import why_bf16_is_slow
from smolvla_fast.smolvla import SmolVLAConfig
from smolvla_fast.testing.backbone import FULL_VISION, TINY_TEXT, TINY_VISION, TINY_VOCAB, make_vlm_folder
from smolvla_fast.testing.dataset import REPO_ID, write_dataset
from smolvla_fast.testing.policies import FULL_FRAME, TINY_FRAME
from smolvla_fast.train import DatasetSettings, TrainSettings
from smolvla_fast.train.data import training_batches
from smolvla_fast.train.processes import own_accelerate
from smolvla_fast.train.readable import KNOWN
from smolvla_fast.training import loss_of, prepare, update

CAMERAS = 2
BATCHES = {"cpu": (1, 2), "cuda": (8,)}
COMPILED = "stock compiled"
CACHED, NEW = "patched, frames known", "patched, frames new"
FUSED = "patched, frames known, AdamW fused"
STOCK = ("stock", "stock bf16")
PLAIN = "plain PyTorch"
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
        self.resident = PeakMemory(self.device).bytes
        learns = [each for each in setup.policy.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr=0.0)
        self._in_one_pass = torch.optim.AdamW(learns, lr=0.0, fused=True)
        self._truths: dict[str, dict[str, Tensor]] = {}
        self.batch = dict(setup.inputs(CAMERAS, size)[0])
        shape = (size, setup.policy.config.chunk_size, setup.policy.config.action_feature.shape[0])
        self.batch["action"] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def loss(self, policy: Any, bf16: bool) -> Tensor:
        """With the same noise and time at every call."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            torch.manual_seed(0)
            return policy.forward(dict(self.batch))[0]

    def fused(self) -> torch.optim.AdamW:
        """The fused optimizer over the moments of the other: second ones would count among a variant's peak."""
        for weight, state in self.optimizer.state.items():
            if weight not in self._in_one_pass.state:
                step = state["step"].to(weight.device, copy=True)
                self._in_one_pass.state[weight] = {**state, "step": step}
        return self._in_one_pass

    def truth(self, name: str) -> dict[str, Tensor]:
        """Loss and gradients of one of STOCK or of PLAIN, computed once."""
        if name not in self._truths:
            policy = self.setup.reference.train() if name == PLAIN else twin(self.setup.policy)
            policy.zero_grad()
            self._truths[name] = Trainee(self, name, policy=policy).found()
        return self._truths[name]


class Trainee:
    """One policy in train mode, on the batch of a case. policy  None: a twin of the setup's"""

    def __init__(self, case: TrainCase, variant: str, option: Any = None, policy: Any = None) -> None:
        self.case, self.variant, self.option, self.bf16 = case, variant, option, variant.endswith("bf16")
        self.policy, self.patched = policy or twin(case.setup.policy), variant.startswith("patched")

    @property
    def optimizer(self) -> torch.optim.AdamW:
        return self.case.fused() if self.variant == FUSED else self.case.optimizer

    def prepare(self) -> Trainee:
        setup, model = self.case.setup, self.policy.model
        slow = setup.device.type == "cpu" and setup.size == "full" and why_bf16_is_slow()
        if self.bf16 and slow:
            raise Unavailable(f"{slow}: a step of stock in bf16 takes many minutes here")
        if self.variant == COMPILED:
            model.__dict__["forward"] = setup.compile(model.forward, self.option)
        if self.patched:
            smolvla_fast.patch(self.policy, training=True, image_cache=CACHE_BYTES.get(self.variant, 0))
        return self

    def step(self) -> Tensor:
        """One step; its loss. Gradients stay until the next one."""
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        loss = self.case.loss(self.policy, self.bf16)
        loss.backward()
        optimizer.step()
        synchronize(self.case.device)
        return loss.detach()

    def found(self) -> dict[str, Tensor]:
        """Copies of the loss and of every gradient of a step, by name: on a GPU they would count among a variant's peak."""
        found = {"loss": self.step()}
        found |= {name: each.grad for name, each in self.policy.named_parameters() if each.grad is not None}
        return {name: each.detach().to("cpu", copy=True) for name, each in found.items()}

    def check(self) -> dict[str, Any]:
        """Distances from stock in fp32, of the bound (in bf16 twice what stock itself loses). Raises CheckFailed beyond it.

        With a cache the second step is judged, which finds the frames that the first encodes: such a one is timed.
        """
        facts: dict[str, Any] = {"fused": bool(self.optimizer.param_groups[0]["fused"])}
        if self.variant in CACHE_BYTES:
            self.step()
        found = self.case.truth(self.variant) if self.variant in STOCK else self.found()
        truth = self.case.truth(PLAIN if self.variant == "stock" else "stock")
        error, layout = distance(found, truth), self.case.setup.layout
        bound = GRADIENT_BOUND if self.patched and layout == "fp32" else COMPILED_BOUND[layout]
        if self.bf16:
            bound = 2 * distance(self.case.truth("stock bf16"), self.case.truth("stock"))["gradient_rel_l2"]
        if self.variant in CACHE_BYTES:
            known, frames = smolvla_fast.status(self.policy).training_cache["hits"], self.case.size * CAMERAS
            if known != (0 if self.variant == NEW else frames):
                raise CheckFailed(f"{known} of {frames} frames were known")
            facts["frames_known"] = known
        if not (apart := error["gradient_rel_l2"]) <= bound:
            raise CheckFailed(f"gradients are {apart:.3g} from stock's in fp32, allowed {bound:.3g}")
        check_late(self.policy)
        return {**error, **facts, "bound": bound, "peak_bytes": self.peak()}

    def peak(self) -> int | None:
        """Of one step of this variant alone, on a GPU: what the twins before it hold is not counted."""
        device = self.case.device
        if device.type != "cuda":
            return None
        memory = PeakMemory(device)
        before = memory.bytes
        self.step()
        return memory.bytes - before + self.case.resident

    def measured(self) -> Variant:
        """With the least time of a step under this machine's roof; a frame that is known is not encoded."""
        case, dtype = self.case, torch.bfloat16 if self.bf16 else self.case.setup.dtype("stock")
        needed = int(case.batch["observation.language.attention_mask"].any(dim=0).sum())
        costs = training_costs(self.policy.model, CAMERAS, needed, dtype.itemsize, case.size)
        if self.variant in (CACHED, FUSED):
            del costs["vision"]
        name, check = self.variant, lambda: self.prepare().check()
        facts = dict(
            variant=name, ratio_to=STOCK[self.bf16], cameras=CAMERAS, batch=case.size, layout=case.setup.layout,
            floor_ms=sum(case.setup.ceilings.floor(cost, dtype)["floor_ms"] for cost in costs.values()),
        )  # fmt: skip
        return Variant(name, check, self.step, policy=self.policy, facts=facts)


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    if found.keys() != truth.keys():
        names = ", ".join(sorted(found.keys() ^ truth.keys()))
        raise CheckFailed(f"only one of this and stock has a gradient of {names}")

    def rel_l2(names: Iterable[str]) -> float:
        """Of all of these as one vector."""
        norms = [[x.norm() for x in (found[n].double() - truth[n], truth[n].double())] for n in names]
        apart, whole = (math.hypot(*each) for each in zip(*norms, strict=True))
        return apart / whole

    return {"gradient_rel_l2": rel_l2(truth.keys() - {"loss"}), "loss_rel": rel_l2(["loss"])}


TRAINERS = {"LeRobot": ("off", 0), "train": ("on", 0), "train, frames known": ("on", 2**28)}
"""``fast`` and ``image_cache`` of each."""
AHEAD = 2
"""Batches that a check takes before the rounds."""


class Trainer:
    """A run on the dataset in ``root``, which reads in its own process; its rate is too low to move a weight.

    weights  of another run, taken in place of its own      side  of the images      rounds  whose frames are made known
    """

    def __init__(
        self, variant: str, root: Path, device: str, side: int, size: int, rounds: int, weights: Any
    ) -> None:
        self.variant, self.rounds = variant, rounds
        fast, image_cache = TRAINERS[variant]
        config = SmolVLAConfig(
            vlm_model_name=str(root / "vlm"), load_vlm_weights=False, device=device, optimizer_lr=1e-30,
            resize_imgs_with_padding=(side, side), scheduler_warmup_steps=0,
        )  # fmt: skip
        data = DatasetSettings(REPO_ID, str(root / "data"), video_backend="pyav")
        settings = TrainSettings(
            data, config, root / variant, implementation="lerobot", fast=fast, image_cache=image_cache, batch_size=size,
            num_workers=0,
        )  # fmt: skip
        self.run = prepare(settings)
        if weights is not None:
            for own, other in zip(self.run.policy.parameters(), weights.parameters(), strict=True):
                own.data = other.data
        if variant == "LeRobot":
            reader = self.run.data.train.reader
            reader.__class__ = type(reader).__base__
        self.batches = training_batches(self.run.settings, self.run.data.train, 0)

    def check(self, stock: Trainer) -> dict[str, Any]:
        """Distances of the first batch's gradients from LeRobot's; memory of a step."""
        run = self.run
        if run.known.store:
            ahead = training_batches(run.settings, run.data.train, 0)
            for _ in range(AHEAD + self.rounds):
                run.known.tokens(run.prepared(next(ahead)))
        error = distance(self.found, stock.found)
        if not (apart := error["gradient_rel_l2"]) <= GRADIENT_BOUND:
            raise CheckFailed(f"gradients are {apart:.3g} from LeRobot's, allowed {GRADIENT_BOUND:.3g}")
        memory = PeakMemory(run.policy.config.device)
        before = memory.bytes
        self.step()
        peak = memory.bytes
        return {
            **error,
            "bound": GRADIENT_BOUND,
            "added_bytes": before and peak and peak - before,
            "peak_bytes": peak,
        }

    @cached_property
    def found(self) -> dict[str, Tensor]:
        """Loss and gradients of the first batch, in noise of its own."""
        run, raw = self.run, next(self.batches)
        if run.known.store and not raw[KNOWN].all():
            raise CheckFailed("frames that were made known are not known")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = loss_of(run, run.model, run.prepared(raw), run.samples)
        loss.backward()
        grads = {name: each.grad for name, each in run.policy.named_parameters() if each.grad is not None}
        found = {name: each.detach().to("cpu", copy=True) for name, each in {"loss": loss, **grads}.items()}
        run.optimizer.zero_grad()
        return found

    def step(self) -> dict[str, float]:
        facts = update(self.run, self.batches)
        self.run.step += 1
        return {"data": 1e3 * facts["data_s"], "update": 1e3 * facts["update_s"]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    sizes = counts(option.batch, "--batch", BATCHES[resolve_device(option.device or "auto").type])
    sizes = sizes[:1] if "tmp_path" in metafunc.fixturenames else sizes
    metafunc.parametrize("size", sizes, ids=lambda size: f"batch{size}")


def test_train_step(measure: Any, make_setup: Any, pytestconfig: Any, size: int) -> None:
    case = TrainCase(make_setup(), size)
    variants = [Trainee(case, name, pytestconfig.option).measured() for name in VARIANTS]
    try:
        measure(case.setup.named("train", Case(CAMERAS, size)), variants, rounds(pytestconfig), suite="train")
    finally:
        case.setup.policy.eval()


def test_trainer(measure: Any, device: Any, pytestconfig: Any, tmp_path: Path, size: int) -> None:
    tiny = pytestconfig.getoption("--size") == "tiny"
    sizes = dict(text=TINY_TEXT, vision=TINY_VISION, vocab_size=TINY_VOCAB) if tiny else {}
    make_vlm_folder(tmp_path / "vlm", images=True, **sizes)
    data = write_dataset(
        tmp_path / "data", episodes=2 if tiny else 12, frame=TINY_FRAME if tiny else FULL_FRAME, videos=True
    )
    side = (TINY_VISION if tiny else FULL_VISION)["image_size"]
    many, found = rounds(pytestconfig), dict[str, Trainer]()

    def variant(name: str) -> Variant:
        def check() -> dict[str, Any]:
            weights = found["LeRobot"].run.policy if found else None
            own = found[name] = Trainer(name, tmp_path, str(device), side, size, many, weights)
            if name != "LeRobot":
                made.policy = own.run.policy
            return own.check(found["LeRobot"])

        facts = dict(variant=name, ratio_to="LeRobot", batch=size, cameras=CAMERAS, frames=len(data))
        made = Variant(name, check, lambda: found[name].step(), facts=facts)
        return made

    group = f"trainer: {'tiny' if tiny else 'full'} size, {device.type}, {len(data)} frames as video, batch {size}"
    with own_accelerate():
        measure(group, [variant(name) for name in TRAINERS], many, suite="trainer")
