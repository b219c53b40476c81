"""LeRobot's own ``lerobot-train`` with the plugin installed: accelerated by a variable alone, and still LeRobot's."""

from __future__ import annotations

import gc
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from support.plugin_commands import PATIENCE, plugin, site, start
from support.train_steps import make_batch
from support.training_runs import BenchTop, lerobot_command, record

from smolvla_fast import auto_patch, status
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

pytestmark = pytest.mark.training
pytest.importorskip("wrapt", reason="the plugin needs it")

__all__ = ["plugin", "site", "start"]

FAST = {auto_patch.TRAINING: "1", auto_patch.IMAGE_CACHE: "100000000"}
EVALUATE = (
    "--env.type=tiny", "--env_eval_freq=6", "--eval.n_episodes=1", "--eval.batch_size=1", "--eval.use_async_envs=false",
)  # fmt: skip
"""In the environment of ``lerobot_env_tiny``, whose cameras and numbers ``SCENE`` names."""
SCENE = {
    "observation.images.camera1": ("image", (24, 32, 3)), "observation.images.camera2": ("image", (24, 32, 3)),
    "observation.state": ("float32", (6,)), "action": ("float32", (6,)),
}  # fmt: skip


def line(bench_top: BenchTop, output: Path, *more: str) -> list[str]:
    """The flags of a run that lerobot-train takes."""
    fixed = (
        "--policy.type=smolvla",
        "--policy.push_to_hub=false",
        "--dataset.video_backend=pyav",
        "--steps=6",
        "--log_freq=1",
        "--save_freq=3",
    )
    flags = bench_top.flags(output, "--policy.load_vlm_weights=false", *fixed, *more)
    return [*{flag.split("=")[0]: flag for flag in flags}.values()]  # draccus refuses a flag given twice


def numbers(said: str, name: str) -> list[float]:
    return [float(each) for each in re.findall(rf" {name}:([\d.e+-]+)", said)]


