"""Terms over the logits of student and teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from kdjax import fused, losses
from kdjax.losses import _checks
from kdjax.losses._labels import weighted
from kdjax.objectives._terms import (
    MASK,
    check_weight,
    counted,
    entry,
    feature,
    nothing,
    now,
    settings,
    single,
)
from kdjax.types import (
    Batch,
    LinearHead,
    Mean,
    Objective,
    Outputs,
    PyTree,
    SampledTargets,
    Scheduled,
    SparseTargets,
    Term,
)

Measure = Callable[..., Mean]
"""``measure(student_logits, teacher_logits, where=mask)`` to a mean over positions."""


def _means(
    loss: Callable[..., tuple[Array, PyTree]],
    student: Outputs,
    teacher: Outputs | None,
    labels: Array | None,
    batch: Batch,
    where: str | None,
    chunk_size: int | None = None,
) -> tuple[Mean, PyTree]:
    """The mean of a loss over logits, or over the head of a student that shows one.

    The loss also returns what else is to be known of each position.
    """
    truth = () if labels is None else (labels,)
    head = student.logits
    if isinstance(head, LinearHead):
        counts = counted(batch, where, head.hidden.shape[:-1], labels)
        target = None if teacher is None else _given(teacher, LinearHead)
        return fused.token_means(
            loss, head, target, *truth, where=counts, chunk_size=chunk_size
        )
    targets = () if teacher is None else (_given(teacher),)
    values, others = loss(student.dense_logits(), *targets, *truth)
    counts = counted(batch, where, values.shape, labels)
    means = jax.tree.map(lambda each: Mean.of(each, counts), others)
    return Mean.of(values, counts), means


def _given(teacher: Outputs, *kinds: type) -> Any:
    """What a loss gets of a teacher: its targets, kinds of logits, or dense ones."""
    if isinstance(teacher.logits, (SparseTargets, SampledTargets, *kinds)):
        return teacher.logits
    return teacher.dense_logits()


def _mean(loss: Callable[..., Array], *given: Any) -> Mean:
    """The same of a loss that returns its values alone."""
    return _means(lambda *sides: (loss(*sides), ()), *given)[0]


def _by_position(measure: Measure, student: Array, teacher: Array) -> Array:
    """What a measure says of each position alone, ``[..., V]`` to ``[...]``."""

    def of(student: Array, teacher: Array) -> Array:
        return measure(student, teacher, where=None).value()

    for _ in student.shape[:-1]:
        of = jax.vmap(of)
    return of(student, teacher)


def hard_labels(
    *,
    name: str = "hard",
    weight: Scheduled = 1.0,
    labels: str = "label",
    label_smoothing: Scheduled = 0.0,
    where: str | None = MASK,
    chunk_size: int | None = None,
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
      chunk_size: tokens that have logits at a time, under such a head.

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
        return _mean(loss, student, None, truth, batch, where, chunk_size)

    return single(name, weight, compute)


def soft_labels(
    loss: Callable[..., Array] = losses.forward_kl,
    *,
    name: str = "soft",
    weight: Scheduled = 1.0,
    labels: str | None = None,
    student: str | None = None,
    where: str | None = MASK,
    chunk_size: int | None = None,
    **hyperparameters: Scheduled,
) -> Objective:
    """Any loss of :mod:`kdjax.losses` between the logits of student and teacher.

    Logits that a model shows as a :class:`~kdjax.types.LinearHead` never exist all at
    once where the student shows such a head; the loss then gives one value per token.
    See :func:`kdjax.fused.token_mean`. A teacher that gives targets,
    :func:`kdjax.teachers.cached`, say, needs a loss of such targets.

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
      chunk_size: tokens that have logits at a time, under such a head.
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
        return _mean(bound, student, teacher, truth, batch, where, chunk_size)

    return single(name, weight, compute)


