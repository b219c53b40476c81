"""An honest report: figures as they were measured, no ratio of disturbed medians, and what has no number says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import markdown as report
from benchmarks.report import sections

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_report_is_what_its_figures_give(path: Path) -> None:
    committed = path.with_suffix(".md").read_text(encoding="utf-8")
    charts = [f"{path.stem}{end}.png" for end in ("", "-scaling")]
    names = [name if (RESULTS / name).is_file() else None for name in charts]
    assert report.markdown(json.loads(path.read_text(encoding="utf-8")), *names) == committed


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
            "op: linear", suite="ops", op="linear", variant=backend, ratio_to="reference", backend=backend, case={"rows": 7},
            dtype="float32", p50_ms=ms, min_ms=ms, gflops_per_s=10.0, gbytes_per_s=1.0, share_of_floor=0.25,
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
    text = (tmp_path / "box.md").read_text(encoding="utf-8")
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


def test_report_says_that_it_was_interrupted_and_what_has_no_number() -> None:
    part = dict(
        name="chunk", status="red", reason="interrupted", seconds=9.0, left_out=["late: no time was left"]
    )
    part |= {
        "red": [{"name": "int8", "reason": "cosine 0.99"}],
        "skipped": [{"name": "fp8", "reason": "no GPU"}],
    }
    text = report.markdown({**sample(rounds=3), "interrupted": True, "parts": [part]})
    assert "**Interrupted**" in text and "| chunk | red | 9 | interrupted |" in text
    assert "**int8 is red, so it has no number**: cosine 0.99" in text and "fp8 did not run: no GPU" in text
    assert "Left out: late: no time was left." in text


def cpu_sample() -> dict[str, Any]:
    """What the suite writes, cut to what the report reads."""
    facts = {
        "machine": "Box, 2 cores", "cpu": "Box", "cpu_features": ["AVX2"], "threads": 2, "cores": 2, "load": 0.1,
        "commit": None, "date": "2026-01-01", "driver": None, "lerobot_version": "0.6.1", "torch_version": "2.11.0",
        "openvino_version": "2026.4", "instruction_level": "avx512", "torch_capability": "AVX512",
    }  # fmt: skip

    def bench(variant: str, kind: str, precision: str, ms: float, **extra: Any) -> dict[str, Any]:
        info = dict(
            suite="cpu", variant=variant, kind=kind, precision=precision, cameras=2, p50_ms=ms, p95_ms=ms + 1,
            p99_ms=ms + 2, min_ms=ms - 1, rounds=20, ratio=3000 / ms, rel_l2=4e-7, cosine=0.9999999, gate="the gate",
            share_of_floor=0.5, extra_bytes=2**20, peak_bytes=2**32, added_bytes=2**21,
            stages={"vision": {"p50_ms": ms / 2}, "prefix": {"p50_ms": ms / 4}, "denoise": {"p50_ms": ms / 4}},
        )  # fmt: skip
        return {"group": "cpu: full size", "name": f"cpu[{variant}]", "extra_info": {**info, **extra}}

    each = dict(
        sample_actions_ms=1000.0, outside_ms=20.0, outside_share=0.02, narrow_ms=50.0, narrow_share=0.05,
        op_calls=900, step_allocations=70.0, step_bytes=2.0**21, chunk_allocations=2000,
    )  # fmt: skip
    rows = [
        {"suite": "scaling", "axis": axis, "value": value, "variant": "fp32", "p50_ms": 400.0 * value}
        for axis, value in (("cameras", 1), ("cameras", 2), ("batch", 1))
    ]
    data = {
        "machine_info": {"smolvla_fast": facts},
        "benchmarks": [
            bench("stock", "stock", "stock", 3000.0),
            bench("fp32", "tier", "fp32", 1154.0, heavy_cosine=0.99999, overhead=each),
            bench("bf16", "tier", "bf16", 750.0, fallback_reasons={"bf16 products": "too slow"}),
            bench("OpenVINO fp32", "peer", "fp32", 1500.0),
            *({**each, "group": "cpu: full size, beside compiled stock"} for each in (
                bench("stock", "stock", "stock", 3300.0, beside="compiled"),
                bench("fp32", "tier", "fp32", 1400.0, beside="compiled"),
                bench("stock compiled", "peer", "fp32", 2100.0, beside="compiled"),
            )),
        ],
    }  # fmt: skip
    data["benchmarks"] += [{"group": "scaling", "extra_info": row} for row in rows]
    return data


def test_report_of_the_cpu_suite(tmp_path: Path) -> None:
    written = report.write(cpu_sample(), tmp_path / "box.json")
    text = (tmp_path / "box.md").read_text(encoding="utf-8")
    assert "openvino 2026.4" in text and "level avx512" in text
    assert "| fp32 | 2.60x | rel L2 4.0e-07; cosine 1.000000, 0.999990 on heavy" in text
    assert (
        "check: the gate | 1,154 | 1,155 | 1,156 | 1,153 | 20 | 50% | – | 1 MiB | 4,096 MiB | 2 MiB |" in text
    )
    assert "| bf16 | 4.00x |" in text and "| OpenVINO fp32 | 2.00x |" in text
    assert "bf16, bf16 products: too slow" in text and "Against OpenVINO fp32: 1.30x at fp32" in text
    assert "Against stock compiled: 1.50x at fp32" in text, "beside that which was timed beside it"
    assert "| fp32 | 577 (2.60x) | 288 (2.60x) | 288 (2.60x) |" in text
    assert "| fp32 | 1,000 | 20.0 (2.0%) | 50.0 (5.0%) | 900 | 70 | 2 MiB |" in text
    assert "met by the first, missed by the upper bound" in text and "loop: missed: 70 a step" in text
    assert "| ms by cameras | 1 | 2 |" in text and "| fp32 | 400 | 800 |" in text
    page = {"box.html"} if find_spec("markdown_it") else set()
    charts = {"box.png", "box-scaling.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in written} == {"box.md", *page, *charts}
    for name in charts:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text
    if page:
        assert (tmp_path / "box.html").read_text(encoding="utf-8").count("data:image/png") == len(charts)


def test_a_report_is_utf8_in_any_locale(tmp_path: Path) -> None:
    """Its dashes are not in ASCII, which an interpreter writes in the C locale."""
    data = cpu_sample()
    data["machine_info"]["smolvla_fast"]["cpu_model"] = "Prozessor mit Ä"
    (tmp_path / "box.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "benchmarks.report.markdown", str(tmp_path / "box.json")]
    done = subprocess.run(
        command, env=plain, cwd=RESULTS.parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "box.md").read_text(encoding="utf-8")
    assert "–" in text and "Prozessor mit Ä" in text


def test_report_of_little() -> None:
    data = cpu_sample()
    data["benchmarks"] = data["benchmarks"][:2]
    del data["benchmarks"][1]["extra_info"]["overhead"]
    data["benchmarks"][1]["extra_info"].update(rounds=5, min_ms=500.0)
    text = report.markdown(data)
    assert "| fp32 | 2.60x† |" in text and "| 1,154 | – | – | 500 | 5 |" in text and "† unsteady" in text
    assert "overhead" not in text and "scaling" not in text


def test_a_gpus_figures_in_the_report() -> None:
    """Columns that a CPU leaves empty."""
    info = dict(
        suite="chunk", variant="bf16", p50_ms=2.5, floor_ms=1.4, host_ms=0.25, device_ms={"p50_ms": 2.25, "p99_ms": 2.3},
        first_chunk_ms=2900.0, peak_bytes=3 * 2**30,
        status={"graph_nodes": 1010, "step_launches": 82, "graph_bytes": 64 * 2**20},
    )  # fmt: skip
    data = {"benchmarks": [{"name": "bf16", "group": "chunk: full", "extra_info": info}]}
    text = sections.SECTIONS["Device and host"](data)
    assert "| full | bf16 | 2.5 | 2.25 | 2.3 | 0.25 | 1.4 | 2,900 | 1,010 | 82 | 64 | 3,072 |" in text
    assert sections.SECTIONS["Device and host"]({"benchmarks": []}) == "" and sections.parts({}) == ""


def test_the_denoise_loop_by_backend() -> None:
    """One launch for all steps is said as such; ratios are of that stage, not of chunks, to Triton's in the same batch."""

    def bench(
        group: str, variant: str, ms: float, backend: str, launches: int | None, **passed: str
    ) -> dict[str, Any]:
        loop = {"p50_ms": ms, "floor_ms": 0.7, "share_of_floor": 0.7 / ms}
        stages = {"vision": "triton", "prefix": "cuda, triton", "denoise": backend}
        status = {
            "stages": stages,
            "step_launches": launches,
            "graph_nodes": None,
            "fallback_reasons": passed,
        }
        info = dict(
            suite="stages",
            variant=variant,
            batch=1,
            ratio_to="bf16, triton",
            loop_backend=backend,
            ratio=9.0,
            stages={"denoise": loop},
            status=status,
        )
        return {"name": variant, "group": group, "extra_info": info}

    reason = "batch 8"
    benches = [
        bench("stages: full", "bf16, triton", 2.1, "triton", 82),
        bench("stages: full", "bf16, cuda", 1.4, "cuda", 0),
        bench("stages: full, batch 8", "bf16, triton", 2.8, "triton", 82),
        bench("stages: full, batch 8", "bf16, cuda", 2.8, "cuda, triton", 82, denoise_persistent=reason),
    ]
    tier = bench("stages: full", "fp32", 9.9, "auto", 82)
    del tier["extra_info"]["loop_backend"]
    text = sections.SECTIONS["Denoise loop"]({"benchmarks": [tier, *benches]})
    assert "| full | bf16, cuda | cuda | one for all steps | 1.4 | 1.50x | 0.7 | 50% |  |" in text
    assert "| full, batch 8 | bf16, cuda | cuda, triton | 82 | 2.8 | 1.00x | 0.7 | 25% | batch 8 |" in text
    assert "9.9" not in text and sections.SECTIONS["Denoise loop"]({"benchmarks": [tier]}) == ""
