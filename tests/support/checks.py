"""The 63 acceptance checks: what each promises, which tests prove it, and where: CPU, GPU, or the recording graph driver.

A test says by ``@pytest.mark.check(number)`` which checks it proves. ``places`` reads that from the sources, so that the
table in docs/acceptance.md (``make acceptance``) is made in a second and without importing a test.
"""

# One promise a line, however long.
# ruff: noqa: E501

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs" / "acceptance.md"
CPU, DRIVER, GPU = "CPU", "recording driver", "GPU"

GROUPS: dict[str, dict[int, str]] = {
    "Install, import, status": {
        1: "`import smolvla_fast` needs no CUDA, Triton, LeRobot or Unix; under 1 s beyond torch; no CUDA context, thread, process, network or written file",
        2: "`patch(policy)` returns the same policy and says exactly one line: what is on, what is not and why",
        3: "`status` tells tier, backend, stages, graphs, bytes, calls served fast and by stock, the last reason; `doctor` agrees with it",
        4: "Whatever serves: `exact` has stock's bits, a fallback has stock's bits and is said once, a missing Triton or an old GPU changes neither",
        5: "`SMOLVLA_FAST_DISABLE=1` switches all of it off, before or after `patch`",
        6: "No global state moves: TF32, matmul precision, cudnn, default dtype, threads, random state, grad mode, warnings, logging",
        7: "An unknown LeRobot source is named and runs stock until its trial, which returns stock's chunk, has found it equal and not slower; with `trial=False` for good",
    },
    "Identity and reversal": {
        8: "`unpatch` restores class, attributes, signatures and bits, and frees graphs",
        9: "`patch` twice is once; patch, unpatch, patch works; `unpatch` of an unpatched policy is nothing",
        10: "`isinstance`, `name`, `config_class`, `supports_rtc()` and signatures are unchanged",
        11: "`state_dict` keys, order, dtypes, storage, and named parameters, modules and buffers are unchanged",
        12: "`save_pretrained` writes the same bytes",
        13: "Such a save loads and runs where smolvla_fast is not installed",
        14: "Only the patched object changes; two patched policies interleave without mixing",
        15: "`copy.copy` and `reset()`: the copy has a queue of its own and is right",
        16: "`deepcopy` (with shared parameters too), `pickle`, `torch.save`: copies are right, apart, and have no stale graphs",
        17: "A PeftModel is patched; unmerged LoRA runs stock and is not ignored; merged weights are used",
        18: "A subclass or an instance that overrides what the engine replaces runs stock, with a message",
        19: "A forward hook or replaced submodule is found, before and after `patch`; stock runs, with one message",
    },
    "Queue and outputs": {
        20: "After `reset()` one `select_action` in `n_action_steps` runs the model; `reset()` empties the queue",
        21: "A chunk that is kept, and the queue of views of it, do not change when another is computed, in any thread",
        22: "Chunks are [B, chunk, action] fp32, on the policy's device, without grad, writable, and inference tensors only where stock's are",
        23: "The batch is not changed (but for Aloha's state) and no reference to its tensors is kept",
        24: "The caller's `noise` is not changed",
    },
    "Numerics": {
        25: "`noise=` is honoured by `select_action`, `predict_action_chunk` and `sample_actions`, and draws no random numbers",
        26: "The same seed gives stock's noise and leaves stock's random state",
        27: "fp32: at most 5e-3 from stock in normalised units, and relative L2 1e-5; on tails at most twice stock's own error, on sharp attention in its order of magnitude",
        28: "The default of a mixed policy: over 100 observations no further from fp32 than stock in bf16; worst cases on tails and sharp attention too",
        29: "The error grows with the number of steps no faster than stock's own",
        30: "Every dtype layout and autocast in fp16 and bf16: right, or stock",
        31: "NaN or Inf in: NaN or Inf out, and the next call is clean",
        32: "LIBERO success over 50 episodes a suite is that of stock",
        33: "Padding of the language changes nothing; up to 120 tokens, mixed in a batch, are right and never cut",
        34: "Position ids of the vision tower are the live module's",
    },
    "Changes after patch": {
        35: "`config.num_steps` takes effect at the next call",
        36: "`config.rtc_config` with `init_rtc_processor()`, and `enabled` flipped between calls, take effect",
        37: "`load_state_dict`, an optimizer step, `copy_`: the next chunk is of the new weights",
        38: "`param.data.copy_`, as an EMA swap does: the same",
        39: "Parameters replaced or moved, `.float()`, `.to(bf16)`, another device: graphs go; right, or stock's error",
        40: "`train()`: stock's loss and gradients, bit for bit; and back",
        41: "Autograd through `model.sample_actions` runs stock",
        42: "Batch 1, 8, 1, a ragged last one: each right, and the second visit captures nothing",
        43: "Cameras that come and go, `empty_cameras`, padding masks, 5-D images: right; no camera: stock's ValueError",
        44: "A prompt of another length captures nothing anew, and its latency is that of the others",
    },
    "Threads, RTC, graphs": {
        45: "Patched in one thread and run in another; captured in one worker and replayed in the next",
        46: "`reset()` in the main thread during inference: no crash, no lock-up, no torn state",
        47: "Four threads on one policy each get their own right answer",
        48: "Another thread or model that uses the GPU during a capture: both survive, or stock runs",
        49: "RTC: what is left may be None, 2-D, 3-D, shorter, longer, narrower; delays, schedules, weights: as in stock",
        50: "RTC without `inference_delay` raises as in stock; the debug tracker runs stock with full records",
        51: "Under `inference_mode`, `no_grad` or neither, and on any stream: right, and ordered on the caller's",
        52: "`torch.compile(policy.predict_action_chunk)` works; `compile_model=True` runs stock and says so",
        53: "Out of memory, or any error, in a capture: caught, memory returned, stock runs, said once, in `status`",
        54: "Graphs are few and their bytes are reported; `unpatch` and `del` give memory back",
        55: "A policy on `cuda:1` while the current device is 0",
        56: "A forked or spawned process uses no graph of its parent",
    },
    "Speed claims": {
        57: "After `patch(policy, warmup=True)` nothing is compiled or captured any more; the next call is within 1.5 x p50",
        58: "Warm-up time and its split are said; no hold of the GIL above 250 ms where avoidable",
        59: "p99 / p50 at most 1.2 over 1000 calls",
        60: "Faster than LeRobot eager and compiled, or docs/figures.md says where not",
        61: "Memory beyond stock's is reported, and at most 10 % of the weights by default",
        62: "The benchmark is one command and writes JSON with versions, machine, cameras, steps, dtype",
        63: "`lerobot-rollout`, `lerobot-eval` and the policy server run accelerated with no code edit",
    },
}  # fmt: skip
STATEMENTS = {number: text for group in GROUPS.values() for number, text in group.items()}