def mixed_labels(
    loss: Callable[..., Array] = losses.forward_kl,
    *,
    alpha: Scheduled,
    name: str = "mixed",
    weight: Scheduled = 1.0,
    labels: str = "label",
    label_smoothing: Scheduled = 0.0,
    where: str | None = MASK,
    chunk_size: int | None = None,
    monitors: Mapping[str, Measure] | None = None,
    **hyperparameters: Scheduled,
) -> Objective:
    """Hard and soft labels in one look at the logits: alpha * CE + (1 - alpha) * loss.

    The gradient is that of :func:`hard_labels` and :func:`soft_labels` with these
    weights over positions that have a label. Over a
    :class:`~kdjax.types.LinearHead` the logits are multiplied out once for both, and
    for all that is monitored; as terms of their own, once for each.

    Args:
      loss: as for :func:`soft_labels`.
      alpha: weight of the hard labels, in [0, 1]; the soft ones have 1 - alpha.
      name: of the term, in metrics; its parts are ``hard`` and ``soft`` there.
      weight: of the term.
      labels: entry of the batch, integers ``[...]``; negative ones do not count, for
        the soft labels either.
      label_smoothing: in [0, 1]; see :func:`kdjax.losses.cross_entropy`.
      where: entry of the batch that says what else counts.
      chunk_size: tokens that have logits at a time, under such a head.
      monitors: measures by name, as for :func:`monitor`, of the same logits.
      **hyperparameters: the loss's own, as for :func:`soft_labels`.

    Returns:
      An objective of one term, and of diagnostics with weight 0.

    Raises:
      ValueError: a Python number is out of its range, two terms have one name, or
        (when traced) the loss refuses its arguments or an entry is missing.

    Example:
      >>> from kdjax import metrics
      >>> objective = mixed_labels(
      ...     losses.reverse_kl, alpha=0.1, monitors={"agreement": metrics.agreement})
      >>> outputs, batch = Outputs(jnp.zeros((1, 2))), {"label": jnp.array([0])}
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, batch, jnp.array(0))
      >>> sorted(terms), terms["mixed"].mean.value().item()
      (['agreement', 'hard', 'mixed', 'soft'], 0.0693147)
    """
    check_weight(name, weight)
    if not callable(alpha):
        _checks.fraction(alpha=alpha)
    measures = monitors or {}
    twice = sorted({name, *measures} & {"hard", "soft"} | {name} & set(measures))
    if twice:
        raise ValueError(
            f"name: {twice} is the name of several terms; give each its own."
        )

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        share, smoothing = now(alpha, step), now(label_smoothing, step)
        bound = functools.partial(loss, **settings(hyperparameters, step))

        def parts(student: Array, teacher: Array, truth: Array) -> Any:
            hard = losses.cross_entropy(student, truth, label_smoothing=smoothing)
            soft = bound(student, teacher)
            seen = {
                key: _by_position(measure, student, teacher)
                for key, measure in measures.items()
            }
            both = weighted(share, hard) + weighted(1 - share, soft)
            return both, {"hard": hard, "soft": soft, **seen}

        truth = entry(batch, labels, "labels")
        mean, others = _means(parts, student, teacher, truth, batch, where, chunk_size)
        diagnostics = {key: Term(0, each) for key, each in others.items()}
        return {name: Term(now(weight, step), mean), **diagnostics}, state

    return Objective(nothing, dict, apply)


def monitor(
    measure: Measure,
    *,
    name: str,
    where: str | None = MASK,
) -> Objective:
    """A diagnostic of every step: reported with the terms, and never differentiated.

    Over a :class:`~kdjax.types.LinearHead` the logits are multiplied out chunk by chunk
    once more, and each position is measured by itself; the monitors of
    :func:`mixed_labels` share the logits of its loss.

    Args:
      measure: ``measure(student_logits, teacher_logits, where=mask)`` to a mean, such
        as :func:`kdjax.metrics.agreement`.
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
        if isinstance(student.logits, LinearHead):
            by_position = functools.partial(_by_position, measure)
            still = jax.lax.stop_gradient(student)
            return _mean(by_position, still, teacher, None, batch, where)
        logits = student.dense_logits()
        mask = counted(batch, where, logits.shape[:-1], None)
        return measure(logits, teacher.dense_logits(), where=mask)

    return single(name, 0, compute)
