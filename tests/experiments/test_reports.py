"""The reports of comparisons where there is little to show."""

import pytest

from experiments.jobs.curves import Series
from experiments.vision import figures
from kdjax.tools.report import png


@pytest.mark.parametrize(("kl", "scale"), [(0.0, "linear"), (0.1, "log")])
def test_a_log_scale_needs_something_above_0(kl, scale):
    accuracy, divergence = Series([4, 8], [[0.5, 0.5]]), Series([4, 8], [[0.0, kl]])
    lines = {"alone": figures.Curves(accuracy, divergence)}
    figure = figures.curves(lines, "alone")
    png(figure)  # which would warn
    assert figure.axes[1].get_yscale() == scale
