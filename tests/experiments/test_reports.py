"""The reports of comparisons where there is little to show."""

import pytest

from experiments.jobs.curves import Series
from experiments.jobs.trainings import Result
from experiments.lm import report as lm
from experiments.vision import figures
from experiments.vision import report as vision
from kdjax.tools.report import png

SCORES = dict.fromkeys(
    (
        "student_accuracy",
        "student_calibration_error",
        "bits",
        "perplexity",
        "entropy",
        "distinct_2",
    ),
    0.5,
)


@pytest.mark.parametrize("report", [vision, lm])
def test_a_method_that_diverged_has_a_row_without_numbers(report):
    diverged = {"wild": "wild diverged with seed 1: step 5"}
    results = report.Results(Result(9, SCORES, None), {}, {}, diverged)
    _, (name, told, *others) = report.table(results).rows
    assert (name, told, set(others)) == ("wild", "diverged", {"–"})
    assert report.findings(results) == [diverged["wild"]]


@pytest.mark.parametrize(("kl", "scale"), [(0.0, "linear"), (0.1, "log")])
def test_a_log_scale_needs_something_above_0(kl, scale):
    accuracy, divergence = Series([4, 8], [[0.5, 0.5]]), Series([4, 8], [[0.0, kl]])
    lines = {"alone": figures.Curves(accuracy, divergence)}
    figure = figures.curves(lines, "alone")
    png(figure)  # which would warn
    assert figure.axes[1].get_yscale() == scale
