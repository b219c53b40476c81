"""The benchmarks' own promises: no number for a red check, percentiles from the raw rounds, an honest report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.harness.gate import Red, check_chunk, check_report, timed
from benchmarks.harness.machine import Ceilings
from benchmarks.report import markdown as report
from smolvla_fast.measure import rounds as measure


class Recorder:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self, seconds: list[float]) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds))
        self.rounds: int | None = None

    def pedantic(
        self, run: Any, rounds: int, warmup_rounds: int, iterations: int, setup: Any = lambda: None
    ) -> None:
        assert (warmup_rounds, iterations) == (1, 1)
        self.rounds = rounds
        for _ in range(warmup_rounds + rounds):
            setup()
            run()


def test_percentiles_are_those_of_the_raw_rounds() -> None:
    benchmark = Recorder([0.001 * i for i in range(1, 102)])
    calls: list[int] = []
    timed(benchmark, lambda: {"rel_l2": 1e-7}, lambda: calls.append(1), rounds=101)
    assert benchmark.rounds == 101 and calls
    found = benchmark.extra_info
    assert found["rel_l2"] == 1e-7 and found["rounds"] == 101
    assert [found[f"p{p}_ms"] for p in (50, 95, 99)] == pytest.approx([51.0, 96.0, 100.0])


def test_a_ratio_is_that_of_rounds_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, order = Recorder([0.01, 0.02, 0.04]), []
    clock = iter([0, 9, 10, 10.03, 20, 20.02, 30, 30.04])  # a warm-up of 9 s, then 30, 20 and 40 ms
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    run, stock = (lambda name=name: order.append(name) for name in ("ours", "stock"))
    timed(benchmark, dict, run, rounds=3, beside=stock)
    assert order == ["stock", "ours"] * 4
    assert benchmark.extra_info["beside_ms"] == pytest.approx([30, 20, 40])
    assert benchmark.extra_info["ratio"] == pytest.approx(1.0)  # 3, 1, 1; medians alone would say 1.5


def test_a_red_check_leaves_no_number() -> None:
    benchmark = Recorder([0.001])

    def red() -> dict[str, Any]:
        raise Red("off by one")

    with pytest.raises(pytest.fail.Exception, match="not timed: off by one"):
        timed(benchmark, red, lambda: pytest.fail("it was run"), rounds=3)
    assert benchmark.rounds is None and not benchmark.extra_info


def test_gates() -> None:
    stock = torch.linspace(-1, 1, 60).view(1, 10, 6)
    assert check_chunk(stock, stock, 0.0)["max_abs"] == 0
    assert check_chunk(1.000001 * stock, stock, 1e-5)["rel_l2"] == pytest.approx(1e-6, rel=0.2)
    with pytest.raises(Red, match="bits differ"):
        check_chunk(1.000001 * stock, stock, 0.0)
    with pytest.raises(Red, match="allowed 1e-05"):
        check_chunk(1.001 * stock, stock, 1e-5)
    with pytest.raises(Red, match="not finite"):
        check_chunk(torch.full_like(stock, torch.nan), stock, 1.0)
    figures = {"rel_l2": 0.3, "max_abs": 1.0, "bound": 0.1, "stock_rel_l2": 0.1, "stock_max_abs": 0.5}
    assert check_report({**figures, "passed": True}) == figures
    with pytest.raises(Red, match=r"allowed 0\.1"):
        check_report({**figures, "passed": False})


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings({torch.float32: 1e12, torch.bfloat16: 4e12}, bytes=1e10)
    assert ceilings.floor_ms(2e9, 1e6, torch.float32) == pytest.approx(2.0)
    assert ceilings.floor_ms(2e9, 1e6, torch.bfloat16) == pytest.approx(0.5)
    assert ceilings.floor_ms(2e9, 1e8, torch.float32) == pytest.approx(10.0)
    slow = Ceilings({torch.float32: 1e12, torch.bfloat16: 1e11}, bytes=1e10)  # there fp32 serves bf16
    assert slow.floor_ms(2e9, 1e6, torch.bfloat16) == pytest.approx(2.0)


def test_stage_costs_at_full_size() -> None:
    """The design's figures: vision 428 GFLOP, prefix 55 GFLOP / 298 MB, a denoise step 10.3 GFLOP / 198 MB."""
    from benchmarks.harness.account import stage_costs

    found = stage_costs(full_size_model(), cameras=2, language=48, itemsize=2)
    # 2 %: the design rounds, and leaves the patch embedding out.
    assert found["vision"].flops == pytest.approx(428e9, rel=0.02)
    assert found["prefix"].flops == pytest.approx(55e9, rel=0.02)
    assert found["prefix"].bytes == pytest.approx(298e6, rel=0.02)
    assert found["denoise"].flops / 10 == pytest.approx(10.3e9, rel=0.02)
    assert found["denoise"].bytes / 10 == pytest.approx(198e6, rel=0.03)


