"""Trains a teacher, then students by every method, and reports them."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence

import tyro

from experiments.jobs import command, comparison
from experiments.jobs.cluster import is_first
from experiments.jobs.evaluation import Evaluator
from experiments.jobs.networks import trained
from experiments.jobs.timing import measured
from experiments.jobs.trainings import Trainer, is_finished
from experiments.vision import report
from experiments.vision.config import Config
from experiments.vision.methods import ALONE, objective
from experiments.vision.preparation import (
    Prepared,
    learnt_from,
    length_of,
    prepare,
    setup_of,
    trainer_of_teacher,
)
from kdjax import Adapted, teachers

_STEPS_TIMED = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    started = time.perf_counter()
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.vision")

    def work(prepared: Prepared) -> None:
        diverged = _train(prepared)
        if is_first():
            _report(prepared, diverged, time.perf_counter() - started)
        comparison.refuse(diverged)

    return command.run(config.cluster, functools.partial(prepare, config), work)


def _teacher(prepared: Prepared) -> Adapted:
    """The teacher, loaded or trained, with its result written down."""
    config, folder = prepared.config, prepared.config.out / "teacher"
    trainer = trainer_of_teacher(prepared)
    if prepared.teacher is None:
        prepared.job.console.print(f"teacher: {config.teacher_model}")
        net = prepared.network(config.teacher_model, seed=0).adapted
        train = prepared.images.parts.train
        return trained(net, trainer.run(folder, net, train, seed=0))
    trainer.finish(folder, trainer.initial(prepared.teacher, seed=0), step_ms=None)
    return prepared.teacher


def _train(prepared: Prepared) -> dict[str, str]:
    """Trains and times what is not finished; tells which methods diverged."""
    config, job = prepared.config, prepared.job
    pending = comparison.pending(config.out, prepared.methods, config.seeds)
    if not pending and is_finished(config.out / "teacher"):
        job.console.print(f"All runs in {config.out} are finished.")
        return {}
    teacher = _teacher(prepared)
    setup = setup_of(prepared, teacher)
    source = teachers.frozen(teacher)
    net = setup.student.adapted
    parts, classes = prepared.images.parts, prepared.images.classes
    evaluator = Evaluator(net.model, parts, classes, source, test_too=True)

    def trainer(name: str) -> Trainer:
        return Trainer(
            job,
            net,
            source,
            objective(name, setup),
            config.optimizer_for(config.learning_rate, setup.steps),
            examples=parts.train,
            length=length_of(config, setup.steps),
            evaluator=evaluator,
            transform=config.augmentation(of_student=True),
        )

    alone = trainer(ALONE)

    def work_of(name: str) -> comparison.Work:
        own = alone if name == ALONE else trainer(name)

        def train_seed(seed: int) -> None:
            student = prepared.network(config.student, seed).adapted
            images = learnt_from(config, prepared.images, seed)
            own.run(comparison.folder_of(config.out, name, seed), student, images, seed)

        def time_step() -> None:
            images = learnt_from(config, prepared.images, seed=0)
            sides = (each.stopwatch(net, images, _STEPS_TIMED) for each in (own, alone))
            measured(*sides).write(config.out / name)

        return train_seed, time_step

    return comparison.train(pending, ALONE, work_of, job.console, job.sigterm)


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
