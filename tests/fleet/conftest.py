"""A fleet of one tiny replica on a Ray of its own, its front on a free port, and LeRobot's own clients."""

from __future__ import annotations

import asyncio
import os
import pickle
import secrets
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from offline.checkpoints import TASK, Checkpoint, save_checkpoint
from torch import Tensor

PATIENCE = 300  # seconds: a bound for what takes a few on an idle machine
WAIT_S = 0.25  # a batch's: long enough to do something to a replica while a request is in it
SEED = 7
ROOT = Path(__file__).resolve().parents[2]


class Fleet(NamedTuple):
    front: Any
    address: str
    metrics: str
    checkpoint: Checkpoint


@pytest.fixture(scope="package")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of the tests' own. Yields the URL of its metrics."""
    pytest.importorskip("ray.serve", reason='the fleet runs on Ray Serve: pip install ".[fleet]"')
    pytest.importorskip("lerobot.rollout", reason="the fleet speaks the protocol of LeRobot 0.6")
    settings = {
        "RAY_AUTH_TOKEN": secrets.token_hex(16),  # else Ray writes one into the home folder
        "RAY_metrics_report_interval_ms": "500",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        # LeRobot's server and client write logs where they stand when they are imported.
        patched.chdir(tmp_path_factory.mktemp("logs"))
        from smolvla_fast.fleet.cluster import connected

        with connected() as metrics:
            yield metrics


@pytest.fixture(scope="package")
def fleet(ray_here: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("fleet"), num_steps=3)
    with pytest.MonkeyPatch.context() as patched:
        import offline
        import ray
        from lerobot.async_inference.configs import PolicyServerConfig
        from offline.lerobot_robot_tiny import TinyRobot

        from smolvla_fast.fleet.cluster import deployed
        from smolvla_fast.fleet.front import Front

        # Another test's replicas may just have ended.
        eventually(lambda: ray.available_resources().get("CPU"))
        patched.setattr(offline, "TinyRobot", TinyRobot, raising=False)  # where LeRobot looks for it
        server = PolicyServerConfig(inference_latency=0.0, obs_queue_timeout=1)
        with deployed(str(checkpoint.path), 1, 8, WAIT_S) as replicas:
            front = Front(replicas, str(checkpoint.path), checkpoint.load().config, server, SEED)
            with listening(front) as port:
                yield Fleet(front, f"127.0.0.1:{port}", ray_here, checkpoint)


@contextmanager
def listening(front: Any) -> Iterator[int]:
    """The front in a thread of its own, as the command has it in the main one. Yields its port."""
    from smolvla_fast.fleet.front import listen

    ports: list[int] = []
    up = threading.Event()
    loop = asyncio.new_event_loop()
    task = loop.create_task(listen(front, "127.0.0.1:0", lambda port: (ports.append(port), up.set())))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert up.wait(PATIENCE)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Client:
    """LeRobot's client class with a robot without hardware; ``ask`` is one turn of its two threads."""

    def __init__(self, fleet: Fleet, folder: Path, number: int = 0, path: str | None = None) -> None:
        import grpc
        from lerobot.async_inference.configs import RobotClientConfig
        from lerobot.async_inference.robot_client import RobotClient
        from lerobot.transport import services_pb2_grpc
        from lerobot.transport.utils import grpc_channel_options
        from offline.lerobot_robot_tiny import TinyRobotConfig

        self.client = RobotClient(
            RobotClientConfig(
                policy_type="smolvla", pretrained_name_or_path=path or str(fleet.checkpoint.path), task=TASK,
                robot=TinyRobotConfig(calibration_dir=folder), actions_per_chunk=8, server_address=fleet.address,
            )
        )  # fmt: skip
        self.client.robot._rng = np.random.default_rng(number)
        # gRPC has one connection for all equal channels of a process; robots are in processes of their own.
        options = [*grpc_channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        self.client.channel = grpc.insecure_channel(fleet.address, options)
        self.client.stub = services_pb2_grpc.AsyncInferenceStub(self.client.channel)
        self.step = 0

    def observe(self) -> dict[str, Any]:
        return {**self.client.robot.get_observation(), "task": TASK}

    def send(self, observation: dict[str, Any], must_go: bool = True) -> bool:
        from lerobot.async_inference.helpers import TimedObservation

        self.step += 1
        return self.client.send_observation(TimedObservation(time.time(), self.step, observation, must_go))

    def receive(self) -> list[Any]:
        """The next chunk's actions; the error of a call is raised."""
        from lerobot.transport import services_pb2

        for _ in range(PATIENCE):
            if answer := self.client.stub.GetActions(services_pb2.Empty(), timeout=PATIENCE).data:
                return pickle.loads(answer)
        raise AssertionError("no chunk")

    def ask(self, observation: dict[str, Any]) -> list[Any]:
        assert self.send(observation)
        return self.receive()

    def stop(self) -> None:
        self.client.stop()


@pytest.fixture
def connect(fleet: Fleet, tmp_path: Path) -> Iterator[Any]:
    """connect(number) -> a started client."""
    clients: list[Client] = []

    def start(number: int = 0, started: bool = True, **options: Any) -> Client:
        clients.append(Client(fleet, tmp_path, number, **options))
        assert not started or clients[-1].client.start()
        return clients[-1]

    yield start
    for each in clients:
        each.stop()
    fleet.front.sessions.clear()  # of clients that stopped between two calls


class Alone:
    """LeRobot's own way from one observation to its actions, on the policy unpatched: what a fleet has to answer."""

    def __init__(self, fleet: Fleet) -> None:
        from lerobot.async_inference.helpers import map_robot_keys_to_lerobot_features
        from offline.lerobot_robot_tiny import TinyRobot, TinyRobotConfig

        self.policy = fleet.checkpoint.load()
        self.before, self.after = fleet.checkpoint.pipelines(self.policy)
        robot = TinyRobot(TinyRobotConfig(calibration_dir=Path(fleet.checkpoint.path)))
        self.features = map_robot_keys_to_lerobot_features(robot)

    def answer(self, observation: dict[str, Any], count: int, actions: int = 8) -> Tensor:
        from lerobot.async_inference.helpers import raw_observation_to_observation

        from smolvla_fast.fleet.replica import noise_of

        batch = raw_observation_to_observation(observation, self.features, self.policy.config.image_features)
        seed = int(np.random.SeedSequence([SEED, count]).generate_state(1)[0])
        noise = noise_of(seed, self.policy.config)[None]
        chunk = self.policy.predict_action_chunk(self.before(batch), noise=noise)
        return torch.cat([self.after(chunk[:, step]) for step in range(actions)])


@pytest.fixture(scope="package")
def alone(fleet: Fleet) -> Alone:
    return Alone(fleet)


def metrics(url: str, name: str, *having: str) -> list[float]:
    """The values of a metric's lines, as Prometheus would read them."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith(f"{name}{{") and all(each in line for each in having)]
    return [float(line.rsplit(" ", 1)[1]) for line in found]


def eventually(look: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def stacked(actions: list[Any]) -> Tensor:
    return torch.stack([each.get_action() for each in actions])
