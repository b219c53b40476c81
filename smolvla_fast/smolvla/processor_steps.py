"""The steps of SmolVLA's processors, except normalisation. Names and settings are those LeRobot writes to JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .devices import device_is_available
from .features import (
    OBS_ENV_STATE,
    OBS_IMAGE,
    OBS_IMAGES,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
    OBS_SUBTASK_ATTENTION_MASK,
    OBS_SUBTASK_TOKENS,
)
from .transition import Transition, TransitionKey

FLOAT_DTYPES = {
    "float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
    "half": torch.float16, "float": torch.float32, "double": torch.float64,
}  # fmt: skip


class ProcessorStep:
    """One step: returns a new transition, and leaves the given one as it is."""

    registry_name: ClassVar[str]

    def __call__(self, transition: Transition) -> Transition:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The constructor arguments for the JSON file."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors for a safetensors file; empty for a step without state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``."""

    def reset(self) -> None:
        """Clears state between episodes."""


def _observation(transition: Transition) -> dict[str, Any]:
    observation = transition.get(TransitionKey.OBSERVATION)
    if not isinstance(observation, dict):
        raise ValueError("the batch holds no observation: at least one key must start with 'observation.'")
    return dict(observation)


@dataclass
class RenameObservationsProcessorStep(ProcessorStep):
    """Renames observations by ``rename_map``."""

    registry_name: ClassVar[str] = "rename_observations_processor"
    rename_map: dict[str, str] = field(default_factory=dict)

    def __call__(self, transition: Transition) -> Transition:
        renamed = {self.rename_map.get(key, key): value for key, value in _observation(transition).items()}
        return {**transition, TransitionKey.OBSERVATION: renamed}

    def get_config(self) -> dict[str, Any]:
        return {"rename_map": self.rename_map}


@dataclass
class AddBatchDimensionProcessorStep(ProcessorStep):
    """Makes a batch of one from a single sample; leaves values with a batch dimension as they are."""

    registry_name: ClassVar[str] = "to_batch_processor"

    # Observation key (or prefix, ending in a dot) -> number of dimensions of a single sample.
    _SINGLE: ClassVar[dict[str, int]] = {OBS_STATE: 1, OBS_ENV_STATE: 1, OBS_IMAGE: 3, f"{OBS_IMAGES}.": 3}
    # Lists that are one sample's where their first entry has this type.
    _LISTS: ClassVar[dict[str, type]] = {
        "messages": dict,
        "message_streams": str,
        "target_message_indices": int,
    }

    def __call__(self, transition: Transition) -> Transition:
        transition = dict(transition)
        action = transition.get(TransitionKey.ACTION)
        if action is not None:
            transition[TransitionKey.ACTION] = action.unsqueeze(0) if action.dim() == 1 else action
        if transition.get(TransitionKey.OBSERVATION) is not None:
            observation = _observation(transition)
            transition[TransitionKey.OBSERVATION] = {k: self._batched(k, v) for k, v in observation.items()}
        complementary = transition.get(TransitionKey.COMPLEMENTARY_DATA)
        if complementary is not None:
            transition[TransitionKey.COMPLEMENTARY_DATA] = self._batch_complementary(dict(complementary))
        return transition

    def _batched(self, key: str, value: Any) -> Any:
        prefix = f"{OBS_IMAGES}."
        dims = self._SINGLE.get(prefix if key.startswith(prefix) else key)
        return value.unsqueeze(0) if isinstance(value, Tensor) and value.dim() == dims else value

    def _batch_complementary(self, data: dict[str, Any]) -> dict[str, Any]:
        for key in ("language_persistent", "language_events"):
            data.pop(key, None)
        if isinstance(data.get("task"), str):
            data["task"] = [data["task"]]
        for key in ("index", "task_index"):
            if isinstance(data.get(key), Tensor) and data[key].dim() == 0:
                data[key] = data[key].unsqueeze(0)
        for key, kind in self._LISTS.items():
            value = data.get(key)
            if isinstance(value, list) and (not value or isinstance(value[0], kind)):
                data[key] = [value]
        return data


@dataclass
class NewLineTaskProcessorStep(ProcessorStep):
    """Ends the task, a string or a list of strings, with a newline, as in the model's training data."""

    registry_name: ClassVar[str] = "smolvla_new_line_processor"

    def __call__(self, transition: Transition) -> Transition:
        data = transition.get(TransitionKey.COMPLEMENTARY_DATA)
        if not isinstance(data, dict):
            raise ValueError("the transition holds no complementary data, so there is no 'task'")
        task = data.get("task")
        if isinstance(task, str):
            task = _end_line(task)
        elif isinstance(task, list) and all(isinstance(entry, str) for entry in task):
            task = [_end_line(entry) for entry in task]
        else:
            return transition
        return {**transition, TransitionKey.COMPLEMENTARY_DATA: {**data, "task": task}}


