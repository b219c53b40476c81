"""Who computes a call of an op: by a plan where one was measured, else by the defaults.

Each op of a table that has several candidates becomes a ``Choice``. It looks a call's shape class up once and remembers
the answer. Candidates are named after who computes: "cpu", "triton" and "cuda" (our kernels; of "cuda" those that the
GPU runs), "onednn", "aten" (``F.linear``), "cublaslt" (its GELU epilogue),
"cublas" (a product into an fp32 residual stream), "torch", "sdpa" (whose torch likes), "flash-sdpa" (torch's
FlashAttention), "cudnn", "flash" (the package flash-attn), "apart" (masked_attention, then linear_residual); a Triton
kernel with another tile than its default has the tile behind its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from .availability import why_not, why_not_library
from .cuda.linear_residual import CLUSTER_ROWS
from .cuda.prepared_rows import MOST_INPUTS
from .defaults import BESIDE_TRITON, Rule, default_rules, hopper_rules
from .memory import is_out_of_memory
from .next_norm import HINTS, NextNorm
from .plan import LOOP, Plan
from .reference.attention import attention as sdpa_attention
from .reference.image_prep import image_prep
from .shape_class import CLASSES, PREPARED, Attention, Product, Shape, up
from .table import STAGES, Ops, exports
from .torch import decoder, fused_attention, suffix, vision
from .torch import masked_attention as attention
from .torch.linear import aten, cublas, cublaslt, onednn, onednn_has

Candidates = dict[str, Callable[..., Any]]
Beside = Mapping[str, Callable[..., Callable[..., Any]]]
"""op -> Triton's kernel -> ours of CUDA C++ that takes its place in a chain of Triton's (``cuda/beside_triton.py``)"""
PRODUCTS = (
    decoder.norm_qkv_rope, decoder.cross_kv, decoder.linear_residual, decoder.norm_swiglu, suffix.suffix_embed,
    suffix.euler_step, vision.pixel_shuffle_linear,
)  # fmt: skip
"""Ops over a linear of choice, and some over a norm or a rotation of choice."""
LIBRARIES = ("cublas", "cublaslt", "flash-sdpa", "cudnn", "flash")
"""Candidates on a GPU whose sizes are not all known beforehand."""


class Choice:
    """One op of a table, as a function that hands each call to a candidate.

    candidates  by name, the first the one that serves whatever the others cannot
    rule        shape class -> name of the default, or None: the first
    plan        "op shape class" -> name
    served      what was decided so far      refused  what had nothing for a call after all, by key
    """

    def __init__(self, op: str, candidates: Candidates, rule: Rule | None, plan: Mapping[str, str]) -> None:
        self.op, self.candidates, self._rule, self._plan = op, candidates, rule, plan
        self._shape_of = CLASSES[op]
        self._serves: dict[Shape, Callable[..., Any]] = {}
        self.served: dict[Shape, str] = {}
        self.refused: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shape = self._shape_of(*args, **kwargs)
        serve = self._serves.get(shape)
        if serve is None:
            self.served[shape] = name = self.chosen(shape)
            serve = self._serves[shape] = self.function(name)
            if name in LIBRARIES or (name == "cuda" and "triton" in self.candidates):
                return self._tried(shape, serve, args, kwargs)
        return serve(*args, **kwargs)

    def _tried(self, shape: Shape, serve: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The first call of a library, or of a kernel in the place of Triton's: it may have nothing for these operands after
        all, and then the backend's own serves. A capture has run once before, so it happens outside of it."""
        try:
            return serve(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            own = next(iter(self.candidates))
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.refused[self.key(shape)] = f"{self.served[shape]} refused: {said}; {own} serves"
            self.served[shape], self._serves[shape] = own, self.function(own)
            return self._serves[shape](*args, **kwargs)

    def with_candidate(self, name: str, function: Callable[..., Any]) -> Choice:
        return Choice(self.op, {**self.candidates, name: function}, self._rule, self._plan)

    def key(self, shape: Shape) -> str:
        """The name of this choice in a plan."""
        return f"{self.op} {shape}"

    def names(self, shape: Shape) -> list[str]:
        """The candidates that can serve a shape class, the backend's own first."""
        first = next(iter(self.candidates))
        return [name for name in self.candidates if _can(self.op, name, shape)] or [first]

    def default(self, shape: Shape) -> str:
        names = self.names(shape)
        wished = None if self._rule is None else self._rule(shape)
        return wished if wished in names else names[0]

    def chosen(self, shape: Shape) -> str:
        """The plan's candidate, or the default where the plan has none that exists here."""
        wished = self._plan.get(self.key(shape), "")
        name, _, tile = wished.partition(" ")
        exists = name in self.names(shape) and (not tile or (name == "triton" and _tile(tile) is not None))
        return wished if exists else self.default(shape)

    def function(self, name: str) -> Callable[..., Any]:
        name, _, tile = name.partition(" ")
        function = self.candidates[name]
        if unknown := _unknown_hints(function):
            function = partial(_without_hints, function, unknown)
        return partial(_with_tile, function, _tile(tile)) if tile else function


def _can(op: str, name: str, shape: Shape) -> bool:
    """Whether a candidate has anything for the dtypes of a shape class."""
    if name == "cuda" and isinstance(shape, Product) and op in BESIDE_TRITON:
        if shape.dtype is not torch.bfloat16 or shape.inputs % 8:
            return False
        if op == "linear_residual":
            return shape.x is torch.bfloat16 and shape.rows <= CLUSTER_ROWS
        return PREPARED in shape.end and shape.inputs <= MOST_INPUTS
    if name in fused_attention.ATTENTION and isinstance(shape, Attention):
        alike = shape.q == shape.kv
        return alike and fused_attention.takes(name, shape.queries, shape.head_dim, shape.q)
    if name == "cublaslt" and isinstance(shape, Product):
        # It adds an activation to what "aten" has in its epilogue, the bias.
        return isinstance(shape.dtype, torch.dtype) and set(shape.end) - {"tf32"} == {"gelu_tanh"}
    if name == "cublas" and isinstance(shape, Product):
        narrow = shape.x is shape.dtype and shape.dtype in fused_attention.DTYPES
        return narrow and set(shape.end) == {torch.float32}
    if name not in ("aten", "onednn") or not isinstance(shape, Product):
        return True
    # Quantised weights, which have no torch dtype, are for our kernels.
    return isinstance(shape.dtype, torch.dtype) and (name == "aten" or onednn_has(shape.dtype))


def _tile(text: str) -> Any:
    """The tile of that name, or None where there is no such tile."""
    from ..kernels.tiles import parse_tile

    try:
        return parse_tile(text)
    except ValueError:
        return None


def _unknown_hints(function: Callable[..., Any]) -> frozenset[str]:
    """The hints that a candidate takes no keyword argument for, and memory where it makes its result itself."""
    takes = signature(function).parameters.values()
    if any(each.kind is Parameter.VAR_KEYWORD for each in takes):
        return frozenset()
    return frozenset([*HINTS, "memory"]).difference(each.name for each in takes)


def _without_hints(function: Callable[..., Any], unknown: frozenset[str], *args: Any, **kwargs: Any) -> Any:
    """Without the hints that it does not know. One that reads a stream takes the whole of it."""
    offset = kwargs.get("offset")
    if "offset" in unknown and offset is not None and "residual" not in kwargs:
        args = (offset.added_to(args[0]), *args[1:])
    return function(*args, **{name: each for name, each in kwargs.items() if name not in unknown})


def _with_tile(function: Callable[..., Any], tile: Any, *args: Any, **kwargs: Any) -> Any:
    from ..kernels.tiles import using

    with using(tile):
        return function(*args, **kwargs)


def choose(ops: Ops, device: torch.device, wish: str, plan: Plan | None, fixed: Collection[str] = ()) -> Ops:
    """The table with every op that has several candidates on this device made a ``Choice``.

    wish   the backend asked for: with a plan, "auto" lets every backend compete; else that backend's and torch's do
    plan   None where nothing was measured
    fixed  ops that nobody else has, such as products of packed integers
    """
    chosen: Mapping[str, str] = {} if plan is None else plan.choices
    beside, unserved = beside_triton(device) if ops.backend == "triton" else ({}, {})
    rules = {**default_rules(ops.backend, device), **_measured_rules(beside, device)}
    backends = (ops.backend, *(others(device, wish) if plan is not None else ()))
    found: dict[str, Any] = {
        op: Choice(op, candidates, rules.get(op), chosen)
        for op, candidates in _candidates(ops, device, backends, beside).items()
        if op not in fixed and (len(candidates) > 1 or ops.backend == "triton")
    }
    if ops.backend == "triton":
        two_ops = partial(apart, found["masked_attention"], found["linear_residual"])
        assert ops.attention_residual is not None
        fused: Candidates = {"triton": ops.attention_residual, "apart": two_ops}
        rule = rules["attention_residual"]
        found["attention_residual"] = Choice("attention_residual", fused, rule, chosen)
        found["prepares_norms"] = True
        for op, reason in unserved.items() if _is_hopper(device) else ():
            found[op].refused[op] = f"cuda, the default on this GPU, does not serve: {reason}; triton does"
        found["layer_launches"] = partial(_layer_launches, {op: found[op] for op in STAGES["denoise"]})
    if chosen.get(LOOP) == "cuda" and "cuda" in backends:
        from .cuda import ops as cuda

        found |= dict(denoise_persistent=cuda.denoise_persistent, why_not_persistent=cuda.why_not_persistent)
    return replace(ops, **found)


def apart(
    attend: Callable[..., Tensor], add: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Any,
    weight: Any, residual: Tensor, *, out: Tensor | None = None, memory: Any = None, next_norm: NextNorm | None = None,
) -> Tensor:  # fmt: skip
    """``attention_residual`` by the two ops that it is."""
    return add(
        attend(q, k, v, mask, memory=memory), weight, residual, out=out, memory=memory, next_norm=next_norm
    )


def _layer_launches(choices: dict[str, Choice], rows: int) -> int | None:
    """Launches of a layer of a denoise step with this many rows: 4 with ``attention_residual``, else 5. None where a library
    served an op, or layers differ."""
    served = {
        (op, name)
        for op, choice in choices.items()
        for shape, name in choice.served.items()
        if isinstance(shape, Attention) or shape.rows == up(rows)
    }
    fused = {name.startswith("triton") for op, name in served if op == "attention_residual"}
    single = all(name.startswith(("triton", "cuda")) for op, name in served if op != "attention_residual")
    if not single or len(fused) > 1:
        return None
    return 4 if True in fused else 5


def refused(ops: Ops) -> dict[str, str]:
    """What libraries and kernels beside Triton's had nothing for after all, by op and shape class."""
    choices = (getattr(ops, op) for op in CLASSES)
    return {key: why for each in choices if isinstance(each, Choice) for key, why in each.refused.items()}


def others(device: torch.device, wish: str) -> list[str]:
    """The backends that compete on a device beside the one that serves by default."""
    return [name for name in ("cpu", "cuda") if wish == "auto" and why_not(name, device) is None]


def beside_triton(device: torch.device) -> tuple[Beside, dict[str, str]]:
    """What serves in the chain of Triton's kernels on this device, and of the ops that nothing does, why."""
    reason = why_not("cuda", device)
    if reason is None:
        from .cuda import beside_triton as kernels

        try:
            return kernels.beside_triton(device)
        except RuntimeError as error:  # in CUDA's own words
            reason = str(error)
    return {}, dict.fromkeys(BESIDE_TRITON, reason)


def _is_hopper(device: torch.device) -> bool:
    there = device.type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device)[0] == 9


