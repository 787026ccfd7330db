"""Teachers: what they are stored in, how they move, and that no gradient leaves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import models, objectives, teachers
from kdjax.types import LinearHead, Outputs
from tests.train import setups


@functools.cache
def noisy():
    """A network with BatchNorm and dropout, whose statistics are not their defaults."""
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)), features=["norm"])
    state = {"norm": {"mean": jnp.full(8, 0.5), "var": jnp.full(8, 2.0)}}
    return net._replace(model_state=state)


def zero(tree):
    return all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


def test_frozen_runs_in_evaluation_mode():
    net, batch = noisy(), setups.batch()
    teacher, frozen = teachers.frozen(net)
    run = jax.jit(teacher.outputs)
    got = run(frozen, (), batch)
    expected, _ = net.model.apply(
        net.params, net.model_state, batch, rng=None, train=False
    )
    np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-6)
    # One example at a time gives the same: no statistics of the batch, no dropout.
    alone = run(frozen, (), {name: array[:1] for name, array in batch.items()})
    np.testing.assert_allclose(alone.logits, got.logits[:1], rtol=1e-5)
    assert teacher.init(net.params, net.model_state) == ()
    assert teacher.update((), net.params, net.model_state, jnp.int32(0)) == ()


def test_frozen_dtype_casts_parameters_and_inputs_only():
    net = noisy()
    teacher, frozen = teachers.frozen(net, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_dtypes(
        frozen["params"], jax.tree.map(jnp.bfloat16, net.params)
    )
    assert frozen["model_state"] is net.model_state
    assert {leaf.dtype for leaf in jax.tree.leaves(net.params)} == {jnp.float32.dtype}

    seen = {}

    def spy(params, batch):
        seen.update({name: array.dtype for name, array in batch.items()})
        return batch["x"] @ params

    spied, arrays = teachers.frozen(
        models.from_apply(spy, jnp.ones((setups.WIDTH, 3))), dtype=jnp.bfloat16
    )
    jax.eval_shape(spied.outputs, arrays, (), setups.batch())
    assert seen == {"x": jnp.bfloat16, "label": jnp.int32, "mask": jnp.bool_}

    # Half as many bytes to multiply, all the way to the logits.
    outputs = jax.eval_shape(teacher.outputs, frozen, (), setups.batch())
    assert outputs.logits.dtype == jnp.bfloat16


def test_frozen_without_dtype_leaves_everything():
    net = noisy()
    _, frozen = teachers.frozen(net)
    assert frozen["params"] is net.params
    assert frozen["model_state"] is net.model_state


def test_loss_of_a_bfloat16_teacher_is_in_float32():
    # The student is the same network in float32: what is left is the rounding of
    # bfloat16, 2**-9 of logits of size 1, squared.
    net, batch = noisy(), setups.batch()
    teacher, frozen = teachers.frozen(net, dtype=jnp.bfloat16)
    soft = objectives.soft_labels()

    @jax.jit
    def mean(frozen, batch):
        student, _ = net.model.apply(
            net.params, net.model_state, batch, rng=None, train=False
        )
        target = teacher.outputs(frozen, (), batch)
        terms, _ = soft.apply({}, {}, student, target, batch, jnp.int32(0))
        return terms["soft"].mean

    loss = mean(frozen, batch)
    assert loss.total.dtype == jnp.float32
    assert 0 < float(loss.value()) < 1e-4


def test_outputs_carry_no_gradient():
    # Neither of the teacher's arrays nor of its state, through logits, heads and
    # features; and none back to the inputs.
    def apply(params, batch):
        hidden = batch["x"] @ params["w"]
        head = LinearHead(hidden, params["head"], soft_cap=2.0)
        return Outputs(head, {"hidden": hidden})

    params = {"w": jnp.ones((2, 3)), "head": jnp.ones((3, 4))}
    net = models.from_apply(apply, params)
    batch = {"x": jnp.ones((5, 2))}

    def total(outputs):
        return outputs.dense_logits().sum() + outputs.features["hidden"].sum()

    def of_frozen(teacher, arrays, batch):
        return total(teacher.outputs(arrays, (), batch))

    def of_state(teacher, state, batch):
        return total(teacher.outputs({}, state, batch))

    teacher, frozen = teachers.frozen(net)
    assert zero(jax.grad(of_frozen, (1, 2))(teacher, frozen, batch))
    teacher, _ = teachers.ema(net)
    state = teacher.init(params, {})
    assert zero(jax.grad(of_state, (1, 2))(teacher, state, batch))
    # Without the teacher in between there is one.
    open_ = jax.grad(
        lambda p: total(net.model.apply(p, {}, batch, rng=None, train=False)[0])
    )
    assert not zero(open_(params))


def test_ema_follows_a_schedule_of_the_step():
    net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.zeros(1))
    teacher, frozen = teachers.ema(net, decay=optax.linear_schedule(0.0, 1.0, 4))
    assert frozen == {}
    average = teacher.init(jnp.zeros(1), {})
    update = jax.jit(teacher.update)
    expected = 0.0
    for step in range(5):
        student = float(step + 1)
        expected = step / 4 * expected + (1 - step / 4) * student
        average = update(average, jnp.full(1, student), {}, jnp.int32(step))
        np.testing.assert_allclose(average["params"], [expected], rtol=1e-6)
    # At the end the decay is 1: the student no longer reaches it.
    assert expected != 5.0


def test_ema_starts_from_the_student_and_averages_its_statistics():
    net = noisy()
    teacher, _ = teachers.ema(net, decay=0.75)
    average = teacher.init(net.params, net.model_state)
    chex.assert_trees_all_equal(
        average, {"params": net.params, "model_state": net.model_state}
    )
    statistics = {"norm": {"mean": jnp.full(8, 4.5), "var": jnp.full(8, 6.0)}}
    moved = teacher.update(
        average, jax.tree.map(jnp.zeros_like, net.params), statistics, jnp.int32(0)
    )
    # 3/4 of the old and a quarter of the new.
    expected = {"mean": np.full(8, 1.5), "var": np.full(8, 3.0)}
    chex.assert_trees_all_close(moved["model_state"]["norm"], expected, rtol=1e-6)
    chex.assert_trees_all_close(
        moved["params"], jax.tree.map(lambda x: 0.75 * x, net.params), rtol=1e-6
    )


def test_ema_runs_the_average_and_not_the_student():
    net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((2, 3)))
    teacher, frozen = teachers.ema(net)
    average = {"params": jnp.full((2, 3), 5.0), "model_state": {}}
    outputs = teacher.outputs(frozen, average, {"x": jnp.ones((1, 2))})
    np.testing.assert_array_equal(outputs.logits, [[10.0, 10.0, 10.0]])


@pytest.mark.parametrize("decay", [0.999, lambda step: jnp.float32(0.999)])
def test_ema_of_a_student_in_bfloat16_reaches_it(decay):
    # In bfloat16 1.0 * 0.999 + 2.0 * 0.001 is 1.0, however often.
    net = models.from_apply(lambda w, batch: batch["x"] * w, jnp.ones(2, jnp.bfloat16))
    teacher, frozen = teachers.ema(net, decay=decay)
    start = teacher.init(net.params, {"calls": jnp.int32(3)})
    moved = jax.lax.fori_loop(
        0,
        5000,
        lambda step, average: teacher.update(
            average, 2 * net.params, {"calls": jnp.int32(6)}, step
        ),
        start,
    )
    chex.assert_trees_all_equal_dtypes(moved, start)
    np.testing.assert_allclose(moved["params"], 2 - 0.999**5000, rtol=1e-4)
    assert int(moved["model_state"]["calls"]) == 6
    shown = teacher.outputs(frozen, moved | {"model_state": {}}, {"x": net.params})
    assert shown.logits.dtype == jnp.bfloat16


def test_refuses_settings_out_of_range():
    net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.zeros(1))
    for decay in (1.0, 1, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"decay: got .*expected a number in \[0"):
            teachers.ema(net, decay=decay)
    teachers.ema(net, decay=0.0)
    for dtype in (jnp.int8, bool):
        with pytest.raises(TypeError, match=r"dtype: got .*floating-point"):
            teachers.frozen(net, dtype=dtype)
