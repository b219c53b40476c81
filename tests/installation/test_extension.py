"""The compiled extensions: dispatch by instruction set, checks at the door, and why one is missing."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.backends import at_every_level
from support.processors import at_level

from smolvla_fast.ops import extension, processor
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.cpu.rope import rope

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kernels():
    try:
        return extension.load("cpu")
    except extension.ExtensionUnavailable as error:
        if shutil.which("c++") or shutil.which("g++"):
            raise  # where there is a compiler, a missing extension is a failure
        pytest.skip(str(error))


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def sample(rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, width), (width,)))


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(101, 960), *((9, width) for width in (1, 15, 16, 17, 33, 720))])
def test_every_level_and_number_of_threads_gives_the_same_bits(kernels, dtype, rows, width):
    x, weight = sample(rows, width, dtype)
    first, *others = at_every_level(lambda: (kernels.level(), cpu.rms_norm(x, weight, 1e-5)), (1, 2, 3, 7))
    assert {level for level, _ in (first, *others)} == set(kernels.levels()) and first[1].isfinite().all()
    assert all(torch.equal(bits(result), bits(first[1])) for _, result in others)


OBJDUMP = shutil.which("objdump")


@pytest.mark.cpu_kernels
@pytest.mark.skipif(OBJDUMP is None, reason="no objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it looks for x86-64's instructions")
def test_activations_are_computed_in_vectors(kernels):
    """Of integers they are plain loops: where the compiler leaves one in scalars, it takes ten times as long."""
    text = subprocess.run(
        [OBJDUMP, "-dC", kernels.__file__], text=True, capture_output=True, check=True
    ).stdout
    found = {}
    for body in re.split(r"\n\n(?=[0-9a-f]+ <)", text):
        name = re.match(
            r"[0-9a-f]+ <void smolvla::cpu::.*?(\w+(?:::\w+)?)<\(smolvla::cpu::Activation\)([12])>", body
        )
        if name and name[1].endswith(("pass_baseline", "pass_avx2", "pass_avx512", "activate_row")):
            found[name[1], name[2]] = bool(re.search(r"\tv?divps ", body))
    assert {name.rpartition("::")[2] for name, _ in found} == {
        "pass_baseline",
        "pass_avx2",
        "pass_avx512",
        "activate_row",
    }
    assert all(found.values()), found


@pytest.mark.cpu_kernels
@pytest.mark.processor
def test_the_best_level_is_used_and_a_forced_one_is_given_back(kernels):
    assert kernels.level() == kernels.levels()[-1]
    if processor.is_known():
        assert ("avx2" in kernels.levels()) == ({"AVX2", "FMA"} <= set(processor.features()))
    with pytest.raises(ValueError, match="no instruction level avx1024 on this processor"):
        kernels.set_level("avx1024")
    with pytest.raises(ZeroDivisionError), at_level("baseline"):
        raise ZeroDivisionError
    assert kernels.level() == kernels.levels()[-1]


@pytest.mark.cpu_kernels
def test_every_bfloat16_is_read_and_rounded_as_torch_does(kernels):
    # All 65 536 values, each added to itself, its like and its unlike: subnormals, ties, infinities, NaNs. Rotation with a
    # sine and a cosine of 1 is such a sum, and a difference.
    every = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    )
    ones = torch.ones(1, 256, 1, 256)
    for other in (every, every.flip(0), every.flip(1), every * 2**-8, every * 0.5):
        wide = every.float(), other.float()
        expected = torch.cat([wide[0] - wide[1], wide[1] + wide[0]], dim=1).to(torch.bfloat16)
        for level in kernels.levels():
            with at_level(level):
                turned = rope(torch.cat([every, other], dim=1).view(1, 256, 1, 512), ones, ones).view(
                    256, 512
                )
            # A NaN has many patterns; which one comes out is nobody's business.
            same = (bits(turned) == bits(expected)) | (turned.isnan() & expected.isnan())
            assert same.all(), level


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_there_is_one_openmp_runtime_in_the_process(kernels):
    if not kernels.openmp_library():
        pytest.skip("this build has no OpenMP: the compiler lacks it")
    maps = Path("/proc/self/maps").read_text()
    loaded = {word for word in maps.split() if "libgomp" in word or "libomp" in word or "libiomp" in word}
    assert len(loaded) == 1, f"two thread pools compete for the cores: {sorted(loaded)}"


@pytest.mark.cpu_kernels
def test_wrong_arguments_are_named(kernels):
    x, weight = sample(4, 8, torch.float32)

    def call(x=x, weight=weight, **kwargs):
        return cpu.rms_norm(x, weight, 1e-5, **kwargs)

    with pytest.raises(
        TypeError, match=r"x has dtype torch.float64; accepted are torch.float32, torch.bfloat16"
    ):
        call(x.double())
    with pytest.raises(TypeError, match=r"weight has dtype torch.bfloat16, x has torch.float32"):
        call(weight=weight.bfloat16())
    with pytest.raises(ValueError, match=r"weight has shape \[8, 1\]; accepted is \[8\]"):
        call(weight=weight[:, None])
    with pytest.raises(ValueError, match="x is not contiguous"):
        call(torch.empty(8, 4).t())
    with pytest.raises(ValueError, match="no dimensions"):
        call(torch.tensor(1.0))
    with pytest.raises(ValueError, match="weight is on meta; this kernel takes CPU tensors"):
        call(weight=weight.to("meta"))
    with pytest.raises(RuntimeError, match=r"weight wants a gradient.*torch.no_grad"):
        call(weight=weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="out has shape"):
        call(out=torch.empty(4, 9))
    whole = torch.zeros(6, 8)
    for x, out in ((whole[:4], whole[:4]), (whole[:4], whole[2:])):
        with pytest.raises(ValueError, match="out overlaps another tensor"):
            call(x, out=out)
    with torch.no_grad():
        call(weight=weight.clone().requires_grad_())


def missing(monkeypatch, tmp_path, record):
    """extension.why_missing("cuda") as if the installation had recorded this."""
    path = tmp_path / "_build.json"
    if record is not None:
        path.write_text(json.dumps(record))
    monkeypatch.setattr(extension, "_RECORD", path)
    monkeypatch.setitem(sys.modules, "smolvla_fast._cuda", None)  # makes an import of it fail
    extension.build_record.cache_clear()
    extension._load.cache_clear()
    try:
        assert not extension.available("cuda")
        with pytest.raises(extension.ExtensionUnavailable):
            extension.load("cuda")
        return extension.why_missing("cuda")
    finally:
        monkeypatch.undo()
        extension.build_record.cache_clear()
        extension._load.cache_clear()


def test_a_missing_extension_says_why(monkeypatch, tmp_path):
    failed = missing(monkeypatch, tmp_path, {"cuda": {"built": False, "reason": "no nvcc on PATH"}})
    assert failed == "smolvla_fast._cuda was not compiled: no nvcc on PATH"
    broken = missing(monkeypatch, tmp_path, {"cuda": {"built": True}})
    assert broken.startswith("smolvla_fast._cuda was compiled but does not load: ")
    never = missing(monkeypatch, tmp_path / "none", None)
    assert never.startswith("smolvla_fast._cuda was never compiled here; install")
    with pytest.raises(ValueError, match="kind='gpu' is no extension; accepted are 'cpu', 'cuda'"):
        extension.available("gpu")


def has_nvcc():
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


@pytest.mark.long
@pytest.mark.skipif(
    "90a" not in extension.build_record().get("cuda", {}).get("archs", ()),
    reason="this checkout has no CUDA part for sm_90a: SMOLVLA_CUDA_ARCHS=90a make cuda, as CI does, takes a minute",
)
def test_the_cuda_part_compiles_and_loads_without_a_driver(installed, python):
    record = json.loads((installed / "smolvla_fast" / "_build.json").read_text())["cuda"]
    assert record["built"], record["reason"]
    assert record["archs"] == ["90a"]
    code = """
