"""Methods beside each other, with several seeds each: what is finished, what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from etils.epath import Path
from rich.console import Console

from experiments.jobs.cluster import agreed
from experiments.jobs.interruption import Sigterm
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


Work: TypeAlias = tuple[Callable[[int], object], Callable[[], object]]
"""What trains the student of a seed, and what times a step once all are trained."""


def train(
    pending: Mapping[str, Sequence[int]],
    baseline: str,
    work_of: Callable[[str], Work],
    console: Console,
    sigterm: Sigterm,
) -> dict[str, str]:
    """Trains and times what is pending, and goes on where a method diverges.

    Args:
      pending: seeds by method.
      baseline: the method that all are compared with.
      work_of: by the name of a method.
      console: where each training is announced.
      sigterm: looked at after each method.

    Returns:
      The methods that diverged, and what is to be told of each.

    Raises:
      FloatingPointError: the baseline diverged.
    """
    diverged: dict[str, str] = {}
    number, total = 0, sum(map(len, pending.values()))
    for name, seeds in pending.items():
        train_seed, time_step = work_of(name)
        for seed in seeds:
            number += 1
            console.print(f"student {number} of {total}: {name}, seed {seed}")
            try:
                train_seed(seed)
            except FloatingPointError as error:
                told = f"{name} diverged with seed {seed}: {error}"
                if name == baseline:
                    raise FloatingPointError(told) from error
                diverged[name] = told
                break
        else:
            time_step()
        sigterm.check()
    return diverged


def refuse(diverged: Mapping[str, str]) -> None:
    """Ends a job of which methods diverged, once it has reported the others.

    Raises:
      FloatingPointError: there are some.
    """
    if diverged:
        raise FloatingPointError(
            f"{', '.join(diverged)} diverged, as told above, and the report has the "
            "others. Another run has to leave them out of --methods, or needs another "
            "--learning-rate and --out."
        )


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
