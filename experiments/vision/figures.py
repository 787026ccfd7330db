"""The two figures: bars by method, and curves over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.jobs.curves import INK, Series, clean
from kdjax.tools.report import draw_band

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_ALONE, _METHOD = "#e69f00", "#0072b2"
_OTHERS = ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#3b3f4a")


class Curves(NamedTuple):
    """The records of one method: validation accuracy, and KL to the teacher."""

    accuracy: Series
    forward_kl: Series


def bars(accuracies: Mapping[str, Sequence[float]], baseline: str) -> Figure:
    """A bar per method, from the best downwards, in per cent."""
    names = list(accuracies)
    figure = Figure(figsize=(9, 0.28 * len(names) + 1.0), layout="constrained")
    axes = figure.subplots()
    values = [np.asarray(accuracies[name]) for name in names]
    means = [each.mean() for each in values]
    spreads = [each.std(ddof=1) if len(each) > 1 else 0.0 for each in values]
    places = np.arange(len(names))
    colors = [_ALONE if name == baseline else _METHOD for name in names]
    axes.barh(places, means, xerr=spreads, color=colors, ecolor=INK, height=0.7)
    for place, each in zip(places, values, strict=True):
        axes.plot(each, np.full(len(each), place), ".", color=INK, ms=4, alpha=0.6)
    axes.axvline(float(np.mean(accuracies[baseline])), color=_ALONE, lw=1.2)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    lowest, highest = min(map(np.min, values)), max(map(np.max, values))
    room = max(0.1 * (highest - lowest), 0.5)
    axes.set_xlim(max(0, lowest - 2 * room), min(100, highest + room))
    axes.set_xlabel("test accuracy, %", color=INK)
    clean(axes, grid="x")
    return figure


def curves(every: Mapping[str, Curves], baseline: str) -> Figure:
    """Accuracy and fidelity over the steps, a line per method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    others = iter(_OTHERS)
    for name, lines in every.items():
        color = _ALONE if name == baseline else next(others)
        for axes, line in zip((left, right), lines, strict=True):
            draw_band(axes, *line, color=color, label=name, lw=1.8)
    left.set_title("validation accuracy", fontsize=11, loc="left", color=INK)
    right.set_title("validation KL to the teacher", fontsize=11, loc="left", color=INK)
    # Matplotlib warns of a log scale with nothing above 0 on it.
    if right.dataLim.ymax > 0:
        right.set_yscale("log")
        right.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.set_xlabel("step", color=INK)
        clean(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=7, frameon=False)
    return figure
