"""`make aot`: what it writes is what is committed, and what passes a limit is red."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.compiled_tables import Key, read

pytest.importorskip("triton")
import triton

from benchmarks.compiled import __main__ as compiled
from benchmarks.compiled import aot
from benchmarks.compiled.kernels import Kernel, markdown, red

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "aot.md"
# A subset that compiles in seconds; the norms, a product and what has no product, for two generations of tensor cores.
OPS, TARGETS = ("layer_norm", "euler_step", "linear_residual"), ("80", "90")
KEY = ("linear", "linear_fwd", "rows=50 inputs=720 outputs=32", "bf16")


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", "aot", *arguments],
        cwd=cwd, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, dict[str, str]]:
    """The subset compiled now, with the interpreter asked for as the rest of the suite has it: the script must not mind."""
    out = tmp_path_factory.mktemp("aot") / "aot.md"
    # One process beside the first: each imports torch, and the suite takes the other core.
    part = ["--only", ",".join(OPS), "--targets", ",".join(TARGETS), "--processes", "1"]
    done = run(*part, "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return read(out.read_text())


def committed() -> dict[Key, dict[str, str]]:
    text = COMMITTED.read_text()
    if f"Triton {triton.__version__} " not in text:
        pytest.skip(f"the committed file is of another Triton than {triton.__version__}")
    return read(text)


@pytest.mark.long
def test_a_fresh_run_is_what_is_committed(fresh: dict[Key, dict[str, str]]) -> None:
    assert {key[0] for key in fresh} == set(OPS)
    wanted = {key: {t: cells[t] for t in TARGETS} for key, cells in committed().items() if key[0] in OPS}
    assert fresh == wanted, (
        "kernels or tiles have changed: run `make aot` and commit benchmarks/results/aot.md"
    )


@pytest.mark.long
def test_every_way_of_calling_is_compiled(fresh: dict[Key, dict[str, str]]) -> None:
    """Cells are registers / spills / KiB; the residual stream is fp32 beside bf16 weights, and fp32 comes once."""
    dtypes = {key[4] for key in fresh if key[0] == "linear_residual"}
    assert dtypes == {"bf16; fp32: residual", "fp32", "fp8: weight"}
    ways = {key[3] for key in fresh if key[0] == "euler_step"}
    assert ways == {"B=1 S=50 E=720 A=32 (guided)", "B=1 S=50 E=720 A=32"}
    for key, cells in fresh.items():
        for target, cell in cells.items():
            if key[4].startswith("fp8") and int(target) < aot.FIRST_EIGHT_BITS:
                assert cell == "–"
                continue
            registers, spills, shared = cell.removesuffix(" *").split(" / ")
            assert 16 <= int(registers) <= 255 and int(spills) == 0 and 0 <= float(shared) <= 227


def test_the_committed_file_has_every_op_and_target() -> None:
    rows = committed()
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"common", "tuning", "__init__"}
    references = {path.stem for path in (ROOT / "smolvla_fast" / "ops" / "reference").glob("*.py")}
    assert {key[0] for key in rows} == kernels & references
    for key, cells in rows.items():
        assert tuple(cells) == aot.TARGETS
        for target, cell in cells.items():
            compiled = not key[4].startswith("fp8") or int(target) >= aot.FIRST_EIGHT_BITS
            assert " / " in cell if compiled else cell == "–", key


def test_limits() -> None:
    def lines(cell: Kernel | str, target: str = "86", op: str = "linear") -> list[str]:
        return red(aot, {(op, *KEY[1:]): {target: cell}})

    assert lines(Kernel(255, 0, 99 * 1024)) == []
    assert "4 bytes spilled, allowed 0" in lines(Kernel(255, 4))[0]
    bound, reason = aot.SPILLS["norm_swiglu"]
    assert reason and lines(Kernel(255, bound), op="norm_swiglu") == []
    assert lines(Kernel(255, bound + 4), op="norm_swiglu")
    over = Kernel(64, shared=99 * 1024 + 1)
    assert "101377 bytes of shared memory, allowed 101376" in lines(over)[0]
    assert lines(over, target="80") == []
    assert "513 columns of tensor memory" in lines(Kernel(64, tensor=513), target="100")[0]
    assert "sm_86: does not compile: CompilationError: no" in lines("CompilationError: no")[0]
    (line,) = lines(Kernel(64, serialized=True), target="90")
    assert line.startswith(f"{', '.join(KEY)}, sm_90: ptxas serialized wgmma")


PLANTED = """
from benchmarks.compiled import aot, kernels
from smolvla_fast.kernels import linear

kept = "tl.assume(start < stop)"
assert kept in linear.product.src
linear.product._unsafe_update_src(linear.product.src.replace(kept, "pass"))
rows = aot.compile_task(("linear", dict(rows=2048, inputs=768, outputs=3072), ("90",)))
print(*kernels.red(aot, rows), sep="\\n")
"""


@pytest.mark.long
def test_a_loop_that_may_not_run_is_red() -> None:
    """Nothing but the assumption of ``product`` keeps ptxas from serializing it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", PLANTED],
        cwd=ROOT, text=True, capture_output=True, env={**environment, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert (
        line
        == f"linear, linear_fwd, rows=2048 inputs=768 outputs=3072 (gelu_tanh), bf16, sm_90: {aot.SERIALIZED}"
    )


def test_the_file_reads_back() -> None:
    rows = {KEY: {"80": Kernel(40, 0, 2048), "90": Kernel(41, 8, 1024, serialized=True)}}
    key = (KEY[0], "kernel", *KEY[1:])
    assert read(markdown(aot, rows, ("80", "90"))) == {key: {"80": "40 / 0 / 2.0", "90": "41 / 8 / 1.0 *"}}
    broken = markdown(aot, {KEY: {"80": "CompilationError: no"}}, ("80", "90"))
    assert read(broken) == {key: {"80": "does not compile", "90": "–"}}


def test_a_part_never_replaces_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    before = COMMITTED.read_text()
    for arguments, reason in (
        (["--only", "layer_norm"], "a part would replace the whole file"),
        (
            ["--only", "layer_nrom", "--out", os.devnull],
            "no such name or target: layer_nrom; names are attention, ",
        ),
        (["--targets", "91", "--out", os.devnull], "no such name or target: 91; "),
    ):
        with pytest.raises(SystemExit, match="2"):
            compiled.main(["aot", *arguments])
        assert reason in capsys.readouterr().err
    assert COMMITTED.read_text() == before


def test_what_does_not_compile_is_a_row_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(op: str, inputs: object) -> None:
        raise ValueError(f"{op}: rows of 20000 columns do not fit\nand more")

    monkeypatch.setattr(aot, "call", call)
    rows = aot.compile_task(("euler_step", dict(B=1, S=2, E=8, A=4), ("90",)))
    assert {key[2] for key in rows} == {"B=1 S=2 E=8 A=4 (guided)", "B=1 S=2 E=8 A=4"}
    wrong = red(aot, rows)
    assert len(wrong) == len(rows)
    assert all("sm_90: does not compile: ValueError: euler_step: rows of 20000" in line for line in wrong)
    assert "does not compile" in markdown(aot, rows, ("90",))
