"""The step where numbers are narrow, masked, or not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kdjax import losses, models, objectives, teachers
from kdjax.train import (
    init_state,
    make_train_step,
)
from tests.train import setups


def test_many_micro_batches_add_up_in_bfloat16():
    # In bfloat16, parts of 1/256 would stop to count from 1 on.
    net = models.from_apply(lambda w, batch: batch["x"] * w, jnp.zeros(1, jnp.bfloat16))
    teacher, frozen = teachers.frozen(net._replace(params=jnp.ones(1, jnp.bfloat16)))
    goal = objectives.soft_labels(losses.logit_mse)
    batch = {"x": np.ones((1024, 1), np.float32)}
    parts = teacher, goal, optax.sgd(1.0)
    state = init_state(net, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0))
    step = make_train_step(net.model, *parts, accumulate=1024)
    state, metrics = jax.jit(step)(state, frozen, batch)
    assert float(metrics["grad_norm"].value()) == 2.0
    assert state.params["student"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.params["student"], [2.0])


def test_a_large_gradient_in_float16_is_finite():
    def apply(w, batch):
        return batch["x"].astype(jnp.float16) * w

    net = models.from_apply(apply, jnp.zeros(1, jnp.float16))
    teacher, frozen = teachers.frozen(net._replace(params=jnp.ones(1, jnp.float16)))
    parts = teacher, objectives.soft_labels(losses.logit_mse), optax.sgd(1e-6)
    batch = {"x": np.full((4, 1), 20.0, np.float32)}
    state = init_state(net, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0))
    _, metrics = jax.jit(make_train_step(net.model, *parts))(state, frozen, batch)
    assert float(metrics["grad_norm"].value()) == 800.0
    assert float(metrics["skipped"].value()) == 0


def test_everything_masked_changes_nothing():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net, optax.sgd(1.0))
    batch = setups.batch() | {"mask": np.zeros(setups.EXAMPLES, bool)}
    after, metrics = jax.jit(step)(state, frozen, batch)
    assert float(metrics["loss"].value()) == 0.0
    assert float(metrics["grad_norm"].value()) == 0.0
    chex.assert_trees_all_equal(after.params, state.params)


def test_masked_examples_reach_nothing_however_large():
    # What is NaN would come back through the network itself, as 0 * NaN; such a step
    # is skipped.
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net, optax.sgd(1.0))
    jitted = jax.jit(step)
    batch = setups.batch()
    poisoned = dict(batch, x=np.where(batch["mask"][:, None], batch["x"], 1e30))
    clean, _ = jitted(state, frozen, batch)
    dirty, _ = jitted(state, frozen, poisoned)
    chex.assert_trees_all_close(dirty.params, clean.params, rtol=1e-6)


def test_non_finite_step_changes_nothing_but_the_counters():
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net)
    batch = setups.batch()
    batch["x"][batch["mask"].argmax()] = np.nan
    after, metrics = jax.jit(step)(state, frozen, batch)
    assert int(after.step) == 1
    assert int(after.skipped) == 1
    assert float(metrics["skipped"].value()) == 1.0
    assert not np.isfinite(float(metrics["soft"].value()))
    for name in ("params", "model_state", "opt_state", "rng"):
        chex.assert_trees_all_equal(
            setups.bits(getattr(after, name)), setups.bits(getattr(state, name))
        )


def test_a_term_that_a_schedule_leaves_out_may_be_infinite():
    def without_first(w, batch):
        return (batch["x"] @ w).at[:, 0].set(-jnp.inf)

    student = models.from_apply(without_first, jnp.zeros((2, 3)))
    whole = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((2, 3)))
    teacher, frozen = teachers.frozen(whole)
    goal = objectives.combine(
        objectives.hard_labels(),
        objectives.soft_labels(weight=lambda step: jnp.where(step < 1, 0.0, 1.0)),
    )
    optimizer = optax.sgd(0.1)
    batch = {"x": jnp.ones((4, 2)), "label": jnp.array([1, 2, 1, 1])}
    state = init_state(
        student,
        teacher,
        goal,
        optimizer,
        frozen=frozen,
        batch=batch,
        rng=jax.random.key(0),
    )
    step = jax.jit(make_train_step(student.model, teacher, goal, optimizer))
    state, metrics = step(state, frozen, batch)
    assert np.isposinf(metrics["soft"].value())
    assert np.isfinite(metrics["loss"].value())
    assert int(state.skipped) == 0
    assert np.abs(state.params["student"]).max() > 0
    state, metrics = step(state, frozen, batch)
    assert np.isposinf(metrics["loss"].value())
    assert int(state.skipped) == 1