def full_size_model() -> Any:
    """The shapes of the full-size model, without its memory."""

    def weight(*shape: int) -> Any:
        return SimpleNamespace(weight=torch.empty(shape, device="meta"))

    def space(**fields: Any) -> Any:
        return SimpleNamespace(**fields)

    text = space(
        self_attn=space(head_dim=64, q_proj=weight(960, 960)),
        mlp=space(gate_proj=weight(2560, 960)),
    )
    expert = space(mlp=space(gate_proj=weight(2048, 720)))
    tower = space(self_attn=space(num_heads=12), mlp=space(fc1=weight(3072, 768)))
    vlm = space(
        text_model=space(layers=[text] * 16),
        vision_model=space(
            embeddings=space(image_size=512, patch_size=16),
            encoder=space(layers=[tower] * 12),
            post_layernorm=weight(768),
        ),
        connector=space(scale_factor=4),
    )
    pair = space(
        get_vlm_model=lambda: vlm,
        lm_expert=space(layers=[expert] * 16, norm=weight(720)),
        num_attention_heads=15,
        num_key_value_heads=5,
        attention_mode="cross_attn",
        self_attn_every_n_layers=2,
    )
    return space(
        vlm_with_expert=pair,
        action_in_proj=weight(720, 32),
        state_proj=weight(960, 32),
        config=space(chunk_size=50, num_steps=10),
    )


def sample(rounds: int) -> dict[str, Any]:
    """What pytest-benchmark writes, cut to what the report reads."""
    facts = {
        "machine": "Box, 2 cores", "cpu": "Box", "cpu_features": ["AVX2"], "threads": 2, "cores": 2, "load": 0.1,
        "commit": None, "date": "2026-01-01", "driver": None, "lerobot_version": "0.6.1", "torch_version": "2.11.0",
        "ceilings": {"gemm_flops": {"float32": 4e11}, "copy_bytes": 2e10},
    }  # fmt: skip

    def bench(group: str, **extra: Any) -> dict[str, Any]:
        return {"group": group, "extra_info": {"rounds": rounds, **extra}}

    def chunk(variant: str, ms: float) -> dict[str, Any]:
        return bench(
            "chunk: full", suite="chunk", variant=variant, cameras=2, p50_ms=ms, p95_ms=ms + 1, p99_ms=ms + 2,
            min_ms=ms - 1, share_of_floor=0.5, rel_l2=1e-7, max_abs=1e-6,
        )  # fmt: skip

    def op(backend: str, ms: float) -> dict[str, Any]:
        return bench(
            "op: linear", suite="ops", op="linear", backend=backend, case={"rows": 7}, dtype="float32", p50_ms=ms,
            min_ms=ms, gflops_per_s=10.0, gbytes_per_s=1.0, share_of_floor=0.25,
        )  # fmt: skip

    stages = {
        "vision": {"p50_ms": 30.0, "min_ms": 29.0, "flops": 1e9, "floor_ms": 15.0, "share_of_floor": 0.5},
        "total": {"p50_ms": 60.0, "min_ms": 59.0},
    }
    benches = [
        chunk("stock", 4000.0),
        chunk("fp32", 1600.0),
        bench("stages: full", suite="stages", variant="stock", cameras=2, stages=stages),
        op("reference", 0.5),
        op("torch", 0.25),
    ]
    return {"machine_info": {"smolvla_fast": facts}, "benchmarks": benches}


def test_report(tmp_path: Path) -> None:
    written = report.write(sample(rounds=20), tmp_path / "box.json")
    text = (tmp_path / "box.md").read_text()
    assert tmp_path / "box.md" in written
    assert "Box, 2 cores" in text and "float32 400 GFLOP/s" in text and "lerobot 0.6.1" in text
    assert "| fp32 | 1,600 | 1,599 | 1,601 | 1,602 | 0.62 | 2.50x | 50% | 1.0e-07 | 1.0e-06 | 20 |" in text
    assert "| stock | vision | 30.0 | 50% | 1.00x | 1.0 | 15.0 | 50% |" in text
    assert "| linear | rows=7 | float32 | torch | 250 | 250 | 2.00x | 10 | 1.0 | 25% |" in text
    if (tmp_path / "box.png") in written:
        assert (tmp_path / "box.png").read_bytes().startswith(b"\x89PNG")


def test_report_claims_no_tail_from_few_rounds() -> None:
    assert "| fp32 | 1,600 | 1,599 | – | – | 0.62 |" in report.markdown(sample(rounds=3))


def test_report_gives_no_ratio_to_a_disturbed_baseline() -> None:
    data = sample(rounds=3)
    assert "†" not in report.markdown(data)
    data["benchmarks"][0]["extra_info"]["min_ms"] = 1000.0
    text = report.markdown(data)
    assert "| stock | 4,000† | 1,000 |" in text and "other work disturbed it" in text
    assert "| fp32 | 1,600 | 1,599 | – | – | 0.62 | – |" in text


def test_report_says_when_the_machine_was_busy() -> None:
    data = sample(rounds=3)
    assert "busy" not in report.markdown(data)
    data["machine_info"]["smolvla_fast"]["load"] = 7.5
    assert "load 7.5 on 2 cores" in report.markdown(data)


@pytest.mark.long
@pytest.mark.slow
def test_a_red_engine_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: with a wrong engine the stock rows stay, the engine's rows are missing, and the status is 1."""
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the policy is LeRobot's")
    from smolvla_fast.cli import main

    (tmp_path / "sitecustomize.py").write_text(
        "import smolvla_fast.inference as inference\n"
        "act = inference.Engine.act\n"
        "inference.Engine.act = lambda *args, **kwargs: 1.001 * act(*args, **kwargs)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(report.__file__).parents[2])]))
    path = tmp_path / "red.json"
    options = ["--size", "tiny", "--cameras", "1", "--rounds", "1", "--steps", "2", "--threads", "1"]
    assert main(["bench", "chunk", *options, "-k", "stock or fp32", "--json", str(path)]) == 1
    data = json.loads(path.read_text())
    assert [bench["extra_info"]["variant"] for bench in data["benchmarks"]] == ["stock"]
