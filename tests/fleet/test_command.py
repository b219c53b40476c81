"""``smolvla-fast serve --fleet`` as a user starts it, the example that drives it, and what it says where it cannot serve."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from offline.checkpoints import save_checkpoint

from fleet.conftest import PATIENCE, ROOT, Fleet, eventually, metrics
from smolvla_fast.cli import main

# Each line is the words of one command, a user's. They share a process, which imports LeRobot and Ray once; it ends as the
# last of them.
COMMANDS = """
import json, sys
from smolvla_fast.cli import main
for line in sys.stdin:
    status = main(["serve", "--fleet", *json.loads(line)])
    print("status:", status, flush=True)
sys.exit(status)
"""


class Commands:
    """The process of ``COMMANDS``."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS], cwd=folder, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: str, until: str = "status: ") -> list[str]:
        """Starts a command. Returns its lines up to the first that begins so."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(words), file=self.process.stdin)
        late = threading.Timer(PATIENCE, self.process.kill)
        late.start()
        said: list[str] = []
        try:
            for line in self.process.stdout:
                said.append(line)
                if line.startswith(until):
                    return said
        finally:
            late.cancel()
        raise AssertionError("".join(said))

    def interrupt(self) -> str:
        """As Ctrl-C, once. Returns what it said until it had ended."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=PATIENCE)[0]


@pytest.fixture
def commands(ray_here: str, tmp_path: Path) -> Iterator[Commands]:
    started = Commands(tmp_path)
    yield started
    started.process.kill()  # or its replicas would hold the CPUs that the next tests need
    started.process.communicate()


def test_the_command_serves_until_it_is_interrupted(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on replicas that are there; in a process of its own, with its own, below."""
    from smolvla_fast.fleet import cluster

    asked: list[tuple[object, ...]] = []

    @contextmanager
    def given(result: Any, *asked_for: object) -> Iterator[Any]:
        asked.append(asked_for)
        yield result

    monkeypatch.setattr(cluster, "connected", partial(given, fleet.metrics))
    monkeypatch.setattr(cluster, "deployed", partial(given, fleet.front.replicas))
    path = fleet.checkpoint.path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    example = str(ROOT / "examples" / "fleet_client.py")
    words = [f"--policy.path={path}", f"--address=127.0.0.1:{port}", "--clients=1,2", "--chunks=2"]
    monkeypatch.setattr(sys, "argv", [example, *words])
    failed: list[BaseException] = []
    ended = threading.Event()

    def ask() -> None:
        try:
            eventually(lambda: ended.is_set() or socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            runpy.run_path(example, run_name="__main__")
        except BaseException as error:
            failed.append(error)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=ask)
    asking.start()
    flags = ["--max-batch=4", "--batch-wait-ms=20", "--replicas=3", "--host=127.0.0.1", f"--port={port}"]
    try:
        status = main(["serve", "--fleet", f"--policy.path={path}", *flags])
    finally:
        ended.set()
    asking.join(PATIENCE)
    said = capsys.readouterr().out
    assert status == 130 and not failed, (status, failed, said)
    assert asked[0] == (None, None) and asked[1][:4] == (str(path), 3, 4, 0.02), asked
    assert re.search(rf"fp32 by \w+ on cpu, process \d+; replicas: 3; metrics: {fleet.metrics}\n", said)
    assert f"ready: 127.0.0.1:{port}" in said and re.search(r"\| 1 \| 2 \| .*\n\| 2 \| 4 \| ", said)


def test_where_no_ray_listens_the_command_says_so(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--policy.path={fleet.checkpoint.path}", "--ray-address=127.0.0.1:1"]
    assert main(["serve", "--fleet", *flags]) == 2
    assert "smolvla-fast serve: no Ray at 127.0.0.1:1: " in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_the_command_serves_the_examples_arms_from_replicas_of_its_own(
    ray_here: str, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where Ray has no place it says so before it waits. Where it has, two replicas on a Ray that is there: both answer,
    and the command takes them with it and leaves the Ray."""
    import ray
    from ray import serve
    from ray.util import placement_group, remove_placement_group

    path = save_checkpoint(tmp_path / "checkpoint", num_steps=1).path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--policy.path={path}", "--host=127.0.0.1", f"--port={port}", "--inference_latency=0"]
    here = f"--ray-address={ray.get_runtime_context().gcs_address}"
    taken = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    assert taken.wait(PATIENCE)
    for where, sentence in (
        ([here], "1 replicas, and free are 0 GPUs (one a replica) and 0 CPUs"),
        (["--ray-address=127.0.0.1:1"], "no Ray at 127.0.0.1:1: "),
    ):  # fmt: skip
        said = commands.run(*flags, *where)
        assert said[-1] == "status: 2\n" and "Traceback" not in "".join(said), said
        (line,) = [each for each in said if each.startswith("smolvla-fast serve: ")]
        assert line.startswith(f"smolvla-fast serve: {sentence}"), line
    remove_placement_group(taken)
    eventually(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    said = commands.run(*flags, here, "--replicas=2", until="ready: ")
    assert re.search(rf"fp32 by \w+ on cpu, process \d+; replicas: 2; metrics: {ray_here}\n", "".join(said))
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
    ended = commands.interrupt()
    assert commands.process.returncode == 130 and "Traceback" not in "".join([*said, ended]), ended
    assert not serve.status().applications


@pytest.mark.parametrize("gpus", [{"GPU": 1.0}, {}], ids=["one free", "none free"])
def test_a_replica_without_a_gpu_is_refused_where_ray_has_gpus(
    gpus: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the fleet runs on Ray")
    from smolvla_fast.fleet.cluster import CannotDeploy, deployed

    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 4.0, **gpus})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("they are deployed"))
    with pytest.raises(CannotDeploy) as refused, deployed("checkpoint", 2, 8, 0.1):
        pass
    room = f"{len(gpus)} GPUs (one a replica) and 4 CPUs; lower --replicas, or free some"
    assert str(refused.value) == f"2 replicas, and free are {room}"


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
