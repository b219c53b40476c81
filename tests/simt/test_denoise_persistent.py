"""The denoise loop in one launch, run whole on the emulator, against the plain loop over the references.

The bound is the repository's: the worst error against fp64 is at most twice that of eager torch, which is here the same
loop by references, or by torch's fused calls where stock itself does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import denoise_loop as reference
from support.contract import mapped
from support.guarded import guarded
from torch import Tensor

from smolvla_fast.model.kv_cache import LayerKV
from smolvla_fast.ops import select as backends
from smolvla_fast.ops.cuda.denoise_persistent import denoise_persistent, why_not_persistent
from smolvla_fast.stages.denoise import denoise

TINY = reference.CASES[-1]
SHARED = 101376  # of sm_86, 89 and 120
# What each is there for: more than one row block; heads of 64 and grouped queries; k beyond the 256 that the 8 warps
# take in one turn, with a tail; a single token and layer.
CASES = {
    "tiny": TINY,
    "all cross": {**TINY, "B": 1, "Y": 0, "G": 0},
    "all self": {**TINY, "Y": 1, "L": 2, "G": 0},
    "every third self": {**TINY, "Y": 3, "L": 4, "B": 1, "N": 2},
    "two row blocks": {**TINY, "S": 40, "L": 2, "N": 2},
    "head of 64": {**TINY, "B": 1, "H": 4, "K": 2, "D": 64, "E": 72, "F": 104, "L": 2, "N": 2},
    "wide": {**TINY, "B": 1, "D": 32, "E": 296, "F": 328, "L": 2, "N": 1, "A": 33},
    "one token": {**TINY, "B": 1, "S": 1, "L": 1, "N": 1, "P": 1, "Z": 0},
}


def inputs(case: dict[str, int], seed: int = 0) -> dict[str, Any]:
    return reference.make_inputs(case, torch.bfloat16, torch.Generator().manual_seed(seed))


def ours(given: dict[str, Any]) -> Tensor:
    """The loop on clones of the inputs, with guards around what it allocates."""
    given = mapped(given, Tensor.clone)
    before = mapped(given, Tensor.clone)
    x = guarded(denoise_persistent, "cpu")(**given)
    assert torch.equal(given["noise"].nan_to_num(7), before["noise"].nan_to_num(7)), "noise was written to"
    prefix = given["kv"].pad_masks.shape[1]
    for layer, cache, old in zip(given["expert"], given["kv"].layers, before["kv"].layers, strict=True):
        assert torch.equal(cache.k[:, :prefix], old.k[:, :prefix]), "keys of the prefix were written to"
        assert torch.equal(cache.v[:, :prefix], old.v[:, :prefix]), "values of the prefix were written to"
        if not (layer.cross or given["noise"].isnan().any()):
            assert not (cache.k.isnan().any() or cache.v.isnan().any()), "a slot is unwritten"
    return x


def errors(given: dict[str, Any], eager: Callable[..., Tensor]) -> tuple[float, float]:
    """Worst error of ours and of eager against fp64."""
    truth = reference.denoise_persistent(**mapped(given, Tensor.double))
    plain = eager(**mapped(given, Tensor.clone))
    mine = ours(given)
    assert mine.dtype is torch.float32 and mine.shape == given["noise"].shape
    error, bound = ((x.double() - truth).abs().max().item() for x in (mine, plain))
    print(f"error {error:.3g}, eager {bound:.3g}, largest {truth.abs().max().item():.3g}")
    return error, bound


def torch_loop(**given: Any) -> Tensor:
    """The loop by torch's fused calls: where stock fails, on heads in bf16."""
    order = ("dims", "expert", "heads", "kv", "noise", "times", "guidance")
    return denoise(backends.backend_ops("torch"), *(given[name] for name in order))[0]


@pytest.mark.parametrize("name", CASES)
def test_loop(emulator: Any, name: str) -> None:
    error, bound = errors(inputs(CASES[name]), reference.denoise_persistent)
    assert error <= 2 * bound


@pytest.fixture(autouse=True)
def _device(emulator: Any) -> None:
    """The smallest shared memory that is served; a number of multiprocessors that divides no number of units."""
    emulator.configure(seed=1, multiprocessors=5, shared_bytes_per_block=SHARED)


