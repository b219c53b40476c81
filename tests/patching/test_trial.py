"""What is unread or untried proves itself before it serves: a LeRobot release with other source, an unknown device."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.patching import chunk_forward, source_digests, trial
from smolvla_fast.patching.runtime import runtime_of
from smolvla_fast.patching.untried import Untried
from smolvla_fast.testing.policies import make_noise, make_observation

pytest.importorskip("lerobot")
from support.next_lerobot import IS_THERE, next_release, under

pytestmark = [LEROBOT_ONLY, pytest.mark.skipif(not IS_THERE, reason="copies the source of LeRobot 0.6")]

TEXT = "pick up the cube"


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes time: else whether the engine is not slower would be the machine's answer. Some tests set a clock."""
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def fresh(steps: int = 2) -> Any:
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = make_policy("tiny", num_steps=steps, num_vlm_layers=2)
    policy.config.rtc_config = RTCConfig(
        enabled=True, execution_horizon=6, max_guidance_weight=5.0,
        prefix_attention_schedule=RTCAttentionSchedule.LINEAR,
    )  # fmt: skip
    policy.init_rtc_processor()
    return policy


Answer = Callable[[Any], Tensor]


def answer(
    batch: int = 1, task: Any = TEXT, masked: bool = False, length: int | None = -1, **kwargs: Any
) -> Answer:
    def ask(policy: Any) -> Tensor:
        tasks = [task] * batch if isinstance(task, str) else task
        longest = max(len(each) for each in tasks) + 1
        given = make_observation(
            policy, batch=batch, task=tasks, language_length=longest if length == -1 else length
        )
        if masked:  # a camera that the policy was made with and the robot has not
            missing = [key for key in given if key.startswith("observation.images")][-1]
            policy.config.empty_cameras = 1
            del given[missing]
        return chunk(policy, given, make_noise(policy, batch=batch), **kwargs)

    return ask


LEFT = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32)
KINDS: dict[str, Answer] = {
    "plain": answer(),
    "padded": answer(length=40),
    "masked": answer(masked=True),
    "batch": answer(batch=2),
    "mixed": answer(batch=2, task=[TEXT, "go"]),
    "guided": answer(inference_delay=2, prev_chunk_left_over=LEFT),
}
ALL = set(KINDS)
PADS = {"padded", "masked", "mixed"}

