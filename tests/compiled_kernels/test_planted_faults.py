"""Faults planted into what Triton emits: the machine finds each, and says in which kernel and at which line."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import pytest
from support import triton_by

pytest.importorskip("triton")
if not triton_by.CAPABILITY:
    pytest.skip("the machine of tests/simt/ptx does not run here", allow_module_level=True)
import torch
from simt.ptx import calls, launcher, program
from support.contract import run
from support.gemms import inputs_of

from smolvla_fast.ops.choice import choose
from smolvla_fast.ops.select import backend_ops

pytestmark = pytest.mark.compiled_kernels
Change = Callable[[str], str]


def call(op: str, capability: int, dtypes: str, label: str = "", **sizes: int) -> calls.Call:
    for each in calls.calls(capability):
        alike = (each.op, each.dtypes.partition(";")[0], each.label) == (op, dtypes, label)
        if alike and sizes.items() <= dict(each.case).items():
            return each
    raise KeyError((op, capability, dtypes, label, sizes))


right = cache(calls.judged)
"""Once a call, however many faults are planted into it. Calls of sm_90 are held right by test_compiled_contract.py."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[calls.Call, Change], str]:
    """What is said of a call whose PTX was changed; it has to have been, and to be right without."""

    def judge(each: calls.Call, change: Change) -> str:
        assert each.capability == 90 or right(each)
        changed = []

        def rewrite(text: str) -> str:
            changed.append(change(text))
            assert changed[-1] != text, "nothing was planted"
            return changed[-1]

        monkeypatch.setattr(launcher, "rewrite", rewrite)
        with pytest.raises((RuntimeError, AssertionError)) as found:
            calls.judged(each)
        monkeypatch.setattr(launcher, "rewrite", None)
        return str(found.value)

    return judge


def without(pattern: str, number: int = 0) -> Change:
    """Leaves out the instruction that matches, counted from 0; -1: the last."""

    def change(text: str) -> str:
        place = list(re.finditer(pattern, text, re.MULTILINE))[number]
        return text[: place.start()] + text[place.end() :]

    return change


def instead(pattern: str, other: str, number: int = 0) -> Change:
    def change(text: str) -> str:
        place = list(re.finditer(pattern, text, re.MULTILINE))[number]
        return text[: place.start()] + place.expand(other) + text[place.end() :]

    return change


RESIDUAL = dict(rows=50, inputs=2048)
PLACE = r"_fwd, block \(\d+,\d+,\d+\) thread \(\d+,\d+,\d+\) at line \d+ \(\w+\.py:\d+\): [@\w]"


@pytest.mark.parametrize(("capability", "least"), [pytest.param(80, 14, marks=pytest.mark.long), (90, 6)])
def test_each_barrier_left_out(planted: Callable[..., str], capability: int, least: int) -> None:
    """All but the first two, which stand before anything was read of what the prologue fills, and are not needed."""
    op, barrier = call("linear_residual", capability, "bf16", **RESIDUAL), r"^\tbar\.sync \t0;$"
    found = []
    for number in range(2, 20):
        with suppress(IndexError):  # there are fewer
            found.append(planted(op, without(barrier, number)))
    assert len(found) >= least
    for said in found:
        assert re.search(PLACE, said) and re.search("race at|still under way|unwritten", said)


def test_a_fence_before_wgmma_left_out(planted: Callable[..., str]) -> None:
    """What ordinary stores have written is not to be seen by a wgmma without it."""
    fence = r"^\s*fence\.proxy\.async\.shared::cta;$"
    said = planted(call("attention", 90, "bf16", N=2), without(fence))
    assert re.search(PLACE, said) and "without a fence.proxy.async" in said


def test_a_launch_that_does_not_wait_for_the_one_ahead(planted: Callable[..., str]) -> None:
    """It may begin while that one still runs (programmatic dependent launch)."""
    each = next(
        each for each in calls.calls(90) if each.op == "layer_norm" and each.dtypes.startswith("bf16")
    )
    said = planted(each, without(r"griddepcontrol\.wait;"))
    assert re.search(PLACE, said) and "before griddepcontrol.wait" in said


def test_a_launch_that_lets_the_next_one_begin_before_it_waits(planted: Callable[..., str]) -> None:
    """Then launches wait one behind the other in places of those that run."""
    early = instead(r"(griddepcontrol\.wait;)", r"griddepcontrol.launch_dependents;\n\t\1")
    said = planted(call("linear_residual", 90, "bf16", **RESIDUAL), early)
    assert re.search(PLACE, said) and "the next grid may begin before griddepcontrol.wait" in said


def test_a_weight_prefetched_past_its_end(planted: Callable[..., str]) -> None:
    change = instead(r"prefetch\.global\.L2 \[(%rd\d+)\]", r"prefetch.global.L2 [\1+67108864]")
    said = planted(call("linear_residual", 90, "bf16", **RESIDUAL), change)
    assert re.search(PLACE, said) and "out-of-bounds prefetch" in said


