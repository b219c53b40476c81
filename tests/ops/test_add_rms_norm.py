"""add_rms_norm in every room against the reference in fp64, judged by eager torch's error in that dtype."""

import pytest
import torch

from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.add_rms_norm import CASES, add_rms_norm, make_inputs

ODD = (
    {"rows": 3, "width": 1},
    {"rows": 2, "width": 17},
    {"rows": 5, "width": 1000},
    {"rows": 4, "width": 16},
)
INTERPRETED = not torch.cuda.is_available()
DEVICES = {"cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}
ROOMS = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.cpu_kernels),
    pytest.param("cpu", torch.bfloat16, marks=pytest.mark.cpu_kernels),
    pytest.param("triton", torch.float32, marks=pytest.mark.triton),
    pytest.param("triton", torch.float16, marks=pytest.mark.triton),
    # The interpreter truncates to bf16 where a GPU rounds, so it can say nothing about bf16.
    pytest.param("triton", torch.bfloat16, marks=[pytest.mark.triton, pytest.mark.gpu]),
]


def launcher(room):
    if room == "cpu":
        return cpu.add_rms_norm
    pytest.importorskip("triton")
    from smolvla_fast.kernels.add_rms_norm import add_rms_norm as kernel

    return kernel


def inputs(case, dtype, room, seed=0):
    values = make_inputs(case, dtype, torch.Generator().manual_seed(seed))
    return {k: v.to(DEVICES[room]) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def in_fp64(values):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def guarded(like):
    """A NaN-filled output between two guards: (whole buffer, the view in its middle)."""
    whole = torch.full((like.numel() + 64,), torch.nan, dtype=like.dtype, device=like.device)
    return whole, whole[32:-32].view_as(like)


def assert_no_worse_than_eager(ours, eager, truth):
    """Worst error at most twice eager's, plus one unit in the last place, for eager is sometimes exact."""
    ulp = torch.finfo(ours.dtype).eps * truth.abs().max()
    error, allowed = (ours.double() - truth).abs().max(), 2 * (eager.double() - truth).abs().max() + ulp
    assert error <= allowed, f"worst error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("case", CASES + ODD, ids=lambda c: f"{c['rows']}x{c['width']}")
@pytest.mark.parametrize("room, dtype", ROOMS)
def test_error_and_memory(room, dtype, case, with_residual):
    values = inputs(case, dtype, room)
    if not with_residual:
        values["residual"] = None
    (y_whole, y), (r_whole, r) = guarded(values["x"]), guarded(values["x"])
    got_y, got_r = launcher(room)(**values, out=(y, r))

    assert got_y is y
    assert got_r is (r if with_residual else values["x"])
    for whole, view in ((y_whole, y), (r_whole, r)):
        assert whole[:32].isnan().all() and whole[-32:].isnan().all(), "wrote outside its output"
        assert view.isfinite().all() or (view is r and not with_residual)
    truth_y, truth_r = add_rms_norm(**in_fp64(values))
    eager_y, eager_r = add_rms_norm(**values)
    assert_no_worse_than_eager(got_y, eager_y, truth_y)
    assert torch.equal(got_r, eager_r), "a single addition, rounded once, has one right answer"
    assert_no_worse_than_eager(got_r, eager_r, truth_r)


@pytest.mark.parametrize("room, dtype", ROOMS)
def test_allocates_outputs_and_keeps_leading_dimensions(room, dtype):
    values = inputs({"rows": 6, "width": 40}, dtype, room)
    flat_y, flat_r = launcher(room)(**values)
    folded = {k: v.view(2, 3, 40) if k in ("x", "residual") else v for k, v in values.items()}
    y, r = launcher(room)(**folded)
    assert y.shape == r.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), flat_y) and torch.equal(r.view(6, 40), flat_r)
    none = torch.empty(0, 40, dtype=dtype, device=values["x"].device)
    assert launcher(room)(none, None, values["weight"], 1e-5)[0].shape == (0, 40)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy under the interpreter
@pytest.mark.parametrize("room, dtype", ROOMS)
def test_what_is_not_finite_stays_in_its_row(room, dtype):
    values = inputs({"rows": 4, "width": 33}, dtype, room)
    values["x"][1, 32], values["x"][2, 0] = torch.nan, torch.inf
    y, r = launcher(room)(**values)
    assert y[1].isnan().all() and r[1, 32].isnan() and r[1, :32].isfinite().all()
    assert y[2, 0].isnan() and (y[2, 1:] == 0).all(), "a row of infinite norm is scaled to zero, as in torch"
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("room, dtype", ROOMS)
def test_eps_decides_for_small_rows(room, dtype):
    values = inputs({"rows": 2, "width": 64}, dtype, room)
    values.update(x=values["x"] * 1e-3, residual=None)
    ours = [launcher(room)(**{**values, "eps": eps})[0] for eps in (1e-5, 1e-2)]
    for got, eps in zip(ours, (1e-5, 1e-2), strict=True):
        changed = {**values, "eps": eps}
        assert_no_worse_than_eager(got, add_rms_norm(**changed)[0], add_rms_norm(**in_fp64(changed))[0])
    assert (ours[0].abs() > 2 * ours[1].abs()).float().mean() > 0.9


@pytest.mark.triton
def test_triton_refuses_what_it_cannot_do():
    kernel = launcher("triton")
    values = inputs({"rows": 2, "width": 8}, torch.float32, "triton")
    with pytest.raises(ValueError, match=r"residual must be contiguous, of shape \[2, 8\]"):
        kernel(**{**values, "residual": values["residual"][:, :4]})
    with pytest.raises(ValueError, match=r"weight has shape \[4\]; accepted is \[8\]"):
        kernel(**{**values, "weight": values["weight"][:4]})
    wide = torch.zeros(1, 20_000, device=values["x"].device)
    with pytest.raises(ValueError, match="accepted are at most 16384"):
        kernel(wide, None, wide[0], 1e-5)
