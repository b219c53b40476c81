"""Steps on frames of which a ``TokenStore`` may know the tokens: opens the store, encodes what is new, gives the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loss.token_store import RESULT, open_store
from ..patch import find_policy
from ..patching.runtime import runtime_of
from ..patching.training_forward import TrainingMixin
from .data import Data, few_samples, to_floats
from .dataset_files import EPISODES, INFO, files_of
from .disk import advice
from .errors import TrainingError, root_cause
from .readable import KNOWN, TOKENS
from .settings import TrainSettings


@dataclass
class KnownFrames:
    """The store of a run, and what fills it. Without a store nothing is kept.

    cameras  of the policy that the dataset has, in the policy's order
    """

    policy: Any
    engine: Any = None
    cameras: Sequence[str] = ()
    store: Any = None
    readers: Sequence[Any] = ()

    def close(self) -> None:
        """From now on samples have images again."""
        for each in (self, *self.readers):
            each.store = None

    def encoded(self, batch: dict[str, Tensor]) -> Tensor:
        """[n, C, tokens, M] of a prepared batch's frames."""
        images, _ = self.policy.prepare_images({camera: batch[camera] for camera in self.cameras})
        flat = torch.stack(images[: len(self.cameras)], 1).flatten(0, 1)
        tokens = self.engine.encode(self.policy.model, flat)
        return tokens.unflatten(0, (-1, len(self.cameras)))

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, C, tokens, M] of a prepared batch: those it has where ``KNOWN``. The other frames, whose images alone are
        in the batch, are encoded and kept."""
        known = batch[KNOWN]
        if known.all():
            return batch[TOKENS]
        new = self.encoded(batch)
        for frame, tokens in zip(batch["index"][~known].tolist(), new.cpu(), strict=True):
            self.store.write(frame, tokens)
        found = new.new_empty(len(known), *new.shape[1:])
        found[known], found[~known] = batch.get(TOKENS, new[:0]), new
        return found

    @contextmanager
    def given(self, batch: dict[str, Tensor]) -> Iterator[None]:
        """Inside, the policy's loss of this batch takes tokens in place of images: its ``prepare_images`` gives them."""
        if KNOWN not in batch:
            yield
            return
        tokens, config = self.tokens(batch), self.policy.config
        present = tokens.new_ones(len(tokens), dtype=torch.bool)
        masks = [batch.get(f"{camera}_padding_mask", present).bool() for camera in self.cameras]
        empty = [key for key in config.image_features if key not in self.cameras][: config.empty_cameras]
        images = [*tokens.unbind(1), *(torch.zeros_like(tokens[:, 0]) for _ in empty)]
        self.policy.prepare_images = lambda _: (images, masks + [~present for _ in empty])
        try:
            yield
        finally:
            del self.policy.prepare_images


def kept(raw: dict[str, Any], device: Any) -> dict[str, Tensor]:
    """``KNOWN`` and ``TOKENS`` of a raw batch, which LeRobot's processors drop; the tokens on ``device``."""
    found = {key: raw[key] for key in (KNOWN, TOKENS) if key in raw}
    return {k: value.to(device, non_blocking=True) if k == TOKENS else value for k, value in found.items()}


