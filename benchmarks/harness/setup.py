"""The policy under test, its observations, and the variants of it: each a twin that shares all weights."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smolvla_fast
from benchmarks.harness import gate
from benchmarks.harness.account import stage_costs
from benchmarks.harness.machine import Ceilings
from benchmarks.harness.measure import Variant
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.measure.rounds import PeakMemory, synchronize, timed_ms
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops.select import select
from smolvla_fast.testing import policies

MOST_CAMERAS = 4
WIDTHS = {"int8": torch.int8, "fp8": torch.int8}
"""What the products of a quantised tier are counted in; any other tier's are in its ``gemm_dtype``."""


@dataclasses.dataclass(frozen=True)
class Case:
    """cameras, batch  of the observation      observations  how many of them a variant is checked on"""

    cameras: int = 2
    batch: int = 1
    observations: int = 1


def twin(policy: Any) -> Any:
    """The same weights under another policy object, which can be patched or made to run something else on its own."""
    other = copy.copy(policy)
    other._modules = {**policy._modules, "model": copy.copy(policy.model)}
    return other


def why_not(tier: str, device: torch.device, backend: str = "auto") -> str | None:
    """Why a tier cannot be served on this device by a backend, or None."""
    try:
        select(backend, device, TIERS[tier].stock_order, TIERS[tier].quantized)
    except RuntimeError as reason:
        return str(reason)
    return None