def _measured_rules(beside: Beside, device: torch.device) -> dict[str, Rule]:
    from .cuda.beside_triton import measured

    return hopper_rules(beside) if beside and measured(device) else {}


def _candidates(
    ops: Ops, device: torch.device, backends: Collection[str], beside: Beside
) -> dict[str, Candidates]:
    """Of each op with a shape class: who has it on this device; the table's own kernels come first."""
    sources = list(_torch(ops, device))
    if "cpu" in backends:
        own = list(_cpu())
        sources = [*own, *sources] if ops.backend == "cpu" else [*sources, *own]
    if ops.backend == "triton":
        from .triton import ops as triton

        sources = [("triton", exports(triton)), *sources]
    if "cuda" in backends:
        from .cuda import ops as cuda
        from .cuda.linear_residual import why_no_clusters

        own_ops = exports(cuda)
        if why_no_clusters(device):
            del own_ops["linear_residual"]
        sources.append(("cuda", own_ops))
    found: dict[str, Candidates] = {}
    for name, functions in sources:
        for op, function in functions.items():
            if op in CLASSES:
                found.setdefault(op, {}).setdefault(name, function)
    for op, made in beside.items():
        found[op]["cuda"] = made(found[op]["triton"])
    return found


def over(linear: Callable[..., Any], **more: Any) -> dict[str, Callable[..., Any]]:
    """The ops that are products, over this linear and what else of ``more`` they take."""
    return {
        op.__name__: partial(op, linear=linear, **{k: v for k, v in more.items() if k in signature(op).parameters})
        for op in PRODUCTS
    } | {"linear": linear}  # fmt: skip


