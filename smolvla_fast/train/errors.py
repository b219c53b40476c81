"""The one error of training."""


class TrainingError(Exception):
    """A run cannot begin or go on. The message says what was wrong, what is accepted and what to do."""
