"""Kullback-Leibler divergences between teacher and student, and mixes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._kl_core import forward_core, reverse_core
from kdjax.losses._labels import weighted
from kdjax.losses._pairs import entropy_core, softened
from kdjax.losses._rows import largest


def forward_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student over every mode of the teacher: KL(teacher ‖ student).

    .. math::
        \tau^2 \sum_v p_v (\log p_v - \log q_v), \quad
        p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau)

    The factor :math:`\tau^2` keeps the size of the gradient when the temperature
    :math:`\tau` grows.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape. A gradient flows here
        too; teachers stop it.
      temperature: softens both sides; positive, a scalar or one per position
        ``[...]``.
      where: classes that exist, ``[..., V]``; the others carry no probability on
        either side.

    Returns:
      One value per position, ``[...]``, float32 or wider: 0 where the distributions
      agree, never negative, and +inf where the student has a logit of -inf and the
      teacher has not.

    Raises:
      ValueError: the shapes differ, or a Python ``temperature`` is not positive.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> forward_kl(jnp.array([2.0, 0.5]), jnp.array([2.0, 0.5])).item()
      0.0

    Reference:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
      section 2. arXiv:1503.02531
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    return softened(forward_core, student_logits, teacher_logits, temperature, where)


def reverse_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student into one mode of the teacher: KL(student ‖ teacher).

    .. math:: \tau^2 \sum_v q_v (\log q_v - \log p_v)

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for all arguments.
      teacher_logits: ``[..., V]``.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``: 0 where the distributions agree, +inf where
      the teacher has a logit of -inf and the student has not. There the gradient is
      0, for want of a finite one.

    Raises:
      ValueError: the shapes differ, or a Python ``temperature`` is not positive.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> reverse_kl(jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.8, 0.2]))).item()
      0.2231435

    Reference:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023,
      equation 1. arXiv:2306.08543
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    return softened(reverse_core, student_logits, teacher_logits, temperature, where)


def symmetric_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    reverse_weight: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls both ways at once: a weighted sum of forward and reverse KL.

    .. math:: \tau^2 [(1 - w) \, \mathrm{KL}(p \| q) + w \, \mathrm{KL}(q \| p)]

    DistiLLM's :math:`\lambda` is the reverse weight; torchtune's ratio is one minus it.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      reverse_weight: ``w`` in [0, 1], a scalar or one per position.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> a, b = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.8, 0.2]))
      >>> symmetric_kl(a, b).item() == symmetric_kl(b, a).item()
      True

    Reference:
      Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models,
      2024, section 2. arXiv:2402.03898
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.fraction(reverse_weight=reverse_weight)
    _checks.scale(jnp.shape(student_logits)[:-1], reverse_weight=reverse_weight)
    return softened(
        _symmetric_core,
        student_logits,
        teacher_logits,
        temperature,
        where,
        reverse_weight,
    )


def _symmetric_core(
    student: Array, teacher: Array, inverse: Array, weight: Array
) -> Array:
    weight = weight[..., 0] if weight.ndim else weight
    forward = forward_core(student, teacher, inverse)
    reverse = reverse_core(student, teacher, inverse)
    return weighted(1 - weight, forward) + weighted(weight, reverse)


def adaptive_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    head_mass: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Forward KL where the head is off, reverse KL where the tail is.

    .. math::
        \tau^2 \frac{g_h \mathrm{KL}(p \| q) + g_t \mathrm{KL}(q \| p)}{g_h + g_t},
        \quad g = \sum |p_v - q_v| \text{ over the head or the tail}

    The tail are the teacher's least likely classes with a mass below one minus
    ``head_mass``, the head are the others. The gaps carry no gradient. The classes are
    sorted, so a sharded vocabulary is gathered.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      head_mass: least probability of the head, in [0, 1]; a scalar or one per position.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> adaptive_kl(jnp.array([2.0, 0.5]), jnp.array([2.0, 0.5])).item()
      0.0

    Reference:
      Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
      Large Language Models, 2024, section 4. arXiv:2404.02657
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.fraction(head_mass=head_mass)
    _checks.scale(jnp.shape(student_logits)[:-1], head_mass=head_mass)
    return softened(
        _adaptive_core, student_logits, teacher_logits, temperature, where, head_mass
    )


def _adaptive_core(
    student: Array, teacher: Array, inverse: Array, head_mass: Array
) -> Array:
    p = probabilities(jax.lax.stop_gradient(teacher), inverse)
    q = probabilities(jax.lax.stop_gradient(student), inverse)
    p, difference = jax.lax.sort((p, jnp.abs(p - q)), num_keys=1)
    tail = jnp.cumsum(p, axis=-1) < 1 - head_mass
    head_gap = jnp.where(tail, 0, difference).sum(-1)
    tail_gap = jnp.where(tail, difference, 0).sum(-1)
    total = head_gap + tail_gap
    share = jnp.where(total == 0, 0.5, head_gap / jnp.where(total == 0, 1, total))
    share = jax.lax.stop_gradient(share)[..., None]
    return _symmetric_core(student, teacher, inverse, 1 - share)


def probabilities(logits: Array, inverse: Array) -> Array:
    """The softmax at a temperature, ``[..., V]``; all 0 in a row without a class."""
    logits = logits.astype(inverse.dtype)
    below = logits - largest(logits)
    held = ~jnp.isneginf(below)
    # The derivative of -inf by the temperature would be NaN.
    powers = jnp.where(held, jnp.exp(jnp.where(held, below, 0) * inverse), 0)
    total = powers.sum(-1, keepdims=True)
    return powers / jnp.where(total == 0, 1, total)


def interpolated_teacher_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student towards a target on the way from itself to the teacher.

    .. math::
        \tau^2 \, \mathrm{KL}(\mathrm{softmax}([(1 - t) \bar z_s + t z_t] / \tau) \| q)

    The student's part :math:`\bar z_s` of the target carries no gradient.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      progress: ``t`` in [0, 1], a scalar or one per position; at 1 this is forward KL,
        at 0 it is 0. TAID raises it from 0.4 to 1 over the training.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> a, b = jnp.array([2.0, 0.5]), jnp.array([0.0, 1.0])
      >>> float(interpolated_teacher_kl(a, b, progress=0.0))
      0.0

    Reference:
      Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient
      Knowledge Transfer in Language Models, 2025, equations 3 and 4. arXiv:2501.16937
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.fraction(progress=progress)
    _checks.scale(jnp.shape(student_logits)[:-1], progress=progress)
    return softened(
        _interpolated_core, student_logits, teacher_logits, temperature, where, progress
    )


def _interpolated_core(
    student: Array, teacher: Array, inverse: Array, progress: Array
) -> Array:
    student, teacher = (each.astype(inverse.dtype) for each in (student, teacher))
    # -inf times a weight of 0 is NaN; this is as good as -inf and stays a number.
    own = jax.lax.stop_gradient(jnp.maximum(student, -1e30))
    teacher = jnp.maximum(teacher, -1e30)
    target = own + progress * (teacher - own)
    # From there nothing would be left of the teacher's at progress 1.
    missing = (1 - progress) * own + progress * teacher
    target = jnp.where(own > -1e30, target, missing)
    # Where neither side has the class, nor has the target.
    out = jnp.isneginf(student) & (teacher == -1e30)
    return forward_core(student, jnp.where(out, -jnp.inf, target), inverse)


def soft_cross_entropy(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Cross-entropy of the student under the teacher's soft labels.

    .. math:: -\tau^2 \sum_v p_v \log q_v

    It is forward KL plus the teacher's entropy: the same gradient for the student, but
    **not zero** where the two agree.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; never below temperature² times the teacher's
      entropy.

    Raises:
      ValueError: the shapes differ, or a Python ``temperature`` is not positive.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> soft_cross_entropy(jnp.array([0.0, 0.0]), jnp.array([3.0, 1.0])).item()
      0.6931472

    Reference:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
      section 2. arXiv:1503.02531
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    return softened(_soft_core, student_logits, teacher_logits, temperature, where)


def _soft_core(student: Array, teacher: Array, inverse: Array) -> Array:
    return forward_core(student, teacher, inverse) + entropy_core(teacher, inverse)
