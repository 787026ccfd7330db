"""Models with different vocabularies: classes that line up, and classes that do not."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from kdjax.losses import _checks
from kdjax.losses._kl import probabilities
from kdjax.losses._labels import wide_integers
from kdjax.losses._rows import as_columns, wide_dtype
from kdjax.losses._slots import below_top, log_sum, others
from kdjax.types import AlignedLogits

Policy = Literal["error", "truncate", "pad"]


def _lost_mass(logits: Array, kept: Array) -> Array:
    """The probability of all classes but those kept, ``[...]``, however small."""
    below = below_top(logits, 1.0)
    total = log_sum(below)
    lost = log_sum(others(below, jnp.broadcast_to(kept, (*total.shape, len(kept)))))
    return jnp.exp(lost - jnp.where(jnp.isneginf(total), 0, total))


@functools.partial(jax.jit, inline=True, static_argnames="size")
def _resized(logits: Array, *, size: int) -> AlignedLogits:
    classes = logits.shape[-1]
    missing = [(0, 0)] * (logits.ndim - 1) + [(0, max(0, size - classes))]
    aligned = jnp.pad(logits[..., :size], missing, constant_values=-jnp.inf)
    return AlignedLogits(aligned, _lost_mass(logits, jnp.arange(min(size, classes))))


@functools.partial(jax.jit, inline=True)
def _mapped(logits: Array, sources: Array) -> AlignedLogits:
    classes = logits.shape[-1]
    sources = wide_integers(sources)
    kept = jnp.where(sources < 0, classes, sources)
    taken = jnp.take(logits, kept, -1, mode="fill", fill_value=jnp.nan)
    aligned = jnp.where(sources < 0, -jnp.inf, taken)
    return AlignedLogits(aligned, _lost_mass(logits, kept))


def align_vocabulary(
    logits: Float[Array, "*batch V"],
    *,
    policy: Policy | Integer[Array, "size"],
    size: int | None = None,
) -> AlignedLogits:
    """Gives logits the classes of another vocabulary, and says what it cost.

    Embeddings are often padded to a round number, so that two models of one tokenizer
    differ in size. What a policy leaves out is not spread over the rest here: the
    softmax of the result does so, and ``lost_mass`` tells how much it was.

    Args:
      logits: unnormalised log-probabilities, ``[..., V]``.
      policy: what may happen to the classes:

        - ``"error"``: nothing; the sizes have to agree.
        - ``"truncate"``: the last ones are cut off.
        - ``"pad"``: new ones are added behind, at -inf. A logit of 0 would give them
          probability.
        - an array of integers ``[size]``: each class of the result is that class of the
          logits, or none, at -inf, where the number is negative.
      size: how many classes the result has; left out where ``policy`` is an array.

    Returns:
      The logits ``[..., size]`` and the probability that was lost, ``[...]``.

    Raises:
      ValueError: a size that the policy does not allow, or an array with a class twice
        or out of range (where its values can be seen; else NaN).
      TypeError: logits that are not floating, or a policy that is none of these.

    Example:
      >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> aligned, lost = align_vocabulary(logits, policy="truncate", size=2)
      >>> jax.nn.softmax(aligned).round(2), lost.round(2)
      (Array([0.67, 0.33], dtype=float32), Array(0.25, dtype=float32))
      >>> align_vocabulary(logits, policy=jnp.array([1, -1, 0])).lost_mass.round(2)
      Array(0.25, dtype=float32)
    """
    _checks.floating(logits=logits)
    classes = jnp.shape(logits)[-1]
    if not isinstance(policy, str):
        _check_sources(policy, classes)
        if size not in (None, jnp.shape(policy)[0]):
            raise ValueError(
                f"size: got {size} beside a policy for {jnp.shape(policy)[0]} classes; "
                "leave it out."
            )
        return _mapped(logits, jnp.asarray(policy))
    if size is None:
        raise ValueError(f"size: got none, expected one for policy {policy!r}.")
    _checks.whole(size=size)
    allowed = {
        "error": size == classes,
        "truncate": size <= classes,
        "pad": size >= classes,
    }
    if policy not in allowed:
        raise ValueError(
            f"policy: got {policy!r}, expected one of {', '.join(map(repr, allowed))}, "
            "or an array of classes."
        )
    if not allowed[policy]:
        raise ValueError(
            f"size: got {size} for the {classes} classes of the logits, which policy "
            f"{policy!r} does not allow."
        )
    return _resized(logits, size=size)


def _check_sources(policy: Array, classes: int) -> None:
    """One class of the logits each, or a negative number; no class twice."""
    dtype, shape = jnp.result_type(policy), jnp.shape(policy)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"policy: got dtype {dtype}, expected integers: classes.")
    if len(shape) != 1:
        raise ValueError(f"policy: got shape {shape}, expected [size].")
    if isinstance(policy, jax.core.Tracer):
        return
    found, times = np.unique(np.asarray(policy), return_counts=True)
    if found.size and found[-1] >= classes:
        raise ValueError(
            f"policy: got class {found[-1]}, expected less than the {classes} classes "
            "of the logits."
        )
    if (times[found >= 0] > 1).any():
        again = found[(times > 1) & (found >= 0)][0]
        raise ValueError(
            f"policy: got class {again} twice, whose probability would count twice."
        )


@functools.partial(jax.jit, inline=True)
def _universal_logit(
    student_logits: Array, teacher_logits: Array, temperature: Array
) -> Array:
    dtype = wide_dtype(student_logits, teacher_logits)
    (softening,) = as_columns(dtype, temperature)
    size = max(student_logits.shape[-1], teacher_logits.shape[-1])

    def ranked(logits: Array) -> Array:
        """Probabilities in falling order, then 0 for classes that are not there."""
        rising = jnp.sort(probabilities(logits, 1 / softening), -1)
        missing = [(0, 0)] * (logits.ndim - 1) + [(0, size - logits.shape[-1])]
        return jnp.pad(rising[..., ::-1], missing)

    gaps = ranked(student_logits) - ranked(teacher_logits)
    return jnp.abs(gaps).sum(-1) * jnp.asarray(temperature, dtype) ** 2


def universal_logit(
    student_logits: Float[Array, "*batch S"],
    teacher_logits: Float[Array, "*batch T"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "*batch"]:
    r"""Pulls the sorted probabilities together, whatever classes they belong to (ULD).

    .. math:: \tau^2 \sum_i |q_{(i)} - p_{(i)}|

    over probabilities in falling order, the shorter side filled up with zeros: the
    Wasserstein distance where moving between any two classes costs the same. It needs
    no common tokenizer, only positions that correspond, and knows nothing of which
    class is which: add a cross-entropy.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., S]``.
      teacher_logits: the same of the teacher, ``[..., T]``; T may differ from S.
      temperature: softens both sides; positive, a scalar or one per position ``[...]``.

    Returns:
      One value per position, ``[...]``, from 0 to 2 temperature².

    Raises:
      ValueError: other positions, or a temperature that is not positive.
      TypeError: logits that are not floating.

    Example:
      >>> student = jnp.log(jnp.array([0.25, 0.75]))
      >>> universal_logit(student, jnp.log(jnp.array([0.5, 0.25, 0.25]))).item()
      0.5

    Reference:
      Boizard, El Haddad, Hudelot and Colombo, Towards Cross-Tokenizer Distillation: the
      Universal Logit Distillation Loss for LLMs, 2024, section 3. arXiv:2402.12030
    """
    _checks.floating(student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = jnp.shape(student_logits), jnp.shape(teacher_logits)
    if student[:-1] != teacher[:-1]:
        raise ValueError(
            f"student_logits {student} and teacher_logits {teacher}: expected the same "
            "positions. Nothing is broadcast."
        )
    _checks.positive(temperature=temperature)
    _checks.scale(student[:-1], temperature=temperature)
    return _universal_logit(student_logits, teacher_logits, temperature)
