"""Checks 1 to 7: importing, and knowing what is on."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import TESTS
from support.policies import BOTH, LEROBOT_ONLY, TIERS, chunk, make_policy, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.ops import select as backends
from smolvla_fast.patching import source_digests
from smolvla_fast.testing import policies
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND

ROOT = TESTS.parent

LIGHT = """
import logging, os, sys, threading, time, torch, warnings
sys.dont_write_bytecode = True
seen = []
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def audit(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "urllib") or event in ("os.fork", "os.exec", "os.system"):
        seen.append(event)
    elif event == "open" and isinstance(args[2], int) and args[2] & writes:
        seen.append("writes " + str(args[0]))

before = threading.active_count(), list(warnings.filters), logging.getLogger().handlers[:], dict(os.environ)
sys.addaudithook(audit)
started = time.perf_counter()
import smolvla_fast
imported = time.perf_counter()
seen += [name for name in ("lerobot", "transformers", "triton", "matplotlib", "rich") if name in sys.modules]
if torch.cuda.is_initialized():
    seen.append("CUDA")
if before != (threading.active_count(), list(warnings.filters), logging.getLogger().handlers[:], dict(os.environ)):
    seen.append("threads, filters, handlers or environment")
from smolvla_fast.ops import extension
ready = time.perf_counter()
extension.available("cpu")
loaded = time.perf_counter()
# Behind the import and its time: what of all this is loaded later.
found, seen = seen, []
import smolvla_fast.smolvla
found += ["smolvla:" + name for name in ("lerobot", "transformers") if name in sys.modules]
from smolvla_fast.ops import select
without = ["smolvla_fast.kernels" + name for name in ("", ".counters", ".launch_order")]  # no Triton in these
for backend in ("torch", "cpu", "auto"):
    if backend != "cpu" or extension.available("cpu"):
        select.select(backend, torch.device("cpu"), False)
    kernels = (n for n in sys.modules if n.startswith("smolvla_fast.kernels") or n.endswith("ops.triton.ops"))
    found += [f"{backend}:{name}" for name in kernels if name not in without]
print(imported - started, loaded - ready, *found)
"""


@pytest.mark.check(1)
def test_import_is_light(python: Any) -> None:
    """Nor does our SmolVLA load LeRobot or transformers, or a backend Triton where another is chosen.

    One second beyond torch is what a user is promised. Loading the extension takes two milliseconds on an
    idle machine; a tenth of a second would be felt. The machine may be busy: the best of three counts.
    """
    for _ in range(3):
        package, binary, *seen = python(LIGHT, [ROOT]).split()
        assert not seen, f"importing also does {seen}"
        if float(package) < 1.0 and float(binary) < 0.1:
            return
    pytest.fail(f"import smolvla_fast takes {package} s, loading its extension {binary} s")


BARE = """
import importlib.abc, json, sys, torch

unix = {"fcntl", "resource", "pwd", "grp", "termios"}
missing = unix | {"triton", "lerobot", "rich", "matplotlib"}
# transformers looks for these, and makes no image processor without; None is found by nobody.
sys.modules.update(dict.fromkeys(("PIL", "torchvision", "num2words")))

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
kept = {name: sys.modules.pop(name, None) for name in unix}
platform, sys.platform = sys.platform, "win32"
import smolvla_fast
# transformers and torch do ask where they run.
sys.platform = platform
missing -= unix
sys.modules.update({name: module for name, module in kept.items() if module})
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
torch.set_num_threads(1)
policy = make_policy("tiny", origin="ours", num_steps=2, folder="bare")
given, noise = make_observation(policy), make_noise(policy)
stock = policy.predict_action_chunk(dict(given), noise=noise)
torch.save((given["observation.language.tokens"], stock), "result.pt")
found = {}
for precision in ("exact", "auto"):
    smolvla_fast.patch(policy, precision=precision)
    fast = policy.predict_action_chunk(dict(given), noise=noise)
    found[precision] = float((fast - stock).norm() / stock.norm())
