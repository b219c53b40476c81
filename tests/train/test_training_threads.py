"""Training losses of one policy in several threads. Each test lets another thread in at the one place where it did harm."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "lerobot.policies.smolvla.modeling_smolvla", reason="parity is against LeRobot's own classes"
)

from support.policies import model_inputs
from support.threads import PATIENCE, elsewhere
from support.train_steps import make_batch

import smolvla_fast
from smolvla_fast.loss import engine as loss_module
from smolvla_fast.loss.image_cache import ImageCache
from smolvla_fast.patching import training_forward
from smolvla_fast.patching.change_detector import ChangeDetector
from smolvla_fast.patching.eligibility import Eligibility
from smolvla_fast.patching.runtime import runtime_of
from smolvla_fast.patching.training_runtime import TrainingRuntime
from smolvla_fast.testing.policies import make_policy

pytestmark = pytest.mark.training


class Trainee:
    """A tiny policy and a batch with its noise and time, so that two losses of it have the same bits."""

    def __init__(self) -> None:
        self.policy = make_policy("tiny").train()
        self.model = self.policy.model
        batch = make_batch(self.policy)
        actions = self.policy.prepare_action(batch)
        noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0))
        self.given = (*model_inputs(self.policy, batch), actions, noise, torch.tensor([0.3, 0.8]))

    def loss(self, autocast: bool = False) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return self.model.forward(*self.given)

    def double_a_layer(self) -> None:
        """A text layer's product becomes a module of another class, which the engine's ops may not replace."""
        mlp = self.model.vlm_with_expert.get_vlm_model().text_model.layers[1].mlp
        doubled = Doubled(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
        doubled.weight = mlp.down_proj.weight
        mlp.down_proj = doubled


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def trainee() -> Trainee:
    return Trainee()


class Once:
    """Runs elsewhere, the first time that this thread comes by."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do: Callable[[], Any] | None = do
        self.here = threading.current_thread()

    def __call__(self) -> None:
        if self.do is not None and threading.current_thread() is self.here:
            do, self.do = self.do, None
            elsewhere(do)


def let_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, do: Callable[[], Any], when: str) -> Once:
    """``do`` runs elsewhere "before" or "after" this thread's next call of a function."""
    real, once = getattr(owner, name), Once(do)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            once()
        found = real(*args, **kwargs)
        if when == "after":
            once()
        return found

    monkeypatch.setattr(owner, name, hooked)
    return once


class Gate:
    """A lock in another's place that lets another thread in as soon as this one has let go of it."""

    def __init__(self, once: Once) -> None:
        self.lock, self.depth, self.once = threading.RLock(), 0, once

    def __enter__(self) -> None:
        self.lock.acquire()
        self.depth += 1

    def __exit__(self, *_: Any) -> None:
        self.depth -= 1
        free = self.depth == 0
        self.lock.release()
        if free:
            self.once()


