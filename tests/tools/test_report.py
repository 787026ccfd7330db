"""Tables and pages of results."""

import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from kdjax.tools.report import (
    Table,
    draw_band,
    image,
    mean_and_spread,
    page,
    png,
)

TABLE = Table(["loss", "paper", "accuracy"], [["KL", "[1] <b>", "0.9 ± 0.1"]], 2)


def drawn():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return figure


def test_a_table_in_all_its_forms():
    console = Console(width=60, record=True, file=io.StringIO())
    TABLE.print(console)
    shown = console.export_text().splitlines()
    assert shown[0].split() == ["loss", "paper", "accuracy"]
    # What looks like Rich's markup or like HTML is text.
    assert shown[2].split() == ["KL", "[1]", "<b>", "0.9", "±", "0.1"]
    assert TABLE.markdown().splitlines() == [
        "| loss | paper | accuracy |",
        "|:--|:--|--:|",
        "| KL | [1] <b> | 0.9 ± 0.1 |",
    ]
    assert '<td class="text">[1] &lt;b&gt;</td><td>0.9 ± 0.1</td>' in TABLE.html()


@pytest.mark.parametrize("width", [1, 20, 40, 200])
def test_nothing_is_cut_on_a_narrow_terminal(width):
    columns = ["what it is", "bits per character", "gain [bits]"]
    rows = [
        ["forward_kl", "2.457 ± 0.030", "0.249 ± 0.016"],
        ["the teacher's", "2", "–"],
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    Table(columns, rows).print(console)
    shown = console.export_text()
    assert "…" not in shown
    for text in (*columns[1:], *rows[0], "teacher's"):
        assert text in shown
    # Between words the last of the texts give way.
    assert ("the teacher's" in shown) == (width == 200)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"rows: got 1 texts .* columns \['a', 'b'\]"):
        Table(["a", "b"], [["1"]])


def test_the_spread_is_that_of_a_sample():
    # Of 1, 2, 3: variance ((-1)² + 0² + 1²) / 2 = 1.
    assert mean_and_spread([1, 2, 3], digits=2) == "2.00 ± 1.00"
    with pytest.raises(ValueError, match="values: got none"):
        mean_and_spread([], digits=2)


def test_a_curve_of_one_point_is_seen():
    axes = Figure().subplots()
    draw_band(axes, [4], [[1.0], [2.0]])
    assert axes.lines[0].get_marker() == "o"


def test_a_band_is_one_standard_deviation_around_the_mean():
    axes = Figure().subplots()
    draw_band(axes, [0, 1], [[1, 4], [2, 4], [3, 4]], label="KL")
    (line,), (band,) = axes.lines, axes.collections
    np.testing.assert_array_equal(line.get_ydata(), [2, 4])
    at_start = [y for x, y in band.get_paths()[0].vertices if x == 0]
    assert (min(at_start), max(at_start)) == (1, 3)
    with pytest.raises(ValueError, match=r"runs: got shape \(1, 3\)"):
        draw_band(axes, [0, 1], [[1, 2, 3]])


def test_a_single_run_has_no_band():
    axes = Figure().subplots()
    draw_band(axes, [0, 1], [[1, 4]])
    assert not axes.collections


def test_a_page_needs_nothing_but_itself():
    picture = png(drawn())
    assert picture == png(drawn())
    text = page("A < B", "Lead.", {"Picture": image(picture, "What <it> shows")})
    assert "<title>A &lt; B</title>" in text
    assert 'alt="What &lt;it&gt; shows"' in text
    assert text.count("data:image/png;base64,") == 1
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
