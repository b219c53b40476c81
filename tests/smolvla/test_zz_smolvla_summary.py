"""The last word of this folder: how much was compared, and how equal it was."""

import pytest

pytestmark = pytest.mark.reference


def test_summary(tally, record_property):
    record_property("summary", list(tally.lines()))
    assert tally.compared, "nothing was compared: run the whole folder"
    assert tally.compared == tally.equal
