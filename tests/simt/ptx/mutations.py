"""`PYTHONPATH=.:tests python -m simt.ptx.mutations [NAME ...]`: changes of the kernels, and whose tests notice them.

In a copy of the tree; minutes for all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GEMMS = ("test_triton_gemm_tiles.py", "test_triton_gemms.py")
ROWS, MASKED, IMAGE = ("test_triton_elementwise.py",), ("test_masked_attention.py",), ("test_image_prep.py",)
# name: file, what stands there, what instead, the tests in tests/ops
MUTATIONS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "no barrier before the counter": ("common", "    tl.debug_barrier()\n", "", GEMMS),
    "a relaxed counter": ("common", 'sem="acq_rel"', 'sem="relaxed"', GEMMS),
    "a counter of one block": ("common", 'scope="gpu"', 'scope="cta"', GEMMS),
    "no wait for the launch ahead": ("dependent_launch", "        gdc_wait()\n", "", GEMMS),
    "products in tf32": ("common", 'input_precision="ieee")', 'input_precision="tf32")', GEMMS),
    "attention in tf32": ("tuning", '"tf32x3"] = "tf32x3"', '"tf32x3"] = "tf32"', MASKED),
    "heads in tf32": ("tuning", '"tf32x3"] = "tf32x3"', '"tf32x3"] = "tf32"', ROWS),
    "a contracted backward": (
        "masked_attention_backward", ", enable_fp_fusion=False", "", ("test_training_ops.py",),
    ),
    "bytes divided nearly": (
        "image_prep", "tl.div_rn(value, tl.full(value.shape, 255.0, tl.float32))", "value / 255.0", IMAGE,
    ),
    "too many stages": ("masked_attention", "num_stages=tile.num_stages", "num_stages=tile.num_stages + 30", MASKED),
    "three warps": ("layer_norm", "num_warps=tile.num_warps", "num_warps=3", ROWS),
    "a mean divided nearly": (
        "layer_norm", "tl.div_rn(tl.sum(x, axis=1), tl.cast(width, tl.float32))", "tl.sum(x, axis=1) / width", ROWS,
    ),
}  # fmt: skip


FUSED, NEXT, PRELUDE = ("test_attention_residual.py",), ("test_next_norm.py",), ("test_prelude.py",)
# Of the kernels that a denoise step was redesigned with: whoever notices, the machine does.
REDESIGN: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "heads beside their weights": (
        "attention_residual", "(kv_head * GROUP + inner // BLOCK_DIM)", "(kv_head * BLOCK_GROUP + inner // BLOCK_DIM)",
        FUSED,
    ),
    "a head of the group too many": (
        "attention_residual", "(token < tokens) & (rows % BLOCK_GROUP < GROUP)", "(token < tokens)", FUSED,
    ),
    "a residual without its sums": (
        "attention_residual", "tl.dot(x.to(weight.dtype), weight, input_precision=PRECISION) + residual", "residual", FUSED,
    ),
    "one counter for all tiles": ("attention_residual", "arrivals_ptr + tile", "arrivals_ptr", FUSED),
    "squares of the next sample's rows": (
        "attention_residual", "tl.where(own < tokens, batch * tokens + own, all_rows)", "batch * tokens + own", NEXT,
    ),
    "squares of one part": ("next_norm", "(part < parts)", "(part < 1)", NEXT),
    "squares of columns that are not there": ("next_norm", "    y = tl.where(mask, y, 0.0)\n", "", NEXT),
    "contracted squares": ("next_norm", ', "enable_fp_fusion": False', "", NEXT),
    "a prefetch past the end": ("dependent_launch", "tl.minimum(first + tl.arange(0, 4) * LINE, stop - 1)",
                                "first + tl.arange(0, 4) * LINE + (1 << 22)", GEMMS),
    "a block that sees the next one": ("rope_masks", "(key < block_end)", "(key <= block_end)", PRELUDE),
    "positions that count padding": (
        "rope_masks", "tl.sum((pad & (key <= token)).to(tl.int32), axis=0) - 1", "token", PRELUDE,
    ),
    "tokens before their camera": (
        "prefix_embed", "place % max(camera_tokens, 1) - starts", "place % max(camera_tokens, 1)", PRELUDE,
    ),
}  # fmt: skip
MUTATIONS |= REDESIGN


def complaint(tree: Path, by: str, files: tuple[str, ...]) -> str | None:
    """What the first red test says; None where all are green."""
    command = f"{sys.executable} -m pytest -q -x -m triton -p no:cacheprovider -p no:xdist".split()
    environment = {**os.environ, "SMOLVLA_FAST_TRITON": by, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command += [f"tests/ops/{name}" for name in files]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    said = [line.removeprefix("E ").strip() for line in done.stdout.splitlines() if line.startswith("E ")]
    return (said or ["red"])[0][:200] if done.returncode else None


def main(names: list[str]) -> int:
    unexpected = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.whl"))
        shutil.rmtree(tree / "build" / "triton", ignore_errors=True)  # of the kernels as they are
        for by in ("interpreter", "sm_90"):
            files = {name for each in names or MUTATIONS for name in MUTATIONS[each][3]}
            if said := complaint(tree, by, tuple(sorted(files))):
                print(f"as it stands: {by} is red: {said}")
                return 1
        for name in names or MUTATIONS:
            file, old, new, tests = MUTATIONS[name]
            path = tree / "kernels" / f"{file}.py"
            text = path.read_text()
            assert old in text, f"{name}: kernels/{file}.py has no {old!r}"
            path.write_text(text.replace(old, new))
            interpreted, compiled = (complaint(tree, by, tests) for by in ("interpreter", "sm_90"))
            path.write_text(text)
            print(
                f"{name}: interpreter {'red' if interpreted else 'green'}, compiled: {compiled or 'green'}",
                flush=True,
            )
            if (interpreted and name not in REDESIGN) or compiled is None:
                unexpected.append(name)
    print(f"unexpected: {', '.join(unexpected)}" if unexpected else "all as expected")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
