"""Reads of a LeRobotDataset that touch only the column they are for. Imports LeRobot, so it is imported late.

LeRobot 0.6.1 reads whole rows, images decoded, to take one column of them: beside two cameras a chunk of 50 actions costs
over 100 decoded images a sample. Here numbers come from a table in memory, and an image is decoded for itself.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from torch import Tensor

from .errors import TrainingError
from .features import how_to_remove


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
    """A column [frames, ...] in the dtype that LeRobot reads it in, whichever of its kind the file has: floats as fp32,
    integers as int64, truth values as bool. A missing number is NaN.

    raises  TrainingError for text, and for rows of several lengths
    """
    column = hf_dataset.data.column(key)
    if isinstance(column.type, pa.BaseExtensionType):  # how datasets keeps arrays of two and more dimensions
        column = column.cast(column.type.storage_type)
    column = column.combine_chunks()
    shape: list[int] = []
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise TrainingError(_not_numbers(key, f"lists of the lengths {lengths}"))
        shape += lengths
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    dtypes = {"f": torch.get_default_dtype(), "i": torch.int64, "u": torch.int64, "b": torch.bool}
    if values.dtype.kind not in dtypes:
        raise TrainingError(_not_numbers(key, str(column.type)))
    return torch.tensor(values).to(dtypes[values.dtype.kind]).reshape(-1, *shape)


def _not_numbers(key: str, found: str) -> str:
    return (
        f"{key!r} holds {found}; accepted as observation or action are numbers, of one shape in all frames. To train "
        f"without it, {how_to_remove([key])}"
    )
