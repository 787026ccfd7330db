"""The step: exactness, equality of frameworks, the frozen teacher."""

import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import losses, models, objectives, teachers
from kdjax.train import (
    init_state,
    make_mesh,
    make_train_step,
    place,
    place_step,
)
from kdjax.types import Mean
from tests.marks import rest_slow
from tests.train import setups

GOLDEN = Path(__file__).parents[1] / "golden"


def run(step, state, frozen, steps, **options):
    """Some steps on different batches; losses and the last state."""
    values = []
    for index in range(steps):
        state, metrics = step(state, frozen, setups.batch(index, **options))
        values.append(metrics["loss"].value())
    return np.asarray(values), state


def test_frameworks_give_the_same_bits():
    # The same arrays in NNX, Linen and bare functions, over 5 Adam steps.
    module = setups.Mlp(rngs=nnx.Rngs(0))
    from_nnx = models.from_nnx(module)
    from_linen = models.from_linen(setups.LinenMlp(), {"params": from_nnx.params})
    from_apply = models.from_apply(setups.bare_mlp, from_nnx.params)
    results = []
    for net in (from_nnx, from_linen, from_apply):
        state, frozen, step = setups.training(net)
        values, state = run(jax.jit(step), state, frozen, 5)
        results.append((values, setups.bits(state.params)))
    for values, params in results[1:]:
        np.testing.assert_array_equal(values, results[0][0])
        chex.assert_trees_all_equal(params, results[0][1])


@pytest.mark.parametrize(
    ("accumulate", "devices"),
    [
        (4, 1),
        (2, 4),
        *(
            pytest.param(accumulate, devices, marks=pytest.mark.slow)
            for accumulate in (1, 2, 4)
            for devices in (1, 2, 4)
            if (accumulate, devices) not in {(4, 1), (2, 4)}
        ),
    ],
)
def test_accumulation_and_devices_equal_one_batch(accumulate, devices):
    # Masks are ragged: every micro-batch on every device has another count.
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    sgd = optax.sgd(0.5)
    state, frozen, step = setups.training(net, sgd)
    values, expected = run(jax.jit(step), state, frozen, 3)

    state, frozen, step = setups.training(net, sgd, accumulate=accumulate)
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    placed = place_step(step, mesh, state=state, frozen=frozen)
    state, frozen = place(state, mesh), place(frozen, mesh)
    got, actual = run(placed, state, frozen, 3)
    np.testing.assert_allclose(got, values, rtol=1e-6)
    chex.assert_trees_all_close(actual.params, expected.params, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("accumulate", rest_slow([1, 2], lambda number: number > 1))
def test_shard_map_equals_one_device(accumulate):
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net, optax.sgd(0.5))
    values, expected = run(jax.jit(step), state, frozen, 3)

    state, frozen, step = setups.training(
        net, optax.sgd(0.5), accumulate=accumulate, axis_name="data"
    )
    spec = jax.sharding.PartitionSpec
    mesh = make_mesh({"data": 8})
    sharded = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(spec(), spec(), spec("data")),
            out_specs=(spec(), spec()),
            check_vma=False,
        )
    )
    got, actual = run(sharded, state, frozen, 3)
    np.testing.assert_allclose(got, values, rtol=1e-6)
    chex.assert_trees_all_close(actual.params, expected.params, rtol=1e-6, atol=1e-6)


def test_accumulation_runs_the_forward_pass_once():
    # The pass that counts must not multiply matrices: the compiler drops it.
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))

    def products(accumulate):
        state, frozen, step = setups.training(net, accumulate=accumulate)
        text = jax.jit(step).lower(state, frozen, setups.batch()).compile().as_text()
        return len(re.findall(r" dot\(|__onednn|custom-call.*matmul|ynn.*dot", text))

    assert products(1) > 0
    assert products(2) <= products(1)


def test_frozen_teacher_stays_bit_equal_and_out_of_the_state():
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))
    teacher_net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(3)))
    state, frozen, step = setups.training(net, teacher_net=teacher_net)
    before = setups.bits(frozen)
    jitted = jax.jit(step, donate_argnums=0)
    statistics = setups.bits(state.model_state)
    _, state = run(jitted, state, frozen, 5)
    chex.assert_trees_all_equal(setups.bits(frozen), before)
    # The student's own did move, so the test could have failed.
    moved = setups.bits(state.model_state)
    assert any((a != b).any() for a, b in zip(moved, statistics, strict=True))
    assert state.teacher_state == ()
    # Adam holds two copies of the student and nothing of the teacher.
    student = sum(leaf.size for leaf in jax.tree.leaves(state.params["student"]))
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert held == 2 * student + 1


def test_teacher_gets_no_gradient():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    teacher, frozen = teachers.frozen(net)

    def total(arrays):
        return teacher.outputs(arrays, (), setups.batch()).logits.sum()

    gradients = jax.grad(total, allow_int=True)(frozen)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_weights_are_not_compiled_into_the_program():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net)
    batch = setups.batch()
    assert not jax.make_jaxpr(step)(state, frozen, batch).consts
    # Those of a teacher that is closed over would be.
    closed = jax.make_jaxpr(lambda state, batch: step(state, frozen, batch))
    assert len(closed(state, batch).consts) >= len(jax.tree.leaves(frozen["params"]))


