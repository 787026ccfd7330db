"""The measured losses: kdjax's, and the same written with Optax's functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.nn import log_softmax
from optax.losses import kl_divergence_with_log_targets

from experiments.benchmarks.inputs import ALPHA, TEMPERATURE
from kdjax import losses

Loss = Callable[[Array, Array, Array], Array]


def _of_logits(loss: Callable[..., Array]) -> Loss:
    return lambda student, teacher, labels: loss(
        student, teacher, temperature=TEMPERATURE
    )


KDJAX: dict[str, Loss] = {
    "forward_kl": _of_logits(losses.forward_kl),
    "reverse_kl": _of_logits(losses.reverse_kl),
    "jensen_shannon": _of_logits(losses.jensen_shannon),
    "knowledge_distillation": functools.partial(
        losses.knowledge_distillation, temperature=TEMPERATURE, alpha=ALPHA
    ),
}


def _softened(logits: Array) -> Array:
    return log_softmax(logits / TEMPERATURE)


def _forward(student: Array, teacher: Array, labels: Array) -> Array:
    log_q, log_p = _softened(student), _softened(teacher)
    return TEMPERATURE**2 * kl_divergence_with_log_targets(log_q, log_p)


def _jensen_shannon(student: Array, teacher: Array, labels: Array) -> Array:
    log_q, log_p = _softened(student), _softened(teacher)
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    both = kl_divergence_with_log_targets(log_m, log_p)
    both += kl_divergence_with_log_targets(log_m, log_q)
    return TEMPERATURE**2 * both / 2


def _distillation(student: Array, teacher: Array, labels: Array) -> Array:
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels)
    return ALPHA * hard + (1 - ALPHA) * _forward(student, teacher, labels)


OPTAX: dict[str, Loss] = {
    "forward_kl": _forward,
    "reverse_kl": lambda student, teacher, labels: _forward(teacher, student, labels),
    "jensen_shannon": _jensen_shannon,
    "knowledge_distillation": _distillation,
}


def mean_and_gradient(loss: Loss) -> Callable[..., tuple[Array, Array]]:
    """``(student, teacher, labels)`` to the mean and its gradient by the student."""
    return jax.value_and_grad(lambda *arrays: loss(*arrays).mean())
