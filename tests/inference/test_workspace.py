"""Neither the denoise loop of backend ``cpu`` nor its vision layers ask torch for memory again and again, and what they use
again is nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy

import smolvla_fast
from benchmarks.suites import cpu as cpu_suite
from smolvla_fast.model.dims import read_dims
from smolvla_fast.model.weights import read_vision_layers
from smolvla_fast.ops import defaults, extension
from smolvla_fast.ops.cpu import int16
from smolvla_fast.ops.memory import Memory, Workspace
from smolvla_fast.ops.select import backend_ops
from smolvla_fast.patch import engine_of
from smolvla_fast.stages.vision import encode_patches, vision_layer
from smolvla_fast.testing.policies import make_noise, make_observation

pytestmark = [
    LEROBOT_ONLY,
    pytest.mark.cpu_kernels,
    pytest.mark.processor,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built"),
]
# Steps enough that one allocation in each could not be taken for anything else.
SHAPE = dict(chunk_size=10, n_action_steps=10, num_steps=5)


def patched(precision: str = "fp32", **settings: Any) -> Any:
    policy = make_policy("tiny", **SHAPE, **settings)
    smolvla_fast.patch(policy, precision=precision, backend="cpu")
    return policy


@pytest.fixture(autouse=True)
def integers_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int16, "why_slow", lambda: None)  # fp32 would serve


@pytest.mark.parametrize("layout", ["fp32", "mixed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int16"])
def test_a_denoise_step_allocates_nothing(
    precision: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where our kernels compute it: products of bf16 on AMX are oneDNN's, which makes its results anew. And behind the first
    chunk, in which tier ``int16`` measures the scores of attention."""
    monkeypatch.setattr(defaults, "_on_tiles", lambda dtype: False)
    policy = patched(precision, layout=layout)
    chunk(policy, make_observation(policy), make_noise(policy))
    found = cpu_suite.step_allocations(policy, (make_observation(policy), make_noise(policy)))
    assert found["step_allocations"] == 0, found
    assert smolvla_fast.status(policy).calls_stock == 0


def test_also_for_a_batch_whose_cache_slots_are_in_pieces() -> None:
    policy = patched()
    inputs = make_observation(policy, batch=2), make_noise(policy, batch=2)
    assert cpu_suite.step_allocations(policy, inputs)["step_allocations"] == 0


@pytest.mark.parametrize("precision", ["fp32", "int16"])
def test_chunks_are_fresh_and_of_the_bits_without_a_workspace(precision: str) -> None:
    policy = patched(precision)
    observation, noises = make_observation(policy), [make_noise(policy, seed=seed) for seed in range(3)]
    kept = [chunk(policy, observation, noise) for noise in noises]
    copies = [each.clone() for each in kept]
    again = [chunk(policy, observation, noise) for noise in noises]
    engine = engine_of(policy.model)
    engine._workspace = None
    for one, copy, other, noise in zip(kept, copies, again, noises, strict=True):
        assert torch.equal(one, copy), "a later chunk was written over it"
        assert torch.equal(one, other)
        assert torch.equal(one, chunk(policy, observation, noise))


@pytest.mark.parametrize("precision", ["fp32", "int16"])
def test_threads_have_memory_of_their_own(precision: str) -> None:
    policy = patched(precision)
    observation, noises = make_observation(policy), [make_noise(policy, seed=seed) for seed in range(4)]
    # New threads take OpenMP's own count, not this one's, and the order of a library's sums may depend on it.
    threads = torch.get_num_threads()
    want = [chunk(policy, observation, noise) for noise in noises]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for _ in range(5):
            got = list(pool.map(lambda noise: chunk(policy, observation, noise), noises))
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int16"])
def test_layers_of_the_vision_tower_share_memory(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of fresh memory, and no result of a tower is written over by the next one."""
    model = patched(precision).model
    vlm, dims, cast = model.vlm_with_expert.get_vlm_model(), read_dims(model), engine_of(model).products.cast
    # Our kernels at any size, whatever leads on this processor.
    ops = backend_ops("integers" if precision == "int16" else "cpu")
    layers, memory = list(read_vision_layers(vlm, cast)), Memory()
    x = torch.randn(2, 16, len(layers[0].q.bias))

    def large(work: Callable[[], object]) -> int:
        return sum(each >= x[0].nbytes for each in cpu_suite.allocations(work))

    with torch.no_grad():
        fresh, kept, held = x, x, []
        for layer in layers:
            fresh = vision_layer(ops, layer, fresh, dims.vision_heads)
            kept = vision_layer(ops, layer, kept, dims.vision_heads, memory=memory)
            assert torch.equal(fresh, kept)
            held.append([each.data_ptr() for each in memory.tensors])
            # What a layer finds there says nothing.
            for each in memory.tensors:
                if each.data_ptr() != kept.data_ptr():
                    each.fill_(float("nan") if each.is_floating_point() else 12345)
        assert len(held) > 1 and held[0] == held[-1]
        layer = partial(vision_layer, ops, layers[0], x, dims.vision_heads)
        assert large(layer) >= 8 and large(partial(layer, memory=memory)) == 0, "each op's result is large"

        images = torch.rand(2, 2, 3, dims.image_side, dims.image_side)
        positions = torch.arange((dims.image_side // vlm.vision_model.embeddings.patch_size) ** 2)[None]
        encode = partial(encode_patches, ops, vlm, cast, dims, position_ids=positions)
        first = encode(images[0])
        copy, of_all = first.clone(), large(partial(encode, images[1]))
        assert torch.equal(first, copy)
        monkeypatch.setattr(vlm.vision_model.encoder, "layers", vlm.vision_model.encoder.layers[:1])
        assert of_all == large(partial(encode, images[1])) > 0, "more layers take more memory"


class _Taken(Workspace):
    """Memory that another thread takes and writes to at the very moment it is given back."""

    @contextmanager
    def lent(self) -> Iterator[Memory]:
        with super().lent() as memory:
            yield memory
        for each in memory.tensors:
            each.fill_(float("nan") if each.is_floating_point() else 12345)


@pytest.mark.parametrize("layout", ["fp32", "mixed"])
@pytest.mark.parametrize("precision", ["fp32", "int16"])
def test_a_chunk_is_copied_before_its_memory_is_given_back(precision: str, layout: str) -> None:
    policy = patched(precision, layout=layout)
    observation, noise = make_observation(policy), make_noise(policy)
    want = chunk(policy, observation, noise)
    engine_of(policy.model)._workspace = _Taken()
    for _ in range(2):
        assert torch.equal(chunk(policy, observation, noise), want), "another thread's numbers"


def test_a_chunk_that_fails_gives_the_memory_back() -> None:
    policy = patched()
    observation, noise = make_observation(policy), make_noise(policy)
    want = chunk(policy, observation, noise)
    engine = engine_of(policy.model)
    ops, held = engine.ops, engine._workspace.bytes
    assert held > 0 and smolvla_fast.status(policy).extra_bytes >= held

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("on purpose")

    engine.ops = replace(ops, euler_step=failing)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="on purpose"):
            chunk(policy, observation, noise)
    engine.ops = ops
    assert torch.equal(chunk(policy, observation, noise), want)
    assert engine._workspace.bytes == held, "each failure left a set of buffers behind"
