"""Rules of a model: source, hooks, structure, dtypes. Structure alone is read, no values; cheap enough for every call."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

from ..model.dense import why_not_dense
from ..model.dims import read_dims, read_pair_dims
from ..model.precision import Tier
from ..model.weights import HEADS, Source, head_sources, pair_sources
from .source_digests import LOSS_METHODS, PAIR_METHODS, Owner, owners, unknown_of
from .untried import Untried

DTYPES = (torch.float32, torch.bfloat16)


def chunk_source(model: Any) -> str | None:
    """Why the code around this model is not what a chunk replaces."""
    reason = _source(owners(model, getattr(model, "rtc_processor", None)))
    return _unread_weight(model) or reason if isinstance(reason, Untried) else reason


def _unread_weight(model: Any) -> str | None:
    """What an unread release has beside the weights that the engine reads. A trial with a gate that is still zero would
    pass, and stay passed once the gate is trained."""
    for owner, children in (
        (model, {"vlm_with_expert", *HEADS}),
        (model.vlm_with_expert, {"vlm", "lm_expert"}),
    ):
        for name in (*owner._modules, *owner._parameters, *owner._buffers):
            if name not in children:
                return f"{type(owner).__name__}.{name} is unknown to this version, which would leave it out"
    return None


def loss_source(model: Any) -> str | None:
    """Why the code around this model is not what a loss replaces."""
    return _source(owners(model, None, LOSS_METHODS))


def layer_source(pair: Any) -> str | None:
    """Why the code of this pair is not what its layers replace."""
    return _source([("SmolVLMWithExpertModel", pair, PAIR_METHODS)])


def step_source(model: Any) -> str | None:
    """Why the code of this model is not what a denoise step replaces, whatever samples by it."""
    return _source([("VLAFlowMatching", model, ("embed_suffix", "denoise_step"))])


def prefix_source(model: Any) -> str | None:
    """The same of ``embed_prefix``."""
    return _source([("VLAFlowMatching", model, ("embed_prefix",))])


def _source(of: list[Owner]) -> str | None:
    for label, owner, names in of:
        if label == "RTCProcessor":  # its methods may be an instance's own, as long as the source is known
            continue
        replaced = [name for name in (*names, "forward") if name in owner.__dict__]
        if replaced:
            return (
                f"{type(owner).__name__}.{replaced[0]} is replaced on the instance (torch.compile does this)"
            )
    return unknown_of(of)


def device(model: Any) -> str | None:
    """Which device nobody has tried yet.      model  a ``VLAFlowMatching``, or its pair"""
    # Asked at every call: of a whole model the first parameter is far to seek.
    found = (model.state_proj.weight if hasattr(model, "state_proj") else next(model.parameters())).device
    if found.type == "meta":
        return "the policy is on meta and has no values; accepted are cpu and cuda"
    if found.type == "cpu":
        return None
    if found.type != "cuda":
        return Untried(f"the policy is on {found}; known are cpu and cuda", str(found))
    if torch.version.hip is not None:
        return Untried(
            f"the policy is on an AMD GPU (ROCm {torch.version.hip}), which nobody has tried", str(found)
        )
    return _untried_architecture(found)


@cache
def _untried_architecture(found: torch.device) -> str | None:
    """Of an NVIDIA GPU: where Triton's tiles have no row for it."""
    if find_spec("triton") is None:
        return None
    from ..kernels.cost_model import TARGETS

    major, minor = torch.cuda.get_device_capability(found)
    if 10 * major + minor in TARGETS:
        return None
    known = ", ".join(f"{cc // 10}.{cc % 10}" for cc in TARGETS)
    return Untried(
        f"compute capability {major}.{minor} is none that tiles were chosen for ({known})", str(found)
    )


