"""The tier int8 on a CPU: how near it comes, that copies of weights are counted and never stale, and where it is refused."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, model_inputs, rel_l2
from support.processors import play
from torch import Tensor

import smolvla_fast
from benchmarks.harness.outliers import heavy_tailed, sharp_attention
from smolvla_fast import inference
from smolvla_fast.engine import quantized_weights
from smolvla_fast.engine.products import Products
from smolvla_fast.engine.quantized_weights import QuantizedWeights
from smolvla_fast.loss.image_cache import ImageCache
from smolvla_fast.model.precision import TIERS, resolve_tier
from smolvla_fast.ops import extension
from smolvla_fast.ops import select as backends
from smolvla_fast.ops.cpu import int8, int8_attention
from smolvla_fast.ops.plan import Plan
from smolvla_fast.patching.runtime import runtime_of
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import cosine

pytestmark = pytest.mark.processor

CPU = torch.device("cpu")
SERVED = pytest.mark.usefixtures("products")
BOUND = TIERS["int8"].cosine or 1.0
DIGITS = 5e-3
"""Relative L2 that 8 bits cannot stay below: a step is 1/127 of the largest of a row, and a chunk goes through 8 layers and
10 steps. fp32 against fp32 is three orders below it."""


def _matrices(policy: Any) -> list[Tensor]:
    """All of vision, text and expert layers, and the connector's."""
    pair = policy.model.vlm_with_expert
    vlm = pair.get_vlm_model()
    layers = [*vlm.vision_model.encoder.layers, *vlm.text_model.layers, *pair.lm_expert.layers]
    found = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    return [*found, vlm.connector.modality_projection.proj.weight]


