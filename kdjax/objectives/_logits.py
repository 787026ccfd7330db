"""Terms over the logits of student and teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax import Array

from kdjax import fused, losses
from kdjax.objectives._terms import MASK, counted, entry, feature, now, settings, single
from kdjax.types import (
    Batch,
    LinearHead,
    Mean,
    Objective,
    Outputs,
    PyTree,
    Scheduled,
)


def _mean(
    loss: Callable[..., Array],
    student: Outputs,
    teacher: Outputs | None,
    labels: Array | None,
    batch: Batch,
    where: str | None,
) -> Mean:
    """The mean of a loss over logits, or over the head of a student that shows one."""
    truth = () if labels is None else (labels,)
    head = student.logits
    if isinstance(head, LinearHead):
        counts = counted(batch, where, head.hidden.shape[:-1], labels)
        target = None if teacher is None else teacher.logits
        if teacher is not None and not isinstance(target, LinearHead):
            target = teacher.dense_logits()
        return fused.token_mean(loss, head, target, *truth, where=counts)
    sides = (student,) if teacher is None else (student, teacher)
    values = loss(*(side.dense_logits() for side in sides), *truth)
    return Mean.of(values, counted(batch, where, values.shape, labels))


def hard_labels(
    *,
    name: str = "hard",
    weight: Scheduled = 1.0,
    labels: str = "label",
    label_smoothing: Scheduled = 0.0,
    where: str | None = MASK,
) -> Objective:
    """Cross-entropy against the labels of the batch.

    Logits that the student shows as a :class:`~kdjax.types.LinearHead` never exist all
    at once: see :func:`kdjax.fused.token_mean`.

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

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        truth = entry(batch, labels, "labels")
        loss = functools.partial(
            losses.cross_entropy, label_smoothing=now(label_smoothing, step)
        )
        return _mean(loss, student, None, truth, batch, where)

    return single(name, weight, compute)


def soft_labels(
    loss: Callable[..., Array] = losses.forward_kl,
    *,
    name: str = "soft",
    weight: Scheduled = 1.0,
    labels: str | None = None,
    student: str | None = None,
    where: str | None = MASK,
    **hyperparameters: Scheduled,
) -> Objective:
    """Any loss of :mod:`kdjax.losses` between the logits of student and teacher.

    Logits that a model shows as a :class:`~kdjax.types.LinearHead` never exist all at
    once where the student shows such a head; the loss then gives one value per token.
    See :func:`kdjax.fused.token_mean`.

    Args:
      loss: ``loss(student_logits, teacher_logits, **hyperparameters)``, or with the
        labels third; one value per example or token.
      name: of the term, in metrics.
      weight: of the term.
      labels: entry of the batch for losses that take labels
        (:func:`kdjax.losses.decoupled_kd`, say); then negative labels do not count.
      student: a feature of the student that holds the logits to be pulled, such as
        those of a distillation token (DeiT, arXiv:2012.12877); by default its logits.
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

    head = student

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        truth = None if labels is None else entry(batch, labels, "labels")
        bound = functools.partial(loss, **settings(hyperparameters, step))
        if head is not None:
            student = Outputs(feature(student, head, f"term {name!r}: the student"))
        return _mean(bound, student, teacher, truth, batch, where)

    return single(name, weight, compute)


def monitor(
    measure: Callable[..., Mean],
    *,
    name: str,
    where: str | None = MASK,
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

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        logits = student.dense_logits()
        mask = counted(batch, where, logits.shape[:-1], None)
        return measure(logits, teacher.dense_logits(), where=mask)

    return single(name, 0, compute)
