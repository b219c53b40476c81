"""What ``serve --fleet`` says where Ray has no place for its replicas: a sentence and exit status 2, before it waits."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet.conftest import PATIENCE, Fleet

# Each command is a user's; they share a process, which imports LeRobot and Ray once.
COMMANDS = """
import json, sys
from smolvla_fast.cli import main
for words in json.loads(sys.argv[1]):
    print("status:", main(["serve", "--fleet", *words]), file=sys.stderr, flush=True)
"""
A_RAY = """
import sys, ray
here = ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
print(here.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ray_with_a_gpu(ray_here: str) -> Iterator[str]:
    """The address of another Ray, with a GPU by name: Ray believes what it is told."""
    held = subprocess.Popen(
        [sys.executable, "-c", A_RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with held:  # which closes its input, and waits for it
        assert held.stdout is not None
        yield held.stdout.readline().strip()


@pytest.mark.slow
def test_the_command_says_where_ray_has_no_place(fleet: Fleet, ray_with_a_gpu: str, tmp_path: Path) -> None:
    import ray

    taken = ray.get_runtime_context().gcs_address  # by the fleet of these tests
    expected = {
        (f"--ray-address={ray_with_a_gpu}", "--replicas=2"): "2 replicas, and free are 1 GPUs (one a replica) and 1 CPUs",
        (f"--ray-address={taken}",): "1 replicas, and free are 0 GPUs (one a replica) and 0 CPUs",
        ("--ray-address=127.0.0.1:1",): "no Ray at 127.0.0.1:1: ",
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = f"--port={free.getsockname()[1]}"
    words = [[f"--policy.path={fleet.checkpoint.path}", port, *each] for each in expected]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(words)], cwd=tmp_path, text=True, capture_output=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr
    said = [
        line for line in done.stderr.splitlines() if line.startswith(("smolvla-fast serve: ", "status: "))
    ]
    assert said[1::2] == ["status: 2"] * len(expected), done.stderr
    for line, sentence in zip(said[::2], expected.values(), strict=True):
        assert line.startswith(f"smolvla-fast serve: {sentence}"), line
