"""What one replica computes, without Ray around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline.checkpoints import Checkpoint, rel_l2, save_checkpoint

SERVED_EXACTLY = 1e-5  # fp32 sums in another order: a batch's beside one observation's


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("ray.serve", reason='the fleet runs on Ray Serve: pip install ".[fleet]"')
    pytest.importorskip("lerobot.rollout", reason="the fleet speaks the protocol of LeRobot 0.6")
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_steps=3)


@pytest.fixture
def replica(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """replica(precision) -> a replica in this process."""
    monkeypatch.chdir(tmp_path)
    from smolvla_fast.fleet.replica import Replica

    return lambda precision=None: Replica(str(checkpoint.path), "cpu", 8, 0.0, precision)


def observation(number: int, cameras: int = 2, task: str = "go", size: tuple[int, int] = (24, 32)) -> Any:
    rng = np.random.default_rng(number)
    frames = {
        f"observation.images.camera{i + 1}": rng.integers(0, 256, (3, *size), np.uint8)
        for i in range(cameras)
    }
    return {"observation.state": rng.normal(size=(1, 6)).astype(np.float32), **frames}, task, number


def tallied(replica: Any) -> list[int]:
    """How many observations each of its batches has, from now on."""
    sizes: list[int] = []
    predict = replica._policy.predict_action_chunk

    def noted(batch: Any, **kwargs: Any) -> Any:
        sizes.append(len(batch["observation.state"]))
        return predict(batch, **kwargs)

    replica._policy.predict_action_chunk = noted
    return sizes


def test_what_fits_together_is_one_batch_and_answers_keep_their_places(replica: Any) -> None:
    """Instructions of several lengths fit; another number of cameras does not, and nor does another size."""
    one = replica()
    assert one.report().startswith("fp32 by ")
    asked = [
        observation(0), observation(1, cameras=1), observation(2, task="pick up the red cube and put it down"),
        observation(3, size=(32, 24)), observation(4, cameras=1), observation(5),
    ]  # fmt: skip
    alone = [one._answers([each])[0] for each in asked]
    sizes = tallied(one)
    together = one._answers(asked)
    assert sizes == [3, 2, 1]
    for got, want in zip(together, alone, strict=True):
        assert got.shape == want.shape
        assert rel_l2(*map(tensor, (got, want))) <= SERVED_EXACTLY
    assert rel_l2(tensor(together[0]), tensor(together[5])) > 100 * SERVED_EXACTLY


def tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def test_an_observation_that_fails_takes_no_other_with_it(replica: Any) -> None:
    one = replica()
    sick = observation(1)
    sick = sick[0], None, sick[2]  # no task: LeRobot's tokenizer raises for the whole batch
    first, error, last = one._answers([observation(0), sick, observation(2)])
    assert isinstance(error, str) and "Error: " in error
    for got, number in ((first, 0), (last, 2)):
        assert rel_l2(tensor(got), tensor(one._answers([observation(number)])[0])) <= SERVED_EXACTLY


def test_a_replica_that_computes_nothing_any_more_ends(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an error of a GPU, which stays: Ray starts another in its place."""
    from smolvla_fast.fleet import replica as module

    one = replica()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    def ends(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(one._policy, "predict_action_chunk", fails)
    monkeypatch.setattr(module.os, "_exit", ends)
    with pytest.raises(SystemExit):
        one._answers([observation(0)])


@pytest.mark.parametrize(
    ("precision", "disabled", "why"), [("fp4", "", "'fp4'"), (None, "1", "DISABLE is set")]
)
def test_a_policy_that_is_not_patched_serves_stock_and_says_so(
    precision: str | None, disabled: str, why: str, replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (want,) = replica()._answers([observation(0)])
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", disabled)
    stock = replica(precision)
    assert stock.report().startswith("stock, for ") and why in stock.report()
    (got,) = stock._answers([observation(0)])
    assert rel_l2(tensor(got), tensor(want)) <= SERVED_EXACTLY
