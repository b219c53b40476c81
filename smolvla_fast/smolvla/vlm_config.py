"""The configuration of the vision-language backbone, read from the ``config.json`` that transformers writes.

Only what SmolVLA computes with is kept; everything else in the file (rope settings, generation options, fields of
other model families) has no influence on the model and is ignored. Names and defaults are those of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _dtype(values: Mapping[str, Any]) -> torch.dtype | None:
    """``dtype``, called ``torch_dtype`` before transformers 4.56; "float32" or "torch.float32"."""
    name = values.get("dtype", values.get("torch_dtype"))
    if name is None or isinstance(name, torch.dtype):
        return name
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} in the VLM's config.json is not a torch dtype, e.g. 'bfloat16'")
    return dtype


@dataclass
class SmolVLMVisionConfig:
    """SigLIP vision tower (arXiv 2303.15343)."""

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: torch.dtype | None = None


@dataclass
class LlamaConfig:
    """Llama text layers (arXiv 2302.13971); also the shape of the action expert."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    # 0, or null in the file: as many as there are query heads, and the hidden size divided among them.
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: Any = 2
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )


@dataclass
class SmolVLMConfig:
    """The backbone: a vision tower, a pixel shuffle by ``scale_factor`` with one projection, and text layers."""

    vision_config: SmolVLMVisionConfig = field(default_factory=SmolVLMVisionConfig)
    text_config: LlamaConfig = field(
        default_factory=lambda: LlamaConfig(rms_norm_eps=1e-5, pad_token_id=128_002)
    )
    scale_factor: int = 2
    image_token_id: int = 128257
    pad_token_id: int | None = 128_002
    tie_word_embeddings: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SmolVLMConfig:
        """From the parsed ``config.json``; a missing field takes the default of transformers."""
        kind = values.get("model_type", "smolvlm")
        if kind != "smolvlm":
            raise ValueError(
                f"the backbone of SmolVLA must be a 'smolvlm' model, its config.json says {kind!r}"
            )
        vision, text = values.get("vision_config") or {}, values.get("text_config")
        parts: dict[str, Any] = {
            "vision_config": SmolVLMVisionConfig(
                **{**_known(SmolVLMVisionConfig, vision), "dtype": _dtype(vision)}
            ),
            "dtype": _dtype(values),
        }
        if text is not None:
            kind = text.get("model_type", "llama")
            if kind != "llama":
                raise ValueError(
                    f"the text layers of SmolVLA's backbone must be 'llama', its config.json says {kind!r}"
                )
            parts["text_config"] = LlamaConfig(**{**_known(LlamaConfig, text), "dtype": _dtype(text)})
        return cls(**{**_known(cls, values), **parts})

    @classmethod
    def from_file(cls, path: str | Path) -> SmolVLMConfig:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        return cls.from_dict(values)
