"""The sums and derivatives of KL(teacher ‖ student), which losses of it share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.losses._pairs import (
    Formula,
    Sums,
    Tops,
    centred,
    excess,
    pair_of,
    power_sums,
    rule,
    total,
)
from kdjax.losses._rows import MOST, Blocks, by_rows, state, traced_once

FORWARD = Formula(
    terms=lambda pair: (excess(pair.p, pair.q, pair.x),),
    value=lambda totals: totals[0],
    student=lambda pair, totals: pair.gap,
    teacher=lambda pair, totals: centred(pair.x, pair.p, totals[0]),
    scores=lambda x: (x,),
)


# A divergence from which on the rounding of the sums of the powers does not show.
_FAR = 0.5


@traced_once
def rough_divergence(
    sums: Sums, student: Array, teacher: Array, inverse: Array
) -> Sums:
    """Adds the divergence to :func:`~kdjax.losses._pairs.power_sums`, as E_p[x].

    Right where it is :func:`far`, since the positive terms then outweigh the others.
    """
    # Else XLA puts the sums of the powers off to this pass, and this one to a third.
    sums = jax.lax.optimization_barrier(sums)._replace(shifts=sums.shifts)
    p, _, x, _ = pair_of(sums, student, teacher, inverse)
    mean = total(jnp.where(p == 0, 0, p * x))
    return sums._replace(value=mean, totals=(mean,))


def far(sums: Sums) -> Array:
    """Whether a rough divergence is right, ``[..., 1]``; not so where it is NaN."""
    return sums.value >= _FAR


@traced_once
def refined(sums: Sums, student: Array, teacher: Array, inverse: Array) -> Sums:
    """The divergence near equality too, from the rough one.

    The log ratio of rounded sums is good enough to begin with: to first order, the
    sum of these terms does not depend on it. How far off it was is seen at the end, as
    the sum of ``q - p``, which is the difference of the two divergences. That saves
    the first pass a series, but derivatives have to wait for this one.
    """
    p, q, x, _ = pair_of(sums, student, teacher, inverse)
    value = total(excess(p, q, x))
    off_by = value - sums.value
    # Rounding must not leave less than nothing; a NaN stays one.
    value = jnp.maximum(value - off_by**2 / 2, 0)
    value = jnp.where(far(sums), sums.value, value)
    log_ratio = jnp.where(far(sums), sums.log_ratio, sums.log_ratio + off_by)
    return sums._replace(value=value, log_ratio=log_ratio, totals=(value,))


def near_enough(sums: Sums) -> Array:
    """Whether the shifts were, for rows ``[..., 1]``; not so where a sum is NaN."""
    return jnp.minimum(sums.student_scale, sums.teacher_scale) * MOST > 1


def _sums_in_blocks(tops: Tops, *inputs: Array) -> tuple[Sums, Array]:
    sums = rough_divergence(power_sums(tops, *inputs), *inputs)
    return sums, state(near_enough(sums), far(sums))


forward_rule = rule(FORWARD, Blocks(_sums_in_blocks, refined))
forward_core = by_rows(forward_rule)


def reverse_core(student: Array, teacher: Array, inverse: Array) -> Array:
    """KL(student ‖ teacher) is the forward one with the sides exchanged."""
    return forward_core(teacher, student, inverse)