def forward_hooks(model: Any) -> str | None:
    """Which forward hook or replaced ``forward`` a fused path would pass by."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a global forward hook is registered; it would not see the fused path"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook; it would not see the fused path"
        if "forward" in module.__dict__:
            return f"{name or 'the model'} has its forward replaced on the instance"
    return None


def backward_hooks(model: Any) -> str | None:
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "a global backward hook is registered; it would not see the fused path"
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"a {type(module).__qualname__} has a backward hook; it would not see the fused path"
    return None


def modules_are_fixed(model: Any) -> str | None:
    """Of a loss: no weight that is computed when it is read, and no dropout."""
    for name, module in model.named_modules():
        if is_parametrized(module):
            return f"{name} is parametrized: its weight is computed as often as it is read, by stock in another order"
        if module.training and _drops(module):
            return f"{name} drops at random: the fast path would draw in another order than stock"
    return None


def _drops(module: Any) -> bool:
    """Whether a module in train mode draws random numbers: a dropout layer, or SigLIP's attention."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Llama's attention has the setting too, but LeRobot does not call it.
    vision = hasattr(module, "out_proj") and hasattr(module, "q_proj")
    dropout = getattr(module, "dropout", 0.0)
    return vision and isinstance(dropout, float) and dropout > 0


def layers_match(model: Any) -> str | None:
    pair = model.vlm_with_expert
    text, expert = len(pair.get_vlm_model().text_model.layers), len(pair.lm_expert.layers)
    if text != expert:
        return f"{expert} expert layers beside {text} text layers"
    return heads_match(pair)


def heads_match(pair: Any) -> str | None:
    heads, shared = pair.num_attention_heads, pair.num_key_value_heads
    return f"{heads} query heads are no multiple of {shared} KV heads" if heads % shared else None


def parts(model: Any) -> str | None:
    """Of a chunk: why the parameters of this model cannot be read in place of calling its modules."""
    if not model.config.use_cache:
        return "use_cache=False: stock has no such path either"
    return pair_parts(model.vlm_with_expert) or _first_reason(head_sources(model, read_dims(model)))


def pair_parts(pair: Any) -> str | None:
    """The same of a pair alone."""
    vlm, expert = pair.get_vlm_model(), pair.lm_expert
    stacks = (("text", vlm.text_model.layers), ("expert", expert.layers))
    reason = parts_reason(vlm, pair_sources(pair, read_pair_dims(pair)), stacks)
    if reason is None and type(expert.norm) is not type(expert.layers[0].input_layernorm):
        return f"the expert's final norm is a {type(expert.norm).__qualname__}, not the norm of its layers"
    return reason


def heads_are_plain(model: Any) -> str | None:
    """Of a denoise step: why the projections around the layers cannot be read in place of calling them."""
    for name in HEADS:
        head = getattr(model, name)
        if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
            return f"{name} has a forward hook, or its forward replaced; it would not see the fused path"
        if head.weight.dtype is not torch.float32:
            return f"{name} is {head.weight.dtype}; stock feeds it float32, and so do we"
    return _first_reason(head_sources(model, read_dims(model)))


def _first_reason(read: Iterable[Source]) -> str | None:
    return next(filter(None, map(_source_reason, read)), None)


def parts_reason(vlm: Any, read: Iterable[Source], stacks: Sequence[tuple[str, Any]]) -> str | None:
    """Why the parameters of these modules cannot be read in place of calling them, or None.

    read    what is read      stacks  decoder layers among it, each with its name
    """
    reason = _first_reason(read)
    if reason is not None:
        return reason
    for label, stack in (("vision", vlm.vision_model.encoder.layers), *stacks):
        first = code_of(stack[0])
        for i, layer in enumerate(stack):
            if code_of(layer) != first:
                return f"{label} layer {i} is not like layer 0: they are not all of one kind"
    for label, stack in stacks:
        # ``probe`` runs one of them.
        if type(stack[0].input_layernorm) is not type(stack[0].post_attention_layernorm):
            return f"the norms of a {label} layer are of two kinds"
    vision = vlm.vision_model
    for name, module in (("vision_model", vision), ("vision_model.encoder", vision.encoder)):
        if not _from_library(type(module).forward):
            return f"{name} is a {type(module).__qualname__} with a forward of its own"
    return None


