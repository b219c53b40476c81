"""One call of every compiled kernel on a processor that QEMU emulates: it ends a program at the first instruction that the
processor it plays does not have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

from smolvla_fast.ops import extension

QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
# The extension alone, on addresses: it needs no torch.
MASKED = """
import ctypes, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("smolvla_fast._cpu", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
floats = ctypes.c_float * 64
x, weight, y, q, out = floats(*range(64)), floats(*[1.0] * 64), floats(), floats(*range(64)), floats()
at = ctypes.addressof
kernels.rms_norm_float32(at(x), at(weight), at(y), 1, 64, 1e-5, 1)
rows = 4, 16, 4  # rows, inputs, outputs
sums = floats()
kernels.linear_float32_float32_float32(at(x), 0, at(weight), 0, 0, 0, at(sums), *rows, 1, 1e-5, 1)
sizes, strides = (1, 4, 4, 1, 1, 16), (64, 16, 16) * 3 + (0, 0, 0)
kernels.attention_float32(at(q), at(q), at(q), 0, at(out), sizes, strides, 0.01, 1)
pixels, image = (ctypes.c_uint8 * 48)(*range(48)), (ctypes.c_float * 192)()
kernels.image_prep_uint8_float32(at(pixels), at(image), (1, 4, 4, 8, 8, 8, 8), (48, 1, 12, 3), 1)
turned = floats()
kernels.rope_float32(at(x), at(turned), at(weight), at(weight), (1, 2, 2, 16), (64, 32, 16), 0, 1)
data, scale = (ctypes.c_uint8 * 64)(), floats()
kernels.quantize_rows_float32_uint8(2, at(x), at(weight), 0, at(data), at(scale), 1, 64, 1e-5, 1)
normed = floats()
kernels.layer_norm_float32_float32(at(x), at(weight), at(weight), at(normed), 1, 64, 1e-5, 1)
results = [sum(map(float, each)) for each in (y, sums, out, image, turned, data, normed)]
print(json.dumps({"levels": kernels.levels(), "results": results}))
"""


@cache
def masked(processor: str | None) -> Any:
    """The kernels on a processor that QEMU emulates; None: on this one."""
    emulator = [] if processor is None else [str(QEMU), "-cpu", processor]
    command = [*emulator, sys.executable, "-S", "-c", MASKED, extension.load("cpu").__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, f"{processor}: {done.returncode} {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])
