"""The configuration of a SmolVLA policy, field for field LeRobot's, and its ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from .devices import best_device, device_is_available
from .features import (
    ACTION,
    OBS_IMAGES,
    OBS_STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
    parse_enum,
    parse_features,
)
from .hub import CONFIG_NAME, find_file, split_hub_options
from .optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from .rtc import RTCConfig

logger = logging.getLogger(__name__)

_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_ENDLESS = {(math.inf, "optimizer_grad_clip_norm")}  # infinity: do not clip


def _normalization_default() -> dict[str, NormalizationMode]:
    return {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode.MEAN_STD,
        "ACTION": NormalizationMode.MEAN_STD,
    }


def check_kinds(settings: Any) -> None:
    """ValueError for a dataclass field with a value of another type, or a number that is not finite."""
    for entry in dataclasses.fields(settings):
        kinds = [kind.strip() for kind in str(entry.type).split("|")]
        accepted = tuple(k for kind in kinds for k in _KINDS.get(kind, ()))
        value = getattr(settings, entry.name)
        if not accepted or (value is None and "None" in kinds):
            continue
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise ValueError(f"{entry.name} must be of type {entry.type}, got {value!r}")
        if isinstance(value, float) and not (math.isfinite(value) or (value, entry.name) in _ENDLESS):
            raise ValueError(f"{entry.name} must be a finite number, got {value!r}")


@dataclass
class SmolVLAConfig:
    """Every setting of SmolVLA (arXiv 2506.01844). Corresponds to LeRobot 0.6.1's ``SmolVLAConfig``, defaults
    included.

    Model input and output
      input_features, output_features   name -> ``PolicyFeature``; "action" is the only output used
      chunk_size, n_action_steps        actions predicted at once; how many of them ``select_action`` serves
      max_state_dim, max_action_dim     widths that states and actions are padded to with zeros
      resize_imgs_with_padding          (width, height) in pixels that frames are fitted into; None leaves them as
                                        they are
      empty_cameras                     missing cameras that are replaced by masked blank frames
      adapt_to_pi_aloha                 convert joints and grippers between Aloha's and the pretraining conventions
      tokenizer_max_length, pad_language_to   tokens kept of the task; "longest" (of the batch) or "max_length"
      add_image_special_tokens          surround each image by the backbone's special tokens
      prefix_length                     pad the prefix to this many tokens if it is shorter
    Model
      vlm_model_name, load_vlm_weights  backbone: folder or Hub id; whether to start from its weights
      num_vlm_layers, num_expert_layers, self_attn_every_n_layers, expert_width_multiplier, attention_mode
                                        see ``SmolVLMWithExpertModel``
      num_steps                         Euler steps from noise to actions
      min_period, max_period            wavelengths of the time embedding
      use_cache                         keep the prefix's keys and values; sampling needs True
      compile_model, compile_mode       ``torch.compile`` of sampling and training loss
      rtc_config                        real-time chunking, see ``RTCConfig``
    Training
      freeze_vision_encoder, train_expert_only, train_state_proj, optimizer_*, scheduler_*

    Raises ValueError naming the field for values that cannot work, NotImplementedError for
    ``use_delta_joint_actions_aloha``. An unavailable ``device`` is replaced by the best one, with a warning;
    None stands for the best one.
    """

    n_obs_steps: int = 1
    input_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    device: str | None = None
    use_amp: bool = False
    use_peft: bool = False
    push_to_hub: bool = True
    repo_id: str | None = None
    private: bool | None = None
    tags: list[str] | None = None
    license: str | None = None
    pretrained_path: Path | None = None
    pretrained_revision: str | None = None

    chunk_size: int = 50
    n_action_steps: int = 50
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_normalization_default)
    max_state_dim: int = 32
    max_action_dim: int = 32
    resize_imgs_with_padding: tuple[int, int] | None = (512, 512)
    empty_cameras: int = 0
    adapt_to_pi_aloha: bool = False
    use_delta_joint_actions_aloha: bool = False
    tokenizer_max_length: int = 48
    num_steps: int = 10
    use_cache: bool = True

    freeze_vision_encoder: bool = True
    train_expert_only: bool = True
    train_state_proj: bool = True
    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-10
    optimizer_grad_clip_norm: float = 10
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6

    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    load_vlm_weights: bool = False
    add_image_special_tokens: bool = False
    attention_mode: str = "cross_attn"
    prefix_length: int = -1
    pad_language_to: str = "longest"
    num_expert_layers: int = -1
    num_vlm_layers: int = 16
    self_attn_every_n_layers: int = 2
    expert_width_multiplier: float = 0.75
    min_period: float = 4e-3
    max_period: float = 4.0
    rtc_config: RTCConfig | None = None
    compile_model: bool = False
    compile_mode: str = "max-autotune"

    def __post_init__(self) -> None:
        self._parse_fields()
        check_kinds(self)
        self._check_values()
        if not self.device:
            self.device = best_device()
            logger.info("no device is named, using %r", self.device)
        elif not device_is_available(self.device):
            chosen = best_device()
            logger.warning("device %r is not available here, using %r", self.device, chosen)
            self.device = chosen
        if self.use_amp and self.device.startswith("cuda:"):
            raise ValueError(f"use_amp with device {self.device!r} is refused by LeRobot; accepted is 'cuda'")
        if self.use_amp and self.device == "mps":
            logger.warning("use_amp is switched off: automatic mixed precision is not available on mps")
            self.use_amp = False

    def _parse_fields(self) -> None:
        """Converts JSON's lists, words and mappings to tuples, enums and features."""
        self.input_features = parse_features(self.input_features, "input_features")
        self.output_features = parse_features(self.output_features, "output_features")
        if not isinstance(self.normalization_mapping, dict):
            raise ValueError(
                f"normalization_mapping must be a dictionary, got {self.normalization_mapping!r}"
            )
        self.normalization_mapping = {
            parse_enum(FeatureType, kind, "normalization_mapping").value: parse_enum(
                NormalizationMode, mode, f"normalization_mapping[{kind!r}]"
            )
            for kind, mode in self.normalization_mapping.items()
        }
        self.rtc_config = RTCConfig.parse(self.rtc_config)
        if self.pretrained_path is not None:
            self.pretrained_path = Path(self.pretrained_path)
        for name, kind in (("resize_imgs_with_padding", int), ("optimizer_betas", float)):
            value = getattr(self, name)
            if value is None and name == "resize_imgs_with_padding":
                continue
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise ValueError(f"{name} must hold two values, got {value!r}")
            if any(isinstance(x, bool) or not isinstance(x, (int, kind)) for x in value):
                raise ValueError(f"{name} must hold two values of type {kind.__name__}, got {value!r}")
            setattr(self, name, tuple(value))

    def _check_values(self) -> None:
        at_least_one = ("chunk_size", "n_action_steps", "num_steps", "tokenizer_max_length", "max_state_dim")
        for name in (*at_least_one, "max_action_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps ({self.n_action_steps}) may not exceed chunk_size ({self.chunk_size}): "
                "a chunk holds no more actions to serve"
            )
        if self.use_delta_joint_actions_aloha:
            raise NotImplementedError(
                "use_delta_joint_actions_aloha is not implemented, as in LeRobot; it must be False"
            )
        if self.attention_mode not in ("cross_attn", "self_attn"):
            raise ValueError(
                f"attention_mode must be 'cross_attn' or 'self_attn', got {self.attention_mode!r}"
            )
        if self.pad_language_to not in ("longest", "max_length"):
            raise ValueError(
                f"pad_language_to must be 'longest' or 'max_length', got {self.pad_language_to!r}"
            )
        if self.empty_cameras < 0:
            raise ValueError(f"empty_cameras must not be negative, got {self.empty_cameras}")
        if self.resize_imgs_with_padding is not None and min(self.resize_imgs_with_padding) < 1:
            raise ValueError(
                f"resize_imgs_with_padding must be positive, got {self.resize_imgs_with_padding}"
            )
        if not 0 < self.min_period <= self.max_period:
            raise ValueError(
                f"min_period ({self.min_period}) and max_period ({self.max_period}) must satisfy 0 < min <= "
                "max"
            )
        if self.expert_width_multiplier <= 0:
            raise ValueError(f"expert_width_multiplier must be positive, got {self.expert_width_multiplier}")

    def validate_features(self) -> None:
        """Adds the blank cameras of ``empty_cameras`` to ``input_features``; idempotent."""
        if self.input_features is None:
            self.input_features = {}
        for index in range(self.empty_cameras):
            self.input_features[f"{OBS_IMAGES}.empty_camera_{index}"] = PolicyFeature(
                FeatureType.VISUAL, (3, 480, 640)
            )

    @property
    def type(self) -> str:
        return "smolvla"

    @property
    def observation_delta_indices(self) -> list[int]:
        return [0]

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def _features(
        self, source: dict[str, PolicyFeature] | None, kind: FeatureType
    ) -> dict[str, PolicyFeature]:
        return {name: feature for name, feature in (source or {}).items() if feature.type is kind}

    @property
    def robot_state_feature(self) -> PolicyFeature | None:
        return self._features(self.input_features, FeatureType.STATE).get(OBS_STATE)

    @property
    def env_state_feature(self) -> PolicyFeature | None:
        return next(iter(self._features(self.input_features, FeatureType.ENV).values()), None)

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        return self._features(self.input_features, FeatureType.VISUAL)

    @property
    def action_feature(self) -> PolicyFeature | None:
        return self._features(self.output_features, FeatureType.ACTION).get(ACTION)

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``: LeRobot's fields in LeRobot's order, "type" first."""
        return {"type": self.type, **_to_json(dataclasses.asdict(self))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SmolVLAConfig:
        """From parsed JSON; missing fields take their defaults. ValueError for another policy or unknown fields."""
        values = dict(values)
        kind = values.pop("type", None)
        if kind != "smolvla":
            raise ValueError(f"the config's 'type' is {kind!r}; a SmolVLA configuration has 'smolvla'")
        known = [entry.name for entry in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown fields {unknown} in a SmolVLA configuration; accepted are {known}")
        return cls(**values)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``config.json`` into a folder, which is created."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=4), encoding="utf-8")

    _save_pretrained = save_pretrained

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **hub_options: Any) -> SmolVLAConfig:
        """Read ``config.json`` of a folder or a Hub repository."""
        options = split_hub_options(hub_options, "SmolVLAConfig.from_pretrained")
        path = find_file(pretrained_name_or_path, CONFIG_NAME, **options)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(_to_json(key)): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    return value
