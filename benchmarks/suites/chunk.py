"""A whole action chunk: stock, stock compiled, and every tier, by number of cameras."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.account import stage_costs
from benchmarks.harness.gate import COMPILED_BOUND, check_chunk, timed
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import why_not
from smolvla_fast.model.precision import TIERS

COMPILED = "stock compiled"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Variants of one camera count stand next to each other, so that they share the machine's state.
    cameras = [int(count) for count in metafunc.config.getoption("--cameras").split(",")]
    metafunc.parametrize("cameras", cameras, ids=lambda count: f"{count}cameras")


@pytest.mark.parametrize("variant", ["stock", COMPILED, *TIERS])
def test_chunk(benchmark, subject, patched, ceilings, pytestconfig, variant, cameras):
    if variant == COMPILED and not pytestconfig.getoption("--with-compile"):
        pytest.skip("compiling takes minutes on a CPU; ask for it by --with-compile")
    if why_not(variant, subject.device):
        pytest.skip(str(why_not(variant, subject.device)))
    benchmark.group = f"chunk: {subject.group}, {cameras} cameras"
    model = subject.policy.model

    def check():
        if variant == "stock":
            return check_chunk(subject.stock_chunk(cameras), subject.stock_chunk(cameras), 0.0)
        if variant == COMPILED:
            return check_chunk(
                subject.chunk(cameras), subject.stock_chunk(cameras), COMPILED_BOUND[subject.layout]
            )
        return subject.check(variant, cameras)

    if variant in TIERS:
        patched(variant)
    if variant == COMPILED:
        # The mode of LeRobot's own `compile_model` on a GPU; on a CPU it only makes compilation longer.
        mode = "max-autotune" if subject.device.type == "cuda" else "default"
        model.__dict__["sample_actions"] = torch.compile(model.sample_actions, mode=mode)
    try:
        timed(benchmark, check, lambda: subject.chunk(cameras), rounds(pytestconfig))
    finally:
        model.__dict__.pop("sample_actions", None)
    dtype = subject.compute_dtype(variant)
    language = subject.observation(cameras)["observation.language.tokens"].shape[1]
    costs = stage_costs(model, cameras, language, dtype.itemsize).values()
    floor_ms = sum(ceilings.floor_ms(cost.flops, cost.bytes, dtype) for cost in costs)
    benchmark.extra_info.update(
        suite="chunk", variant=variant, cameras=cameras,
        steps=subject.policy.config.num_steps, layout=subject.layout,
        floor_ms=floor_ms, share_of_floor=floor_ms / benchmark.extra_info["p50_ms"],
    )  # fmt: skip
