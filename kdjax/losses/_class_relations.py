"""Losses over how classes, or examples, relate in the predictions of a batch.

No temperature² here: correlations do not shrink as the temperature grows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._kl import forward_kl
from kdjax.losses._labels import at_temperature, weighted, widened
from kdjax.losses._vectors import centred, product, unit_distance


def _softmax(logits: Array, temperature: Array) -> tuple[Array, Array]:
    """p = softmax(logits / temperature), and p - 1/V, each to its own precision."""
    logits = at_temperature(logits, jnp.asarray(temperature, logits.dtype)[..., None])
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    shifted = logits - jnp.where(jnp.isneginf(top), 0.0, top)
    powers, raised = jnp.exp(shifted), jnp.expm1(shifted)
    total = jnp.sum(powers, -1, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)
    return powers / total, (raised - jnp.mean(raised, -1, keepdims=True)) / total


def _columns(logits: Array, temperature: Array, where: Array) -> Array:
    """Probabilities by class, each class less the constant that costs no precision.

    Correlations do not see the constant. Without it, nearly uniform probabilities, as
    at a high temperature, are rounded; with it, tiny ones are.
    """
    values, excess = _softmax(logits, temperature)

    def largest(values: Array) -> Array:
        return jnp.max(jnp.abs(values), 0, keepdims=True, initial=0.0, where=where)

    return jnp.where(largest(excess) < largest(values), excess, values)


def _correlation_distance(
    student: Array, teacher: Array, axis: int, where: Array
) -> Array:
    """1 - Pearson's correlation along the axis, 0 where one side is constant."""
    student, teacher = (centred(each, axis, where) for each in (student, teacher))
    return unit_distance(student, teacher, axis)


@functools.partial(jax.jit, inline=True)
def _inter_class_relation(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Array,
    where: Array | None,
) -> Array:
    student, teacher = widened(student_logits), widened(teacher_logits)
    if where is None:
        where = jnp.ones(student.shape, bool)
    student = jnp.where(where, student, -jnp.inf)
    teacher = jnp.where(where, teacher, -jnp.inf)
    student, teacher = (_softmax(z, temperature)[1] for z in (student, teacher))
    return _correlation_distance(student, teacher, -1, where)


def inter_class_relation(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    temperature: float | Array = 1.0,
    where: Bool[Array, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student's preferences among the classes of each example.

    .. math:: 1 - \rho(q, p), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau)

    with Pearson's correlation :math:`\rho` over the classes: only relative
    preferences count, not how sure a model is. DIST is
    :math:`\beta \tau^2` times the mean of this plus :math:`\gamma \tau^2` times the
    mean of :func:`intra_class_relation`; the factor is left to the weights.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape.
      temperature: softens both sides; positive. No factor temperature² follows.
      where: vocabulary slots that exist, and over which the correlation is taken. A
        slot at -inf that is not masked counts as a class of probability 0.

    Returns:
      One value per position, ``[...]``, in [0, 2]; 0 where a side is constant, which
      leaves the correlation undefined (so with one class), and without a gradient.

    Raises:
      ValueError: the shapes differ, or ``temperature`` is not positive.
      TypeError: logits that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([2.0, 1.0, 0.0])
      >>> inter_class_relation(teacher, teacher).item()
      0.0

    Reference:
      Huang, You, Wang, Qian and Xu, Knowledge Distillation from A Stronger Teacher,
      2022, equation 8. arXiv:2205.10536
    """
    _checks.logits(student_logits, teacher_logits, where=where)
    _checks.positive(temperature=temperature)
    _checks.scale(jnp.shape(student_logits)[:-1], temperature=temperature)
    return _inter_class_relation(student_logits, teacher_logits, temperature, where)


def _kept(
    student_logits: Array, teacher_logits: Array, where: Array | None
) -> tuple[Array, Array, Array]:
    """Logits with the rows of masked examples replaced, and the mask as a column."""
    student, teacher = widened(student_logits), widened(teacher_logits)
    if where is None:
        where = jnp.ones(student.shape[:1], bool)
    where = where[:, None]
    return jnp.where(where, student, 0.0), jnp.where(where, teacher, 0.0), where


@functools.partial(jax.jit, inline=True)
def _intra_class_relation(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Array,
    where: Array | None,
) -> Array:
    student, teacher, where = _kept(student_logits, teacher_logits, where)
    student, teacher = (_columns(z, temperature, where) for z in (student, teacher))
    return _correlation_distance(student, teacher, 0, where)


def intra_class_relation(
    student_logits: Float[Array, "B V"],
    teacher_logits: Float[Array, "B V"],
    *,
    temperature: float | Array = 1.0,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, "V"]:
    r"""Pulls how each class ranks the examples of the batch.

    .. math:: 1 - \rho(q_{\cdot v}, p_{\cdot v}), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau)

    with Pearson's correlation :math:`\rho` over the examples, one for each class v.
    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[B, V]``.
      teacher_logits: the same of the teacher, equal in shape.
      temperature: softens both sides; positive. No factor temperature² follows.
      where: examples that count, ``[B]``.

    Returns:
      One value per class, ``[V]``, in [0, 2]; 0 where a side is constant over the
      examples, which leaves the correlation undefined (so with one example), and
      without a gradient.

    Raises:
      ValueError: the shapes differ, there are not two axes, or ``temperature`` is not
        positive.
      TypeError: logits that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[2.0, 1.0], [0.0, 1.0]])
      >>> intra_class_relation(teacher[::-1], teacher)
      Array([2., 2.], dtype=float32)

    Reference:
      Huang, You, Wang, Qian and Xu, Knowledge Distillation from A Stronger Teacher,
      2022, equation 9. arXiv:2205.10536
    """
    _checks.logits(student_logits, teacher_logits, rank=2)
    _checks.positive(temperature=temperature)
    _checks.scale(jnp.shape(student_logits)[:1], temperature=temperature)
    if where is not None:
        _checks.boolean(jnp.shape(student_logits)[:1], where=where)
    return _intra_class_relation(student_logits, teacher_logits, temperature, where)


def _gram_distances(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Squared Frobenius distances of the [B, B] and of the [V, V] Gram matrices."""
    # s s' - t t' = (s - t) s' + t (s - t)': precise where the two agree.
    gap = student - teacher
    examples = product(gap, student.T) + product(teacher, gap.T)
    classes = product(gap.T, student) + product(teacher.T, gap)
    return jnp.sum(examples**2), jnp.sum(classes**2)


