"""What a tuning chooses: right before fast, faster by more than the scatter, and the whole chunk decides at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.recorder import RecorderDriver
from torch import Tensor

from smolvla_fast.engine.products import Products
from smolvla_fast.inference import Engine
from smolvla_fast.measure.rounds import rel_l2
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops import choice as choices
from smolvla_fast.ops import extension
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.plan import Plan
from smolvla_fast.ops.select import why_not_quantized
from smolvla_fast.ops.torch import decoder
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.tune import candidates, stopwatch, tuner
from smolvla_fast.tune.check import Contract
from smolvla_fast.tune.recorder import Recorder
from smolvla_fast.tune.result import Choice, ChunkTime, Tuning

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
SMALL: dict[str, Any] = dict(cameras=1, num_vlm_layers=2, num_steps=2, vision={"num_hidden_layers": 1})


@pytest.fixture
def subject() -> tuple[Any, tuple[Any, ...]]:
    """A model and what ``Engine.act`` takes behind it."""
    policy = make_policy("tiny", origin="ours", **SMALL)
    return policy.model, inputs_of(policy)


def inputs_of(policy: Any) -> tuple[Any, ...]:
    batch = policy._prepare_batch(dict(make_observation(policy)))
    images, masks = policy.prepare_images(batch)
    tokens = (batch["observation.language.tokens"], batch["observation.language.attention_mask"])
    return (images, masks, *tokens, policy.prepare_state(batch), make_noise(policy))


def tuned(
    subject: tuple[Any, tuple[Any, ...]],
    seconds: float = 30.0,
    tier: str = "fp32",
    backend: str = "auto",
    **more: Any,
) -> Tuning:
    model, (*observed, noise) = subject
    products = Products(TIERS[tier], backend, CPU)
    return tuner.tune(model, products, inputs=tuple(observed), noise=noise, seconds=seconds, **more)


def chosen(tuning: Tuning, op: str) -> list[Choice]:
    found = [each for each in tuning.choices if each.op == op]
    assert found, op
    return found


def made(linear: Callable[..., Tensor], change: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    @wraps(linear)  # what it takes is part of it
    def changed(*args: Any, **kwargs: Any) -> Tensor:
        return change(linear(*args, **kwargs))

    return changed


def slow(y: Tensor) -> Tensor:
    time.sleep(0.005)
    return y


def wrong(y: Tensor) -> Tensor:
    return y * (1 + 1e-4)


def raises(y: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal instruction\nwas encountered")


@pytest.fixture
def cpu_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor's defaults are: our kernels."""
    monkeypatch.setattr(choices, "default_rules", lambda backend, device: {})


def test_a_candidate_made_wrong_is_refused_with_its_error(
    subject: Any, monkeypatch: pytest.MonkeyPatch, cpu_by_default: None
) -> None:
    monkeypatch.setattr(choices, "aten", made(choices.aten, wrong))
    found = tuned(subject, backend="cpu")
    for op in ("linear", "linear_residual", "norm_swiglu", "cross_kv"):
        for each in chosen(found, op):
            timed = {one.candidate: one for one in each.timed}
            assert each.reached and each.chosen != "aten" and timed["aten"].p50_ms is None
            assert timed["aten"].error > timed["aten"].allowed > 0  # type: ignore[operator]
            assert "is off by" in str(timed["aten"].refused) and timed["cpu"].refused is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (raises, "RuntimeError: CUDA error: an illegal instruction was encountered"),
        (lambda y: y * torch.nan, "is off by nan"),
        (lambda y: y[..., :-1], "is \\("),
        (lambda y: y.bfloat16(), "bfloat16, not \\("),
    ],
    ids=["raises", "NaN", "another shape", "another dtype"],
)
def test_what_no_chunk_could_use_is_refused(
    subject: Any, monkeypatch: pytest.MonkeyPatch, cpu_by_default: None, change: Any, words: str
) -> None:
    monkeypatch.setattr(choices, "aten", made(choices.aten, change))
    for each in chosen(tuned(subject, backend="cpu"), "linear"):
        timed = {one.candidate: one for one in each.timed}
        assert each.chosen != "aten"
        with pytest.raises(ValueError, match=words):
            raise ValueError(timed["aten"].refused)


