"""Arms without hardware on LeRobot's own client class, for `smolvla-fast serve --fleet` or LeRobot's own policy server.

    python examples/fleet_client.py --policy.path FOLDER_OR_HUB_ID [--address localhost:8080] [--clients 1,4,16]

Prints, by number of arms, the chunks per second and the milliseconds from an observation sent to its chunk received. With
several addresses, as in --address localhost:8080,localhost:8081, arms are spread over them: one server an arm. A real arm is
`python -m lerobot.async_inference.robot_client --server_address=... --robot.type=...`, as with any policy server.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from lerobot.async_inference.configs import RobotClientConfig
from lerobot.async_inference.helpers import TimedObservation
from lerobot.async_inference.robot_client import RobotClient
from lerobot.configs.policies import PreTrainedConfig
from lerobot.robots import Robot, RobotConfig
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import grpc_channel_options


@RobotConfig.register_subclass("simulated_arm")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    joints: int
    frames: dict[str, tuple[int, int, int]]


class SimulatedArm(Robot):
    """Joints that stand still and cameras that see noise, of the sizes that a policy was trained on."""

    config_class = SimulatedArmConfig
    name = "simulated_arm"
    is_connected = is_calibrated = True
    observation_features: Any = None
    action_features: Any = None

    def __init__(self, config: SimulatedArmConfig) -> None:
        super().__init__(config)
        self.frames = config.frames
        self.action_features = {f"joint{i}.pos": float for i in range(config.joints)}
        self.observation_features = {**self.action_features, **config.frames}

    def get_observation(self) -> dict[str, Any]:
        rng = np.random.default_rng()
        frames = {name: rng.integers(0, 256, size, np.uint8) for name, size in self.frames.items()}
        return {**dict.fromkeys(self.action_features, 0.0), **frames}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        return action

    def connect(self, calibrate: bool = True) -> None: ...
    def disconnect(self) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...


def connect(address: str, path: str, config: Any, folder: Path) -> RobotClient:
    prefix = "observation.images."
    frames = {
        name.removeprefix(prefix): (feature.shape[1], feature.shape[2], feature.shape[0])
        for name, feature in config.image_features.items()
    }
    arm = SimulatedArmConfig(
        calibration_dir=folder, joints=config.robot_state_feature.shape[0], frames=frames
    )
    client = RobotClient(
        RobotClientConfig(
            policy_type="smolvla", pretrained_name_or_path=path, robot=arm, server_address=address,
            actions_per_chunk=config.chunk_size,
        )
    )  # fmt: skip
    # gRPC gives all clients of one process one connection, by which a fleet would take them for one client.
    client.channel = grpc.insecure_channel(
        address, [*grpc_channel_options(), ("grpc.use_local_subchannel_pool", 1)]
    )
    client.stub = services_pb2_grpc.AsyncInferenceStub(client.channel)
    if not client.start():
        sys.exit(f"{address}: refused; its reason stands above")
    return client


def drive(client: RobotClient, chunks: int, found: list[float]) -> None:
    """Asks for one chunk after the other; the ms that each took go to ``found``."""
    for step in range(chunks):
        seen = {**client.robot.get_observation(), "task": "pick up the red cube"}
        began = time.perf_counter()
        client.send_observation(TimedObservation(time.time(), step, seen, must_go=True))
        while not (answer := client.stub.GetActions(services_pb2.Empty()).data):
            pass
        found.append(1000 * (time.perf_counter() - began))
        assert pickle.loads(answer)[0].get_timestep() == step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy.path", dest="path", required=True, help="as the server was given it")
    parser.add_argument("--address", default="localhost:8080", help="of the server, or several with commas")
    parser.add_argument("--clients", default="1,4", help="numbers of arms to run, one after the other")
    parser.add_argument("--chunks", type=int, default=20, help="of each arm")
    args = parser.parse_args()
    config, addresses = PreTrainedConfig.from_pretrained(args.path), args.address.split(",")
    print("| arms | chunks | p50 ms | p99 ms | chunks/s |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, args.clients.split(",")):
            arms = [
                connect(addresses[i % len(addresses)], args.path, config, Path(folder)) for i in range(count)
            ]
            found: list[float] = []
            began = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(drive, arms, [args.chunks] * count, [found] * count))
            rate = len(found) / (time.perf_counter() - began)
            p50, p99 = np.percentile(found, [50, 99])
            print(f"| {count} | {len(found)} | {p50:.1f} | {p99:.1f} | {rate:.1f} |", flush=True)
            for arm in arms:
                arm.stop()


if __name__ == "__main__":
    main()
