"""What Ray Serve costs a fleet's call: ms of a deployment that computes nothing, by what it is sent and how.

    python -m benchmarks.ray_call [--calls 200]

The arrays are an observation's as a fleet sends it: a state and two frames of 3 x 256 x 256 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import numpy as np
from ray import serve

from smolvla_fast.fleet.cluster import connected


@serve.deployment(max_ongoing_requests=16)
class Nothing:
    async def plain(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        return np.zeros((50, 6), np.float32)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def batched(self, arrays: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [np.zeros((50, 6), np.float32) for _ in arrays]


async def measure(calls: int) -> None:
    handle = serve.run(Nothing.bind(), name="nothing", route_prefix=None)
    state = {"state": np.zeros((1, 6), np.float32)}
    frames = {f"camera{i}": np.zeros((3, 256, 256), np.uint8) for i in (1, 2)}
    cases = {
        "a state": (handle.plain, state),
        "a state and two frames": (handle.plain, {**state, **frames}),
        "the same, through a batch of one": (handle.batched, {**state, **frames}),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(calls):  # in turn, so that all see the same machine
        for name, (call, arrays) in cases.items():
            began = time.perf_counter()
            await call.remote(arrays)
            found[name].append(1000 * (time.perf_counter() - began))
    print("| one call with | fastest ms | median ms | p99 ms |\n| --- | --- | --- | --- |")
    for name, times in found.items():
        print(
            f"| {name} | " + " | ".join(f"{np.percentile(times, share):.1f}" for share in (0, 50, 99)) + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=200)
    args = parser.parse_args()
    with connected():
        serve.start(proxy_location="Disabled")
        asyncio.run(measure(args.calls))


if __name__ == "__main__":
    main()
