"""image_prep of every backend against LeRobot's calls: F.interpolate, F.pad and 2x - 1."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import triton_by
from support.backends import ALL, CPU, CUDA, TRITON, at_every_level, device_of
from support.guarded import guarded
from torch import Tensor

from smolvla_fast.ops.cpu import ops as compiled
from smolvla_fast.ops.reference.image_prep import CASES, make_inputs
from smolvla_fast.ops.reference.image_prep import image_prep as reference

MODULES = {
    "cpu": "smolvla_fast.ops.cpu.image_prep",
    "triton": "smolvla_fast.kernels.image_prep",
    "cuda": "smolvla_fast.ops.cuda.image_prep",
}
F32, F16, BF16, EPS = torch.float32, torch.float16, torch.bfloat16, torch.finfo(torch.float32).eps
# Each side rounds two products and a sum of values up to 1 in either direction: (1/2 + 1/4)·2⁻²³ twice, at most. The
# difference of two such sides is thus at most 3·2⁻²³; the result is twice that, and a quarter more for the subtraction
# on each side. Positions and weights have equal bits: an error of one unit in those would be up to 512 times as much.
BOUND = 6.5 * EPS
FRAMES, ODD = [(100, 37), (37, 100), (7, 7), (1, 64), (129, 65), (1, 1)], [(40, 64), (45, 79)]
ON_A_CPU = pytest.mark.parametrize("backend", CPU, indirect=True)
ON_CUDA = pytest.mark.parametrize("backend", [CUDA], indirect=True)


def launcher(backend: str) -> Any:
    return importlib.import_module(MODULES[backend]).image_prep


@pytest.fixture
def image_prep(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """With its result between guards of NaN, and NaN where nothing is written."""
    if backend == "triton" and triton_by.INTERPRETED:  # few programs: their number is its time
        from smolvla_fast.kernels.tiles import PlainTile

        monkeypatch.setattr(f"{MODULES[backend]}.image_tile", lambda width: PlainTile(128, 512, 4))
    return guarded(launcher(backend), device_of(backend))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, frames: Tensor, height: int, width: int, dtype: torch.dtype) -> None:
    want = reference(frames, height, width, dtype)
    assert got.dtype is dtype and got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    # In 16 bits both sides round values within BOUND of each other: at most to neighbours.
    allowed = BOUND if dtype is F32 else torch.finfo(dtype).eps / 2
    if error > allowed:
        # torch's code for processors without AVX2 rounds positions otherwise: then each side is held to the truth.
        if frames.dtype is torch.uint8:  # channels last
            frames = frames.permute(0, 3, 1, 2) / torch.tensor(255.0, dtype=torch.float64)
        truth = reference(frames.double(), height, width, torch.float64)
        error = (got.double() - truth).abs().max().item()
        allowed += 2 * (want.double() - truth).abs().max().item()
    assert error <= allowed, f"{error / EPS:.2f} of 2⁻²³, allowed {allowed / EPS:.2f}"


def cases() -> Any:
    """The real sizes, 512 x 512, in few dtypes: the reference takes most of a second, the emulator thread by thread."""
    for case in CASES:
        small = case["height"] < 100
        for each in ALL:
            dtypes = {"cpu": (F32, BF16), "triton": (F32, F16, BF16), "cuda": (F32, F16, BF16)}[
                each.values[0][0]
            ]
            real = {"cpu": (F32,), "triton": (F16,), "cuda": (BF16,)}[each.values[0][0]]
            for dtype in dtypes if small else real:
                marks = [*each.marks, *(triton_by.BF16 if each is TRITON and dtype is BF16 else [])]
                marks += triton_by.FP16 if each is TRITON and dtype is F16 and small else []
                marks += [pytest.mark.slow] * (each is CUDA and not small)
                yield pytest.param(*each.values, case, dtype, marks=marks, id=f"{each.id} {case} {dtype}")


@pytest.mark.processor
@pytest.mark.parametrize(("backend", "case", "dtype"), list(cases()), indirect=["backend"])
def test_against_the_reference(
    case: dict[str, int], dtype: torch.dtype, backend: str, image_prep: Any
) -> None:
    case = {**case, "B": 1} if backend == "cuda" and case["height"] > 100 else case
    inputs = make_inputs(case, dtype, torch.Generator().manual_seed(1))
    close(image_prep(**inputs), **inputs)


@pytest.mark.processor
@pytest.mark.parametrize(
    ("frame", "size"),
    [
        pytest.param(frame, size, marks=[pytest.mark.long] * (other is size), id=f"{frame}-{size}")
        for frame, other in zip(FRAMES, itertools.cycle(ODD), strict=False)
        for size in ODD
    ],
)
def test_odd_sizes(frame: tuple[int, int], size: tuple[int, int], backend: str) -> None:
    """Up and down, wide and high; in the kernel's own tiles; rows of 79 columns are written one by one."""
    image_prep = guarded(launcher(backend), device_of(backend))
    close(image_prep(random(2, 3, *frame, seed=1), *size, F32), random(2, 3, *frame, seed=1), *size, F32)
    if backend == "cpu":
        frames = random_bytes(2, *frame, 3, seed=1)
        close(image_prep(frames, *size, F32), frames, *size, F32)


