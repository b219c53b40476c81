"""A reason that is no refusal: something is unread or was never tried, and a trial can find out (``trial.py``)."""

from __future__ import annotations

from collections.abc import Hashable


class Untried(str):
    """The reason, and what exactly it is about: what a trial has found of that holds as long as it is the same.

    Where no trial is made, as of training and of single layers, it is a reason like any other.
    """

    about: tuple[Hashable, ...]

    def __new__(cls, reason: str, *about: Hashable) -> Untried:
        made = super().__new__(cls, reason)
        made.about = about
        return made

    def beside(self, other: Untried | None) -> Untried:
        """Both at once."""
        return self if other is None else Untried(f"{other}; {self}", *other.about, *self.about)
