"""verify, stage times, fingerprints and the table of backends tell the truth."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, model_inputs, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.engine import timing
from smolvla_fast.ops.reference import rope
from smolvla_fast.patching import source_digests
from smolvla_fast.patching.settings import stock_layers
from smolvla_fast.testing.policies import make_noise


def test_verify_measures_what_the_user_would(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="bf16")
    report = smolvla_fast.verify(policy, observation, noise=noise)
    with torch.no_grad():
        fast = policy.model.sample_actions(*model_inputs(policy, observation), noise=noise)
    assert report.rel_l2 == pytest.approx(rel_l2(fast, _full_width(policy, observation, noise)), rel=1e-9)
    assert report.max_abs >= float((chunk(policy, observation, noise) - stock).abs().max())
    assert 0.99 < report.cosine <= 1 + 1e-12
    assert len(report.velocity_rel_l2) == policy.config.num_steps and min(report.velocity_rel_l2) > 0
    assert report.stock_rel_l2 > 0 and report.passed
    assert set(report.to_dict()) >= {
        "rel_l2",
        "max_abs",
        "cosine",
        "stock_rel_l2",
        "velocity_rel_l2",
        "passed",
    }


@torch.no_grad()
def _full_width(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> Tensor:
    model = policy.model
    with stock_layers():
        return type(model).stock_class.sample_actions(model, *model_inputs(policy, observation), noise=noise)


@LEROBOT_ONLY
@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16"])
def test_verify_fails_on_wrong_maths(
    policy: Any, observation: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A rotation by the wrong wavelength: fast, plausible and wrong. ``verify`` must say so in every tier."""
    smolvla_fast.patch(policy, precision=precision)
    assert smolvla_fast.verify(policy, observation).passed
    monkeypatch.setattr(rope, "MAX_WAVELENGTH", 9_000)
    assert not smolvla_fast.verify(policy, observation).passed


def test_verify_says_that_stocks_own_chunk_is_not_finite(policy: Any, observation: dict[str, Tensor]) -> None:
    smolvla_fast.patch(policy)
    state = observation["observation.state"] * float("nan")
    with pytest.raises(ValueError, match="stock's own chunk is not finite: state holds NaN or infinity"):
        smolvla_fast.verify(policy, {**observation, "observation.state": state})


def test_verify_refuses_a_call_that_stock_would_serve(policy: Any, observation: dict[str, Tensor]) -> None:
    """For the reason that the policy itself gives."""
    smolvla_fast.patch(policy)
    with torch.autocast("cpu"):
        chunk(policy, observation)
        said = smolvla_fast.status(policy).last_fallback
        assert said is not None and "autocast" in said
        with pytest.raises(RuntimeError, match=f"nothing to verify: {re.escape(said)}"):
            smolvla_fast.verify(policy, observation)
    policy.config.num_steps = -1
    with pytest.raises(RuntimeError, match="nothing to verify: num_steps=-1; accepted are integers"):
        smolvla_fast.verify(policy, observation)


def test_verify_leaves_the_policy_alone(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    smolvla_fast.patch(policy, precision="bf16")
    before, attributes = chunk(policy, observation, noise), set(policy.model.__dict__)
    random_state = torch.get_rng_state()
    smolvla_fast.verify(policy, observation)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(policy.model.__dict__) == attributes
    assert torch.equal(chunk(policy, observation, noise), before)


@pytest.mark.parametrize("served", ["stock", "engine", "layers"])
def test_stage_times_cover_the_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, served: str
) -> None:
    policy.config.num_steps = 10
    if served != "stock":
        smolvla_fast.patch(policy)
    attributes = set(policy.model.__dict__), set(policy.model.vlm_with_expert.__dict__)
    times = timing.stage_times(policy, observation, noise, stock_sampler=served == "layers")
    now = smolvla_fast.status(policy)
    assert now.calls_fast == (served == "engine") and not now.calls_stock and not now.layers_stock
    calls = {"denoise_step": 10, "embed_image": 2, "forward": 1}
    assert now.layers_fast == (calls if served == "layers" else {})
    assert set(times) == {"vision", "prefix", "denoise", "other", "total"}
    assert all(value > 0 for value in times.values())
    assert sum(times[name] for name in ("vision", "prefix", "denoise", "other")) == pytest.approx(
        times["total"]
    )
    # Ten steps against one pass; of several rounds, since another process may take the core in the middle of one.
    rounds = [
        timing.stage_times(policy, observation, noise, stock_sampler=served == "layers") for _ in range(5)
    ]
    assert min(each["denoise"] for each in rounds) > min(each["prefix"] for each in rounds)
    assert (set(policy.model.__dict__), set(policy.model.vlm_with_expert.__dict__)) == attributes


