"""What a student is trained for: named terms with weights, added up.

Every factory makes an :class:`~kdjax.types.Objective` of one term; :func:`combine`
joins them. A weight or hyper-parameter is a number or a schedule of the optimizer
step. Terms average over the examples or tokens that count, whatever the batch,
micro-batch or device they are in.

A batch may hold ``"mask"``, boolean, one entry per example ``[B]`` or per value of
the loss; what is false counts nowhere. ``where=`` names another entry, or ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdjax import losses
from kdjax.types import (
    Batch,
    Mean,
    Objective,
    Outputs,
    PyTree,
    Scheduled,
    Term,
)

_MASK = "mask"

Compute = Callable[[Outputs, Outputs, Batch, Array], Mean]


def hard_labels(
    *,
    name: str = "hard",
    weight: Scheduled = 1.0,
    labels: str = "label",
    label_smoothing: Scheduled = 0.0,
    where: str | None = _MASK,
) -> Objective:
    """Cross-entropy against the labels of the batch.

    Args:
      name: of the term, in metrics.
      weight: of the term.
      labels: entry of the batch, integers ``[...]``; negative ones do not count.
      label_smoothing: in [0, 1]; see :func:`kdjax.losses.cross_entropy`.
      where: entry of the batch that says what counts.

    Returns:
      An objective of one term.

    Raises:
      ValueError: the weight is not finite, or (when traced) an entry is missing.

    Example:
      >>> outputs = Outputs(jnp.zeros((2, 4)))
      >>> batch = {"label": jnp.array([3, -100])}
      >>> terms, _ = hard_labels().apply({}, {}, outputs, outputs, batch, jnp.array(0))
      >>> terms["hard"].mean.value().item(), terms["hard"].mean.count.item()
      (1.3862944, 1)
    """

    def compute(student: Outputs, teacher: Outputs, batch: Batch, step: Array) -> Mean:
        truth = _entry(batch, labels, "labels")
        values = losses.cross_entropy(
            student.dense_logits(),
            truth,
            label_smoothing=_now(label_smoothing, step),
        )
        return Mean.of(values, _counted(batch, where, values.shape, truth))

    return _single(name, weight, compute)


def soft_labels(
    loss: Callable[..., Array] = losses.forward_kl,
    *,
    name: str = "soft",
    weight: Scheduled = 1.0,
    labels: str | None = None,
    where: str | None = _MASK,
    **hyperparameters: Scheduled,
) -> Objective:
    """Any loss of :mod:`kdjax.losses` between the logits of student and teacher.

    Args:
      loss: ``loss(student_logits, teacher_logits, **hyperparameters)``, or with the
        labels third; one value per example or token.
      name: of the term, in metrics.
      weight: of the term.
      labels: entry of the batch for losses that take labels
        (:func:`kdjax.losses.decoupled_kd`, say); then negative labels do not count.
      where: entry of the batch that says what counts.
      **hyperparameters: the loss's own, such as ``temperature=4.0``; each a number or
        a schedule.

    Returns:
      An objective of one term.

    Raises:
      ValueError: the weight is not finite, or (when traced) the loss refuses its
        arguments, or an entry is missing.

    Example:
      >>> objective = soft_labels(losses.reverse_kl, temperature=2.0, weight=0.5)
      >>> outputs, batch = Outputs(jnp.zeros((2, 4))), {"x": jnp.zeros(2)}
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, batch, jnp.array(0))
      >>> terms["soft"].mean.value().item()
      0.0
    """

    def compute(student: Outputs, teacher: Outputs, batch: Batch, step: Array) -> Mean:
        truth = None if labels is None else _entry(batch, labels, "labels")
        values = loss(
            student.dense_logits(),
            teacher.dense_logits(),
            *(() if truth is None else (truth,)),
            **_settings(hyperparameters, step),
        )
        return Mean.of(values, _counted(batch, where, values.shape, truth))

    return _single(name, weight, compute)


def relations(
    loss: Callable[..., Array],
    *,
    name: str = "relations",
    weight: Scheduled = 1.0,
    where: str | None = _MASK,
    **hyperparameters: Scheduled,
) -> Objective:
    """A loss between logits that relates the examples of a batch to each other.

    Such a loss takes the mask itself (:func:`kdjax.losses.intra_class_relation`,
    say). Under accumulation it sees one micro-batch at a time.

    Args:
      loss: ``loss(student_logits, teacher_logits, where=mask, **hyperparameters)``;
        all values it returns count.
      name: of the term, in metrics.
      weight: of the term.
      where: entry of the batch, boolean ``[B]``, that says which examples count.
      **hyperparameters: the loss's own; each a number or a schedule.

    Returns:
      An objective of one term.

    Raises:
      ValueError: the weight is not finite, or (when traced) the loss refuses its
        arguments, or an entry is missing.

    Example:
      >>> objective = relations(losses.intra_class_relation, temperature=4.0)
      >>> outputs, batch = Outputs(jnp.eye(3)), {"x": jnp.zeros(3)}
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, batch, jnp.array(0))
      >>> terms["relations"].mean.count.item()
      3
    """

    def compute(student: Outputs, teacher: Outputs, batch: Batch, step: Array) -> Mean:
        student_logits = student.dense_logits()
        values = loss(
            student_logits,
            teacher.dense_logits(),
            where=_counted(batch, where, student_logits.shape[:1], None),
            **_settings(hyperparameters, step),
        )
        return Mean.of(values)

    return _single(name, weight, compute)


def features(
    loss: Callable[..., Array],
    *,
    student: str,
    teacher: str,
    name: str = "features",
    weight: Scheduled = 1.0,
    where: str | None = _MASK,
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
      **hyperparameters: the loss's own; each a number or a schedule.

    Returns:
      An objective of one term.

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

    def compute(student: Outputs, teacher: Outputs, batch: Batch, step: Array) -> Mean:
        values = loss(
            _feature(student, paths[0], f"term {name!r}: the student"),
            _feature(teacher, paths[1], f"term {name!r}: the teacher"),
            **_settings(hyperparameters, step),
        )
        return Mean.of(values, _counted(batch, where, values.shape, None))

    return _single(name, weight, compute)


def monitor(
    measure: Callable[..., Mean],
    *,
    name: str,
    where: str | None = _MASK,
) -> Objective:
    """A diagnostic of every step: reported with the terms, and never differentiated.

    Args:
      measure: ``measure(student_logits, teacher_logits, where=mask)``, such as
        :func:`kdjax.metrics.agreement`.
      name: of the term, in metrics.
      where: entry of the batch that says what counts.

    Returns:
      An objective of one term of weight 0.

    Example:
      >>> from kdjax import metrics
      >>> objective = monitor(metrics.agreement, name="agreement")
      >>> outputs = Outputs(jnp.eye(3))
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, {}, jnp.array(0))
      >>> terms["agreement"].weight, terms["agreement"].mean.value().item()
      (0, 1.0)
    """

    def compute(student: Outputs, teacher: Outputs, batch: Batch, step: Array) -> Mean:
        logits = student.dense_logits()
        mask = _counted(batch, where, logits.shape[:-1], None)
        return measure(logits, teacher.dense_logits(), where=mask)

    return _single(name, 0, compute)


def combine(*objectives: Objective) -> Objective:
    """Adds objectives up; every term keeps its name and weight.

    Args:
      *objectives: at least one.

    Returns:
      One objective with all their terms.

    Raises:
      ValueError: there are none, or (when traced) two terms have one name.

    Example:
      >>> objective = combine(
      ...     hard_labels(weight=0.1), soft_labels(weight=0.9, temperature=4.0))
      >>> outputs, batch = Outputs(jnp.zeros((1, 2))), {"label": jnp.array([0])}
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, batch, jnp.array(0))
      >>> sorted(terms)
      ['hard', 'soft']
    """
    if not objectives:
        raise ValueError("objectives: got none, expected at least one.")
    keys = [str(index) for index in range(len(objectives))]

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        params = {
            key: objective.init(jax.random.fold_in(rng, int(key)), student, teacher)
            for key, objective in zip(keys, objectives, strict=True)
        }
        return {key: own for key, own in params.items() if jax.tree.leaves(own)}

    def init_state() -> PyTree:
        states = {
            key: objective.init_state()
            for key, objective in zip(keys, objectives, strict=True)
        }
        return {key: own for key, own in states.items() if jax.tree.leaves(own)}

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        terms: dict[str, Term] = {}
        states = {}
        for key, objective in zip(keys, objectives, strict=True):
            own, changed = objective.apply(
                params.get(key, {}), state.get(key, {}), student, teacher, batch, step
            )
            twice = sorted(set(own) & set(terms))
            if twice:
                raise ValueError(
                    f"name: {twice} is the name of several terms; give each its own."
                )
            terms |= own
            if jax.tree.leaves(changed):
                states[key] = changed
        return terms, states

    return Objective(init, init_state, apply)


def _single(name: str, weight: Scheduled, compute: Compute) -> Objective:
    if isinstance(weight, (int, float)) and not np.isfinite(weight):
        raise ValueError(f"weight of {name!r}: got {weight}, expected a finite number.")

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        mean = compute(student, teacher, batch, step)
        return {name: Term(_now(weight, step), mean)}, state

    return Objective(lambda *specs: {}, dict, apply)


def _now(number: Scheduled, step: Array) -> Any:
    """A number as it is, a schedule at this step."""
    return number(step) if callable(number) else number


def _settings(numbers: Mapping[str, Scheduled], step: Array) -> dict[str, Any]:
    return {name: _now(number, step) for name, number in numbers.items()}


def _entry(batch: Batch, name: str, argument: str) -> Array:
    if name not in batch:
        raise ValueError(
            f"{argument}: got {name!r}, which the batch does not have; it has "
            f"{sorted(batch)}."
        )
    return batch[name]


def _counted(
    batch: Batch, name: str | None, shape: tuple[int, ...], labels: Array | None
) -> Array | None:
    """What counts among values of a shape: the mask of the batch, and the labels'."""
    # The usual mask may be absent; one that was asked for by another name may not.
    absent = name is None or (name == _MASK and _MASK not in batch)
    scored = None if labels is None else labels >= 0
    if absent:
        return scored
    mask = _entry(batch, str(name), "where")
    if mask.dtype != bool:
        raise TypeError(
            f"where: {name!r} of the batch has dtype {mask.dtype}; expected bool (True "
            "counts)."
        )
    if not mask.ndim or mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"where: {name!r} of the batch has shape {mask.shape}; expected one entry "
            f"per example {shape[:1]} or per value {shape}."
        )
    mask = jnp.broadcast_to(
        mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape
    )
    return mask if scored is None else mask & scored


def _feature(outputs: Outputs, path: str, who: str) -> Array:
    if path not in outputs.features:
        raise ValueError(
            f"{who} gives no feature {path!r}; it gives {sorted(outputs.features)}. "
            "Ask its adapter for it: features=[...]."
        )
    return outputs.features[path]