@pytest.mark.parametrize("place", ["_image_tokens", "encode_images"])
def test_autocast_of_another_thread_is_its_own(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Neither this loss is in its dtype nor the tokens that are kept for later ones."""
    monkeypatch.setattr(loss_module, "why_bf16_is_slow", lambda: None)
    smolvla_fast.patch(trainee.policy, training=True, image_cache=2**20)
    wide, narrow = trainee.loss(), trainee.loss(autocast=True)
    assert not torch.equal(wide, narrow)
    smolvla_fast.refresh(trainee.policy)
    owner: Any = loss_module if place == "encode_images" else loss_module.LossEngine
    once = let_in(monkeypatch, owner, place, lambda: trainee.loss(autocast=True), "before")
    meanwhile = trainee.loss()
    assert once.do is None and torch.equal(meanwhile, wide)
    assert torch.equal(trainee.loss(), wide), "tokens in bf16 were kept as tokens in fp32"


FRAMES = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
SIZE = 2 * 3 * 4  # bytes of a frame's tokens


def encode(frames: Tensor) -> Tensor:
    return frames[:, :, 0, :2].clone()


def counted(callback: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """Encodes to tokens that call back when their bytes are counted, which is in the middle of keeping them."""

    class Counted(Tensor):
        @property
        def nbytes(self) -> int:
            callback()
            return SIZE

    return lambda frames: encode(frames).as_subclass(Counted)


def test_the_bytes_of_tokens_that_two_threads_keep_are_right() -> None:
    """Wrong once, they stayed wrong: at the limit the cache then looked for tokens to drop where there were none."""
    cache, weights = ImageCache(1000), [torch.ones(1, 1)]
    other = threading.Thread(target=lambda: cache.encoded(FRAMES[1:], weights, "", encode), daemon=True)

    def meanwhile() -> None:
        if other.ident is None:
            other.start()
            other.join(0.5)  # without a lock it is through by then, with one it waits for us

    cache.encoded(FRAMES[:1], weights, "", counted(meanwhile))
    other.join(PATIENCE)
    assert cache.to_dict() == {"frames": 2, "bytes": 2 * SIZE, "hits": 0, "misses": 2}


def test_tokens_of_weights_that_another_thread_saw_change_are_not_kept() -> None:
    cache, weight = ImageCache(1000), torch.ones(1, 1)

    def multiplied(frames: Tensor) -> Tensor:
        return encode(frames) * weight

    def overtaken(frames: Tensor) -> Tensor:
        tokens = multiplied(frames)
        weight.mul_(2)
        elsewhere(lambda: cache.encoded(FRAMES[1:], [weight], "", multiplied))
        return tokens

    cache.encoded(FRAMES[:1], [weight], "", overtaken)
    later = cache.encoded(FRAMES, [weight], "", multiplied)
    assert torch.equal(later, multiplied(FRAMES))
    assert cache.to_dict() == {"frames": 2, "bytes": 2 * SIZE, "hits": 1, "misses": 3}


def test_a_refresh_beside_a_loss(trainee: Trainee) -> None:
    smolvla_fast.patch(trainee.policy, training=True)
    want, training = trainee.loss(), runtime_of(trainee.model).training
    training.lock = Gate(Once(lambda: smolvla_fast.refresh(trainee.policy)))
    assert torch.equal(trainee.loss(), want) and training.lock.once.do is None


def test_the_engine_that_computes_is_the_one_that_has_looked(trainee: Trainee) -> None:
    """Another thread's refresh and loss make another engine, and that one's look says nothing of this one."""
    trainee.double_a_layer()
    smolvla_fast.patch(trainee.policy, training=True)
    want, training = trainee.loss(), runtime_of(trainee.model).training
    assert "frozen prefix" in training.fallback_reasons
    smolvla_fast.refresh(trainee.policy)
    training.lock = Gate(Once(lambda: (smolvla_fast.refresh(trainee.policy), trainee.loss())))
    assert torch.equal(trainee.loss(), want) and training.lock.once.do is None
    assert smolvla_fast.status(trainee.policy).training_stock == 0


@pytest.mark.parametrize("name", ["fallback_reasons", "cache"])
def test_a_status_beside_a_refresh(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reads = iter([SimpleNamespace(fallback_reasons={}, cache=None)])
    forgotten = property(lambda self: next(reads, None), lambda self, value: None)
    monkeypatch.setattr(TrainingRuntime, "engine", forgotten, raising=False)
    assert getattr(TrainingRuntime(), name) == {}


def test_what_changes_during_a_look_is_looked_at_again(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    smolvla_fast.patch(trainee.policy, training=True)
    before = trainee.loss()
    smolvla_fast.refresh(trainee.policy)
    once = let_in(monkeypatch, loss_module.LossEngine, "look", trainee.double_a_layer, "after")
    trainee.loss()
    assert once.do is None
    found = trainee.loss()
    assert "frozen prefix" in smolvla_fast.status(trainee.policy).training_fallback_reasons
    smolvla_fast.refresh(trainee.policy)
    assert torch.equal(found, trainee.loss()) and not torch.equal(found, before)


def test_a_structure_that_cannot_be_noted_keeps_its_reason(trainee: Trainee) -> None:
    """A parameter without memory yet has no address to note; that is what stock runs for."""
    trainee.model.extra = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="uninitialized parameter"):
        ChangeDetector(trainee.model)
    smolvla_fast.patch(trainee.policy, training=True)
    trainee.loss()
    now = smolvla_fast.status(trainee.policy)
    assert now.training_stock == 1 and "extra.weight is a" in str(now.training_fallback)


@pytest.mark.parametrize("place", ["before all", "runtime_of", "call_reason"])
def test_unpatched_in_the_middle_of_a_loss(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """Stock computes it, and where the policy was patched when the loss began that is said."""
    stock = trainee.loss()
    smolvla_fast.patch(trainee.policy, training=True)
    forward, unpatch = trainee.model.forward, partial(smolvla_fast.unpatch, trainee.policy)
    if place == "before all":
        elsewhere(unpatch)
    elif place == "runtime_of":
        let_in(monkeypatch, training_forward, place, unpatch, "before")
    else:
        monkeypatch.setattr(Eligibility, place, lambda *_: "not this batch")
        let_in(monkeypatch, Eligibility, place, unpatch, "after")
    with torch.no_grad():
        assert torch.equal(forward(*trainee.given), stock)
    receipt = "this training step runs stock: the policy was unpatched meanwhile"
    assert (receipt in caplog.text) is (place == "runtime_of")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no process forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_the_locks_are_held(trainee: Trainee) -> None:
    """As torch's DataLoader forks its workers: who holds the locks is not there to let go of them."""
    smolvla_fast.patch(trainee.policy, training=True, image_cache=2**20)
    want, training = trainee.loss(), runtime_of(trainee.model).training
    cache, known = training.engine.cache, training.cache
    vlm = trainee.model.vlm_with_expert.get_vlm_model()
    weights = [*vlm.vision_model.parameters(), *vlm.connector.parameters()]
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        if threading.current_thread() is thread:
            held.set()
            let_go.wait(PATIENCE)

    def keep() -> None:
        with training.lock:
            cache.encoded(FRAMES[:1], weights, "", counted(hold))

    def child() -> None:
        assert torch.equal(trainee.loss(), want)
        assert training.cache == {"frames": 5, "bytes": known["bytes"] + SIZE, "hits": 4, "misses": 5}

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    assert held.wait(PATIENCE)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    let_go.set()
    thread.join(PATIENCE)
    assert ended == 0, "None: the child waits for a thread of its parent"
