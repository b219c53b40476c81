"""Reads single columns of a LeRobotDataset. Imports LeRobot, so other files import this one late.

LeRobot 0.6.1 reads whole rows to take one column of them: with two cameras, a sample with a chunk of 50 actions decodes
over 100 images. Here numbers come from a table in memory, and only the images of the sample are decoded.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from torch import Tensor

from ..loss.token_store import TokenStore
from .errors import TrainingError
from .features import how_to_remove
from .readable import KNOWN, TOKENS


class ColumnReader(DatasetReader):
    """LeRobot's reader with its ``_query_hf_dataset`` replaced; it returns the same bits.

    store  where set, a sample says whether it is ``KNOWN``; one that is has ``TOKENS``, and its images are not decoded
    """

    store: TokenStore | None = None

    def get_item(self, row: int) -> dict[str, Any]:
        if self.store is None:
            return super().get_item(row)
        tokens = self.store.read(int(self._column("index")[row]))
        if tokens is None:
            return {**super().get_item(row), KNOWN: False}
        return {**self._without_cameras.get_item(row), TOKENS: tokens, KNOWN: True}

    def _query_hf_dataset(self, query_indices: dict[str, list[int]]) -> dict[str, Tensor]:
        """{key: [times, ...]}: of each column but videos, the rows that its delta timestamps select."""
        found = {}
        place = self._absolute_to_relative_idx
        for key, wanted in query_indices.items():
            if key in self.hf_dataset.column_names:  # videos have no column
                rows = wanted if place is None else [place[index] for index in wanted]
                column = self._column(key)
                found[key] = column[rows] if isinstance(column, Tensor) else torch.stack(column[rows][key])
        return found

    @cached_property
    def _without_cameras(self) -> ColumnReader:
        """A reader of the same samples without frames of cameras; ``CAMERA_is_pad`` stays."""
        twin, twin._meta, twin.store = copy(self), copy(self._meta), None
        twin._meta.info = replace(self._meta.info, features={})  # which a reader asks for cameras alone
        twin.hf_dataset = self.hf_dataset.remove_columns(self._meta.image_keys)
        twin._image_transforms = None
        return twin

    def _column(self, key: str) -> Any:
        columns = self.__dict__.setdefault("_columns", {})
        if key not in columns:
            image = key in self._meta.image_keys
            columns[key] = self.hf_dataset.select_columns([key]) if image else numbers(self.hf_dataset, key)
        return columns[key]


def read_by_column(dataset: Any) -> None:
    """Makes this one ``LeRobotDataset`` read by column. A reader of another LeRobot's class stays as it is."""
    if type(dataset.reader) is DatasetReader and hasattr(DatasetReader, "_query_hf_dataset"):
        dataset.reader.__class__ = ColumnReader


def numbers(hf_dataset: Any, key: str) -> Tensor:
    """A column [frames, ...] in LeRobot's dtypes: any float as fp32, integers as int64, bool; a missing number as NaN.

    raises  TrainingError for text, and for rows of several lengths
    """
    column, shape, unlike = hf_dataset.data.column(key), list[int](), ""
    if isinstance(column.type, pa.BaseExtensionType):  # datasets keeps arrays of two and more dimensions so
        column = column.cast(column.type.storage_type)
    column = column.combine_chunks()
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            unlike = f" of the lengths {lengths}"
            break
        shape += lengths
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    dtypes = {"f": torch.get_default_dtype(), "i": torch.int64, "u": torch.int64, "b": torch.bool}
    if values.dtype.kind not in dtypes:
        raise TrainingError(
            f"{key!r} holds {column.type}{unlike}; accepted as observation or action are numbers, of one shape in all "
            f"frames. To train without it, {how_to_remove([key])}"
        )
    return torch.tensor(values).to(dtypes[values.dtype.kind]).reshape(-1, *shape)
