"""Reads and writes ``model.safetensors``. Every tensor is accounted for: none stays at random values silently."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .hub import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, find_file, is_absent
from .statistics_names import is_buffer, split_buffers

logger = logging.getLogger(__name__)

_SHOWN = 8


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one file; ValueError for a truncated file or another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy or download it again, "
            f"its size here is {Path(path).stat().st_size} bytes"
        ) from error


def read_buffers(source: str | Path, **options: Any) -> dict[str, dict[str, Tensor]]:
    """The statistics among the weights of a checkpoint, by the name of their buffer; no other tensor is read."""
    from safetensors import SafetensorError, safe_open

    if is_absent(source, WEIGHTS_NAME, **options):
        return {}
    path = find_file(source, WEIGHTS_NAME, **options)
    try:
        with safe_open(str(path), framework="pt") as file:
            names = filter(is_buffer, file.keys())
            return split_buffers({name: file.get_tensor(name) for name in names})[1]
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error


def read_backbone(source: str | Path) -> dict[str, Tensor]:
    """The weights of a backbone folder or repository, in one file or in shards listed by an index."""
    try:
        return read_safetensors(find_file(source, WEIGHTS_NAME))
    except FileNotFoundError:
        try:
            index = json.loads(find_file(source, WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no {WEIGHTS_NAME} for the backbone {str(source)!r}; set load_vlm_weights=False to build it "
                "without weights (those of a policy checkpoint are then loaded over it)"
            ) from None
    shards = sorted(set(index["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors.update(read_safetensors(find_file(source, shard)))
    return tensors


def _shared_names(module: nn.Module) -> dict[str, str]:
    """For parameters that several names share (tied embeddings): each name -> the first one."""
    first: dict[int, str] = {}
    shared = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shared[name] = first.setdefault(id(parameter), name)
    return shared


class WeightsError(RuntimeError):
    """Weights that do not fit a model.

    what  the message without what a caller from Python can do about it
    """

    def __init__(self, what: str, lenient: str) -> None:
        super().__init__(f"{what}{lenient}.")
        self.what = what


def _unlike(module: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the module that a file lacks, and names of the file that the module lacks."""
    state, shared, names = module.state_dict(), _shared_names(module), set(names)
    present = {shared.get(name, name) for name in names}
    missing = sorted(name for name in state if name not in names and shared.get(name, name) not in present)
    return missing, sorted(names - state.keys())


def _absences(missing: list[str], unexpected: list[str]) -> list[str]:
    named = {"missing": missing, "unexpected": unexpected}
    return [f"{what}: {_listed(names)}" for what, names in named.items() if names]


def _misfit(source: str, problems: list[str], unexpected: list[str], lenient: str = "") -> WeightsError:
    hint = "the checkpoint was made with another configuration (see config.json)"
    if any(map(is_buffer, unexpected)):
        hint = (
            "it dates from before LeRobot 0.4 and its statistics are not whole, so they cannot be taken for the "
            "processors: remove them from the file, and make its processors of the training data's"
        )
    elif any("._orig_mod." in name for name in unexpected):
        hint = "it was saved from a compiled module, which puts '_orig_mod.' into the names"
    return WeightsError(f"{source} does not fit the model, {'; '.join(problems)}. Probably {hint}", lenient)


NamedT = TypeVar("NamedT", bound=nn.Module)


def check_names(module: NamedT, source: str | Path) -> NamedT:
    """The policy. WeightsError unless a checkpoint names every weight of a policy and no other, statistics apart.

    For what LeRobot's ``from_pretrained`` has loaded: it leaves a weight that the file does not name at random values.
    """
    from safetensors import safe_open

    path = find_file(source, WEIGHTS_NAME)
    with safe_open(str(path), framework="pt") as file:
        missing, unexpected = _unlike(module, (name for name in file.keys() if not is_buffer(name)))  # noqa: SIM118
    if absences := _absences(missing, unexpected):
        raise _misfit(str(path), absences, unexpected)
    return module


def load_weights(module: nn.Module, tensors: dict[str, Tensor], *, strict: bool, source: str) -> None:
    """Copy ``tensors`` into ``module``, each rounded to the dtype its parameter has.

    strict  True: a missing, unexpected or misshapen tensor is a WeightsError that names it, and nothing is copied.
            False: missing and unexpected ones are logged, as LeRobot does; a wrong shape stays an error.
    """
    state = module.state_dict()
    missing, unexpected = _unlike(module, tensors)
    misshapen = [
        f"{name} (file {tuple(tensors[name].shape)}, model {tuple(state[name].shape)})"
        for name in sorted(set(tensors) & set(state))
        if tensors[name].shape != state[name].shape
    ]
    absences = _absences(missing, unexpected)
    if misshapen or (strict and absences):
        problems = [f"misshapen: {_listed(misshapen)}"] if misshapen else []
        lenient = "" if problems else "; strict=False loads what fits and leaves the rest as initialised"
        raise _misfit(source, problems + absences, unexpected, lenient)
    if absences:
        logger.warning("%s does not fit the model exactly, %s", source, "; ".join(absences))
    module.load_state_dict(tensors, strict=False)


def write_weights(module: nn.Module, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the parameters (or a state dict gathered elsewhere); tied parameters are written once."""
    from safetensors.torch import save_file, save_model

    if state_dict is None:
        save_model(module, str(path))
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in state_dict.items()}, str(path), {"format": "pt"}
        )
