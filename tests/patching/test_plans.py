"""``patch(policy, tune=...)``: which plan an engine is made with, when it is looked for, and who says so."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.policies import chunk, make_policy
from support.tunings import CHOICES, tuning_of
from torch import Tensor

import smolvla_fast
from smolvla_fast.engine import plan_files, plan_key, products
from smolvla_fast.ops.plan import Plan
from smolvla_fast.patch import engine_of
from smolvla_fast.patching import layer_runtime
from smolvla_fast.patching.layer_runtime import LAYER_RUNTIMES
from smolvla_fast.patching.settings import SETTINGS
from smolvla_fast.tune import tuner
from smolvla_fast.tune.result import Tuning

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(plan_files.CACHE_DIR, str(tmp_path))
    monkeypatch.setattr(plan_files, "_logged", set())
    return tmp_path / "plans"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiers for which a plan was looked for."""
    tiers: list[str] = []
    find = plan_files.find
    monkeypatch.setattr(plan_files, "find", lambda key: (tiers.append(key["tier"]), find(key))[1])
    return tiers


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[Plan | None]:
    """The plans that tables of ops were made with."""
    plans: list[Plan | None] = []
    select = products.select

    def record(*args: Any, plan: Plan | None = None) -> Any:
        plans.append(plan)
        return select(*args, plan=plan)

    monkeypatch.setattr(products, "select", record)
    return plans


def save(policy: Any, tier: str = "fp32", backend: str = "auto", **choices: str) -> Plan:
    key = plan_key.key_of(policy.model, tier, backend, CPU)
    path = plan_files.save(key, Plan(choices or CHOICES, measured="2026-01-02"), {})
    return Plan(choices or CHOICES, str(path), "2026-01-02")


def plan_of(policy: Any) -> Plan | None:
    return engine_of(policy.model).products.plan


@pytest.mark.parametrize("tune", ["always", "", "CACHED", None, True, 3, "on"])
def test_an_unknown_wish_is_refused_before_anything_is_done(policy: Any, tune: Any) -> None:
    with pytest.raises(ValueError, match="accepted are 'cached', 'now', 'off'"):
        smolvla_fast.patch(policy, tune=tune)
    assert smolvla_fast.status(policy).last_fallback == "the policy is not patched"