from smolvla_fast.ops import extension
cuda = extension.load("cuda")
print(cuda.runtime_version(), cuda.driver_version(), cuda.device_count())
try:
    cuda.device(99)
except RuntimeError as error:
    print(error)
"""
    versions, error = python(code, [installed]).splitlines()
    runtime, driver, count = map(int, versions.split())
    assert runtime >= 11_000
    assert driver >= 0
    assert count == torch.cuda.device_count()
    assert error.startswith("cuda"), "the error must be CUDA's own words"


@pytest.mark.long
@pytest.mark.skipif(not has_nvcc(), reason="no nvcc here: the CUDA part is not compiled")
def test_an_unknown_architecture_costs_only_the_cuda_part(install_again):
    folder = install_again(SMOLVLA_CUDA_ARCHS="12345")
    record = json.loads((folder / "smolvla_fast" / "_build.json").read_text())
    assert record["cpu"]["built"], record["cpu"]["reason"]
    assert not record["cuda"]["built"]
    assert record["cuda"]["reason"].startswith("SMOLVLA_CUDA_ARCHS='12345' asks for 12345; accepted are ")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", ["80", "90a"]),
        ("90a; 120", ["90a", "120"]),
        ("80,86", ["80", "86"]),
        ("100f", ["100f"]),
        ("9.0", "asks for 9.0; accepted are"),
        ("90;sm_86", "asks for sm_86; accepted are"),
        ("all", "asks for all; accepted are"),
        ("a", "asks for a; accepted are"),
        ("75", "asks for 75; accepted are"),
    ],
)
def test_architectures_asked_for(monkeypatch, given, found):
    """A typo is answered with the variable's name and what it takes; nvcc's own words have neither."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("ninja_build", ROOT / "csrc" / "ninja_build.py")
    ninja_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ninja_build)
    known = "".join(f"compute_{n}\n" for n in (80, 86, 90, 100, 120))
    monkeypatch.setattr(ninja_build, "run", lambda *command: known)
    monkeypatch.setattr(ninja_build, "CUDA_ARCHS", ["80", "87", "90a"])
    monkeypatch.setenv("SMOLVLA_CUDA_ARCHS", given)
    if isinstance(found, list):
        assert ninja_build.cuda_archs("nvcc") == found
    else:
        with pytest.raises(ninja_build.Unavailable, match=found):
            ninja_build.cuda_archs("nvcc")


