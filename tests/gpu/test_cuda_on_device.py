"""Backend ``cuda`` on the GPU: its loop in one launch beside its ops one by one, which test_ops_on_device.py tests; and
its sums by clusters and its normed products, alone and among Triton's kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.contract import check, inputs_in, reference_module, run, to_device
from support.prepared import by_prepared_rows

import smolvla_fast
from smolvla_fast.ops import choice
from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.cuda import linear_residual
from smolvla_fast.ops.cuda.prepared_rows import why_no_norm_products
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.plan import FIRST_STEP, LAUNCHES, Plan
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.patch import engine_of
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.tune.check import allowance
from smolvla_fast.verify import rel_l2

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SIZES = {
    "tiny": dict(size="tiny", expert_width_multiplier=1.0),  # 48 wide; 36 is no multiple of 8
    "full": dict(size="full"),
    "480 wide, all cross": dict(size="full", expert_width_multiplier=0.5, self_attn_every_n_layers=0),
    "960 wide, all self": dict(size="full", expert_width_multiplier=1.0, attention_mode="self_attn"),
    "32 layers": dict(size="full", num_vlm_layers=32),
}


@pytest.fixture(autouse=True)
def served() -> None:
    reason = why_not("cuda", DEVICE)
    if reason:
        pytest.skip(reason)


def make(size: str = "tiny", layout: str = "mixed", **more: Any) -> Any:
    policy = make_policy(origin="ours", device="cuda", cameras=3, layout=layout, **{**SIZES[size], **more})
    return smolvla_fast.patch(policy, precision="bf16", backend="cuda")


def chunk(policy: Any, given: Any, noise: Any, **kwargs: Any) -> Any:
    return policy.predict_action_chunk({k: v.clone() for k, v in given.items()}, noise=noise, **kwargs)


def in_one_launch(policy: Any) -> None:
    now = smolvla_fast.status(policy)
    assert now.stages["denoise"] == "cuda" and now.step_launches == 0, now.fallback_reasons


@pytest.mark.parametrize("size", SIZES)
def test_a_chunk_in_one_launch(size: str) -> None:
    """Right against fp32, in bits the same when captured and when not, over cameras and up to eight samples."""
    policy = make(size)
    engine = engine_of(policy.model)
    for cameras, batch in ((2, 1), (1, 3), (3, 8)):
        given = make_observation(policy, cameras=cameras, batch=batch)
        noise = make_noise(policy, batch=batch)
        report = smolvla_fast.verify(policy, given, noise=noise)
        print(size, cameras, batch, report)
        assert report.passed, report
        captured = chunk(policy, given, noise)
        in_one_launch(policy)
        graphs, engine.graphs = engine.graphs, None
        plain = chunk(policy, given, noise)
        engine.graphs = graphs
        assert torch.equal(captured, plain), "captured and plain differ"
    assert smolvla_fast.status(policy).calls_stock == 0


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_one_launch_beside_one_op_at_a_time(size: str) -> None:
    """Both are bf16 products with fp32 sums in another order: together no further apart than both are from fp32."""
    policy = make(size)
    given, noise = make_observation(policy), make_noise(policy)
    report = smolvla_fast.verify(policy, given, noise=noise)
    whole = chunk(policy, given, noise)
    in_one_launch(policy)
    engine = engine_of(policy.model)
    engine.graphs.clear()
    engine.ops = replace(engine.ops, denoise_persistent=None)
    steps = chunk(policy, given, noise)
    assert smolvla_fast.status(policy).step_launches == 2 + 5 * policy.config.num_vlm_layers
    assert not torch.equal(whole, steps), "the loop did not change hands: nothing is compared"
    assert rel_l2(whole, steps) <= report.rel_l2 + report.bound


@pytest.mark.parametrize("size", ["tiny", "full"])
@pytest.mark.parametrize("batch", [1, 8])
def test_bits_are_the_same_in_a_hundred_runs(size: str, batch: int) -> None:
    """Among other work on the GPU, which moves blocks about."""
    policy = make(size)
    given, noise = make_observation(policy, batch=batch), make_noise(policy, batch=batch)
    first = chunk(policy, given, noise)
    in_one_launch(policy)
    other, x = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for i in range(100):
        if i % 2:
            with torch.cuda.stream(other):
                x = (x @ x).clamp_(-1, 1)
        same &= (chunk(policy, given, noise) == first).all()
    torch.cuda.synchronize()
    assert bool(same)


def test_bf16_copies_of_an_fp32_policy() -> None:
    """The copies that the kernel reads are made inside the graph, anew at every replay: an edit of a weight is seen."""
    policy = make(layout="fp32")
    given, noise = make_observation(policy), make_noise(policy)
    assert smolvla_fast.verify(policy, given, noise=noise).passed
    before = chunk(policy, given, noise)
    in_one_launch(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data.copy_(parameter.data * 1.02)
    assert not torch.equal(chunk(policy, given, noise), before)
    assert smolvla_fast.status(policy).graphs == 1 and smolvla_fast.verify(policy, given, noise=noise).passed


def test_what_one_launch_does_not_serve_runs_op_by_op() -> None:
    policy = make()
    for batch in (8, 9):
        given, noise = make_observation(policy, batch=batch), make_noise(policy, batch=batch)
        assert smolvla_fast.verify(policy, given, noise=noise).passed
        chunk(policy, given, noise)
    now = smolvla_fast.status(policy)
    assert "9" in now.fallback_reasons["denoise_persistent"] and now.calls_stock == 0
    chunk(policy, make_observation(policy, batch=8), make_noise(policy, batch=8))
    in_one_launch(policy)


@pytest.fixture
def clusters() -> None:
    reason = linear_residual.why_no_clusters(DEVICE)
    if reason:
        pytest.skip(reason)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(50, 2048, 720), (50, 960, 720), (177, 2560, 960), (65, 264, 47), (1, 8, 1)],
)
def test_sums_of_a_cluster(rows: int, inputs: int, outputs: int, stream: torch.dtype) -> None:
    """Right, the next norm prepared, and equal bits in a hundred runs, with the weight read early and not."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    x, residual = normal(rows, inputs).bfloat16(), (3 * normal(rows, outputs)).to(stream)
    weight = (normal(outputs, inputs) * inputs**-0.5).bfloat16()
    norm = NextNorm(normal(outputs), torch.bfloat16)
    y = linear_residual.linear_residual(x, weight, residual, next_norm=norm)
    truth = residual.double() + x.double() @ weight.double().T
    error, of_eager = ((each.double() - truth).abs().max().item() for each in (y, residual + x @ weight.T))
    print(error, of_eager)
    assert error <= 2 * of_eager + allowance(truth, stream, inputs)
    assert norm.rows is not None and torch.equal(norm.rows, (y.float() * norm.weight).bfloat16())
    assert norm.squares is not None
    # Sums of 64 fp32 squares each.
    torch.testing.assert_close(norm.squares.sum(0), y.float().square().sum(1), rtol=1e-5, atol=0)
    for settled in (weight, torch.nn.Parameter(weight, requires_grad=False)):
        for _ in range(100):
            assert torch.equal(linear_residual.linear_residual(x, settled, residual), y)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        *(("norm_swiglu", case) for case in reference_module("norm_swiglu").CASES[:3]),
        *(("norm_qkv_rope", case) for case in reference_module("norm_qkv_rope").CASES),
        ("norm_swiglu", dict(rows=65, inputs=72, outputs=20)),
    ],
)
@pytest.mark.parametrize("settled", [False, True], ids=["copies", "parameters"])
def test_normed_products_of_prepared_rows(op: str, case: dict[str, int], settled: bool) -> None:
    """Under the contract of all ops, and equal bits in a hundred runs."""
    reason = why_no_norm_products(DEVICE)
    if reason:
        pytest.skip(reason)
    ops = by_prepared_rows(backend_ops("torch"), settled)
    check(reference_ops(), ops, op, case, torch.bfloat16, device=DEVICE)
    given = to_device(inputs_in(op, case, torch.bfloat16, 0)[0], DEVICE)
    first = run(ops, op, given)
    for _ in range(100):
        assert all(torch.equal(y, first[name]) for name, y in run(ops, op, given).items())


