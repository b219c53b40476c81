"""May the engine serve this model, this call? Each question answers None for yes, or the reason why stock runs instead.

Asked before every chunk, because hooks, adapters, dtypes and configs change under a live policy. What a transformers
version computes inside a layer is not guessed from its number: ``probe`` runs the live modules beside the references.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..model.dense import memory_reason, why_not_dense
from ..model.dims import read_dims
from ..model.weights import HEADS, Source, read_patch_embedding, read_vision_layers, sources
from ..ops.reference.layer_norm import layer_norm
from ..ops.reference.linear import linear
from ..ops.reference.norm_swiglu import norm_swiglu
from ..ops.reference.patch_embed import patch_embed
from ..ops.reference.pixel_shuffle_linear import pixel_shuffle_linear
from ..ops.reference.rms_norm import rms_norm
from ..ops.select import reference_ops
from ..stages.vision import patch_positions, vision_layer
from .rtc import guidance_reason
from .source_digests import MODEL_METHODS, PAIR_METHODS, unknown_source

DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ("cpu", "cuda")


def model_reason(model: Any) -> str | None:
    """Why this model is outside the engine's range, or None. Reads structure only; cheap enough for every call."""
    try:
        return (
            source_reason(model)
            or _device_reason(model)
            or hook_reason(model)
            or memory_reason(model)
            or _structure_reason(model)
            or _dtype_reason(model)
        )
    except Exception as error:  # whatever a foreign structure raises here, stock may well run it
        return f"the structure is not SmolVLA's: {error!r}"


def source_reason(model: Any) -> str | None:
    """Why the code around this model is not what the engine stands in for, or None."""
    pair = model.vlm_with_expert
    for owner, names in ((model, MODEL_METHODS), (pair, PAIR_METHODS)):
        replaced = [name for name in (*names, "forward") if name in owner.__dict__]
        if replaced:
            return (
                f"{type(owner).__name__}.{replaced[0]} is replaced on the instance (torch.compile does this)"
            )
    return unknown_source(model, getattr(model, "rtc_processor", None))


def _structure_reason(model: Any) -> str | None:
    pair, config = model.vlm_with_expert, model.config
    text, expert = pair.get_vlm_model().text_model.layers, pair.lm_expert.layers
    if not config.use_cache:
        return "use_cache=False: stock has no such path either"
    if len(text) != len(expert):
        return f"{len(expert)} expert layers beside {len(text)} text layers: stock cannot run inference on these either"
    if pair.num_attention_heads % pair.num_key_value_heads:
        return (
            f"{pair.num_attention_heads} query heads are no multiple of {pair.num_key_value_heads} KV heads"
        )
    dims = read_dims(model)
    stacks = (("text", text), ("expert", expert))
    reason = parts_reason(pair.get_vlm_model(), sources(model, dims), stacks)
    if reason is not None:
        return reason
    if type(pair.lm_expert.norm) is not type(expert[0].input_layernorm):
        return f"the expert's final norm is a {type(pair.lm_expert.norm).__qualname__}, not the norm of its layers"
    return None


def parts_reason(vlm: Any, read: Iterable[Source], stacks: Sequence[tuple[str, Any]]) -> str | None:
    """Why the parameters of these modules cannot be read in place of calling them, or None.

    read    what is read      stacks  decoder layers among it, each with its name
    """
    for source in read:
        reason = _source_reason(source)
        if reason is not None:
            return reason
    for label, stack in (("vision", vlm.vision_model.encoder.layers), *stacks):
        first = _code(stack[0])
        for i, layer in enumerate(stack):
            if _code(layer) != first:
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
        return f"{name} is a {cls.__module__}.{cls.__qualname__}, not the plain module (an adapter?)"
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


def _code(module: Any) -> tuple[Any, ...]:
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


def _from_library(function: Any) -> bool:
    """Whether a function is transformers' or ours, wrappers by others not excepted."""
    source = function.__code__.co_filename.replace("\\", "/")
    return "/transformers/" in source or "/smolvla_fast/" in source or "/torch/" in source