class BenchmarkSetup:
    """One policy of random weights, never patched itself: it is stock.

    size    "full" or "tiny"      layout  "fp32" or "mixed"; None: fp32 on a CPU, mixed elsewhere
    steps, layers  None: the configuration's
    """

    def __init__(
        self, device: torch.device, size: str = "full", layout: str | None = None, steps: int | None = None,
        layers: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.size = device, size
        self.layout = layout or ("fp32" if device.type == "cpu" else "mixed")
        self._config = {} if layers is None else {"num_vlm_layers": layers}
        self.policy = self._make("lerobot")
        if steps:
            self.policy.config.num_steps = steps
        self.lost: dict[Case, float] = {}
        self._inputs: dict[tuple[int, int, int], tuple[dict[str, Tensor], Tensor]] = {}
        self._stock: dict[Case, list[Tensor]] = {}

    def _make(self, origin: str) -> Any:
        return policies.make_policy(
            self.size,
            origin=origin,
            cameras=MOST_CAMERAS,
            layout=self.layout,
            device=self.device,
            **self._config,
        )

    def reference(self) -> Any:
        """SmolVLA in plain PyTorch, by another code than LeRobot's, with the weights of the policy under test."""
        other = self._make("ours")
        other.model.load_state_dict(self.policy.model.state_dict(), assign=True)
        other.config.num_steps = self.policy.config.num_steps
        return other

    @property
    def group(self) -> str:
        config = self.policy.config
        return (
            f"{self.size} size, {self.device.type}, {self.layout} weights, {config.num_vlm_layers} layers, "
            f"{config.num_steps} steps"
        )

    def inputs(self, cameras: int, batch: int = 1, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """An observation and its noise."""
        if (cameras, batch, seed) not in self._inputs:
            self._inputs[cameras, batch, seed] = (
                policies.make_observation(self.policy, cameras=cameras, batch=batch, seed=seed),
                policies.make_noise(self.policy, batch=batch, seed=seed),
            )
        return self._inputs[cameras, batch, seed]

    def every(self, case: Case) -> list[tuple[dict[str, Tensor], Tensor]]:
        return [self.inputs(case.cameras, case.batch, seed) for seed in range(case.observations)]

    def chunk(self, policy: Any, case: Case) -> Tensor:
        found = gate.act(policy, self.inputs(case.cameras, case.batch))
        synchronize(self.device)
        return found

    def stock_chunks(self, case: Case) -> list[Tensor]:
        if case not in self._stock:
            self._stock[case] = [gate.act(self.policy, each) for each in self.every(case)]
        return self._stock[case]

    def stock(self, case: Case) -> Variant:
        """LeRobot's own code, held to the plain implementation: nothing of what we change may have reached it."""

        def check() -> dict[str, Any]:
            chunks, facts = self._first(self.policy, case)
            truth = gate.act(self.reference(), self.inputs(case.cameras, case.batch))
            again = self._stock.setdefault(case, chunks)
            if not torch.equal(again[0], chunks[0]):
                raise gate.CheckFailed("stock gave another chunk for the same observation before")
            found = gate.within(gate.compare(chunks[0], truth), gate.COMPILED_BOUND[self.layout])
            return {**facts, **found, "against": "the plain PyTorch implementation"}

        return self._variant("stock", "stock", "stock", self.policy, case, check)

    def tier(self, name: str, case: Case, backend: str = "auto", label: str | None = None) -> Variant:
        """A twin patched to a tier."""
        policy = twin(self.policy)

        def check() -> dict[str, Any]:
            reason = why_not(name, self.device, backend)
            if reason:
                raise gate.Unavailable(reason)
            try:
                smolvla_fast.patch(policy, precision=name, backend=backend)
            except (RuntimeError, ValueError) as error:
                raise gate.Unavailable(str(error)) from error
            chunks, facts = self._first(policy, case)
            facts |= gate.check_tier(
                policy, name, self.layout, self.every(case), chunks, self.stock_chunks(case)
            )
            if "stock_bf16_rel_l2" in facts:
                self.lost[case] = facts["stock_bf16_rel_l2"]
            return {**facts, "status": self.status_of(policy)}

        variant = self._variant(label or name, "tier", name, policy, case, check)
        variant.late = lambda: gate.check_late(policy)
        return variant

    def peer(
        self, name: str, precision: str, case: Case, make: Callable[[Any], Any], foreign: bool = True
    ) -> Variant:
        """A twin whose ``sample_actions`` is made from its model. make  raises Unavailable where it cannot"""
        policy = twin(self.policy)

        def check() -> dict[str, Any]:
            policy.model.__dict__["sample_actions"] = make(policy.model)
            chunks, facts = self._first(policy, case)
            truths = self.stock_chunks(case)
            if self.layout == "fp32":
                return facts | gate.check_peer(precision, chunks, truths, self.lost.get(case))
            return facts | gate.within(gate.compare(chunks[0], truths[0]), gate.COMPILED_BOUND[self.layout])

        variant = self._variant(name, "peer", precision, policy, case, check)
        variant.foreign = foreign
        return variant

    def compiled(self, case: Case, mode: str | None) -> Variant:
        """LeRobot's ``compile_model``: its method compiled, by default in the mode that it takes on a GPU."""
        mode = mode or ("max-autotune" if self.device.type == "cuda" else "default")

        def make(model: Any) -> Any:
            function = torch.compile(model.sample_actions, mode=mode)

            def sample_actions(*args: Any, **kwargs: Any) -> Tensor:
                before = torch.get_float32_matmul_precision()
                if self.device.type == "cuda":
                    torch.set_float32_matmul_precision("high")  # as it asks for
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.set_float32_matmul_precision(before)

            return sample_actions

        name = "stock compiled" if mode == "default" else f"stock compiled, {mode}"
        return self.peer(name, "fp32", case, make)

    def _variant(
        self,
        name: str,
        kind: str,
        precision: str,
        policy: Any,
        case: Case,
        check: Callable[[], dict[str, Any]],
    ) -> Variant:
        facts = dict(
            variant=name, kind=kind, precision=precision, ratio_to="stock", cameras=case.cameras, batch=case.batch,
            layers=self.policy.config.num_vlm_layers, steps=self.policy.config.num_steps, layout=self.layout,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        return Variant(name, check, lambda: self.chunk(policy, case), policy=policy, facts=facts)

    def _first(self, policy: Any, case: Case) -> tuple[list[Tensor], dict[str, Any]]:
        """The first chunks; with the first one's time and how far memory rose above what was held before."""
        _give_back()
        before = resident(self.device)
        memory, inputs = PeakMemory(self.device), self.every(case)
        first_ms, found = timed_ms(lambda: gate.act(policy, inputs[0]), self.device)
        peak = memory.bytes
        added = None if peak is None or before is None else peak - before
        facts = dict(first_chunk_ms=first_ms, peak_bytes=peak, added_bytes=added)
        return [found, *(gate.act(policy, each) for each in inputs[1:])], facts

    def status_of(self, policy: Any) -> dict[str, Any]:
        now = smolvla_fast.status(policy)
        names = ("graphs", "graph_nodes", "graph_bytes", "step_launches", "extra_bytes", "stages")
        return {
            **{name: getattr(now, name) for name in names},
            "fallback_reasons": gate.fallback_reasons(now),
        }

    def dtype(self, precision: str) -> torch.dtype:
        """The dtype of a variant's large matrix products."""
        stored = torch.float32 if self.layout == "fp32" else torch.bfloat16
        tier = TIERS.get(precision)
        return WIDTHS.get(precision) or (
            stored if tier is None or tier.gemm_dtype is None else tier.gemm_dtype
        )

    def floors(self, precision: str, case: Case, ceilings: Ceilings) -> dict[str, dict[str, float]]:
        """By stage: operations, bytes, and the least time for them on this machine."""
        dtype = self.dtype(precision)
        language = self.inputs(case.cameras, case.batch)[0]["observation.language.tokens"].shape[1]
        costs = stage_costs(self.policy.model, case.cameras, language, dtype.itemsize, case.batch)
        return {
            stage: dict(
                flops=cost.flops, bytes=cost.bytes, floor_ms=ceilings.floor_ms(cost.flops, cost.bytes, dtype)
            )
            for stage, cost in costs.items()
        }

    def floor_ms(self, precision: str, case: Case, ceilings: Ceilings) -> float:
        return sum(each["floor_ms"] for each in self.floors(precision, case, ceilings).values())

    def stage_times(self, policy: Any, case: Case) -> dict[str, float]:
        return stage_times(policy, *self.inputs(case.cameras, case.batch))


def resident(device: torch.device) -> int | None:
    """Bytes of this process in memory, or on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), None)


def _give_back() -> None:
    """Returns what the allocator keeps of freed memory, or one variant's leavings would hide the next one's needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