@pytest.mark.long
@pytest.mark.skipif(not has_nvcc(), reason="no nvcc here: the CUDA part is not compiled")
def test_make_cuda_compiles_in_the_checkout_and_again_only_what_changed(
    source_tree, installed, python, tmp_path
):
    """In a copy of the tree that `installed` was compiled in, for the same architecture: its objects are taken over."""
    tree = tmp_path / "tree"
    shutil.copytree(source_tree, tree)
    (tree / "smolvla_fast" / "_build.json").write_text('{"cpu": {"built": true}}')

    def make(archs):
        command = ["make", "-s", "-f", str(ROOT / "Makefile"), "cuda", f"GPU_PYTHON={sys.executable}"]
        environment = {**os.environ, "SMOLVLA_CUDA_ARCHS": archs}
        return subprocess.run(command, cwd=tree, text=True, capture_output=True, env=environment)

    def record():
        found = json.loads((tree / "smolvla_fast" / "_build.json").read_text())
        assert found["cpu"] == {"built": True}, "the other extension's record is left as it is"
        return found["cuda"]

    refused = make("none")
    assert refused.returncode and "left out, as SMOLVLA_CUDA_ARCHS=none asks" in refused.stderr
    assert not record()["built"] and not list(tree.glob("smolvla_fast/*.so"))
    done = make("90a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Compiled smolvla_fast._cuda for sm_90a and as PTX in " in done.stdout
    assert "It loads here; GPUs found: " in done.stdout
    assert record()["built"] and len(list(tree.glob("smolvla_fast/_cuda*.so"))) == 1
    assert python("import smolvla_fast._cuda as c; print(c.__file__)", [tree]).startswith(str(tree))

    def compiled():
        return {p.name: p.stat().st_mtime_ns for p in tree.glob("build/ninja/*/cuda/*.o")}

    before = compiled()
    (tree / "csrc" / "cuda" / "image_prep.cu").touch()
    assert make("90a").returncode == 0
    assert {name for name, time in compiled().items() if time != before[name]} == {"image_prep.cu.o"}


@pytest.mark.gpu
def test_device_agrees_with_torch():
    device, expected = extension.load("cuda").device(0), torch.cuda.get_device_properties(0)
    assert device["name"] == expected.name
    assert device["compute_capability"] == 10 * expected.major + expected.minor
    assert device["multiprocessors"] == expected.multi_processor_count
    assert device["memory_bytes"] == expected.total_memory
    assert device["code_version"] <= device["compute_capability"], (
        "the GPU runs code made for an older or equal one"
    )
