"""The compiled image_prep against LeRobot's calls: F.interpolate, F.pad and 2x - 1, at every instruction level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import guarded
from support.processors import LEVELS
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.cpu import ops as compiled
from smolvla_fast.ops.cpu.image_prep import image_prep as unguarded
from smolvla_fast.ops.reference.image_prep import CASES, make_inputs
from smolvla_fast.ops.reference.image_prep import image_prep as reference

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
AT_LEVELS = pytest.mark.parametrize("level", LEVELS, indirect=True)
F32, BF16, EPS = torch.float32, torch.bfloat16, torch.finfo(torch.float32).eps
# Each side rounds two products and a sum of values up to 1 in either direction: (1/2 + 1/4)·2⁻²³ twice, at most. The
# difference of two such sides is thus at most 3·2⁻²³; the result is twice that, and a quarter more for the subtraction
# on each side. Positions and weights have equal bits: an error of one unit in those would be up to 512 times as much.
BOUND = 6.5 * EPS


@pytest.fixture
def image_prep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """With its result between guards of NaN, and NaN where nothing is written."""
    monkeypatch.setattr(guarded, "DEVICE", "cpu")
    return guarded.guarded(unguarded)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, dtype: torch.dtype, truth: Tensor | None = None) -> None:
    assert got.dtype is dtype and got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    # In 16 bits both sides round values within BOUND of each other: at most to neighbours.
    allowed = BOUND if dtype is F32 else torch.finfo(dtype).eps / 2
    if error > allowed and truth is not None:
        # torch's code for processors without AVX2 rounds positions otherwise: then each side is held to the truth.
        error = (got.double() - truth).abs().max().item()
        allowed += 2 * (want.double() - truth).abs().max().item()
    assert error <= allowed, f"{error / EPS:.2f} of 2⁻²³, allowed {allowed / EPS:.2f}"


def in_fp64(frames: Tensor, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    if frames.dtype is torch.uint8:  # channels last
        frames = frames.permute(0, 3, 1, 2) / torch.tensor(255.0, dtype=torch.float64)
    return reference(frames.double(), height, width, torch.float64)


@AT_LEVELS
@pytest.mark.parametrize(
    ("case", "dtype"),
    # The real sizes in one dtype: they take the reference most of a second.
    [(case, dtype) for case in CASES for dtype in (F32, BF16) if dtype is F32 or case["height"] < 100],
    ids=str,
)
def test_against_the_reference(
    case: dict[str, int], dtype: torch.dtype, level: str, image_prep: Callable[..., Tensor]
) -> None:
    inputs = make_inputs(case, dtype, torch.Generator().manual_seed(1))
    close(image_prep(**inputs), reference(**inputs), dtype, in_fp64(**inputs))


@AT_LEVELS
@pytest.mark.parametrize("frame", [(100, 37), (37, 100), (7, 7), (1, 64), (129, 65), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [(40, 64), (45, 79)], ids=str)
def test_odd_sizes(
    frame: tuple[int, int], size: tuple[int, int], level: str, image_prep: Callable[..., Tensor]
) -> None:
    frames = random(2, 3, *frame, seed=1)
    close(image_prep(frames, *size, F32), reference(frames, *size, F32), F32, in_fp64(frames, *size))
    frames = random_bytes(2, *frame, 3, seed=1)
    close(image_prep(frames, *size, F32), reference(frames, *size, F32), F32, in_fp64(frames, *size))


@AT_LEVELS
def test_every_byte_has_the_bits_of_a_division(level: str, image_prep: Callable[..., Tensor]) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(image_prep(every, 16, 16, F32), (every.float() / 255) * 2 - 1)


def test_levels_and_threads_give_equal_bits() -> None:
    before, results = torch.get_num_threads(), []
    for frames in (random_bytes(2, 96, 128, 3), random(1, 3, 96, 128)):
        results.clear()
        for level in cpu.instruction_levels():
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                try:
                    with cpu.instruction_level(level):
                        results.append(unguarded(frames, 150, 170, F32))
                finally:
                    torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


def test_padding_is_left_and_top_and_black(image_prep: Callable[..., Tensor]) -> None:
    high, wide = (torch.ones(1, 3, *size) for size in ((40, 10), (10, 40)))
    got = image_prep(high, 40, 40, F32)
    assert (got[..., :30] == -1).all() and (got[..., 30:] == 1).all()
    got = image_prep(wide, 40, 40, F32)
    assert (got[:, :, :30] == -1).all() and (got[:, :, 30:] == 1).all()


def test_layouts_agree(image_prep: Callable[..., Tensor]) -> None:
    """Bytes in either order; floats as LeRobot hands them over, planes in name, pixel by pixel in memory; any strides."""
    frames = random_bytes(2, 20, 30, 3, seed=3)
    got = image_prep(frames, 48, 48, F32)
    planes = frames.permute(0, 3, 1, 2)
    floats = planes.float() / 255
    assert floats.stride(1) == 1
    spread = torch.full((2, 3, 40, 63), torch.nan)[:, :, ::2, 1::2][..., :30]
    spread.copy_(floats)
    inner = torch.full((2, 3, 24, 34), torch.nan)[:, :, 2:22, 2:32]
    inner.copy_(floats)
    turned = frames.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # pixel by pixel, column by column
    for same in (planes, planes.contiguous(), floats, floats.contiguous(), spread, inner, turned):
        assert torch.equal(image_prep(same, 48, 48, F32), got)
    one = random(1, 3, 9, 12)
    got = image_prep(one.expand(3, -1, -1, -1), 16, 16, F32)
    assert torch.equal(got, image_prep(one, 16, 16, F32).expand(3, -1, -1, -1))


@AT_LEVELS
@pytest.mark.parametrize("size", [(48, 48), (20, 30), (20, 48)], ids=str)
def test_nan_and_infinity_as_the_reference(
    size: tuple[int, int], level: str, image_prep: Callable[..., Tensor]
) -> None:
    """Also where a weight is zero, as it is where a frame is only padded; one of the right size is not blended."""
    frames = random(2, 3, 20, 30, seed=4)
    frames[1, 2, 5, 7], frames[0, 1, 19, 29], frames[0, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    frames[1, 0] = 1e-41
    got, want = image_prep(frames, *size, F32), reference(frames, *size, F32)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    assert torch.equal(got.isinf(), want.isinf())
    close(*(x.nan_to_num(0, 0, 0) for x in (got, want)), F32)


def test_what_it_leaves_to_torch() -> None:
    """Other floats, results in fp64, and a batch of no frames: the reference's own results and errors."""
    for frames in (random(1, 3, 9, 12).double(), random(1, 3, 9, 12).half()):
        assert torch.equal(compiled.image_prep(frames, 16, 16, F32), reference(frames, 16, 16, F32))
    pixels = random_bytes(1, 9, 12, 3)
    got = compiled.image_prep(pixels, 16, 16, torch.float64)
    assert got.dtype is torch.float64 and torch.equal(got, reference(pixels, 16, 16, torch.float64))
    none = torch.zeros(0, 3, 16, 16)
    assert torch.equal(compiled.image_prep(none, 16, 16, F32), reference(none, 16, 16, F32))


