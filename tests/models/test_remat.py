"""Activations that are computed again: the same numbers, and fewer of them kept."""

import jax
import numpy as np
import pytest
from flax import nnx

from kdjax import models
from tests.train import setups

POLICIES = jax.checkpoint_policies


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, POLICIES.dots_saveable])
def test_training_is_the_same(policy):
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))
    ends = []
    for model in (net.model, models.remat(net.model, policy)):
        state, frozen, step = setups.training(net._replace(model=model))
        jitted = jax.jit(step)
        for seed in range(2):
            state, metrics = jitted(state, frozen, setups.batch(seed))
        ends.append((state.params, state.model_state, metrics))
    # Dropout, drawn again, is the same; sums may be fused otherwise.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *ends
    )


def kept(model, net):
    """Elements that a forward pass keeps for the backward one."""
    batch = setups.batch()

    def total(params):
        outputs, _ = model.apply(
            params, net.model_state, batch, rng=jax.random.key(0), train=True
        )
        return outputs.logits.sum()

    pull = jax.eval_shape(lambda params: jax.vjp(total, params)[1], net.params)
    return sum(leaf.size for leaf in jax.tree.leaves(pull))


def test_a_policy_says_what_is_kept():
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))
    whole, dots, none = (
        kept(model, net)
        for model in (
            net.model,
            models.remat(net.model, POLICIES.dots_saveable),
            models.remat(net.model),
        )
    )
    assert none < dots < whole
