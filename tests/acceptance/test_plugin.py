"""LeRobot's own commands with the plugin installed, and ``smolvla-fast serve``: what the README says, run as it says it."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import smolvla_fast
from smolvla_fast import auto_patch
from smolvla_fast.cli import main
from smolvla_fast.testing.policies import make_noise, make_observation

pytest.importorskip("lerobot.rollout", reason="lerobot-rollout came with LeRobot 0.6")
pytest.importorskip("grpc", reason="LeRobot's policy server needs grpcio")
pytest.importorskip("datasets", reason="LeRobot's commands need lerobot[dataset]")
pytest.importorskip("wrapt", reason="the plugin needs it")

from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from offline.checkpoints import TASK, Checkpoint, copied, rel_l2
from support.plugin_commands import PATIENCE, ROOT, load_plugin, plugin, site, start

__all__ = ["plugin", "site", "start"]


def readme_line(beginning: str) -> str:
    """The one line of the README's shell blocks that begins so."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (line,) = [line for block in blocks for line in block.splitlines() if line.startswith(beginning)]
    return line


# Real commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.check(63)
def test_the_readmes_commands_run_fast(
    start: Any, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``lerobot-rollout`` on a robot, and a policy server that a client asks, at the same time: both are accelerated."""
    monkeypatch.chdir(tmp_path)  # LeRobot's helpers write a log where they stand
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(readme_line("smolvla-fast serve"), PORT=str(port))
    rollout = start(readme_line("lerobot-rollout").replace("=60", "=3"), POLICY=str(checkpoint.path))
    actions = ask_server(f"127.0.0.1:{port}", checkpoint, tmp_path)
    assert len(actions) == 10 and all(torch.isfinite(action.get_action()).all() for action in actions)
    server.send_signal(signal.SIGINT)
    for name, process, code in (("rollout", rollout, 0), ("serve", server, 130)):
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, said[-4000:]
        assert re.search(r"smolvla_fast: on: fp32 on cpu, backend \w+ for all stages", said), (
            name,
            said[-4000:],
        )
        served = re.search(r"smolvla_fast: served (\d+) chunks, left 0 to stock", said)
        assert served is not None and int(served[1]) >= 1, (name, said[-4000:])
        assert "runs stock" not in said and said.count("smolvla_fast: on") == 1


def ask_server(address: str, checkpoint: Checkpoint, folder: Path) -> list[Any]:
    """One observation and its chunk, as LeRobot's robot client asks for it; every call bounded."""
    import grpc
    from lerobot.async_inference.helpers import (
        RemotePolicyConfig,
        TimedObservation,
        map_robot_keys_to_lerobot_features,
    )
    from lerobot.transport import services_pb2, services_pb2_grpc
    from lerobot.transport.utils import send_bytes_in_chunks
    from offline.lerobot_robot_tiny import TinyRobot, TinyRobotConfig

    robot = TinyRobot(TinyRobotConfig(calibration_dir=folder))
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=PATIENCE)
        stub = services_pb2_grpc.AsyncInferenceStub(channel)
        stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
        features = map_robot_keys_to_lerobot_features(robot)
        wanted = RemotePolicyConfig("smolvla", str(checkpoint.path), features, 10)
        stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(wanted)), timeout=PATIENCE)
        seen = TimedObservation(
            timestamp=time.time(),
            timestep=0,
            observation={**robot.get_observation(), "task": TASK},
            must_go=True,
        )
        stub.SendObservations(
            send_bytes_in_chunks(pickle.dumps(seen), services_pb2.Observation), timeout=PATIENCE
        )
        return pickle.loads(stub.GetActions(services_pb2.Empty(), timeout=PATIENCE).data)


