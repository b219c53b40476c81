"""The policy under test, its observations, and the variants of it: each a twin that shares all weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import smolvla_fast
from benchmarks.harness import gate
from benchmarks.harness.measure import Variant
from benchmarks.harness.roof import Ceilings, stage_costs
from smolvla_fast.engine.timing import apart
from smolvla_fast.measure.rounds import PeakMemory, synchronize, timed_ms
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops.select import select
from smolvla_fast.testing import policies

MOST_CAMERAS = 4

Inputs = tuple[dict[str, Tensor], Tensor]
"""An observation and its noise."""
Make = Callable[[Any], Any]


class Case(NamedTuple):
    """cameras, batch  of the observation      observations  how many of them a variant is checked on"""

    cameras: int = 2
    batch: int = 1
    observations: int = 1


def twin(policy: Any) -> Any:
    """The same weights under another policy object, which can be patched or made to run something else on its own."""
    # ``patch`` gives the pair of VLM and expert a class of its own as well.
    pair = apart(policy.model.vlm_with_expert)
    return apart(policy, model=apart(policy.model, vlm_with_expert=pair))


class BenchmarkSetup:
    """One policy of random weights, never patched itself: it is stock.

    size    "full" or "tiny"      layout  "fp32" or "mixed"; None: fp32 on a CPU, mixed elsewhere
    steps, layers  None: the configuration's      ceilings  of this machine
    """

    def __init__(
        self, device: torch.device, ceilings: Ceilings, size: str = "full", layout: str | None = None,
        steps: int | None = None, layers: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.ceilings, self.size = device, ceilings, size
        self.layout = layout or ("fp32" if device.type == "cpu" else "mixed")
        self._config = {} if layers is None else {"num_vlm_layers": layers}
        self.policy = self._make("lerobot")
        self.policy.config.num_steps = steps or self.policy.config.num_steps
        self.lost: dict[Case, float] = {}
        self._known: dict[Any, Any] = {}

    def _make(self, origin: str) -> Any:
        named: dict[str, Any] = dict(origin=origin, layout=self.layout, device=self.device, **self._config)
        return policies.make_policy(self.size, cameras=MOST_CAMERAS, **named)

    @cached_property
    def reference(self) -> Any:
        """SmolVLA in plain PyTorch, by another code than LeRobot's, with the weights of the policy under test."""
        other = self._make("ours")
        other.model.load_state_dict(self.policy.model.state_dict(), assign=True)
        other.config.num_steps = self.policy.config.num_steps
        return other

    def named(self, suite: str, case: Case) -> str:
        """The group of a suite's benchmarks."""
        config, train = self.policy.config, suite == "train"
        size = f"{self.size} size, {self.device.type}, {self.layout} weights, {config.num_vlm_layers} layers"
        steps = "" if train else f", {config.num_steps} steps"
        batch = f", batch {case.batch}" if train or case.batch > 1 else ""
        return f"{suite}: {size}{steps}, {case.cameras} cameras{batch}"

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time that it was asked for by this key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def inputs(self, cameras: int, batch: int = 1, seed: int = 0) -> Inputs:
        def make() -> Inputs:
            observation = policies.make_observation(self.policy, cameras=cameras, batch=batch, seed=seed)
            return observation, policies.make_noise(self.policy, batch=batch, seed=seed)

        return self.once((cameras, batch, seed), make)

    def every(self, case: Case) -> list[Inputs]:
        return [self.inputs(case.cameras, case.batch, seed) for seed in range(case.observations)]

    def chunk(self, policy: Any, case: Case) -> Tensor:
        found = gate.act(policy, self.inputs(case.cameras, case.batch))
        synchronize(self.device)
        return found

    def stock_chunks(self, case: Case, found: list[Tensor] | None = None) -> list[Tensor]:
        """Stock's on every observation, computed once. found  these, where there are none yet"""
        inputs = self.every(case)
        return self.once(("stock", case), lambda: found or [gate.act(self.policy, each) for each in inputs])

    def stock(self, case: Case, kind: str = "stock") -> Variant:
        """LeRobot's own code. kind  of ``gate.CHECKS``"""
        return self._variant("stock", kind, "stock", case, lambda policy: None)

    def tier(
        self, name: str, case: Case, backend: str = "auto", label: str | None = None, kind: str = "tier"
    ) -> Variant:
        """A twin patched to a tier."""

        def make(policy: Any) -> None:
            try:
                select(backend, self.device, TIERS[name].stock_order, TIERS[name].quantized)
                smolvla_fast.patch(policy, precision=name, backend=backend)
            except (RuntimeError, ValueError) as error:
                raise gate.Unavailable(str(error)) from error

        return self._variant(label or name, kind, name, case, make)

    def peer(self, name: str, precision: str, case: Case, make: Make) -> Variant:
        """A twin whose ``sample_actions`` is made from its model. make  raises Unavailable where it cannot"""

        def replace(policy: Any) -> None:
            policy.model.__dict__["sample_actions"] = make(policy.model)

        return self._variant(name, "peer", precision, case, replace)

    def variants(self, case: Case, option: Any = None) -> list[Variant]:
        """Stock, every tier, and of a suite with options stock compiled."""
        found = [self.stock(case), *(self.tier(name, case) for name in TIERS)]
        return [*found, self.compiled(case, option)] if option else found

    def compiled(self, case: Case, option: Any) -> Variant:
        """LeRobot's ``compile_model``: its method compiled."""
        mode = self.compile_mode(option)

        def make(model: Any) -> Any:
            function = self.compile(model.sample_actions, option)

            def sample_actions(*args: Any, **kwargs: Any) -> Tensor:
                before = torch.get_float32_matmul_precision()
                # On a GPU it asks for "high".
                torch.set_float32_matmul_precision("high" if self.device.type == "cuda" else before)
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.set_float32_matmul_precision(before)

            return sample_actions

        name = "stock compiled" if mode == "default" else f"stock compiled, {mode}"
        return self.peer(name, "fp32", case, make)

    def compile_mode(self, option: Any) -> str:
        """By default that which LeRobot takes on a GPU."""
        return option.compile_mode or ("max-autotune" if self.device.type == "cuda" else "default")

    def compile(self, function: Callable[..., Any], option: Any) -> Callable[..., Any]:
        if not option.with_compile:
            raise gate.Unavailable("compiling takes minutes; ask for it by --with-compile")
        return torch.compile(function, mode=self.compile_mode(option))

    def _variant(self, name: str, kind: str, precision: str, case: Case, make: Make) -> Variant:
        """make  makes a twin ready. Floors are by stage: operations, bytes, the least time for them on this machine."""
        config, dtype = self.policy.config, self.dtype(precision)
        language = self.inputs(case.cameras, case.batch)[0]["observation.language.tokens"].shape[1]
        costs = stage_costs(self.policy.model, case.cameras, language, dtype.itemsize, case.batch)
        floors = {stage: self.ceilings.floor(cost, dtype) for stage, cost in costs.items()}
        facts: dict[str, Any] = dict(
            variant=name, kind=kind, precision=precision, ratio_to="stock", cameras=case.cameras, batch=case.batch,
            layers=config.num_vlm_layers, steps=config.num_steps, layout=self.layout, threads=torch.get_num_threads(),
            stage_floors=floors, floor_ms=sum(each["floor_ms"] for each in floors.values()),
        )  # fmt: skip
        policy = self.policy if name == "stock" else twin(self.policy)

        def checked() -> dict[str, Any]:
            make(policy)
            chunks, found = self._first(policy, case)
            return {**found, **gate.CHECKS[kind](self, policy, precision, case, chunks)}

        return Variant(name, checked, lambda: self.chunk(policy, case), kind == "peer", policy, facts)

    def _first(self, policy: Any, case: Case) -> tuple[list[Tensor], dict[str, Any]]:
        """The first chunks; with the first one's time and how far memory rose above what was held before."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)  # or what the allocator keeps of one variant's memory would hide the next one's needs
        memory, inputs = PeakMemory(self.device), self.every(case)
        before = memory.bytes  # what is held; None where the system forgets no peak
        first_ms, found = timed_ms(lambda: gate.act(policy, inputs[0]), self.device)
        peak = memory.bytes
        facts = dict(first_chunk_ms=first_ms, peak_bytes=peak, added_bytes=before and peak and peak - before)
        return [found, *(gate.act(policy, each) for each in inputs[1:])], facts

    def dtype(self, precision: str) -> torch.dtype:
        """The dtype of a variant's large matrix products."""
        stored = torch.float32 if self.layout == "fp32" else torch.bfloat16
        tier = TIERS.get(precision)
        quantized = torch.int16 if precision == "int16" else torch.int8
        return quantized if tier and tier.quantized else (tier and tier.gemm_dtype) or stored
