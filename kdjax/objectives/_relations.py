"""Terms over how the examples of a batch relate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.objectives._terms import MASK, counted, feature, settings, single
from kdjax.objectives._whole_batch import over_whole_batch
from kdjax.objectives.projectors import Projector, identity
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled


def relations(
    loss: Callable[..., Array],
    *,
    student: str | None = None,
    teacher: str | None = None,
    name: str = "relations",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
    projector: Projector | None = None,
    pool: bool = False,
    **hyperparameters: Any,
) -> Objective:
    """A loss that relates the examples of a batch to each other.

    Such a loss takes the mask itself (:func:`kdjax.losses.relational_distance`,
    say). It sees the batch of all devices, under ``jit`` on a mesh, ``shard_map`` and
    ``pmap`` alike; under accumulation it sees one micro-batch at a time.

    Args:
      loss: ``loss(student, teacher, where=mask, **hyperparameters)``; all values it
        returns count.
      student: path of the student's feature, as asked of its adapter; ``None`` takes
        its logits.
      teacher: path of the teacher's feature, or ``None``, likewise.
      name: of the term, in metrics.
      weight: of the term.
      where: entry of the batch, boolean ``[B]``, that says which examples count.
      projector: of the student's feature, from :mod:`kdjax.objectives.projectors`;
        none by default.
      pool: whether both are averaged over all axes but the first and the last, which
        makes one vector ``[B, C]`` of a map or of tokens.
      **hyperparameters: the loss's own; each a value or a schedule.

    Returns:
      An objective of one term, with the projector's parameters.

    Raises:
      ValueError: the weight is not finite, or (when traced) the loss refuses its
        arguments, or an entry or a feature is missing.

    Example:
      >>> from kdjax import losses
      >>> objective = relations(losses.similarity_preserving, student="embed",
      ...                       teacher="embed", weight=3000.0)
      >>> outputs = Outputs(None, {"embed": jnp.eye(3)})
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, {}, jnp.array(0))
      >>> terms["relations"].mean.value().item()
      0.0
    """
    paths = student, teacher
    chosen = identity() if projector is None else projector

    def both(student: Outputs, teacher: Outputs) -> tuple[Array, Array]:
        return (
            embedding(student, paths[0], f"term {name!r}: the student", pool),
            embedding(teacher, paths[1], f"term {name!r}: the teacher", pool),
        )

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        ours, theirs = jax.eval_shape(both, student, teacher)
        params = chosen.init(rng, ours.shape[-1], theirs.shape[-1])
        return {"projector": params} if jax.tree.leaves(params) else {}

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        ours, theirs = both(student, teacher)
        numbers = settings(hyperparameters, step)
        return over_whole_batch(
            lambda ours, theirs, mask: loss(ours, theirs, where=mask, **numbers),
            chosen.apply(params.get("projector", {}), ours),
            theirs,
            counted(batch, where, ours.shape[:1], None),
        )

    return single(name, weight, compute, init)


def embedding(outputs: Outputs, path: str | None, who: str, pool: bool) -> Array:
    """A feature, or the logits without a path, if asked for as one vector each."""
    found = outputs.dense_logits() if path is None else feature(outputs, path, who)
    return jnp.mean(found, range(1, found.ndim - 1)) if pool else found
