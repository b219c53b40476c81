"""Writes configuration and processor of a SmolVLM backbone to a folder, from which policies are made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# SmolVLM2-500M, of which SmolVLA keeps the first 16 text layers.
FULL_TEXT = {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
}  # fmt: skip
FULL_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 512, "patch_size": 16,
}  # fmt: skip
FULL_VOCAB = 49280
# Computes a chunk in milliseconds. Head counts are odd and widths no powers of two, like the real model's.
TINY_TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
TINY_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip
TINY_VOCAB = 320


def make_vlm_folder(
    folder: str | Path,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    vocab_size: int = FULL_VOCAB,
    scale_factor: int = 4,
    images: bool = False,
) -> Path:
    """Writes configuration and processor of a SmolVLM to a folder, for ``SmolVLAConfig.vlm_model_name``.

    The tokenizer has one token per byte, so it encodes any task text; it is not SmolVLM2's.

    text, vision  fields that differ from SmolVLM2-500M
    vocab_size    rows of the embedding, at least 270
    scale_factor  pixel-shuffle factor of the connector
    images        whether image and video processors are required, as LeRobot's policy does; if not, the tokenizer alone is
                  written where their packages (Pillow, torchvision, num2words) are missing
    returns       the folder
    raises        ValueError for a vocabulary below the tokenizer's, ImportError for required processors
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