def _source_reason(source: Source) -> str | None:
    name, module, kind, *shapes = source
    if kind is not None and type(module) is not kind:
        cls = type(module)
        way = "; merge the adapter: policy.merge_and_unload()" if cls.__module__.startswith("peft.") else ""
        return f"{name} is a {cls.__module__}.{cls.__qualname__}, not the plain module{way}"
    if getattr(module, "max_norm", None) is not None:
        return f"{name} renormalises its rows (max_norm={module.max_norm}), which the engine does not"
    for key, shape in zip(("weight", "bias"), shapes, strict=True):
        found = getattr(module, key, None)
        if shape is None:
            if found is not None:
                return f"{name} has a {key}, which the kernels do not add"
            continue
        # A property, or an attribute beside the parameter, is computed from something: what the module does is not known.
        if found is None or module._parameters.get(key) is not found:
            return f"{name}.{key} is not a parameter of it"
        why = why_not_dense(found)
        if why is not None:
            return f"{name}.{key} is {why}"
        if not found.is_contiguous():
            return f"{name}.{key} is not contiguous; call .contiguous() on it"
        if len(found.shape) != len(shape) or any(
            w not in (None, n) for n, w in zip(found.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            return f"{name}.{key} is of shape {tuple(found.shape)}; accepted is ({wanted})"
    return None


_OWN = {"training", "layer_idx", "in_features", "out_features"}
"""What may differ from layer to layer: the expert's cross layers have other widths, and each knows its number."""


def code_of(module: Any) -> tuple[Any, ...]:
    """What a module and its submodules would compute: classes, their ``forward``, and plain settings such as a scale."""
    found: list[Any] = []
    for name, each in module.named_modules():
        settings = tuple(
            # Bound methods differ from object to object; what they are does not.
            (key, getattr(value, "__qualname__", repr(type(value))) if callable(value) else value)
            for key, value in vars(each).items()
            if key not in _OWN
            and key[0] != "_"
            and (isinstance(value, bool | int | float | str) or callable(value))
        )
        found.append((name, type(each), type(each).forward, settings, getattr(each, "bias", None) is None))
    return tuple(found)


_LIBRARIES = ("transformers", "torch", "smolvla_fast")


def _from_library(function: Any) -> bool:
    """Whether a function is written in transformers, torch or here. Asked of its code, for a wrapper of somebody else's has
    the name and module of what it wraps."""
    source = Path(function.__code__.co_filename)
    roots = (Path(sys.modules[name].__file__ or "").parent for name in _LIBRARIES if name in sys.modules)
    return any(source.is_relative_to(root) for root in roots)


def dtypes(model: Any) -> str | None:
    """model  a ``VLAFlowMatching``, or its pair"""
    home = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        if parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}; accepted are float32 and bfloat16"
        if parameter.device != home:
            return f"{name} is on {parameter.device} but others on {home}"
    for name in HEADS if hasattr(model, "state_proj") else ():
        dtype = getattr(model, name).weight.dtype
        if dtype is not torch.float32:
            return f"{name} is {dtype}; stock feeds it float32, and so do we"
    return None


def tier_reason(model: Any, tier: Tier) -> str | None:
    """Why no loss of this model is computed in this tier, or None."""
    if tier.stock_order or tier.quantized:
        return f"precision={tier.name!r} has no training path; accepted are 'auto', 'fp32' and 'bf16'"
    if tier.gemm_dtype is torch.float32:
        for name, parameter in model.named_parameters():
            if parameter.dtype is not torch.float32:
                return (
                    f"precision='fp32' and {name} is {parameter.dtype}: training multiplies in the dtype that "
                    "weights are stored in; accepted is 'auto'"
                )
    return None


def size_reason(model: Any) -> str | None:
    """Why frames of the size that the configuration announces are stock's affair, or None.

    What a batch brings is for ``call_reason`` to judge; this says it before the first one.
    """
    config = model.config
    side = model.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
    if config.resize_imgs_with_padding is not None:
        width, height = config.resize_imgs_with_padding
        if (height, width) != (side, side):
            return f"resize_imgs_with_padding={(width, height)}; accepted is {(side, side)}, what the vision tower is for"
        return None
    for name, feature in (config.image_features or {}).items():
        height, width = feature.shape[-2:]
        if (height, width) != (side, side) and "empty_camera" not in name:  # those get the size of the others
            return (
                f"{name} is {height} x {width} and resize_imgs_with_padding is None; accepted are frames of {side} x "
                f"{side}, what the vision tower is for"
            )
    return None
