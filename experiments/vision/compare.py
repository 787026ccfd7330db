"""The same distillation by kdjax and by PyTorch: same weights, same batches.

    python -m experiments.vision --methods kd --out runs/vision
    python -m experiments.vision.compare --torch ~/torch/bin/python --run runs/vision

It reads the teacher of a finished job, and trains students by plain distillation on
both sides. The README beside this file says what came out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict

from experiments.jobs.evaluation import Evaluator
from experiments.jobs.processes import asked
from experiments.vision.methods import objective
from experiments.vision.methods.logits import HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE
from experiments.vision.preparation import (
    Prepared,
    learnt_from,
    of_finished,
    setup_of,
)
from kdjax import Adapted, make_train_step, teachers
from kdjax.io.input import HostBatch, batches
from kdjax.tools.report import mean_and_spread
from kdjax.train import init_state


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared."""

    torch: Path
    """A Python that has torch and NumPy, such as ~/torch/bin/python."""
    run: Path = Path("runs/vision")
    """Folder of a finished job with the networks cnn and cnn_large."""
    data_dir: Path | None = None
    """Where its images are; None looks for Fashion-MNIST."""
    seeds: int = 5
    """Students of either side."""
    threads: int | None = None
    """Of PyTorch; as many as there are cores by default. On a machine with other work
    beside, its threads wait for each other, and fewer are faster."""

    def __post_init__(self):
        if not self.torch.expanduser().is_file():
            raise ValueError(f"--torch: {self.torch} is no file; expected a Python.")
        if not (self.run / "settings.json").is_file():
            raise ValueError(
                f"--run: found no settings.json in {self.run}; expected the folder of "
                "a job, `python -m experiments.vision --out` that folder."
            )
        for name in ("seeds", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name}: got {number}; expected at least 1.")


class Answer(NamedTuple):
    """Of one training: accuracy on the test part, and seconds of a step."""

    accuracy: float
    seconds: float


class Side(NamedTuple):
    """What both sides train with."""

    prepared: Prepared
    teacher: Adapted
    steps: int

    def batches(self, seed: int) -> Iterator[HostBatch]:
        """All batches of a student."""
        config = self.prepared.config
        images = learnt_from(config, self.prepared.images, seed)
        source = batches(
            images,
            batch_size=config.batch_size,
            seed=seed,
            transform=config.augmentation(of_student=True),
        )
        return itertools.islice(source, self.steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Comparison, args=arguments, description=__doc__)
    try:
        side = _side(options)
    except (ValueError, OSError) as error:
        print(f"Refused: {error}", file=sys.stderr)
        return 2
    ours, theirs = [], []
    train = _with_kdjax(side)
    with tempfile.TemporaryDirectory() as folder:
        _write_shared(side, Path(folder))
        threads = options.threads or len(os.sched_getaffinity(0))
        module = "experiments.vision.torch_kd"
        with asked(options.torch, module, folder=folder, threads=threads) as ask:
            for seed in range(options.seeds):
                path = Path(folder) / f"seed-{seed}.npz"
                given = list(side.batches(seed))
                _write_student(side, path, seed, given)
                ours.append(train(seed, given))
                theirs.append(Answer(*ask(seed)))
                path.unlink()
                print(
                    f"seed {seed}: kdjax {ours[-1]}, PyTorch {theirs[-1]}", flush=True
                )
    for name, answers in (("kdjax", ours), ("PyTorch", theirs)):
        accuracy = mean_and_spread([a.accuracy for a in answers], digits=2, scale=100)
        times = mean_and_spread([a.seconds for a in answers], digits=2, scale=1e3)
        print(f"{name}: test accuracy {accuracy} %, {times} ms per step")
    ratios = [
        mine.seconds / other.seconds for mine, other in zip(ours, theirs, strict=True)
    ]
    print(f"time per step, kdjax / PyTorch: {np.median(ratios):.2f}")
    return 0


def _side(options: Comparison) -> Side:
    """The settings, images and teacher of the finished job."""
    prepared = of_finished(options.run, options.data_dir)
    config = prepared.config
    networks = {config.student, config.teacher_model}
    if (
        not networks <= {"cnn", "cnn_large"}
        or config.optimizer != "sgd"
        or config.mixup
    ):
        raise ValueError(
            f"--run: got {config.student}, {config.teacher_model}, {config.optimizer} "
            f"and mixup {config.mixup}; expected cnn or cnn_large for both, sgd and 0."
        )
    assert prepared.teacher is not None
    return Side(prepared, prepared.teacher, setup_of(prepared, None).steps)


def _with_kdjax(side: Side) -> Callable[[int, Sequence[HostBatch]], Answer]:
    """A function that trains the student of a seed."""
    prepared, config = side.prepared, side.prepared.config
    teacher, frozen = teachers.frozen(side.teacher)
    net = prepared.network(config.student, seed=0).adapted
    parts = (
        teacher,
        objective("kd", setup_of(prepared, None)),
        config.optimizer_for(config.learning_rate, side.steps),
    )
    step = jax.jit(make_train_step(net.model, *parts), donate_argnums=0)
    evaluator = Evaluator(
        net.model, prepared.images.parts, prepared.images.classes, None
    )

    def train(seed: int, given: Sequence[HostBatch]) -> Answer:
        def start():
            student = prepared.network(config.student, seed).adapted
            key = jax.random.key(seed)
            shapes: Any = given[0]
            return init_state(student, *parts, frozen=frozen, batch=shapes, rng=key)

        jax.block_until_ready(step(start(), frozen, given[0]))  # compiles
        state = start()
        started = time.perf_counter()
        for batch in given:
            state, _ = step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - started) / len(given)
        return Answer(evaluator.test(state)["student_accuracy"], seconds)

    return train


def _arrays(net: Adapted) -> dict[str, Any]:
    """Parameters and statistics by path, such as ``stages/0/0/conv/kernel``."""
    joined = flatten_dict(net.params) | flatten_dict(net.model_state)
    return {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in joined.items()}


def _write_shared(side: Side, folder: Path) -> None:
    config, images = side.prepared.config, side.prepared.images
    mean, deviation = side.prepared.statistics
    settings = {
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "temperature": TEMPERATURE,
        "hard_weight": HARD_WEIGHT,
        "soft_weight": SOFT_WEIGHT,
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    np.savez(folder / "teacher.npz", **_arrays(side.teacher))
    test: dict[str, Any] = images.parts.test
    np.savez(folder / "test.npz", **test)


def _write_student(
    side: Side, path: Path, seed: int, given: Sequence[HostBatch]
) -> None:
    student = side.prepared.network(side.prepared.config.student, seed).adapted
    stacked: dict[str, Any] = {
        name: np.stack([b[name] for b in given]) for name in ("x", "label")
    }
    np.savez(path, **(_arrays(student) | stacked))


if __name__ == "__main__":
    sys.exit(main())