def test_equal_bits_on_every_schedule_and_grid(emulator: Any) -> None:
    """On any number of blocks as well, down to one that has every unit: a sum knows no block."""
    given = inputs(TINY)
    want = ours(given)
    for change in (dict(seed=2), dict(seed=3), dict(multiprocessors=1), dict(multiprocessors=8)):
        emulator.configure(**{"seed": 1, "multiprocessors": 5, **change})
        assert torch.equal(ours(given), want), change


def test_equal_bits_with_every_depth_of_the_ring(emulator: Any) -> None:
    """Slabs of many sizes that wrap around, skip the end and wait for each other."""
    given = inputs(CASES["head of 64"])
    want = ours(given)
    for slabs in (1.0, 1.3, 1.6, 2.0, 2.5, 3.1):
        emulator.configure(
            seed=1, multiprocessors=5, shared_bytes_per_block=_shared_for(emulator, given, slabs)
        )
        assert torch.equal(ours(given), want), slabs
        emulator.configure(shared_bytes_per_block=SHARED)


def _shared_for(emulator: Any, given: dict[str, Any], slabs: float) -> int:
    """Shared memory in whose ring so many of the largest slabs fit."""
    found = emulator.denoise_resources(sizes_of(given))
    ring = int(-(-slabs * found["largest_slab"] // 128)) * 128
    return found["shared_bytes"] - found["ring_bytes"] + ring


def sizes_of(given: dict[str, Any]) -> list[int]:
    from smolvla_fast.ops.cuda import denoise_persistent as module

    names = ("dims", "expert", "heads", "kv", "noise", "times")
    return module._sizes(*(given[name] for name in names))


def narrow(given: dict[str, Any]) -> dict[str, Any]:
    """All of the checkpoint in bf16: heads and the caches of cross layers too. What is no parameter stays fp32."""
    bf16 = mapped([given["expert"], given["heads"], given["kv"].layers], lambda x: x.to(torch.bfloat16))
    return {**given, "expert": bf16[0], "heads": bf16[1], "kv": replace(given["kv"], layers=bf16[2])}


def test_all_in_bf16(emulator: Any) -> None:
    error, bound = errors(narrow(inputs(TINY)), torch_loop)
    assert error <= 2 * bound


def test_norms_and_caches_in_fp32(emulator: Any) -> None:
    """As of an fp32 checkpoint whose matrices alone were cast."""
    given = inputs(TINY)
    given["expert"] = [
        replace(
            layer,
            norm1=layer.norm1._replace(weight=layer.norm1.weight.float() * 1.001),
            norm2=layer.norm2._replace(weight=layer.norm2.weight.float() * 1.001),
        )
        for layer in given["expert"]
    ]
    layers = mapped(given["kv"].layers, lambda x: x.float() * 1.001)
    given["kv"] = replace(given["kv"], layers=layers)
    error, bound = errors(given, torch_loop)
    assert error <= 2 * bound


def heads_error() -> float:
    """Worst error relative to the largest result, where layers add nothing and leave the fp32 heads alone."""
    given = inputs(TINY)
    given["expert"] = [
        replace(layer, o=torch.zeros_like(layer.o), down=torch.zeros_like(layer.down))
        for layer in given["expert"]
    ]
    truth = reference.denoise_persistent(**mapped(given, Tensor.double))
    return ((ours(given).double() - truth).abs().max() / truth.abs().max()).item()


# 2^-16 of each product of mlp_out is left out; their errors add up over 48 terms and 3 steps at random. bf16 alone, in any
# operand of any head, makes 2^-9.
HEADS_BOUND = 2**-13


def test_fp32_heads_keep_their_precision(emulator: Any) -> None:
    assert heads_error() <= HEADS_BOUND


def test_masked_keys_do_not_count(emulator: Any) -> None:
    given = inputs(TINY)
    want = ours(given)
    hidden = ~given["kv"].pad_masks
    assert hidden.any()
    for cache in given["kv"].layers:
        for values in (cache.k, cache.v):
            values[:, : hidden.shape[1]][hidden] = 100.0
    assert torch.equal(ours(given), want)


def test_nan_stays_in_its_sample(emulator: Any) -> None:
    given = inputs(TINY)
    want = ours(given)
    given["noise"][0, 0, 0] = torch.nan
    got = ours(given)
    assert got[0].isnan().all()
    assert torch.equal(got[1], want[1])


def test_guidance_of_no_weight_is_none(emulator: Any) -> None:
    given = inputs(TINY)
    guided = ours(given)
    free = ours({**given, "guidance": None})
    assert not torch.equal(guided, free)
    off = given["guidance"]._replace(strengths=torch.zeros_like(given["guidance"].strengths))
    assert torch.equal(ours({**given, "guidance": off}), free)
    # One chunk for all samples, as the first chunk of a batch is handed over.
    shared = given["guidance"]._replace(previous=given["guidance"].previous[:1])
    both = given["guidance"]._replace(previous=shared.previous.expand(2, -1, -1).contiguous())
    assert torch.equal(ours({**given, "guidance": shared}), ours({**given, "guidance": both}))


def test_barriers_are_as_the_page_says(emulator: Any) -> None:
    given = inputs(TINY)
    found = emulator.denoise_resources(sizes_of(given))
    assert found["counter_barriers"] == TINY["N"] * (2 + 5 * TINY["L"])
    assert found["blocks"] == 5 and found["ring_bytes"] >= found["largest_slab"]


def _with(given: dict[str, Any], index: int, **change: Any) -> dict[str, Any]:
    expert = list(given["expert"])
    expert[index] = replace(expert[index], **change)
    return {**given, "expert": expert}


def test_reasons(emulator: Any) -> None:
    def reason(given: dict[str, Any]) -> str:
        found = why_not_persistent(**given)
        assert found is not None
        with pytest.raises(ValueError, match="denoise_persistent: "):
            denoise_persistent(**given)
        return found

    given = inputs(TINY)
    assert why_not_persistent(**given) is None
    big = {"B": 9, "S": 65, "P": 321, "A": 65, "L": 33, "D": 80}
    names = ("batch", "suffix", "prefix", "actions", "layers", "head_dim")
    for (letter, size), name in zip(big.items(), names, strict=True):
        assert reason(inputs({**TINY, letter: size})) == (
            f"{name} is {size}; accepted are 1 to {big[letter] - 1 if letter != 'D' else 64}"
        )
    assert "multiples of 16" in reason(inputs({**TINY, "D": 24}))
    assert "multiples of 8" in reason(inputs({**TINY, "E": 36}))
    layer = given["expert"][1]
    assert (
        reason(_with(given, 1, gate=layer.gate.float())) == "gate of layer 1 is float32; accepted: bfloat16"
    )
    assert "down of layer 1 has shape" in reason(_with(given, 1, down=layer.down[:-8]))
    assert "is quantised" in reason(_with(given, 1, q=(layer.q, layer.q)))
    assert "are quantised" in reason(_with(given, 0, gate=(layer.gate, layer.gate)))
    assert ".contiguous()" in reason(_with(given, 1, o=layer.o.t().contiguous().t()))
    shifted = torch.cat([layer.up.flatten()[:4], layer.up.flatten()])[4:].view_as(layer.up)
    assert "multiple of 16 bytes" in reason(_with(given, 1, up=shifted))
    caches = [LayerKV(c.k.half(), c.v.half()) for c in given["kv"].layers]
    assert "cache of layer 0 is float16" in reason({**given, "kv": replace(given["kv"], layers=caches)})
    assert "there are 0 steps" in reason({**given, "times": given["times"][:0]})
    # Of all these torch's own part of the call would make something, and the kernel would read it wrongly.
    assert "times has shape [3, 1, 48]" in reason({**given, "times": given["times"][:, :1]})
    rotated = mapped(given["kv"].cross, Tensor.double)
    assert "suffix's rotation is float64" in reason({**given, "kv": replace(given["kv"], cross=rotated)})
    for kind in (torch.int64, torch.float32):
        masks = replace(given["kv"], pad_masks=given["kv"].pad_masks.to(kind))
        assert "kv.pad_masks is " in reason({**given, "kv": masks})
    narrow_in = given["heads"].action_in._replace(weight=given["heads"].action_in.weight[:, :-1])
    assert "action_in's weight has shape [48, 4]" in reason(
        {**given, "heads": replace(given["heads"], action_in=narrow_in)}
    )
    emulator.configure(cooperative=False)
    assert "no cooperative launches" in reason(given)
    emulator.configure(cooperative=True)
    emulator.configure(shared_bytes_per_block=_shared_for(emulator, given, 1.0) - 128)
    assert "shared memory takes" in reason(given)


def test_guidance_of_another_shape(emulator: Any) -> None:
    given = inputs(TINY)
    short = given["guidance"]._replace(strengths=given["guidance"].strengths[:-1])
    with pytest.raises(ValueError, match="guidance.strengths has shape"):
        denoise_persistent(**{**given, "guidance": short})
