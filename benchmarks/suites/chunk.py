"""A whole action chunk: stock, stock compiled, and every tier, by cameras, batch and layers.

Wall time is that of ``predict_action_chunk`` until its chunk can be read. On a GPU also device time, what the GPU works on
it; the difference is the host's.
"""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.harness.device_timing import device_rounds
from benchmarks.harness.flags import counts
from benchmarks.harness.gate import act
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import Case
from smolvla_fast.measure.rounds import summary
from smolvla_fast.model.precision import TIERS

DEVICE_SECONDS = 1.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cameras, batch = (
        counts(option("--cameras"), "--cameras", (1, 2, 3)),
        counts(option("--batch"), "--batch", (1,)),
    )
    layers = counts(option("--layers"), "--layers", ()) or (None,)
    # One policy after the other, and of each what matters most first.
    cases = [(c, b, n) for n, b, c in product(layers, batch, cameras)]
    ids = [f"{c}cameras-batch{b}" + (f"-{n}layers" if n else "") for c, b, n in cases]
    metafunc.parametrize(("cameras", "batch", "layers"), cases, ids=ids)


def test_chunk(measure, make_setup, ceilings, pytestconfig, cameras, batch, layers):
    setup, case = make_setup(layers), Case(cameras, batch)
    variants = [setup.stock(case), *(setup.tier(name, case) for name in TIERS)]
    if pytestconfig.getoption("--with-compile"):
        variants.append(setup.compiled(case, pytestconfig.getoption("--compile-mode")))
    for each in variants:
        each.facts["floor_ms"] = setup.floor_ms(each.facts["precision"], case, ceilings)
    group = f"chunk: {setup.group}, {cameras} cameras" + (f", batch {batch}" if batch > 1 else "")
    for each in measure(group, variants, rounds(pytestconfig), suite="chunk"):
        slowest = 1e3 * max(each.stats.stats.data)
        with measure.recorder.attempt(each, group):
            queue = lambda policy=each.policy: act(policy, setup.inputs(cameras, batch))  # noqa: E731
            found = device_rounds(queue, setup.device, rounds(pytestconfig), DEVICE_SECONDS, slowest + 1.0)
            if found is not None:
                wall = sorted(1e3 * seconds for seconds in each.stats.stats.data)
                figures = summary(found)
                host = summary(wall)["p50_ms"] - figures["p50_ms"]
                each.facts.update(device_ms=figures, device_rounds_ms=found, host_ms=host)
    measure.recorder.save()
