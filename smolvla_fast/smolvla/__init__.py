"""SmolVLA in plain PyTorch: configuration, processors, model, training loss. Reads and writes LeRobot's checkpoints, and
needs neither LeRobot nor transformers' models. The reference implementation for everything faster."""

from .configuration_smolvla import SmolVLAConfig
from .features import FeatureType, NormalizationMode, PolicyFeature
from .modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from .processor_smolvla import (
    make_pre_post_processors,
    make_smolvla_pre_post_processors,
    prepare_observation_for_inference,
)
from .rtc import RTCAttentionSchedule, RTCConfig, RTCProcessor
from .smolvlm_with_expert import SmolVLMWithExpertModel

__all__ = [
    "FeatureType", "NormalizationMode", "PolicyFeature", "RTCAttentionSchedule", "RTCConfig", "RTCProcessor",
    "SmolVLAConfig", "SmolVLAPolicy", "SmolVLMWithExpertModel", "VLAFlowMatching",
    "make_pre_post_processors", "make_smolvla_pre_post_processors", "prepare_observation_for_inference",
]  # fmt: skip
