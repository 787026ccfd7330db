"""Plain functions as models, for those who use no framework."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jax import Array

from kdjax.models._outputs import as_outputs
from kdjax.types import Adapted, Batch, Model, Outputs, PyTree


def from_apply(apply: Callable[..., Any], params: PyTree) -> Adapted:
    """Takes a function of parameters and a batch.

    A network with a state of its own (batch statistics) is given as a
    :class:`~kdjax.types.Model` directly.

    Args:
      apply: ``apply(params, batch)``, returning logits ``[..., V]``, a
        :class:`~kdjax.types.LinearHead` or an :class:`~kdjax.types.Outputs`. If it
        has keyword arguments ``rng`` or ``train``, it gets them.
      params: a tree of arrays.

    Returns:
      The model, its parameters and an empty state.

    Raises:
      TypeError: the function returns something else (when it is traced).

    Example:
      >>> net = from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((4, 3)))
      >>> batch = {"x": jnp.ones((2, 4))}
      >>> outputs, _ = net.model.apply(net.params, {}, batch, rng=None, train=True)
      >>> outputs.logits.shape
      (2, 3)
    """
    taken = inspect.signature(apply).parameters

    def pure(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        rng: Array | None,
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        offered = {"rng": rng, "train": train}
        asked = {name: value for name, value in offered.items() if name in taken}
        return as_outputs(apply(params, batch, **asked), {}), model_state

    return Adapted(Model(pure), params, {})
