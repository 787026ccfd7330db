"""Divergences from the teacher's most likely classes and the mass of all others."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks, _target_checks
from kdjax.losses._kl_core import forward_core, reverse_core
from kdjax.losses._pairs import softened
from kdjax.losses._slots import (
    at_slots,
    below_top,
    log_softmax,
    log_sum,
    others,
    slots_of,
)
from kdjax.types import SparseTargets


@functools.partial(jax.jit, inline=True, static_argnames=("k", "temperature"))
def _top_k_targets(
    teacher_logits: Array, where: Array | None, *, k: int, temperature: float
) -> SparseTargets:
    logits = jnp.asarray(teacher_logits)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    _, indices = jax.lax.top_k(logits, k)
    log_probs = log_softmax(below_top(logits, temperature))
    tail = log_sum(others(log_probs, indices))
    return SparseTargets(indices, at_slots(log_probs, indices), tail, temperature)


def top_k_targets(
    teacher_logits: Float[Array, "*batch V"],
    k: int,
    *,
    temperature: float = 1.0,
    where: Bool[Array, "*batch V"] | None = None,
) -> SparseTargets:
    r"""Keeps a teacher's most likely classes, and the mass of all others.

    .. math:: \log p_v \text{ of the } k \text{ largest}, \quad
       \log \sum_{\text{others}} p_v, \quad p = \mathrm{softmax}(z_t / \tau)

    The tail is summed up from the other classes, so it is accurate however small.

    Args:
      teacher_logits: unnormalised log-probabilities, ``[..., V]``.
      k: how many classes, from 1 to V.
      temperature: softens the teacher, and later the student; positive.
      where: classes that exist, ``[..., V]``.

    Returns:
      The targets: ``k`` numbers and indices per position, the likeliest first, and
      the tail. Classes at -inf leave their slots unused.

    Raises:
      ValueError: ``k`` is more than V or below 1, a mask of another shape, or a
        temperature that is not positive.
      TypeError: logits that are not floating, a mask that is not boolean, or ``k`` and
        ``temperature`` that are no Python numbers.

    Example:
      >>> targets = top_k_targets(jnp.log(jnp.array([0.1, 0.6, 0.3])), 1)
      >>> targets.indices, jnp.exp(targets.tail).round(3)
      (Array([1], dtype=int32), Array(0.4, dtype=float32))

    Reference:
      Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs, 2025, for what is lost where the tail is not kept. arXiv:2503.16870
    """
    _checks.floating(teacher_logits=teacher_logits)
    _checks.whole(k=k)
    _target_checks.python_number(temperature=temperature)
    classes = jnp.shape(teacher_logits)[-1]
    if k > classes:
        raise ValueError(f"k: got {k}, expected at most the {classes} classes.")
    if where is not None:
        _checks.boolean(jnp.shape(teacher_logits), where=where)
    return _top_k_targets(teacher_logits, where, k=k, temperature=float(temperature))


def _buckets(student_logits: Array, targets: SparseTargets) -> tuple[Array, Array]:
    """Logits of student and teacher over the targets' classes and one for the rest."""
    below = below_top(student_logits, targets.temperature)
    used, slots = slots_of(targets.indices, targets.log_probs, below.shape[-1])
    own = jnp.where(used, at_slots(below, slots), -jnp.inf)
    rest = log_sum(others(below, slots))
    student = jnp.concatenate([own, rest[..., None]], -1)
    teacher = jnp.concatenate([targets.log_probs, targets.tail[..., None]], -1)
    without = jnp.isneginf(teacher).all(-1, keepdims=True)
    return jnp.where(without, -jnp.inf, student), teacher


@functools.partial(jax.jit, inline=True, static_argnums=0)
def _sparse(
    core: Callable[..., Array], student_logits: Array, targets: SparseTargets
) -> Array:
    student, teacher = _buckets(student_logits, targets)
    value = softened(core, student, teacher, 1.0, None)
    return value * targets.temperature**2


def sparse_forward_kl(
    student_logits: Float[Array, "*batch V"], targets: SparseTargets
) -> Float[Array, "*batch"]:
    r"""Pulls the student over the teacher's likeliest classes and the mass of the rest.

    .. math::
        \tau^2 \Bigl[ \sum_{v \in K} p_v \log \frac{p_v}{q_v}
        + p_R \log \frac{p_R}{q_R} \Bigr], \quad
        p_R = \sum_{v \notin K} p_v, \; q_R = \sum_{v \notin K} q_v

    This is the KL over k + 1 outcomes, all others being one. It is at most the KL over
    all classes, and the same at k = V. Neither side is renormalised to the top k: a
    student that has all its mass elsewhere would not know.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      targets: the teacher's, from :func:`top_k_targets` or a cache of it; they also
        say the temperature.

    Returns:
      One value per position, ``[...]``, never negative: 0 where the outcomes have the
      same probabilities and where there is no target; +inf where the student excludes
      a target; and, under ``jax.jit``, NaN where an index is out of range.

    Raises:
      ValueError: shapes do not fit, or an index is out of range or there twice (where
        their values can be seen).
      TypeError: ``targets`` is no ``SparseTargets``, or a dtype is wrong.

    Example:
      >>> logits = jnp.array([2.0, 1.0, 0.0])
      >>> student = jnp.array([2.0, 0.0, 1.0])  # what is not in the top differs
      >>> float(sparse_forward_kl(student, top_k_targets(logits, 1))) < 1e-6
      True

    Reference:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
      section 2, with the classes of the tail as one. arXiv:1503.02531
    """
    _target_checks.sparse(student_logits, targets)
    return _sparse(forward_core, student_logits, targets)


def sparse_reverse_kl(
    student_logits: Float[Array, "*batch V"], targets: SparseTargets
) -> Float[Array, "*batch"]:
    r"""Pulls the student into the teacher's likeliest classes: KL(student ‖ teacher).

    .. math::
        \tau^2 \Bigl[ \sum_{v \in K} q_v \log \frac{q_v}{p_v}
        + q_R \log \frac{q_R}{p_R} \Bigr]

    over k + 1 outcomes, as in :func:`sparse_forward_kl`.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      targets: the teacher's, from :func:`top_k_targets` or a cache of it.

    Returns:
      One value per position, ``[...]``, never negative; +inf, without a gradient,
      where the student has mass and the teacher none, as in a tail of -inf.

    Raises:
      ValueError: as for :func:`sparse_forward_kl`.
      TypeError: likewise.

    Example:
      >>> targets = top_k_targets(jnp.log(jnp.array([0.8, 0.1, 0.1])), 1)
      >>> sparse_reverse_kl(jnp.log(jnp.array([0.5, 0.5, 0.0])), targets).item()
      0.2231435

    Reference:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023,
      equation 1, with the classes of the tail as one. arXiv:2306.08543
    """
    _target_checks.sparse(student_logits, targets)
    return _sparse(reverse_core, student_logits, targets)
