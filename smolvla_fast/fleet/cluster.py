"""Replicas on Ray: on one of its own, on this machine, or on an existing cluster."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from ..measure.console import CommandError
from .replica import Replica

OWN: dict[str, Any] = dict(address="local", include_dashboard=False, object_store_memory=256 * 2**20)
"""A Ray of its own, whatever RAY_ADDRESS says. Its shared memory holds observations on their way, a few hundred KB each."""


class CannotDeploy(CommandError):
    """No Ray at the address, no room in it for the replicas, or none of them has started."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))  # Ray's own reasons may have many lines


@contextmanager
def connected(address: str | None = None, metrics_port: int | None = None) -> Iterator[str]:
    """A cluster's Ray, or where no address is given one that starts and ends here. Yields the URL of its metrics.

    raises  ``CannotDeploy``
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray of its own else reports to Ray's makers
    own = {**OWN, "_metrics_export_port": metrics_port}
    host, colon, port = (address or "").rpartition(":")
    try:
        if colon:  # where nothing listens, Ray itself goes on trying for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        here = ray.init(**({"address": address} if address else own))
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise CannotDeploy(f"no Ray at {address or 'this machine'}: {error}") from error
    with here:
        node = {each["NodeID"]: each for each in ray.nodes()}[ray.get_runtime_context().get_node_id()]
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


@contextmanager
def deployed(path: str, replicas: int, max_batch: int, wait_s: float, *how: str | None) -> Iterator[Any]:
    """A deployment of ``Replica``, with its arguments, warm, which ends here. Yields its handle; raises ``CannotDeploy``.

    Each replica has a GPU, or where there are none its share of the CPUs.
    """
    free, there = ray.available_resources(), ray.cluster_resources()
    gpus, cpus = int(free.get("GPU", 0)), free.get("CPU", 0.0)
    # Else Ray waits for room without end.
    if cpus <= 0 or ("GPU" in there and replicas > min(gpus, cpus)):
        room = f"{gpus} GPUs (one a replica) and {cpus:g} CPUs"
        raise CannotDeploy(f"{replicas} replicas, and free are {room}; lower --replicas, or free some")
    share = min(cpus / replicas, *(node["Resources"].get("CPU", cpus) for node in ray.nodes()))
    resources = {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": int(share) or share}
    deployment: Any = serve.deployment(
        Replica, num_replicas=replicas, ray_actor_options=resources, max_constructor_retry_count=3,
        # The next batch gathers while one is computed. When replicas end the front has ended: nothing is under way in them.
        # One that has died is known to be dead, and replaced, after the next check.
        max_ongoing_requests=2 * max_batch, graceful_shutdown_wait_loop_s=0.1, health_check_period_s=1,
    )  # fmt: skip
    name = f"smolvla_fast-{uuid.uuid4().hex[:8]}"
    bound = deployment.bind(path, "cuda" if gpus else "cpu", max_batch, wait_s, *how)
    serve.start(proxy_location="Disabled")  # clients speak to our own front
    try:
        try:
            handle = serve.run(bound, name=name, route_prefix=None)
        except RuntimeError as error:
            raise CannotDeploy(f"no replica has started, for the reason above: {error}") from error
        yield handle
    finally:
        with suppress(Exception):  # Ray may be gone
            serve.delete(name)
