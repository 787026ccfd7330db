"""Trains a teacher, then students alone and distilled, and reports them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import optax
import tyro
from rich.console import Console

from experiments.digits import data, report
from experiments.digits.config import Config
from experiments.digits.kinds import KINDS, Kind
from experiments.digits.model import student_net, teacher_net
from experiments.jobs import command
from experiments.jobs.cluster import is_first
from experiments.jobs.data import Images, Parts, fewest, hide_labels, labelled_only
from experiments.jobs.evaluation import Evaluator
from experiments.jobs.interruption import Sigterm
from experiments.jobs.networks import fingerprint, load_teacher, trained
from experiments.jobs.settings import claim
from experiments.jobs.trainings import Job, Length, Trainer, is_finished
from kdjax import Adapted, Teacher, losses, metrics, objectives, teachers
from kdjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was checked.

    Attributes:
      config: the command line.
      job: what trainings share.
      parts: the data.
      teacher: from an earlier run, ``None`` if it is trained here.
    """

    config: Config
    job: Job
    parts: Parts
    teacher: Adapted | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    started = time.perf_counter()
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.digits")

    def prepare(console: Console, sigterm: Sigterm) -> Prepared:
        return _prepared(config, console, sigterm)

    def work(prepared: Prepared) -> None:
        worked = _train(prepared)
        if is_first():
            _report(prepared, time.perf_counter() - started if worked else None)

    return command.run(config.cluster, prepare, work)


def _prepared(config: Config, console: Console, sigterm: Sigterm) -> Prepared:
    """Loads the data and refuses what cannot work, before anything is trained."""
    parts = data.load()
    most = fewest(parts.train, data.CLASSES)
    if config.labels_per_class > most:
        raise ValueError(
            f"--labels-per-class: got {config.labels_per_class}; expected 1 to {most}, "
            "which every class has in the training part."
        )
    devices = jax.device_count()
    images = min(len(parts.train["x"]), data.CLASSES * config.labels_per_class)
    if config.batch_size % devices or config.batch_size > len(parts.train["x"]):
        raise ValueError(
            f"--batch-size: got {config.batch_size}; expected a multiple of the "
            f"{devices} device(s), at most {len(parts.train['x'])}, which are the "
            "images of the training part."
        )
    if images < devices:
        raise ValueError(
            f"--labels-per-class: got {config.labels_per_class}, which are {images} "
            f"images for {devices} devices; expected at least one for each."
        )
    job = Job(
        config.settings("trained here"),
        config.batch_size,
        console,
        sigterm,
        tensorboard=config.tensorboard,
        trace_steps=config.trace_steps,
    )
    prepared = Prepared(config, job, parts)
    if config.teacher is not None:
        net = teacher_net(seed=0)
        teacher = load_teacher(config.teacher, net, "runs/digits/teacher")
        settings = config.settings(fingerprint(teacher))
        job = dataclasses.replace(job, settings=settings)
        prepared = Prepared(config, job, parts, teacher)
    claim(config.out, job.settings)
    return prepared


def _length(config: Config, steps: int) -> Length:
    return Length(steps, config.evaluate_every, config.checkpoint_every)


def _trainer_of_teacher(prepared: Prepared) -> Trainer:
    net, steps = teacher_net(seed=0), prepared.config.teacher_steps
    return Trainer(
        prepared.job,
        net,
        None,
        objectives.hard_labels(),
        optax.adamw(optax.cosine_decay_schedule(2e-3, steps)),
        examples=prepared.parts.train,
        length=_length(prepared.config, steps),
        evaluator=Evaluator(net.model, prepared.parts, data.CLASSES, None),
        transform=data.shift,
    )


def _train(prepared: Prepared) -> bool:
    """Trains what is not finished; says whether there was anything."""
    config, job = prepared.config, prepared.job
    pending = [
        (kind, seed)
        for kind in KINDS
        for seed in range(config.seeds)
        if not is_finished(kind.folder(config.out, seed))
    ]
    if not pending and is_finished(config.out / "teacher"):
        job.console.print(f"All runs in {config.out} are finished.")
        return False
    net, teacher = student_net(seed=0), teachers.frozen(_teacher(prepared))
    evaluator = Evaluator(net.model, prepared.parts, data.CLASSES, teacher)
    trainers = {
        distilled: _trainer_of_student(prepared, net, teacher, evaluator, distilled)
        for distilled in {kind.distilled for kind, _ in pending}
    }
    for number, (kind, seed) in enumerate(pending, start=1):
        job.console.print(f"student {number} of {len(pending)}: {kind}, seed {seed}")
        folder = kind.folder(config.out, seed)
        images = _images(prepared, kind, seed)
        trainers[kind.distilled].run(folder, student_net(seed), images, seed)
    return True


def _teacher(prepared: Prepared) -> Adapted:
    """The teacher, loaded or trained, with its result written down."""
    net, folder = teacher_net(seed=0), prepared.config.out / "teacher"
    trainer = _trainer_of_teacher(prepared)
    if prepared.teacher is None:
        prepared.job.console.print("teacher")
        images = prepared.parts.train
        return trained(net, trainer.run(folder, net, images, seed=0))
    trainer.finish(folder, trainer.initial(prepared.teacher, seed=0), step_ms=None)
    return prepared.teacher


def _trainer_of_student(
    prepared: Prepared,
    net: Adapted,
    teacher: tuple[Teacher, PyTree],
    evaluator: Evaluator,
    distilled: bool,
) -> Trainer:
    config = prepared.config
    if distilled:
        objective = objectives.combine(
            objectives.hard_labels(weight=config.alpha),
            objectives.soft_labels(
                losses.forward_kl,
                temperature=config.temperature,
                weight=1 - config.alpha,
            ),
            objectives.monitor(metrics.agreement, name="agreement"),
        )
    else:
        objective = objectives.hard_labels()
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return Trainer(
        prepared.job,
        net,
        teacher,
        objective,
        optax.adamw(schedule),
        examples=prepared.parts.train,
        length=_length(config, config.steps),
        evaluator=evaluator,
    )


def _images(prepared: Prepared, kind: Kind, seed: int) -> Images:
    """What a student of this kind and seed learns from."""
    images = prepared.parts.train
    if kind.few:
        images = hide_labels(images, prepared.config.labels_per_class, seed)
    return images if kind.unlabelled else labelled_only(images)


def _report(prepared: Prepared, seconds: float | None) -> None:
    """Prints the table, and writes everything beside the runs."""
    config, console = prepared.config, prepared.job.console
    results = report.read(config.out, config.seeds)
    # First, as a terminal may lack characters of the table.
    path = report.write(config, prepared.parts, results)
    report.table(results, config).print(console)
    for line in report.findings(results, config):
        console.print(line)
    done = "" if seconds is None else f" after {seconds:.0f} s"
    console.print(f"Curves and pictures{done}: {path}")
