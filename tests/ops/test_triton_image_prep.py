"""image_prep as a Triton kernel against LeRobot's calls: F.interpolate, F.pad and 2x - 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from support.guarded import DEVICE, guarded

from smolvla_fast.kernels import image_prep as image_module
from smolvla_fast.kernels.tuning import PlainTile
from smolvla_fast.ops.reference.image_prep import CASES as IMAGES
from smolvla_fast.ops.reference.image_prep import image_prep as image_reference
from smolvla_fast.ops.reference.image_prep import make_inputs as image_inputs

pytestmark = pytest.mark.triton

INTERPRETED = DEVICE == "cpu"
EPS = torch.finfo(torch.float32).eps
image_prep = guarded(image_module.image_prep)


def sizes(case: dict[str, int]) -> str:
    return "-".join(f"{name}{value}" for name, value in case.items())


# Each side rounds two products and a sum of values up to 1 in either direction: (1/2 + 1/4)·2⁻²³ twice, at most. The
# difference of two such sides is thus at most 3·2⁻²³; the result is twice that, and a quarter more for the subtraction
# on each side. Positions and weights have equal bits: an error of one unit in those would be up to 512 times as much.
IMAGE_BOUND = 6.5 * EPS


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs: under the interpreter their number is the time."""
    if INTERPRETED:
        monkeypatch.setattr(image_module, "image_tile", lambda width: PlainTile(128, 512, 4))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype and got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    # In 16 bits both sides round values within IMAGE_BOUND of each other: at most to neighbours.
    allowed = IMAGE_BOUND if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    print(f"worst difference {error / EPS:.2f} of 2⁻²³")
    assert error <= allowed, f"{error / EPS:.2f} of 2⁻²³, allowed {allowed / EPS:.2f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", IMAGES, ids=sizes)
def test_image_prep(case: dict[str, int], dtype: torch.dtype, large_tiles: None) -> None:
    values = image_inputs(case, dtype, torch.Generator().manual_seed(0))
    close(image_prep(**values), image_reference(**values), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", IMAGES, ids=sizes)
def test_image_prep_in_bf16(case: dict[str, int]) -> None:
    values = image_inputs(case, torch.bfloat16, torch.Generator().manual_seed(0))
    close(image_prep(**values), image_reference(**values), torch.bfloat16)


@pytest.mark.parametrize("frame", [(100, 37), (37, 100), (7, 7), (1, 64), (129, 65)], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (45, 80)], ids=str)
def test_image_prep_of_odd_sizes(frame: tuple[int, int], size: tuple[int, int]) -> None:
    """In the kernel's own tiles, up and down, wide and high."""
    frames = torch.rand(2, 3, *frame, generator=torch.Generator().manual_seed(1))
    close(
        image_prep(frames, *size, torch.float32), image_reference(frames, *size, torch.float32), torch.float32
    )


def test_padding_is_left_and_top_and_black() -> None:
    high, wide = (torch.ones(1, 3, *size) for size in ((40, 10), (10, 40)))
    got = image_prep(high, 40, 40, torch.float32)
    assert (got[..., :30] == -1).all() and (got[..., 30:] == 1).all()
    got = image_prep(wide, 40, 40, torch.float32)
    assert (got[:, :, :30] == -1).all() and (got[:, :, 30:] == 1).all()


def test_a_frame_of_the_right_size_keeps_its_bits() -> None:
    frames = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(image_prep(frames, 40, 24, torch.float32), frames * 2 - 1)


def test_bytes_in_either_layout_and_floats_agree() -> None:
    frames = torch.randint(
        0, 256, (2, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    got = image_prep(frames, 48, 48, torch.float32)
    planes = frames.permute(0, 3, 1, 2)
    assert torch.equal(image_prep(planes.contiguous(), 48, 48, torch.float32), got)
    floats = (planes.float() / 255).to(
        DEVICE
    )  # as LeRobot hands them over: planes in name, pixel by pixel in memory
    assert floats.stride(1) == 1
    assert torch.equal(image_prep(floats, 48, 48, torch.float32), got)
    assert torch.equal(image_prep(floats.contiguous(), 48, 48, torch.float32), got)


def test_image_prep_keeps_images_apart() -> None:
    frames = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(4))
    want = image_prep(frames, 48, 48, torch.float32)
    frames[1, 2] = torch.nan
    got = image_prep(frames, 48, 48, torch.float32)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1, :2], want[1, :2])
    assert got[1, 2, 16:].isnan().all() and (got[1, 2, :16] == -1).all()


def test_image_prep_refuses_what_it_cannot_do() -> None:
    refused = image_module.image_prep
    with pytest.raises(ValueError, match="frames are torch.int64.*accepted are uint8, float32, bfloat16"):
        refused(torch.zeros(1, 3, 4, 4, dtype=torch.int64), 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"shape \[1, 4, 4, 3\]; accepted is \[B, 3, h, w\], for uint8 also"):
        refused(torch.zeros(1, 4, 4, 3), 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"shape \[1, 4, 5, 4\]; accepted is"):
        image_reference(torch.zeros(1, 4, 5, 4), 8, 8, torch.float32)
    with pytest.raises(ValueError, match="a frame of 1x900 has no pixel left at 8x8"):
        refused(torch.zeros(1, 3, 1, 900), 8, 8, torch.float32)
    assert refused(torch.zeros(0, 3, 4, 4, device=DEVICE), 8, 8, torch.float16).shape == (0, 3, 8, 8)