def open_known_frames(
    settings: TrainSettings, data: Data, policy: Any, preprocess: Any, autocast: AbstractContextManager
) -> tuple[KnownFrames, str]:
    """What ``image_cache`` and ``image_cache_dir`` ask for, and in words its size, or the reason why there is none.

    raises  TrainingError where there is no room
    """
    known, meta = KnownFrames(find_policy(policy)), data.train.meta
    if not (settings.image_cache or settings.image_cache_dir):
        return known, ""
    model = known.policy.model
    engine = runtime_of(model).training.look(model)[0] if isinstance(model, TrainingMixin) else None
    if engine is None:
        return known, ", image_cache without effect (the policy is not patched)"
    engine.keeps_tokens = True
    engine.look(model, engine.not_frozen)  # writes the receipt
    reason = engine.fallback_reasons.get("image cache")
    if not hasattr(data.train.reader, "store"):
        reason = "this LeRobot reads datasets in another way"
    if not hasattr(os, "posix_fallocate") or not hasattr(os, "memfd_create"):
        reason = "it needs Linux, which can reserve room for a file before it is mapped"
    if reason is not None:
        return known, f", image_cache without effect ({reason})"

    names = {new: old for old, new in data.names.items() if old in meta.camera_keys}
    known.engine, known.cameras = engine, [key for key in settings.policy.image_features if key in names]
    # Part of the key: tokens of a fixed noise frame, which change with resizing, scaling and arithmetic.
    raw, noise = few_samples(settings, data.train), torch.Generator().manual_seed(0)
    for key in (names[key] for key in known.cameras):
        pixels = torch.randint(0, 256, raw[key].shape, generator=noise)
        raw[key] = pixels.byte() if raw[key].dtype is torch.uint8 else (pixels / 255).to(raw[key].dtype)
    batch = preprocess(to_floats(raw, settings.policy.device or "cpu"))
    with autocast, torch.no_grad(), torch.random.fork_rng():
        tokens = known.encoded({key: batch[key][:1] for key in known.cameras})
        size = len(batch["index"])
        all_known = {KNOWN: torch.ones(size, dtype=torch.bool), TOKENS: tokens.expand(size, -1, -1, -1)}
        try:  # where stock has to compute the loss of such a batch, forward refuses tokens
            with known.given(batch | all_known):
                known.policy.forward(batch)
        except ValueError as error:
            return known, f", image_cache without effect ({error})"
    vlm = model.vlm_with_expert.get_vlm_model()
    tower = [*vlm.vision_model.parameters(), *vlm.connector.parameters()]
    decoder: Any = data.train.reader._video_backend if meta.video_keys else "pillow"
    packages = {"pyav": "av", "video_reader": "torchvision"}
    about = {
        "dataset": [settings.dataset.repo_id, str(meta.revision), _fingerprint(meta)],
        "cameras": [names[key] for key in known.cameras],
        "image decoder": f"{decoder} {version(packages.get(decoder, decoder))}",  # another may make other pixels
        "vision tower": _digest(tower),
        "dtype": str(tokens.dtype),
        RESULT: _digest([tokens]),
    }
    parts = [part for part in (data.train, data.held_out) if part is not None]
    frames = np.unique(np.concatenate([part.hf_dataset.data.column("index").to_numpy() for part in parts]))
    folder, limit, shape = settings.image_cache_dir, settings.image_cache, tuple(tokens.shape[1:])
    try:
        place = Path(folder) if folder else None
        known.store, words = open_store(place, limit, frames, shape, tokens.dtype, about)
    except (OSError, ValueError) as error:
        flag = f"--image_cache_dir={folder}" if folder else f"--image_cache={limit}"
        raise TrainingError(
            f"{flag} cannot hold the image tokens: {root_cause(error)}; {advice(error)}, give "
            "another --image_cache_dir, or another --image_cache for the first frames alone"
        ) from error
    known.readers = [part.reader for part in parts]
    for reader in known.readers:
        reader.store = known.store
    return known, f", image tokens of {words}"


def _fingerprint(meta: Any) -> str:
    """Of the files of a dataset that frames are read from: names, sizes, times of change."""
    tables = {path.relative_to(meta.root) for path in (meta.root / EPISODES).rglob("*.parquet")}
    names = sorted({INFO, *map(str, tables), *map(str, files_of(meta, range(meta.total_episodes)))})
    found = [(name, (meta.root / name).stat()) for name in names if (meta.root / name).exists()]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _digest(tensors: list[Tensor]) -> str:
    """Of all bytes of some tensors."""
    found = blake2b(digest_size=12)
    for each in tensors:
        found.update(each.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
