"""The soak of ``make soak``, for a few seconds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("psutil")
from fuzz import soak

SHORT = ["--minutes", "5", "--chunks", "200", "--cases", "8", "--derandomize"]


@pytest.mark.slow
def test_a_short_soak_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(SHORT) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "chunks 200 of 200, mismatches 0" in said and "grown: nothing" in said
    assert re.search(r"drawn\ncases [1-9]\d*, mismatches 0", said)
    # Some of the drawn policies are stock's affair; the chunks of the soak itself are the engine's.
    chunks = said.partition("drawn\n")[0]
    assert (
        "served by exact, reference: 100" in chunks
        and "served by fp32, " in chunks
        and "stock, " not in chunks
    )
    for what in ("resident MiB", "threads", "file handles"):
        assert re.search(rf"{what} first \d+, last \d+", said)


@pytest.mark.long
def test_a_soak_of_stock_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    assert soak.main(["--minutes", "5", "--chunks", "8", "--cases", "4", "--derandomize"]) == 1
    assert "the engine served 0 of 8 chunks; it has to serve all" in capsys.readouterr().out


@pytest.mark.long
def test_a_wrong_chunk_is_reported_with_its_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute, drawn = soak.attempt, soak.inputs()
    noise = soak.inputs_of(soak.make_policy("tiny", num_vlm_layers=1, chunk_size=4), drawn[1])[1]["noise"]

    def wrong_on_one(policy: Any, batch: Any, **kwargs: Any) -> Any:
        found = compute(policy, batch, **kwargs)
        is_it = torch.equal(kwargs["noise"], noise) and hasattr(policy.model, "_smolvla_fast")
        return found + 1e-3 if is_it else found

    monkeypatch.setattr(soak, "attempt", wrong_on_one)
    assert soak.main(["--minutes", "5", "--chunks", "8", "--cases", "4", "--derandomize"]) == 1
    said = capsys.readouterr().out
    assert "chunks 8 of 8, mismatches 2" in said and said.count("mismatch, exact: ") == 1
    assert "'seed': 1" in said and "'seed': 0" not in said


def test_what_counts_as_growth() -> None:
    held = {"resident bytes": 2**30, "threads": 9, "file handles": 9}

    def grown(chunks: int, **more: int) -> list[str]:
        after = {name: held[name] + more.get(name.split()[0], 0) for name in held}
        return soak.grown(held, after, chunks)

    assert grown(136) == grown(136, resident=204 * 1024) == grown(9000, resident=2**22, threads=-1) == []
    assert grown(136, resident=136 * 8192) == grown(9000, resident=9000 * 1024) == ["resident bytes"]
    assert grown(9000, threads=1, file=1) == ["threads", "file handles"]
