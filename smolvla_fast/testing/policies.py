"""SmolVLA policies and observations made offline, for tests, benchmarks and ``smolvla-fast demo``.

Nothing here is trained. The weights are random but scaled so that the model behaves like one: attention is
far from uniform, and the action chunk visibly depends on images, language, state and noise. A test on weights
without that property passes whatever the kernels compute.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .backbone import FULL_TEXT, FULL_VISION, FULL_VOCAB, TINY_TEXT, TINY_VISION, TINY_VOCAB, make_vlm_folder
from .observations import make_noise, make_observation  # noqa: F401
from .weights import LAYOUTS, SkipRandomFill, cast, fill_weights

IMAGES = "observation.images"

TINY_CONFIG = {"chunk_size": 10, "n_action_steps": 10, "num_vlm_layers": 4}
TINY_FRAME = (24, 32)
FULL_FRAME = (480, 640)


def make_policy(
    size: str = "full",
    *,
    origin: str = "lerobot",
    seed: int = 0,
    cameras: int = 2,
    layout: str = "fp32",
    device: str | torch.device = "cpu",
    state_dim: int = 6,
    action_dim: int = 6,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    **config: Any,
) -> Any:
    """A ``SmolVLAPolicy`` with random, well-scaled weights, in eval mode.

    origin  "lerobot": the class of the installed LeRobot; "ours": ``smolvla_fast.SmolVLAPolicy``, with equal weights
    size    "full": the 450 046 176 parameters of lerobot/smolvla_base; "tiny": a chunk takes milliseconds
    layout  dtypes of the parameters
            "fp32"       all fp32 (``policy.float()``)
            "mixed"      what LeRobot makes of smolvla_base: vision, text and expert bf16; the projections of
                         state, action and time and the expert's cross K/V fp32
            "bf16_text"  ``load_vlm_weights=False`` with a bf16 text config: as "mixed", but vision, connector
                         and lm_head fp32
            "bf16"       all bf16 (``policy.to(torch.bfloat16)``); stock fails on it, for its noise is fp32
    text, vision  sizes that differ from those of ``size``, by the names of the transformers configurations
    folder  where the VLM's configuration is written and kept; None: a temporary folder, gone on return
    config  fields of ``SmolVLAConfig``, such as ``num_steps=4``
    raises  ValueError for an unknown size or layout, ImportError without LeRobot
    The caller's random state does not move.
    """
    if size not in ("full", "tiny"):
        raise ValueError(f"size={size!r} is not a size; accepted are 'full' and 'tiny'")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not a layout; accepted are {', '.join(map(repr, LAYOUTS))}")
    FeatureType, PolicyFeature, SmolVLAConfig, SmolVLAPolicy = _classes(origin)
    tiny = size == "tiny"
    text = {**(TINY_TEXT if tiny else FULL_TEXT), **(text or {})}
    vision = {**(TINY_VISION if tiny else FULL_VISION), **(vision or {})}
    fields: dict[str, Any] = {
        **(TINY_CONFIG if tiny else {}),
        "resize_imgs_with_padding": (vision["image_size"],) * 2,
    }
    fields = {**fields, **config}
    fields["n_action_steps"] = min(fields.get("n_action_steps", 50), fields.get("chunk_size", 50))
    frame = (3, *(TINY_FRAME if tiny else FULL_FRAME))
    inputs = {f"{IMAGES}.camera{i + 1}": PolicyFeature(FeatureType.VISUAL, frame) for i in range(cameras)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (state_dim,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (action_dim,))}

    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="smolvla-"))
        vocab = TINY_VOCAB if tiny else FULL_VOCAB
        make_vlm_folder(folder, text=text, vision=vision, vocab_size=vocab, images=origin == "lerobot")
        settings = SmolVLAConfig(
            vlm_model_name=str(folder), load_vlm_weights=False, device="cpu",
            input_features=inputs, output_features=outputs, **fields,
        )  # fmt: skip
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(SkipRandomFill())
        policy = SmolVLAPolicy(settings)
        # Our own class reads tokenizer and special tokens when first asked, from a folder that is about to go.
        _ = policy.model.global_image_start_token
        _read_processor(policy.model.vlm_with_expert, folder)
    fill_weights(policy.model, seed)
    cast(policy, layout)
    settings.device = str(device)
    return policy.to(device).eval()


def _read_processor(pair: Any, folder: str | Path) -> None:
    """Has the pair read its processor, or where the folder holds the tokenizer alone, a processor of that alone."""
    try:
        _ = pair.processor
    except (ImportError, OSError):  # transformers' reasons: no Pillow, or no file of an image processor
        from transformers import AutoTokenizer

        pair._processor = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder))


def _classes(origin: str) -> tuple[Any, Any, Any, Any]:
    """FeatureType, PolicyFeature, SmolVLAConfig, SmolVLAPolicy."""
    if origin == "ours":
        from ..smolvla import SmolVLAConfig, SmolVLAPolicy
        from ..smolvla.features import FeatureType, PolicyFeature

        return FeatureType, PolicyFeature, SmolVLAConfig, SmolVLAPolicy
    if origin != "lerobot":
        raise ValueError(f"origin={origin!r} is no origin; accepted are 'lerobot' and 'ours'")
    from lerobot.configs import types
    from lerobot.policies.smolvla import configuration_smolvla, modeling_smolvla

    return (
        types.FeatureType,
        types.PolicyFeature,
        configuration_smolvla.SmolVLAConfig,
        modeling_smolvla.SmolVLAPolicy,
    )
