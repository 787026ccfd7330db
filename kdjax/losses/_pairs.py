"""Two softmax distributions side by side, and the derivatives of what compares them.

Every divergence of this package is a sum over classes of a function of ``p``
(teacher), ``q`` (student) and ``x = log p - log q``. This file computes those three so
that nothing is lost near ``p == q`` or at a high temperature, and turns the function
and its derivative into a value with safe gradients. The formulas themselves are in
``_kl.py``, ``_mixtures.py`` and ``_powers.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike


class Pair(NamedTuple):
    """Teacher ``p`` and student ``q``, entry by entry, each ``[..., V]``."""

    p: Array
    q: Array
    x: Array  # log p - log q


class Rows(NamedTuple):
    """What normalises a pair, each ``[..., 1]``."""

    student_shift: Array
    teacher_shift: Array
    student_scale: Array
    teacher_scale: Array
    log_ratio: Array  # what is added to the shifted difference to make it x


def excess(p: Array, q: Array, x: Array) -> Array:
    """``p log(p/q) + q - p``, never negative and accurate for small ``x``.

    Summed over classes it is KL(p ‖ q), since both sides sum to one.
    """
    near = jnp.abs(x) < 1
    inner = jnp.where(near, x, 0)
    # p(x - 1) must not become 0 * inf where p is 0; all of q remains there.
    outer = jnp.where(p > 0, p * (x - 1), 0) + q
    return jnp.where(near, p * _second_order(inner), outer)


def gap(p: Array, q: Array, x: Array) -> Array:
    """``q - p`` to full relative accuracy for small ``x``."""
    near = jnp.abs(x) < 1
    inner = jnp.where(near, x, 0)
    return jnp.where(near, p * (_second_order(inner) - inner), q - p)


def centred(slope: Array, weight: Array, mean: Array) -> Array:
    """``slope - weight * mean``: a derivative by logits from one by probabilities.

    It is 0 where the weight is, whatever the slope; and in rows whose value is
    infinite, which have no finite derivative.
    """
    return jnp.where((weight > 0) & jnp.isfinite(mean), slope - weight * mean, 0)


def _second_order(x: Array) -> Array:
    """``x + exp(-x) - 1`` for ``|x| <= 1`` by its series, which starts at x²/2."""
    # The first term left out is below a quarter of the rounding error.
    last = 19 if x.dtype == jnp.float64 else 11
    total = jnp.zeros_like(x)
    for k in range(last, 1, -1):
        total = total * x + (-1) ** k / math.factorial(k)
    return x * x * total


def _pair(student: Array, teacher: Array, rows: Rows, offset: int = 0) -> Pair:
    """Recomputes p, q and x from the logits.

    ``offset`` is subtracted before exp and multiplied back after it. It changes no
    value; giving each pass over the classes another one keeps XLA from holding
    p and q, two arrays of the size of the logits, from one pass to the next.
    """
    lift = math.exp(offset)
    p = jnp.exp(teacher - rows.teacher_shift - offset) * (rows.teacher_scale * lift)
    q = jnp.exp(student - rows.student_shift - offset) * (rows.student_scale * lift)
    # The difference is taken first, so that it is exact where the two are close; a
    # slot that is -inf in both is out, and must not give inf - inf.
    difference = teacher - student
    difference = jnp.where(jnp.isnan(difference), 0, difference)
    x = difference - (rows.teacher_shift - rows.student_shift) + rows.log_ratio
    return Pair(p, q, x)


def _rows(
    student: Array, teacher: Array, student_shift: Array, teacher_shift: Array
) -> Rows:
    one, zero = jnp.ones_like(student_shift), jnp.zeros_like(student_shift)
    shifted = Rows(student_shift, teacher_shift, one, one, zero)
    pair = _pair(student, teacher, shifted)
    student_sum = pair.q.sum(-1, keepdims=True)
    teacher_sum = pair.p.sum(-1, keepdims=True)
    # A row without a single class left has no distribution; all its terms are 0.
    student_sum = jnp.where(student_sum > 0, student_sum, 1)
    teacher_sum = jnp.where(teacher_sum > 0, teacher_sum, 1)
    # log(student_sum / teacher_sum) would carry the rounding of two logarithms into
    # every x. Near equality the sum of the accurate gaps gives it relative accuracy.
    change = gap(*pair).sum(-1, keepdims=True) / teacher_sum
    near = jnp.abs(change) < 0.5
    log_ratio = jnp.where(
        near,
        jnp.log1p(jnp.where(near, change, 0)),
        jnp.log(student_sum) - jnp.log(teacher_sum),
    )
    return Rows(
        student_shift, teacher_shift, 1 / student_sum, 1 / teacher_sum, log_ratio
    )


Sums = tuple[Array, ...]
Hyper = tuple[Array, ...]


class Formula(NamedTuple):
    """A divergence, and its derivative by the logits of either side.

    Attributes:
      terms: ``(pair, *hyper)`` to arrays ``[..., V]`` that are summed over classes.
      value: their sums, each ``[...]``, to the divergence.
      student: ``(pair, sums, *hyper)`` to the derivative by the student's logits,
        ``[..., V]``; the sums come as ``[..., 1]``.
      teacher: the same by the teacher's.
    """

    terms: Callable[..., Sums]
    value: Callable[[Sums], Array]
    student: Callable[..., Array]
    teacher: Callable[..., Array]


def differentiable(formula: Formula) -> Callable[..., Array]:
    """Makes ``(student, teacher, student_shift, teacher_shift, *hyper) -> [...]``.

    The logits are already divided by the temperature; the shifts, ``[..., 1]``, are
    their largest entries. The written-out derivative serves reverse mode, forward
    mode and derivatives of itself. It is one elementwise pass over the classes, so it
    is as safe under a sharded batch or vocabulary as the sums are, and finite where
    differentiating through the logarithms would divide 0 by 0.
    """

    def sums(pair: Pair, *hyper: Array) -> Sums:
        return tuple(term.sum(-1) for term in formula.terms(pair, *hyper))

    @jax.custom_jvp
    def core(student, teacher, student_shift, teacher_shift, *hyper):
        rows = _rows(student, teacher, student_shift, teacher_shift)
        return formula.value(sums(_pair(student, teacher, rows, 1), *hyper))

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        student, teacher, student_shift, teacher_shift, *hyper = primals
        student_dot, teacher_dot, _, _, *hyper_dot = tangents
        rows = _rows(student, teacher, student_shift, teacher_shift)
        first = _pair(student, teacher, rows, 1)
        totals = sums(first, *hyper)
        second = _pair(student, teacher, rows, 2)
        columns = tuple(total[..., None] for total in totals)
        value = formula.value(totals)
        tangent = jnp.zeros_like(value)
        if not isinstance(student_dot, SymbolicZero):
            slope = formula.student(second, columns, *hyper)
            tangent += (slope * student_dot).sum(-1)
        if not isinstance(teacher_dot, SymbolicZero):
            slope = formula.teacher(second, columns, *hyper)
            tangent += (slope * teacher_dot).sum(-1)
        for index, number_dot in enumerate(hyper_dot):
            if not isinstance(number_dot, SymbolicZero):

                def of_number(number, index=index):
                    changed = (*hyper[:index], number, *hyper[index + 1 :])
                    return formula.value(sums(first, *changed))

                tangent += jax.jvp(of_number, (hyper[index],), (number_dot,))[1]
        return value, tangent

    core.defjvp(derivative, symbolic_zeros=True)
    return core


@functools.partial(jax.jit, static_argnums=0, inline=True)
def softened(
    core: Callable[..., Array],
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    where: ArrayLike | None,
    *hyper: ArrayLike,
) -> Array:
    """Applies a core to both sides' logits at a temperature, times temperature².

    Args:
      core: from :func:`differentiable`, or any function of its signature.
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: scalar, or one per position ``[...]``.
      where: classes that exist, ``[..., V]``, or ``None``.
      *hyper: further numbers for the core, shaped like the temperature.

    Returns:
      ``[...]``, float32 or wider.
    """
    dtype = jnp.promote_types(
        jnp.promote_types(
            jnp.result_type(student_logits), jnp.result_type(teacher_logits)
        ),
        jnp.float32,
    )
    temperature = jnp.asarray(temperature, dtype)
    numbers = (jnp.asarray(number, dtype) for number in hyper)
    numbers = tuple(n[..., None] if n.ndim else n for n in numbers)
    inverse = 1 / (temperature[..., None] if temperature.ndim else temperature)
    student, student_shift = scaled(student_logits, inverse, where, dtype)
    teacher, teacher_shift = scaled(teacher_logits, inverse, where, dtype)
    value = core(student, teacher, student_shift, teacher_shift, *numbers)
    return value * temperature**2


def scaled(
    logits: ArrayLike, inverse: Array, where: ArrayLike | None, dtype: Any
) -> tuple[Array, Array]:
    """Logits over the temperature, and the largest of each row, ``[..., 1]``."""
    logits = jnp.asarray(logits).astype(dtype)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    # The largest is taken before scaling: a bare reduction over what is in memory.
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shift = jnp.where(jnp.isneginf(largest), 0, largest) * inverse
    return _scale(logits, inverse), jax.lax.stop_gradient(shift)


@jax.custom_jvp
def _scale(logits: Array, inverse: Array) -> Array:
    return logits * inverse


@_scale.defjvp
def _scale_derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
    logits, inverse = primals
    logits_dot, inverse_dot = tangents
    # A slot that is -inf stays so at every temperature; -inf * 0 would be NaN.
    by_inverse = jnp.where(jnp.isneginf(logits), 0, logits) * inverse_dot
    return logits * inverse, logits_dot * inverse + by_inverse


def entropy_core(logits: Array, shift: Array) -> Array:
    """Entropy of the softmax of scaled logits, in nats, ``[...]``."""
    unnormalised = jnp.exp(logits - shift)
    total = unnormalised.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    held = unnormalised > 0
    log_p = jnp.where(held, logits, shift) - shift - jnp.log(total)
    return -jnp.where(held, unnormalised / total * log_p, 0).sum(-1)
