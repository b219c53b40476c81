"""Figures of rounds, a process's peak of memory, and stock in place of the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.policies import chunk

import smolvla_fast
from smolvla_fast.measure.rounds import as_stock, percentile
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy


def test_percentile_interpolates() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile(list(map(float, range(101))), 0.99) == 99.0
    assert percentile([7.0], 0.95) == 7.0
    with pytest.raises(ValueError, match="no rounds"):
        percentile([], 0.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak")
def test_peak_memory_forgets_what_was_before() -> None:
    """In a process of its own: this one's allocator may serve a block from pages it has touched before."""
    code = (
        "import torch; from smolvla_fast.measure.rounds import PeakMemory;"
        "large = torch.ones(2**26); del large;"
        "memory = PeakMemory('cpu'); before = memory.bytes; block = torch.ones(2**25);"
        "print(memory.bytes - before, block.nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, wanted = map(int, done.stdout.split())
    # The peak of the freed, larger block would hide all of the growth; the rest of the process may shrink meanwhile.
    assert grown > wanted / 2


@pytest.mark.parametrize("origin", ["lerobot", "ours"])
def test_as_stock_runs_stock_and_comes_back(origin: str) -> None:
    policy = make_policy("tiny", origin=origin, num_steps=2)
    observation, noise = make_observation(policy), make_noise(policy)
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="bf16")
    with as_stock(policy):
        assert torch.equal(chunk(policy, observation, noise), stock)
    assert not torch.equal(chunk(policy, observation, noise), stock)
    status = smolvla_fast.status(policy)
    assert (status.calls_fast, status.calls_stock) == (1, 0)