@ON_CUDA
def test_several_blocks_a_row(image_prep: Any) -> None:
    """A camera's width, 512 columns of the result: four blocks of 128."""
    frames = random_bytes(1, 8, 640, 3)
    got = image_prep(frames, 8, 512, F32)
    close(got, frames, 8, 512, F32)
    assert (got[:, :, :2] == -1).all() and not (got[:, :, 2] == -1).all()


@pytest.mark.parametrize("backend", [*CPU, CUDA], indirect=True)
def test_every_byte_has_the_bits_of_a_division(image_prep: Any) -> None:
    """256 bytes at their own size, where blending changes nothing; CUDA's divides by a reciprocal and mends it."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(image_prep(every, 16, 16, F32), (every.float() / 255) * 2 - 1)


def test_a_frame_of_the_right_size_keeps_its_bits(image_prep: Any) -> None:
    frames = random(2, 3, 40, 24)
    assert torch.equal(image_prep(frames, 40, 24, F32), frames * 2 - 1)


def test_levels_and_threads_give_equal_bits() -> None:
    for frames in (random_bytes(2, 96, 128, 3), random(1, 3, 96, 128)):
        first, *others = at_every_level(
            lambda frames=frames: launcher("cpu")(frames, 150, 170, F32), (1, 2, 7)
        )
        assert all(torch.equal(other, first) for other in others)


def test_padding_is_left_and_top_and_black(image_prep: Any) -> None:
    got = image_prep(torch.ones(1, 3, 40, 10), 40, 40, F32)
    assert (got[..., :30] == -1).all() and (got[..., 30:] == 1).all()
    got = image_prep(torch.ones(1, 3, 10, 40), 40, 40, F32)
    assert (got[:, :, :30] == -1).all() and (got[:, :, 30:] == 1).all()


def test_layouts_agree(image_prep: Any) -> None:
    """Bytes in either order; floats as LeRobot hands them over, planes in name, pixel by pixel in memory; any strides."""
    frames = random_bytes(2, 20, 30, 3, seed=3)
    got = image_prep(frames, 48, 48, F32)
    planes = frames.permute(0, 3, 1, 2)
    floats = planes.float() / 255
    assert floats.stride(1) == 1
    spread = torch.full((2, 3, 40, 63), torch.nan)[:, :, ::2, 1::2][..., :30]
    inner = torch.full((2, 3, 24, 34), torch.nan)[:, :, 2:22, 2:32]
    for view in (spread, inner):
        view.copy_(floats)
    turned = frames.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # pixel by pixel, column by column
    for same in (planes, planes.contiguous(), floats, floats.contiguous(), spread, inner, turned):
        assert torch.equal(image_prep(same, 48, 48, F32), got)
    one = random(1, 3, 9, 12)
    got = image_prep(one.expand(3, -1, -1, -1), 16, 16, F32)
    assert torch.equal(got, image_prep(one, 16, 16, F32).expand(3, -1, -1, -1))


def test_images_and_colours_are_kept_apart(image_prep: Any) -> None:
    frames = random(2, 3, 20, 30, seed=4)
    want = image_prep(frames, 48, 48, F32)
    frames[1, 2] = torch.nan
    got = image_prep(frames, 48, 48, F32)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1, :2], want[1, :2])
    assert got[1, 2, 16:].isnan().all() and (got[1, 2, :16] == -1).all()


@ON_A_CPU
@pytest.mark.parametrize("size", [(48, 48), (20, 30), (20, 48)], ids=str)
def test_nan_and_infinity_as_the_reference(size: tuple[int, int], image_prep: Any) -> None:
    """Also where a weight is zero, as it is where a frame is only padded; one of the right size is not blended."""
    frames = random(2, 3, 20, 30, seed=4)
    frames[1, 2, 5, 7], frames[0, 1, 19, 29], frames[0, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    frames[1, 0] = 1e-41
    got, want = image_prep(frames, *size, F32), reference(frames, *size, F32)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert ((got - want)[finite].abs() <= BOUND).all()


@ON_CUDA
def test_a_result_beside_an_alignment_is_written_one_by_one(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, unguarded = random(1, 3, 9, 12), launcher(backend)
    want = unguarded(frames, 16, 16, BF16)
    whole = torch.full((3 * 256 + 2,), torch.nan, dtype=BF16)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: whole[1:-1].view(*shape))
    got = unguarded(frames, 16, 16, BF16)
    assert got.data_ptr() % 4 == 2
    assert torch.equal(got, want) and whole[0].isnan() and whole[-1].isnan()


@pytest.mark.cpu_kernels
def test_what_the_table_leaves_to_torch() -> None:
    """Other floats, results in fp64, and a batch of no frames: the reference's own results and errors."""
    for frames in (random(1, 3, 9, 12).double(), random(1, 3, 9, 12).half(), torch.zeros(0, 3, 16, 16)):
        assert torch.equal(compiled.image_prep(frames, 16, 16, F32), reference(frames, 16, 16, F32))
    pixels = random_bytes(1, 9, 12, 3)
    got = compiled.image_prep(pixels, 16, 16, torch.float64)
    assert got.dtype is torch.float64 and torch.equal(got, reference(pixels, 16, 16, torch.float64))


