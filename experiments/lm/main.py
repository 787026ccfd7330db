"""Trains a teacher, then students by every method, and reports them."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence

import tyro
from etils.epath import Path

from experiments.jobs import command, comparison
from experiments.jobs.cluster import agreed, is_first
from experiments.jobs.networks import trained
from experiments.jobs.timing import Timing, measured
from experiments.jobs.trainings import is_finished
from experiments.lm import report, weights
from experiments.lm.config import Config
from experiments.lm.methods import ALONE
from experiments.lm.networks import network
from experiments.lm.preparation import TOKENIZER, Prepared, prepare
from experiments.lm.students import Students, trainer_of_teacher
from kdjax import Adapted


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    started = time.perf_counter()
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.lm")

    def work(prepared: Prepared) -> None:
        diverged = _train(prepared)
        if is_first():
            _report(prepared, diverged, time.perf_counter() - started)
        comparison.refuse(diverged)

    return command.run(config.cluster, functools.partial(prepare, config), work)


def _train(prepared: Prepared) -> dict[str, str]:
    """Trains and times what is not finished; tells which methods diverged."""
    config, job = prepared.config, prepared.job
    pending = comparison.pending(config.out, prepared.methods, config.seeds)
    if not pending and is_finished(config.out / "teacher"):
        job.console.print(f"All runs in {config.out} are finished.")
        return {}
    students = Students(prepared, _teacher(prepared))
    alone = students.of(ALONE)

    def work_of(name: str) -> comparison.Work:
        own = alone if name == ALONE else students.of(name)

        def train_seed(seed: int) -> None:
            folder = comparison.folder_of(config.out, name, seed)
            own.trainer.run(folder, own.initial(seed), own.rows(seed), seed)

        def time_step() -> None:
            if agreed(functools.partial(_is_untimed, config.out / name)):
                measured(own.stopwatch(), alone.stopwatch()).write(config.out / name)

        return train_seed, time_step

    return comparison.train(pending, ALONE, work_of, job.console, job.sigterm)


def _is_untimed(folder: Path) -> bool:
    return Timing.read(folder) is None


def _teacher(prepared: Prepared) -> Adapted:
    """The teacher, loaded or trained, with its weights and its result written down."""
    folder = prepared.config.out / "teacher"
    trainer = trainer_of_teacher(prepared)
    teacher = prepared.teacher
    if teacher is None:
        prepared.job.console.print("teacher")
        net = network(prepared.setup.teacher)
        rows = prepared.rows(prepared.texts.train)
        teacher = trained(net, trainer.run(folder, net, rows, seed=0))
    else:
        trainer.finish(folder, trainer.initial(teacher, seed=0), step_ms=None)
    if is_first():
        prepared.tokens.write(folder / TOKENIZER)
        weights.save(folder, prepared.setup.teacher, teacher.params)
    return teacher


def _report(prepared: Prepared, diverged: Mapping[str, str], seconds: float) -> None:
    """Prints the table, and writes everything beside the runs."""
    config, console = prepared.config, prepared.job.console
    results = report.read(config.out, prepared.methods, config.seeds, diverged)
    # First, as a terminal may lack characters of the table.
    path = report.write(config, results)
    report.table(results).print(console)
    for line in report.findings(results):
        console.print(line)
    console.print(f"Bars and curves after {seconds:.0f} s: {path}")