def test_state_that_starts_from_the_teacher_can_be_donated():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net, teacher_net=net)
    state, metrics = jax.jit(step, donate_argnums=0)(state, frozen, setups.batch())
    assert float(metrics["soft"].value()) < 1e-12
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(net.params))


def test_schedules_follow_optimizer_steps_under_accumulation():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    goal = objectives.combine(
        objectives.soft_labels(weight=lambda step: 1.0 + step.astype(jnp.float32))
    )
    state, frozen, step = setups.training(net, optax.sgd(0.0), goal=goal, accumulate=4)
    jitted = jax.jit(step)
    for number in range(3):
        state, metrics = jitted(state, frozen, setups.batch())
        ratio = metrics["loss"].value() / metrics["soft"].value()
        np.testing.assert_allclose(ratio, 1.0 + number, rtol=1e-6)


def test_dropout_draws_anew_every_step_and_in_every_layer():
    seen = []

    class Spy(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return jnp.stack([self.first(x), self.second(x)])

    net = models.from_nnx(Spy(nnx.Rngs(0)))
    for key in (1, 2):
        rng = jax.random.key(key)
        batch = {"x": jnp.ones((4, 32))}
        outputs, _ = net.model.apply(
            net.params, net.model_state, batch, rng=rng, train=True
        )
        seen += [outputs.logits[0], outputs.logits[1]]
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            assert (one != other).any()


def test_ema_teacher_follows_the_student():
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))
    teacher, frozen = teachers.ema(net, decay=optax.constant_schedule(0.75))
    optimizer = optax.sgd(0.1)
    goal = setups.objective()
    state = init_state(
        net,
        teacher,
        goal,
        optimizer,
        frozen=frozen,
        batch=setups.batch(),
        rng=jax.random.key(0),
    )
    step = jax.jit(make_train_step(net.model, teacher, goal, optimizer))
    after, _ = step(state, frozen, setups.batch())
    expected = jax.tree.map(
        lambda old, new: 0.75 * old + 0.25 * new,
        {"params": state.params["student"], "model_state": state.model_state},
        {"params": after.params["student"], "model_state": after.model_state},
    )
    chex.assert_trees_all_close(after.teacher_state, expected, rtol=1e-6)


def test_linear_student_of_the_cpp_program():
    # 50 epochs of plain SGD in float64, through make_train_step; the program adds
    # 1e-12 inside its logarithms, which moves a loss by less than 1e-10.
    golden = json.loads((GOLDEN / "cpp_linear_student.json").read_text())
    hyper = golden["hyperparameters"]
    with jax.enable_x64(True):
        x, labels = np.array(golden["X"]), np.array(golden["labels"], np.int32)

        def linear(weights, batch):
            return batch["x"] @ weights

        student = models.from_apply(linear, np.array(golden["W_s_initial"]))
        teacher_net = models.from_apply(linear, np.array(golden["W_hidden"]))
        teacher, frozen = teachers.frozen(teacher_net)
        goal = objectives.soft_labels(
            losses.knowledge_distillation,
            labels="label",
            temperature=hyper["tau"],
            alpha=hyper["alpha"],
        )
        optimizer = optax.sgd(hyper["lr"])
        size = hyper["batch_size"]
        batches = [
            {"x": x[i : i + size], "label": labels[i : i + size]}
            for i in range(0, hyper["N"], size)
        ]
        state = init_state(
            student,
            teacher,
            goal,
            optimizer,
            frozen=frozen,
            batch=batches[0],
            rng=jax.random.key(0),
        )
        step = jax.jit(make_train_step(student.model, teacher, goal, optimizer))
        epochs = []
        for _ in range(hyper["epochs"]):
            values = []
            for batch in batches:
                state, metrics = step(state, frozen, batch)
                values.append(float(metrics["loss"].value()))
            epochs.append(np.mean(values))
        weights = np.asarray(state.params["student"])
    np.testing.assert_allclose(epochs, golden["epoch_losses"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(weights, golden["W_s_final"], rtol=0, atol=1e-12)
    assert ((x @ weights).argmax(-1) == labels).sum() == 195


@pytest.mark.parametrize(
    "optimizer", [optax.contrib.prodigy(), optax.contrib.dog(), optax.contrib.cocob()]
)
def test_states_of_optimizers_that_keep_parameters_can_be_donated(optimizer):
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net, optimizer)
    state, _ = jax.jit(step, donate_argnums=0)(state, frozen, setups.batch())
    assert int(state.step) == 1


def test_metrics_are_means_over_what_counts():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(net)
    batch = setups.batch()
    _, metrics = jax.jit(step)(state, frozen, batch)
    assert all(isinstance(mean, Mean) for mean in metrics.values())
    assert int(metrics["soft"].count) == batch["mask"].sum()
    assert int(metrics["hard"].count) == (batch["mask"] & (batch["label"] >= 0)).sum()
    expected = 0.3 * metrics["hard"].value() + 0.7 * metrics["soft"].value()
    np.testing.assert_allclose(metrics["loss"].value(), expected, rtol=1e-6)