@pytest.mark.long
@pytest.mark.slow
def test_the_command_trains_alike_with_and_without(
    start: Any,
    plugin: Any,
    bench_top: BenchTop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A fresh policy, accelerate, an evaluation in an environment, a checkpoint: by the variable alone.

    The command runs fast; without, its main function does, here. Below that runs fast, and stock's losses and evaluation
    are those of test_train_step_parity.py and tests/acceptance/test_plugin.py.
    """
    import offline.lerobot_env_tiny  # noqa: F401  (registers --env.type=tiny)

    data = record(tmp_path / "data", SCENE)
    stock, fast = (line(bench_top, tmp_path / name, data, *EVALUATE) for name in ("stock", "fast"))
    process = start(" ".join(["lerobot-train", *(f"'{flag}'" for flag in fast)]), **FAST)
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    lerobot_command(monkeypatch, *stock)
    said = {"stock": "".join(capfd.readouterr()), "fast": process.communicate(timeout=PATIENCE)[0]}
    assert process.returncode == 0, said["fast"][-4000:]
    assert said["fast"].count("smolvla_fast: on") == 1 and "; training on" in said["fast"]
    assert re.search(
        r"computed 6 losses, left 0 to stock, image cache: \d+ frames known, \d+ new", said["fast"]
    )
    # 25 steps of the environment, 6 actions a chunk.
    assert "served 5 chunks, left 0 to stock" in said["fast"] and "smolvla_fast: on" not in said["stock"]
    losses = {name: numbers(text, "loss") for name, text in said.items()}
    print(losses, {name: numbers(text, "updt_s") for name, text in said.items()})
    assert len(losses["stock"]) == 6
    # The log has three decimals; fp32 sums in another order may round one up and the other down.
    assert losses["fast"] == pytest.approx(losses["stock"], abs=1.1e-3)
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    chunks = []
    for name, step in (("stock", "last"), ("fast", "last"), ("stock", "000003")):
        folder = tmp_path / name / "checkpoints" / step / "pretrained_model"
        assert json.loads((folder / "config.json").read_text())["type"] == "smolvla"
        policy = SmolVLAPolicy.from_pretrained(folder)
        chunks.append(policy.predict_action_chunk(make_observation(policy), noise=make_noise(policy)))
    # AdamW divides by the gradient's own size, so that where it is near 0 rounding alone decides a step of 1e-3: a share of
    # the weights that is far below one. That it is below what three steps do is asked as well.
    apart = (chunks[0] - chunks[1]).norm()
    assert 0 < apart <= 1e-2 * chunks[0].norm()
    assert apart < (chunks[0] - chunks[2]).norm(), "three steps move the chunk further than that"


def test_adapters_train_fast_and_are_lerobots(
    plugin: Any, bench_top: BenchTop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """``--peft.*`` on a checkpoint, saved by LeRobot, and resumed by it."""
    pytest.importorskip("peft")
    monkeypatch.setenv(auto_patch.TRAINING, "1")
    logger = logging.getLogger("smolvla_fast")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # LeRobot drops those of the root

    def losses(*flags: str) -> list[str]:
        """What is said of the losses of a run."""
        caplog.clear()
        with caplog.at_level(logging.INFO, "smolvla_fast"):
            lerobot_command(monkeypatch, *flags)
            gc.collect()
        return re.findall(r"computed (\d+) losses, left 0 to stock", caplog.text)

    base, adapted = tmp_path / "base", tmp_path / "adapted"
    last = Path("checkpoints") / "last" / "pretrained_model"
    assert losses(*line(bench_top, base, "--steps=1")) == ["1"]
    # A checkpoint says its own type and sizes.
    flags = [flag for flag in line(bench_top, adapted, "--steps=2") if not flag.startswith("--policy.")]
    flags += [
        f"--policy.path={base / last}",
        "--policy.push_to_hub=false",
        "--peft.method_type=LORA",
        "--peft.r=4",
    ]
    assert losses(*flags) == ["2"]
    assert (adapted / last / "adapter_model.safetensors").exists()
    assert not (adapted / last / "model.safetensors").exists()
    assert losses(f"--config_path={adapted / last / 'train_config.json'}", "--resume=true", "--steps=3") == [
        "1"
    ]
    assert (adapted / "checkpoints" / "000003").is_dir()


def test_a_fresh_policy_is_patched_as_it_is_at_its_first_loss(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """LeRobot makes a policy on the CPU and moves it later. Here its dtype changes, for want of another device."""
    monkeypatch.setenv(auto_patch.TRAINING, "1")
    with caplog.at_level(logging.INFO, "smolvla_fast"):
        policy = make_policy("tiny", layout="mixed").train()
        assert status(policy).last_fallback == "the policy is not patched" and not caplog.records
        for _ in range(2):
            policy.forward(make_batch(policy))
    assert caplog.text.count("smolvla_fast: on: bf16 on cpu") == caplog.text.count("smolvla_fast: on") == 1
    assert status(policy).training_fast == 2


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({auto_patch.TRAINING: "1", auto_patch.IMAGE_CACHE: "8GB"}, "accepted is a number of bytes such as 8000000000"),
        ({auto_patch.IMAGE_CACHE: "8"}, "SMOLVLA_FAST_IMAGE_CACHE=8 needs SMOLVLA_FAST_TRAINING=1"),
    ],
)  # fmt: skip
def test_a_bad_wish_gives_stock_and_one_warning(
    plugin: Any,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    variables: dict[str, str],
    says: str,
) -> None:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    policy = SmolVLAPolicy.from_pretrained(finished / "checkpoints" / "last" / "pretrained_model")
    assert status(policy).last_fallback == "the policy is not patched"
    (record,) = [each for each in caplog.records if each.name == "smolvla_fast"]
    assert "off, stock runs" in record.getMessage() and says in record.getMessage()
