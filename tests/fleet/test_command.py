"""``smolvla-fast serve --fleet`` as a user starts it, and the example that drives it."""

from __future__ import annotations

import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fleet.conftest import PATIENCE, ROOT, eventually, metrics
from offline.checkpoints import save_checkpoint

from smolvla_fast.cli import main


@pytest.mark.slow
def test_the_command_serves_the_examples_arms_until_it_is_interrupted(
    ray_here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two replicas on a Ray that is there: both answer, and the command takes them with it and leaves the Ray."""
    import ray
    from ray import serve

    path = save_checkpoint(tmp_path / "checkpoint", num_steps=1).path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--policy.path={path}", "--host=127.0.0.1", f"--port={port}", "--inference_latency=0"]
    flags += [f"--ray-address={ray.get_runtime_context().gcs_address}", "--replicas=2"]
    server = subprocess.Popen(
        [sys.executable, "-m", "smolvla_fast.cli", "serve", "--fleet", *flags], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said: list[str] = []
    up = threading.Event()

    def read() -> None:
        for line in server.stdout or ():
            said.append(line)
            if line.startswith("ready: "):
                up.set()
        up.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert up.wait(PATIENCE) and server.poll() is None, "".join(said)
        assert re.search(
            rf"fp32 by \w+ on cpu, process \d+; replicas: 2; metrics: {ray_here}\n", "".join(said)
        )
        example = str(ROOT / "examples" / "fleet_client.py")
        words = [f"--policy.path={path}", f"--address=127.0.0.1:{port}", "--clients=2,3", "--chunks=4"]
        monkeypatch.setattr(sys, "argv", [example, *words])
        runpy.run_path(example, run_name="__main__")
        assert re.search(r"\| 2 \| 8 \| .*\n\| 3 \| 12 \| ", capsys.readouterr().out)
        (application,) = serve.status().applications
        served = "ray_serve_deployment_request_counter_total"
        eventually(lambda: sum(metrics(ray_here, served, f'application="{application}"')) > 20)
        # The command has asked one of them who it is; chunks came from both.
        assert len(each := metrics(ray_here, served, f'application="{application}"')) == 2 and min(each) > 1
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(PATIENCE)
        finally:
            server.kill()  # or its replicas would hold the CPUs that the next tests need
        reader.join(PATIENCE)
    assert server.returncode == 130 and "Traceback" not in "".join(said), "".join(said)
    assert not serve.status().applications


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--replicas=2"], "--replicas is for many clients; add --fleet"),
        (["--policy.path=x"], "--policy.path is for many clients"),
        (["--fleet"], "no --policy.path"),
        (["--fleet", "--policy.path=./nowhere"], "./nowhere"),
        (["--fleet", "--max-batch=0"], "--max-batch"),
        (["--fleet", "--ray-address=auto", "--metrics-port=8081"], "--metrics-port is of a Ray of its own"),
        (["--fleet", "--batch-wait-ms=2000"], "--batch-wait-ms"),
    ],
)
def test_the_command_refuses_what_it_cannot_serve(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["serve", *arguments])
    except SystemExit as refused:  # argparse's own
        status = refused.code
    assert status == 2 and says in (error := capsys.readouterr().err) and "Traceback" not in error


def test_without_ray_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lerobot.rollout", reason="the fleet speaks the protocol of LeRobot 0.6")
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path / "checkpoint", num_steps=1).path
    for name in [name for name in sys.modules if name.startswith("smolvla_fast.fleet.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["serve", "--fleet", f"--policy.path={path}", "--host=127.0.0.1", f"--port={port}"]) == 2
    assert "smolvla_fast[fleet]" in capsys.readouterr().err
