"""Objectives of language models: every position is judged by the token after it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from kdjax import losses
from kdjax.losses._labels import wide_integers
from kdjax.objectives._terms import MASK, counted, entry
from kdjax.types import (
    Batch,
    LinearHead,
    Objective,
    Outputs,
    PyTree,
    SampledTargets,
    SparseTargets,
    Term,
)


def next_token(
    objective: Objective,
    *,
    tokens: str = "tokens",
    where: str | None = MASK,
    segments: str | None = None,
) -> Objective:
    """Shifts what an objective sees, so that logits meet the tokens they predict.

    The logits of both models, or the teacher's targets, lose their last position, as
    :func:`kdjax.losses.next_token` says. The batch gets ``"label"``, the token behind
    each position, negative where none is to be predicted, and ``"mask"``, which says
    where one is. Features stay as they are: terms over them belong beside this
    objective, in :func:`~kdjax.objectives.combine`.

    Args:
      objective: of terms over logits, such as :func:`~kdjax.objectives.hard_labels` or
        :func:`~kdjax.objectives.soft_labels`.
      tokens: entry of the batch with the tokens that the student reads, ``[B, T]``.
      where: entry of the batch that says which tokens are to be predicted, bool
        ``[B, T]``, or ``[B]`` for whole rows; ``None``, or by default no ``"mask"`` in
        the batch: all. The first of a row never is.
      segments: entry of the batch that says which text of a packed row a token is of,
        ``[B, T]``; no token is predicted from another text.

    Returns:
      The same terms, averaged over the tokens that are predicted.

    Raises:
      ValueError: (when traced) an entry is missing, a model gives no logits, or shapes
        do not fit.
      TypeError: (when traced) the entry for ``where`` is not boolean.

    Example:
      >>> from kdjax.objectives import hard_labels
      >>> objective = next_token(hard_labels())
      >>> outputs, tokens = Outputs(jnp.zeros((1, 3, 4))), jnp.ones((1, 3), int)
      >>> terms, _ = objective.apply(
      ...     {}, {}, outputs, outputs, {"tokens": tokens}, jnp.array(0))
      >>> terms["hard"].mean.value().item(), terms["hard"].mean.count.item()
      (1.3862944, 2)
    """

    def labelled(batch: Batch) -> Array:
        read = wide_integers(entry(batch, tokens, "tokens"))
        predicted = counted(batch, where, read.shape, None)
        return (
            read if predicted is None else jnp.where(predicted, read, losses.UNSCORED)
        )

    def shifted(outputs: Outputs, batch: Batch) -> tuple[Outputs, Array]:
        texts = None if segments is None else entry(batch, segments, "segments")
        logits = outputs.logits
        if not isinstance(logits, LinearHead):
            logits = outputs.dense_logits()
        short, labels = losses.next_token(logits, labelled(batch), segments=texts)
        return dataclasses.replace(outputs, logits=short), labels

    def shortened(teacher: Outputs, batch: Batch) -> Outputs:
        if teacher.logits is None:
            return teacher
        if isinstance(teacher.logits, (SparseTargets, SampledTargets)):
            short = jax.tree.map(lambda leaf: leaf[:, :-1], teacher.logits)
            return dataclasses.replace(teacher, logits=short)
        return shifted(teacher, batch)[0]

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        ours, labels = shifted(student, batch)
        seen = {**batch, "label": labels, MASK: labels >= 0}
        return objective.apply(
            params, state, ours, shortened(teacher, batch), seen, step
        )

    return Objective(objective.init, objective.init_state, apply)