def _cpu() -> Iterator[tuple[str, dict[str, Any]]]:
    from .cpu import ops as cpu

    def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Any = None) -> Tensor:
        return cpu.masked_attention(q, k, v, attention.visible(mask), memory=memory)

    yield "cpu", {**over(cpu.linear), **exports(cpu), "masked_attention": masked_attention}


def _torch(ops: Ops, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    more: dict[str, Any] = {}
    if ops.backend == "cpu":
        from .cpu.rms_norm import rms_norm
        from .cpu.rope import rotate

        more = dict(rms_norm=rms_norm, rotate=rotate)
    if device.type == "cpu":
        yield "onednn", over(onednn, **more)
    yield "aten", over(aten, **more)
    yield (
        "torch",
        {
            "layer_norm": vision.layer_norm,
            "masked_attention": attention.masked_attention,
            "image_prep": image_prep,
            "patch_embed": vision.patch_embed,
        },
    )
    yield "sdpa", {"attention": sdpa_attention, "masked_attention": attention.fused_masked_attention}
    libraries: dict[str, dict[str, Any]] = {"cublas": {"linear": cublas}, "cublaslt": {"linear": cublaslt}}
    libraries |= {name: {"attention": call} for name, call in fused_attention.ATTENTION.items()}
    for name, functions in libraries.items():
        if why_not_library(name, device) is None:
            yield name, functions
