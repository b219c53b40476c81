"""The one error of training, and the errors of others in a line."""

from textwrap import shorten


class TrainingError(Exception):
    """A run cannot begin or go on. The message says what was wrong, what is accepted and what to do."""


def root_cause(error: BaseException) -> str:
    """Type and text of the error that began a chain, on one line: the libraries below write long messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shorten(f"{type(error).__name__}: {error}".rstrip(": "), 400, placeholder=" ...")