def _end_line(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


@dataclass
class TokenizerProcessorStep(ProcessorStep):
    """Tokenizes the task: ids [B, T] int64 and their mask [B, T] bool, T <= max_length.

    tokenizer_name  folder or Hub id     tokenizer  a tokenizer object instead; it is not written to JSON
    padding         "longest": T of the longest task in the batch; "max_length": T = max_length
    raises          ValueError for a missing task or one that is not text
    """

    registry_name: ClassVar[str] = "tokenizer_processor"
    tokenizer_name: str | None = None
    tokenizer: Any = None
    max_length: int = 512
    task_key: str = "task"
    padding_side: str = "right"
    padding: str = "max_length"
    truncation: bool = True
    input_tokenizer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            self.input_tokenizer = self.tokenizer
            return
        if self.tokenizer_name is None:
            raise ValueError(
                "tokenizer_processor needs 'tokenizer_name' (a folder or a Hub id) or a 'tokenizer'"
            )
        from transformers import AutoTokenizer

        self.input_tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name)

    def __call__(self, transition: Transition) -> Transition:
        observation = _observation(transition)
        data = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        task = _texts(data.get(self.task_key))
        if task is None:
            raise ValueError(
                f"{self.task_key!r} must be a string or a list of strings (the instruction in words), "
                f"got {data.get(self.task_key)!r}"
            )
        device = _device_of(transition)
        ids, mask = self._tokenize(task, device)
        observation[OBS_LANGUAGE_TOKENS], observation[OBS_LANGUAGE_ATTENTION_MASK] = ids, mask
        subtask = _texts(data.get("subtask"))
        if subtask is not None:
            ids, mask = self._tokenize(subtask, device)
            observation[OBS_SUBTASK_TOKENS], observation[OBS_SUBTASK_ATTENTION_MASK] = ids, mask
        return {**transition, TransitionKey.OBSERVATION: observation}

    def _tokenize(self, texts: list[str], device: torch.device | None) -> tuple[Tensor, Tensor]:
        encoded = self.input_tokenizer(
            texts,
            max_length=self.max_length,
            truncation=self.truncation,
            padding=self.padding,
            padding_side=self.padding_side,
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"].to(torch.bool)
        return (ids, mask) if device is None else (ids.to(device), mask.to(device))

    def get_config(self) -> dict[str, Any]:
        names = ["max_length", "task_key", "padding_side", "padding", "truncation"]
        if self.tokenizer_name is not None and self.tokenizer is None:
            names.append("tokenizer_name")
        return {name: getattr(self, name) for name in names}


def _texts(value: Any) -> list[str] | None:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
        return list(value)
    return None


def _device_of(transition: Transition) -> torch.device | None:
    """The device of the batch's first tensor."""
    values = [
        *(transition.get(TransitionKey.OBSERVATION) or {}).values(),
        transition.get(TransitionKey.ACTION),
    ]
    return next((value.device for value in values if isinstance(value, Tensor)), None)


@dataclass
class DeviceProcessorStep(ProcessorStep):
    """Moves every tensor to ``device``, and casts floating ones to ``float_dtype`` if that is given.

    A tensor on another GPU stays there. raises  ValueError for a device that this machine does not have
    """

    registry_name: ClassVar[str] = "device_processor"
    device: str = "cpu"
    float_dtype: str | None = None

    def __post_init__(self) -> None:
        if not device_is_available(str(self.device)):
            raise ValueError(
                f"device_processor asks for device {self.device!r}, which is not available here; pass "
                "preprocessor_overrides={'device_processor': {'device': 'cpu'}}"
            )
        if self.float_dtype is not None and self.float_dtype not in FLOAT_DTYPES:
            raise ValueError(f"float_dtype {self.float_dtype!r} is not one of {sorted(FLOAT_DTYPES)}")
        self.tensor_device = torch.device(self.device)
        # The file names the kind of device, not the card of the machine that wrote it.
        self.device = self.tensor_device.type

    def _move(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        target = value.device if value.is_cuda and self.tensor_device.type == "cuda" else self.tensor_device
        if target.type == "mps" and value.dtype == torch.float64:
            value = value.to(torch.float32)
        if value.device != target:
            value = value.to(target, non_blocking=target.type == "cuda")
        if self.float_dtype is not None and value.is_floating_point():
            value = value.to(FLOAT_DTYPES[self.float_dtype])
        return value

    def __call__(self, transition: Transition) -> Transition:
        moved = {key: self._move(value) for key, value in transition.items()}
        for key in (TransitionKey.OBSERVATION, TransitionKey.COMPLEMENTARY_DATA):
            if isinstance(transition.get(key), dict):
                moved[key] = {name: self._move(value) for name, value in transition[key].items()}
        return moved

    def get_config(self) -> dict[str, Any]:
        return {"device": self.device, "float_dtype": self.float_dtype}