@pytest.mark.usefixtures("clusters")
def test_a_chunk_of_tritons_kernels_with_sums_of_clusters() -> None:
    """In one chain of dependent launches: as right as without, captured and not in equal bits."""
    policy = make(size="full")
    given, noise = make_observation(policy), make_noise(policy)
    with patch.object(choice, "beside_triton", lambda device: ({}, {})):
        smolvla_fast.patch(policy, precision="bf16", backend="triton")
        by_triton = chunk(policy, given, noise)
        smolvla_fast.unpatch(policy)
    smolvla_fast.patch(policy, precision="bf16", backend="triton")
    report = smolvla_fast.verify(policy, given, noise=noise)
    captured, engine = chunk(policy, given, noise), engine_of(policy.model)
    for op in ("linear_residual", "norm_swiglu", "norm_qkv_rope"):
        assert "cuda" in getattr(engine.ops, op).served.values()
    assert 0 < rel_l2(captured, by_triton) <= report.rel_l2 + report.bound
    for _ in range(50):
        assert torch.equal(chunk(policy, given, noise), captured)
    graphs, engine.graphs = engine.graphs, None
    assert torch.equal(chunk(policy, given, noise), captured)
    engine.graphs = graphs


@pytest.mark.parametrize("launches", ["early", "in_order"])
@pytest.mark.parametrize("first_step", ["beside_prefix", "behind_prefix"])
def test_a_chunk_has_equal_bits_in_every_order_of_its_launches(launches: str, first_step: str) -> None:
    policy = smolvla_fast.patch(make(size="full"), precision="bf16", backend="triton")
    given, noise = make_observation(policy), make_noise(policy)
    first, engine = chunk(policy, given, noise), engine_of(policy.model)
    engine.products.plan = Plan({LAUNCHES: launches, FIRST_STEP: first_step})
    engine.graphs.clear()
    for _ in range(100):
        assert torch.equal(chunk(policy, given, noise), first)


