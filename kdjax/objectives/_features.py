"""Terms over features of student and teacher, picked by path."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array

from kdjax.objectives._terms import MASK, counted, settings, single
from kdjax.objectives.projectors import Projector, identity, pooled
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled


def features(
    loss: Callable[..., Array],
    *,
    student: str,
    teacher: str,
    name: str = "features",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
    projector: Projector | None = None,
    pool: bool = False,
    **hyperparameters: Scheduled,
) -> Objective:
    """A loss between one feature of the student and one of the teacher.

    Args:
      loss: ``loss(student_feature, teacher_feature, **hyperparameters)``; one value
        per example or position.
      student: path of the student's feature, as asked of its adapter.
      teacher: path of the teacher's feature.
      name: of the term, in metrics.
      weight: of the term.
      where: entry of the batch that says what counts.
      projector: from :mod:`kdjax.objectives.projectors`, trained with the student;
        none by default.
      pool: whether the larger of two maps ``[B, H, W, C]`` is averaged down to the
        size of the smaller.
      **hyperparameters: the loss's own; each a number or a schedule.

    Returns:
      An objective of one term, with the projector's parameters.

    Raises:
      ValueError: the weight is not finite, or (when traced) a model does not give the
        feature.

    Example:
      >>> def squared_error(student, teacher):
      ...     return ((student - teacher) ** 2).mean(-1)
      >>> objective = features(squared_error, student="embed", teacher="embed")
      >>> outputs = Outputs(None, {"embed": jnp.ones((2, 8))})
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, {}, jnp.array(0))
      >>> terms["features"].mean.value().item()
      0.0
    """
    paths = student, teacher
    chosen = identity() if projector is None else projector

    def pair(student: Outputs, teacher: Outputs) -> tuple[Array, Array]:
        return (
            _feature(student, paths[0], f"term {name!r}: the student"),
            _feature(teacher, paths[1], f"term {name!r}: the teacher"),
        )

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        ours, theirs = pair(student, teacher)
        params = chosen.init(rng, ours.shape[-1], theirs.shape[-1])
        return {"projector": params} if jax.tree.leaves(params) else {}

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        ours, theirs = pair(student, teacher)
        if pool:
            ours, theirs = pooled(ours, theirs)
        ours = chosen.apply(params.get("projector", {}), ours)
        values = loss(ours, theirs, **settings(hyperparameters, step))
        return Mean.of(values, counted(batch, where, values.shape, None))

    return single(name, weight, compute, init)


def _feature(outputs: Outputs, path: str, who: str) -> Array:
    if path not in outputs.features:
        raise ValueError(
            f"{who} gives no feature {path!r}; it gives {sorted(outputs.features)}. "
            "Ask its adapter for it: features=[...]."
        )
    return outputs.features[path]
