"""Differences of chunks, on numbers small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from smolvla_fast.measure import differences

REFERENCE = np.zeros((2, 3, 2), np.float32)
"""[frames, steps, joints]"""


def test_by_joint_takes_every_frame_and_step() -> None:
    chunks = REFERENCE.copy()
    chunks[1, 2, 0], chunks[0, 0, 1] = -6.0, 0.5
    first, second = differences.by_joint(chunks, REFERENCE)
    # Six values, five of them 0: 99 % lie 0.95 of the way from the fifth to the sixth.
    assert first == {"max": 6.0, "p99": pytest.approx(0.95 * 6)}
    assert second == {"max": 0.5, "p99": pytest.approx(0.95 * 0.5)}


def test_joints_of_different_units_meet_in_what_noise_changes() -> None:
    chunks = REFERENCE.copy()
    chunks[0, 1] = [90.0, 0.002]  # a quarter of 360 degrees, a fifth of a centimetre in metres
    shares = differences.in_spreads(chunks, REFERENCE, np.array([360.0, 0.01]))
    assert shares.shape == (2, 3) and shares[0, 1] == pytest.approx(0.25) and shares.sum() == shares[0, 1]
    still = differences.in_spreads(chunks, REFERENCE, np.array([360.0, 0.0]))
    assert still[0, 1] == np.inf and still[1].max() == 0, "noise does not move it, and still it differs"


def test_by_step() -> None:
    found = differences.by_step(np.array([[0.0, 1.0], [0.0, 3.0]]))
    assert found == {"p50": [0.0, 2.0], "p99": pytest.approx([0.0, 2.98])}


def test_chunks_side_by_side_do_not_overlap() -> None:
    places = [0, 4, 9, 12, 21, 40]
    chosen = differences.side_by_side(places, worst=2, length=10)
    assert [places[i] for i in chosen] == [9, 21, 40]
    assert differences.side_by_side(places, worst=2, length=10, most=2) == [2, 4]


def test_the_figures_of_a_tier() -> None:
    fast, own, noise = (REFERENCE + x for x in (0.1, 0.2, 1.0))
    fast[1, 2, 1] = 0.4
    found = differences.figures(fast, REFERENCE, own, noise)
    assert found["worst"] == 1 and found["largest_share_of_noise"] == pytest.approx(0.4)
    assert found["joints"][1]["max"] == pytest.approx(0.4) and found["own"][0]["p99"] == pytest.approx(0.2)
    assert differences.figures(fast, REFERENCE, None, noise)["own"] is None
