"""What `make gpu-report` is made of: rounds, marks around stages, what is red or late, the schema, and a GPU's columns."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_run import result
from benchmarks.gpu_run.record import Recorder, Run
from benchmarks.gpu_run.run import Outcome
from benchmarks.harness import device_timing as timing
from benchmarks.harness.machine import Ceilings


def a_run(folder: Path, seconds: float = 60.0) -> Run:
    return Run("chunk", folder, seconds, rehearse=True)


def test_red_late_and_good_benches(tmp_path: Path) -> None:
    def measure(recorder: Recorder) -> None:
        recorder.pedantic(lambda: None, rounds=3, warmup_rounds=1, iterations=1)

    def red(recorder: Recorder) -> None:
        measure(recorder)
        raise RuntimeError("CUDA error\nmore")

    some = a_run(tmp_path)
    some.bench("bad", "g", 1.0, red)
    some.bench("failed", "g", 1.0, lambda recorder: pytest.fail("red, so it is not timed: off by one"))
    some.bench("good", "g", 1.0, measure)
    some.end = time.perf_counter()
    some.bench("late", "g", 1.0, measure)
    found = json.loads((tmp_path / "chunk.json").read_text())
    assert [b["name"] for b in found["benchmarks"]] == ["good"] and len(
        found["benchmarks"][0]["stats"]["data"]
    ) == 3
    assert found["red"] == [
        {"name": "bad", "reason": "RuntimeError: CUDA error"},
        {"name": "failed", "reason": "red, so it is not timed: off by one"},
    ]
    assert found["left_out"] == ["late: no time was left"]


def test_rounds_end_with_their_time() -> None:
    recorder = Recorder("n", "g", seconds=0.2)
    recorder.pedantic(lambda: time.sleep(0.05), rounds=1000, warmup_rounds=1, iterations=1)
    assert 1 <= len(recorder.stats.stats.data) <= 5
    none = Recorder("n", "g", seconds=0.0)
    none.pedantic(lambda: None, rounds=1000, warmup_rounds=0, iterations=1)
    assert len(none.stats.stats.data) == 1


def test_ceilings_are_measured_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    roof = Ceilings({torch.float32: 1e12, torch.bfloat16: 4e12}, bytes=1e10)
    monkeypatch.setattr(
        "benchmarks.gpu_run.record.measure_ceilings", lambda device, small: (asked.append(None), roof)[1]
    )
    assert a_run(tmp_path).ceilings == roof and a_run(tmp_path).ceilings == roof
    assert len(asked) == 1


def test_stage_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    from smolvla_fast import inference

    times = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-3 * next(times))
    monkeypatch.setattr("smolvla_fast.refresh", lambda policy: refreshed.append(policy))
    refreshed: list[Any] = []
    plain, policy = inference.section, SimpleNamespace()
    with timing.stage_marks(policy, torch.device("cpu")) as marks:
        with inference.section("vision"):
            pass
        with pytest.raises(AssertionError, match="no marks around prefix, denoise"):
            marks.read()
        for stage in ("vision", "prefix", "denoise"):
            with inference.section(stage):
                next(times)
        assert marks.read() == pytest.approx({"vision": 2.0, "prefix": 2.0, "denoise": 2.0, "total": 8.0})
    assert inference.section is plain and refreshed == [policy, policy]
    assert timing.device_rounds(lambda: None, torch.device("cpu"), 3, 1.0, 1.0) is None


def sample() -> dict[str, Any]:
    """A small result that holds to the schema."""
    info = dict.fromkeys(result.NEEDED["ops"], 1.0) | {"suite": "ops"}
    bench = {"name": "linear", "group": "g", "extra_info": info, "stats": {"data": [0.1]}}
    part = Outcome("ops").to_dict()
    return {
        "schema": 1,
        "kind": "gpu-report",
        "rehearsal": True,
        "machine_info": {},
        "parts": [part],
        "benchmarks": [bench],
    }


def test_schema() -> None:
    assert result.problems(sample()) == []
    data = sample()
    data["parts"][0].update(status="red")
    assert result.problems(data) == ["part ops is red and does not say why"]
    data["parts"][0].update(reason="x", red=[{"name": "linear", "reason": "x"}])
    assert result.problems(data) == ["linear is red and has a number"]
    data = sample()
    del data["benchmarks"][0]["extra_info"]["p50_ms"]
    data["benchmarks"][0]["stats"]["data"] = []
    assert result.problems(data) == ["linear: no 'p50_ms'", "linear has no raw rounds"]
    data = sample()
    data["benchmarks"][0]["extra_info"]["suite"] = "opz"
    assert "suite 'opz'; known are chunk, stages, ops" in result.problems(data)[0]
    assert result.problems({"schema": 1}) == [
        f"no {key!r}" for key in ("kind", "rehearsal", "machine_info", "parts", "benchmarks")
    ]
    with pytest.raises(ValueError, match="does not hold to its schema: no 'kind'"):
        result.write({"schema": 1}, Path("never.json"), last=True)


def test_a_gpus_figures_in_the_report() -> None:
    """Columns that a CPU leaves empty."""
    from benchmarks.report import gpu as sections

    info = dict(
        suite="chunk", variant="bf16", p50_ms=2.5, floor_ms=1.4, host_ms=0.25, device_ms={"p50_ms": 2.25, "p99_ms": 2.3},
        first_chunk_ms=2900.0, peak_bytes=3 * 2**30,
        status={"graph_nodes": 1010, "step_launches": 82, "graph_bytes": 64 * 2**20},
    )  # fmt: skip
    data = {"benchmarks": [{"name": "bf16", "group": "chunk: full", "extra_info": info}]}
    text = sections.device(data)
    assert "| full | bf16 | 2.5 | 2.25 | 2.3 | 0.25 | 1.4 | 2,900 | 1,010 | 82 | 64 | 3,072 |" in text
    assert sections.device({"benchmarks": []}) == "" and sections.parts({}) == ""


def test_the_denoise_loop_by_backend() -> None:
    """One launch for all steps is said as such; ratios are to the first of the same batch."""
    from benchmarks.report import gpu as sections

    def bench(
        group: str, variant: str, ms: float, backend: str, launches: int | None, **passed: str
    ) -> dict[str, Any]:
        loop = {"p50_ms": ms, "floor_ms": 0.7, "share_of_floor": 0.7 / ms}
        stages = {"vision": "triton", "prefix": "cuda, triton", "denoise": backend}
        status = {"stages": stages, "step_launches": launches, "graph_nodes": None, "passed_over": passed}
        info = dict(
            suite="stages", variant=variant, backend=backend, batch=1, stages={"denoise": loop}, status=status
        )
        return {"name": variant, "group": group, "extra_info": info}

    reason = "batch 8"
    benches = [
        bench("stages: full", "bf16, triton", 2.1, "triton", 82),
        bench("stages: full", "bf16, cuda", 1.4, "cuda", 0),
        bench("stages: full, batch 8", "bf16, cuda", 2.8, "cuda, triton", 82, denoise_persistent=reason),
    ]
    tier = bench("stages: full", "fp32", 9.9, "auto", 82)
    text = sections.denoise({"benchmarks": [tier, *benches]})
    assert "| full | bf16, cuda | cuda | one for all steps | 1.4 | 1.50x | 0.7 | 50% |  |" in text
    assert "| full, batch 8 | bf16, cuda | cuda, triton | 82 | 2.8 | 1.00x | 0.7 | 25% | batch 8 |" in text
    assert "9.9" not in text and sections.denoise({"benchmarks": [tier]}) == ""
