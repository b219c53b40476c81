"""LeRobot's commands as a user runs them who has installed the plugin: fixtures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolvla_fast import auto_patch

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "tests" / "offline"
PATIENCE = 240  # seconds; a command takes about ten on an idle machine, and several share two cores here
VARIABLES = tuple(
    getattr(auto_patch, name)
    for name in ("PRECISION", "BACKEND", "TUNE", "WARMUP", "TRAINING", "IMAGE_CACHE")
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin as pip installs it, and a robot and an environment installed as LeRobot's plugins are."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("plugin") / "plugin"
    shutil.copytree(ROOT / "plugin", source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation")
    subprocess.run([*pip, "--target", folder, source], check=True, timeout=PATIENCE)
    for name in ("lerobot_robot_tiny", "lerobot_env_tiny"):
        shutil.copy(OFFLINE / f"{name}.py", folder)
        (folder / f"{name}-0.dist-info").mkdir()
        (folder / f"{name}-0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n"
        )
    return folder


@pytest.fixture
def start(site: Path, tmp_path: Path) -> Iterator[Any]:
    """start(command line, **variables) -> the process, as in a shell of a user who has installed plugin and policy."""
    started: list[subprocess.Popen[str]] = []

    def run(line: str, **variables: str) -> subprocess.Popen[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("SMOLVLA_FAST_")}
        env |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, site))),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "ROBOT": "tiny",
            **variables,
        }
        # A shell's background job ignores Ctrl-C and hands that down; whoever runs the suite so still tests a terminal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=tmp_path, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin's module, imported as LeRobot imports it; what it did is undone afterwards."""
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    for name in (*VARIABLES, "SMOLVLA_FAST_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    assert "from_pretrained" not in vars(SmolVLAPolicy)
    loss = SmolVLAPolicy.forward
    yield load_plugin()
    SmolVLAPolicy.forward = loss
    del SmolVLAPolicy.from_pretrained


def load_plugin() -> Any:
    spec = importlib.util.spec_from_file_location(
        "a_plugin", ROOT / "plugin" / "lerobot_policy_smolvla_fast.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
