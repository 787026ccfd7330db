"""Trains a teacher, then students alone and distilled, and reports them."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.logging import RichHandler

from experiments.digits import data, report
from experiments.digits.config import Config
from experiments.digits.data import Images
from experiments.digits.interruption import Interrupted, Sigterm
from experiments.digits.kinds import KINDS, Kind
from experiments.digits.model import student_net, teacher_net
from experiments.digits.runs import Job, Result, Trainer
from kdjax import Adapted, Teacher, losses, metrics, objectives, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import batches
from kdjax.tools.report import write_whole
from kdjax.train import DistillState
from kdjax.types import PyTree


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    started = time.perf_counter()
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.digits")
    console = Console()
    logging.basicConfig(handlers=[RichHandler(console=console, show_path=False)])
    logging.getLogger("kdjax").setLevel(logging.INFO)
    try:
        with Sigterm() as sigterm:
            try:
                job = _prepared(config, console, sigterm)
            except (ValueError, OSError) as error:
                print(f"Refused: {error}", file=sys.stderr)
                return 2
            trained = _train(job)
            _report(job, time.perf_counter() - started if trained else None)
    except Interrupted:
        console.print("SIGTERM: saved. Run the same command to continue.")
        return 143
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command to continue.")
        return 130
    except FloatingPointError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    return 0


def _prepared(config: Config, console: Console, sigterm: Sigterm) -> Job:
    """Loads the data and refuses what cannot work, before anything is trained."""
    digits = data.load()
    data.hide_labels(digits.train, config.labels_per_class, seed=0)
    devices = jax.device_count()
    images = min(len(digits.train["x"]), data.CLASSES * config.labels_per_class)
    if config.batch_size % devices or config.batch_size > len(digits.train["x"]):
        raise ValueError(
            f"--batch-size: got {config.batch_size}; expected a multiple of the "
            f"{devices} device(s), at most {len(digits.train['x'])}, which are the "
            "images of the training part."
        )
    if images < devices:
        raise ValueError(
            f"--labels-per-class: got {config.labels_per_class}, which are {images} "
            f"images for {devices} devices; expected at least one for each."
        )
    job = Job(config, config.settings("trained here"), digits, console, sigterm)
    if config.teacher is not None:
        teacher = _load_teacher(job, config.teacher)
        settings = config.settings(_fingerprint(teacher))
        job = dataclasses.replace(job, settings=settings, teacher=teacher)
    _claim(config.out, job.settings)
    return job


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings down in the folder, or refuses it if it holds others."""
    path = out / "settings.json"
    try:
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=2))
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OSError(
            f"--out: cannot use {out} ({error}); expected a folder, there or to be "
            "made, that this user may write to."
        ) from error
    differing = [
        f"  --{name.replace('_', '-')}: {there.get(name)} there, {value} now"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--out: {out} holds runs with other settings:\n"
            + "\n".join(differing)
            + "\nGo back to those, or choose another folder."
        )


def _trainer_of_teacher(job: Job) -> Trainer:
    return Trainer(
        job,
        teacher_net(seed=0),
        None,
        objectives.hard_labels(),
        learning_rate=2e-3,
        steps=job.config.teacher_steps,
        transform=data.shift,
    )


def _load_teacher(job: Job, folder: Path) -> Adapted:
    """The teacher of an earlier run, from its newest checkpoint."""
    inner = folder / "checkpoints"
    inner = inner if inner.is_dir() else folder
    missing = ValueError(
        f"--teacher: found no checkpoint in {folder}; expected the folder of a "
        "teacher that this job trained, such as runs/digits/teacher."
    )
    # Opening a checkpoint folder makes it, and its steps are numbered folders.
    if not inner.is_dir() or not any(path.name.isdigit() for path in inner.iterdir()):
        raise missing
    template = _trainer_of_teacher(job).initial(teacher_net(seed=0), seed=0)
    position = batches(job.digits.train, batch_size=1, seed=0)  # read and not used
    checkpoints = Checkpoints(inner)
    try:
        restored = checkpoints.restore(template, position)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    finally:
        checkpoints.close()
    if restored is None:
        raise missing
    return _trained(teacher_net(seed=0), restored[0])


def _trained(net: Adapted, state: DistillState) -> Adapted:
    return net._replace(params=state.params["student"], model_state=state.model_state)


def _fingerprint(net: Adapted) -> str:
    checksum = 0
    for leaf in jax.tree.leaves((net.params, net.model_state)):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return f"weights {checksum:08x}"


def _train(job: Job) -> bool:
    """Trains what is not finished; says whether there was anything."""
    config = job.config
    pending = [
        (kind, seed)
        for kind in KINDS
        for seed in range(config.seeds)
        if Result.read(kind.folder(config.out, seed)) is None
    ]
    if not pending and Result.read(config.out / "teacher") is not None:
        job.console.print(f"All runs in {config.out} are finished.")
        return False
    net, teacher = student_net(seed=0), teachers.frozen(_teacher(job))
    trainers = {
        distilled: _trainer_of_student(job, net, teacher, distilled)
        for distilled in {kind.distilled for kind, _ in pending}
    }
    for number, (kind, seed) in enumerate(pending, start=1):
        job.console.print(f"student {number} of {len(pending)}: {kind}, seed {seed}")
        folder = kind.folder(config.out, seed)
        images = _images(job, kind, seed)
        trainers[kind.distilled].run(folder, student_net(seed), images, seed)
    return True


def _teacher(job: Job) -> Adapted:
    """The teacher, loaded or trained, with its result written down."""
    net, folder = teacher_net(seed=0), job.config.out / "teacher"
    trainer = _trainer_of_teacher(job)
    if job.teacher is None:
        job.console.print("teacher")
        return _trained(net, trainer.run(folder, net, job.digits.train, seed=0))
    trainer.finish(folder, trainer.initial(job.teacher, seed=0), step_ms=None)
    return job.teacher


def _trainer_of_student(
    job: Job, net: Adapted, teacher: tuple[Teacher, PyTree], distilled: bool
) -> Trainer:
    config = job.config
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
    return Trainer(
        job,
        net,
        teacher,
        objective,
        learning_rate=config.learning_rate,
        steps=config.steps,
    )


def _images(job: Job, kind: Kind, seed: int) -> Images:
    """What a student of this kind and seed learns from."""
    images = job.digits.train
    if kind.few:
        images = data.hide_labels(images, job.config.labels_per_class, seed)
    return images if kind.unlabelled else data.labelled_only(images)


def _report(job: Job, seconds: float | None) -> None:
    """Prints the table, and writes everything beside the runs."""
    results = report.read(job.config.out, job.config.seeds)
    table = report.table(results, job.config)
    job.console.print(table.rich())
    for line in report.findings(results, job.config):
        job.console.print(line)
    path = report.write(job.config, job.digits, results)
    done = "" if seconds is None else f" after {seconds:.0f} s"
    job.console.print(f"Curves and pictures{done}: {path}")