HARMLESS: dict[str, list[tuple[str, str]]] = {
    "a renamed local": [
        ("img_emb_dim = img_emb.shape[-1]", "width = img_emb.shape[-1]"),
        ("img_emb_dim**0.5", "width**0.5"),
    ],
    "a statement more": [
        ("        x_t = x_t + dt * v_t\n", "        again = dt * v_t\n        x_t = x_t + again\n"),
    ],
    "the same in another order": [("x1 * cos - x2 * sin", "cos * x1 - sin * x2")],
}
# What stands once in LeRobot's source, what is there instead, and in which kinds of call the difference shows.
HARMFUL: dict[str, tuple[str, str, set[str]]] = {
    "attention scale": ("att_weights *= head_dim**-0.5", "att_weights *= (head_dim + 1) ** -0.5", ALL),
    "RoPE base": ("positions, max_wavelength=10_000", "positions, max_wavelength=9_000", ALL),
    "image scale": ("img_emb_dim**0.5", "img_emb_dim**0.49", ALL),
    "language scale": ("math.sqrt(lang_emb_dim)", "math.sqrt(lang_emb_dim + 1)", ALL),
    "state seen by images": (
        "att_masks += [1] * (states_seq_len)",
        "att_masks += [0] * (states_seq_len)",
        ALL,
    ),
    "time periods": ("period = min_period * (max", "period = 1.01 * min_period * (max", ALL),
    "step size": ("dt = -1.0 / num_steps", "dt = -1.001 / num_steps", ALL),
    "positions count padding": (
        "prefix_offsets = torch.sum(prefix_pad_masks, dim=-1)",
        "prefix_offsets = torch.ones_like(prefix_pad_masks, dtype=torch.long).sum(-1)",
        PADS,
    ),
    "positions of the first sample": (
        "torch.sum(prefix_pad_masks, dim=-1)[:, None]",
        "torch.sum(prefix_pad_masks, dim=-1)[:1, None]",
        {"mixed"},
    ),
    "masked cameras seen": (
        "img_mask = img_mask[:, None].expand(bsize, num_img_embs)",
        "img_mask = torch.ones_like(img_mask)[:, None].expand(bsize, num_img_embs)",
        {"masked"},
    ),
    "padded language seen": (
        "pad_masks.append(lang_masks)",
        "pad_masks.append(torch.ones_like(lang_masks))",
        {"padded", "mixed"},
    ),
    "one sample's state": (
        "state_emb = self.state_proj(state)",
        "state_emb = self.state_proj(state[:1].expand_as(state))",
        {"batch", "mixed"},
    ),
    "guidance weight": (
        "result = v_t - guidance_weight * correction",
        "result = v_t - 0.99 * guidance_weight * correction",
        {"guided"},
    ),
    "guided rows": (
        "ones_len = min(start, total)",
        "ones_len = min(start, total) - 1\n        weights = torch.cat([torch.zeros(1), weights])",
        {"guided"},
    ),
    "guidance limit": (
        "squared_one_minus_tau + tau_tensor**2",
        "squared_one_minus_tau + 1.1 * tau_tensor**2",
        {"guided"},
    ),
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS)
def test_a_release_with_a_harmless_change_runs_fast_with_a_receipt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: list[tuple[str, str]]
) -> None:
    release = next_release(tmp_path, *changes)
    stock = under(release, fresh())
    policy = under(release, fresh())
    with caplog.at_level(logging.INFO, "smolvla_fast"):
        smolvla_fast.patch(policy, precision="fp32")
        now = smolvla_fast.status(policy)
        assert not now.active and "the first call of each kind is a trial" in str(now.last_fallback)
        for name, ask in KINDS.items():
            wanted = ask(stock)
            assert torch.equal(ask(policy), wanted), f"{name}: the trial returns stock's chunk"
            before = smolvla_fast.status(policy).calls_fast
            assert rel_l2(ask(policy), wanted) < 1e-5
            assert smolvla_fast.status(policy).calls_fast == before + 1, name
    now = smolvla_fast.status(policy)
    assert now.active and now.calls_stock == now.calls_fast == len(KINDS) == len(now.trials)
    assert all(
        text.startswith("passed: off by ") and "accepted is 1e-05" in text for text in now.trials.values()
    )
    lines = [record for record in caplog.records if "trial of" in record.message]
    assert len(lines) == len(KINDS) and all(each.levelno == logging.INFO for each in lines)


@pytest.mark.parametrize(("old", "new", "shows"), HARMFUL.values(), ids=HARMFUL)
def test_a_harmful_change_is_served_by_stock_where_it_shows(
    tmp_path: Path, old: str, new: str, shows: set[str]
) -> None:
    release = next_release(tmp_path, (old, new))
    stock, policy = under(release, fresh()), under(release, fresh())
    smolvla_fast.patch(policy, precision="fp32")
    served = set()
    for name, ask in KINDS.items():
        wanted = ask(stock)
        assert torch.equal(ask(policy), wanted)
        before = smolvla_fast.status(policy).calls_fast
        again = ask(policy)
        if smolvla_fast.status(policy).calls_fast > before:
            assert rel_l2(again, wanted) < 1e-5, name
        else:
            assert torch.equal(again, wanted)
            served.add(name)
            last = str(smolvla_fast.status(policy).last_fallback)
            assert "not the source this release knows" in last and "is not stock's: off by" in last
    assert served == shows


def test_another_number_of_steps_is_another_kind(tmp_path: Path) -> None:
    release = next_release(tmp_path, ("dt = -1.0 / num_steps", "dt = -1.0 / max(num_steps, 2)"))
    policy = smolvla_fast.patch(under(release, fresh(steps=2)), precision="fp32")
    ask, fast = KINDS["plain"], []
    for steps in (2, 2, 1, 1):
        policy.config.num_steps = steps
        ask(policy)
        fast.append(smolvla_fast.status(policy).calls_fast)
    assert fast == [0, 1, 1, 1]