def test_what_it_cannot_do_is_named() -> None:
    with pytest.raises(TypeError, match="frames have dtype torch.int64.*accepted are torch.uint8 and"):
        unguarded(torch.zeros(1, 3, 4, 4, dtype=torch.int64), 8, 8, F32)
    with pytest.raises(TypeError, match="the result torch.float64"):
        unguarded(torch.zeros(1, 3, 4, 4), 8, 8, torch.float64)
    with pytest.raises(ValueError, match=r"shape \[1, 4, 4, 3\]; accepted is \[B, 3, h, w\], for uint8 also"):
        unguarded(torch.zeros(1, 4, 4, 3), 8, 8, F32)
    with pytest.raises(ValueError, match=r"shape \[4, 4, 4, 4\]"):
        unguarded(torch.zeros(4, 4, 4, 4, dtype=torch.uint8), 8, 8, F32)
    for frame, size in (((1, 900), (8, 8)), ((4, 4), (0, 8)), ((0, 0), (8, 8)), ((0, 4), (8, 8))):
        with pytest.raises(
            ValueError, match=f"{frame[0]}x{frame[1]} has no pixel left at {size[0]}x{size[1]}"
        ):
            unguarded(torch.zeros(1, 3, *frame), *size, F32)
    with pytest.raises(ValueError, match="frames is on meta"):
        unguarded(torch.zeros(1, 3, 4, 4, device="meta"), 8, 8, F32)
    assert unguarded(torch.zeros(0, 3, 4, 4), 8, 8, F32).shape == (0, 3, 8, 8)
