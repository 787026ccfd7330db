"""One training after the other: compiled once, checkpointed, continued by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import optax
from etils.epath import Path
from rich.console import Console

from experiments.jobs.cluster import agreed, is_first
from experiments.jobs.interruption import Interrupted, Sigterm
from experiments.jobs.settings import refuse
from kdjax import Adapted, Objective, Teacher, make_train_step, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.files import write_whole
from kdjax.io.input import HostBatch, Transform, batches
from kdjax.io.logs import JsonLines, ProgressBar, TensorBoard
from kdjax.train import (
    DistillState,
    Trace,
    fit,
    init_state,
    make_mesh,
    place,
    place_step,
    token_flops,
)
from kdjax.train.loop import Batches, Step
from kdjax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trainings share.

    Attributes:
      settings: what the numbers depend on; checkpoints with others are refused.
      batch_size: examples per step, over all devices.
      console: where to print.
      sigterm: notices what ``fit`` does not tell of.
      tensorboard: whether to write events for it too.
      trace_steps: how many steps of each training are recorded for a profiler.
    """

    settings: Mapping[str, Any]
    batch_size: int
    console: Console
    sigterm: Sigterm
    tensorboard: bool = False
    trace_steps: int = 0

    def __post_init__(self):
        if self.trace_steps < 0:
            refuse(self, "trace_steps", "expected a whole number of at least 0")


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a training is, and how often it is measured and saved, in steps."""

    steps: int
    evaluate_every: int
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What the report needs of a finished training.

    Attributes:
      parameters: of the network.
      scores: on what was held out.
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


def is_finished(folder: Path) -> bool:
    """Whether a training has its result."""
    return agreed(lambda: Result.read(folder) is not None)


Rollout: TypeAlias = Callable[[DistillState, PyTree, Batch], Batch]
"""``(state, frozen, batch) -> batch``."""


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


class Evaluation(Protocol):
    """How networks are measured."""

    def along_the_way(self, state: DistillState) -> dict[str, float]:
        """What a training records of itself."""
        ...

    def test(self, state: DistillState) -> dict[str, float]:
        """The scores of its end."""
        ...

    def files(self, state: DistillState) -> dict[str, bytes]:
        """What else is kept of its end, by the names of files."""
        ...


class Trainer:
    """Trains networks of one architecture with one objective, one per seed.

    Args:
      job: what all trainings share.
      net: the architecture; its arrays serve as a template.
      teacher: from ``teachers.frozen``, what it is distilled from; ``None`` if there
        is none.
      objective: what is trained for.
      optimizer: with its schedule.
      examples: some that it learns from, for their shapes.
      length: in steps.
      evaluator: measures it.
      transform: augments batches.
      rollout: changes the batch inside the step, by the state and the teacher's
        arrays; ``None`` leaves it as it is.
      tokens: of an example, for decoders, whose utilization is recorded then; ``None``
        for other networks.
    """

    def __init__(
        self,
        job: Job,
        net: Adapted,
        teacher: tuple[Teacher, PyTree] | None,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        examples: HostBatch,
        length: Length,
        evaluator: Evaluation,
        transform: Transform | None = None,
        rollout: Rollout | None = None,
        tokens: int | None = None,
    ):
        self._job = job
        self._examples = examples
        self._length = length
        self._evaluator = evaluator
        self._transform = transform
        # Without one, no term asks for the teacher's outputs, and the compiler leaves
        # its forward pass out.
        source, frozen = teacher or teachers.frozen(net)
        self._parts = (source, objective, optimizer)
        self._example_flops = tokens and tokens * token_flops(
            net.params, frozen["params"] if teacher else None
        )
        self._mesh = make_mesh()
        self._frozen = place(frozen, self._mesh)
        step = _after(rollout, make_train_step(net.model, *self._parts))
        self._step: Step
        if self._mesh.size == 1:
            self._step = jax.jit(step, donate_argnums=0)
        else:
            template = self.initial(net, seed=0)
            self._step = place_step(step, self._mesh, state=template, frozen=frozen)

    def initial(self, net: Adapted, seed: int) -> DistillState:
        """The state that a training starts from."""
        # For shapes only.
        batch: Any = next(self._batches(self._examples, seed))
        state = init_state(
            net,
            *self._parts,
            frozen=self._frozen,
            batch=batch,
            rng=jax.random.key(seed),
        )
        return place(state, self._mesh)

    def run(
        self, folder: Path, net: Adapted, examples: HostBatch, seed: int
    ) -> DistillState:
        """Trains from the newest checkpoint in the folder on, and measures the end.

        Args:
          folder: of this training alone.
          net: with the initial arrays of the seed.
          examples: what it learns from.
          seed: of the order of the batches, of augmentation and of dropout.

        Raises:
          Interrupted: a SIGTERM came; the training is saved.
        """
        times = _StepTimes()
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(
                folder / "checkpoints",
                keep=2,
                config={
                    **self._job.settings,
                    "run": folder.name,
                    "seed": seed,
                    # A position in the data is one in batches of this size.
                    "batch_size": self._batch_size(examples),
                },
            )
            writers = self._writers(folder) if is_first() else []
            for opened in (checkpoints, *writers):
                stack.callback(opened.close)
            result = fit(
                self._step,
                self.initial(net, seed),
                self._frozen,
                self._batches(examples, seed),
                steps=self._length.steps,
                evaluate=self._evaluator.along_the_way,
                evaluate_every=self._length.evaluate_every,
                checkpoints=checkpoints,
                checkpoint_every=self._length.checkpoint_every,
                writers=[*writers, times],
                trace=self._trace(folder),
                model_flops=self._example_flops
                and self._example_flops * self._batch_size(examples),
            )
        if result.interrupted:
            raise Interrupted
        self._job.sigterm.check()
        self.finish(folder, result.state, times.median())
        return result.state

    def finish(self, folder: Path, state: DistillState, step_ms: float | None) -> None:
        """Writes what is kept of the end, then the result, which ends the run."""
        if is_finished(folder):
            return
        files, scores = self._evaluator.files(state), self._evaluator.test(state)
        if not is_first():
            return
        for name, content in files.items():
            write_whole(folder / name, content)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params["student"]))
        result = Result(parameters, scores, step_ms)
        write_whole(folder / "result.json", json.dumps(dataclasses.asdict(result)))

    def stopwatch(
        self, net: Adapted, examples: HostBatch, steps: int
    ) -> Callable[[], float]:
        """A training to measure time on, of which nothing is kept.

        Args:
          net: with any arrays.
          examples: what it learns from.
          steps: how many each call of the result goes on for.

        Returns:
          A function that trains on and returns the seconds of one step. Its first
          call may compile.
        """
        state = self.initial(net, seed=0)
        source = self._batches(examples, seed=0)

        def seconds() -> float:
            nonlocal state
            started = time.perf_counter()
            for _ in range(steps):
                state, _ = self._step(state, self._frozen, next(source))
            jax.block_until_ready(state)
            return (time.perf_counter() - started) / steps

        return seconds

    def _trace(self, folder: Path) -> Trace | None:
        steps = self._job.trace_steps
        return Trace(folder / "trace", steps) if steps else None

    def _writers(self, folder: Path) -> list[JsonLines | ProgressBar | TensorBoard]:
        writers: list[JsonLines | ProgressBar | TensorBoard] = [
            JsonLines(folder / "metrics.jsonl"),
            ProgressBar(self._length.steps, console=self._job.console),
        ]
        if self._job.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard"))
        return writers

    def _batch_size(self, examples: HostBatch) -> int:
        devices, length = jax.device_count(), len(next(iter(examples.values())))
        return min(self._job.batch_size, length // devices * devices)

    def _batches(self, examples: HostBatch, seed: int) -> Batches:
        return batches(
            examples,
            batch_size=self._batch_size(examples),
            seed=seed,
            transform=self._transform,
        )


def _after(rollout: Rollout | None, step: Step) -> Step:
    """The step on the batch that a rollout makes."""
    if rollout is None:
        return step
    return lambda state, frozen, batch: step(
        state, frozen, rollout(state, frozen, batch)
    )