def test_without_a_trial_stock_runs(tmp_path: Path) -> None:
    release = next_release(tmp_path, *HARMLESS["a statement more"])
    policy = smolvla_fast.patch(under(release, fresh()), trial=False)
    for _ in range(2):
        KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert (now.active, now.calls_fast, now.calls_stock, now.trials) == (False, 0, 2, {})
    assert "not the source this release knows" in str(now.last_fallback)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(policy.model._smolvla_fast)))
    assert copied.trial is False
    with pytest.raises(TypeError, match="trial='no'; accepted are True and False"):
        smolvla_fast.patch(policy, trial="no")


def test_a_weight_that_is_unknown_is_refused(tmp_path: Path) -> None:
    """A gate that is still zero shows in no chunk, and once it is trained no trial asks again."""
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    policy.model.state_gate = torch.nn.Linear(2, 2)
    smolvla_fast.patch(policy)
    for _ in range(2):
        KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert (now.calls_fast, now.trials) == (0, {})
    assert "VLAFlowMatching.state_gate is unknown to this version" in str(now.last_fallback)


def test_a_keyword_that_is_unknown_is_stocks(tmp_path: Path) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    for _ in range(2):
        answer(cfg_scale=2.0)(policy)
    now = smolvla_fast.status(policy)
    assert (now.calls_fast, now.calls_stock, now.trials) == (0, 2, {})
    KINDS["plain"](policy), KINDS["plain"](policy)
    assert smolvla_fast.status(policy).calls_fast == 1


def test_another_value_of_the_configuration_is_another_kind(tmp_path: Path) -> None:
    """An unread release may read any of them."""
    release = next_release(
        tmp_path, ("dt = -1.0 / num_steps", "dt = -1.0 / num_steps * (1 + (config.seed_of_mine == 7))")
    )
    release.euler_integrate.__globals__["config"] = config = fresh().config
    policy = smolvla_fast.patch(under(release, fresh()), precision="fp32")
    fast = []
    for value in (0, 0, 7, 7):
        config.seed_of_mine = policy.config.seed_of_mine = value
        KINDS["plain"](policy)
        fast.append(smolvla_fast.status(policy).calls_fast)
    assert fast == [0, 1, 1, 1]


def test_a_default_of_a_keyword_is_part_of_the_source(tmp_path: Path) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    before = source_digests.unknown_of(source_digests.owners(policy.model))
    embed = type(policy.model).embed_suffix
    embed.__kwdefaults__ = {"scale": 2.0}
    after = source_digests.unknown_of(source_digests.owners(policy.model))
    assert isinstance(before, Untried) and isinstance(after, Untried) and before.about != after.about


def test_a_fault_behind_zeros_is_found_by_drawn_numbers(tmp_path: Path) -> None:
    """A camera that is dark, a state of zeros: what the robot sends first may hide what the next call shows."""
    release = next_release(
        tmp_path,
        ("state_emb = self.state_proj(state)", "state_emb = self.state_proj(state * 1.5)"),
    )
    policy = smolvla_fast.patch(under(release, fresh()), precision="fp32")
    given = make_observation(policy, task=TEXT)
    given["observation.state"].zero_()
    for _ in range(2):
        chunk(policy, given, make_noise(policy))
    now = smolvla_fast.status(policy)
    assert now.calls_fast == 0 and "is not stock's: off by" in str(now.last_fallback)


@pytest.mark.parametrize("slower", ["the engine", "stock"])
def test_the_first_call_of_either_side_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: str
) -> None:
    """What it builds would count against one and hide the other's want of speed."""
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    clock = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    own, calls = chunk_forward.judged, {"act": 0, "stock": 0}

    def judged(*args: Any, act: Any, stock: Any) -> Any:
        def taking(name: str, function: Any, first: float, later: float) -> Any:
            def timed(call: Any) -> Tensor:
                calls[name] += 1
                clock[0] += first if calls[name] == 1 else later
                return function(call)

            return timed

        late = slower == "the engine"
        return own(
            *args, act=taking("act", act, 1 if late else 100, 4 if late else 2),
            stock=taking("stock", stock, 100 if late else 1, 3),
        )  # fmt: skip

    monkeypatch.setattr(chunk_forward, "judged", judged)
    KINDS["plain"](policy)
    [text] = smolvla_fast.status(policy).trials.values()
    assert text.startswith("stock: the engine is slower" if slower == "the engine" else "passed: ")


