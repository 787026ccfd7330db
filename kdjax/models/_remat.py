"""Memory for time: activations that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array

from kdjax.types import Batch, Model, Outputs, PyTree


def remat(model: Model, policy: Callable[..., bool] | None = None) -> Model:
    """The same model, of whose forward pass only what a policy names is kept.

    The rest is computed again when gradients are. Networks of many equal layers keep
    less if they do so layer by layer (``nnx.remat``, ``linen.remat``); this does it for
    a network as it is.

    Args:
      model: of the student.
      policy: of :mod:`jax.checkpoint_policies`, such as ``dots_saveable`` or
        ``dots_with_no_batch_dims_saveable``; ``None`` keeps the inputs alone.

    Returns:
      A model with the same numbers, for :func:`~kdjax.make_train_step`.

    Example:
      >>> from kdjax import models
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((4, 3)))
      >>> student = remat(net.model, jax.checkpoint_policies.dots_saveable)
      >>> batch = {"x": jnp.eye(4)}
      >>> student.apply(net.params, {}, batch, rng=None, train=True)[0].logits.shape
      (4, 3)
    """

    def apply(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        rng: Array | None,
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        def run(
            params: PyTree, model_state: PyTree, batch: Batch, rng: Array | None
        ) -> tuple[Outputs, PyTree]:
            return model.apply(params, model_state, batch, rng=rng, train=train)

        return jax.checkpoint(run, policy=policy)(params, model_state, batch, rng)

    return model._replace(apply=apply)