print(json.dumps({**found, **smolvla_fast.status(policy).to_dict()}))
"""


@pytest.mark.check(1, 4)
def test_without_triton_lerobot_and_what_only_unix_has(python: Any, tmp_path: Path) -> None:
    """As after a plain `pip install .`. Windows and macOS themselves are not run here: what they lack is taken away."""
    found = json.loads(python(BARE, [ROOT], cwd=tmp_path).splitlines()[-1])
    assert found["exact"] == 0 and 0 < found["auto"] <= FP32_BOUND
    assert found["active"] and found["calls_fast"] == 2 and found["last_fallback"] is None
    bare, whole = tmp_path / "bare", tmp_path / "whole"
    policy = policies.make_policy("tiny", origin="ours", num_steps=2, folder=whole)
    processors = {"processor_config.json", "preprocessor_config.json"}
    assert (bare / "tokenizer.json").is_file() and (bare / "config.json").is_file()
    assert [bool(processors & {each.name for each in at.iterdir()}) for at in (bare, whole)] == [False, True]
    tokens, stock = torch.load(tmp_path / "result.pt")
    observation = make_observation(policy)
    assert torch.equal(tokens, observation["observation.language.tokens"])
    # Same weights, inputs and calls on one thread of the same machine: what is installed beside must not move a bit.
    assert torch.equal(stock, chunk(policy, observation, make_noise(policy)))


@pytest.mark.check(2)
def test_returns_the_same_object_and_says_one_line(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        assert smolvla_fast.patch(policy) is policy
    now = smolvla_fast.status(policy)
    [line] = [record.getMessage() for record in caplog.records]
    assert f"{now.precision} on cpu, backend {now.backend}" in line
    assert all(f"not {name}: {why}" in line for name, why in now.fallback_reasons.items())


@BOTH
@pytest.mark.check(3)
@pytest.mark.parametrize("precision", TIERS)
def test_status_counts(policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str) -> None:
    assert smolvla_fast.status(policy).last_fallback == "the policy is not patched"
    smolvla_fast.patch(policy, precision=precision)
    for _ in range(3):
        chunk(policy, observation, noise)
    now = smolvla_fast.status(policy)
    assert now.active and (now.calls_fast, now.calls_stock) == (3, 0)
    assert now.graphs == 0 and now.last_fallback is None
    assert set(now.to_dict()) == {
        "active", "precision", "backend", "plan", "stages", "fallback_reasons", "calls_fast", "calls_stock",
        "last_fallback", "trials", "graphs", "graph_bytes", "graph_nodes", "step_launches", "extra_bytes",
        "layers_fast", "layers_stock", "layers_fallback",
        "training_fast", "training_stock", "training_fallback", "training_fallback_reasons", "training_cache",
    }  # fmt: skip


@pytest.mark.check(3)
def test_doctor_says_what_status_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend that serves, the 8-bit tiers with the reason why not, and the switch that turns all off."""
    policy = smolvla_fast.patch(make_policy("tiny"))
    for disabled in (False, True):
        monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1" if disabled else "0")
        assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
        out, found = capsys.readouterr().out, json.loads((tmp_path / "doctor.json").read_text())
        assert found["disabled"] is disabled is not smolvla_fast.status(policy).active
        assert ("SMOLVLA_FAST_DISABLE is set" in out) is disabled
    monkeypatch.delenv("SMOLVLA_FAST_DISABLE")
    assert found["serves"] == smolvla_fast.status(policy).backend
    assert found["versions"]["torch"] and found["versions"]["lerobot"]
    for tier, reason in found["quantized"].items():
        if reason:
            with pytest.raises(RuntimeError) as refused:
                smolvla_fast.patch(policy, precision=tier)
            assert reason in str(refused.value) and reason in " ".join(out.split())