def test_memory_that_runs_out_between_rounds_leaves_stocks_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    own, calls = chunk_forward.Engine.act, []

    def act(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return own(*args, **kwargs)

    monkeypatch.setattr(trial.time, "perf_counter", itertools.count().__next__)  # everything takes as long
    monkeypatch.setattr(chunk_forward.Engine, "act", act)
    wanted = KINDS["plain"](under(next_release(tmp_path), fresh()))
    assert torch.equal(KINDS["plain"](policy), wanted) and len(calls) == 3
    assert "memory is short" in str(smolvla_fast.status(policy).last_fallback)


def test_a_verdict_is_of_its_tier(tmp_path: Path) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    KINDS["plain"](policy)
    assert smolvla_fast.status(policy).active
    smolvla_fast.patch(policy, precision="exact")
    now = smolvla_fast.status(policy)
    assert not now.active and "the first call of each kind is a trial" in str(now.last_fallback)
    smolvla_fast.patch(policy, precision="exact", trial=False)
    assert "is a trial" not in str(smolvla_fast.status(policy).last_fallback)


def test_what_was_forgotten_meanwhile_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    own = chunk_forward.judged

    def judged(*args: Any, **kwargs: Any) -> Any:
        smolvla_fast.refresh(policy)
        return own(*args, **kwargs)

    monkeypatch.setattr(chunk_forward, "judged", judged)
    KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert now.trials == {} and now.calls_stock == 1


def test_a_warm_up_performs_the_trial(tmp_path: Path) -> None:
    """On numbers that differ: zeros would hide a fault."""
    good = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(good, precision="fp32")
    with pytest.raises(
        RuntimeError, match=r"is a trial: compute a chunk first, or .*patch\(policy, warmup=True"
    ):
        smolvla_fast.verify(good, make_observation(good))
    smolvla_fast.patch(good, precision="fp32", warmup=True)
    now = smolvla_fast.status(good)
    plain, guided = now.trials
    assert "frozenset" not in plain + guided and guided.endswith("2 dimensions padded width")
    assert now.active and len(now.trials) == 2 and (now.calls_fast, now.calls_stock) == (0, 0)
    answer(length=good.config.tokenizer_max_length, task="x" * (good.config.tokenizer_max_length - 1))(good)
    assert smolvla_fast.status(good).calls_fast == 1
    bad = under(next_release(tmp_path, HARMFUL["step size"][:2]), fresh())
    smolvla_fast.patch(bad, precision="fp32", warmup=True)
    now = smolvla_fast.status(bad)
    assert not now.active and all(text.startswith("stock: ") for text in now.trials.values())


def test_exact_has_equal_bits_or_is_off(tmp_path: Path) -> None:
    """fp32 forgives another order of two terms, equal bits do not."""
    change = ("        x_t = x_t + dt * v_t\n", "        x_t = x_t + v_t * dt * (1 + 2**-22)\n")
    for precision, fast in (("exact", 0), ("fp32", 1)):
        policy = under(next_release(tmp_path, change), fresh())
        smolvla_fast.patch(policy, precision=precision)
        for _ in range(2):
            KINDS["plain"](policy)
        assert smolvla_fast.status(policy).calls_fast == fast, precision
    policy = under(next_release(tmp_path, *HARMLESS["a renamed local"]), fresh())
    smolvla_fast.patch(policy, precision="exact")
    assert torch.equal(KINDS["plain"](policy), KINDS["plain"](policy))
    assert smolvla_fast.status(policy).calls_fast == 1


@pytest.mark.parametrize("precision", ["bf16", "int8", "int16"])
def test_other_tiers_are_judged_by_their_own_bound(tmp_path: Path, precision: str) -> None:
    from smolvla_fast.ops.select import why_not_quantized

    if reason := why_not_quantized(torch.device("cpu")).get(precision):
        pytest.skip(reason)
    # bf16 rounds at a per cent of a chunk: a scale that is off by as little could not be told from it.
    for changes, fast in (
        (HARMLESS["a renamed local"], 1),
        ([("math.sqrt(lang_emb_dim)", "2 * math.sqrt(lang_emb_dim)")], 0),
    ):
        policy = under(next_release(tmp_path, *changes), fresh())
        smolvla_fast.patch(policy, precision=precision)
        for _ in range(2):
            KINDS["plain"](policy)
        now = smolvla_fast.status(policy)
        assert now.calls_fast == fast, now.trials


def test_what_is_slower_stays_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MARGIN", 0.99)
    monkeypatch.setattr(trial.time, "perf_counter", itertools.count().__next__)  # everything takes as long
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    for _ in range(2):
        KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert (now.active, now.calls_fast, now.calls_stock) == (False, 0, 2)
    assert "the engine is slower: " in str(now.last_fallback)


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), torch.OutOfMemoryError("out of memory")])
def test_an_engine_that_raises_stays_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")

    def act(*args: Any, **kwargs: Any) -> Tensor:
        raise error

    monkeypatch.setattr(chunk_forward.Engine, "act", act)
    wanted = KINDS["plain"](under(next_release(tmp_path), fresh()))
    for _ in range(2):
        assert torch.equal(KINDS["plain"](policy), wanted)
    assert "the engine cannot compute it" in str(smolvla_fast.status(policy).last_fallback)


