"""Rules of one call: what is accepted is said in full; whatever else a caller passes is for stock to answer or to refuse."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..model.dense import why_not_dense


class Call(NamedTuple):
    """What ``sample_actions`` or ``forward`` of LeRobot's ``VLAFlowMatching`` was given.

    images       C of [B, 3, side, side] in [-1, 1]      image_masks  C of [B] bool
                 of a model that ``takes_bytes`` also uint8 frames of any size
                 of a loss also C of [B, tokens, M], what ``LossEngine.encode`` made of them
    tokens       [B, T] token ids      token_masks  [B, T] bool      state  [B, R] fp32
    noise        [B, S, A] fp32 or None
    actions      [B, S, A] fp32 and time [B] fp32 or None: of a loss
    kwargs       of a chunk: real-time chunking
    """

    images: Any
    image_masks: Any
    tokens: Tensor
    token_masks: Tensor
    state: Tensor
    noise: Tensor | None = None
    actions: Tensor | None = None
    time: Tensor | None = None
    kwargs: dict[str, Any] | None = None

    @property
    def has_image_tokens(self) -> bool:
        kinds = {getattr(image, "ndim", None) for image in self.images}
        return self.actions is not None and kinds == {3}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of it by the name that reasons use."""
        found = {"state": self.state, "tokens": self.tokens, "language masks": self.token_masks}
        found |= {f"image {i}": image for i, image in enumerate(self.images)}
        found |= {f"image mask {i}": mask for i, mask in enumerate(self.image_masks)}
        optional = {"noise": self.noise, "actions": self.actions, "time": self.time}
        return found | {name: each for name, each in optional.items() if each is not None}


def circumstances(model: Any, call: Call) -> str | None:
    """Of a chunk: what is set around the call and would not see into the kernels, or changes stock."""
    steps, kind = model.config.num_steps, model.state_proj.weight.device.type
    if model.training:
        return "the model is in train mode; call policy.eval()"
    if not isinstance(steps, Integral) or steps < 1:
        return f"num_steps={steps!r}; accepted are integers of 1 or more"
    return ambient(kind)


def ambient(kind: str) -> str | None:
    """What is set around a call on this kind of device and would not see into the kernels, or changes stock."""
    if _autocast_is_on(kind):
        return "autocast is on: its dtypes decide, not the tier"
    if torch.get_default_dtype() is not torch.float32:
        return f"torch's default dtype is {torch.get_default_dtype()}; stock computes RTC weights and times in it"
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        # A default device is a mode too: of the policy's own kind it changes nothing.
        if not (isinstance(mode, DeviceContext) and mode.device.type == kind):
            return f"a {type(mode).__qualname__} is on; it would not see into the kernels"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return (
            "a torch.func transform or forward-mode differentiation is on; it would not see into the kernels"
        )
    return None


def _autocast_is_on(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # a kind of device that has no autocast
        return False


def autocast_in_bf16(model: Any, call: Call) -> str | None:
    """Of a loss."""
    kind = model.state_proj.weight.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not torch.bfloat16:
        return f"autocast is on in {torch.get_autocast_dtype(kind)}; accepted is bfloat16"
    return None


def dense(model: Any, call: Call) -> str | None:
    """Lists of as many masks as images, and every tensor dense, on the policy's device, of one sample or more."""
    images, masks, device = call.images, call.image_masks, model.state_proj.weight.device
    for name, given in (("images", images), ("image masks", masks)):
        if not isinstance(given, list | tuple):
            return f"{name} are a {type(given).__qualname__}; accepted are lists"
    if not images or len(images) != len(masks):
        return f"{len(images)} images with {len(masks)} masks"
    for name, tensor in call.tensors().items():
        why = why_not_dense(tensor)
        if why is not None:
            return f"{name} is {why}"
        if tensor.device != device:
            return f"{name} is on {tensor.device}, the policy on {device}"
    return "an empty batch: stock raises its own error" if len(call.state) == 0 else None


def no_gradients(model: Any, call: Call) -> str | None:
    """Of a chunk."""
    if not torch.is_grad_enabled():  # asked first: a model has many parameters
        return None
    if any(each.requires_grad for each in (*call.tensors().values(), *model.parameters())):
        return "autograd is on: wrap the call in torch.no_grad() unless you want gradients"
    return None


def constants(model: Any, call: Call) -> str | None:
    """Of a loss."""
    read = [each for name, each in call.tensors().items() if name != "state"]
    if torch.is_grad_enabled() and any(each.requires_grad for each in read):
        return "images, actions, noise or time require a gradient; the fast path takes them for constants"
    return None


def images(model: Any, call: Call) -> str | None:
    size, takes_bytes = len(call.state), getattr(model, "takes_bytes", False)
    side = model.vlm_with_expert.get_vlm_model().vision_model.embeddings.image_size
    for image, mask in zip(call.images, call.image_masks, strict=True):
        if takes_bytes and image.dtype is torch.uint8:
            if image.ndim != 4 or 3 not in (image.shape[1], image.shape[-1]) or image.shape[0] != size:
                return f"frames of shape {tuple(image.shape)}; accepted are [{size}, 3, h, w] and [{size}, h, w, 3]"
        elif not image.is_floating_point():
            accepted = (
                "floating point and uint8 are accepted" if takes_bytes else "floating point is accepted"
            )
            return f"images of dtype {image.dtype}; {accepted}"
        elif tuple(image.shape) != (wanted := (size, 3, side, side)) and not (
            call.has_image_tokens and len(image) == size
        ):
            return f"images of shape {tuple(image.shape)}; the vision tower is for {wanted}"
        if mask.dtype is not torch.bool or tuple(mask.shape) != (size,):
            return f"image masks {tuple(mask.shape)} {mask.dtype}; accepted is ({size},) bool"
    return None


def token_shapes(model: Any, call: Call) -> str | None:
    ids, masks, size = call.tokens, call.token_masks, len(call.state)
    if ids.ndim != 2 or ids.shape[0] != size or ids.shape != masks.shape:
        return f"tokens {tuple(ids.shape)} with masks {tuple(masks.shape)}; accepted is ({size}, length) for both"
    if ids.dtype not in (torch.int32, torch.int64) or masks.dtype is not torch.bool:
        return f"tokens of {ids.dtype}, language masks of dtype {masks.dtype}; accepted are int64 or int32, and bool"
    return None


def tokens(model: Any, call: Call) -> str | None:
    reason, ids = token_shapes(model, call), call.tokens
    if reason is not None:
        return reason
    # Masked tokens may be cut off here and are looked up by stock. On a GPU the question would wait for the device.
    rows = model.vlm_with_expert.get_vlm_model().text_model.get_input_embeddings().weight.shape[0]
    if not ids.is_cuda and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        return f"token ids beyond the table's {rows} rows: stock raises its own error"
    return None


def floats(model: Any, call: Call) -> str | None:
    size = len(call.state)
    chunk = (size, model.config.chunk_size, model.action_in_proj.weight.shape[1])
    for name, value, shape in (
        ("noise", call.noise, chunk),
        ("actions", call.actions, chunk),
        ("time", call.time, (size,)),
        ("state", call.state, (size, model.state_proj.weight.shape[1])),
    ):
        if value is not None and (tuple(value.shape) != shape or value.dtype is not torch.float32):
            return f"{name} {tuple(value.shape)} {value.dtype}; accepted is {shape} float32"
    return None