def test_a_vector_that_is_not_aligned(planted: Callable[..., str]) -> None:
    change = instead(r"(ld\.global\.cg\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+) 0 \]", r"\1 4 ]")
    said = planted(call("linear_residual", 80, "bf16", **RESIDUAL), change)
    assert re.search(PLACE, said) and "misaligned" in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r"^\tbar\.sync \t0;$", "\tbar.arrive \t0, 128;", "unknown instruction bar.arrive"),
        (r"^\tbar\.sync \t0;$", "\tmov.b32 %r1, elsewhere;", "unknown"),
        (r"(\[_linear_residual_fwd_param_0)\]", r"\1+4]", "a part of a parameter"),
    ],
)
def test_what_the_machine_does_not_know(old: str, new: str, words: str) -> None:
    each = call("linear_residual", 80, "bf16", **RESIDUAL)
    launcher.rewrite = instead(old, new)
    try:
        with pytest.raises(program.Unknown, match=rf"^_linear_residual_fwd, line \d+: {re.escape(words)}"):
            calls.judged(each)
    finally:
        launcher.rewrite = None


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", ["linear_residual", "norm_swiglu"])
def test_a_wait_for_one_copy_too_few(planted: Callable[..., str], op: str, capability: int) -> None:
    def change(text: str) -> str:
        return re.sub(
            r"cp\.async\.wait_group \t(\d+)",
            lambda m: f"cp.async.wait_group \t{int(m[1]) + 1}",
            text,
            count=1,
        )

    said = planted(call(op, capability, "bf16", rows=50), change)
    assert re.search(PLACE, said) and re.search("still under way|race at|unwritten", said)


@pytest.mark.parametrize("op", ["attention", "linear"])
def test_a_wait_for_a_wgmma_left_out(planted: Callable[..., str], op: str) -> None:
    sizes = dict(N=2) if op == "attention" else dict(outputs=3072)
    label = "gelu_tanh" if op == "linear" else ""
    said = planted(
        call(op, 90, "bf16", label, **sizes), without(r"^\s*wgmma\.wait_group\.sync\.aligned \d+;$", -1)
    )
    assert re.search(PLACE, said) and "wgmma" in said and "waited for" in said


def test_a_load_past_the_end() -> None:
    """By one element, of the last row."""
    change = instead(r"(ld\.global\.b16 \{ %rs\d+ \}, \[ %rd\d+ \+) 0 \]", r"\1 2 ]")
    inputs = inputs_of("layer_norm", torch.bfloat16, dict(rows=3, width=31))
    assert_found(
        inputs, "layer_norm", change, r"out-of-bounds global read of 2 bytes .* 2 bytes past the end"
    )


def test_a_mask_left_out() -> None:
    change = instead(r"@%p\d+ (ld\.global\.b16)", r"\1")
    inputs = inputs_of("layer_norm", torch.bfloat16, dict(rows=3, width=31))
    assert_found(inputs, "layer_norm", change, "out-of-bounds global read")


def assert_found(inputs: dict[str, object], op: str, change: Change, words: str) -> None:
    """At an odd size, which leaves lanes without an element."""
    ops = choose(backend_ops("triton"), torch.device("cpu"), "triton", None)
    run(ops, op, inputs)
    launcher.rewrite = change
    try:
        with pytest.raises(RuntimeError, match=words) as found:
            run(ops, op, inputs)
    finally:
        launcher.rewrite = None
    assert re.search(PLACE, str(found.value))


SWIZZLE = r"(xor\.b32 \t%r\d+, %r\d+), \d+;"


@pytest.mark.parametrize(
    ("capability", "number", "words"), [(80, 4, "race at"), (90, 0, "is still under way")]
)
def test_a_wrong_bit_in_a_swizzle(
    planted: Callable[..., str], capability: int, number: int, words: str
) -> None:
    """Two lanes store at one place; one reads where a copy has not arrived."""
    op = call("linear_residual", capability, "bf16", **RESIDUAL)
    said = planted(op, instead(SWIZZLE, r"\1, 128;", number))
    assert re.search(PLACE, said) and words in said


@pytest.mark.parametrize(("capability", "number"), [(80, 0), (80, 3), (90, 4)])
def test_a_wrong_bit_where_another_wrote_in_order(
    planted: Callable[..., str], capability: int, number: int
) -> None:
    """A load finds what was stored there lawfully: nothing but the numbers is wrong, and they have no line."""
    op = call("linear_residual", capability, "bf16", **RESIDUAL)
    assert "y is off by" in planted(op, instead(SWIZZLE, r"\1, 128;", number))


def test_a_counter_that_is_not_released(planted: Callable[..., str]) -> None:
    """The part that comes last adds up what the others have stored: nothing orders that after their stores."""
    op = call("linear_residual", 80, "bf16", **RESIDUAL)
    said = planted(op, instead(r"atom\.global\.gpu\.acq_rel\.add", "atom.global.gpu.relaxed.add"))
    assert re.search(PLACE, said) and "race at" in said


def test_a_counter_that_is_not_put_back(planted: Callable[..., str]) -> None:
    """The next launch would count on: nobody comes last, and its output stays unwritten."""
    store = r"^\t@%p\d+ st\.global\.b32 \[ %rd\d+ \+ 0 \], \{ %r\d+ \};$"
    said = planted(call("linear_residual", 80, "bf16", **RESIDUAL), without(store, -1))
    assert re.search(
        r"_fwd at line \d+ \(common\.py:\d+\): .*atom\.global.*: a counter that was 0 before", said
    )