def test_an_error_of_stocks_is_stocks_and_the_next_call_tries_again(tmp_path: Path) -> None:
    release = next_release(tmp_path, *HARMLESS["a statement more"])
    policy = smolvla_fast.patch(under(release, fresh()), precision="fp32")
    good = release.VLAFlowMatching.embed_suffix
    release.VLAFlowMatching.embed_suffix = lambda *a: (_ for _ in ()).throw(ValueError("stock's own"))
    release.VLAFlowMatching.embed_suffix.__module__ = release.VLAFlowMatching.__module__
    with pytest.raises(ValueError, match="stock's own"):
        KINDS["plain"](policy)
    release.VLAFlowMatching.embed_suffix = good
    for _ in range(2):
        KINDS["plain"](policy)
    assert smolvla_fast.status(policy).calls_fast == 1


def test_a_source_that_changes_under_a_live_policy_is_tried_anew(tmp_path: Path) -> None:
    release = next_release(tmp_path, *HARMLESS["a statement more"])
    other = next_release(tmp_path, HARMFUL["step size"][:2])
    policy = smolvla_fast.patch(under(release, fresh()), precision="fp32")
    for _ in range(2):
        KINDS["plain"](policy)
    assert smolvla_fast.status(policy).calls_fast == 1
    step = release.VLAFlowMatching.sample_actions.__globals__
    step["euler_integrate"] = other.euler_integrate  # of another package: somebody's wish
    KINDS["plain"](policy)
    KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert not now.active and now.calls_fast == 1


def _subclass(release: Any, policy: Any) -> None:
    class Mine(release.VLAFlowMatching):
        def embed_suffix(self, *args: Any) -> Any:
            return super().embed_suffix(*args)

    policy.model.__class__ = Mine


def _monkeypatched(release: Any, policy: Any) -> None:
    own = release.VLAFlowMatching.embed_suffix
    release.VLAFlowMatching.embed_suffix = lambda self, *args: own(self, *args)


def _wrapped(release: Any, policy: Any) -> None:
    import functools

    own = release.VLAFlowMatching.embed_suffix
    release.VLAFlowMatching.embed_suffix = functools.wraps(own)(lambda self, *args: own(self, *args))


def _on_the_instance(release: Any, policy: Any) -> None:
    policy.model.embed_suffix = lambda *args: type(policy.model).embed_suffix(policy.model, *args)


def _helper(release: Any, policy: Any) -> None:
    places = release.SmolVLMWithExpertModel.forward_attn_layer.__globals__
    own = places["apply_rope"]
    places["apply_rope"] = lambda *args: own(*args)


def _on_the_patched_class(release: Any, policy: Any) -> None:
    smolvla_fast.patch(policy)
    patched, own = type(policy.model), release.VLAFlowMatching.embed_suffix
    patched.embed_suffix = lambda self, *args: own(self, *args)


