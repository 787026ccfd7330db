"""Methods beside each other, with several seeds each: what is finished, what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from etils.epath import Path

from experiments.jobs.cluster import agreed
from experiments.jobs.timing import Timing
from experiments.jobs.trainings import Result

R = TypeVar("R")


def folder_of(out: Path, method: str, seed: int) -> Path:
    """Where one training is."""
    return out / method / f"seed-{seed}"


def pending(out: Path, methods: Sequence[str], seeds: int) -> dict[str, list[int]]:
    """The methods that are not trained and timed, with their seeds to train."""

    def find() -> dict[str, list[int]]:
        left = {
            method: [
                seed
                for seed in range(seeds)
                if Result.read(folder_of(out, method, seed)) is None
            ]
            for method in methods
        }
        return {
            method: some
            for method, some in left.items()
            if some or Timing.read(out / method) is None
        }

    return agreed(find)


def finished(
    out: Path,
    methods: Sequence[str],
    seeds: int,
    run: Callable[[Path, Result], R],
) -> tuple[Result, dict[str, list[R]], dict[str, Timing]]:
    """The teacher's result, the runs of each method by seed, and their times.

    Args:
      out: of the job, all of whose runs must be finished.
      methods: their names.
      seeds: how many.
      run: makes a run of its folder and its result.
    """

    def result_in(folder: Path) -> Result:
        result = Result.read(folder)
        assert result is not None, folder
        return result

    runs, timings = {}, {}
    for method in methods:
        folders = [folder_of(out, method, seed) for seed in range(seeds)]
        runs[method] = [run(folder, result_in(folder)) for folder in folders]
        timing = Timing.read(out / method)
        assert timing is not None, method
        timings[method] = timing
    return result_in(out / "teacher"), runs, timings