def test_a_candidate_made_slow_is_not_chosen(
    subject: Any, monkeypatch: pytest.MonkeyPatch, cpu_by_default: None
) -> None:
    """And one beside which the default is slow is: so this can fail."""
    monkeypatch.setattr(choices, "aten", made(choices.aten, slow))
    found = tuned(subject, backend="cpu")
    assert not [each for each in found.choices if each.chosen == "aten"]
    every = ("linear", "cross_kv", "linear_residual", "norm_swiglu", "norm_qkv_rope", "pixel_shuffle_linear")
    monkeypatch.setattr(
        choices, "default_rules", lambda backend, device: dict.fromkeys(every, lambda shape: "aten")
    )
    found = tuned(subject, backend="cpu")
    late = [each for each in found.choices if each.default == "aten"]
    assert {each.op for each in late} == set(every)
    assert all(each.reached and each.chosen in ("cpu", "onednn") for each in late)
    assert found.kept and found.before and found.after and found.after.p50_ms < found.before.p50_ms
    each = chosen(found, "cross_kv")[0]
    assert found.plan.choices[f"cross_kv {each.shape}"] == each.chosen
    assert "changed hands; chunk " in found.verdict()


def test_the_next_engine_uses_the_plan(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "aten", made(choices.aten, slow))
    monkeypatch.setattr(choices, "default_rules", lambda backend, device: {"linear": lambda shape: "aten"})
    model, inputs = subject
    plan = tuned(subject).plan
    by_plan = Products(TIERS["fp32"], "auto", CPU, plan)
    chunk = Engine(TIERS["fp32"], "auto", CPU, products=by_plan).act(model, *inputs)
    served = {
        f"{op} {shape}": name
        for op in choices.CLASSES
        if isinstance(each := getattr(by_plan.ops, op), choices.Choice)
        for shape, name in each.served.items()
    }
    assert served and served.items() <= plan.choices.items()
    assert "aten" not in served.values()
    assert rel_l2(chunk, Engine(TIERS["exact"], "auto", CPU).act(model, *inputs)) < 1e-5