def _hooked(release: Any, policy: Any) -> None:
    policy.model.action_out_proj.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    "how", [_subclass, _monkeypatched, _wrapped, _on_the_instance, _on_the_patched_class, _helper, _hooked]
)
@pytest.mark.parametrize("unread", [True, False], ids=["unread release", "known release"])
def test_what_is_somebodys_wish_is_no_question(
    tmp_path: Path, how: Callable[[Any, Any], None], unread: bool
) -> None:
    """It would not be seen once the engine serves: stock for good, in an unread release too."""
    release = next_release(tmp_path, *(HARMLESS["a statement more"] if unread else ()))
    policy = under(release, fresh())
    how(release, policy)
    smolvla_fast.patch(policy, precision="fp32")
    for _ in range(2):
        KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert (now.active, now.calls_fast, now.calls_stock, now.trials) == (False, 0, 2, {})


def test_another_thread_gets_stock_while_a_trial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    began, go = threading.Event(), threading.Event()
    own = chunk_forward.judged

    def judged(*args: Any, **kwargs: Any) -> Any:
        began.set()
        assert go.wait(60)
        return own(*args, **kwargs)

    monkeypatch.setattr(chunk_forward, "judged", judged)
    first = threading.Thread(target=KINDS["plain"], args=(policy,))
    first.start()
    assert began.wait(60)
    KINDS["plain"](policy)
    assert "under way in another thread" in str(smolvla_fast.status(policy).last_fallback)
    go.set()
    first.join()
    KINDS["plain"](policy)
    now = smolvla_fast.status(policy)
    assert (now.calls_fast, now.calls_stock, len(now.trials)) == (1, 2, 1)


def test_a_trial_moves_no_random_state_and_no_noise(tmp_path: Path) -> None:
    release = next_release(tmp_path, *HARMLESS["a statement more"])
    stock, policy = under(release, fresh()), under(release, fresh())
    smolvla_fast.patch(policy, precision="fp32")
    given, noise = make_observation(policy, task=TEXT), make_noise(policy)
    kept = noise.clone()
    policy.predict_action_chunk(dict(given), noise=noise)
    assert torch.equal(noise, kept)
    smolvla_fast.refresh(policy)
    states = []
    for each in (stock, policy):
        torch.manual_seed(7)
        each.predict_action_chunk(dict(given))
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and len(smolvla_fast.status(policy).trials) == 1


def test_layers_and_losses_are_not_tried(tmp_path: Path) -> None:
    policy = under(
        next_release(tmp_path, ("att_weights *= head_dim**-0.5", "att_weights *= 1 * head_dim**-0.5")),
        fresh(),
    )
    smolvla_fast.patch(policy, precision="fp32", training=True)
    reason = source_digests.unknown_of(source_digests.owners(policy.model))
    assert isinstance(reason, Untried)
    policy.model.vlm_with_expert.embed_image(torch.zeros(1, 3, 32, 32))
    now = smolvla_fast.status(policy)
    assert now.layers_fast == {} and "not the source this release knows" in str(now.layers_fallback)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_trial_under_way_when_a_process_forks_is_made_anew_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh())
    smolvla_fast.patch(policy, precision="fp32")
    runtime = runtime_of(policy.model)
    own, forked = chunk_forward.judged, []

    def judged(*args: Any, **kwargs: Any) -> Any:
        if (
            not forked
        ):  # what a child would see, without one: its threads are gone, this one's trial never ends there
            forked.append(dict(runtime._verdicts))
            runtime.after_fork()
            forked.append(dict(runtime._verdicts))
        return own(*args, **kwargs)

    monkeypatch.setattr(chunk_forward, "judged", judged)
    KINDS["plain"](policy)
    assert [list(each.values()) for each in forked] == [[None], []]


def test_the_text_of_a_kind_tells_kinds_apart(tmp_path: Path) -> None:
    policy = smolvla_fast.patch(
        under(next_release(tmp_path, *HARMLESS["a statement more"]), fresh()), precision="fp32"
    )
    for ask in KINDS.values():
        ask(policy)
    policy.config.num_steps = 1
    KINDS["plain"](policy)
    smolvla_fast.patch(policy, precision="bf16")
    KINDS["plain"](policy)
    assert len(smolvla_fast.status(policy).trials) == len(KINDS) + 2
