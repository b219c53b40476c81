"""The random state of a process: which generators it is, and that LeRobot reads what is written of it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.utils.random_utils import load_rng_state
from safetensors.torch import save_file

from smolvla_fast.train import random_state
from smolvla_fast.train.random_state import collect, restore, seeded

pytestmark = pytest.mark.training


class Devices:
    """Two generators under the calls of ``torch.cuda`` and ``torch.xpu``, for a machine that has neither."""

    def __init__(self, current: int = 0) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        self.current_device = lambda: current
        self.is_initialized = lambda: True

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.generators[device].get_state()

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.generators[device].set_state(state)

    def draw(self) -> list[float]:
        return [float(torch.rand((), generator=each)) for each in self.generators]


def test_every_device_that_a_seed_reaches_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` seeds them all, so a run on cuda:1 has to get its own back after an evaluation."""
    devices = Devices()
    monkeypatch.setattr(random_state, "_accelerator", lambda: ("cuda", devices))
    state = collect()
    first = devices.draw()
    with seeded(7):
        for each in devices.generators:
            each.manual_seed(7)  # as torch.manual_seed does where these are real
    second = devices.draw()
    assert len({*first, *second}) == 4, "the same numbers again after an evaluation"
    restore(state)
    assert devices.draw() == first


def test_each_device_gets_its_own_back_where_another_is_current_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run on cuda:1 makes that the current one. A checkpoint's state goes to the current one, whichever it is."""
    devices = Devices()
    monkeypatch.setattr(random_state, "_accelerator", lambda: ("cuda", devices))
    state = collect()
    with seeded(7):
        devices.current_device = lambda: 1
    first = devices.draw()
    assert first == Devices().draw()
    restore(state)
    assert devices.draw() == [first[0]] * 2


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_names_are_lerobots_and_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(current=1)
    monkeypatch.setattr(random_state, "_accelerator", lambda: (kind, devices))
    state = collect()
    assert {name for name in state if kind in name} == {
        f"torch_{kind}_rng_state{end}" for end in ("", "_0", "_1")
    }
    assert torch.equal(
        state[f"torch_{kind}_rng_state"], devices.get_rng_state(1)
    )  # LeRobot's: the current one


def test_mps_has_one_generator_that_is_never_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.mps`` has no ``current_device``."""
    generator = torch.Generator().manual_seed(3)
    mps = SimpleNamespace(
        device_count=lambda: 1,
        get_rng_state=lambda device="mps": generator.get_state(),
        set_rng_state=lambda state, device="mps": generator.set_state(state),
    )
    monkeypatch.setattr(random_state, "_accelerator", lambda: ("mps", mps))
    state = collect()
    drawn = torch.rand(3, generator=generator)
    assert "torch_mps_rng_state" in state
    restore(state)
    assert torch.equal(torch.rand(3, generator=generator), drawn)


def test_a_state_of_another_machine_is_taken_as_far_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_state, "_accelerator", lambda: ("cuda", Devices()))
    state = collect()
    one = Devices()
    del one.generators[1]
    for kind, module in (("cuda", one), ("xpu", Devices()), (None, None)):
        monkeypatch.setattr(random_state, "_accelerator", lambda kind=kind, module=module: (kind, module))
        restore(state)


@pytest.mark.parametrize("held", [False, True], ids=["none held back", "one held back"])
def test_a_normal_number_held_back_comes_back(held: bool) -> None:
    """``random.gauss`` makes two numbers and keeps one for the next call, numpy's likewise."""
    with seeded(0):
        if held:
            random.gauss(0, 1), np.random.randn()  # noqa: NPY002
        state = collect()
        drawn = [random.gauss(0, 1), random.random(), np.random.randn()]  # noqa: NPY002
        random.gauss(0, 1)
        restore(state)
        assert [random.gauss(0, 1), random.random(), np.random.randn()] == drawn  # noqa: NPY002


def test_lerobot_reads_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        random.gauss(0, 1)
        with monkeypatch.context() as patched:
            patched.setattr(random_state, "_accelerator", lambda: ("xpu", Devices()))
            save_file(collect(), tmp_path / "rng_state.safetensors")
        drawn = random.random(), torch.rand(3)
        load_rng_state(tmp_path)
        assert random.random() == drawn[0] and torch.equal(torch.rand(3), drawn[1])
