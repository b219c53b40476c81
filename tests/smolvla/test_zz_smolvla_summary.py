"""The last word of this folder: how much was compared, and how equal it was."""

import pytest

pytestmark = pytest.mark.reference


def test_summary(tally, capsys):
    with capsys.disabled():
        print("\n" + "\n".join(tally.lines()))
    assert tally.compared, "nothing was compared: run the whole folder"
    assert tally.compared == tally.equal