def hook_reason(model: Any) -> str | None:
    """Which forward hook or replaced ``forward`` a fused path would pass by, or None."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a global forward hook is registered; it would not see the fused path"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook; it would not see the fused path"
        if "forward" in module.__dict__:
            return f"{name or 'the model'} has its forward replaced on the instance"
    return None


def _device_reason(model: Any) -> str | None:
    device = model.state_proj.weight.device
    return (
        None if device.type in DEVICES else f"the policy is on {device}; accepted are {' and '.join(DEVICES)}"
    )


def _dtype_reason(model: Any) -> str | None:
    device = model.state_proj.weight.device
    for name, parameter in model.named_parameters():
        if parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}; accepted are float32 and bfloat16"
        if parameter.device != device:
            return f"{name} is on {parameter.device} but state_proj on {device}"
    return head_reason(model)


def head_reason(model: Any) -> str | None:
    """Which head is not fed what stock feeds it, or None."""
    for name in HEADS:
        dtype = getattr(model, name).weight.dtype
        if dtype is not torch.float32:
            return f"{name} is {dtype}; stock feeds it float32, and so do we"
    return None


def call_reason(
    model: Any,
    images: Sequence[Tensor],
    image_masks: Sequence[Tensor],
    tokens: Tensor,
    token_masks: Tensor,
    state: Tensor,
    noise: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call is outside the engine's range, or None. What is accepted is said in full; whatever else a caller passes
    is for stock to answer or to refuse."""
    try:
        return (
            _circumstances(model)
            or _inputs_reason(model, images, image_masks, tokens, token_masks, state, noise)
            or guidance_reason(model, kwargs, len(state), state.device)
        )
    except Exception as error:
        return f"the arguments are not stock's usual ones: {error!r}"


def _circumstances(model: Any) -> str | None:
    if model.training:
        return "the model is in train mode; call policy.eval()"
    steps = model.config.num_steps
    if not isinstance(steps, Integral) or steps < 1:
        return f"num_steps={steps!r}; accepted are integers of 1 or more"
    if torch.is_autocast_enabled(model.state_proj.weight.device.type):
        return "autocast is on: its dtypes decide, not the tier"
    if torch.get_default_dtype() is not torch.float32:
        return f"torch's default dtype is {torch.get_default_dtype()}; stock computes RTC weights and times in it"
    device = model.state_proj.weight.device
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        # A default device is a mode too: of the policy's own kind it changes nothing.
        if not (isinstance(mode, DeviceContext) and mode.device.type == device.type):
            return f"a {type(mode).__qualname__} is on; it would not see into the kernels"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return (
            "a torch.func transform or forward-mode differentiation is on; it would not see into the kernels"
        )
    return None


def _inputs_reason(
    model: Any,
    images: Sequence[Tensor],
    image_masks: Sequence[Tensor],
    tokens: Tensor,
    token_masks: Tensor,
    state: Tensor,
    noise: Tensor | None,
) -> str | None:
    vlm, batch = model.vlm_with_expert.get_vlm_model(), state.shape[0]
    if not isinstance(images, list | tuple) or not isinstance(image_masks, list | tuple):
        return f"images are a {type(images).__qualname__}; accepted are lists"
    if not images or len(images) != len(image_masks):
        return f"{len(images)} images with {len(image_masks)} masks"
    given = {"state": state, "tokens": tokens, "language masks": token_masks}
    given |= {f"image {i}": image for i, image in enumerate(images)}
    given |= {f"image mask {i}": mask for i, mask in enumerate(image_masks)}
    given |= {} if noise is None else {"noise": noise}
    for name, tensor in given.items():
        why = why_not_dense(tensor)
        if why is not None:
            return f"{name} is {why}"
        if tensor.device != model.state_proj.weight.device:
            return f"{name} is on {tensor.device}, the policy on {model.state_proj.weight.device}"
    if batch == 0:
        return "an empty batch: stock raises its own error"
    if torch.is_grad_enabled():
        inputs = (*images, state, *([] if noise is None else [noise]))
        if any(x.requires_grad for x in inputs) or any(p.requires_grad for p in model.parameters()):
            return "autograd is on: wrap the call in torch.no_grad() unless you want gradients"
    side = vlm.vision_model.embeddings.image_size
    as_bytes = getattr(model, "takes_bytes", False)
    for image, mask in zip(images, image_masks, strict=True):
        if as_bytes and image.dtype is torch.uint8:
            if image.ndim != 4 or 3 not in (image.shape[1], image.shape[-1]) or image.shape[0] != batch:
                return f"frames of shape {tuple(image.shape)}; accepted are [{batch}, 3, h, w] and [{batch}, h, w, 3]"
        elif not image.is_floating_point():
            accepted = "floating point and uint8 are accepted" if as_bytes else "floating point is accepted"
            return f"images of dtype {image.dtype}; {accepted}"
        elif tuple(image.shape) != (batch, 3, side, side):
            wanted = (batch, 3, side, side)
            return f"images of shape {tuple(image.shape)}; the vision tower is for {wanted}"
        if mask.dtype is not torch.bool or tuple(mask.shape) != (batch,):
            return f"image masks {tuple(mask.shape)} {mask.dtype}; accepted is ({batch},) bool"
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape != token_masks.shape:
        return f"tokens {tuple(tokens.shape)} with masks {tuple(token_masks.shape)}; accepted is ({batch}, length) for both"
    if tokens.dtype not in (torch.int32, torch.int64) or token_masks.dtype is not torch.bool:
        return f"tokens of {tokens.dtype}, language masks of dtype {token_masks.dtype}; accepted are int64 and bool"
    # Masked tokens may be cut off here and are looked up by stock. On a GPU the question would wait for the device.
    rows = vlm.text_model.get_input_embeddings().weight.shape[0]
    if not tokens.is_cuda and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < rows:
        return f"token ids beyond the table's {rows} rows: stock raises its own error"
    for name, value, shape in (
        ("noise", noise, (batch, model.config.chunk_size, model.action_in_proj.weight.shape[1])),
        ("state", state, (batch, model.state_proj.weight.shape[1])),
    ):
        if value is not None and (tuple(value.shape) != shape or value.dtype is not torch.float32):
            return f"{name} {tuple(value.shape)} {value.dtype}; accepted is {shape} float32"
    return None


