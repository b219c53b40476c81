"""SmolVLA policies and observations made offline, for tests, benchmarks and ``smolvla-fast demo``.

Nothing here is trained. The weights are random but scaled so that the model behaves like one: attention is
far from uniform, and the action chunk visibly depends on images, language, state and noise. A test on weights
without that property passes whatever the kernels compute.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..model.weights import is_cross
from .frames import draw_frame

TASK = "pick up the red cube"
LAYOUTS = ("fp32", "mixed", "bf16_text", "bf16")
IMAGES = "observation.images"

# SmolVLM2-500M, of which SmolVLA keeps the first 16 text layers.
FULL_TEXT = {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
}  # fmt: skip
FULL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
FULL_VOCAB = 49280
# A chunk in milliseconds. Odd head counts and widths that are no powers of two, like the real model's.
TINY_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
TINY_VOCAB = 320
TINY_CONFIG = {"chunk_size": 10, "n_action_steps": 10, "num_vlm_layers": 4}
TINY_FRAME = (24, 32)
FULL_FRAME = (480, 640)


def make_vlm_folder(
    folder: str | Path,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    vocab_size: int = FULL_VOCAB,
    scale_factor: int = 4,
    images: bool = False,
) -> Path:
    """Writes configuration and processor of a SmolVLM, for ``SmolVLAConfig.vlm_model_name`` to name offline.

    text, vision  fields that differ from SmolVLM2-500M      vocab_size  rows of the embedding, at least 270
    scale_factor  pixel-shuffle factor of the connector
    images        whether the image and video processors are needed, as LeRobot does; else the tokenizer goes alone where
                  what transformers makes them with (Pillow, torchvision, num2words) is not installed
    returns       the folder
    raises        ValueError for a vocabulary below the tokenizer's, ImportError for processors that are needed
    The tokenizer has one token a byte, so any task text can be encoded; it is not SmolVLM2's.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the byte tokenizer has {len(tokenizer)} tokens"
        )
    make_config: Any = transformers.SmolVLMConfig  # stubs know none of its fields
    config = make_config(
        text_config={
            "model_type": "llama",
            **FULL_TEXT,
            "vocab_size": vocab_size,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **(text or {}),
        },
        vision_config={**FULL_VISION, "hidden_act": "gelu_pytorch_tanh", **(vision or {})},
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config.save_pretrained(folder)
    try:
        extra = {}
        if hasattr(transformers, "SmolVLMVideoProcessor"):
            extra["video_processor"] = transformers.SmolVLMVideoProcessor()
        extra["image_processor"] = transformers.SmolVLMImageProcessor()
        processor: Any = transformers.SmolVLMProcessor(tokenizer=tokenizer, **extra)
    except ImportError:
        if images:
            raise
        processor = tokenizer
    processor.save_pretrained(folder)
    return folder


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
        stack.enter_context(_SkipRandomFill())
        policy = SmolVLAPolicy(settings)
        # Our own class reads tokenizer and special tokens when first asked, from a folder that is about to go.
        _ = policy.model.global_image_start_token
        _read_processor(policy.model.vlm_with_expert, folder)
    fill_weights(policy.model, seed)
    _cast(policy, layout)
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


class _SkipRandomFill(TorchFunctionMode):
    """Leaves out the constructors' random initialisation: slow, and overwritten by ``fill_weights``."""

    # By name: transformers puts functions of its own in the place of torch's while it constructs.
    fills = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.fills:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# Standard deviation of a matrix's entries, times sqrt(inputs). With these, a query looks at about a
# third of its keys; an average over so many loses size, which the output projections give back.
GAINS = {
    "q_proj": 1.6, "k_proj": 1.6, "v_proj": 1.2, "o_proj": 2.0, "out_proj": 2.0, "gate_proj": 1.3,
    "action_time_mlp_in": 1.5, "action_time_mlp_out": 2.0, "state_proj": 6.0,
}  # fmt: skip


@torch.no_grad()
def fill_weights(model: Any, seed: int) -> None:
    """Overwrites every parameter of a ``VLAFlowMatching`` (LeRobot's or ours) with seeded random values."""
    generator = torch.Generator().manual_seed(seed)
    width = model.vlm_with_expert.get_vlm_model().text_model.norm.weight.shape[0]
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2]
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
        if name.endswith("bias"):
            values *= 0.1
        elif values.ndim == 1:
            values = 1 + 0.2 * values
        elif owner in ("embed_tokens", "proj"):
            # The prefix is multiplied by sqrt(width); a residual stream much larger than what the layers
            # add to it would hide their errors.
            inputs = 1 if owner == "embed_tokens" else values.shape[1]
            values *= 2.0 / math.sqrt(width * inputs)
        elif owner == "position_embedding":
            values *= 0.5
        else:
            values *= GAINS.get(owner, 1.0) / math.sqrt(values[0].numel())
        parameter.copy_(values)