@pytest.mark.check(7)
def test_fingerprints_ignore_layout_and_see_maths(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def digest_of(source: str, name: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return source_digests.digest(importlib.import_module(name).f)

    monkeypatch.syspath_prepend(tmp_path)
    plain = digest_of("def f(x):\n    return x * 2\n", "fp_plain")
    assert plain == digest_of('def f(x):\n    """Twice x."""\n\n    # why\n    return x  *  2\n', "fp_layout")
    assert plain != digest_of("def f(x):\n    return x * 3\n", "fp_maths")
    assert plain != digest_of("def f(x):\n    return x * 2, 'a string is no docstring'\n", "fp_string")


@pytest.mark.check(7)
@LEROBOT_ONLY
def test_functions_of_two_versions_do_not_mix(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = next(
        t for t in source_digests.KNOWN.values() if source_digests.digest(_rope(policy)) == t["apply_rope"]
    )
    halves = [dict(list(table.items())[:12]), dict(list(table.items())[12:])]
    monkeypatch.setattr(source_digests, "KNOWN", {"first": halves[0], "second": halves[1]})
    assert source_digests.unknown_of(source_digests.owners(policy.model)) is not None


def _rope(policy: Any) -> Any:
    return type(policy.model.vlm_with_expert).forward_attn_layer.__globals__["apply_rope"]


@pytest.mark.parametrize(("layout", "precision"), [("fp32", "bf16"), ("mixed", "auto")])
def test_where_bf16_is_slow_products_are_fp32(
    monkeypatch: pytest.MonkeyPatch, layout: str, precision: str
) -> None:
    """Said in ``status``, nearer to fp32 than bf16 products are, and never for ``exact``."""
    from smolvla_fast.engine import products
    from smolvla_fast.testing.policies import make_observation

    policy = make_policy("tiny", layout=layout)
    given, noise = make_observation(policy), make_noise(policy)
    smolvla_fast.patch(policy, precision=precision)
    in_bf16 = smolvla_fast.verify(policy, given)
    assert "bf16 products" not in smolvla_fast.status(policy).fallback_reasons
    monkeypatch.setattr(products, "why_bf16_is_slow", lambda: "it has no such instruction")
    smolvla_fast.refresh(policy)
    in_fp32 = smolvla_fast.verify(policy, given)
    now = smolvla_fast.status(policy)
    assert now.precision == "bf16"
    assert now.fallback_reasons["bf16 products"] == "it has no such instruction; products run in fp32"
    assert in_fp32.passed and in_fp32.rel_l2 < in_bf16.rel_l2 / 10
    smolvla_fast.patch(policy, precision="exact")
    stock = smolvla_fast.unpatch(copy.deepcopy(policy))
    assert torch.equal(chunk(policy, given, noise), chunk(stock, given, noise))


def test_bf16_text_layout_computes_vision_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("tiny", layout="bf16_text")
    from smolvla_fast.testing.policies import make_observation

    smolvla_fast.patch(policy)
    seen: set[torch.dtype] = set()
    engine = smolvla_fast.patch.__globals__["engine_of"](policy.model)
    attention = engine.ops.attention
    object.__setattr__(
        engine.ops, "attention", lambda q, *rest, **more: (seen.add(q.dtype), attention(q, *rest, **more))[1]
    )
    try:
        chunk(policy, make_observation(policy), make_noise(policy))
    finally:
        object.__setattr__(engine.ops, "attention", attention)
    assert seen == {torch.float32}
