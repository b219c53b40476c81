"""SmolVLM, the vision-language backbone (arXiv 2504.05299), in plain PyTorch.

A SigLIP vision tower, a connector (pixel shuffle and one projection) and Llama text layers. Attribute names and
state_dict keys are those of transformers, so weights cross over; the operations are the same ATen calls in the same
order, so results do too, bit by bit. SmolVLA drives the text layers itself (``smolvlm_with_expert``), hence they are
containers of weights here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.reference.rms_norm import rms_norm
from .vlm_config import LlamaConfig, SmolVLMConfig, SmolVLMVisionConfig


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": _gelu_tanh, "gelu": F.gelu, "silu": F.silu, "relu": F.relu,
}  # fmt: skip


def activation(name: str, field: str) -> Callable[[Tensor], Tensor]:
    """The activation function of a configuration field, ValueError naming the field if it is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{field} {name!r} is not supported; accepted are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class VisionOutput(NamedTuple):
    last_hidden_state: Tensor


class SmolVLMVisionEmbeddings(nn.Module):
    """Image to patch embeddings plus learned positions."""

    def __init__(self, config: SmolVLMVisionConfig):
        super().__init__()
        self.embed_dim = config.hidden_size
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, self.embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.num_patches_per_side = self.image_size // self.patch_size
        self.num_patches = self.num_patches_per_side**2
        self.num_positions = self.num_patches
        self.position_embedding = nn.Embedding(self.num_positions, self.embed_dim)

    def position_ids(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows · columns]: the learned position nearest to each patch; frames of another size share the same table.

        Fractions are rounded to ``dtype`` before they are looked up, which is what decides the bucket at a boundary:
        0, 1, 2, ... in order at the native size with the transformers releases that LeRobot 0.6.1 accepts.
        """
        side = self.num_patches_per_side
        boundaries = torch.arange(1 / side, 1.0, 1 / side, device=device)

        def buckets(count: int) -> Tensor:
            step = 1.0 / torch.tensor(count, device=device)
            fractions = torch.arange(count, device=device, dtype=torch.float32) * step
            return torch.bucketize(fractions.clamp(max=1.0 - 1e-6).to(dtype), boundaries, right=True)

        return (buckets(rows)[:, None] * side + buckets(columns)[None, :]).flatten()

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None) -> Tensor:
        """[B, 3, h, w] to [B, patches, width]. A mask may be given but must be all True: frames are never padded
        here."""
        if patch_attention_mask is not None and not bool(patch_attention_mask.all()):
            raise ValueError(
                "patch_attention_mask must be all True: SmolVLA's frames have no missing patches"
            )
        embeddings = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        rows, columns = (size // self.patch_size for size in pixel_values.shape[-2:])
        ids = self.position_ids(rows, columns, pixel_values.dtype, pixel_values.device)
        # One id per image and patch: the gradient of the table is then summed in the order stock sums it.
        return embeddings + self.position_embedding(ids.repeat(pixel_values.shape[0], 1))


class SmolVLMVisionAttention(nn.Module):
    """Multi-head attention without mask."""

    def __init__(self, config: SmolVLMVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        if self.head_dim * self.num_heads != self.embed_dim:
            raise ValueError(
                f"vision_config.hidden_size ({self.embed_dim}) must be a multiple of "
                f"num_attention_heads ({self.num_heads})"
            )
        self.scale = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, self.num_heads, self.head_dim)
        q = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        k = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.out_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class SmolVLMVisionMLP(nn.Module):
    def __init__(self, config: SmolVLMVisionConfig):
        super().__init__()
        self.config = config
        self.activation_fn = activation(config.hidden_act, "vision_config.hidden_act")
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SmolVLMEncoderLayer(nn.Module):
    """Pre-norm transformer layer; ``attention_mask`` stands where transformers has it and must be None."""

    def __init__(self, config: SmolVLMVisionConfig):
        super().__init__()
        self.embed_dim = config.hidden_size
        self.self_attn = SmolVLMVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)
        self.mlp = SmolVLMVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: None = None) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SmolVLMEncoder(nn.Module):
    def __init__(self, config: SmolVLMVisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([SmolVLMEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class SmolVLMVisionTransformer(nn.Module):
    """SigLIP: [B, 3, h, w] in [-1, 1] to [B, patches, width]."""

    def __init__(self, config: SmolVLMVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SmolVLMVisionEmbeddings(config)
        self.encoder = SmolVLMEncoder(config)
        self.patch_size = config.patch_size
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.patch_embedding.weight.dtype

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None) -> VisionOutput:
        hidden_states = self.encoder(self.embeddings(pixel_values, patch_attention_mask))
        return VisionOutput(self.post_layernorm(hidden_states))


class SmolVLMSimpleMLP(nn.Module):
    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        width = config.vision_config.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(width, config.text_config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class SmolVLMConnector(nn.Module):
    """Squares of ``scale_factor``² patches to one token each, projected to the text width."""

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.scale_factor = config.scale_factor
        self.modality_projection = SmolVLMSimpleMLP(config)

    def pixel_shuffle(self, x: Tensor, scale_factor: int = 2) -> Tensor:
        """[B, side², width] to [B, (side / s)², width · s²]; the s² patches of a square keep their row-major
        order."""
        batch, patches, width = x.shape
        side = int(patches**0.5)
        if side * side != patches or side % scale_factor:
            raise ValueError(
                f"the vision tower gives {patches} patches; the pixel shuffle needs a square whose side is "
                "a multiple "
                f"of scale_factor {scale_factor}. Check resize_imgs_with_padding (None keeps the frame's "
                "own size)"
            )
        squares = side // scale_factor
        x = x.view(batch, squares, scale_factor, squares, scale_factor, width).transpose(2, 3)
        return x.reshape(batch, squares * squares, scale_factor * scale_factor * width)

    def forward(self, image_hidden_states: Tensor) -> Tensor:
        return self.modality_projection(self.pixel_shuffle(image_hidden_states, self.scale_factor))


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LlamaAttention(nn.Module):
    """The projections of one attention; who attends to whom is decided by ``SmolVLMWithExpertModel``."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)


class LlamaMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = activation(config.hidden_act, "text_config.hidden_act")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaModel(nn.Module):
    """Token embedding (absent in the action expert), layers, final norm."""

    def __init__(self, config: LlamaConfig, *, embed: bool = True):
        super().__init__()
        self.config = config
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id) if embed else None
        )
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.embed_tokens


class SmolVLMModel(nn.Module):
    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.config = config
        self.vision_model = SmolVLMVisionTransformer(config.vision_config)
        self.connector = SmolVLMConnector(config)
        self.text_model = LlamaModel(config.text_config)

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.text_model.get_input_embeddings()


class SmolVLMForConditionalGeneration(nn.Module):
    """The backbone with its language head. SmolVLA never runs the head; checkpoints hold it."""

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.config = config
        self.model = SmolVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        initialise_weights(self.model.vision_model, config.vision_config.initializer_range)
        initialise_weights(self.model.connector, config.text_config.initializer_range)
        initialise_weights(self.model.text_model, config.text_config.initializer_range)
        initialise_weights(self.lm_head, config.text_config.initializer_range)
        if config.vision_config.dtype is not None:
            self.model.vision_model.to(config.vision_config.dtype)
        if config.text_config.dtype is not None:
            self.model.text_model.to(config.text_config.dtype)
        if config.tie_word_embeddings:
            embedding = self.model.get_input_embeddings()
            assert embedding is not None
            self.lm_head.weight = embedding.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.vision_model.dtype

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.model.get_input_embeddings()


def initialise_weights(module: nn.Module, std: float) -> None:
    """Normal weights of deviation ``std``, zero biases and padding row: how transformers starts this model."""
    if next(module.parameters()).is_meta:  # no values, and torch takes long to say so
        return
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
