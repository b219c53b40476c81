"""What a machine has: the tools that `doctor` shows."""

from __future__ import annotations

from pathlib import Path

import ninja_build
import pytest

from smolvla_fast.measure import system


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "CUDA_PATH"])
def test_doctor_and_build_find_the_same_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.5\n")
    program.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "SMOLVLA_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(place, str(program.parent if place == "PATH" else tmp_path))
    assert system.nvcc() == "Cuda compilation tools, release 99.5"
    assert ninja_build.nvcc_compiler() == str(program)
    # The last place is a fixed folder, which a test cannot fill: that both look there is seen in the lists alone.
    assert system.cuda_homes() == ninja_build.cuda_homes()
    assert ninja_build.cuda_homes()[-1] == "/usr/local/cuda"


def test_a_machine_is_busy_where_load_and_cores_say_so() -> None:
    assert "load 1.5 on 2 cores" in str(system.busy({"load": 1.5, "cores": 2}))
    for load, cores in ((1.0, 2), (None, 2), (1.5, None)):
        assert system.busy({"load": load, "cores": cores}) is None