def test_a_guided_chunk_in_one_launch() -> None:
    """Delay and previous chunk are data of one graph; held to what the ops give one by one."""
    from smolvla_fast.smolvla.rtc import RTCConfig

    policy = make(rtc_config=RTCConfig(execution_horizon=6))
    policy.init_rtc_processor()
    given, noise = make_observation(policy), make_noise(policy)
    bound = (
        2 * smolvla_fast.verify(policy, given, noise=noise).bound
    )  # of two paths in bf16, each against fp32
    engine = engine_of(policy.model)
    whole_ops, step_ops = engine.ops, replace(engine.ops, denoise_persistent=None)
    unguided = chunk(policy, given, noise)
    for delay in (0, 2, 5):
        left = torch.randn(8, 6, generator=torch.Generator().manual_seed(delay)).cuda()
        kwargs: dict[str, Any] = dict(inference_delay=delay, prev_chunk_left_over=left)
        whole = chunk(policy, given, noise, **kwargs)
        in_one_launch(policy)
        graphs, engine.graphs, engine.ops = engine.graphs, None, step_ops
        steps = chunk(policy, given, noise, **kwargs)
        engine.graphs, engine.ops = graphs, whole_ops
        assert rel_l2(whole, steps) <= bound and rel_l2(whole, unguided) > 10 * bound
    assert smolvla_fast.status(policy).graphs == 2


def test_the_loop_is_one_node_however_many_steps() -> None:
    policy = make()
    given, noise = make_observation(policy), make_noise(policy)
    nodes = []
    for steps in (4, 5):
        policy.config.num_steps = steps
        chunk(policy, given, noise)
        in_one_launch(policy)
        nodes.append(smolvla_fast.status(policy).graph_nodes)
    if None in nodes:
        pytest.skip("this torch does not let a graph's nodes be counted")
    assert nodes[0] == nodes[1]


def test_nan_stays_in_its_chunk() -> None:
    policy = make()
    given, noise = make_observation(policy), make_noise(policy)
    clean = chunk(policy, given, noise)
    bad = {**given, "observation.state": torch.full_like(given["observation.state"], torch.nan)}
    assert chunk(policy, bad, noise).isnan().any()
    assert torch.equal(chunk(policy, given, noise), clean)
