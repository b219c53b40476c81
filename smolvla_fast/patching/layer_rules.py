"""Rules of one call below ``sample_actions``: what is accepted is said in full; whatever else is passed is for stock."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.cuda_graphs import capture_of_user
from ..layers import caches
from ..layers.run import LayerCall
from ..model.dense import why_not_dense
from ..model.precision import resolve_tier
from ..model.weights import is_cross, representative_weight
from . import call_rules, model_rules
from .call_rules import Call, ambient
from .settings import SETTINGS, TRAINING


class LayerRequest(NamedTuple):
    """A call of one of the pair's methods.

    method   its name      given  its arguments by stock's names
    """

    method: str
    given: dict[str, Any]

    @property
    def call(self) -> LayerCall:
        """Of ``forward`` and of one layer."""
        given = self.given
        cache, used = given["past_key_values"], bool(given["use_cache"])
        whole = self.method == "forward"
        # Until 0.6 the caller says it; since then whoever passes no cache to ``forward`` wants one.
        fill = used and bool(given.get("fill_kv_cache", whole and cache is None))
        return LayerCall(
            given["inputs_embeds"], given["position_ids"], given["attention_mask"], cache if used else None, fill,
            given.get("model_layers"), given.get("layer_idx", 0),
        )  # fmt: skip


def requested(method: str, signature: Signature, pair: Any, args: Any, kwargs: Any) -> LayerRequest:
    """Raises TypeError as stock would."""
    bound = signature.bind(pair, *args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    given.pop("self")
    return LayerRequest(method, given)


def mode_reason(pair: Any, request: LayerRequest) -> str | None:
    return _mode_reason(pair, pair)


def _mode_reason(module: Any, pair: Any) -> str | None:
    if module.training and not pair.__dict__[SETTINGS].training:
        return (
            "the model is in train mode; call policy.eval(), or patch(policy, training=True), "
            f"which {TRAINING}=1 asks for where LeRobot's commands patch"
        )
    # Of a captured function that was asked before it began.
    return ambient(next(pair.parameters()).device.type) if capture_of_user() is None else None


def arguments(pair: Any, request: LayerRequest) -> str | None:
    if request.method == "embed_image":
        return _image(pair, request.given["image"])
    call = request.call
    streams, home = call.inputs, next(pair.parameters()).device
    if not isinstance(streams, list | tuple) or len(streams) != 2 or all(x is None for x in streams):
        return "inputs_embeds are not a prefix and a suffix; accepted are two, one of which may be None"
    widths = (pair.get_vlm_model().text_model.norm.weight.shape[0], pair.lm_expert.norm.weight.shape[0])
    for name, x, width in zip(("the prefix", "the suffix"), streams, widths, strict=True):
        if x is None:
            continue
        why = _float_reason(name, x, home)
        if why is not None:
            return why
        if x.ndim != 3 or x.shape[-1] != width or not x.numel():
            return f"{name} is {tuple(x.shape)}; accepted is [batch, tokens, {width}]"
    present = [x for x in streams if x is not None]
    batch, tokens = len(present[0]), sum(x.shape[1] for x in present)
    for name, each in (("position_ids", call.positions), ("attention_mask", call.mask)):
        why = why_not_dense(each)
        if why is not None or each.device != home:
            return f"{name} is {why or each.device}; accepted is a dense tensor on {home}"
    if call.positions.is_floating_point() or tuple(call.positions.shape) != (batch, tokens):
        return f"position_ids {tuple(call.positions.shape)}; accepted are ({batch}, {tokens}) integers"
    return _cache(pair, request, call, batch, tokens)


def _cache(pair: Any, request: LayerRequest, call: LayerCall, batch: int, tokens: int) -> str | None:
    """What of a cache, and hence of a mask, goes with these inputs."""
    prefix, suffix = call.inputs
    given, used = request.given["past_key_values"], bool(request.given["use_cache"])
    if (given is not None or request.given.get("fill_kv_cache")) and not used:
        return "a cache, or one to fill, with use_cache=False"
    if prefix is not None and suffix is not None and call.cache is not None:
        return "a prefix and a suffix with a cache; accepted is one of them, or no cache"
    whole, before = request.method == "forward", 0
    if suffix is None:
        if not used or (whole and not (call.fill and call.cache is None)):
            return "a prefix alone; accepted is one that fills a new cache"
        if not whole and call.cache is None:
            return "one layer without a cache to fill; accepted is one"
        if not whole and not call.fill and _holds(call.cache, call.layer):
            return f"the cache holds layer {call.layer} already; accepted is a prefix that fills it"
    elif prefix is None:
        if call.cache is None or call.fill:
            return "a suffix alone; accepted is one with the cache of its prefix"
        depths = range(pair.num_vlm_layers) if whole else [call.layer]
        lengths = {caches.read(call.cache, depth)[0].shape[1] for depth in depths}
        if len(lengths) > 1:
            return f"the cache holds {sorted(lengths)} tokens in its layers; accepted are as many in each"
        (before,) = lengths
        why = _kv_reason(pair, call.cache, depths, (batch, before))
        if why is not None:
            return why
    elif used:
        return "a prefix and a suffix with use_cache; accepted is use_cache=False"
    cross = request.method == "forward_cross_attn_layer"
    if cross and suffix is None:
        return "a cross-attention layer without a suffix; stock raises its own error"
    wanted = (batch, tokens, before + tokens)
    if call.mask.dtype is not torch.bool or tuple(call.mask.shape) != wanted:
        return f"attention_mask {tuple(call.mask.shape)} {call.mask.dtype}; accepted is {wanted} bool"
    return _layers(pair, call, whole)


def _kv_reason(pair: Any, cache: Any, depths: Iterable[int], sizes: tuple[int, int]) -> str | None:
    """Which cached keys and values do not go with so many samples and tokens of this pair."""
    head_dim = pair.get_vlm_model().text_model.layers[0].self_attn.head_dim
    wanted, home = (*sizes, pair.num_key_value_heads, head_dim), next(pair.parameters()).device
    for depth in depths:
        k, v = caches.read(cache, depth)
        for each in (k, v):
            if each.shape != wanted or each.device != home or each.dtype not in model_rules.DTYPES:
                return (
                    f"the cache holds {tuple(each.shape)} {each.dtype} on {each.device}; accepted is {wanted}"
                )
        if k.dtype is not v.dtype:
            return f"the cache holds keys in {k.dtype}, values in {v.dtype}"
    return None


def _holds(cache: Any, layer: int) -> bool:
    try:
        return caches.held(cache, layer)[0].numel() > 0
    except (KeyError, IndexError, AttributeError):
        return False


def _layers(pair: Any, call: LayerCall, whole: bool) -> str | None:
    """Whether the layers are the pair's own, and there where they are needed."""
    stacks = [pair.get_vlm_model().text_model, pair.lm_expert]
    own = pair.get_model_layers(stacks)
    for depth in range(pair.num_vlm_layers) if whole else [call.layer]:
        if not whole and any(call.model_layers[i][depth] is not own[i][depth] for i in (0, 1)):
            return f"layer {depth} of model_layers is not the model's own"
        if call.inputs[0] is None and own[1][depth] is None and not is_cross(pair, depth):
            return f"layer {depth} has no expert; stock raises its own error"
    return None


