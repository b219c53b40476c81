"""image_prep in CUDA C++ on the host emulator against LeRobot's calls: F.interpolate, F.pad and 2x - 1."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.contract import check, inputs_in
from support.guarded import guarded
from torch import Tensor

from smolvla_fast.ops.cuda import image_prep as module
from smolvla_fast.ops.cuda import library
from smolvla_fast.ops.reference.image_prep import CASES
from smolvla_fast.ops.reference.image_prep import image_prep as reference
from smolvla_fast.ops.select import reference_ops

EPS = torch.finfo(torch.float32).eps
FLOATS = pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
# The three real sizes are 512 x 512: many threads that do the same.
SMALL = [case for case in CASES if case["height"] * case["width"] < 10_000]
# Each side rounds two products and a sum of values up to 1 in either direction: (1/2 + 1/4)·2⁻²³ twice, at most. The
# difference of two such sides is thus at most 3·2⁻²³; the result is twice that, and a quarter more for the subtraction
# on each side. Positions and weights have equal bits: an error of one unit in those would be up to 512 times as much.
BOUND = 6.5 * EPS

image_prep = guarded(module.image_prep)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype and got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    # In 16 bits both sides round values within BOUND of each other: at most to neighbours.
    allowed = BOUND if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    print(f"worst difference {error / EPS:.2f} of 2⁻²³")
    assert error <= allowed, f"{error / EPS:.2f} of 2⁻²³, allowed {allowed / EPS:.2f}"


@FLOATS
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_contract(case: dict[str, int], dtype: torch.dtype, scheduler_seed: int) -> None:
    check(reference_ops(), SimpleNamespace(image_prep=image_prep), "image_prep", case, dtype)
    inputs, _ = inputs_in("image_prep", case, dtype, seed=1)
    close(image_prep(**inputs), reference(**inputs), dtype)


def test_bits_do_not_depend_on_the_order_of_threads(over_seeds) -> None:
    frames = random_bytes(2, 33, 47, 3)
    first, *others = over_seeds(lambda: image_prep(frames, 41, 140, torch.bfloat16))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("frame", [(100, 37), (37, 100), (7, 7), (1, 64), (129, 65)], ids=str)
@pytest.mark.parametrize("size", [(40, 64), (45, 79)], ids=str)
def test_odd_sizes(frame: tuple[int, int], size: tuple[int, int], emulator) -> None:
    """Up and down, wide and high; rows of 79 columns are written one by one."""
    frames = random(2, 3, *frame, seed=1)
    close(image_prep(frames, *size, torch.float32), reference(frames, *size, torch.float32), torch.float32)


def test_several_blocks_a_row(emulator) -> None:
    """A camera's width, 512 columns of the result: four blocks of 128."""
    frames = random_bytes(1, 8, 640, 3)
    got, want = (f(frames, 8, 512, torch.float32) for f in (image_prep, reference))
    close(got, want, torch.float32)
    assert (got[:, :, :2] == -1).all() and not (got[:, :, 2] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in SMALL], ids=str)
def test_real_sizes(case: dict[str, int], emulator) -> None:
    inputs, _ = inputs_in("image_prep", {**case, "B": 1}, torch.bfloat16, seed=2)
    close(image_prep(**inputs), reference(**inputs), torch.bfloat16)


