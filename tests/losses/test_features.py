"""What every loss over features must do: one battery over feature_cases.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import losses
from tests.losses.feature_cases import CASES, KEEP, mask_of, sample, select
from tests.losses.running import COMPILED, mesh_of
from tests.marks import rest_slow

# One row per loss; the others differ from it in shapes or numbers alone.
MAIN = select(lambda case: " " not in case.name)


@functools.cache
def _compiled(name):
    case = next(case for case in CASES if case.name == name)

    @jax.jit
    def run(features, extra):
        def total(features):
            values = case(*features, **extra)
            return jnp.sum(values), values

        return jax.grad(total, has_aux=True)(features)

    return run


def run(case, student, teacher, **extra):
    """The values, and the gradients of their sum by the student's and the teacher's.

    Compiled once per loss and shape: most tests share the program.
    """
    gradients, values = _compiled(case.name)((student, teacher), extra)
    return np.array(values), gradients


def assert_close(got, expected, tolerance=2e-6):
    got, expected = np.asarray(got), np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("case", select())
def test_equals_the_formula(case):
    features = sample(case)
    values = case(*features)
    assert values.shape == case.gives
    assert values.dtype == jnp.float32
    assert_close(values, case.exact(*features), 1e-5)
    jitted, gradients = run(case, *features)
    assert_close(jitted, values)
    assert_finite(gradients)
    assert largest(gradients[0]) > 1e-4


@pytest.mark.parametrize("case", MAIN)
def test_bfloat16_in_is_float32_inside(case):
    features = sample(case, dtype=jnp.bfloat16)
    values, gradients = run(case, *features)
    assert values.dtype == np.float32
    # Exact for the rounded inputs: nothing is added up in bfloat16.
    assert_close(values, case.exact(*features), 1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert_finite(gradients)


@pytest.mark.parametrize("case", select(lambda case: case.zero and case.alike))
def test_zero_with_zero_gradient_at_equality(case):
    student, _ = sample(case)
    values, gradients = run(case, student, student)
    assert_close(values, np.zeros(case.gives), 1e-9)
    assert largest(gradients) < 1e-7


@pytest.mark.parametrize("case", select(lambda case: not case.signed))
def test_never_negative(case):
    for seed in range(3):
        assert np.all(case(*sample(case, seed)) >= 0)


@pytest.mark.parametrize("case", select())
def test_float64_equals_the_formula_and_its_derivatives(case):
    """What ``jax.test_util.check_grads`` does, in one program instead of four."""
    with jax.enable_x64(True):
        features = sample(case, dtype=jnp.float64)
        along = sample(case, seed=1, dtype=jnp.float64)
        if case.name in ("activation_boundary", "margin_relu_mse"):
            # The loss jumps in the teacher's features, or has a bend there.
            along = (along[0], jax.tree.map(jnp.zeros_like, along[1]))

        @jax.jit
        def derive(features, along):
            def total(features):
                # Other weights than ones: a sum may hide an example.
                values = case(*features)
                weights = jnp.cos(jnp.arange(values.size)).reshape(case.gives)
                return jnp.sum(values * weights), values

            value, forward, values = jax.jvp(total, (features,), (along,), has_aux=True)
            slopes, _ = jax.grad(total, has_aux=True)(features)
            slopes = jax.tree.map(jnp.vdot, slopes, along)
            return value, forward, sum(jax.tree.leaves(slopes)), values

        def value(size):
            moved = jax.tree.map(lambda z, v: z + size * v, features, along)
            return derive(moved, along)[0]

        _, forward, reverse, values = derive(features, along)
        assert values.dtype == jnp.float64
        assert_close(values, case.exact(*features), 1e-9)
        # Central differences: the error is about step² and 1e-16 / step.
        expected = (value(1e-5) - value(-1e-5)) / 2e-5
        assert_close(forward, expected, 1e-7)
        assert_close(reverse, expected, 1e-7)
        assert abs(expected) > 1e-4


@pytest.mark.parametrize("case", MAIN)
def test_vmap_is_each_alone(case):
    first, second = sample(case), sample(case, seed=1)
    both = jax.tree.map(lambda *each: jnp.stack(each), first, second)
    values = jax.jit(jax.vmap(case))(*both)
    assert_close(values[0], run(case, *first)[0])
    assert_close(values[1], run(case, *second)[0])


@pytest.mark.parametrize("case", select(lambda case: not case.relates))
def test_one_example_never_reaches_another(case):
    features, other = sample(case), sample(case, seed=1)
    values, gradients = run(case, *features)
    mixed = jax.tree.map(lambda a, b: b.at[0].set(a[0]), features, other)
    other_values, other_gradients = run(case, *mixed)
    assert np.any(other_values[1:] != values[1:])
    assert_close(other_values[0], values[0], 1e-6)
    jax.tree.map(lambda a, b: assert_close(a[0], b[0]), gradients, other_gradients)


def masked_axis(case):
    return 2 if case.masks == "positions" else 0


def keep(case, tree):
    return jax.tree.map(lambda each: each.compress(KEEP, masked_axis(case)), tree)


@pytest.mark.parametrize("filled", rest_slow([jnp.nan, jnp.inf, 1e4], np.isnan))
@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_masked_is_as_if_deleted(case, filled):
    features = sample(case)
    mask = KEEP.reshape([-1 if i == masked_axis(case) else 1 for i in range(4)])
    mask = mask[..., 0, 0] if len(case.student) == 2 else mask
    masked = jax.tree.map(lambda each: jnp.where(mask, each, filled), features)
    values, gradients = run(case, *masked, where=mask_of(case))
    expected, slopes = run(case, *keep(case, features))
    if case.masks == "examples" and case.gives:
        assert np.all(values[~KEEP] == 0)
        values = values[KEEP]
    assert_close(values, expected, 5e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(keep(case, gradient), slope, 5e-6)
        assert np.all(np.where(mask, 0, gradient) == 0)


@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_all_ones_mask_is_no_mask(case):
    features = sample(case)
    values, _ = run(case, *features, where=mask_of(case, True))
    assert_close(values, run(case, *features)[0])


@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_all_masked_is_zero_with_zero_gradients(case):
    values, gradients = run(case, *sample(case), where=mask_of(case, False))
    assert np.all(values == 0)
    assert largest(gradients) == 0


DEGENERATE = {
    "zeros": jnp.zeros_like,
    "constants": lambda each: jnp.full_like(each, 0.3),
    "one channel off": lambda each: each.at[..., 0].set(0.0),
    "one example constant": lambda each: each.at[0].set(-0.7),
    "large": lambda each: 1e4 * each,
    "small": lambda each: 1e-20 * each,
}


@pytest.mark.parametrize("which", DEGENERATE)
@pytest.mark.parametrize("case", select())
def test_degenerate_inputs_stay_finite(case, which):
    features = sample(case)
    odd = jax.tree.map(DEGENERATE[which], features)
    for student, teacher in (odd, (odd[0], features[1]), (features[0], odd[1])):
        values, gradients = run(case, student, teacher)
        assert_finite((values, gradients))
    if case.zero and case.alike:
        values, gradients = run(case, odd[0], odd[0])
        assert np.all(values == 0)
        assert largest(gradients) == 0


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("case", select())
def test_a_nan_is_never_hidden(case, side):
    """A loss of 0 for features that are NaN would let a broken run go on."""
    features = list(sample(case))
    features[side] = jax.tree.map(
        lambda layer: layer.at[(1,) * layer.ndim].set(jnp.nan), features[side]
    )
    assert np.isnan(run(case, *features)[0]).any()


@pytest.mark.parametrize("case", MAIN)
def test_one_example_is_finite(case):
    features = sample(case, batch=1)
    values, gradients = run(case, *features)
    assert_finite((values, gradients))
    if case.name.startswith("linear_cka"):  # one example relates to none
        assert values == 0
        assert largest(gradients) == 0
    else:
        assert_close(values, case.exact(*features), 1e-5)


def test_one_number_does_not_vary():
    case = next(case for case in CASES if case.name == "feature_correlation")
    values, gradients = run(case, jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1, 1, 3)))
    assert np.all(values == 0)
    assert largest(gradients) == 0


def scales(case, factor):
    return {
        name: number * factor
        for name, number in case.hyper.items()
        if isinstance(number, float)
    }


@pytest.mark.parametrize("case", select(lambda case: scales(case, 1.0)))
def test_one_compilation_for_many_numbers(case):
    features = sample(case)
    case(*features, **scales(case, 0.99))
    before = len(COMPILED)
    values = [case(*features, **scales(case, factor)) for factor in (0.98, 0.97)]
    assert len(COMPILED) == before
    assert np.any(values[0] != values[1])


@pytest.mark.parametrize(
    "case", select(lambda case: " " not in case.name and not case.relates)
)
def test_same_on_a_mesh(case):
    """Losses that relate examples are in test_sharding.py."""
    features = sample(case)
    placed = jax.device_put(features, NamedSharding(mesh_of(data=4), P("data")))
    compiled = _compiled(case.name).lower(placed, {}).compile()
    gradients, values = compiled(placed, {})
    expected, slopes = run(case, *features)
    assert_close(values, expected)
    jax.tree.map(assert_close, gradients, slopes)
    assert "all-gather" not in compiled.as_text()


def test_a_difference_far_below_the_features_is_not_rounded_away():
    for case in CASES:
        if not (case.zero and case.alike) or case.name == "hierarchical_context":
            continue
        student, other = sample(case)
        near = jax.tree.map(lambda a, b: a + 1e-3 * b, student, other)
        values, _ = run(case, near, student)
        assert_close(values / case.exact(near, student), np.ones(case.gives), 2e-3)


def test_kernel_of_neurons_is_never_below_zero():
    # Twice the same channels: the same distribution, by another formula.
    teacher = sample(CASES[0])[0]
    student = jnp.concatenate([teacher, teacher], -1)
    values = losses.neuron_selectivity(student, teacher)
    assert_close(values, np.zeros(4), 1e-6)
    assert np.all(values >= 0)


def test_boundary_and_margin_by_hand():
    teacher = jnp.array([-0.1, 5.0, -0.1, 5.0]).reshape(1, 2, 2, 1)
    student = jnp.array([1.0, 3.0, -2.0, 0.5]).reshape(1, 2, 2, 1)
    value = losses.activation_boundary(student, teacher, margin=1.0)
    assert_close(value, [4.0 + 0.25])
    value = losses.margin_relu_mse(student, teacher, margin=jnp.array([-1.0]))
    assert_close(value, [1.1**2 + 4.0 + 0.0 + 4.5**2])


def test_no_invariance_is_lost():
    student, teacher = sample(CASES[0])
    for loss in (losses.attention_transfer, losses.channel_similarity):
        assert_close(loss(3.0 * student, teacher), loss(student, teacher))
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    student, teacher = np.random.default_rng(1).normal(size=(2, 6, 5))
    turned = jnp.asarray(2.0 * student @ rotation + 1.0, jnp.float32)
    plain, teacher = (jnp.asarray(a, jnp.float32) for a in (student, teacher))
    assert_close(losses.linear_cka(turned, teacher), losses.linear_cka(plain, teacher))
