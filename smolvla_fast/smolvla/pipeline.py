"""Processor pipelines and their files, as LeRobot writes them: ``<name>.json``, and safetensors per step with state."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .hub import find_file, split_hub_options
from .normalization import NormalizerProcessorStep, UnnormalizerProcessorStep
from .processor_steps import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NewLineTaskProcessorStep,
    ProcessorStep,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
)
from .transition import Transition, batch_to_transition, transition_to_batch
from .weights_io import read_safetensors

STEPS: dict[str, type[ProcessorStep]] = {
    step.registry_name: step
    for step in (
        RenameObservationsProcessorStep,
        AddBatchDimensionProcessorStep,
        NewLineTaskProcessorStep,
        TokenizerProcessorStep,
        DeviceProcessorStep,
        NormalizerProcessorStep,
        UnnormalizerProcessorStep,
    )
}


@dataclass
class PolicyProcessorPipeline:
    """Steps applied in order to a transition. Corresponds to LeRobot's class of the same name.

    to_transition, to_output  conversions before and after the steps: of a batch (preprocessor) or an action (postprocessor)
    """

    steps: Sequence[ProcessorStep] = field(default_factory=list)
    name: str = "DataProcessorPipeline"
    to_transition: Callable[[Any], Transition] = field(default=batch_to_transition, repr=False)
    to_output: Callable[[Transition], Any] = field(default=transition_to_batch, repr=False)

    def __call__(self, data: Any) -> Any:
        transition = self.to_transition(data)
        for step in self.steps:
            transition = step(transition)
        return self.to_output(transition)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> ProcessorStep:
        return self.steps[index]

    def reset(self) -> None:
        for step in self.steps:
            step.reset()

    def _state_key(self, index: int) -> str:
        safe = re.sub(r"[^a-zA-Z0-9_]", "_", self.name.lower())
        return f"{safe}_step_{index}_{self.steps[index].registry_name}"

    def get_config(self) -> dict[str, Any]:
        """The content of the JSON file."""
        entries = []
        for index, step in enumerate(self.steps):
            entry: dict[str, Any] = {"registry_name": step.registry_name, "config": step.get_config()}
            if step.state_dict():
                entry["state_file"] = f"{self._state_key(index)}.safetensors"
            entries.append(entry)
        return {"name": self.name, "steps": entries}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of every step with state, by the stem of its file's name."""
        states = ((self._state_key(index), step.state_dict()) for index, step in enumerate(self.steps))
        return {key: {name: value.clone() for name, value in state.items()} for key, state in states if state}

    def save_pretrained(self, save_directory: str | Path, *, config_filename: str | None = None) -> None:
        """Write the JSON and safetensors files into a folder, which is created."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for key, state in self.state_dict().items():
            save_file(state, str(folder / f"{key}.safetensors"))
        name = config_filename or re.sub(r"[^a-zA-Z0-9_]", "_", self.name.lower()) + ".json"
        (folder / name).write_text(json.dumps(self.get_config(), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config_filename: str,
        *,
        overrides: dict[str, dict[str, Any]] | None = None,
        to_transition: Callable[[Any], Transition] | None = None,
        to_output: Callable[[Transition], Any] | None = None,
        **hub_options: Any,
    ) -> PolicyProcessorPipeline:
        """A pipeline from a folder or a Hub repository.

        overrides  step name -> settings that replace the file's, e.g. ``{"device_processor": {"device": "cpu"}}``
        raises     FileNotFoundError for a missing file, ValueError for a file that is not a pipeline or a step that
                   is unknown or refuses its settings, KeyError for an override of a step that is not there
        """
        options = split_hub_options(hub_options, "PolicyProcessorPipeline.from_pretrained")
        path = find_file(pretrained_model_name_or_path, config_filename, **options)
        name, entries = _read_entries(path)
        overrides = overrides or {}
        names = [entry["registry_name"] for entry in entries]
        unused = sorted(set(overrides) - set(names))
        if unused:
            raise KeyError(f"overrides for steps {unused}, which {path} does not have; its steps are {names}")
        steps = [_make_step(entry, overrides.get(entry["registry_name"], {}), path) for entry in entries]
        for step, entry in zip(steps, entries, strict=True):
            _load_state(step, entry, pretrained_model_name_or_path, options)
        return cls(steps, name, to_transition or batch_to_transition, to_output or transition_to_batch)


def read_normalizers(
    source: str | Path, config_filename: str, **options: Any
) -> list[NormalizerProcessorStep]:
    """The normalising steps of a saved pipeline, with their statistics. Other steps are not made.

    raises  as ``PolicyProcessorPipeline.from_pretrained``
    """
    path = find_file(source, config_filename, **options)
    steps: list[NormalizerProcessorStep] = []
    for entry in _read_steps(path)[1]:
        if entry.get("registry_name") in ("normalizer_processor", "unnormalizer_processor"):
            step = _make_step(entry, {}, path)
            _load_state(step, entry, source, options)
            steps.append(cast(NormalizerProcessorStep, step))
    return steps


def _load_state(
    step: ProcessorStep, entry: dict[str, Any], source: str | Path, options: dict[str, Any]
) -> None:
    if entry.get("state_file"):
        path = find_file(source, entry["state_file"], **options)
        try:
            step.load_state_dict(read_safetensors(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _read_entries(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Name and steps of a pipeline file, checked."""
    name, entries = _read_steps(path)
    for entry in entries:
        if entry.get("registry_name") not in STEPS:
            shown = entry.get("registry_name", entry.get("class"))
            raise ValueError(
                f"{path} has a step {shown!r} that SmolVLA does not use; accepted are {sorted(STEPS)}"
            )
    return name, entries


def _read_steps(path: Path) -> tuple[str, list[dict[str, Any]]]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    entries = config.get("steps") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is not a processor pipeline: it must have 'steps', a list of objects")
    for entry in entries:
        for key, kind, accepted in (("config", dict, "an object"), ("state_file", str, "a file's name")):
            if not isinstance(entry.get(key, kind()), kind):
                raise ValueError(
                    f"step {entry.get('registry_name')!r} of {path} has {key} {json.dumps(entry[key])}; accepted is "
                    f"{accepted}"
                )
    return config.get("name", "DataProcessorPipeline"), entries


def _make_step(entry: dict[str, Any], overrides: dict[str, Any], path: Path) -> ProcessorStep:
    settings = {**entry.get("config", {}), **overrides}
    try:
        return STEPS[entry["registry_name"]](**settings)
    except Exception as error:  # a step given settings of any type may raise anything
        raise ValueError(
            f"step {entry['registry_name']!r} of {path} refuses its settings {settings}: {error}"
        ) from error
