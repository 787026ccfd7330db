"""Inputs that are legal and rare: narrow integers, one class, no class, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import losses
from kdjax.losses import _rows
from kdjax.types import SparseTargets

DIVERGENCES = [
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
    "soft_cross_entropy",
]
LABELLED = [
    "cross_entropy",
    "knowledge_distillation",
    "decoupled_kd",
    "normalized_kd",
    "weighted_soft_labels",
]


def logits(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_labels_may_be_narrower_than_the_number_of_classes(name, dtype):
    student, teacher = logits(2, 66_000), logits(2, 66_000, seed=1)
    sides = (student,) if name == "cross_entropy" else (student, teacher)
    labels = jnp.array([3, 200])
    expected = getattr(losses, name)(*sides, labels)
    assert np.isfinite(expected).all()
    got = getattr(losses, name)(*sides, labels.astype(dtype))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_what_unsigned_tokens_do_not_predict_is_no_class(dtype):
    tokens, real = jnp.array([[5, 6, 0]], dtype), jnp.array([[True, True, False]])
    _, labels = losses.next_token(jnp.zeros((1, 3, 300)), tokens, real)
    assert labels.tolist() == [[6, losses.UNSCORED]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_indices_may_be_narrower_than_the_number_of_classes(dtype):
    student, classes = logits(2, 65_546), jnp.array([[4, 10], [7, 65_535 % 2**15]])
    log_probs = jnp.log(jnp.array([[0.5, 0.0], [0.3, 0.2]]))
    tail = jnp.log(jnp.array([0.5, 0.5]))

    def loss(indices):
        targets = SparseTargets(indices, log_probs, tail)
        return losses.sparse_forward_kl(student, targets)

    for run in (loss, jax.jit(loss)):
        got, expected = run(classes.astype(dtype)), run(classes)
        np.testing.assert_array_equal(got, expected)


def test_chunks_may_be_unsigned():
    log_probs, chunks = jnp.log(jnp.array([0.5, 0.25, 0.5])), jnp.array([0, 1, 1])
    sides = log_probs, log_probs - 1
    got = losses.chunk_likelihood(
        *sides, *2 * [chunks.astype(np.uint8)], chunks=150, temperature=2.0
    )
    expected = losses.chunk_likelihood(
        *sides, chunks, chunks, chunks=150, temperature=2.0
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_class_with_a_temperature_for_each_row(name):
    def total(student):
        loss = getattr(losses, name)
        return loss(student, jnp.zeros((4, 1)), temperature=jnp.arange(1.0, 5.0)).sum()

    value, gradient = jax.value_and_grad(total)(jnp.ones((4, 1)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((4, 1)))


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("name", ["forward_kl", "knowledge_distillation"])
def test_a_teacher_without_a_class_teaches_nothing(name, rows, monkeypatch):
    # In blocks on a lone device, and at once: the number of rows changes no value.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    student, teacher = logits(rows, 9000), logits(rows, 9000, seed=1)
    extra = () if name == "forward_kl" else (jnp.full(rows, -1),)

    def first(student):
        loss = getattr(losses, name)
        return loss(student, teacher.at[0].set(-jnp.inf), *extra)[0]

    value, gradient = jax.value_and_grad(first)(student)
    jax.clear_caches()
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    "name", ["pairwise_hinge", "logistic_ranking", "hard_distillation"]
)
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_is_seen_in_long_rows(name, side):
    sides = [logits(1, 5000 if name == "hard_distillation" else 80) for _ in range(2)]
    sides[side] = sides[side].at[0, 3].set(jnp.nan)
    assert np.isnan(getattr(losses, name)(*sides)).all()


@pytest.mark.parametrize("name", ["universal_logit", "adaptive_kl", "decoupled_kd"])
def test_classes_that_are_out_have_no_derivative_by_the_temperature(name):
    out = jnp.array([-jnp.inf])
    sides = [jnp.concatenate([logits(5, seed=seed), out]) for seed in (0, 1)]
    extra = (jnp.array(2),) if name == "decoupled_kd" else ()
    loss = getattr(losses, name)

    def slope(sides):
        return jax.grad(lambda tau: loss(*sides, *extra, temperature=tau))(2.0)

    expected = slope([side[:5] for side in sides])
    np.testing.assert_allclose(slope(sides), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "skew_kl"])
def test_a_lone_device_of_a_mesh_has_no_blocks(name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_rows, "_BLOCK", 64)
    jax.clear_caches()
    student, teacher = logits(32, 16), logits(32, 16, seed=1)
    loss, rows = getattr(losses, name), PartitionSpec("data")
    expected = loss(student, teacher)
    for kind in (AxisType.Auto, AxisType.Explicit):
        one = jax.devices()[:1]
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,), devices=one)
        with jax.set_mesh(mesh):
            sides = jax.device_put((student, teacher), jax.NamedSharding(mesh, rows))
            np.testing.assert_allclose(loss(*sides), expected, rtol=1e-6)
            spread = jax.shard_map(loss, in_specs=rows, out_specs=rows)
            np.testing.assert_allclose(spread(*sides), expected, rtol=1e-6)
    jax.clear_caches()


@pytest.mark.parametrize(
    "name", ["contrastive", "relational_distance", "similarity_preserving"]
)
def test_no_examples_are_no_loss(name):
    assert getattr(losses, name)(jnp.zeros((0, 4)), jnp.zeros((0, 4))) == 0


def test_numbers_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"label_smoothing: got shape \(3, 1\)"):
        losses.cross_entropy(
            jnp.zeros((3, 5)), jnp.arange(3), label_smoothing=jnp.full((3, 1), 0.1)
        )
    with pytest.raises(ValueError, match=r"instance_weight: got shape \(4,\)"):
        losses.multi_level_relation(jnp.eye(4), jnp.eye(4), instance_weight=jnp.ones(4))


FAR = [0.0, -90.0, 1e4, -1e4, -jnp.inf]


@pytest.mark.parametrize(
    ("skewed", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")]
)
@pytest.mark.parametrize("far", FAR)
def test_without_skew_it_is_the_divergence(skewed, plain, far):
    sides = jnp.array([[0.0, far], [0.0, 0.3]])
    for pair in (sides, sides[::-1]):
        expected = jax.value_and_grad(getattr(losses, plain))(*pair)
        got = jax.value_and_grad(getattr(losses, skewed))(*pair, skew=0.0)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(losses.skew_kl, skew=1.0),
        functools.partial(losses.skew_reverse_kl, skew=1.0),
        functools.partial(losses.alpha_beta, alpha=-0.5, beta=1.5),
        functools.partial(losses.alpha_beta, alpha=1.5, beta=-0.5),
        functools.partial(losses.alpha_beta, alpha=1.0, beta=0.0),
        functools.partial(losses.renyi, order=1.5),
    ],
    ids=["skew", "skew reverse", "alpha < 0", "beta < 0", "KL", "renyi"],
)
def test_no_gradient_is_nan_far_apart(loss, far):
    rows = jnp.array([[0.0, far, 0.2], [0.1, 0.3, 0.0]])

    def both(rows):
        return loss(rows[0], rows[1]) + loss(rows[1], rows[0])

    value, gradient = jax.value_and_grad(both)(rows)
    assert not np.isnan(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("of", "limit"),
    [
        (lambda a, b, z: losses.alpha_beta(a, b, alpha=1.0, beta=z), 0.0),
        (lambda a, b, z: losses.alpha_beta(a, b, alpha=z, beta=1.0), 0.0),
        (lambda a, b, z: losses.alpha_beta(a, b, alpha=0.5, beta=z), -0.5),
        (lambda a, b, z: losses.renyi(a, b, order=z), 1.0),
    ],
)
def test_derivatives_by_a_number_are_continuous_at_a_limit(of, limit):
    with jax.enable_x64(True):
        a, b = jnp.array([2.0, -1.0, 4.0, 0.0]), jnp.array([-2.0, 1.4, 0.6, 6.0])
        slope = jax.grad(lambda z: of(a, b, z))
        around = (slope(limit - 1e-3) + slope(limit + 1e-3)) / 2
        np.testing.assert_allclose(slope(limit), around, rtol=1e-4)


def test_what_is_infinite_for_the_divergence_is_so_at_the_limit():
    student = jnp.array([-jnp.inf, 0.0])
    assert losses.alpha_beta(student, jnp.zeros(2), alpha=1.0, beta=0.0) == jnp.inf
    target = jnp.full(2, 200.0)
    assert losses.interpolated_teacher_kl(student, target, progress=1.0) == jnp.inf


def test_renyi_sees_a_row_of_nans_and_no_offset():
    gone = jnp.full((1, 32_000), jnp.nan)
    assert np.isnan(losses.renyi(gone, jnp.zeros((1, 32_000)), order=2.0)).all()
    # Multiples of 1/8, so that the offset rounds nothing.
    sides = [jnp.round(8 * logits(1000, seed=seed)) / 8 for seed in (0, 1)]
    expected = losses.renyi(*sides, order=2.0)
    moved = losses.renyi(*(side + 1e4 for side in sides), order=2.0)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
