"""The two figures: curves over the steps, and soft targets beside their digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.digits.kinds import (
    ALL_ALONE,
    ALL_DISTILLED,
    FEW_ALONE,
    FEW_DISTILLED,
    FEW_SAME_IMAGES,
    Kind,
)
from experiments.jobs.curves import INK, Series, clean
from kdjax.tools.report import draw_band

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_TEACHER, _ALONE = "#3b3f4a", "#e69f00"
_DISTILLED, _SAME_IMAGES = "#0072b2", "#56b4e9"

_COLORS = {
    FEW_ALONE: _ALONE,
    FEW_SAME_IMAGES: _SAME_IMAGES,
    FEW_DISTILLED: _DISTILLED,
    ALL_ALONE: _ALONE,
    ALL_DISTILLED: _DISTILLED,
}


class Curves(NamedTuple):
    """The metrics of one kind of student, by name."""

    series: Mapping[str, Series]


class Example(NamedTuple):
    """A digit, ``[8, 8]``, its class, and the probabilities of each model."""

    pixels: np.ndarray
    label: int
    probabilities: Mapping[str, np.ndarray]


def curves(every: Mapping[Kind, Curves], titles: tuple[str, str]) -> Figure:
    """Loss, accuracy and fidelity over the steps; few labels above, all below."""
    columns = (
        ("loss", "training loss", "log"),
        ("student_accuracy", "validation accuracy", "linear"),
        ("forward_kl", "validation KL to the teacher", "log"),
    )
    figure = Figure(figsize=(11, 6))
    grid = figure.subplots(
        2,
        len(columns),
        sharex=True,
        sharey="col",
        squeeze=False,
        gridspec_kw=dict(left=0.07, right=0.99, bottom=0.08, top=0.87, wspace=0.2),
    )
    for row, (few, title) in enumerate(zip((True, False), titles, strict=True)):
        kinds = [kind for kind in every if kind.few == few]
        for axes, (name, what, scale) in zip(grid[row], columns, strict=True):
            for kind in kinds:
                steps, runs = every[kind].series[name]
                draw_band(
                    axes, steps, runs, color=_COLORS[kind], label=kind.title, lw=1.8
                )
            axes.set_yscale(scale)
            axes.yaxis.set_minor_formatter(NullFormatter())
            if row == 0:
                axes.set_title(what, fontsize=11, loc="left", color=INK)
            clean(axes)
        grid[row, 0].set_ylabel(title, fontsize=11, color=INK, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("step", color=INK)
    # With all labels there is one kind of distilled student, which sees all images.
    _legend(figure, grid[0, 0])
    return figure


def soft_targets(examples: Sequence[Example], temperature: float) -> Figure:
    """Each digit beside what the models make of it."""
    colors = (_TEACHER, _DISTILLED, _ALONE)
    columns = 2
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(11, 1.3 * rows + 0.7))
    grid = figure.subplots(
        rows,
        2 * columns,
        squeeze=False,
        gridspec_kw=dict(
            width_ratios=[1, 3.4] * columns,
            left=0.01,
            right=0.99,
            bottom=0.09,
            top=0.93,
            wspace=0.12,
            hspace=0.35,
        ),
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for index, example in enumerate(examples):
        row, column = index % rows, index // rows
        picture, bars = grid[row, 2 * column], grid[row, 2 * column + 1]
        picture.imshow(example.pixels, cmap="gray_r", vmin=0, vmax=1)
        bars.set_axis_on()
        _bars(bars, example, colors)
    _legend(figure, grid[0, 1])
    figure.supxlabel(
        f"class, with its probability at temperature {temperature:g}",
        fontsize=11,
        color=INK,
        y=0.015,
    )
    return figure


def _bars(axes: Any, example: Example, colors: Sequence[str]) -> None:
    width = 0.8 / len(example.probabilities)
    for index, (title, values) in enumerate(example.probabilities.items()):
        where = np.arange(len(values)) + (index - 1) * width
        axes.bar(where, values, width, color=colors[index], label=title)
    axes.set_xticks(range(len(values)))
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "", "1"])
    clean(axes)
    for digit, text in enumerate(axes.get_xticklabels()):
        text.set_fontweight("bold" if digit == example.label else "normal")


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=3, frameon=False, fontsize=11
    )
