"""`make gpu-bring`: all that a machine with a GPU and no network is brought beside the tree, built here, with its size.

LeRobot's wheels; ``_cuda`` for one architecture; Triton's cache of every kernel of a full-size chunk; the program that times
barriers; the predictions. Each stands alone: what cannot be built is said, and costs a contact time or that figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import ROOT

WHEELS = ROOT / ".whl"
REQUIREMENTS = ROOT / "benchmarks" / "gpu_run" / "requirements.txt"
BROUGHT = ROOT / "build" / "gpu"
CACHE = BROUGHT / "triton"
ARCH, CAPABILITY = "90a", 90


def compiled_kernels(cache: Path = CACHE) -> int:
    """Kernels in a folder that Triton caches in."""
    return len(list(cache.glob("*/*.cubin")))


def use_cache(environment: dict[str, str], cache: Path = CACHE) -> None:
    """Has processes with this environment cache there, and find what was brought.

    The key of a kernel is its content, but the index beside it names files with the folder in which they were made.
    """
    for index in cache.glob("*/__grp__*.json"):
        paths = json.loads(index.read_text())["child_paths"]
        here = {name: str(index.with_name(name)) for name in paths}
        if here != paths:
            index.write_text(json.dumps({"child_paths": here}))
    environment["TRITON_CACHE_DIR"] = str(cache)


def wheels() -> Path:
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(WHEELS),
        "-r",
        str(REQUIREMENTS),
    )
    subprocess.run(pip, cwd=ROOT, check=True)
    return WHEELS


def extension() -> Path:
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--only", "cuda")
    subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "SMOLVLA_CUDA_ARCHS": ARCH})
    return next((ROOT / "smolvla_fast").glob("_cuda*.so"))


def kernels(size: str = "full", cache: Path = CACHE) -> Path:
    """Every launch of a chunk with two cameras in bf16, and those of the constants, compiled and not run.

    Needs a process of its own, for kernels are made for a compiler or for the interpreter when they are imported.
    """
    shutil.rmtree(cache, ignore_errors=True)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    import torch

    import smolvla_fast
    import smolvla_fast.ops.triton.ops
    from benchmarks.compiled.aot import compiling
    from benchmarks.gpu_run import constants
    from smolvla_fast.engine.side_stream import offered
    from smolvla_fast.kernels.launch_order import dependent_launches
    from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are imported; now a CPU may be asked
    policy = make_policy(size, origin="ours", cameras=3, layout="mixed", num_steps=1)
    smolvla_fast.patch(policy, precision="bf16", backend="triton")
    # As it is captured too: a launch behind an event is compiled without programmatic dependent launch, and so are all where
    # that is measured against.
    side: Any = SimpleNamespace(beside=lambda *read: nullcontext(), join=lambda: None)
    with compiling(CAPABILITY) as launched:
        for each, early in ((None, True), (side, True), (None, False)):
            with offered(each), dependent_launches(early):
                policy.predict_action_chunk(make_observation(policy, cameras=2), noise=make_noise(policy))
        served = len(launched)
        constants.rates(torch.device("cpu"))
        for dependent in (False, True):
            constants.launch_gaps(torch.device("cpu"), dependent)
    if not served:
        raise RuntimeError(f"no kernel was launched: {smolvla_fast.status(policy).last_fallback}")
    return cache


def barriers() -> Path:
    from benchmarks.gpu_run.constants import BARRIERS, compile_barriers

    compile_barriers(f"sm_{ARCH}", BARRIERS)
    return BARRIERS


def predictions() -> Path:
    from benchmarks.gpu_run.predictions import PREDICTIONS, predict

    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no launch to note
    found = predict()
    PREDICTIONS.parent.mkdir(parents=True, exist_ok=True)
    PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n")
    return PREDICTIONS


THINGS: dict[str, Callable[[], Path]] = {
    each.__name__: each for each in (wheels, extension, kernels, barriers, predictions)
}


def size_of(path: Path) -> float:
    """MiB of a file or folder."""
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file()) / 2**20


def bring(names: Sequence[str]) -> int:
    """Builds each in a process of its own and says its size. Returns the exit status: 1 where one is missing."""
    missing = []
    for name in names:
        start = time.perf_counter()
        command = (sys.executable, "-m", "benchmarks.gpu_run.bring", name)
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        took = f"{time.perf_counter() - start:.0f} s"
        if done.returncode:
            missing.append(name)
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            print(f"{name}: not built, {took}: {said}", flush=True)
            continue
        path = Path(done.stdout.strip().splitlines()[-1])
        print(f"{name}: {path.relative_to(ROOT)}, {size_of(path):.1f} MiB, {took}", flush=True)
    print(
        "A machine without these needs no network for the rest: the tree itself, torch, Triton, pytest and nvcc."
    )
    return 1 if missing else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gpu_run.bring", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=THINGS)
    print(THINGS[parser.parse_args().name]())
