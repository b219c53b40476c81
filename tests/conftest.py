"""What the whole suite shares: who runs Triton's kernels where there is no GPU, and packages built once a run."""

import atexit
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from support import triton_by

triton_by.prepare()  # before anything imports Triton
gc.disable()  # until all is imported

# Plans that were measured on this machine decide who computes what; tests have none but their own.
os.environ["SMOLVLA_FAST_CACHE_DIR"] = str(Path(__file__).parent / "no-cache")

# What `datasets` and LeRobot keep of the tests' own data goes with the run; a home may be read-only. Workers have the same.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="smolvla-tests-hf-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Several processes of a run share the processor; threads of OpenMP that wait for one another would stop them all.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = pytest.mark.skip(reason="no CUDA GPU here")
LONG = pytest.mark.skip(reason="minutes on a small machine: make test-full")


@pytest.fixture(scope="session", autouse=True)
def _triton_kernels_run():
    with triton_by.running():
        yield


@pytest.fixture(scope="session", autouse=True)
def _configurations_have_short_names():
    """transformers writes whole configurations out, slowly, for messages that nobody gets."""
    base = getattr(sys.modules.get("transformers"), "PreTrainedConfig", None)
    with pytest.MonkeyPatch.context() as patched:
        if base is not None:
            patched.setattr(base, "__repr__", object.__repr__)
        yield


# Tests that share what one process holds: a Ray, or a build that takes minutes. Any other file is a group of its own.
TOGETHER = {
    "tests/fleet/": "fleet",
    "tests/simt/": "simt",
    "tests/ops/test_image_prep.py": "simt",
    "tests/ops/test_masked_attention.py": "simt",
    "tests/ops/test_euler_step.py": "simt",
    "tests/installation/test_extension.py": "installed",
    "tests/installation/test_packaging.py": "installed",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where the suite runs in several processes (pytest -n), a group stays in one of them.

    Not by xdist's own marks of groups: from pytest 9.2 on it does not read them.
    """
    from xdist.scheduler import LoadFileScheduling

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            if file.startswith("tests/compiled_kernels/"):  # minutes for each architecture
                file += next((cc for cc in ("sm_80", "sm_90") if cc in nodeid), "")
            return next((group for start, group in TOGETHER.items() if file.startswith(start)), file)

    return LoadGroups(config, log)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(NO_GPU)
        if item.get_closest_marker("long") and not os.environ.get("SMOLVLA_FAST_LONG"):
            item.add_marker(LONG)


def pytest_collection_finish():
    """Torch, transformers and LeRobot are millions of objects that stay: no collection of a test looks through them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_log_handlers_left():
    """LeRobot's commands, run inside a process, set up logging for its whole life, on a stream that a test then closes."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in before and not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    """accelerate keeps the first Accelerator's settings for the life of a process, and refuses others after it."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def _run(*command, cwd, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture
def level(request):
    """The instruction level that a test parametrised with one of ``processors``' lists runs the CPU kernels at."""
    from support.processors import at_level

    with at_level(request.param):
        yield request.param


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory):
    """The sdist of this checkout, made from a copy and unpacked: what an installation has to work with.

    Beside it lie the objects that this checkout was compiled into, if it was: ninja compiles what differs from them.
    """
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("source")
    generated = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.json"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=generated)
    hook = "from setuptools import build_meta; build_meta.build_sdist('..')"
    _run(sys.executable, "-c", hook, cwd=folder / "checkout")
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder, filter="data")
    tree = next(path for path in folder.glob("smolvla_fast-*") if path.is_dir())
    objects = Path("build", "ninja")
    if (ROOT / objects).is_dir():
        shutil.copytree(ROOT / objects, tree / objects)
    return tree


@pytest.fixture(scope="session")
def installed(source_tree, tmp_path_factory):
    """A folder with the package as pip installs it; in `make test-full` with CUDA, for the target that this checkout has."""
    from smolvla_fast.ops import extension

    if "PYTEST_XDIST_WORKER" in os.environ:
        # Processes' folders lie side by side; a second process that builds the package, against TOGETHER, fails here.
        (tmp_path_factory.getbasetemp().parent / "installed_once").mkdir()
    with_cuda = os.environ.get("SMOLVLA_FAST_LONG") and "90a" in extension.build_record().get("cuda", {}).get(
        "archs", ()
    )
    target = tmp_path_factory.mktemp("installed")
    return _install(source_tree, target, SMOLVLA_CUDA_ARCHS="90a" if with_cuda else "none")


@pytest.fixture(scope="session")
def install_again(source_tree, installed, tmp_path_factory):
    """install_again(**environment) -> the same under another environment; compiles only what that changes."""

    def into(**environment):
        work = tmp_path_factory.mktemp("again")
        shutil.copytree(source_tree, work / "source")
        return _install(work / "source", work / "site", **environment)

    return into


def _install(source, target, **environment):
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation")
    _run(*pip, "--target", target, source, cwd=source.parent, **environment)
    return target


@pytest.fixture(scope="session")
def python():
    """python(code, path=[...]) -> what a fresh interpreter prints, run outside the checkout."""

    def run(code, path=(), cwd=ROOT.parent):
        return _run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, path))).strip()

    return run