@functools.partial(jax.jit, inline=True)
def _multi_level_relation(
    student_logits: Array,
    teacher_logits: Array,
    temperatures: tuple[Array, ...],
    weights: tuple[Array, Array, Array],
    where: Array | None,
) -> Array:
    student, teacher, where = _kept(student_logits, teacher_logits, where)
    count = jnp.maximum(jnp.sum(where), 1)
    instance_weight, batch_weight, class_weight = weights
    loss = jnp.zeros((), student.dtype)
    for temperature in temperatures:
        soft = forward_kl(student, teacher, temperature=temperature)
        instances = jnp.sum(jnp.where(where[:, 0], soft, 0.0)) / count
        q, p = (
            jnp.where(where, jax.nn.softmax(at_temperature(z, temperature)), 0.0)
            for z in (student, teacher)
        )
        examples, classes = _gram_distances(q, p)
        loss += weighted(instance_weight, instances)
        loss += weighted(batch_weight, examples / count)
        loss += weighted(class_weight, classes / student.shape[-1])
    return loss


def multi_level_relation(
    student_logits: Float[Array, "B V"],
    teacher_logits: Float[Array, "B V"],
    *,
    temperatures: Sequence[float | Array] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight: float | Array = 1.0,
    batch_weight: float | Array = 1.0,
    class_weight: float | Array = 1.0,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls predictions, the likeness of examples and the likeness of classes.

    .. math:: \sum_\tau \Bigl(
       \frac{\tau^2}{B} \sum_b KL(p_b \| q_b)
       + \frac{1}{B} \| q q^\top - p p^\top \|_F^2
       + \frac{1}{V} \| q^\top q - p^\top p \|_F^2 \Bigr)

    with the predictions p and q softened by each temperature in turn. This loss
    relates the examples of a batch: on a mesh it sees the global one, and its value
    over micro-batches is another than over the whole.

    The published code masks means with the mask of half of the examples or classes
    after they were taken, and adds the weak view's terms twice where the strong
    view's are meant; here every example counts, as in the paper.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[B, V]``.
      teacher_logits: the same of the teacher, equal in shape.
      temperatures: the levels of softening that are summed; positive, at least one.
      instance_weight: weight of the KL of single examples.
      batch_weight: weight of the ``[B, B]`` likeness of examples.
      class_weight: weight of the ``[V, V]`` likeness of classes.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar; 0 where the predictions agree, and where no example counts.

    Raises:
      ValueError: the shapes differ, there are not two axes, a temperature is not
        positive, or a weight is negative.
      TypeError: logits that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[2.0, 1.0], [0.0, 1.0]])
      >>> multi_level_relation(teacher, teacher).item()
      0.0

    Reference:
      Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023, pages
      24276-24285, section 3.
    """
    _checks.logits(student_logits, teacher_logits, rank=2)
    temperatures = tuple(temperatures)
    if not temperatures:
        raise ValueError("temperatures: got none, expected at least one.")
    for temperature in temperatures:
        _checks.positive(temperatures=temperature)
        _checks.scale((), temperatures=temperature)
    numbers = {
        "instance_weight": instance_weight,
        "batch_weight": batch_weight,
        "class_weight": class_weight,
    }
    _checks.non_negative(**numbers)
    _checks.scale((), **numbers)
    if where is not None:
        _checks.boolean(jnp.shape(student_logits)[:1], where=where)
    return _multi_level_relation(
        student_logits, teacher_logits, temperatures, tuple(numbers.values()), where
    )
