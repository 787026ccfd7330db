"""Projectors: shapes, gradients, pooling, and their place in the training state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import models, objectives, teachers
from kdjax.objectives import projectors
from kdjax.train import init_state, make_train_step
from kdjax.types import Outputs


def squared_error(student, teacher):
    return ((student - teacher) ** 2).mean(-1)


@pytest.mark.parametrize(
    ("projector", "leaves"),
    [
        (projectors.identity(), 0),
        (projectors.linear(), 2),
        (projectors.linear(bias=False), 1),
        (projectors.mlp(7), 4),
        (projectors.mlp(7, 6, bias=False), 3),
    ],
)
@pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 3, 3)])
def test_maps_channels_and_nothing_else(projector, leading, leaves):
    channels = 4 if leaves else 5
    params = projector.init(jax.random.key(0), channels, 5)
    feature = jax.random.normal(jax.random.key(1), (*leading, channels))
    mapped = projector.apply(params, feature)
    assert mapped.shape == (*leading, 5)
    assert len(jax.tree.leaves(params)) == leaves
    # A position is mapped by itself: one apart gives the same, summed otherwise.
    with jax.enable_x64(True):
        wide, features = jax.tree.map(np.float64, (params, feature))
        first, all_ = (projector.apply(wide, f) for f in (features[:1], features))
        np.testing.assert_allclose(first, all_[:1], rtol=1e-12, atol=1e-15)


def test_linear_is_the_1x1_convolution():
    projector = projectors.linear()
    params = projector.init(jax.random.key(0), 3, 5)
    image = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    kernel = params["0"]["kernel"][None, None]
    expected = jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = projector.apply(params, image)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_starts_with_the_variance_that_it_says():
    params = projectors.mlp(400).init(jax.random.key(0), 300, 500)
    scales = [float(jnp.var(params[i]["kernel"])) for i in "01"]
    np.testing.assert_allclose(scales, [2 / 300, 1 / 400], rtol=0.03)


def test_refuses_empty_layers():
    with pytest.raises(ValueError, match=r"hidden: got \(8, 0\)"):
        projectors.mlp(8, 0)


@pytest.mark.parametrize(("large", "small"), [(8, 4), (7, 3), (5, 5), (6, 1)])
def test_pools_the_larger_map_like_adaptive_average_pooling(large, small):
    wide = jax.random.normal(jax.random.key(0), (2, large, large, 3))
    narrow = jnp.zeros((2, small, small, 4))
    got, same = projectors.pooled(wide, narrow)
    expected = np.empty((2, small, small, 3))
    for i in range(small):
        for j in range(small):
            rows = slice(i * large // small, -(-(i + 1) * large // small))
            columns = slice(j * large // small, -(-(j + 1) * large // small))
            expected[:, i, j] = np.asarray(wide)[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(same, narrow)
    swapped = projectors.pooled(narrow, wide)[1]
    np.testing.assert_array_equal(swapped, got)


def test_pooling_refuses_what_is_no_map():
    with pytest.raises(ValueError, match=r"teacher: got shape \(2, 3\)"):
        projectors.pooled(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 3)))


def net(seed, width):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "in": jax.random.normal(keys[0], (6, width)),
        "out": jax.random.normal(keys[1], (width, 3)),
    }

    def apply(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        return Outputs(hidden @ params["out"], {"hidden": hidden})

    return models.from_apply(apply, params)


def test_projectors_are_trained_with_their_own_learning_rate():
    student, teacher_net = net(0, 4), net(1, 8)
    teacher, frozen = teachers.frozen(teacher_net)
    objective = objectives.combine(
        objectives.hard_labels(),
        objectives.features(
            squared_error,
            student="hidden",
            teacher="hidden",
            projector=projectors.linear(),
        ),
    )
    optimizer = optax.multi_transform(
        {"student": optax.sgd(0.0), "objective": optax.sgd(0.1)},
        {"student": "student", "objective": "objective"},
    )
    batch = {
        "x": jax.random.normal(jax.random.key(2), (16, 6)),
        "label": jnp.arange(16) % 3,
    }
    state = init_state(
        student, teacher, objective, optimizer,
        frozen=frozen, batch=batch, rng=jax.random.key(3),
    )  # fmt: skip
    step = jax.jit(make_train_step(student.model, teacher, objective, optimizer))
    losses = []
    start = state.params
    for _ in range(30):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["features"].value()))
    # The student stands still; only the projector can have learnt.
    jax.tree.map(
        np.testing.assert_array_equal, start["student"], state.params["student"]
    )
    assert losses[-1] < 0.7 * losses[0]
    shapes = jax.tree.map(jnp.shape, state.params["objective"])
    assert jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)) == [
        (8,),
        (4, 8),
    ]
