"""Methods on the logits of the data's tokens: the teacher says what comes next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax import Array

from experiments.lm.methods.setup import Method, Recipe, Setup, of_data
from kdjax import Objective, losses
from kdjax.objectives import hard_labels, soft_labels


def alone(setup: Setup) -> Recipe:
    """The student by itself: cross-entropy with the next token."""
    return Recipe(of_data(hard_labels()))


def soft(setup: Setup) -> Objective:
    """Forward KL, which methods have beside a term of their own."""
    return of_data(soft_labels(temperature=setup.temperature))


def _divergence(loss: Callable[..., Array], **hyperparameters: Any) -> Method:
    def method(setup: Setup) -> Recipe:
        term = soft_labels(
            loss,
            temperature=setup.temperature,
            chunk_size=setup.chunk_size,
            **hyperparameters,
        )
        return Recipe(of_data(term))

    return method


def _mixed(setup: Setup) -> Recipe:
    loss = functools.partial(losses.knowledge_distillation, alpha=0.5)
    term = soft_labels(
        loss,
        labels="label",
        temperature=setup.temperature,
        chunk_size=setup.chunk_size,
    )
    return Recipe(of_data(term))


LOGITS: dict[str, Method] = {
    "forward_kl": _divergence(losses.forward_kl),
    "mixed": _mixed,
    "reverse_kl": _divergence(losses.reverse_kl),
    "jensen_shannon": _divergence(losses.jensen_shannon, beta=0.5),
    "skew_kl": _divergence(losses.skew_kl, skew=0.1),
    "skew_reverse_kl": _divergence(losses.skew_reverse_kl, skew=0.1),
}
"""By name."""
