"""Projectors in training: learnt, sharded, saved; the teacher beside them stays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from kdjax import losses, models, objectives, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import batches
from kdjax.objectives import projectors
from kdjax.train import init_state, make_mesh, make_train_step, place, place_step
from tests.train import setups

# The middle layers of teacher and student by name, which are not alike.
PAIR = {"student": "hidden", "teacher": "norm"}


@pytest.fixture(scope="module")
def training():
    student = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)), features=("hidden",))
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(3)), features=("norm",))
    teacher, frozen = teachers.frozen(net)
    objective = objectives.combine(
        objectives.hard_labels(),
        objectives.features(losses.feature_mse, **PAIR, projector=projectors.mlp(4)),
    )
    parts = teacher, objective, optax.adam(1e-2)
    state = init_state(
        student, *parts, frozen=frozen, batch=setups.batch(), rng=jax.random.key(1)
    )
    return state, frozen, make_train_step(student.model, *parts)


def projector_of(params):
    """That of the objective's second term."""
    return params["objective"]["1"]["projector"]


def test_learnt_and_saved_beside_a_teacher_whose_statistics_stand_still(
    training, tmp_path
):
    state, frozen, step = training
    before, start = setups.bits(frozen), projector_of(state.params)
    assert frozen["model_state"]["norm"]["mean"].size
    jitted = jax.jit(step)
    for seed in range(3):
        state, _ = jitted(state, frozen, setups.batch(seed))
    chex.assert_trees_all_equal(setups.bits(frozen), before)
    learnt = projector_of(state.params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), learnt, start)
    assert all(jax.tree.leaves(moved))
    # Adam holds moments of the projector too.
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.params)

    checkpoints = Checkpoints(tmp_path, config={})
    iterator = batches({"x": np.arange(4)}, batch_size=2, seed=0)
    checkpoints.save(3, state, iterator, {}, {})
    checkpoints.close()
    again = Checkpoints(tmp_path, config={})
    restored, _ = again.restore(training[0], iterator)
    again.close()
    chex.assert_trees_all_equal(setups.bits(restored), setups.bits(state))


def test_sharded_by_the_rules_as_all_else_and_the_same(training):
    state, frozen, step = training
    mesh = make_mesh({"data": 4, "model": 2})
    rules = [("objective/1/projector/.*/kernel", P(None, "model"))]
    placed = place_step(
        step, mesh, state=state, frozen=frozen, rules=rules, donate=False
    )
    sharded, expected, jitted = place(state, mesh, rules), state, jax.jit(step)
    for seed in range(2):
        sharded, _ = placed(sharded, place(frozen, mesh), setups.batch(seed))
        expected, _ = jitted(expected, frozen, setups.batch(seed))
    for params in (sharded.params, sharded.opt_state[0].mu):
        kernel = projector_of(params)["0"]["0"]["kernel"]
        assert [each.data.shape for each in kernel.addressable_shards] == [(8, 2)] * 8
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(projector_of(sharded.params)),
        jax.device_get(projector_of(expected.params)),
    )


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    "projector", [projectors.identity(), projectors.linear(), projectors.mlp(3)]
)
def test_one_example_never_reaches_another_through_a_projector(projector, pool):
    """Lesson: a feature projection that contracts batch and sequence."""
    rng = np.random.default_rng(0)
    first, second = (
        [jnp.float32(rng.normal(size=(4, side, side, 3))) for side in sides]
        for sides in [(8, 5) if pool else (5, 5)] * 2
    )
    params = projector.init(jax.random.key(0), 3, 3)

    def value(student, teacher):
        if pool:
            student, teacher = projectors.pooled(student, teacher)
        student = projector.apply(params, student)
        return losses.feature_mse(student, teacher).mean((1, 2))

    def run(features):
        rows, pull = jax.vjp(value, *features)
        return rows, *pull(jnp.ones_like(rows))

    mixed = [b.at[0].set(a[0]) for a, b in zip(first, second, strict=True)]
    run = jax.jit(run)
    for got, alone in zip(run(mixed), run(first), strict=True):
        assert (got[1:] != alone[1:]).any()
        np.testing.assert_allclose(got[0], alone[0], rtol=1e-6, atol=1e-7)
