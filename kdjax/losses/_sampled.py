"""Targets drawn at random from the teacher, whose sums are unbiased."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kdjax.losses import _checks, _target_checks
from kdjax.losses._labels import weighted
from kdjax.losses._slots import at_slots, below_top, log_softmax, slots_of
from kdjax.types import SampledTargets


@functools.partial(jax.jit, inline=True, static_argnames=("samples", "temperature"))
def _sampled_targets(
    keys: Array,
    teacher_logits: Array,
    proposal_temperature: Array,
    *,
    samples: int,
    temperature: float,
) -> SampledTargets:
    log_probs = log_softmax(below_top(teacher_logits, temperature))
    proposal = log_softmax(below_top(log_probs, proposal_temperature))
    *batch, classes = proposal.shape

    def draw(key: Array, probabilities: Array) -> Array:
        return jax.random.choice(key, classes, (samples,), p=probabilities)

    rows = jnp.exp(proposal).reshape(math.prod(batch), classes)
    indices = jax.vmap(draw)(keys.reshape(-1), rows).reshape(*batch, samples)
    drawn = at_slots(log_probs, indices)
    # In a row without a class nothing could be drawn.
    used, _ = slots_of(indices, drawn, classes)
    ratios = jnp.where(used, drawn, 0) - jnp.where(used, at_slots(proposal, indices), 0)
    weights = jnp.where(used, jnp.exp(ratios) / samples, 0)
    return SampledTargets(indices, weights, drawn, temperature)


def sampled_targets(
    rng: Array,
    teacher_logits: Float[Array, "*batch V"],
    samples: int,
    *,
    temperature: float = 1.0,
    proposal_temperature: float | Array = 1.0,
) -> SampledTargets:
    r"""Draws classes from the teacher, with weights that make every sum unbiased.

    .. math:: i_1 \dots i_n \sim r \propto p^{1 / \tau_r}, \quad
       w_j = \frac{p_{i_j}}{n \, r_{i_j}}, \quad
       \mathbb{E} \sum_j w_j f(i_j) = \sum_v p_v f(v)

    A dozen samples keep what the largest hundred classes cannot: the mean of the
    student's gradient.

    Args:
      rng: a key of ``jax.random.key``, which is split over the positions; or one for
        each position, ``[...]``, as for :func:`kdjax.fused.token_map`.
      teacher_logits: unnormalised log-probabilities, ``[..., V]``.
      samples: how many draws per position; the same class may be drawn again.
      temperature: softens the teacher, and later the student; positive.
      proposal_temperature: of the distribution that is drawn from, on top of
        ``temperature``; above 1 it visits unlikely classes more often, and weighs them
        less.

    Returns:
      The targets: ``samples`` indices, weights and log-probabilities per position.
      Weights are 1 / samples at ``proposal_temperature=1``; else they sum to 1 only in
      the mean, and dividing by their sum would bias them.

    Raises:
      ValueError: ``samples`` is below 1, a temperature is not positive, or keys that
        are neither one nor one per position.
      TypeError: logits that are not floating, ``rng`` that is no key, or ``samples``
        and ``temperature`` that are no Python numbers.

    Example:
      >>> logits = jnp.log(jnp.array([0.5, 0.5, 0.0]))
      >>> sampled_targets(jax.random.key(0), logits, 4).weights
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)

    Reference:
      Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs, 2025, Random Sampling Knowledge Distillation. arXiv:2503.16870
    """
    _checks.floating(teacher_logits=teacher_logits)
    _checks.whole(samples=samples)
    _target_checks.python_number(temperature=temperature)
    _checks.positive(proposal_temperature=proposal_temperature)
    _checks.scale((), proposal_temperature=proposal_temperature)
    batch = jnp.shape(teacher_logits)[:-1]
    _target_checks.keys(batch, rng=rng)
    return _sampled_targets(
        rng if rng.shape == batch else jax.random.split(rng, batch),
        teacher_logits,
        proposal_temperature,
        samples=samples,
        temperature=float(temperature),
    )


@functools.partial(jax.jit, inline=True)
def _sampled_forward_kl(student_logits: Array, targets: SampledTargets) -> Array:
    log_q = log_softmax(below_top(student_logits, targets.temperature))
    used, slots = slots_of(targets.indices, targets.log_probs, log_q.shape[-1])
    gaps = jnp.where(used, targets.log_probs - at_slots(log_q, slots), 0)
    total = weighted(jnp.where(used, targets.weights, 0), gaps).sum(-1)
    return total * targets.temperature**2


def sampled_forward_kl(
    student_logits: Float[Array, "*batch V"], targets: SampledTargets
) -> Float[Array, "*batch"]:
    r"""Estimates the forward KL and its gradient from classes drawn at random.

    .. math:: \tau^2 \sum_j w_j (\log p_{i_j} - \log q_{i_j})

    Value and gradient are unbiased: their means over the draws are those of
    :func:`forward_kl`. Of one draw, the value may be negative, and the gradient is not
    0 where student and teacher agree.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      targets: the teacher's, from :func:`sampled_targets` or a cache of it; they also
        say the temperature.

    Returns:
      One value per position, ``[...]``: 0 where no slot is used, +inf where the student
      excludes a class that was drawn, and, under ``jax.jit``, NaN where an index is out
      of range.

    Raises:
      ValueError: shapes do not fit, or an index is out of range (where it can be seen).
      TypeError: ``targets`` is no ``SampledTargets``, or a dtype is wrong.

    Example:
      >>> logits = jnp.log(jnp.array([0.8, 0.2]))
      >>> targets = sampled_targets(jax.random.key(0), logits, 1)
      >>> float(targets.indices[0]), sampled_forward_kl(jnp.zeros(2), targets).item()
      (0.0, 0.4700036)

    Reference:
      Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs, 2025, Random Sampling Knowledge Distillation. arXiv:2503.16870
    """
    _target_checks.sampled(student_logits, targets)
    return _sampled_forward_kl(student_logits, targets)
