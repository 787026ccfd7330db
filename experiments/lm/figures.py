"""The two figures: bars by method, and curves over steps and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.jobs.curves import INK, Series, clean
from kdjax.tools.report import draw_band

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_ALONE, _METHOD, _TEACHER = "#e69f00", "#0072b2", "#3b3f4a"
_OTHERS = ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#3b3f4a", "#8c6d31")


class Curve(NamedTuple):
    """Bits per character of one method over the steps, and the seconds of a step."""

    bits: Series
    step_seconds: float


def bars(bits: Mapping[str, Sequence[float]], baseline: str, teacher: float) -> Figure:
    """A bar per method, from the fewest bits downwards."""
    names = list(bits)
    figure = Figure(figsize=(9, 0.28 * len(names) + 1.0), layout="constrained")
    axes = figure.subplots()
    values = [np.asarray(bits[name]) for name in names]
    spreads = [each.std(ddof=1) if len(each) > 1 else 0.0 for each in values]
    places = np.arange(len(names))
    colors = [_ALONE if name == baseline else _METHOD for name in names]
    means = [each.mean() for each in values]
    axes.barh(places, means, xerr=spreads, color=colors, ecolor=INK, height=0.7)
    for place, each in zip(places, values, strict=True):
        axes.plot(each, np.full(len(each), place), ".", color=INK, ms=4, alpha=0.6)
    axes.axvline(float(np.mean(bits[baseline])), color=_ALONE, lw=1.2)
    axes.axvline(teacher, color=_TEACHER, lw=1.2)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    lowest, highest = min(teacher, *map(np.min, values)), max(map(np.max, values))
    room = max(0.1 * (highest - lowest), 0.02)
    axes.set_xlim(max(0, lowest - room), highest + room)
    axes.set_xlabel("bits per character, test", color=INK)
    clean(axes, grid="x")
    return figure


def curves(every: Mapping[str, Curve], baseline: str) -> Figure:
    """Bits per character over the steps and over time, a line per method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    others = iter(_OTHERS)
    for name, (line, step_seconds) in every.items():
        color = _ALONE if name == baseline else next(others)
        seconds = [step * step_seconds for step in line.steps]
        for axes, x in ((left, line.steps), (right, seconds)):
            draw_band(axes, x, line.runs, color=color, label=name, lw=1.8)
    left.set_ylabel("bits per character, validation", color=INK)
    left.set_xlabel("step", color=INK)
    right.set_xlabel("seconds of training", color=INK)
    for axes in (left, right):
        clean(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=8, frameon=False)
    return figure
