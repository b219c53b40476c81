"""Reads of a LeRobotDataset that touch only the column they are for. Imports LeRobot, so it is imported late.

LeRobot 0.6.1 reads whole rows, images decoded, to take one column of them: beside two cameras a chunk of 50 actions costs
over 100 decoded images a sample. Here numbers come from a table in memory, and an image is decoded for itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from torch import Tensor


class ColumnReader(DatasetReader):
    """LeRobot's reader with another ``_query_hf_dataset``: the same bits."""

    def _query_hf_dataset(self, query_indices: dict[str, list[int]]) -> dict[str, Tensor]:
        """{key: [times, ...]}, the rows of each column that its delta timestamps ask for; videos are read elsewhere."""
        found = {}
        place = self._absolute_to_relative_idx
        for key, wanted in query_indices.items():
            if key not in self._meta.video_keys:
                rows = wanted if place is None else [place[index] for index in wanted]
                column = self._column(key)
                found[key] = column[rows] if isinstance(column, Tensor) else torch.stack(column[rows][key])
        return found

    def _column(self, key: str) -> Any:
        columns = self.__dict__.setdefault("_columns", {})
        if key not in columns:
            pictures = key in self._meta.image_keys
            columns[key] = (
                self.hf_dataset.select_columns([key]) if pictures else numbers(self.hf_dataset, key)
            )
        return columns[key]


def read_by_column(dataset: Any) -> None:
    """Has this one ``LeRobotDataset`` read as above. A reader of another class, of another LeRobot, stays as it is."""
    if type(dataset.reader) is DatasetReader and hasattr(DatasetReader, "_query_hf_dataset"):
        dataset.reader.__class__ = ColumnReader


def numbers(hf_dataset: Any, key: str) -> Tensor:
    """A numeric column as a tensor [frames, ...]; a missing number is NaN."""
    column = hf_dataset.data.column(key).combine_chunks()
    shape = np.shape(column[0].as_py())
    for _ in shape:
        column = column.flatten()
    return torch.tensor(column.to_numpy(zero_copy_only=False)).reshape(-1, *shape)
