"""`make ptxas`: what it writes is what is committed, and a hot kernel that spills or lost its instructions is red."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.compiled_tables import Key, read

from benchmarks import ROOT
from benchmarks.compiled import ptxas
from benchmarks.compiled.kernels import Kernel, markdown, parse_log, red
from benchmarks.compiled.ptxas import (
    compiler_version,
    disassembler,
    fences,
    in_loops,
    nvcc_compiler,
    readable,
)

COMMITTED = ROOT / "benchmarks" / "results" / "ptxas.md"
# The one the kernels are tuned on, and in the long run the oldest: half a minute each on a small machine.
ARCHS = ("80", "90a") if os.environ.get("SMOLVLA_FAST_LONG") else ("90a",)
KEY = ("denoise_persistent", "denoise_persistent_kernel<64>")
HOT = {"HMMA": 8, "LDGSTS": 2}


def needs_compiler() -> None:
    for program in (nvcc_compiler, disassembler):
        try:
            program()
        except Exception as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, dict[str, str]]:
    needs_compiler()
    out = tmp_path_factory.mktemp("ptxas") / "ptxas.md"
    command = [sys.executable, "-m", "benchmarks.compiled", "ptxas", "--targets", ",".join(ARCHS)]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return read(out.read_text())


@pytest.mark.long
def test_a_fresh_run_is_what_is_committed(fresh: dict[Key, dict[str, str]]) -> None:
    """All kernels, and of the architectures ARCHS; the run itself is red where a kernel spills or lacks instructions."""
    text = COMMITTED.read_text()
    if f"with {compiler_version()}," not in text:
        pytest.skip(f"the committed file is of another compiler than {compiler_version()}")
    wanted = {key: {arch: cells[arch] for arch in ARCHS} for key, cells in read(text).items()}
    assert fresh == wanted, "kernels have changed: run `make ptxas` and commit benchmarks/results/ptxas.md"


@pytest.mark.long
def test_hot_kernels_multiply_in_tensor_cores(fresh: dict[Key, dict[str, str]]) -> None:
    """As the text says it, whatever the script's own check makes of it."""
    hot = {key: cells for key, cells in fresh.items() if ptxas.EXPECTED[key[0]]}
    assert {key[0] for key in hot} == {"denoise_persistent", "masked_attention", "linear_residual"}
    for (source, column, _), cells in hot.items():
        for arch, cell in cells.items():
            if source == "linear_residual" and arch == "80":
                continue  # it has no clusters
            if column == "kernel":
                registers, spills, *_ = cell.split(" / ")
                assert 32 <= int(registers) <= 255 and spills == "0"
            else:
                assert "HMMA" in cell
                assert source == "masked_attention" or "LDGSTS" in cell or "UBLKCP" in cell


def test_the_committed_file_has_every_source_and_architecture() -> None:
    rows = read(COMMITTED.read_text())
    assert {key[0] for key in rows} == set(ptxas.names()) == ptxas.EXPECTED.keys()
    for source, column, kernel in rows:
        assert tuple(rows[source, column, kernel]) == ptxas.TARGETS
        assert "::" not in kernel and "(" not in kernel and "_kernel" in kernel


def test_limits() -> None:
    def lines(kernel: Kernel, key: tuple[str, str] = KEY) -> list[str]:
        return red(ptxas, {key: {"90a": kernel}})

    assert lines(Kernel(255, instructions=HOT)) == []
    assert lines(Kernel(255, instructions={"HMMA": 8, "UBLKCP": 2})) == []
    assert "sm_90a: 4 bytes spilled, allowed 0" in lines(Kernel(255, 4, instructions=HOT))[0]
    assert "no LDGSTS or UBLKCP in its loops" in lines(Kernel(255, instructions={"HMMA": 8}))[0]
    assert len(lines(Kernel(255))) == 2
    assert lines(Kernel(40), ("euler_step", "euler_step_fwd_kernel<float>")) == []
    assert lines(Kernel(40, 8), ("euler_step", "euler_step_fwd_kernel<float>"))
    assert lines(Kernel(40, instructions={"MEMBAR": 1}), ("euler_step", "euler_step_fwd_kernel<float>"))
    residual = ("linear_residual", "linear_residual_fwd_kernel<4>")
    assert len(lines(Kernel(40), residual)) == 3 and red(ptxas, {residual: {"89": Kernel(4)}}) == []
    assert "EXPECTED has no line" in lines(Kernel(40), ("new_op", "new_op_kernel"))[0]


