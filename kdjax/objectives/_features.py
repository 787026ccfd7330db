"""Terms over features of student and teacher, picked by path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax import Array

from kdjax.objectives._combine import combine
from kdjax.objectives._terms import MASK, counted, entry, feature, settings, single
from kdjax.objectives.projectors import Projector, identity, pooled
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled

Paths: TypeAlias = str | tuple[str, ...]
"""The path of a feature, or those of several that a loss takes as a tuple."""


def features(
    loss: Callable[..., Array],
    *,
    student: Paths,
    teacher: Paths,
    name: str = "features",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
    positions: str | None = None,
    projector: Projector | None = None,
    pool: bool = False,
    **hyperparameters: Any,
) -> Objective:
    """A loss between one feature of the student and one of the teacher.

    Args:
      loss: ``loss(student_feature, teacher_feature, **hyperparameters)``; one value
        per example or position.
      student: path of the student's feature, as asked of its adapter; or a tuple of
        paths, for a loss that takes a tuple of features
        (:func:`kdjax.losses.solution_flow`).
      teacher: path of the teacher's feature, or as many paths.
      name: of the term, in metrics.
      weight: of the term.
      where: entry of the batch that says which values count.
      positions: entry of the batch that the loss gets as its own ``where``: which
        positions of a map exist, say.
      projector: from :mod:`kdjax.objectives.projectors`, trained with the student,
        one for each path; none by default.
      pool: whether the larger of two maps ``[B, H, W, C]`` is averaged down to the
        size of the smaller.
      **hyperparameters: the loss's own; each a value or a schedule.

    Returns:
      An objective of one term, with the projector's parameters.

    Raises:
      ValueError: the weight is not finite, there are not as many paths on both sides,
        or (when traced) a model does not give the feature.

    Example:
      >>> from kdjax import losses
      >>> objective = features(losses.feature_mse, student="embed", teacher="embed")
      >>> outputs = Outputs(None, {"embed": jnp.ones((2, 8))})
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, {}, jnp.array(0))
      >>> terms["features"].mean.value().item()
      0.0
    """
    several = isinstance(student, tuple)
    paths = _as_tuple(student), _as_tuple(teacher)
    if several != isinstance(teacher, tuple) or len(paths[0]) != len(paths[1]):
        raise ValueError(
            f"term {name!r}: got student={student!r} and teacher={teacher!r}; expected "
            "a path each, or tuples of as many."
        )
    chosen = identity() if projector is None else projector

    def picked(outputs: Outputs, side: int) -> list[Array]:
        who = f"term {name!r}: the {('student', 'teacher')[side]}"
        return [feature(outputs, path, who) for path in paths[side]]

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        params = {}
        pairs = zip(picked(student, 0), picked(teacher, 1), strict=True)
        for index, (ours, theirs) in enumerate(pairs):
            key = jax.random.fold_in(rng, index)
            params[str(index)] = chosen.init(key, ours.shape[-1], theirs.shape[-1])
        return {"projector": params} if jax.tree.leaves(params) else {}

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        ours, theirs = picked(student, 0), picked(teacher, 1)
        trained = params.get("projector", {})
        for index in range(len(ours)):
            if pool:
                ours[index], theirs[index] = pooled(ours[index], theirs[index])
            own = trained.get(str(index), {})
            ours[index] = chosen.apply(own, ours[index])
        own_mask = {} if positions is None else {"where": entry(batch, positions, name)}
        values = loss(
            *((tuple(ours), tuple(theirs)) if several else (ours[0], theirs[0])),
            **own_mask,
            **settings(hyperparameters, step),
        )
        return Mean.of(values, counted(batch, where, values.shape, None))

    return single(name, weight, compute, init)


def feature_pairs(
    loss: Callable[..., Array],
    pairs: Sequence[tuple[Paths, Paths]],
    *,
    name: str = "features",
    **options: Any,
) -> Objective:
    """A loss between several features of the student and several of the teacher.

    Args:
      loss: as for :func:`features`.
      pairs: paths, the student's first. Layers of a stack are paired by
        :func:`uniform_layers` or :func:`last_layers`.
      name: the terms are ``name/0``, ``name/1`` and so on, in the order of the pairs.
      **options: as for :func:`features`, the same for all pairs; each has a projector
        and the weight of its own.

    Returns:
      An objective of one term for each pair.

    Raises:
      ValueError: there is no pair, or as for :func:`features`.

    Example:
      >>> from kdjax import losses
      >>> from kdjax.objectives import uniform_layers
      >>> layers = uniform_layers(2, 6)
      >>> pairs = [(f"blocks/{ours}", f"blocks/{theirs}") for ours, theirs in layers]
      >>> pairs
      [('blocks/0', 'blocks/2'), ('blocks/1', 'blocks/5')]
      >>> objective = feature_pairs(losses.feature_cosine, pairs, weight=0.5)
    """
    if not pairs:
        raise ValueError("pairs: got none; expected at least one (student, teacher).")
    return combine(
        *(
            features(loss, student=ours, teacher=theirs, name=f"{name}/{i}", **options)
            for i, (ours, theirs) in enumerate(pairs)
        )
    )


def _as_tuple(paths: Paths) -> tuple[str, ...]:
    return paths if isinstance(paths, tuple) else (paths,)