@pytest.mark.parametrize("backend", [CPU[0], TRITON, CUDA], indirect=True)
def test_what_it_cannot_do_is_named(backend: str) -> None:
    device, refused = device_of(backend), launcher(backend)

    def zeros(*shape: int, **settings: Any) -> Tensor:
        return torch.zeros(*shape, **{"device": device, **settings})

    def check(match: str, frames: Tensor, *size: int, dtype: torch.dtype = F32) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            refused(frames, *size, dtype)

    check("torch.int64.*accepted are .*uint8", zeros(1, 3, 4, 4, dtype=torch.int64), 8, 8)
    check("the result torch.float64", zeros(1, 3, 4, 4), 8, 8, dtype=torch.float64)
    check(r"shape \[1, 4, 4, 3\]; accepted is \[B, 3, h, w\], for uint8 also", zeros(1, 4, 4, 3), 8, 8)
    check(r"shape \[4, 4, 4, 4\]", zeros(4, 4, 4, 4, dtype=torch.uint8), 8, 8)
    nothing = [] if backend == "triton" else [((4, 4), (0, 8)), ((0, 0), (8, 8)), ((0, 4), (8, 8))]
    for (h, w), size in [((1, 900), (8, 8)), *nothing]:
        check(f"{h}x{w} has no pixel left at {size[0]}x{size[1]}", zeros(1, 3, h, w), *size)
    if backend == "cpu":
        check("frames is on meta", zeros(1, 3, 4, 4, device="meta"), 8, 8)
    if backend == "cuda":
        check("65536 images; at most 65535", zeros(1, 3, 1, 1).expand(65536, -1, -1, -1), 1, 1)
    assert refused(zeros(0, 3, 4, 4), 8, 8, F32).shape == (0, 3, 8, 8)


def test_without_an_emulator_cuda_wants_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="run on an NVIDIA GPU, the tensors are on cpu"):
        launcher("cuda")(torch.zeros(1, 3, 4, 4), 8, 8, F32)