@pytest.mark.check(4)
@pytest.mark.parametrize("layout", ["fp32", "mixed"])
def test_exact_and_stock_have_the_same_bits(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU a patched policy is accelerated: its bits are stock's in tier ``exact``, and wherever stock runs instead."""
    stock = make_policy("tiny", layout=layout)
    observation, noise = (
        make_observation(stock),
        make_noise(stock),
    )
    wanted = chunk(stock, observation, noise)
    fast = smolvla_fast.patch(stock, precision="exact")
    assert torch.equal(chunk(fast, observation, noise), wanted)
    smolvla_fast.patch(fast, precision="auto")
    assert not torch.equal(chunk(fast, observation, noise), wanted)
    hook = fast.model.vlm_with_expert.lm_expert.norm.register_forward_hook(lambda *_: None)
    caplog.clear()
    for _ in range(3):
        assert torch.equal(chunk(fast, observation, noise), wanted)
    hook.remove()
    assert len(caplog.records) == 1 and "hook" in caplog.text
    now = smolvla_fast.status(fast)
    assert (now.calls_fast, now.calls_stock) == (2, 3)


@pytest.mark.check(4)
def test_other_devices_run_stock(caplog: pytest.LogCaptureFixture) -> None:
    """A device without values is none to try; what may be tried: tests/patching/test_trial.py."""
    policy = make_policy("tiny").to("meta")
    smolvla_fast.patch(policy)
    now = smolvla_fast.status(policy)
    assert (
        not now.active
        and now.last_fallback == "the policy is on meta and has no values; accepted are cpu and cuda"
    )
    assert len(caplog.records) == 1 and str(now.last_fallback) in caplog.text
    assert backends.select("auto", torch.device("mps"), False).backend == "torch"


@pytest.mark.check(5)
def test_disabled_by_environment(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = chunk(policy, observation, noise)
    cls = type(policy.model)
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    smolvla_fast.patch(policy, precision="bf16")
    assert type(policy.model) is cls and torch.equal(chunk(policy, observation, noise), stock)
    assert smolvla_fast.status(policy).last_fallback == "SMOLVLA_FAST_DISABLE is set"
    monkeypatch.delenv("SMOLVLA_FAST_DISABLE")
    smolvla_fast.patch(policy, precision="bf16")
    assert not torch.equal(chunk(policy, observation, noise), stock)
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    assert torch.equal(chunk(policy, observation, noise), stock)


@pytest.mark.check(6)
def test_no_global_state_moves() -> None:
    def seen() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            list(warnings.filters),
            logging.getLogger().handlers[:],
            logging.getLogger("smolvla_fast").level,
        )

    policy = make_policy("tiny")
    observation = make_observation(policy)
    noise = make_noise(policy)
    before = seen()
    for precision in TIERS:
        smolvla_fast.patch(policy, precision=precision, warmup=True)
        chunk(policy, observation, noise)
        smolvla_fast.verify(policy, observation)
        assert seen() == before
    smolvla_fast.unpatch(policy)
    assert seen() == before


@pytest.mark.check(7)
@LEROBOT_ONLY
def test_another_source_runs_stock_until_its_trial_and_is_named(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert source_digests.unknown_of(source_digests.owners(policy.model)) is None, (
        "the installed LeRobot is known"
    )
    stock = chunk(policy, observation, noise)
    known = {version: {**table, "apply_rope": "0" * 12} for version, table in source_digests.KNOWN.items()}
    monkeypatch.setattr(source_digests, "KNOWN", known)
    smolvla_fast.patch(policy, trial=False)
    assert torch.equal(chunk(policy, observation, noise), stock)
    now = smolvla_fast.status(policy)
    assert not now.active and now.calls_stock == 1
    assert len(caplog.records) == 1
    smolvla_fast.patch(policy)
    assert torch.equal(chunk(policy, observation, noise), stock), "the trial returns stock's chunk"
    assert rel_l2(chunk(policy, observation, noise), stock) <= FP32_BOUND
    trial = smolvla_fast.status(policy)
    assert trial.active and (trial.calls_fast, trial.calls_stock, len(trial.trials)) == (1, 2, 1)
    for word in ("apply_rope", "0.6.1", "0.4.4"):
        assert word in str(now.last_fallback) and word in caplog.text