@SERVED
@pytest.mark.parametrize("layout", ["fp32", "mixed"])
def test_near_stock_and_not_equal(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("tiny", layout=layout)
    fp32 = copy.deepcopy(policy).float()
    given, noise = make_observation(policy), make_noise(policy)
    truth = chunk(fp32, given, noise)
    smolvla_fast.patch(policy, precision="int8")
    fast = chunk(policy, given, noise)
    now = smolvla_fast.status(policy)
    assert (now.precision, now.backend, now.calls_fast, now.calls_stock) == ("int8", "cpu", 1, 0)
    # A tiny policy attends sharply, in heads of 16 to a dozen keys: most heads are left to fp32.
    assert now.fallback_reasons.keys() <= {"int8 attention"} and set(now.stages.values()) <= {
        "cpu",
        "cpu, torch",
        "torch",
    }
    assert cosine(fast, truth) >= BOUND
    assert rel_l2(fast, truth) > DIGITS, "nothing was quantised"
    assert torch.equal(chunk(policy, given, noise), fast), "a second chunk has other bits"
    report = smolvla_fast.verify(policy, given, noise=noise)
    assert report.passed and BOUND <= report.cosine < 1 and report.precision == "int8"
    act = inference.Engine.act
    monkeypatch.setattr(inference.Engine, "act", lambda *args, **kwargs: 1.5 * act(*args, **kwargs))
    large = smolvla_fast.verify(policy, given, noise=noise)
    assert not large.passed and large.cosine >= BOUND, "a cosine sees no size"


@SERVED
def test_batches_cameras_and_frames() -> None:
    """Samples, and cameras, are rows of the same products: each comes out as it does alone, to the digits of the tier."""
    policy = make_policy("tiny", cameras=3)
    smolvla_fast.patch(policy, precision="int8")
    given, noise = make_observation(policy, batch=2, cameras=2), make_noise(policy, batch=2)
    both = chunk(policy, given, noise)
    for i in range(2):
        alone = chunk(policy, {key: value[i : i + 1] for key, value in given.items()}, noise[i : i + 1])
        assert cosine(both[i], alone[0]) >= BOUND
    assert smolvla_fast.status(policy).calls_stock == 0


@SERVED
def test_second_terms_are_counted_and_reported(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = chunk(smolvla_fast.patch(policy, precision="fp32"), observation, noise)

    def again() -> tuple[float, int, str | None]:
        smolvla_fast.patch(smolvla_fast.unpatch(policy), precision="int8")
        found = rel_l2(chunk(policy, observation, noise), truth)
        now = smolvla_fast.status(policy)
        return found, now.extra_bytes, now.fallback_reasons.get("int8 in one term")

    error, held, reason = again()
    assert reason is None
    monkeypatch.setattr(int8, "MAX_LOSS", 0.0)
    error_of_two, held_by_two, reason = again()
    assert reason is not None and reason.startswith("64 of 64 weights lose more than 0 %")
    elements = sum(matrix.numel() for matrix in _matrices(policy))
    assert held_by_two - held >= 0.7 * elements
    assert error_of_two < error


@SERVED
def test_attention_in_8_bits_and_heads_that_fall_back(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heads in fp32, some, and all in integers: the first counts every head, the last none."""
    found, reasons = [], []
    for limit in (-1.0, int8_attention.MOST_ERROR, float("inf")):
        monkeypatch.setattr(int8_attention, "MOST_ERROR", limit)
        smolvla_fast.patch(smolvla_fast.unpatch(policy), precision="int8")
        found.append(chunk(policy, observation, noise))
        reasons.append(smolvla_fast.status(policy).fallback_reasons.get("int8 attention", ""))
    counts = re.match(r"(\d+) of (\d+) heads so far were computed in fp32: 8-bit scores", reasons[0])
    assert counts is not None and counts[1] == counts[2] and reasons[2] == ""
    assert re.match(r"\d+ of \d+ heads so far", reasons[1])
    assert rel_l2(found[2], found[0]) > 1e-3, "attention was not quantised"
    # Beside what 8-bit products lose, which the other tests bound.
    assert cosine(found[2], found[0]) >= 0.998 and cosine(found[1], found[0]) >= BOUND


@SERVED
def test_sharp_attention_is_computed_in_fp32(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    """Products in 8 bits cannot serve it, whoever attends; other weights are a new beginning."""
    smolvla_fast.patch(policy, precision="fp32")
    with sharp_attention(policy.model):
        truth = chunk(policy, observation, noise)
        smolvla_fast.patch(policy, precision="int8")
        # The first chunk of all is observed: one velocity a step, of the chunk that is returned.
        report = smolvla_fast.verify(policy, observation, noise=noise)
        assert report.passed and len(report.velocity_rel_l2) == policy.config.num_steps
        for _ in range(2):
            assert torch.equal(chunk(policy, observation, noise), truth)
        now = smolvla_fast.status(policy)
        assert (now.precision, now.calls_fast, now.calls_stock) == ("int8", 3, 0)
        assert re.search(
            r"scores of attention spread by .*, 8-bit products serve up to 8; chunks are .* until the weights change",
            now.fallback_reasons["int8"],
        )
    back = chunk(policy, observation, noise)
    assert "int8" not in smolvla_fast.status(policy).fallback_reasons
    smolvla_fast.patch(smolvla_fast.unpatch(policy), precision="int8")
    assert torch.equal(back, chunk(policy, observation, noise))


@SERVED
@pytest.mark.parametrize(
    "how",
    ["seen by another first", "seen by the chunk", "assigned", "assigned, the old kept", "in other memory"],
)
def test_fp32_ends_with_the_weights_it_was_for(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, how: str
) -> None:
    smolvla_fast.patch(policy, precision="int8")
    want = chunk(policy, observation, noise)
    plain = {name: x.clone() for name, x in policy.model.state_dict().items()}
    smolvla_fast.unpatch(policy)
    with sharp_attention(policy.model):
        loud = {name: x.clone() for name, x in policy.model.state_dict().items()}
    policy.model.load_state_dict(loud)
    smolvla_fast.patch(policy, precision="int8")
    chunk(policy, observation, noise)
    assert "int8" in smolvla_fast.status(policy).fallback_reasons
    kept = list(policy.model.parameters()) if how == "assigned, the old kept" else []  # as an optimizer does
    if how == "in other memory":
        for name, parameter in policy.model.named_parameters():
            parameter.data = plain[name]
    else:
        policy.model.load_state_dict(plain, assign=how.startswith("assigned"))
    if how == "seen by another first":  # single layers share the copies
        assert runtime_of(policy.model).engine.quantized_weights.refreshed()  # type: ignore[union-attr]
    if how == "seen by the chunk":
        for _ in range(2):  # asking does not look at values, and changes nothing
            assert "int8" in smolvla_fast.status(policy).fallback_reasons
    assert torch.equal(chunk(policy, observation, noise), want)
    now = smolvla_fast.status(policy)
    assert "int8" not in now.fallback_reasons and now.calls_stock == 0
    del kept


@pytest.mark.parametrize("how", ["negated", "rows swapped", "columns swapped", "elements swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["as on a CPU", "as on a GPU"])
def test_what_keeps_every_magnitude_is_seen(
    how: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By copies of weights and by kept image tokens; each of two matrices alone."""
    if device == "as on a GPU":
        monkeypatch.setattr(quantized_weights, "_one_by_one", quantized_weights._together)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(64, 48, generator=generator).to(dtype)) for _ in range(2)]
    frame = torch.zeros(1, 3, 4, 4)
    for weight in weights:
        made, cache = QuantizedWeights(torch.bfloat16), ImageCache(1000)
        for each in weights:
            made.of(each)
        for _ in range(2):
            cache.encoded(frame, weights, "", lambda frames: frames[:, 0])
        assert not made.refreshed() and cache.hits == 1
        with torch.no_grad():
            place = {"rows swapped": (slice(2),), "columns swapped": (slice(None), slice(2))}.get(how)
            if how == "negated":
                weight.neg_()
            elif place is not None:
                weight[place] = weight[place].flip(len(place) - 1)
            else:
                weight[0, :2] = weight[0, :2].flip(0)
        cache.encoded(frame, weights, "", lambda frames: frames[:, 0])
        assert made.refreshed() and cache.hits == 1


def test_another_number_of_threads_is_no_change() -> None:
    """A new thread takes OpenMP's own count; sums in another order would make every copy anew."""
    weights = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    made, before = QuantizedWeights(torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for each in weights:
            made.of(each)
        torch.set_num_threads(2)
        assert not made.refreshed()
    finally:
        torch.set_num_threads(before)


@SERVED
def test_fp32_in_place_has_the_plan_and_survives_a_fork(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    given = model_inputs(policy, observation)
    plan, cpu = Plan({"linear none": "aten"}), torch.device("cpu")
    engine = inference.Engine(TIERS["int8"], "cpu", cpu, products=Products(TIERS["int8"], "cpu", cpu, plan))
    with sharp_attention(policy.model), torch.no_grad():
        chunk_of = engine.act(policy.model, *given, noise)
        by_plan = Products(TIERS["fp32"], "cpu", cpu, plan)
        want = inference.Engine(TIERS["fp32"], "cpu", cpu, products=by_plan).act(policy.model, *given, noise)
        assert torch.equal(chunk_of, want) and "int8" in engine.report()["fallback_reasons"]
        assert engine._in_fp32 is not None and engine._in_fp32.plan is plan
        heads = engine.ops.heads
        assert heads is not None and heads._lock.acquire()  # by a thread that a child does not have
        engine.after_fork()
        assert heads._lock.acquire(blocking=False)


@SERVED
@LEROBOT_ONLY
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("degrees", [None, 5, 4, 3])
def test_full_size(degrees: int | None) -> None:
    policy = make_policy("full")
    given, noise = make_observation(policy), make_noise(policy)
    with nullcontext() if degrees is None else heavy_tailed(policy.model, seed=5, degrees=degrees):
        smolvla_fast.patch(policy, precision="fp32")
        truth = chunk(policy, given, noise)
        smolvla_fast.patch(policy, precision="int8")
        fast = chunk(policy, given, noise)
    print(
        f"int8, full size, {degrees} degrees: cosine {cosine(fast, truth):.5f}, relative L2 {rel_l2(fast, truth):.3g}"
    )
    assert cosine(fast, truth) >= BOUND and rel_l2(fast, truth) > DIGITS


# Copies ---------------------------------------------------------------------------------------------------------------


@SERVED
def test_copies_are_counted(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    smolvla_fast.patch(policy, precision="fp32")
    chunk(policy, observation, noise)
    before = smolvla_fast.status(policy).extra_bytes
    smolvla_fast.patch(policy, precision="int8")
    chunk(policy, observation, noise)
    held = smolvla_fast.status(policy).extra_bytes - before
    elements = sum(matrix.numel() for matrix in _matrices(policy))
    # A byte an element; of the last text layer keys and values alone are read, of cross-attention fp32 ones.
    assert 0.7 * elements <= held <= 1.5 * elements
    for _ in range(2):
        chunk(policy, observation, noise)
    assert smolvla_fast.status(policy).extra_bytes - before == held, "a chunk made copies anew"
    smolvla_fast.refresh(policy)
    assert smolvla_fast.status(policy).extra_bytes < held
    smolvla_fast.unpatch(policy)


CHANGES = {
    "all": lambda name: True,
    "norms": lambda name: "norm" in name and name.endswith("weight"),
    "vision": lambda name: ".vision_model.encoder." in name and "mlp.fc1.weight" in name,
    "expert": lambda name: ".lm_expert." in name and "down_proj" in name,
    "biases": lambda name: ".vision_model.encoder." in name and "layer_norm1.bias" in name,
}


@SERVED
@pytest.mark.parametrize("what", CHANGES)
def test_an_average_of_weights_is_seen_by_the_next_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, what: str
) -> None:
    smolvla_fast.patch(policy, precision="int8")
    old = chunk(policy, observation, noise)
    kept = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        if CHANGES[what](name):
            generator = torch.Generator().manual_seed(len(name))
            other = torch.randn(parameter.shape, generator=generator) * parameter.float().std().nan_to_num(
                0.1
            )
            parameter.data.copy_(0.7 * parameter.data + 0.5 * other)
    new = chunk(policy, observation, noise)
    smolvla_fast.patch(smolvla_fast.unpatch(policy), precision="int8")
    assert torch.equal(new, chunk(policy, observation, noise)), "a stale copy was read"
    assert rel_l2(new, old) > 1e-4, "the change does not show, so the test could not fail"
    for name, parameter in policy.named_parameters():
        parameter.data.copy_(kept[name])
    assert torch.equal(chunk(policy, observation, noise), old), "a stale copy was read on the way back"
    assert smolvla_fast.status(policy).calls_stock == 0


@SERVED
def test_other_tensors_and_single_elements(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    """A parameter given other memory is seen at once; a single element outside the sample needs ``refresh``."""
    smolvla_fast.patch(policy, precision="int8")
    old = chunk(policy, observation, noise)
    layer = policy.model.vlm_with_expert.lm_expert.layers[0].mlp
    other = layer.down_proj.weight.detach().clone()
    other[-1] *= 20  # behind the sampled rows, so that the address alone tells
    layer.down_proj.weight.data = other
    moved = chunk(policy, observation, noise)
    assert rel_l2(moved, old) > 1e-4
    layer.down_proj.weight.data[-1] += 3.0
    assert torch.equal(chunk(policy, observation, noise), moved), (
        "if it is seen now, the documentation is to say so"
    )
    smolvla_fast.refresh(policy)
    assert rel_l2(chunk(policy, observation, noise), moved) > 1e-4
    assert smolvla_fast.status(policy).calls_stock == 0


@SERVED
def test_back_to_other_tiers(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    smolvla_fast.patch(policy, precision="fp32")
    before = chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="int8")
    chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="fp32")
    assert torch.equal(chunk(policy, observation, noise), before)


# Where it is refused --------------------------------------------------------------------------------------------------


def test_never_taken_by_auto(policy: Any) -> None:
    assert resolve_tier("auto", torch.float32).quantized is None
    smolvla_fast.patch(policy)
    assert smolvla_fast.status(policy).precision == "fp32"


def test_int8_refuses_what_it_cannot_serve(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'int4' is not a tier; accepted are .*'fp8', 'int8'"):
        smolvla_fast.patch(policy, precision="int4")
    with pytest.raises(RuntimeError, match="precision='int8' cannot serve.*CPUs, the policy is on cuda"):
        backends.select("auto", torch.device("cuda"), False, "int8")
    monkeypatch.setattr(extension, "why_missing", lambda kind: "")
    with monkeypatch.context() as patch:
        patch.setattr(int8, "why_not", lambda device: None)
        with pytest.raises(
            RuntimeError, match="precision='int8' cannot serve.*'torch' has no kernels for it"
        ):
            smolvla_fast.patch(policy, precision="int8", backend="torch")
    play(monkeypatch, "Zen 1")
    with pytest.raises(RuntimeError, match="precision='int8' cannot serve.*accepted are AVX512-VNNI"):
        smolvla_fast.patch(policy, precision="int8")
    assert not smolvla_fast.status(policy).active


@pytest.mark.gpu
def test_refused_on_a_gpu() -> None:
    policy = make_policy("tiny", device="cuda")
    with pytest.raises(RuntimeError, match="precision='int8' cannot serve.*CPUs, the policy is on cuda"):
        smolvla_fast.patch(policy, precision="int8")