@pytest.mark.processor
@pytest.mark.parametrize("tier", ["fp32", "bf16", "int8", "int16"])
@pytest.mark.parametrize("name", ["cpu", "onednn", "aten", "torch", "sdpa", "in turn"])
def test_a_chunk_is_within_its_tier_whatever_the_plan_says(subject: Any, tier: str, name: str) -> None:
    """Bounds: fp32's own; of the others what these lose on this policy by the defaults, doubled."""
    model, inputs = subject
    if reason := why_not_quantized(CPU).get(tier):
        pytest.skip(reason)
    names = ("cpu", "onednn", "aten", "torch", "sdpa")

    class Anything(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            if key in ("denoise", "products"):
                return None
            return names[sum(map(ord, key)) % len(names)] if name == "in turn" else name

    truth = Engine(TIERS["exact"], "auto", CPU).act(model, *inputs)
    default, planned = (
        rel_l2(Engine(TIERS[tier], "auto", CPU, products=each).act(model, *inputs), truth)
        for each in (Products(TIERS[tier], "auto", CPU), Products(TIERS[tier], "auto", CPU, Plan(Anything())))
    )
    assert planned <= max(1e-5, 2 * default)


def test_exact_is_untouched_by_plans(subject: Any) -> None:
    model, inputs = subject
    plan = Plan({f"linear {shape}": "aten" for shape in ("64 32>32 float32", "128 32>64 float32")})
    plain, planned = (
        Engine(TIERS["exact"], "auto", CPU, products=Products(TIERS["exact"], "auto", CPU, each))
        for each in (None, plan)
    )
    assert planned.ops is plain.ops
    assert torch.equal(planned.act(model, *inputs), plain.act(model, *inputs))


@pytest.mark.parametrize("seconds", [0.001, 0.05])
def test_what_time_does_not_reach_keeps_its_default(subject: Any, seconds: float) -> None:
    began = time.perf_counter()
    found = tuned(subject, seconds=seconds)
    assert any(not each.reached for each in found.choices)
    count = sum(each.reached for each in found.choices)
    assert f"; {count} of {len(found.choices)} choices were reached in time" in found.verdict()
    assert all(each.chosen == each.default for each in found.choices if not each.reached)
    reached = {f"{e.op} {e.shape}" for e in found.choices if e.reached}
    assert set(found.plan.choices) == (reached if found.kept else set())
    # A chunk of this size takes milliseconds: what is always done, by the defaults, is a handful of them.
    assert time.perf_counter() - began < seconds + 20


def test_no_candidate_is_begun_after_the_deadline(
    subject: Any, monkeypatch: pytest.MonkeyPatch, cpu_by_default: None
) -> None:
    """One that takes for ever costs its own time and no other's."""
    judged: list[str] = []

    class Slow(candidates.Contract):
        def judge(self, op: str, function: Any) -> Any:
            judged.append(op)
            time.sleep(0.3)
            return super().judge(op, function)

    monkeypatch.setattr(candidates, "Contract", Slow)
    found = tuned(subject, seconds=1.0, backend="cpu")
    late = [each for each in found.choices if len(each.timed) < 3 and "linear" in each.op]
    assert late and all(each.chosen == each.default for each in late)
    assert len(judged) < 10


def test_an_op_whose_truth_does_not_fit_keeps_its_default_and_the_others_are_measured(
    subject: Any, monkeypatch: pytest.MonkeyPatch, cpu_by_default: None
) -> None:
    class Short(candidates.Contract):
        def __init__(self, recorded: Any) -> None:
            if recorded.choice.op == "linear":
                raise torch.OutOfMemoryError("out of memory")
            super().__init__(recorded)

    monkeypatch.setattr(candidates, "Contract", Short)
    found = tuned(subject, backend="cpu")
    for each in chosen(found, "linear"):
        assert not each.reached and each.chosen == each.default
        assert each.timed[0].refused == "OutOfMemoryError: memory is short"
    assert all(each.reached for each in chosen(found, "norm_swiglu"))


def test_a_segment_that_raises_costs_itself_alone(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolvla_fast.engine.products.why_bf16_is_slow", lambda: "no AMX")
    own = tuner._Tuner._act

    def act(self: Any, engine: Engine) -> Tensor:
        if engine.products.gemm_dtype is torch.bfloat16 and engine.products.backend == "auto":
            raise RuntimeError("illegal instruction")
        return own(self, engine)

    monkeypatch.setattr(tuner._Tuner, "_act", act)
    choice = chosen(tuned(subject, tier="bf16"), "products")[0]
    assert (choice.default, choice.chosen, choice.reached) == ("float32", "float32", True)
    assert choice.timed[1].refused == "RuntimeError: illegal instruction"


def test_an_earlier_plan_keeps_what_is_not_measured_again(subject: Any) -> None:
    known = {"linear 4096 768>768 float32": "aten", "cross_kv 64 16>16,16 float32": "no longer there"}
    assert tuned(subject, seconds=0.001, known=known).plan.choices.items() >= known.items()


def test_an_earlier_plan_loses_what_is_measured_again(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolvla_fast.engine.products.why_bf16_is_slow", lambda: "no AMX")

    def scripted(self: Any, engine: Engine) -> float:
        return 1.0 if engine.products.gemm_dtype is torch.float32 else 9.0

    monkeypatch.setattr(tuner._Tuner, "_chunk_ms", scripted)
    known = {"products": "bfloat16", "linear 4096 768>768 float32": "aten"}
    plan = tuned(subject, tier="bf16", known=known).plan
    assert "products" not in plan.choices or plan.choices["products"] == "float32"
    assert plan.choices["linear 4096 768>768 float32"] == "aten"


@pytest.mark.parametrize("quick", ["bfloat16", "float32"])
@pytest.mark.parametrize("slow_bf16", [None, "this processor has no AMX"])
def test_the_dtype_of_bf16_products_is_measured(
    subject: Any, monkeypatch: pytest.MonkeyPatch, quick: str, slow_bf16: str | None
) -> None:
    """Whichever the rules prefer on this processor."""
    monkeypatch.setattr("smolvla_fast.engine.products.why_bf16_is_slow", lambda: slow_bf16)

    def scripted(self: Any, engine: Engine) -> float:
        return 1.0 if engine.products.gemm_dtype is getattr(torch, quick) else 9.0

    monkeypatch.setattr(tuner._Tuner, "_chunk_ms", scripted)
    found = tuned(subject, tier="bf16")
    default = "bfloat16" if slow_bf16 is None else "float32"
    choice = chosen(found, "products")[0]
    assert (choice.default, choice.chosen, choice.reached) == (default, quick, True)
    assert found.kept and found.plan.choices.get("products", default) == quick
    by_plan = Products(TIERS["bf16"], "auto", CPU, found.plan)
    assert by_plan.gemm_dtype is getattr(torch, quick)
    assert ("bf16 products" in by_plan.fallback_reasons) == (quick == "float32")


def test_on_a_gpu_sweeps_are_captured_graphs(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[RecorderDriver] = []

    def driver_for(device: torch.device) -> RecorderDriver:
        drivers.append(RecorderDriver())
        return drivers[-1]

    monkeypatch.setattr("smolvla_fast.tune.stopwatch.driver_for", driver_for)
    found = tuned(subject)
    timed = [one for each in found.choices for one in each.timed if one.p50_ms is not None]
    assert len(drivers) == 1 and drivers[0].captures >= len(timed) > 10
    # One replay is over before a GPU has said so; and the calls of a sweep are of several layers.
    assert drivers[0].replays >= stopwatch.REPLAYS * candidates.FEWEST * len(timed)


@pytest.mark.parametrize(("ms", "wins"), [(1.0, True), (20.0, False), (200.0, False)])
def test_stock_is_measured_beside_the_engine(
    subject: Any, monkeypatch: pytest.MonkeyPatch, ms: float, wins: bool
) -> None:
    monkeypatch.setattr(tuner._Tuner, "_chunk_ms", lambda self, engine: 10.0)
    monkeypatch.setattr(tuner, "timed_ms", lambda function, device: (ms, None))
    found = tuned(subject, seconds=0.001, stock=lambda: torch.zeros(1), known={"chunk": "stock"})
    assert found.stock_ms == ms and (found.plan.choices.get("chunk") == "stock") is wins
    assert ("stock serves: stock's own chunk is faster, 1 ms" in found.verdict()) is wins


def final(ms: float, error: float = 1e-6, allowed: float = 1e-5, **choices: str) -> Any:
    rounds = [ms - 2, ms - 1, ms, ms + 1, ms + 2]  # scatters by 1
    refused = f"the chunk is off by {error:.2g}, allowed is {allowed:.2g}" if error > allowed else None
    time = None if refused else ChunkTime(ms, 1.0, error)
    return tuner._Final(None, choices, error, allowed, refused, rounds, time)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("after", "best", "words"),
    [
        (final(90), tuner.AFTER, ""),
        (final(99.5), tuner.AFTER, ""),
        (final(100.5), None, "the chunk as a whole is no faster, 100 -> 100.5 ms"),
        (final(103), None, "the chunk as a whole is no faster, 100 -> 103 ms"),
        (final(90, 1e-4), None, "the chunk is off by 0.0001, allowed is 1e-05"),
        (None, tuner.BEFORE, "nothing was faster by more than the scatter"),
    ],
    ids=["faster", "level", "no faster", "slower", "worse", "nothing changed"],
)
def test_the_whole_chunk_decides(after: Any, best: str | None, words: str) -> None:
    finals = {tuner.BEFORE: final(100), **({} if after is None else {tuner.AFTER: after})}
    found, note = tuner._verdict(finals)
    assert found == best and words in note


@pytest.mark.parametrize(("ms", "wins"), [(50, True), (99, False), (200, False)])
def test_a_segment_competes_with_what_was_chosen_op_by_op(ms: float, wins: bool) -> None:
    """A loop in one launch, or products in another dtype: ahead of the plan, or the plan stays."""
    finals = {tuner.BEFORE: final(100), tuner.AFTER: final(90), "denoise cuda": final(ms, denoise="cuda")}
    best, _ = tuner._verdict(finals)
    segment = tuner._segment("denoise", "ops", "cuda", finals)
    assert segment.reached and [each.p50_ms for each in segment.timed] == [90, ms]
    assert (best == "denoise cuda") is (segment.chosen == "cuda") is wins


@pytest.mark.parametrize(("capability", "segments"), [(9, {"first_step", "launches"}), (8, {"first_step"})])
def test_a_gpu_measures_the_order_of_its_launches(
    capability: int, segments: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(tuner, "others", lambda device, wish: [])
    ops = SimpleNamespace(denoise_persistent=None, backend="triton")
    products: Any = SimpleNamespace(
        may_widen=False, ops=ops, device=torch.device("cuda"), backend="triton", by=lambda plan: products
    )
    found = tuner._Tuner._competitors(SimpleNamespace(_products=products))  # type: ignore[arg-type]
    assert {name for name, *_ in found} == segments


@pytest.mark.triton
@pytest.mark.long
def test_tiles_of_triton_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, which takes a minute: each tile is checked, and the quickest one is served by the plan."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU times them itself")
    policy = make_policy(
        "tiny", origin="ours", cameras=1, num_vlm_layers=2, num_steps=1, chunk_size=5, tokenizer_max_length=16,
        vision={"num_hidden_layers": 1, "image_size": 16},
    )  # fmt: skip
    *observed, noise = inputs_of(policy)
    products = Products(TIERS["fp32"], "triton", CPU)
    found = tuner.tune(policy.model, products, inputs=tuple(observed), noise=noise, seconds=60)
    tiles = [one for each in found.choices for one in each.timed if one.candidate.startswith("triton ")]
    assert len(tiles) > 5 and all(one.refused is None or "off by" not in one.refused for one in tiles)
    key = next(f"{each.op} {each.shape}" for each in found.choices if each.op == "linear_residual")
    tile = next(
        one.candidate for each in found.choices if each.op == "linear_residual" for one in each.timed[2:]
    )
    by_tile = Products(TIERS["fp32"], "triton", CPU, Plan({key: tile}))
    Engine(TIERS["fp32"], "triton", CPU, products=by_tile).act(policy.model, *observed, noise)
    assert tile in by_tile.ops.linear_residual.served.values()  # type: ignore[attr-defined]


def test_calls_are_timed_with_what_was_prepared_for_them() -> None:
    """Each time anew, for a call may fill it in, and judged with it: some take no others. Who knows no hint goes without."""
    seen: list[Any] = []
    x, norm, gate, up = torch.randn(3, 8), torch.ones(8), torch.randn(5, 8), torch.randn(5, 8)
    ready = NextNorm(norm, torch.bfloat16, x.bfloat16(), torch.ones(1, 3))

    def own(x: Any, norm: Any, gate: Any, up: Any, *, memory: Any = None, normed: Any = None) -> Any:
        seen.append(None if normed is None else (normed.rows, normed.weight is norm[0]))
        if normed is not None:
            normed.rows = None
        return decoder.norm_swiglu(x, norm, gate, up)

    choice = choices.Choice("norm_swiglu", {"triton": own, "aten": decoder.norm_swiglu}, None, {})
    recorder = Recorder(CPU)
    for _ in range(2):  # a second layer's
        recorder._note(choice, choice, x, (norm, 1e-6), gate, up, normed=replace(ready))
    (recorded,) = recorder.found.values()
    seen.clear()
    sweep = candidates.sweep_of(recorded, choice.function("triton"))
    sweep(), sweep()
    assert len(seen) == 4
    for rows, same_norm in seen:
        assert same_norm and torch.equal(rows, ready.rows) and rows.data_ptr() != ready.rows.data_ptr()
    candidates.sweep_of(recorded, choice.function("aten"))()
    seen.clear()
    assert Contract(recorded).judge("norm_swiglu", choice.function("triton"))[2] is None
    assert seen and all(seen)
