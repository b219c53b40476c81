"""OpenVINO on the same restructured model: converted in memory, compiled for the CPU at a precision and thread count."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.runner import Runner

PRECISIONS = ("fp32", "bf16")
HINTS = {"fp32": "f32", "bf16": "bf16"}
NO_INT8 = "OpenVINO has no int8 without quantising the model by another library (NNCF), so its work would not be the same"


def why_missing(precision: str = "fp32") -> str | None:
    """Why OpenVINO is no peer at this precision, or None."""
    if precision not in PRECISIONS:
        return NO_INT8
    if find_spec("openvino") is None:
        return 'openvino is not installed; run `pip install "smolvla_fast[bench]"`'
    return None


def make_runner(model: Any, precision: str, threads: int) -> Runner:
    """``sample_actions`` of a model with fp32 weights, by OpenVINO.

    precision  one of ``PRECISIONS``: in what OpenVINO may compute (INFERENCE_PRECISION_HINT)
    """
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = ov.Core()

    def compile_(module: torch.nn.Module, example: tuple[Tensor, ...]) -> Callable[..., tuple[Any, ...]]:
        with torch.no_grad():
            converted = ov.convert_model(module.eval(), example_input=example)
        # A trace leaves shapes open; OpenVINO plans memory and kernels better for known ones.
        converted.reshape(
            {port: list(each.shape) for port, each in zip(converted.inputs, example, strict=True)}
        )
        request = core.compile_model(converted, "CPU", settings).create_infer_request()

        def run(*inputs: Any) -> tuple[Any, ...]:
            for index, each in enumerate(inputs):
                if isinstance(each, Tensor):
                    each = ov.Tensor(each.contiguous().numpy(), shared_memory=True)
                request.set_input_tensor(index, each)
            request.infer()
            return tuple(request.get_output_tensor(index) for index in range(len(request.model_outputs)))

        return run

    def to_torch(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.from_numpy(value.data)

    return Runner(model, compile_, to_torch)


def version() -> str | None:
    """OpenVINO's version, or None where it is not installed."""
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None
