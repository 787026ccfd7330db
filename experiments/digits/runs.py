"""One training after the other: compiled once, checkpointed, continued by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from experiments.digits.config import Config
from experiments.digits.data import CLASSES, Digits, Images
from experiments.digits.interruption import Interrupted, Sigterm
from kdjax import Adapted, Model, Objective, Teacher, make_train_step, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import Transform, batches, padded_batches
from kdjax.io.logs import JsonLines, ProgressBar, TensorBoard
from kdjax.tools.report import write_whole
from kdjax.train import (
    DistillState,
    evaluate,
    fit,
    init_state,
    make_eval_step,
    make_mesh,
    place,
    place_step,
)
from kdjax.train.evaluation import Sums
from kdjax.train.loop import Step
from kdjax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trainings share.

    Attributes:
      config: the command line.
      settings: what the numbers depend on; checkpoints with others are refused.
      digits: the data.
      console: where to print.
      sigterm: notices what ``fit`` does not tell of.
      teacher: from an earlier run, ``None`` if it is trained here.
    """

    config: Config
    settings: Mapping[str, Any]
    digits: Digits
    console: Console
    sigterm: Sigterm
    teacher: Adapted | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What the report needs of a finished training.

    Attributes:
      parameters: of the network.
      scores: on the test part.
      step_ms: median time of a step in milliseconds; ``None`` if too few were seen
        since the training was started again.
    """

    parameters: int
    scores: dict[str, float]
    step_ms: float | None

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result in a run's folder, ``None`` while it is unfinished."""
        path = folder / "result.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None


class _StepTimes:
    """A writer that keeps what the records say of the time of a step."""

    def __init__(self) -> None:
        self._medians: list[float] = []

    def median(self) -> float | None:
        return statistics.median(self._medians) if self._medians else None

    def write(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
        if kind == "speed":
            self._medians.append(scalars["step_ms_p50"])

    def rewind(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass


@functools.lru_cache
def _compiled_eval_step(student: Model, teacher: Teacher) -> Callable[..., Sums]:
    """One program for all trainers of the same student and teacher."""
    return jax.jit(make_eval_step(student, teacher))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, state: DistillState, batch: Batch) -> jax.Array:
    outputs, _ = model.apply(
        state.params["student"], state.model_state, batch, rng=None, train=False
    )
    return outputs.dense_logits()


class Trainer:
    """Trains networks of one architecture with one objective, one per seed.

    Args:
      job: what all trainings share.
      net: the architecture; its arrays serve as a template.
      teacher: from ``teachers.frozen``, what it is distilled from or compared with;
        ``None`` if there is none.
      objective: what is trained for.
      learning_rate: the peak.
      steps: optimizer steps.
      transform: augments batches.
    """

    def __init__(
        self,
        job: Job,
        net: Adapted,
        teacher: tuple[Teacher, PyTree] | None,
        objective: Objective,
        *,
        learning_rate: float,
        steps: int,
        transform: Transform | None = None,
    ):
        self._job = job
        self._steps = steps
        self._transform = transform
        self._has_teacher = teacher is not None
        # Without one, no term asks for the teacher's outputs, and the compiler leaves
        # its forward pass out.
        source, frozen = teacher or teachers.frozen(net)
        optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))
        self._parts = (source, objective, optimizer)
        self._mesh = make_mesh()
        self._frozen = place(frozen, self._mesh)
        step = make_train_step(net.model, *self._parts)
        self._step: Step
        if self._mesh.size == 1:
            self._step = jax.jit(step, donate_argnums=0)
        else:
            template = self.initial(net, seed=0)
            self._step = place_step(step, self._mesh, state=template, frozen=frozen)
        self._eval_step = _compiled_eval_step(net.model, source)
        self._model = net.model

    def initial(self, net: Adapted, seed: int) -> DistillState:
        """The state that a training starts from."""
        batch: Any = {
            name: array[: self._job.config.batch_size]
            for name, array in self._job.digits.train.items()
        }
        state = init_state(
            net,
            *self._parts,
            frozen=self._frozen,
            batch=batch,
            rng=jax.random.key(seed),
        )
        return place(state, self._mesh)

    def run(
        self, folder: Path, net: Adapted, images: Images, seed: int
    ) -> DistillState:
        """Trains from the newest checkpoint in the folder on, and measures the end.

        Args:
          folder: of this training alone.
          net: with the initial arrays of the seed.
          images: what it learns from.
          seed: of the order of the batches, of augmentation and of dropout.

        Raises:
          Interrupted: a SIGTERM came; the training is saved.
        """
        config = self._job.config
        devices = jax.device_count()
        source = batches(
            images,
            batch_size=min(config.batch_size, len(images["x"]) // devices * devices),
            seed=seed,
            transform=self._transform,
            num_classes=CLASSES,
        )
        times = _StepTimes()
        validation = self._evaluation(self._job.digits.validation)
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(
                folder / "checkpoints",
                keep=2,
                config={**self._job.settings, "run": folder.name, "seed": seed},
            )
            writers: list[JsonLines | ProgressBar | TensorBoard] = [
                JsonLines(folder / "metrics.jsonl"),
                ProgressBar(self._steps, console=self._job.console),
            ]
            if config.tensorboard:
                writers.append(TensorBoard(folder / "tensorboard"))
            for opened in (checkpoints, *writers):
                stack.callback(opened.close)
            result = fit(
                self._step,
                self.initial(net, seed),
                self._frozen,
                source,
                steps=self._steps,
                evaluate=lambda state: self.measure(state, validation),
                evaluate_every=config.evaluate_every,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint_every,
                writers=[*writers, times],
            )
        if result.interrupted:
            raise Interrupted
        self._job.sigterm.check()
        self.finish(folder, result.state, times.median())
        return result.state

    def measure(self, state: DistillState, parts: list[Batch]) -> dict[str, float]:
        """Student and teacher side by side; without a teacher the student alone."""
        if self._has_teacher:
            return evaluate(self._eval_step, state, self._frozen, parts)
        itself = {"params": state.params["student"], "model_state": state.model_state}
        scores = evaluate(self._eval_step, state, itself, parts)
        return {
            name: value for name, value in scores.items() if name.startswith("student_")
        }

    def finish(self, folder: Path, state: DistillState, step_ms: float | None) -> None:
        """Writes the logits of the test part, then the result, which ends the run."""
        if Result.read(folder) is not None:
            return
        test = self._evaluation(self._job.digits.test)
        logits = np.asarray(_logits(self._model, state, test[0]))
        buffer = io.BytesIO()
        np.save(buffer, logits[: len(self._job.digits.test["x"])])
        write_whole(folder / "test_logits.npy", buffer.getvalue())
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params["student"]))
        result = Result(parameters, self.measure(state, test), step_ms)
        write_whole(folder / "result.json", json.dumps(dataclasses.asdict(result)))

    def _evaluation(self, images: Images) -> list[Batch]:
        """One batch, of the same shape for validation and test: one program."""
        digits = self._job.digits
        size = max(len(digits.validation["x"]), len(digits.test["x"]))
        whole = padded_batches(images, batch_size=size, num_classes=CLASSES)
        return [place(batch, self._mesh) for batch in whole]