def _cast(policy: Any, layout: str) -> None:
    """Sets the dtypes of a layout: of parameters only. Buffers keep theirs, as in LeRobot."""
    pair = policy.model.vlm_with_expert
    if layout == "fp32":
        return
    stays: set[int] = set()
    if layout != "bf16":
        for name, parameter in policy.model.named_parameters():
            if not name.startswith("vlm_with_expert."):
                stays.add(id(parameter))
        for index, layer in enumerate(pair.lm_expert.layers):
            if is_cross(pair, index):
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    stays.update(map(id, projection.parameters()))
    if layout == "bf16_text":
        vlm = pair.get_vlm_model()
        for module in (vlm.vision_model, vlm.connector, pair.vlm.lm_head):
            stays.update(map(id, module.parameters()))
    for parameter in policy.parameters():
        if id(parameter) not in stays:
            parameter.data = parameter.data.to(torch.bfloat16)


def make_observation(
    policy: Any,
    *,
    batch: int = 1,
    seed: int = 0,
    cameras: int | Sequence[str] | None = None,
    task: str | Sequence[str] = TASK,
    language_length: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """A batch for ``predict_action_chunk``: drawn camera frames, a robot state and the tokenized task.

    batch            B      seed  of frames and state
    cameras          how many of the policy's cameras are present, or their keys; None: all but the empty ones
    task             one text for all samples, or one for each
    language_length  tokens to which the language is padded; None: the policy's ``tokenizer_max_length``, or
                     the longest text if that is longer. Nothing is ever cut off.
    image_size       height, width of the frames; None: as the policy's configuration declares them
    returns          frames [B, 3, height, width] fp32 in [0, 1], ``observation.state`` [B, state size] fp32,
                     ``observation.language.tokens`` [B, T] int64 and ``.attention_mask`` [B, T] bool
    raises           ValueError for a task count other than B, a length below the text's, or an unknown camera
    """
    config = policy.config
    generator = torch.Generator().manual_seed(seed)
    known = [key for key in config.image_features if "empty_camera" not in key]
    keys = known if cameras is None else known[:cameras] if isinstance(cameras, int) else list(cameras)
    missing = [key for key in keys if key not in config.image_features]
    if missing or (isinstance(cameras, int) and cameras > len(known)):
        raise ValueError(f"cameras={cameras!r}: the policy has {list(config.image_features)}")
    observation: dict[str, Tensor] = {}
    for key in keys:
        height, width = image_size or config.image_features[key].shape[1:]
        observation[key] = torch.stack([draw_frame(height, width, generator) for _ in range(batch)])
    if not keys or config.robot_state_feature is None:
        raise ValueError(
            f"SmolVLA computes with 'observation.state' and at least one camera; the policy's configuration declares "
            f"{list(config.input_features or {})}"
        )
    size = config.robot_state_feature.shape[0]
    observation["observation.state"] = torch.randn(batch, size, generator=generator)
    tokens, mask = tokenize(policy, task, batch, language_length)
    observation["observation.language.tokens"] = tokens
    observation["observation.language.attention_mask"] = mask
    device = next(policy.parameters()).device
    return {key: value.to(device) for key, value in observation.items()}


def make_noise(policy: Any, *, batch: int = 1, seed: int = 0) -> Tensor:
    """The noise a chunk starts from, [B, S, A] fp32 on the policy's device."""
    shape = (batch, policy.config.chunk_size, policy.config.max_action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    return noise.to(next(policy.parameters()).device)


def tokenize(policy: Any, task: str | Sequence[str], batch: int, length: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, T] each, as LeRobot's processor makes them: newline at the end, padding right.

    Uses the policy's own tokenizer; a policy that has none gets its text's bytes.
    """
    texts = [task] * batch if isinstance(task, str) else list(task)
    if len(texts) != batch:
        raise ValueError(f"{len(texts)} tasks for a batch of {batch}; give one text, or one for each sample")
    texts = [text if text.endswith("\n") else text + "\n" for text in texts]
    pair = policy.model.vlm_with_expert
    try:
        tokenizer = getattr(getattr(pair, "processor", None), "tokenizer", None)
    except ImportError:  # what a backbone's processors of images and videos need; its text needs none of it
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(pair.model_id)
    if tokenizer is None:
        ids, pad = [list(text.encode()) for text in texts], 0
    else:
        ids, pad = [tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id
    longest = max(map(len, ids))
    if length is None:
        length = max(longest, policy.config.tokenizer_max_length)
    if length < longest:
        raise ValueError(
            f"language_length={length} would cut a task of {longest} tokens; it must be at least that"
        )
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in ids])
    mask = torch.arange(length)[None, :] < torch.tensor([len(row) for row in ids])[:, None]
    return tokens, mask
