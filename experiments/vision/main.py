"""Trains a teacher, then students by every method, and reports them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from jax import Array
from rich.console import Console

from experiments.jobs import command
from experiments.jobs.data import Images, fewest, hide_labels, labelled_only
from experiments.jobs.evaluation import Evaluator
from experiments.jobs.interruption import Sigterm
from experiments.jobs.networks import fingerprint, load_teacher, trained
from experiments.jobs.settings import claim
from experiments.jobs.trainings import Job, Length, Result, Trainer
from experiments.vision import data, report
from experiments.vision.config import Config
from experiments.vision.data import ImageSet
from experiments.vision.methods import ALONE, Setup, Unfit, chosen, objective
from experiments.vision.models import Statistics, network
from experiments.vision.models.features import Net, preactivation_path
from experiments.vision.timing import Timing, measured
from kdjax import Adapted, objectives, teachers


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was checked.

    Attributes:
      config: the command line.
      job: what trainings share.
      images: the data.
      methods: to be compared, the baseline first.
      teacher: from an earlier run, ``None`` if it is trained here.
    """

    config: Config
    job: Job
    images: ImageSet
    methods: Sequence[str]
    teacher: Adapted | None = None

    def network(self, name: str, seed: int) -> Net:
        """A network for these images."""
        images = self.images
        return network(name, images.shape, images.classes, self._statistics, seed=seed)

    @functools.cached_property
    def _statistics(self) -> Statistics:
        return Statistics.of(self.images.parts.train["x"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    started = time.perf_counter()
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.vision")

    def prepare(console: Console, sigterm: Sigterm) -> Prepared:
        return _prepared(config, console, sigterm)

    def work(prepared: Prepared) -> None:
        _train(prepared)
        _report(prepared, time.perf_counter() - started)

    return command.run(prepare, work)


def _prepared(config: Config, console: Console, sigterm: Sigterm) -> Prepared:
    """Loads the data and refuses what cannot work, before anything is trained."""
    images = data.load(config.data_dir, config.validation)
    _check_labels(config, images)
    settings = config.settings("trained here", images.fingerprint)
    job = Job(
        settings,
        images.parts,
        images.classes,
        config.batch_size,
        console,
        sigterm,
        tensorboard=config.tensorboard,
    )
    prepared = Prepared(config, job, images, ())
    prepared = dataclasses.replace(prepared, methods=_fitting(prepared))
    if config.teacher is not None:
        net = prepared.network(config.teacher_model, seed=0).adapted
        template = _trainer_of_teacher(prepared).initial(net, seed=0)
        teacher = load_teacher(config.teacher, net, template, "runs/vision/teacher")
        settings = config.settings(fingerprint(teacher), images.fingerprint)
        job = dataclasses.replace(job, settings=settings)
        prepared = dataclasses.replace(prepared, job=job, teacher=teacher)
    claim(config.out, job.settings)
    return prepared


def _check_labels(config: Config, images: ImageSet) -> None:
    per_class, rest = divmod(config.labels, images.classes)
    most = fewest(images.parts.train, images.classes)
    if rest or per_class > most:
        raise ValueError(
            f"--labels: got {config.labels} for {images.classes} classes; expected a "
            f"multiple of {images.classes}, at most {most * images.classes}, since "
            f"every class has {most} training images at least; or 0 for all."
        )
    devices = jax.device_count()
    count = len(_learnt_from(config, images, seed=0)["x"])
    if config.batch_size % devices or config.batch_size > count:
        raise ValueError(
            f"--batch-size: got {config.batch_size}; expected a multiple of the "
            f"{devices} device(s), at most {count}, which are the images that a "
            "student learns from."
        )


def _learnt_from(config: Config, images: ImageSet, seed: int) -> Images:
    """The images that the student of a seed sees."""
    train = images.parts.train
    if not config.labels:
        return train
    some = hide_labels(train, config.labels // images.classes, seed)
    return some if config.unlabelled else labelled_only(some)


def _fitting(prepared: Prepared) -> list[str]:
    """The methods asked for; those of ``all`` that don't fit are left out."""
    asked = chosen(prepared.config.methods)
    by_name = chosen(name for name in prepared.config.methods if name != "all")
    setup = _setup(prepared, None)
    fitting = []
    for name in asked:
        try:
            objective(name, setup)
        except Unfit as error:
            if name in by_name:
                raise ValueError(f"--methods: {error}") from error
            prepared.job.console.print(f"Left out: {error}")
            continue
        fitting.append(name)
    return fitting


def _setup(prepared: Prepared, teacher: Adapted | None) -> Setup:
    """What methods are made for; without the teacher's arrays only to be checked."""
    config = prepared.config
    theirs = prepared.network(config.teacher_model, seed=0)

    def margins() -> Sequence[Array]:
        if teacher is None:
            return [jnp.zeros(())] * theirs.stages
        some = {"x": jnp.asarray(prepared.images.parts.train["x"][:1000])}
        return _margins(theirs._replace(adapted=teacher), some["x"])

    count, steps = _sizes(config, prepared.images)
    return Setup(
        prepared.network(config.student, seed=0),
        theirs,
        count,
        steps,
        bool(config.mixup),
        margins,
    )


def _margins(net: Net, x: Array) -> list[Array]:
    """The mean of each channel's negative values before the ReLU, by stage."""
    arrays = net.adapted.params, net.adapted.model_state

    @jax.jit
    def shown(params, model_state, x):
        batch = {"x": x}
        out, _ = net.adapted.model.apply(
            params, model_state, batch, rng=None, train=False
        )
        found = []
        for stage in range(net.stages):
            values = out.features[preactivation_path(stage)]
            below = values < 0
            total = jnp.where(below, values, 0).sum((0, 1, 2))
            found.append(total / jnp.maximum(below.sum((0, 1, 2)), 1))
        return found

    return shown(*arrays, x)


def _sizes(config: Config, images: ImageSet) -> tuple[int, int]:
    """Images that a student learns from, and its steps."""
    count = len(_learnt_from(config, images, seed=0)["x"])
    return count, config.epochs * (count // config.batch_size)


def _length(config: Config, steps: int) -> Length:
    return Length(
        steps, -(-steps // config.evaluations), -(-steps // config.checkpoints)
    )


def _trainer_of_teacher(prepared: Prepared) -> Trainer:
    config, job = prepared.config, prepared.job
    net = prepared.network(config.teacher_model, seed=0).adapted
    steps = config.teacher_epochs * (len(job.parts.train["x"]) // config.batch_size)
    return Trainer(
        job,
        net,
        None,
        objectives.hard_labels(),
        config.optimizer_for(config.teacher_learning_rate, steps),
        length=_length(config, steps),
        evaluator=Evaluator(net.model, job.parts, job.classes, None, test_too=True),
        transform=config.augmentation(of_student=False),
    )


def _teacher(prepared: Prepared) -> Adapted:
    """The teacher, loaded or trained, with its result written down."""
    config, folder = prepared.config, prepared.config.out / "teacher"
    trainer = _trainer_of_teacher(prepared)
    if prepared.teacher is None:
        prepared.job.console.print(f"teacher: {config.teacher_model}")
        net = prepared.network(config.teacher_model, seed=0).adapted
        train = prepared.images.parts.train
        return trained(net, trainer.run(folder, net, train, seed=0))
    trainer.finish(folder, trainer.initial(prepared.teacher, seed=0), step_ms=None)
    return prepared.teacher


def _train(prepared: Prepared) -> None:
    """Trains and times what is not finished."""
    config, job = prepared.config, prepared.job
    pending = {name: _pending(config, name) for name in prepared.methods}
    unfinished = [
        name
        for name, seeds in pending.items()
        if seeds or Timing.read(config.out / name) is None
    ]
    if not unfinished and Result.read(config.out / "teacher") is not None:
        job.console.print(f"All runs in {config.out} are finished.")
        return
    teacher = _teacher(prepared)
    setup = _setup(prepared, teacher)
    source = teachers.frozen(teacher)
    net = setup.student.adapted
    evaluator = Evaluator(net.model, job.parts, job.classes, source, test_too=True)

    def trainer(name: str) -> Trainer:
        return Trainer(
            job,
            net,
            source,
            objective(name, setup),
            config.optimizer_for(config.learning_rate, setup.steps),
            length=_length(config, setup.steps),
            evaluator=evaluator,
            transform=config.augmentation(of_student=True),
        )

    alone = trainer(ALONE)
    number, total = 0, sum(map(len, pending.values()))
    for name in unfinished:
        own = alone if name == ALONE else trainer(name)
        for seed in pending[name]:
            number += 1
            job.console.print(f"student {number} of {total}: {name}, seed {seed}")
            student = prepared.network(config.student, seed).adapted
            images = _learnt_from(config, prepared.images, seed)
            own.run(_folder(config, name, seed), student, images, seed)
        images = _learnt_from(config, prepared.images, seed=0)
        measured(own, alone, net, images).write(config.out / name)
        job.sigterm.check()


def _pending(config: Config, name: str) -> list[int]:
    return [
        seed
        for seed in range(config.seeds)
        if Result.read(_folder(config, name, seed)) is None
    ]


def _folder(config: Config, name: str, seed: int) -> Path:
    return config.out / name / f"seed-{seed}"


def _report(prepared: Prepared, seconds: float) -> None:
    """Prints the table, and writes everything beside the runs."""
    config, console = prepared.config, prepared.job.console
    results = report.read(config.out, prepared.methods, config.seeds)
    console.print(report.table(results).rich())
    for line in report.findings(results):
        console.print(line)
    path = report.write(config, results)
    console.print(f"Bars and curves after {seconds:.0f} s: {path}")
