"""What is loaded and checked before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils.epath import Path
from jax import Array
from rich.console import Console

from experiments.jobs.data import Images, fewest, hide_labels, labelled_only
from experiments.jobs.evaluation import Evaluator
from experiments.jobs.interruption import Sigterm
from experiments.jobs.networks import fingerprint, load_teacher
from experiments.jobs.settings import claim
from experiments.jobs.trainings import Job, Length, Trainer
from experiments.vision import data
from experiments.vision.config import Config
from experiments.vision.data import ImageSet
from experiments.vision.methods import Setup, Unfit, chosen, objective
from experiments.vision.models import Statistics, network
from experiments.vision.models.features import Net, preactivation_path
from kdjax import Adapted, objectives


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
        return network(name, images.shape, images.classes, self.statistics, seed=seed)

    @functools.cached_property
    def statistics(self) -> Statistics:
        """By which networks normalise their images."""
        return Statistics.of(self.images.parts.train["x"])


def prepare(config: Config, console: Console, sigterm: Sigterm) -> Prepared:
    """Loads the data and refuses what cannot work, before anything is trained."""
    images = data.load(config.data_dir, config.validation)
    _check_labels(config, images)
    prepared = Prepared(config, _job(config, images, console, sigterm), images, ())
    prepared = dataclasses.replace(prepared, methods=_fitting(prepared))
    if config.teacher is not None:
        prepared = with_loaded_teacher(prepared, config.teacher)
    claim(config.out, prepared.job.settings)
    return prepared


def with_loaded_teacher(prepared: Prepared, folder: Path) -> Prepared:
    """The same with the teacher of an earlier run."""
    config, images = prepared.config, prepared.images
    net = prepared.network(config.teacher_model, seed=0).adapted
    teacher = load_teacher(folder, net, "runs/vision/teacher")
    settings = config.settings(fingerprint(teacher), images.fingerprint)
    job = dataclasses.replace(prepared.job, settings=settings)
    return dataclasses.replace(prepared, job=job, teacher=teacher)


def of_finished(run: Path, data_dir: Path | None) -> Prepared:
    """What a finished job was done with, and its teacher.

    Args:
      run: folder of the job.
      data_dir: as in :class:`Config`.
    """
    settings = json.loads((run / "settings.json").read_text())
    there = {"teacher": None, "data_dir": data_dir, "methods": ("kd",)}
    config = Config(**settings | there)
    images = data.load(data_dir, config.validation)
    if images.fingerprint != settings["data_dir"]:
        raise ValueError(
            f"--data-dir: got {images.fingerprint}; expected those of {run}, "
            f"{settings['data_dir']}."
        )
    job = _job(config, images, Console(), Sigterm())
    return with_loaded_teacher(Prepared(config, job, images, ("kd",)), run / "teacher")


def _job(config: Config, images: ImageSet, console: Console, sigterm: Sigterm) -> Job:
    return Job(
        config.settings("trained here", images.fingerprint),
        config.batch_size,
        console,
        sigterm,
        tensorboard=config.tensorboard,
        trace_steps=config.trace_steps,
    )


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
    count = len(learnt_from(config, images, seed=0)["x"])
    if config.batch_size % devices or config.batch_size > count:
        raise ValueError(
            f"--batch-size: got {config.batch_size}; expected a multiple of the "
            f"{devices} device(s), at most {count}, which are the images that a "
            "student learns from."
        )


def learnt_from(config: Config, images: ImageSet, seed: int) -> Images:
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
    setup = setup_of(prepared, None)
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


def setup_of(prepared: Prepared, teacher: Adapted | None) -> Setup:
    """What methods are made for; without the teacher's arrays only to be checked."""
    config = prepared.config
    theirs = prepared.network(config.teacher_model, seed=0)

    def margins() -> Sequence[Array]:
        if teacher is None:
            return [jnp.zeros(())] * theirs.stages
        some = {"x": jnp.asarray(prepared.images.parts.train["x"][:1000])}
        return _margins(theirs._replace(adapted=teacher), some["x"])

    count, steps = sizes(config, prepared.images)
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


def sizes(config: Config, images: ImageSet) -> tuple[int, int]:
    """Images that a student learns from, and its steps."""
    count = len(learnt_from(config, images, seed=0)["x"])
    return count, config.epochs * (count // config.batch_size)


def length_of(config: Config, steps: int) -> Length:
    return Length(
        steps, -(-steps // config.evaluations), -(-steps // config.checkpoints)
    )


def trainer_of_teacher(prepared: Prepared) -> Trainer:
    config, images = prepared.config, prepared.images
    net = prepared.network(config.teacher_model, seed=0).adapted
    train = images.parts.train
    steps = config.teacher_epochs * (len(train["x"]) // config.batch_size)
    return Trainer(
        prepared.job,
        net,
        None,
        objectives.hard_labels(),
        config.optimizer_for(config.teacher_learning_rate, steps),
        examples=train,
        length=length_of(config, steps),
        evaluator=Evaluator(
            net.model, images.parts, images.classes, None, test_too=True
        ),
        transform=config.augmentation(of_student=False),
    )