def test_every_byte_has_the_bits_of_a_division(emulator) -> None:
    """256 bytes at their own size, where blending changes nothing; the kernel divides by a reciprocal and mends it."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    want = (every.float() / 255) * 2 - 1
    assert torch.equal(image_prep(every, 16, 16, torch.float32), want)


@FLOATS
def test_a_frame_of_the_right_size_keeps_its_bits(dtype: torch.dtype, emulator) -> None:
    frames = random(2, 3, 40, 24).to(dtype)
    assert torch.equal(image_prep(frames, 40, 24, torch.float32), frames.float() * 2 - 1)


def test_padding_is_left_and_top_and_black(emulator) -> None:
    high, wide = (torch.ones(1, 3, *size) for size in ((40, 10), (10, 40)))
    got = image_prep(high, 40, 40, torch.float32)
    assert (got[..., :30] == -1).all() and (got[..., 30:] == 1).all()
    got = image_prep(wide, 40, 40, torch.float32)
    assert (got[:, :, :30] == -1).all() and (got[:, :, 30:] == 1).all()


def test_layouts_agree(emulator) -> None:
    """Bytes in either order; floats as LeRobot hands them over, planes in name, pixel by pixel in memory; any strides."""
    frames = random_bytes(2, 20, 30, 3, seed=3)
    got = image_prep(frames, 48, 48, torch.float32)
    planes = frames.permute(0, 3, 1, 2)
    floats = planes.float() / 255
    assert floats.stride(1) == 1
    spread = torch.full((2, 3, 40, 63), torch.nan)[:, :, ::2, 1::2][..., :30]
    spread.copy_(floats)
    for same in (planes, planes.contiguous(), floats, floats.contiguous(), spread):
        assert torch.equal(image_prep(same, 48, 48, torch.float32), got)


def test_one_frame_for_a_batch_is_not_copied(emulator) -> None:
    frame = random(1, 3, 9, 12)
    got = image_prep(frame.expand(3, -1, -1, -1), 16, 16, torch.float32)
    assert torch.equal(got, image_prep(frame, 16, 16, torch.float32).expand(3, -1, -1, -1))


def test_images_and_colours_are_kept_apart(emulator) -> None:
    frames = random(2, 3, 20, 30, seed=4)
    want = image_prep(frames, 48, 48, torch.float32)
    frames[1, 2] = torch.nan
    got = image_prep(frames, 48, 48, torch.float32)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1, :2], want[1, :2])
    assert got[1, 2, 16:].isnan().all() and (got[1, 2, :16] == -1).all()


def test_a_result_beside_an_alignment_is_written_one_by_one(
    emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = random(1, 3, 9, 12)
    want = module.image_prep(frames, 16, 16, torch.bfloat16)
    whole = torch.full((3 * 256 + 2,), torch.nan, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: whole[1:-1].view(*shape))
    got = module.image_prep(frames, 16, 16, torch.bfloat16)
    assert got.data_ptr() % 4 == 2
    assert torch.equal(got, want) and whole[0].isnan() and whole[-1].isnan()


def test_what_it_cannot_do_is_named(emulator) -> None:
    refused = module.image_prep
    with pytest.raises(ValueError, match="frames are torch.int64.*accepted are uint8, float32, bfloat16"):
        refused(torch.zeros(1, 3, 4, 4, dtype=torch.int64), 8, 8, torch.float32)
    with pytest.raises(ValueError, match="the result torch.float64"):
        refused(torch.zeros(1, 3, 4, 4), 8, 8, torch.float64)
    with pytest.raises(ValueError, match=r"shape \[1, 4, 4, 3\]; accepted is \[B, 3, h, w\], for uint8 also"):
        refused(torch.zeros(1, 4, 4, 3), 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"shape \[4, 4, 4, 4\]"):
        refused(torch.zeros(4, 4, 4, 4, dtype=torch.uint8), 8, 8, torch.float32)
    for frame, size in (((1, 900), (8, 8)), ((4, 4), (0, 8)), ((0, 0), (8, 8)), ((0, 4), (8, 8))):
        with pytest.raises(
            ValueError, match=f"{frame[0]}x{frame[1]} has no pixel left at {size[0]}x{size[1]}"
        ):
            refused(torch.zeros(1, 3, *frame), *size, torch.float32)
    many = torch.zeros(1, 3, 1, 1).expand(65536, -1, -1, -1)
    with pytest.raises(ValueError, match="65536 images; at most 65535"):
        refused(many, 1, 1, torch.float32)
    assert refused(torch.zeros(0, 3, 4, 4), 8, 8, torch.float16).shape == (0, 3, 8, 8)


def test_without_an_emulator_it_wants_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="run on an NVIDIA GPU, the tensors are on cpu"):
        module.image_prep(torch.zeros(1, 3, 4, 4), 8, 8, torch.float32)
