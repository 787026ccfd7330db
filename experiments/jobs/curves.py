"""Curves over the steps of trainings, from their records to Matplotlib's axes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils.epath import Path

INK, FAINT = "#1f2430", "#e3e6ec"


class Series(NamedTuple):
    """One metric of several trainings: steps ``[N]``, values ``[runs, N]``."""

    steps: Sequence[int]
    runs: Sequence[Sequence[float]]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What a training recorded, of one kind (``"train"`` or ``"eval"``)."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def series(folders: Sequence[Path], kind: str, name: str) -> Series:
    """One metric of trainings of equal length."""
    runs = [records(folder, kind) for folder in folders]
    steps = [each["step"] for each in runs[0]]
    return Series(steps, [[each[name] for each in run] for run in runs])


def clean(axes: Any, grid: str = "y") -> None:
    """Takes away what is not data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK, length=2)