def test_patch_uses_the_plan_and_everybody_says_so(
    policy: Any, selected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    plan = save(policy)
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        smolvla_fast.patch(policy)
    [line] = [record.getMessage() for record in caplog.records]
    said = smolvla_fast.status(policy).plan
    assert said == plan_files.describe(plan) and "plan of 2026-01-02 (" in said
    assert f"2 choices, {plan.origin}" in said and said in line
    assert plan_of(policy) == plan and selected == [plan]


def test_without_a_plan_nothing_is_said_of_one(policy: Any, selected: list[Any], caplog) -> None:
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        smolvla_fast.patch(policy)
    assert smolvla_fast.status(policy).plan is None and selected == [None]
    assert [record.levelname for record in caplog.records] == ["INFO"] and "plan" not in caplog.text


def test_off_asks_for_no_plan(policy: Any, asked: list[str], selected: list[Any]) -> None:
    save(policy)
    smolvla_fast.patch(policy, tune="off")
    assert smolvla_fast.status(policy).plan is None and not asked and selected == [None]
    smolvla_fast.patch(policy)
    assert smolvla_fast.status(policy).plan and asked
    smolvla_fast.patch(policy, tune="off")
    assert smolvla_fast.status(policy).plan is None and plan_of(policy) is None


@pytest.mark.parametrize("layout", ["fp32", "mixed"])
def test_exact_never_asks_for_a_plan(
    layout: str, asked: list[str], selected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("tiny", layout=layout, num_steps=2)
    from smolvla_fast.testing.policies import make_noise, make_observation

    given, noise = make_observation(policy), make_noise(policy)
    stock = chunk(policy, given, noise)
    save(policy, "exact")
    smolvla_fast.patch(policy, precision="exact")
    assert torch.equal(chunk(policy, given, noise), stock)
    assert not asked and selected == [None] and smolvla_fast.status(policy).plan is None
    with pytest.raises(
        RuntimeError, match="'exact' runs stock's own calls and has nothing to tune; accepted"
    ):
        smolvla_fast.patch(policy, precision="exact", tune="now")
    assert products.Products(engine_of(policy.model).tier, "auto", CPU, Plan(CHOICES)).plan is None


def test_a_policy_that_is_switched_off_asks_for_nothing(
    policy: Any, folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    for tune in ("cached", "now", "off"):
        smolvla_fast.patch(policy, tune=tune)
    assert not asked and not folder.exists()


def test_a_plan_is_looked_for_when_an_engine_is_made_and_not_at_a_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, asked: list[str]
) -> None:
    save(policy)
    smolvla_fast.patch(policy)
    asked.clear()
    for _ in range(3):
        chunk(policy, observation, noise)
        smolvla_fast.status(policy)
        policy.model.vlm_with_expert.embed_image(policy.prepare_images(observation)[0][0])
    assert not asked
    policy.load_state_dict(policy.state_dict())
    chunk(policy, observation, noise)
    assert not asked, "weights have no part in it"
    smolvla_fast.refresh(policy)
    chunk(policy, observation, noise)
    assert asked == ["fp32"]


def test_patching_again_takes_a_plan_that_came_went_or_changed(policy: Any, selected: list[Any]) -> None:
    smolvla_fast.patch(policy)
    engine = engine_of(policy.model)
    smolvla_fast.patch(policy)
    assert engine_of(policy.model) is engine, "graphs hold as long as nothing is replaced"
    plan = save(policy)
    assert plan_of(policy) is None
    smolvla_fast.patch(policy)
    assert plan_of(policy) == plan
    engine = engine_of(policy.model)
    smolvla_fast.patch(policy)
    assert engine_of(policy.model) is engine
    other = save(policy, attention="cpu")
    smolvla_fast.patch(policy)
    assert plan_of(policy) == other
    Path(other.origin).unlink()
    smolvla_fast.patch(policy)
    assert plan_of(policy) is None and selected == [None, plan, other, None]


@pytest.mark.parametrize("change", ["threads", "precision", "backend", "dtype"])
def test_a_plan_for_something_else_is_not_used(policy: Any, change: str) -> None:
    save(policy)
    wish: dict[str, Any] = {"precision": dict(precision="bf16"), "backend": dict(backend="torch")}.get(
        change, {}
    )
    if change == "threads":
        torch.set_num_threads(2)  # the fixture few_threads sets them again
    if change == "dtype":
        policy.model.vlm_with_expert.lm_expert.to(torch.bfloat16)
    smolvla_fast.patch(policy, **wish)
    assert smolvla_fast.status(policy).plan is None


def test_chunks_and_layers_share_the_plan(
    policy: Any, observation: dict[str, Tensor], asked: list[str], selected: list[Any]
) -> None:
    plan = save(policy)
    smolvla_fast.patch(policy)
    pair = policy.model.vlm_with_expert
    pair.embed_image(policy.prepare_images(observation)[0][0])
    layers = LAYER_RUNTIMES.of(pair)
    assert layers.engine.products is engine_of(policy.model).products and selected == [plan]
    twin = copy.deepcopy(policy)
    twin.model.vlm_with_expert.embed_image(policy.prepare_images(observation)[0][0])
    assert LAYER_RUNTIMES.of(twin.model.vlm_with_expert).engine.products.plan == plan, (
        "a layer before a chunk"
    )


@pytest.mark.parametrize("tune", ["cached", "off"])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_the_wish_travels_with_copies(policy: Any, tune: str, way: Callable[[Any], Any]) -> None:
    plan = save(policy)
    smolvla_fast.patch(policy, tune=tune)
    assert plan_of(way(policy)) == (plan if tune == "cached" else None)


def test_settings_of_an_earlier_version_are_read() -> None:
    from smolvla_fast.patching.settings import Settings

    old = Settings("auto", "auto")
    del old.__dict__["tune"]
    assert pickle.loads(pickle.dumps(old)).tune == "cached"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 9}'])
def test_a_torn_plan_costs_one_line(policy: Any, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(save(policy).origin)
    path.write_text(content)
    for _ in range(2):
        smolvla_fast.patch(policy)
    now = smolvla_fast.status(policy)
    assert now.active and now.plan is None and not now.fallback_reasons
    assert caplog.text.count(f"ignored the plan {path}") == 1


def test_verify_judges_what_the_plan_serves(
    policy: Any, observation: dict[str, Tensor], selected: list[Any]
) -> None:
    plan = save(policy)
    smolvla_fast.patch(policy)
    assert smolvla_fast.verify(policy, observation).passed
    assert selected == [plan], "no table without the plan was made for it"


# Now ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the tuner, which finds what ``tuning_of`` says."""
    calls: list[dict[str, Any]] = []

    def tune(model: Any, products: Any, **more: Any) -> Tuning:
        calls.append({"model": model, "products": products, "eval": not model.training, **more})
        return tuning_of(plan_key.key_of(model, products.tier.name, products.backend, products.device))

    monkeypatch.setattr(tuner, "tune", tune)
    return calls


def test_now_tunes_once_keeps_the_plan_and_uses_it(
    policy: Any, tuned: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        assert smolvla_fast.patch(policy, tune="now") is policy
    [line] = [record.getMessage() for record in caplog.records]
    assert "tuned in 2 s: 1 of 2 choices changed hands; chunk 10.0 -> 9 ms (-10.0%), error" in line
    assert smolvla_fast.status(policy).plan in line
    assert plan_of(policy) and plan_of(policy).choices == CHOICES
    assert policy.model.__dict__[SETTINGS].tune == "cached"
    for other in (copy.deepcopy(policy), make_policy("tiny", seed=3)):
        smolvla_fast.patch(other)
        assert plan_of(other) == plan_of(policy)
    assert len(tuned) == 1


def test_now_hands_on_what_an_earlier_plan_knows(policy: Any, tuned: list[dict[str, Any]]) -> None:
    save(policy, attention="cpu")
    smolvla_fast.patch(policy)
    smolvla_fast.patch(policy, tune="now")
    assert tuned[0]["known"] == {"attention": "cpu"} and plan_of(policy).choices == CHOICES


def test_now_hands_the_example_on(
    policy: Any, observation: dict[str, Tensor], tuned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {key: value.clone() for key, value in observation.items()}
    smolvla_fast.patch(policy, tune="now", warmup=observation)
    images, masks, tokens, token_masks, state = tuned[0]["inputs"]
    assert len(images) == len(masks) == 2 and tokens.shape == token_masks.shape
    assert state.shape == (1, policy.config.max_state_dim)
    assert all(torch.equal(value, before[key]) for key, value in observation.items())


def test_a_policy_in_train_mode_is_tuned_in_eval_mode(policy: Any, tuned: list[dict[str, Any]]) -> None:
    policy.train()
    smolvla_fast.patch(policy, tune="now")
    assert policy.training and [call["eval"] for call in tuned] == [True]


def test_where_stock_runs_nothing_is_tuned(policy: Any, tuned: list[Any], folder: Path, caplog) -> None:
    policy.model.state_proj.register_forward_hook(lambda *_: None)
    smolvla_fast.patch(policy, tune="now")
    assert not tuned and "stock runs: " in caplog.text and "nothing was tuned" in caplog.text
    assert not list(folder.iterdir())


def test_defaults_that_stay_replace_an_earlier_plan(
    policy: Any, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    save(policy, attention="cpu")
    monkeypatch.setattr(
        tuner,
        "tune",
        lambda model, engine, **_: tuning_of(plan_key.key_of(model, "fp32", "auto", CPU), False),
    )
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        smolvla_fast.patch(policy, tune="now")
    assert plan_of(policy).choices == {} and "0 choices" in smolvla_fast.status(policy).plan
    assert "the defaults stay: the whole chunk is no faster" in caplog.text


def test_a_tuner_that_fails_leaves_the_policy_as_it_was(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(tuner, "tune", fail)
    cls, attributes = type(policy.model), set(policy.model.__dict__)
    with pytest.raises(MemoryError):
        smolvla_fast.patch(policy, tune="now")
    assert type(policy.model) is cls and set(policy.model.__dict__) == attributes
    smolvla_fast.patch(policy, tune="off")
    with pytest.raises(MemoryError):
        smolvla_fast.patch(policy, tune="now")
    assert policy.model.__dict__[SETTINGS].tune == "off" and smolvla_fast.status(policy).active


def test_a_folder_that_cannot_be_written_is_said_before_the_work(
    policy: Any, tuned: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(plan_files.CACHE_DIR, str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="set SMOLVLA_FAST_CACHE_DIR to a folder that can be written"):
        smolvla_fast.patch(policy, tune="now")
    assert not tuned and smolvla_fast.status(policy).last_fallback == "the policy is not patched"


def test_two_policies_of_one_pair_with_two_wishes_run_layers_by_stock(policy: Any) -> None:
    other = copy.copy(policy)
    other._modules = {**policy._modules, "model": copy.copy(policy.model)}
    smolvla_fast.patch(policy)
    smolvla_fast.patch(other, tune="off")
    assert (
        "two policies"
        in layer_runtime.LAYER_RUNTIMES.of(policy.model.vlm_with_expert).look(policy.model.vlm_with_expert)[1]
    )


def test_what_measured_slower_than_stock_is_not_served_by_auto(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who names a tier or a backend gets it, and a tuning measures again."""
    save(policy, chunk="stock")
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy)
    assert torch.equal(chunk(policy, observation, noise), stock)
    now = smolvla_fast.status(policy)
    assert (now.active, now.calls_fast, now.calls_stock) == (False, 0, 1)
    assert "stock's chunk measured faster on this machine (plan of 2026-01-02" in str(now.last_fallback)
    smolvla_fast.patch(policy, precision="fp32")
    assert smolvla_fast.status(policy).active
    smolvla_fast.patch(policy, tune="off")
    assert smolvla_fast.status(policy).active
    timed = iter(range(1, 1000))
    monkeypatch.setattr(tuner._Tuner, "_chunk_ms", lambda self, engine: 1.0)
    monkeypatch.setattr(
        tuner, "timed_ms", lambda function, device: (function(), (9.0 + next(timed) / 1e3, None))[1]
    )
    smolvla_fast.patch(policy, tune="now")
    assert smolvla_fast.status(policy).active and "chunk" not in plan_of(policy).choices
