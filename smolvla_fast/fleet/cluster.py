"""Replicas on Ray: on one of its own, on this machine, or on an existing cluster."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve

from .replica import Replica

OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory for a Ray of its own: observations on their way, a few hundred KB each."""


class CannotDeploy(RuntimeError):
    """Ray has no place for the replicas, or none of them has started."""


@contextmanager
def connected(address: str | None = None, metrics_port: int | None = None) -> Iterator[str]:
    """A cluster's Ray, or where no address is given one that starts and ends here. Yields the URL of its metrics.

    raises  ``CannotDeploy``
    """
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray else reports to its makers
    own: dict[str, Any] = dict(
        include_dashboard=False, object_store_memory=OBJECT_STORE, _metrics_export_port=metrics_port
    )
    try:
        # Not None, which is whatever RAY_ADDRESS says.
        ray.init(address or "local", **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CannotDeploy(f"no Ray at {address or 'this machine'}: {error}") from error
    try:
        node = ray.nodes()[0]
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    finally:
        ray.shutdown()


@contextmanager
def deployed(path: str, replicas: int, max_batch: int, wait_s: float, *how: str | None) -> Iterator[Any]:
    """A deployment of ``Replica``, warm, which ends here. Yields its handle. Arguments as there; raises ``CannotDeploy``.

    Each replica has a GPU, or where there are none its share of the CPUs.
    """
    free, there = ray.available_resources(), ray.cluster_resources()
    gpus, cpus = int(free.get("GPU", 0)), free.get("CPU", 0.0)
    if (replicas > gpus and "GPU" in there) or cpus <= 0:  # else Ray waits for room without end
        raise CannotDeploy(f"{replicas} replicas, and free are {gpus} GPUs (one a replica) and {cpus:g} CPUs")
    share = min(cpus / replicas, max(node["Resources"].get("CPU", 0.0) for node in ray.nodes()))
    resources = {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": int(share) or share}
    deployment: Any = serve.deployment(
        Replica, num_replicas=replicas, ray_actor_options=resources, max_constructor_retry_count=3,
        max_ongoing_requests=2 * max_batch,  # the next batch gathers while one is computed
    )  # fmt: skip
    name = f"smolvla_fast-{uuid.uuid4().hex[:8]}"
    bound = deployment.bind(path, "cuda" if gpus else "cpu", max_batch, wait_s, *how)
    serve.start(proxy_location="Disabled")  # clients speak to our own front
    try:
        try:
            handle = serve.run(bound, name=name, route_prefix=None)
        except RuntimeError as error:
            raise CannotDeploy(f"no replica has started: {error}") from error
        yield handle
    finally:
        with suppress(Exception):  # Ray may be gone
            serve.delete(name)
