"""What a chunk launches on a GPU, node by node, found on a machine without one: nothing is computed and no memory is needed.

The engine itself runs, at full size, on fake tensors that say they are on a GPU: so it takes what a GPU's defaults give it.
Triton's launches are noted and not made; ATen's calls are seen by a dispatch mode.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import JITFunction

from benchmarks.harness.roof import stage_costs
from smolvla_fast import inference
from smolvla_fast.engine import timing
from smolvla_fast.engine.side_stream import SideStream, offered
from smolvla_fast.kernels.common import assume_capability
from smolvla_fast.model.precision import TIERS
from smolvla_fast.model.weights import is_cross
from smolvla_fast.ops import extension
from smolvla_fast.ops.cuda import library
from smolvla_fast.ops.reference import Cost
from smolvla_fast.patching.inputs import made_inputs, made_noise
from smolvla_fast.stages import layers, vision
from smolvla_fast.testing import policies

CAPABILITY = 90
DEVICE = torch.device("cuda", 0)
AROUND = "around the graph"
"""The stage of what is queued before and behind a replay: the inputs' copies, the chunk's."""
MAKES_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
MORE_KERNELS = {
    "cumsum": "the scan adds up int64, so flags are cast first",
    "sum": "the reduction adds up int64, so flags are cast first",
}
"""ATen calls that are two kernels where their result has another dtype, each with the reason; all others count as one.
What cuBLAS launches beside a product, such as the sum of a split K, is not seen from here."""


class Operand(NamedTuple):
    """A tensor that a node reads or writes.

    place   what tells its memory from others'      bytes  that are addressed: a broadcast dimension counts once
    weight  whether it is a parameter of the model
    """

    place: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    weight: bool


@dataclass(frozen=True)
class Node:
    """One kernel of a chunk.

    stage      of the innermost section, or AROUND      layer  "vision", "self" or "cross"; "" outside of layers
    name       the kernel's, or ATen's      grid  () of ATen's
    arguments  by name, tensors as operands; of ATen's by place, the results last
    pdl        launched with programmatic dependent launch
    """

    stage: str
    layer: str
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    pdl: bool = False

    @property
    def by_torch(self) -> bool:
        return not self.grid

    @property
    def operands(self) -> list[Operand]:
        """Each memory once."""
        found = [x for x in tree_leaves(list(self.arguments.values()), _is_operand) if _is_operand(x)]
        return list({(each.place, each.bytes): each for each in found}.values())


def _is_operand(value: Any) -> bool:
    return isinstance(value, Operand)


@dataclass
class Recorder:
    """Notes what is launched while it is ``recording``; a graph driver that captures by running."""

    nodes: list[Node] = field(default_factory=list)
    recording: bool = False
    capturing: bool = False
    stages: list[str] = field(default_factory=lambda: [AROUND])
    layers: list[str] = field(default_factory=lambda: [""])
    weights: set[int] = field(default_factory=set)
    most: dict[int, int] = field(default_factory=dict)
    """Bytes of a table that is looked up in, and not read as a whole."""
    kept: list[Tensor] = field(default_factory=list)
    """Memory that were freed could be another's under the same name."""

    def note(self, name: str, grid: tuple[int, ...], arguments: dict[str, Any], pdl: bool = False) -> None:
        if self.recording:
            where = (self.stages[-1], self.layers[-1])
            self.nodes.append(Node(*where, name, grid, tree_map(self._operand, arguments), pdl))

    def _operand(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self.kept.append(value)
        memory = value.untyped_storage()._cdata
        number = 1
        for size, stride in zip(value.shape, value.stride(), strict=True):
            number *= size if stride else 1
        place = (memory, value.storage_offset())
        read = min(number * value.itemsize, self.most.get(memory, number * value.itemsize))
        return Operand(place, tuple(value.shape), value.dtype, read, memory in self.weights)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.stages.append(name)
        try:
            yield
        finally:
            self.stages.pop()

    def of_layer(self, function: Callable[..., Any], kind: Callable[[Any], str]) -> Callable[..., Any]:
        """The function of a layer, whose second argument the layer is."""

        def layer(ops: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            self.layers.append(kind(given))
            try:
                return function(ops, given, *args, **kwargs)
            finally:
                self.layers.pop()

        return layer

    # A graph driver, as engine.cuda_graphs.Driver.

    def busy(self) -> bool:
        return self.capturing

    def capture(self, run: Callable[[], Tensor]) -> tuple[None, Tensor]:
        with offered(SideStream(_Queue(), _Queue())):
            run()
            self.capturing = self.recording = True
            try:
                return None, run()
            finally:
                self.capturing = self.recording = False

    def replay(self, recording: None) -> None:
        pass

    def wait(self, mark: Any) -> None:
        pass

    mark = collect = release = lambda self: None


class _Calls(TorchDispatchMode):
    """ATen's calls; views and memory alone are no kernels, nor is a copy that moves no byte."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            assert not self.recorder.capturing, "a captured chunk waits for the device"
            return True  # of a check at the first chunk; there is no number
        # Of this call torch's fake tensors take the dtype for beta.
        in_place = func is torch.ops.aten.addmm.dtype_out
        out = kwargs["out"] if in_place else func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_cuda and x.numel()]
        held = {x.untyped_storage()._cdata for x in given}
        writes = func._schema.is_mutable or any(x.untyped_storage()._cdata not in held for x in made)
        if func.namespace == "aten" and made and writes and name not in MAKES_MEMORY:
            arguments = {str(place): value for place, value in enumerate((*args, kwargs or {}, out))}
            if name in MORE_KERNELS and given[0].dtype is not made[0].dtype:
                self.recorder.note("_to_copy", (), {"0": given[0]})
            self.recorder.note(name, (), arguments)
        return out


class _Queue:
    """Stands for a stream, an event: work is recorded in the order in which it is queued, so all streams are one."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Queue)

    __hash__ = object.__hash__
    synchronize = wait_stream = wait_event = record_event = record = wait = lambda self, *args: None


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
    """What CUDA takes for 16 bits without a mask; a fake device would take single products."""
    if attn_mask is not None or q.dtype.itemsize != 2:
        return _attention(q, k, v, attn_mask, **kwargs)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


_attention = functional.scaled_dot_product_attention


def _on_device(module: nn.Module, *_: Any) -> nn.Module:
    """Stands for ``Module.to``, which cannot exchange parameters that are fake."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else buffer.to(DEVICE)
    return module


def _everywhere(stack: ExitStack, function: Any, instead: Any) -> None:
    """Puts another function in its place in every module that imported it."""
    for module in list(sys.modules.values()):
        if (getattr(module, "__name__", "") or "").startswith("smolvla_fast"):
            for name in [n for n, value in vars(module).items() if value is function]:
                stack.enter_context(patch.object(module, name, instead))


class _Kernels:
    """Stands for ``smolvla_fast._cuda`` on an H100: launches are noted, each under its op with "_cuda" behind it. Operands
    come as tensors, since fake ones have no address."""

    linear_residual_cols = 64

    def __init__(self, recorder: Recorder) -> None:
        self._note = recorder.note

    def device(self, index: int) -> dict[str, int]:
        versions = dict.fromkeys(("compute_capability", "code_version", "ptx_version"), CAPABILITY)
        return dict(versions, shared_bytes_per_block=232448)

    def linear_residual_clusters(self) -> int:
        return 16

    def norm_products_shared_bytes(self) -> int:
        return 32 + (48 + 64) * (2 * 1024 + 16)

    def norm_products_clusters(self) -> int:
        return 16

    def linear_residual(
        self, inputs: list[Any], y: Tensor, next: list[Any], sizes: tuple[int, ...], dependent: bool, **_: Any
    ) -> None:
        rows, k, outputs = sizes
        named = dict(zip(("x_ptr", "weight_ptr", "residual_ptr"), inputs, strict=True), y_ptr=y, next=next)
        grid = (8 * ceil(outputs / 64), ceil(rows / 64))
        named |= dict(rows=rows, inputs=k, outputs=outputs, stages=2 if k <= 1024 else 3 if rows > 64 else 4)
        self._note("linear_residual_cuda", grid, named, dependent)

    def norm_swiglu(
        self, inputs: list[Any], y: Tensor, sizes: tuple[int, ...], dependent: bool, **_: Any
    ) -> None:
        rows, k, _, outputs = sizes
        named = dict(operands=inputs, y_ptr=y, rows=rows, inputs=k, outputs=outputs)
        pairs = 24 if rows > 64 else 16
        self._normed_products("norm_swiglu_cuda", named, pairs, ceil(outputs / pairs), dependent)

    def norm_qkv_rope(
        self, inputs: list[Any], outputs: list[Any], sizes: tuple[int, ...], dependent: bool, **_: Any
    ) -> None:
        rows, k, _, tokens, q_heads, kv_heads, half = sizes
        named = dict(operands=inputs, outputs=outputs, rows=rows, inputs=k, tokens=tokens)
        pairs = 16 if rows > 64 else 8
        pieces = (q_heads + 2 * kv_heads) * ceil(half / pairs)
        self._normed_products("norm_qkv_rope_cuda", named, pairs, pieces, dependent)

    def _normed_products(
        self, name: str, named: dict[str, Any], pairs: int, pieces: int, dependent: bool
    ) -> None:
        """In whole clusters of eight blocks, or of fewer where there are not so many."""
        cluster = min(8, 2 ** (pieces.bit_length() - 1))
        grid = (cluster * ceil(pieces / cluster), ceil(named["rows"] / 64))
        self._note(name, grid, named | dict(pairs=pairs, cluster=cluster), dependent)


@contextmanager
def _a_gpu(recorder: Recorder) -> Iterator[None]:
    """Inside, tensors are fake and there seems to be a GPU, whose launches go to the recorder."""

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = {**dict(zip(self.arg_names, args, strict=False)), **options}
        sizes = grid(named) if callable(grid) else grid
        recorder.note(self.__name__.removeprefix("_"), tuple(sizes), named, bool(options.get("launch_pdl")))

    cuda = {
        "get_device_capability": lambda *_: divmod(CAPABILITY, 10),
        "is_current_stream_capturing": lambda: recorder.capturing,
        "current_device": lambda: 0,
        "device": lambda *_: nullcontext(),
        "device_of": lambda *_: nullcontext(),
        "stream": lambda *_: nullcontext(),
        "current_stream": _Queue,
        "Stream": _Queue,
        "Event": _Queue,
    }
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(nn.Module, "to", _on_device))
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", _fused_attention))
        stack.enter_context(patch.object(JITFunction, "run", launch))
        stack.enter_context(patch.object(extension, "why_missing", lambda kind: ""))
        stack.enter_context(patch.object(extension, "load", lambda kind: _Kernels(recorder)))
        stack.enter_context(patch.object(library, "address", lambda tensor: tensor))
        library._why_no_code.cache_clear()
        stack.callback(library._why_no_code.cache_clear)
        stack.enter_context(patch.object(inference, "driver_for", lambda device: recorder))
        _everywhere(stack, timing.section, recorder.section)
        of_decoder = recorder.of_layer(layers.decoder_layer, lambda layer: "cross" if layer.cross else "self")
        _everywhere(stack, layers.decoder_layer, of_decoder)
        _everywhere(stack, vision.vision_layer, recorder.of_layer(vision.vision_layer, lambda _: "vision"))
        stack.enter_context(assume_capability(CAPABILITY))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@dataclass(frozen=True)
class Recording:
    """nodes  of the graph, in the order of their launches, then those around it
    costs  by stage: FLOP, and bytes of all weights once (in the denoise stage once a step)
    steps  of the denoise loop      expert_layers  of each kind, "self" and "cross"
    """

    nodes: list[Node]
    costs: dict[str, Cost]
    steps: int
    expert_layers: dict[str, int]


def record(size: str = "full", cameras: int = 2) -> Recording:
    """One chunk of tier bf16 by Triton's table. size, cameras  of ``make_policy``; weights in the dtypes of smolvla_base"""
    recorder = Recorder()
    with _a_gpu(recorder), patch.object(policies, "fill_weights", lambda *_: None):
        policy = policies.make_policy(size, origin="ours", cameras=cameras, layout="mixed")
        recorder.weights = {x.untyped_storage()._cdata for x in policy.parameters()}
        engine = inference.Engine(TIERS["bf16"], "triton", DEVICE)
        inputs, noise = made_inputs(policy.model), made_noise(policy.model)
        table = policy.model.vlm_with_expert.get_vlm_model().text_model.get_input_embeddings().weight
        tokens = inputs[2].numel()
        recorder.most[table.untyped_storage()._cdata] = tokens * table.shape[1] * table.itemsize
        with _Calls(recorder):
            engine.act(policy.model, *inputs, noise)
            recorder.recording = True
            engine.act(policy.model, *inputs, noise)
    layers_seen = {node.layer for node in recorder.nodes}
    assert layers_seen == {"", "vision", "self", "cross"}, (
        "a layer is no longer decoder_layer or vision_layer"
    )
    costs = stage_costs(policy.model, cameras, inputs[2].shape[1], itemsize=2)
    pair = policy.model.vlm_with_expert
    kinds = Counter("cross" if is_cross(pair, i) else "self" for i in range(len(pair.lm_expert.layers)))
    return Recording(recorder.nodes, costs, policy.config.num_steps, dict(kinds))
