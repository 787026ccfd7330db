"""The loop around a step: data, metrics, evaluation, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
from jax.experimental import multihost_utils

from kdjax.train._records import Records, Writer
from kdjax.train.profiling import Trace, traced
from kdjax.train.state import DistillState
from kdjax.types import Batch, Mean, PyTree

Step: TypeAlias = Callable[
    [DistillState, PyTree, Batch], tuple[DistillState, dict[str, Mean]]
]
"""``(state, frozen, batch) -> (state, metrics)``; may donate ``state``."""

__all__ = ["Batches", "Checkpoints", "FitResult", "Step", "Writer", "fit"]

_logger = logging.getLogger("kdjax")


class Batches(Protocol):
    """An iterator whose position can be saved, such as a Grain one."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Checkpoints(Protocol):
    """Where a run is kept; :class:`kdjax.io.checkpoints.Checkpoints` is one."""

    def save(
        self,
        step: int,
        state: DistillState,
        batches: Batches,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to save; what is passed may change as soon as this returns."""
        ...

    def restore(
        self, state: DistillState, batches: Batches
    ) -> tuple[DistillState, dict[str, Any]] | None:
        """Restores the newest state and progress, and sets the iterator back.

        ``None`` when there is nothing to restore; ``batches`` then stays as it is.
        """
        ...

    def wait(self) -> None:
        """Returns when everything is saved, or raises what went wrong."""
        ...


class FitResult(NamedTuple):
    """What a training ends with.

    Attributes:
      state: after the last step.
      step: the number of that step.
      interrupted: whether a SIGTERM ended the run before its last step.
    """

    state: DistillState
    step: int
    interrupted: bool


def fit(
    step: Step,
    state: DistillState,
    frozen: PyTree,
    batches: Batches,
    *,
    steps: int,
    evaluate: Callable[[DistillState], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 10,
    writers: Sequence[Writer] = (),
    max_skipped: int = 3,
    trace: Trace | None = None,
    model_flops: float | None = None,
) -> FitResult:
    """Trains until step ``steps``, from the newest checkpoint where there is one.

    A run that is killed and started again ends with the same arrays and the same
    records as one left alone, bit for bit. On SIGTERM the step at hand is finished
    and saved, then the function returns (in the main thread only, since no other
    can handle signals). Of several processes any one may get the signal: all save and
    return after the same step. Records are averages over the steps since the last
    record, without those that were skipped. Those of kind ``speed`` tell percentiles of
    the time of a step and of the wait for its batch, and ``input_bound``: the share of
    steps whose batch came when the device had nothing left to do.

    Args:
      step: compiled, from ``place_step`` or ``jax.jit``; it may donate the state.
      state: to start from, and the template for restoring.
      frozen: the teacher's arrays, handed to each step.
      batches: an iterator of batches whose position can be saved and set.
      steps: the number of the last step, counted over all restarts.
      evaluate: ``(state) -> scores``, called every ``evaluate_every`` steps and
        after the last one.
      evaluate_every: in steps; ``None`` evaluates at the end only.
      checkpoints: where to save and to restore from; ``None`` for neither.
      checkpoint_every: in steps; ``None`` saves at the end only.
      log_every: steps per record of kind ``train`` and ``speed``.
      writers: each gets every record, in the first process only. Before the first
        step they drop what they hold of later steps.
      max_skipped: consecutive steps without a finite loss and gradient after which
        the run stops.
      trace: steps to record for a profiler; ``None`` for none.
      model_flops: floating-point operations that the models need for a step, over all
        devices, such as ``tokens * token_flops(params, frozen["params"])``; then their
        utilization is recorded, where the devices' peak is known.

    Returns:
      The last state, its step, and whether the run was interrupted.

    Raises:
      ValueError: an interval below 1 or without its object, no batches or too few
        of them, or a state that is already beyond ``steps``.
      FloatingPointError: ``max_skipped`` steps in a row were not finite, now or in the
        run that is gone on with. The state, which such steps do not change, was saved
        before.

    Example:
      >>> from kdjax import models, objectives, teachers
      >>> from kdjax.io.input import batches
      >>> from kdjax.train.state import init_state
      >>> from kdjax.train.step import make_train_step
      >>> import optax
      >>> data = {"x": np.eye(4, dtype=np.float32), "label": np.arange(4) % 2}
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((4, 2)))
      >>> parts = (*teachers.frozen(net), objectives.hard_labels(), optax.sgd(1.0))
      >>> teacher, frozen, objective, optimizer = parts
      >>> state = init_state(net, teacher, objective, optimizer, frozen=frozen,
      ...                    batch=data, rng=jax.random.key(0))
      >>> step = jax.jit(make_train_step(net.model, teacher, objective, optimizer))
      >>> result = fit(step, state, frozen, batches(data, batch_size=2, seed=0),
      ...              steps=5)
      >>> int(result.state.step), result.interrupted
      (5, False)
    """
    _check_intervals(
        {"log_every": log_every, "max_skipped": max_skipped},
        evaluate_every=(evaluate_every, "evaluate", evaluate),
        checkpoint_every=(checkpoint_every, "checkpoints", checkpoints),
    )
    state, start, progress = _starting_point(state, batches, checkpoints, steps)
    if jax.process_index() > 0:
        writers = ()
    records = Records(writers, progress, log_every, steps, max_skipped, model_flops)
    if records.failure:
        raise FloatingPointError(records.failure)
    records.rewind(start)
    saver = _Saver(checkpoints, batches, records, start)
    stopped = False
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(_Interruption())
        stack.callback(saver.wait)
        numbers = traced(range(start + 1, steps + 1), trace, records.drain)
        for n in stack.enter_context(contextlib.closing(numbers)):
            batch = records.next_batch(batches)
            if batch is None:
                saver.save(n - 1, state)
                raise _too_few_batches(n - 1, start, steps)
            state, metrics = step(state, frozen, batch)
            # Each process has its own part of the batch.
            examples = len(jax.tree.leaves(batch)[0]) * jax.process_count()
            records.add(n, metrics, examples)
            scores = None
            if evaluate is not None and _due(n, evaluate_every, steps):
                records.drain()
                scores = evaluate(state)
                records.write(n, scores, "eval")
            stopped = n < steps and interruption.reached()
            if stopped or records.failure or _due(n, checkpoint_every, steps):
                # Fetching the last metrics, saving may discover a failure itself.
                saver.save(n, state, scores)
            if records.failure:
                raise FloatingPointError(records.failure)
            if stopped:
                _logger.info("SIGTERM: saved step %d and stopped", n)
                return FitResult(state, n, interrupted=True)
    return FitResult(state, steps, interrupted=False)


def _starting_point(
    state: DistillState,
    batches: Batches,
    checkpoints: Checkpoints | None,
    steps: int,
) -> tuple[DistillState, int, dict[str, Any]]:
    """The state to go on from, its step, and what else the checkpoint held."""
    restored = None if checkpoints is None else checkpoints.restore(state, batches)
    progress: dict[str, Any] = {}
    if restored is not None:
        state, progress = restored
    start = int(state.step)
    if restored is not None:
        _logger.info("restored step %d; going on from there to %d", start, steps)
    if start > steps:
        raise ValueError(
            f"steps: got {steps}, but the state is at step {start} already; expected "
            f"at least {start}. To train anew, start with another checkpoint folder."
        )
    return state, start, progress


def _check_intervals(
    positive: Mapping[str, int], **optional: tuple[int | None, str, object]
) -> None:
    for name, (every, needed, given) in optional.items():
        if every is not None:
            if given is None:
                raise ValueError(
                    f"{name}: got {every} without {needed}; pass {needed} too."
                )
            positive = {**positive, name: every}
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}; expected at least 1.")


def _due(n: int, every: int | None, steps: int) -> bool:
    return n == steps or (every is not None and n % every == 0)


def _too_few_batches(n: int, start: int, steps: int) -> ValueError:
    if n == start:
        return ValueError(
            f"batches: gave no batch at all, at step {start} of {steps}; expected an "
            "iterator with some left. Is the data set empty or the iterator used up?"
        )
    return ValueError(
        f"batches: ended after {n - start} steps, at step {n}; expected "
        f"{steps - start} to reach steps={steps}. Repeat the data (epochs=None) or "
        "lower steps."
    )


class _Saver:
    """Saves each step at most once, with its records before it."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        batches: Batches,
        records: Records,
        start: int,
    ):
        self._checkpoints = checkpoints
        self._batches = batches
        self._records = records
        self._last = start

    def save(
        self, n: int, state: DistillState, scores: Mapping[str, float] | None = None
    ) -> None:
        """Saves step ``n`` and what a resumed run has to know of the steps before."""
        self._records.drain()
        if self._checkpoints is None or n == self._last:
            return
        # A resumed run does not repeat the steps before its checkpoint: their
        # records must be safe first.
        self._records.flush()
        self._checkpoints.save(
            n, state, self._batches, self._records.progress(), scores
        )
        self._last = n

    def wait(self) -> None:
        """Returns when records and checkpoints are safe."""
        self._records.flush()
        if self._checkpoints is not None:
            self._checkpoints.wait()


class _Interruption:
    """Listens for SIGTERM, which schedulers send some time before they kill.

    With several processes it is JAX's preemption service that listens, and that
    agrees on one step for all of them to stop at.
    """

    # The service knows of one agreement only, while a job may train many times: it is
    # told how many steps there have been in this process, which all count alike.
    _asked = itertools.count(1)

    def __enter__(self) -> _Interruption:
        self._requested = False
        self._listens = (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        )
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            # None stands for a handler that was not set from Python.
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def reached(self) -> bool:
        """Whether to stop now; to be asked once after every step."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(next(self._asked))

    def _request(self, signum: int, frame: object) -> None:
        del signum, frame
        self._requested = True