def _image(pair: Any, image: Any) -> str | None:
    side, home = pair.get_vlm_model().vision_model.embeddings.image_size, next(pair.parameters()).device
    why = _float_reason("image", image, home)
    if why is None and (image.ndim != 4 or tuple(image.shape[1:]) != (3, side, side) or not len(image)):
        why = f"image is {tuple(image.shape)}; accepted is [n, 3, {side}, {side}]"
    return why


def _float_reason(name: str, x: Any, home: torch.device) -> str | None:
    if not isinstance(x, Tensor):
        return f"{name} is a {type(x).__qualname__}; accepted is a tensor"
    why = why_not_dense(x)
    if why is not None:
        return f"{name} is {why}"
    if x.dtype not in model_rules.DTYPES or x.device != home:
        return f"{name} is {x.dtype} on {x.device}; accepted are float32 and bfloat16 on {home}"
    return None


def needs_grad(pair: Any, request: LayerRequest) -> bool:
    """Whether what is computed would have a graph in stock."""
    if not torch.is_grad_enabled():
        return False
    vlm = pair.get_vlm_model()
    if request.method == "embed_image":
        inputs, read = [request.given["image"]], [vlm.vision_model, vlm.connector]
    else:
        inputs = list(request.call.inputs)
        read = [
            stack for x, stack in zip(inputs, (vlm.text_model, pair.lm_expert), strict=True) if x is not None
        ]
        call, depths = request.call, range(pair.num_vlm_layers if request.method == "forward" else 0)
        if call.cache is not None and call.inputs[0] is None:
            inputs += [x for i in depths or [call.layer] for x in caches.held(call.cache, i)]
    return any(x is not None and x.requires_grad for x in inputs) or any(
        each.requires_grad for module in read for each in module.parameters()
    )


def gradients(pair: Any, request: LayerRequest) -> str | None:
    if not needs_grad(pair, request):
        return None
    if request.method == "embed_image":
        return "gradients go through the vision tower; its own modules compute it"
    settings = pair.__dict__[SETTINGS]
    if not settings.training:
        return "gradients are on: call it under torch.no_grad(), or patch(policy, training=True)"
    tier = resolve_tier(settings.precision, representative_weight(pair).dtype)
    return (
        model_rules.tier_reason(pair, tier)
        or model_rules.modules_are_fixed(pair)
        or model_rules.backward_hooks(pair)
    )


class StepRequest(NamedTuple):
    """Arguments of ``denoise_step``."""

    pad_masks: Tensor
    cache: Any
    x: Tensor
    time: Tensor


def step_arguments(model: Any, request: StepRequest) -> str | None:
    home = next(model.parameters()).device
    config, (pad_masks, cache, x, time) = model.config, request
    batch = len(pad_masks)
    chunk = (batch, config.chunk_size, model.action_in_proj.weight.shape[1])
    for name, each, shape, dtype in (
        ("prefix_pad_masks", pad_masks, (batch, pad_masks.shape[-1]), torch.bool),
        ("x_t", x, chunk, torch.float32),
        ("timestep", time, (batch,), torch.float32),
    ):
        why = why_not_dense(each)
        if why is not None or each.device != home or each.dtype is not dtype or tuple(each.shape) != shape:
            return f"{name} is {why or f'{each.dtype} {tuple(each.shape)} on {each.device}'}; accepted is {dtype} {shape}"
    if cache is None or not config.use_cache:
        return "no cache of the prefix"
    pair = model.vlm_with_expert
    depths = range(len(pair.lm_expert.layers))
    why = _kv_reason(pair, cache, depths, (batch, pad_masks.shape[1]))
    return why or _no_gradients(model, x, time, *(each for i in depths for each in caches.held(cache, i)))


def prefix_arguments(model: Any, call: Call) -> str | None:
    """Of ``embed_prefix``."""
    for rule in (call_rules.dense, call_rules.images, call_rules.token_shapes, call_rules.floats):
        reason = rule(model, call)
        if reason is not None:
            return reason
    return _no_gradients(model, *call.tensors().values())


def _no_gradients(model: Any, *read: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*read, *model.parameters())):
        return "gradients are on: call it under torch.no_grad()"
    return _mode_reason(model, model.vlm_with_expert)
