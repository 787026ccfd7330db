"""Reports to look at: a table, a sentence and a picture."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from kdjax.tools.preflight._check import Report
from kdjax.tools.preflight._levers import Trial
from kdjax.tools.report import Table


def table(report: Report) -> Table:
    """What one step takes on each chip, line by line."""
    rows = [*_memory(report), *_costs(report), *_times(report)]
    return Table(["", "each chip", ""], rows)


def _memory(report: Report) -> Iterator[tuple[str, str, str]]:
    for name, size in report.memory.items():
        if size:
            yield name, _bytes(size), ""
    note = ""
    if report.chip is not None:
        memory = report.chip.memory
        note = f"{report.peak / memory:.0%} of {_bytes(memory)}"
    least = "at least " if report.costs is None else ""
    yield "peak memory", least + _bytes(report.peak), note


def _costs(report: Report) -> Iterator[tuple[str, str, str]]:
    costs = report.costs
    if costs is None:
        return
    yield "products", f"{costs.flops / 1e12:.3g} TFLOP", ""
    for name, flops in (
        ("of the student", costs.student_flops),
        ("of the teacher", costs.teacher_flops),
    ):
        yield name, f"{flops / 1e12:.3g} TFLOP", f"{flops / costs.flops:.0%}"
    yield "memory traffic", _bytes(costs.traffic), ""
    times: dict[str, int] = collections.defaultdict(int)
    moved: dict[str, float] = collections.defaultdict(float)
    for each in costs.collectives:
        times[each.kind] += each.times
        moved[each.kind] += each.times * each.moved
    for kind in sorted(moved, key=lambda kind: -moved[kind]):
        yield kind, _bytes(moved[kind]), f"{times[kind]} times"
    if costs.unknown_loops:
        yield "loops of unknown length", str(costs.unknown_loops), "count as one turn"


def _times(report: Report) -> Iterator[tuple[str, str, str]]:
    slowest = max(report.seconds.values(), default=0.0)
    for name, seconds in report.seconds.items():
        note = "bounds the step" if seconds == slowest else ""
        yield f"time for {name}", f"{1e3 * seconds:.3g} ms", note


def verdict(trials: Sequence[Trial]) -> str:
    """Whether it fits, and what was changed for that."""
    last = trials[-1]
    chips = f"{last.report.chips} x {last.report.device_kind}"
    changed = [trial.changed for trial in trials[1:]]
    if last.report.fits is None:
        return f"{chips}: {_bytes(last.report.peak)} on each; its memory is not known."
    if not last.report.fits:
        tried = f", even with {', '.join(changed)}" if changed else ""
        return f"{chips}: does not fit{tried}; take more chips or a smaller batch."
    if not changed:
        return f"{chips}: it fits."
    settings = ", ".join(
        f"{name} {value}" for name, value in last.levers._asdict().items()
    )
    mesh = ", ".join(f"{name} {size}" for name, size in last.axes.items())
    return (
        f"{chips}: it fits with {', '.join(changed)}.\n"
        f"Recommended: mesh {mesh}; {settings}."
    )


def trials_table(trials: Sequence[Trial]) -> Table:
    """What was tried, one line each."""
    rows = []
    for trial in trials:
        report = trial.report
        fits = {True: "fits", False: "does not fit", None: ""}[report.fits]
        least = "> " if report.costs is None else ""
        rows.append((trial.changed or "as given", least + _bytes(report.peak), fits))
    return Table(["tried, each on top of those above", "peak memory", ""], rows)


def figure(trials: Sequence[Trial]) -> Any:
    """The memory of each chip, a bar for each trial beside the chip's limit.

    Returns:
      A Matplotlib figure.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 1.2 + 0.5 * len(trials)), layout="constrained")
    axes = drawn.subplots()
    names = list(dict.fromkeys(n for t in trials for n in t.report.memory))
    labels = [trial.changed or "as given" for trial in trials]
    left = [0.0] * len(trials)
    for name in names:
        sizes = [trial.report.memory.get(name, 0) / 2**30 for trial in trials]
        if any(sizes):
            axes.barh(labels, sizes, left=left, label=name)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    chip = trials[-1].report.chip
    if chip is not None:
        axes.axvline(chip.memory / 2**30, color="black", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("GiB on each chip")
    drawn.legend(loc="outside upper left", ncols=4, frameon=False)
    return drawn


def _bytes(size: float) -> str:
    """As TPUs' memory is told: in powers of 2."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
