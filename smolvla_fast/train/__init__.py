"""The components of ``smolvla_fast/training.py``: settings, data, policy, random state, checkpoints, log."""

from .errors import TrainingError
from .settings import DatasetSettings, TrainSettings

__all__ = ["DatasetSettings", "TrainSettings", "TrainingError"]
