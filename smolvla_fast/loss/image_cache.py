"""Image tokens kept from step to step, by the bytes of their frames: for a frozen tower and a data set seen many times.

The tower is most of a training step's arithmetic and gives the same tokens for the
same frame, whatever the prompt, the state and the other camera. So a frame is encoded once, and from the second epoch on
looked up. Worth it where frames come back unchanged: random image transforms make each one new.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.quantized_weights import fingerprint


class ImageCache:
    """Tokens by frame, the least recently used dropped beyond ``limit`` bytes. Threads may share it; they wait for one
    another's look-ups, not for the tower.

    hits, misses  frames looked up and found, and not found      bytes  held now
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = self.misses = self.bytes = 0
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()
        self._made_by: Tensor | None = None
        self._lock = threading.RLock()

    def encoded(
        self, frames: Tensor, weights: list[Tensor], products: str, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``encode(frames)``, run for the frames alone that are not known: one by one, for the order of a product's sums
        depends on how many rows it has, and tokens must not depend on which frames were known beside them.

        frames   [n, 3, side, side]
        weights  what ``encode`` reads: where a sample of their rows has changed, nothing is known any more
        products the dtype ``encode`` multiplies in: tokens of another are not these
        encode   [1, 3, side, side] -> [1, tokens, M]
        returns  [n, tokens, M] without a graph
        """
        keys = [_digest(frame, products) for frame in frames]
        with self._lock:
            self._forget_if_moved(weights)
            made_by = self._made_by
            found = [self._tokens.get(key) for key in keys]
            absent = [i for i, tokens in enumerate(found) if tokens is None]
            self.misses += len(absent)
            self.hits += len(keys) - len(absent)
        new = {i: encode(frames[i : i + 1])[0] for i in absent}
        tokens = [new[i] if each is None else each for i, each in enumerate(found)]
        with self._lock:
            if absent:
                self._forget_if_moved(weights)
            if self._made_by is made_by:  # else another thread has seen other weights meanwhile
                for key, each in zip(keys, tokens, strict=True):
                    self._keep(key, each)
        return torch.stack(tokens)

    def _keep(self, key: bytes, tokens: Tensor) -> None:
        if key not in self._tokens:
            self._tokens[key] = tokens
            self.bytes += tokens.nbytes
        self._tokens.move_to_end(key)
        while self.bytes > self.limit:
            self.bytes -= self._tokens.popitem(last=False)[1].nbytes

    def _forget_if_moved(self, weights: list[Tensor]) -> None:
        now = fingerprint([weight.detach() for weight in weights])
        if self._made_by is None or self._made_by.device != now.device or not torch.equal(self._made_by, now):
            self._tokens.clear()
            self.bytes, self._made_by = 0, now

    def to_dict(self) -> dict[str, int]:
        with self._lock:
            return dict(frames=len(self._tokens), bytes=self.bytes, hits=self.hits, misses=self.misses)

    def renew_lock(self) -> None:
        """In a forked child: a thread that is not in it may hold the lock, and have stopped half way through a sum."""
        self._lock = threading.RLock()
        self.bytes = sum(tokens.nbytes for tokens in self._tokens.values())


def _digest(frame: Tensor, products: str) -> bytes:
    raw = frame.detach().contiguous().view(torch.uint8).cpu().numpy()
    digest = hashlib.blake2b(f"{frame.dtype} {products}".encode(), digest_size=16)
    digest.update(raw.data)
    return digest.digest()