def test_the_file_reads_back() -> None:
    rows = {KEY: {"80": Kernel(40, stack=16, instructions=HOT), "90a": Kernel(41, 8, 32)}}
    assert read(markdown(ptxas, rows, ["80", "90a"])) == {
        (KEY[0], "kernel", KEY[1]): {"80": "40 / 0 / 16 / 0", "90a": "41 / 8 / 0 / 32"},
        (KEY[0], "instructions", KEY[1]): {"80": "8 HMMA, 2 LDGSTS", "90a": "–"},
    }


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 64 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_the_log_is_read() -> None:
    assert parse_log(LOG) == {"_Z1aPf": Kernel(40, 12, 64, 16), "_Z1bPf": Kernel(8)}
    with pytest.raises(RuntimeError, match="ptxas says nothing of a kernel"):
        parse_log(LOG.replace("Used 8 registers", "used"))


def sass(*lines: str) -> str:
    return "".join(
        f"        /*{16 * i:04x}*/    {line} ;   /* 0x000000ff */\n" for i, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        (["HMMA.16816.F32 R0, R2, R4, R0", "EXIT", "BRA 0x20"], {}),
        (["HMMA.16816.F32 R0, R2, R4, R0", "@P0 BRA 0x0", "LDGSTS.E [R1], [R2]", "EXIT"], {"HMMA": 1}),
        (["LDSM.16.M88.4 R4, [R2]", "@!P0 EXIT", "HMMA R0, R2, R4, R0", "BRA 0x0"], {"HMMA": 1, "LDSM": 1}),
        # A block set aside behind the end leads back, and is no loop.
        (["@P0 BRA 0x30", "HMMA R0, R2, R4, R0", "EXIT", "MOV R0, R1", "BRA 0x10"], {}),
        (["HMMA R0, R2, R4, R0", "BRA.U UP0, 0x0", "LDGSTS.E [R1], [R2]", "EXIT"], {"HMMA": 1}),
        (["HMMA R0, R2, R4, R0", "@P0 BRA 0x0 &req={1} ?trans5", "EXIT"], {"HMMA": 1}),
        # Lanes that meet again where BSSY said go on in the loop.
        (["BSSY B0, 0x0", "LDGSTS.E [R1], [R2]", "BSYNC B0", "EXIT"], {"LDGSTS": 1}),
    ],
)  # fmt: skip
def test_instructions_are_counted_in_loops_alone(lines: list[str], counts: dict[str, int]) -> None:
    assert in_loops(sass(*lines)) == counts


def test_fences_of_a_block_are_not_counted() -> None:
    code = sass("MEMBAR.ALL.CTA", "MEMBAR.ALL.GPU", "@P0 MEMBAR.SC.GPU")
    assert fences(code) == {"MEMBAR": 2} and fences(sass("MEMBAR.ALL.CTA")) == {}


def test_names_are_readable() -> None:
    space = "_ZN7smolvla4cuda46_GLOBAL__N__d2fb6c8c_13_image_prep_cu_1ef5ef5c"
    try:
        got = readable(f"{space}21image_prep_fwd_kernelIhNS0_4fp16EEEvNS0_9ImagePrepEb")
    except FileNotFoundError:
        pytest.skip("no c++filt: install binutils")
    assert got == "image_prep_fwd_kernel<unsigned char, fp16>"
    assert readable("plain_kernel") == "plain_kernel"
