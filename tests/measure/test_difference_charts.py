"""The pictures of `verify` say their numbers as text."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib import rc_context

from smolvla_fast.measure import difference_charts as charts

FOUND: dict[str, Any] = {
    "tiers": [
        {
            "name": "fp32",
            "within": 2,
            "frames": [{"of_bound": 1e-3}, {"of_bound": 2e-2}],
            "steps": {"p99": [1e-6, 2e-5], "p50": [1e-7, 3e-7]},
            "joints": [{"max": 1e-6}],
        }
    ]
}


@pytest.mark.parametrize(("page", "side"), [(charts.steps, "y"), (charts.histogram, "x")])
def test_ticks_of_a_logarithmic_axis_are_numbers(page: Any, side: str) -> None:
    """As ``draw`` has them: without formulas, so that a joint may be called $x$."""
    with rc_context({"text.parse_math": False}):
        figure = page(FOUND)
        figure.canvas.draw()
        axis = getattr(figure.axes[0], f"{side}axis")
        labels = [each.get_text() for each in axis.get_ticklabels(which="both")]
    assert [float(label) for label in labels if label] and not any("$" in label for label in labels)