NOT_SHOWN = {
    28: "the distance between stock and stock under `torch.compile` is not measured: the bound here is stock's own loss in bf16; observations are drawn and weights random, so 5e-2 and cosine 0.9995, which stock itself misses on them, are not asked",
    32: "not measured: it needs trained weights and the LIBERO simulator",
    44: "latency on a GPU: not measured",
    48: "on a GPU: not measured",
    55: "not measured: it needs two GPUs",
    57: "latency on a GPU: not measured",
    58: "the hold of the GIL on a GPU and on a Jetson: not measured",
    59: "on a GPU: not measured",
    60: "on a GPU eager was measured, compiled was not; on a CPU compiled was measured on one processor",
    61: "peak memory on a GPU: not measured",
}
"""What of a check nothing here shows, with the reason."""

NO_TEST = {32: NOT_SHOWN[32]}
"""Checks that no test of this repository can prove."""

_GRAPH_FIXTURES = {"recording"}


@dataclass(frozen=True)
class Place:
    """One test of a check. where: CPU, GPU or the recording driver."""

    number: int
    path: str
    test: str
    where: str


def where(gpu: bool, fixtures: Iterable[str]) -> str:
    return GPU if gpu else DRIVER if _GRAPH_FIXTURES & set(fixtures) else CPU


def _names(marks: Iterable[ast.expr]) -> Iterator[tuple[str, tuple[object, ...]]]:
    """(name, constant arguments) of every ``pytest.mark.<name>`` among expressions."""
    for mark in marks:
        call = mark if isinstance(mark, ast.Call) else None
        node = call.func if call else mark
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark":
            arguments = call.args if call else []
            yield node.attr, tuple(each.value for each in arguments if isinstance(each, ast.Constant))


def _module_marks(tree: ast.Module) -> list[ast.expr]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return node.value.elts if isinstance(node.value, ast.List) else [node.value]
    return []


def places() -> list[Place]:
    """Every test that is marked with a check, in the order of checks and files."""
    found: list[Place] = []
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(TESTS.parent).as_posix()
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            marks = list(_names([*_module_marks(tree), *node.decorator_list]))
            fixtures = {each.arg for each in node.args.args}
            fixtures.update(str(x) for mark, given in marks if mark == "usefixtures" for x in given)
            place = where(any(mark == "gpu" for mark, _ in marks), fixtures)
            numbers = {int(str(x)) for mark, given in marks if mark == "check" for x in given}
            for number in sorted(numbers):
                found.append(Place(number, name, node.name, place))
    return sorted(found, key=lambda each: each.number)


def markdown() -> str:
    """The table check -> test -> where it holds."""
    found = places()
    lines = [
        "# What is promised, and which test shows it", "",
        "Made by `make acceptance` from the marks of the tests; a test compares the two. `pytest tests/acceptance` runs one or more tests of every check.",
        f"{CPU}: shown on a processor. {DRIVER}: the graph cache shown with a driver that records and replays on a CPU",
        f"(`tests/support/recorder.py`). {GPU}: a test marked `gpu`, which a machine without one skips; no GPU has run these tests yet.",
    ]  # fmt: skip
    for group, checks in GROUPS.items():
        lines += ["", f"## {group}", "", "| # | promise | shown by | where |", "| ---: | --- | --- | --- |"]
        for number, text in checks.items():
            files: dict[str, list[str]] = {}
            for place in found:
                if place.number == number:
                    files.setdefault(place.path, []).append(f"`{place.test}`")
            tests = "; ".join(f"{path}: {', '.join(dict.fromkeys(each))}" for path, each in files.items())
            held = [
                kind
                for kind in (CPU, DRIVER, GPU)
                if any(p.where == kind for p in found if p.number == number)
            ]
            missing = f" Not shown: {NOT_SHOWN[number]}." if number in NOT_SHOWN else ""
            lines.append(f"| {number} | {text} | {tests} | {', '.join(held) or 'nowhere'}.{missing} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(markdown(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