@pytest.mark.check(63)
def test_lerobot_eval_gives_stocks_rewards(
    plugin: Any, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """``lerobot-eval``'s main function on two batches of environments; the rewards tell every action apart."""
    import offline.lerobot_env_tiny  # noqa: F401  (registers --env.type=tiny)
    from lerobot.scripts.lerobot_eval import eval_main

    monkeypatch.chdir(tmp_path)
    rewards: dict[str, list[float]] = {}
    for wish in ("stock", "exact", "auto"):
        monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1" if wish == "stock" else "")
        monkeypatch.setenv(auto_patch.PRECISION, "auto" if wish == "stock" else wish)
        line = f"lerobot-eval --policy.path={checkpoint.path} --env.type=tiny --output_dir=out/{wish}"
        settings = "--eval.n_episodes=5 --eval.batch_size=3 --eval.use_async_envs=false --seed=1"
        monkeypatch.setattr(sys, "argv", [*line.split(), *settings.split()])
        with caplog.at_level(logging.INFO, logger="smolvla_fast"):
            eval_main()
            gc.collect()  # what is said when a policy goes
        info = json.loads((tmp_path / "out" / wish / "eval_info.json").read_text())
        rewards[wish] = info["per_task"][0]["metrics"]["sum_rewards"]
    assert "off: SMOLVLA_FAST_DISABLE is set" in caplog.text
    assert "on: exact on cpu" in caplog.text and "on: fp32 on cpu" in caplog.text
    assert caplog.text.count("served 6 chunks, left 0 to stock") == 2
    assert rewards["exact"] == rewards["stock"]
    # fp32 reorders sums; an episode feeds its error back 25 times, and stays far below the smallest real difference.
    assert (
        rewards["auto"] == pytest.approx(rewards["stock"], rel=1e-3) and rewards["auto"] != rewards["stock"]
    )


# Loading ---------------------------------------------------------------------------------------------------------------


def test_importing_the_plugin_starts_nothing(site: Path) -> None:
    code = (
        "import sys, lerobot_policy_smolvla_fast;"
        "print([name for name in ('torch', 'lerobot', 'transformers', 'smolvla_fast') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "[]", said.stderr


def _from_pretrained(checkpoint: Checkpoint, folder: Path) -> Any:
    return checkpoint.load()


def _make_policy(checkpoint: Checkpoint, folder: Path) -> Any:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_policy
    from offline.lerobot_env_tiny import TinyEnvConfig

    config = PreTrainedConfig.from_pretrained(checkpoint.path)
    config.pretrained_path = checkpoint.path
    return make_policy(config, env_cfg=TinyEnvConfig())


def _as_the_server_loads(checkpoint: Checkpoint, folder: Path) -> Any:
    from lerobot.policies.factory import get_policy_class

    return get_policy_class("smolvla").from_pretrained(str(checkpoint.path)).to("cpu")


@pytest.mark.check(63)
@pytest.mark.parametrize("load", [_from_pretrained, _make_policy, _as_the_server_loads])
def test_every_way_of_loading(plugin: Any, checkpoint: Checkpoint, tmp_path: Path, load: Any) -> None:
    policy = load(checkpoint, tmp_path).eval()
    now = smolvla_fast.status(policy)
    assert now.active and now.precision == "fp32" and not policy.training
    observation, noise = make_observation(policy), make_noise(policy)
    fast = policy.predict_action_chunk(copied(observation), noise=noise)
    stock = smolvla_fast.unpatch(policy).predict_action_chunk(copied(observation), noise=noise)
    assert rel_l2(fast, stock) <= 1e-5  # fp32 sums in another order


@pytest.mark.check(17)
def test_a_peft_adapter_runs_stock_until_merged(plugin: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Loaded as ``make_policy`` loads adapters: unmerged it is not ignored, merged the engine serves it."""
    pytest.importorskip("peft")
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_policy
    from offline.lerobot_env_tiny import TinyEnvConfig

    base = checkpoint.load()
    base.config.pretrained_path = checkpoint.path
    wrapped = base.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2, "init_type": False})
    wrapped.save_pretrained(tmp_path)
    base.config.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.pretrained_path, config.use_peft = tmp_path, True
    policy = make_policy(config, env_cfg=TinyEnvConfig()).eval()
    observation, noise = make_observation(base), make_noise(base)
    stock = smolvla_fast.unpatch(wrapped).eval().predict_action_chunk(copied(observation), noise=noise)
    assert torch.equal(policy.predict_action_chunk(copied(observation), noise=noise), stock)
    now = smolvla_fast.status(policy)
    assert not now.active and now.calls_stock == 1 and "lora" in str(now.last_fallback)
    merged = policy.merge_and_unload()
    assert rel_l2(merged.predict_action_chunk(copied(observation), noise=noise), stock) <= 1e-5
    assert smolvla_fast.status(merged).calls_fast == 1


@pytest.mark.check(14)
def test_nothing_else_is_touched(plugin: Any, checkpoint: Checkpoint) -> None:
    from lerobot.policies.pretrained import PreTrainedPolicy

    assert ACTPolicy.from_pretrained.__func__ is PreTrainedPolicy.from_pretrained.__func__
    fresh = SmolVLAPolicy(checkpoint.load().config)
    assert smolvla_fast.status(fresh).last_fallback == "the policy is not patched"
    once = SmolVLAPolicy.from_pretrained.__func__
    auto_patch.patch_as_loaded(SmolVLAPolicy)
    assert SmolVLAPolicy.from_pretrained.__func__ is once


@pytest.mark.check(5)
def test_the_environment_chooses(
    plugin: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv(auto_patch.PRECISION, "bf16")
    monkeypatch.setenv(auto_patch.BACKEND, "torch")
    policy = checkpoint.load()
    now = smolvla_fast.status(policy)
    assert (now.precision, now.backend) == ("bf16", "torch")
    assert vars(policy.model)["_smolvla_fast"].tune == "cached"
    monkeypatch.setenv(auto_patch.TUNE, "off")
    assert vars(checkpoint.load().model)["_smolvla_fast"].tune == "off"
    with caplog.at_level(logging.INFO, "smolvla_fast"):
        checkpoint.load()
        assert "warm-up" not in caplog.text
        monkeypatch.setenv(auto_patch.WARMUP, "no")
        checkpoint.load()
        assert "warm-up" not in caplog.text
        monkeypatch.setenv(auto_patch.WARMUP, "true")
        checkpoint.load()
        assert "; warm-up " in caplog.text
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    policy = checkpoint.load()
    assert type(policy.model).__mro__[0].__name__ == "VLAFlowMatching" and not vars(policy.model).get(
        "_smolvla_fast"
    )
    assert smolvla_fast.status(policy).last_fallback == "SMOLVLA_FAST_DISABLE is set"


@pytest.mark.parametrize(
    "fault",
    ["unknown precision", "unknown plan", "unknown wish", "patching raises", "patching raises half-way"],
)
def test_a_fault_gives_stock_and_one_warning(
    plugin: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: Any, fault: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("broken")

    if fault == "unknown precision":
        monkeypatch.setenv(auto_patch.PRECISION, "fp12")
    elif fault == "unknown plan":
        monkeypatch.setenv(auto_patch.TUNE, "maybe")
    elif fault == "unknown wish":
        monkeypatch.setenv(auto_patch.IMAGE_CACHE, "8GB")
    elif fault == "patching raises":
        monkeypatch.setattr(auto_patch, "patch", broken)
    else:
        monkeypatch.setattr(auto_patch, "runtime_of", broken)
    policy = checkpoint.load()
    (record,) = [
        each for each in caplog.records if each.levelno >= logging.WARNING and each.name == "smolvla_fast"
    ]
    assert "off, stock runs" in record.getMessage()
    assert smolvla_fast.status(policy).last_fallback == "the policy is not patched"
    assert torch.isfinite(policy.predict_action_chunk(make_observation(policy))).all()


def test_a_broken_smolvla_fast_gives_stock_and_one_warning(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setitem(sys.modules, "smolvla_fast.auto_patch", None)
    load_plugin()
    assert "off, stock runs" in caplog.text and "from_pretrained" not in vars(SmolVLAPolicy)


def test_moving_to_where_a_wish_cannot_be_met_gives_stock(
    plugin: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wish is met where the policy is loaded; LeRobot may move it afterwards. The robot goes on, on stock."""
    from smolvla_fast.ops import select as backends

    monkeypatch.setenv(auto_patch.BACKEND, "torch")
    policy = checkpoint.load()
    observation, noise = make_observation(policy), make_noise(policy)
    assert smolvla_fast.status(policy).active
    monkeypatch.setattr(backends, "why_not", lambda backend, device: "it is not there")
    policy.model.vlm_with_expert.bfloat16()  # the engine is made anew, as after a move to another device
    policy.predict_action_chunk(copied(observation), noise=noise)
    now = smolvla_fast.status(policy)
    assert not now.active and now.calls_stock == 1
    assert "backend='torch' cannot serve this policy: it is not there" in str(now.last_fallback)


def test_the_closing_line_of_a_policy_that_was_never_asked_is_no_count(
    plugin: Any, checkpoint: Checkpoint, caplog: Any
) -> None:
    """A copy serves its own chunks; "served 0 chunks, left 0 to stock" would say that nothing ran."""
    policy = checkpoint.load()
    twin = copy.deepcopy(policy)
    twin.predict_action_chunk(make_observation(twin))
    with caplog.at_level(logging.INFO, "smolvla_fast"):
        del policy
        gc.collect()
    assert "smolvla_fast: saw no chunk of this policy: a copy computed them" in caplog.text
    assert (
        "to train by the fast path, set SMOLVLA_FAST_TRAINING=1" in caplog.text
    )  # as lerobot-train without it ends


# serve -----------------------------------------------------------------------------------------------------------------


def test_serve_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    from lerobot.async_inference import policy_server

    seen: list[Any] = []
    monkeypatch.setattr(policy_server, "serve", seen.append)
    for name in (auto_patch.PRECISION, auto_patch.BACKEND):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(SmolVLAPolicy, "forward", SmolVLAPolicy.forward)  # put back at the end
    try:
        assert main(["serve", "--precision=exact", "--host=0.0.0.0", "--port", "9", "--fps=7"]) == 0
    finally:
        del SmolVLAPolicy.from_pretrained
    assert (seen[0].host, seen[0].port, seen[0].fps) == ("0.0.0.0", 9, 7)
    assert os.environ[auto_patch.PRECISION] == "exact" and os.environ[auto_patch.BACKEND] == ""


def test_serve_without_grpc_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lerobot.async_inference", None)
    assert main(["serve"]) == 2
    assert "pip install 'lerobot[smolvla,async]'" in capsys.readouterr().err
    assert "from_pretrained" not in vars(SmolVLAPolicy)