def probe(model: Any, exact: bool, frozen_only: bool = False) -> str | None:
    """Run the live vision, text and expert modules beside the references on small inputs; None if they agree.

    exact  the ``exact`` tier: bits must be equal. Else a relative difference up to 1e-2 passes: a transformers release
           that reorders roundings stays far below (bf16 rounds at 4e-3), one that computes something else far above.
    frozen_only  leave the expert out: training calls its modules
    """
    try:
        return _probe(model, exact, frozen_only)
    except Exception as error:  # whatever a foreign module raises on a plain input, stock may well run it
        return f"the modules are not SmolVLA's: {error!r}"


def _probe(model: Any, exact: bool, frozen_only: bool) -> str | None:
    pair = model.vlm_with_expert
    vlm = pair.get_vlm_model()
    with torch.no_grad():
        for name, live, ours in (
            *_probe_vision(vlm),
            *_probe_decoder(vlm.text_model),
            *(() if frozen_only else _probe_decoder(pair.lm_expert)),
        ):
            if exact and not torch.equal(live, ours) and not (live.isnan().any() and ours.isnan().any()):
                return f"{name} of this transformers version rounds otherwise than the reference"
            difference = (live.double() - ours.double()).norm()
            if difference > 1e-2 * live.double().norm():
                return f"{name} of this transformers version computes something else than the reference"
    return None


def probed_code(model: Any) -> tuple[Any, ...]:
    """What ``probe`` has run: a replaced class, a patched ``forward`` or another setting asks for another run."""
    pair = model.vlm_with_expert
    vlm = pair.get_vlm_model()
    stacks = (vlm.vision_model.encoder, vlm.text_model, pair.lm_expert)
    return (
        *(_code(stack.layers[0]) for stack in stacks),
        _code(vlm.vision_model.embeddings),
        _code(vlm.connector),
    )


def _ramp(*shape: int, like: Tensor) -> Tensor:
    """Deterministic values in [-1, 1] that move no random state."""
    return (
        torch.arange(torch.Size(shape).numel(), device=like.device).mul(0.7).sin().view(shape).to(like.dtype)
    )


def _probe_vision(vlm: Any) -> Iterable[tuple[str, Tensor, Tensor]]:
    tower, connector = vlm.vision_model, vlm.connector
    patch, position = read_patch_embedding(vlm, lambda x: x)
    side = tower.embeddings.image_size
    pixels = _ramp(1, 3, side, side, like=patch.weight)
    patches = torch.ones(
        1, *(2 * [side // tower.embeddings.patch_size]), dtype=torch.bool, device=pixels.device
    )
    live = tower.embeddings(pixel_values=pixels, patch_attention_mask=patches)
    yield "the patch embedding", live, patch_embed(pixels, *patch, position, patch_positions(vlm, pixels))

    module, layer = tower.encoder.layers[0], next(iter(read_vision_layers(vlm, lambda x: x)))
    x = _ramp(1, 9, position.shape[1], like=patch.weight)
    live = module(x, None)
    ours = vision_layer(reference_ops(), layer, x, module.self_attn.num_heads)
    yield "the vision layer", live[0] if isinstance(live, tuple) else live, ours
    norm = tower.post_layernorm
    yield "the vision norm", norm(x), layer_norm(x, norm.weight, norm.bias, norm.eps)

    factor = connector.scale_factor
    projection = connector.modality_projection.proj.weight
    x = _ramp(1, (2 * factor) ** 2, position.shape[1], like=projection)
    yield "the connector", connector(x), pixel_shuffle_linear(x, projection, factor)


def _probe_decoder(stack: Any) -> Iterable[tuple[str, Tensor, Tensor]]:
    layer = stack.layers[0]
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    x = _ramp(1, 3, norm.weight.shape[0], like=mlp.gate_proj.weight)
    yield "the decoder norm", norm(x), rms_norm(x, norm.weight, norm.variance_epsilon)
    h = norm_swiglu(x, (norm.weight, norm.variance_epsilon), mlp.gate_proj.weight, mlp.up_proj.weight)
    yield "the decoder MLP", mlp(norm(x)), linear(h, mlp.down_proj.weight)
