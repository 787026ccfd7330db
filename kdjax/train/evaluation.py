"""Student and teacher side by side, on as many batches as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import metrics
from kdjax.metrics import Calibration
from kdjax.train.state import DistillState
from kdjax.types import Batch, Mean, Model, PyTree, Teacher

Sums: TypeAlias = dict[str, Mean | Calibration]


def make_eval_step(
    student: Model,
    teacher: Teacher,
    *,
    labels: str = "label",
    where: str = "mask",
) -> Callable[[DistillState, PyTree, Batch], Sums]:
    """Makes the pure function that measures both models on one batch.

    Args:
      student: as trained; runs in evaluation mode.
      teacher: as given to the training step.
      labels: entry of the batch with integer labels; may be absent from it.
      where: entry of the batch that says which examples, or which tokens of them,
        count; may be absent.

    Returns:
      ``eval_step(state, frozen, batch)`` to the sums of
      :func:`kdjax.metrics.side_by_side`. Jit it.
    """

    def eval_step(state: DistillState, frozen: PyTree, batch: Batch) -> Sums:
        shown, _ = student.apply(
            state.params["student"], state.model_state, batch, rng=None, train=False
        )
        target = teacher.outputs(frozen, state.teacher_state, batch)
        logits, mask = shown.dense_logits(), batch.get(where)
        if mask is not None and mask.shape == logits.shape[: mask.ndim]:
            # An example counts with all its tokens. Other shapes are refused below.
            mask = jnp.broadcast_to(
                mask.reshape(mask.shape + (1,) * (logits.ndim - 1 - mask.ndim)),
                logits.shape[:-1],
            )
        return metrics.side_by_side(
            logits, target.dense_logits(), batch.get(labels), where=mask
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
