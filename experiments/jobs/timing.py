"""What a method costs: its step beside that of plain training, in turns."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable

from etils.epath import Path

from experiments.jobs.cluster import is_first
from kdjax.io.files import write_whole

_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one step.

    Attributes:
      step_ms: median of the rounds, in milliseconds.
      ratio: median over the rounds of the time by that of plain training, which ran
        just before or after in the same process.
    """

    step_ms: float
    ratio: float

    @classmethod
    def read(cls, folder: Path) -> Timing | None:
        """The timing in a method's folder, ``None`` before it is measured."""
        path = folder / "timing.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write(self, folder: Path) -> None:
        """Into a method's folder, by the first process."""
        if is_first():
            write_whole(folder / "timing.json", json.dumps(dataclasses.asdict(self)))


def measured(own: Callable[[], float], alone: Callable[[], float]) -> Timing:
    """Times a method beside plain training.

    Args:
      own: trains for some steps and returns the seconds of one, from
        ``Trainer.stopwatch``; it may compile first.
      alone: the same of plain training.
    """
    sides = (alone, own)
    for side in sides:
        side()
    rounds = []
    for number in range(_ROUNDS):
        # Either goes first in every other round.
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {index: sides[index]() for index in order}
        rounds.append((seconds[0], seconds[1]))
    return Timing(
        1e3 * statistics.median(ours for _, ours in rounds),
        statistics.median(ours / plain for plain, ours in rounds),
    )
