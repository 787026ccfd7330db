"""Student and teacher side by side, on as many batches as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import numpy as np

from kdjax import metrics
from kdjax.metrics import Calibration
from kdjax.objectives._terms import MASK, counted, entry
from kdjax.train.state import DistillState
from kdjax.types import Batch, Mean, Model, PyTree, Teacher

Sums: TypeAlias = dict[str, Mean | Calibration]

_LABELS = "label"


def make_eval_step(
    student: Model,
    teacher: Teacher,
    *,
    labels: str = _LABELS,
    where: str = MASK,
) -> Callable[[DistillState, PyTree, Batch], Sums]:
    """Makes the pure function that measures both models on one batch.

    Args:
      student: as trained; runs in evaluation mode.
      teacher: as given to the training step.
      labels: entry of the batch with integer labels; the usual one may be absent.
      where: entry of the batch that says which examples, or which tokens of them,
        count; the usual one may be absent.

    Returns:
      ``eval_step(state, frozen, batch)`` to the sums of
      :func:`kdjax.metrics.side_by_side`. Jit it.

    Raises:
      ValueError: (when traced) an entry of another name is not in the batch, or the
        mask's shape is not that of the examples or tokens.
      TypeError: (when traced) the mask is not boolean.
    """

    def eval_step(state: DistillState, frozen: PyTree, batch: Batch) -> Sums:
        shown, _ = student.apply(
            state.params["student"], state.model_state, batch, rng=None, train=False
        )
        target = teacher.outputs(frozen, state.teacher_state, batch)
        logits = shown.dense_logits()
        absent = labels == _LABELS and labels not in batch
        return metrics.side_by_side(
            logits,
            target.dense_logits(),
            None if absent else entry(batch, labels, "labels"),
            # An example counts with all its tokens.
            where=counted(batch, where, logits.shape[:-1], None),
        )

    return eval_step


def evaluate(
    eval_step: Callable[[DistillState, PyTree, Batch], Sums],
    state: DistillState,
    frozen: PyTree,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Adds the sums of all batches and divides once.

    Args:
      eval_step: from :func:`make_eval_step`, jitted.
      state: of the training.
      frozen: the teacher's arrays.
      batches: one pass over the examples, such as
        :func:`kdjax.io.input.padded_batches`; of several processes each passes them
        through :func:`kdjax.train.place_batch`, and all get the same averages.

    Returns:
      The averages by name, exact whatever the sizes of the batches.

    Raises:
      ValueError: there is no batch, or of several processes each has its own.
    """
    measured = [eval_step(state, frozen, _shared(batch)) for batch in batches]
    if not measured:
        raise ValueError("batches: got none; there is nothing to evaluate.")
    # In float64 on the host, where a long evaluation loses nothing.
    hosted = jax.tree.map(np.float64, jax.device_get(measured))
    first, *rest = hosted
    for sums in rest:
        first = {name: first[name] + sums[name] for name in first}
    return {name: float(sums.value()) for name, sums in first.items()}


def _shared(batch: Batch) -> Batch:
    """The batch, refused where processes would take their own parts for the whole."""
    if jax.process_count() > 1:
        alone = [
            name
            for name, array in batch.items()
            if not isinstance(array, jax.Array) or array.is_fully_addressable
        ]
        if alone:
            raise ValueError(
                f"batches: got {alone} of this process alone; expected batches of all "
                f"{jax.process_count()}, from kdjax.train.place_batch(batch, mesh)."
            )
    return batch
