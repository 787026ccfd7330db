"""Repeated measurements, and the table of figures beside their targets."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

HEADER = ("", "measure", "kdjax", "against", "", "ratio", "target", "")


class Sample(NamedTuple):
    """One run, in seconds of the clock and of all cores together."""

    wall: float
    cpu: float


class Figure(NamedTuple):
    """One line of a table: kdjax beside what it is measured against.

    ``ratio`` is what the target is about; where both sides were timed it is the
    median of the ratios of neighbouring runs, with its quartiles in ``spread``.
    """

    section: str
    subject: str
    measure: str
    ours: str
    against: str
    theirs: str
    ratio: float
    target: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio <= self.target

    def cells(self) -> tuple[str, ...]:
        ratio = f"{self.ratio:.2f}"
        if self.spread is not None:
            ratio += " ({:.2f} to {:.2f})".format(*self.spread)
        target = "" if self.target is None else f"≤ {self.target:g}"
        mark = {None: "", True: "✓", False: "✗"}[self.met]
        sides = self.ours, self.against, self.theirs
        return (self.subject, self.measure, *sides, ratio, target, mark)


def stopwatch(run: Callable[[], Any]) -> Callable[[], Sample]:
    """Times a run that returns its result, and only when its work is done."""

    def timed() -> Sample:
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        sample = Sample(time.perf_counter() - wall, time.process_time() - cpu)
        # Giving a result's memory back takes a while too. No side's time has it in it.
        del result
        return sample

    return timed


def interleaved(
    runs: Mapping[str, Callable[[], Sample]], repeats: int, pause: float = 0.0
) -> dict[str, list[Sample]]:
    """Runs all in turn, there and back, so that noise of the machine hits all alike.

    A round's sample is the mean of both ways: what a run finds depends on the one
    before it, and with one way alone, one side would always follow the other. One run
    of each before the first round is not counted. Before each run the memory of the one
    before goes back to the system, which takes a while of its own.
    """

    def once(name: str) -> Sample:
        gc.collect()
        time.sleep(pause)
        return runs[name]()

    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for name in runs:
        once(name)
    for _ in range(repeats):
        there = {name: once(name) for name in runs}
        back = {name: once(name) for name in reversed([*runs])}
        for name, taken in samples.items():
            pair = zip(there[name], back[name], strict=True)
            taken.append(Sample(*map(statistics.fmean, pair)))
    return samples


def beside(
    repeats: int,
    section: str,
    subject: str,
    ours: Callable[[], Sample],
    others: Mapping[str, Callable[[], Sample]],
    targets: Mapping[str, float],
) -> Iterator[Figure]:
    """Compares kdjax with each of the other sides, in rounds of the two alone.

    A third side's gigabytes, on their way back to the system, would slow down whoever
    comes after it.
    """
    for name, other in others.items():
        pair = {"kdjax": ours, name: other}
        mine, theirs = interleaved(pair, repeats, pause=0.3).values()
        yield from compared(section, subject, name, mine, theirs, targets.get(name))


def compared(
    section: str,
    subject: str,
    against: str,
    ours: list[Sample],
    theirs: list[Sample],
    target: float | None,
) -> list[Figure]:
    """Two figures: time on the clock, with its target, and time of the cores.

    The second sees through the noise of a machine that others use too.
    """
    figures = []
    for measure, index in (("time", 0), ("core time", 1)):
        mine, other = (np.array(samples)[:, index] for samples in (ours, theirs))
        low, ratio, high = np.quantile(mine / other, (0.25, 0.5, 0.75))
        figures.append(
            Figure(
                section,
                subject,
                measure,
                _seconds(np.median(mine)),
                against,
                _seconds(np.median(other)),
                float(ratio),
                target if measure == "time" else None,
                (float(low), float(high)),
            )
        )
    return figures


def _seconds(number: float) -> str:
    return f"{number:.2f} s" if number >= 1 else f"{number * 1e3:.3g} ms"


def show(figures: Iterable[Figure], notes: Iterable[str], *, markdown: bool) -> None:
    """Prints one table per section, and how many targets are met."""
    figures = list(figures)
    sections = dict.fromkeys(figure.section for figure in figures)
    console = Console(width=None if Console().is_terminal else 140)
    for section in sections:
        rows = [figure.cells() for figure in figures if figure.section == section]
        if markdown:
            lines = [HEADER, ("---",) * len(HEADER), *rows]
            table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
            print(f"\n**{section}**\n\n{table}")
            continue
        rich = Table(*HEADER, title=section, title_justify="left")
        for cells in rows:
            rich.add_row(*cells)
        console.print(rich)
    aimed = [figure.met for figure in figures if figure.met is not None]
    print("\n" + "\n".join([*notes, f"{sum(aimed)} of {len(aimed)} targets met"]))


def save(figures: Iterable[Figure], notes: Iterable[str], path: Path) -> None:
    rows = [{**figure._asdict(), "met": figure.met} for figure in figures]
    text = json.dumps({"notes": list(notes), "figures": rows}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
