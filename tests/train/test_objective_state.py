"""What objectives train and remember: over meshes, micro-batches and checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from kdjax import losses, make_train_step, objectives, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import batches
from kdjax.objectives import projectors
from kdjax.train import init_state, place, place_step
from tests.objectives import tiny
from tests.train.setups import bits

P = PartitionSpec
RULES = (("objective_state/.*memory", P("data")),)
SECOND = {"student": "second", "teacher": "second"}
POOLED = {"student": "pooled", "teacher": "pooled"}


def parts():
    """What is trained beside the student, but for what looks across examples."""
    return (
        objectives.hard_labels(),
        objectives.features(losses.feature_mse, projector=projectors.mlp(5), **POOLED),
        objectives.variational_information(**SECOND),
        objectives.masked_generation(weight=0.1, **SECOND),
    )


def memory():
    return objectives.contrastive_memory(
        dataset_size=40, width=6, negatives=9, weight=0.1, **POOLED
    )


@functools.cache
def training(with_memory=True):
    """A state, a teacher and a pure step that takes options."""
    teacher, frozen = teachers.frozen(tiny.TEACHER)
    objective = objectives.combine(*parts(), *([memory()] if with_memory else []))
    optimizer = optax.adam(1e-2)
    state = init_state(
        tiny.STUDENT, teacher, objective, optimizer,
        frozen=frozen, batch=tiny.batch(), rng=jax.random.key(0),
    )  # fmt: skip
    step = functools.partial(
        make_train_step, tiny.STUDENT.model, teacher, objective, optimizer
    )
    return state, frozen, step


@functools.cache
def on_mesh(devices):
    """The mesh, the teacher on it, and the step compiled for it."""
    state, frozen, step = training()
    mesh = Mesh(
        np.asarray(jax.devices()[:devices]), "data", axis_types=(AxisType.Auto,)
    )
    placed = place_step(
        step(), mesh, state=state, frozen=frozen, rules=RULES, donate=False
    )
    return mesh, place(frozen, mesh), placed


def steps(state, devices, numbers):
    """Trains on the batches of these numbers; the state and the values of the loss."""
    _, frozen, step = on_mesh(devices)
    values = []
    for number in numbers:
        state, metrics = step(state, frozen, tiny.batch(number))
        values.append(float(metrics["loss"].value()))
    return state, values


@pytest.mark.slow
def test_a_memory_over_a_mesh_is_that_of_one_device():
    state, _, _ = training()
    ends = {}
    for devices in (1, 4):
        mesh, _, _ = on_mesh(devices)
        moved, values = steps(place(state, mesh, RULES), devices, range(4))
        bank = moved.objective_state["4"]["student"]["memory"]
        assert bank.sharding.shard_shape(bank.shape) == (40 // devices, 6)
        ends[devices] = values, jax.device_get(moved.params), jax.device_get(bank)
    # The same but for the order of sums, which Adam's first steps magnify.
    for got, expected in zip(ends[4], ends[1], strict=True):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            got,
            expected,
        )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_trained_parts_and_memory_survive_a_kill_and_another_mesh(devices, tmp_path):
    start, _, _ = training()
    mesh, _, _ = on_mesh(4)
    state, _ = steps(place(start, mesh, RULES), 4, range(3))
    source = batches({"x": np.arange(40)}, batch_size=4, seed=0)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(3, state, source, {}, None)
    checkpoints.close()

    # Another process would start like this, on a mesh of its own.
    mesh, _, _ = on_mesh(devices)
    again = Checkpoints(tmp_path / "run")
    found = again.restore(place(start, mesh, RULES), source)
    again.close()
    assert found is not None
    restored = found[0]
    for kept, saved in zip(bits(restored), bits(state), strict=True):
        np.testing.assert_array_equal(kept, saved)
    bank = restored.objective_state["4"]["teacher"]["memory"]
    assert bank.sharding.shard_shape(bank.shape) == (40 // devices, 6)
    assert np.any(bank != start.objective_state["4"]["teacher"]["memory"])

    # And goes on: bit for bit on the same mesh, else but for the order of sums.
    end, values = steps(restored, devices, range(3, 5))
    alone, expected = steps(state, 4, range(3, 5))
    if devices == 4:
        for got, left in zip(bits(end), bits(alone), strict=True):
            np.testing.assert_array_equal(got, left)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.slow
def test_micro_batches_are_one_batch():
    state, frozen, step = training(with_memory=False)
    whole, metrics = jax.jit(step())(state, frozen, tiny.batch())
    split, same = jax.jit(step(accumulate=4))(state, frozen, tiny.batch())
    assert int(metrics["mgd"].count) == 6
    for name in metrics:
        np.testing.assert_allclose(
            same[name].value(), metrics[name].value(), rtol=1e-5, atol=1e-6
        )
    gaps = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), split.params, whole.params
    )
    # Adam's first step is the sign of a gradient, times 1e-2.
    assert max(jax.tree.leaves(gaps)) < 1e-5


def test_a_memory_under_an_axis_name_is_refused():
    state, frozen, step = training()
    named = step(axis_name="data")
    run = jax.vmap(named, in_axes=(None, None, 0), axis_name="data")
    batch = {name: np.stack([array] * 2) for name, array in tiny.batch().items()}
    with pytest.raises(ValueError, match="axis_name: this objective keeps a state"):
        jax.eval_shape(run, state, frozen, batch)


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_memory_as_it_is():
    state, _, _ = training()
    mesh, frozen, step = on_mesh(1)
    batch = tiny.batch()
    batch["x"] = batch["x"] * np.float32(np.nan)
    moved, metrics = step(place(state, mesh), frozen, batch)
    assert int(moved.skipped) == 1
    assert np.isnan(metrics["crd"].value())
    for got, left in zip(
        bits(moved.objective_state), bits(state.objective_state), strict=True
    ):
        np.testing.assert_array_equal(got, left)
