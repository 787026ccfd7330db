"""Means that add up exactly, heads that are not multiplied out, outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.types import LinearHead, Mean, Outputs, SampledTargets, SparseTargets


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 1, 3), (1,) * 7])
def test_mean_does_not_depend_on_the_grouping(sizes):
    # Small integers: sums are exact in float32 in any order. A mean of means is 31/8
    # for (1, 6) and so on; the mean is 25/5.
    values = np.array([1, 2, 4, 8, 16, 32, 10], np.float32)
    mask = np.array([1, 1, 1, 1, 0, 0, 1], bool)
    ends = np.cumsum(sizes)
    total = Mean(jnp.float32(0), jnp.int32(0))
    for start, end in zip(ends - sizes, ends, strict=True):
        total += Mean.of(values[start:end], mask[start:end])
    assert (float(total.total), int(total.count)) == (25.0, 5)
    assert float(total.value()) == 5.0


def test_mean_counts_all_without_a_mask():
    mean = Mean.of(jnp.arange(6.0).reshape(2, 3))
    assert (float(mean.value()), int(mean.count)) == (2.5, 6)
    same = Mean.of(jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3), bool))
    assert (float(same.total), int(same.count)) == (15.0, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_mean_leaves_out_what_is_masked(bad):
    values, mask = jnp.array([1.0, bad, 3.0]), jnp.array([True, False, True])

    def average(values):
        return Mean.of(values, mask).value()

    value, slope = jax.jit(jax.value_and_grad(average))(values)
    assert float(value) == 2.0
    np.testing.assert_array_equal(slope, [0.5, 0.0, 0.5])
    # Without the mask it would have shown.
    assert not np.isfinite(Mean.of(values).value())


def test_mean_of_nothing_is_zero_with_zero_gradient():
    def average(values):
        return Mean.of(values, jnp.zeros(3, bool)).value()

    value, slope = jax.value_and_grad(average)(jnp.array([1.0, np.nan, np.inf]))
    assert float(value) == 0.0
    np.testing.assert_array_equal(slope, np.zeros(3))
    # Also straight through the total, where no mask stands in between.
    slope = jax.grad(lambda total: Mean(total, jnp.int32(0)).value())(1.0)
    assert float(slope) == 0.0
    assert float(Mean.of(jnp.zeros((0, 4))).value()) == 0.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mean_sums_in_float32(dtype):
    # In bfloat16 a sum of ones stops at 256, in float16 at 2048.
    mean = Mean.of(jnp.ones(4097, dtype))
    assert mean.total.dtype == jnp.float32
    assert (float(mean.total), float(mean.value())) == (4097.0, 1.0)


def test_mean_keeps_float64_and_takes_booleans():
    with jax.enable_x64(True):
        mean = Mean.of(jnp.array([1.0, 1.0 + 2.0**-40], jnp.float64))
        assert mean.value().dtype == jnp.float64
        assert float(mean.value()) == 1.0 + 2.0**-41
    assert float(Mean.of(jnp.array([True, False])).value()) == 0.5


def test_mean_counts_as_integers():
    # float32 would lose the one beside 2**24.
    ones, mask = jnp.ones(1), jnp.ones(1, bool)
    for one in (Mean.of(ones), Mean.of(ones, mask)):
        total = Mean(jnp.float32(0), jnp.int32(2**24)) + one
        assert int(total.count) == 2**24 + 1


def test_mean_is_summed_over_devices_as_a_tree():
    values = jnp.arange(8.0)
    mask = jnp.arange(8) % 3 == 0  # 0, 3 and 6

    def share(values, mask):
        return jax.lax.psum(Mean.of(values, mask), "data")

    total = jax.vmap(share, axis_name="data")(values[:, None], mask[:, None])
    np.testing.assert_array_equal(jax.vmap(Mean.value)(total), np.full(8, 3.0))


def test_mean_refuses_masks_of_another_shape_or_type():
    with pytest.raises(ValueError, match=r"where: got shape \(3,\).*shape \(3, 2\)"):
        Mean.of(jnp.zeros((3, 2)), jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"where: got shape \(1,\)"):
        Mean.of(jnp.zeros(3), jnp.ones(1, bool))
    with pytest.raises(TypeError, match=r"where: got dtype float32, expected bool"):
        Mean.of(jnp.zeros(3), jnp.ones(3))


def numpy_head(hidden, kernel, bias=None, soft_cap=None, scale=None):
    """LinearHead's formula in float64."""
    logits = np.einsum("...d,dv->...v", hidden, kernel)
    logits = logits + (0 if bias is None else bias)
    logits = logits * (1 if scale is None else scale)
    return logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("biased", [False, True])
def test_head_multiplies_out(biased, scale, soft_cap):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 5))
    bias = rng.normal(size=5) if biased else None
    expected = numpy_head(hidden, kernel, bias, soft_cap, scale)
    head = jax.tree.map(jnp.float32, LinearHead(hidden, kernel, bias, soft_cap, scale))
    logits = jax.jit(LinearHead.logits)(head)
    assert logits.shape == (2, 3, 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_head_caps_after_it_scales():
    # 10 * tanh(0.1 * 100 / 10); the other order gives 0.1 * 10 * tanh(100 / 10) = 1.
    head = LinearHead(jnp.ones((1, 1)), jnp.full((1, 1), 100.0), None, 10.0, 0.1)
    np.testing.assert_allclose(head.logits(), [[10 * np.tanh(1.0)]], rtol=1e-6)


def test_head_without_a_class_has_finite_derivatives():
    # 0 * -inf would make those by the scale and by the cap NaN.
    bias = jnp.array([0.5, -jnp.inf, 0.0])
    kernel = jnp.arange(6.0).reshape(2, 3)

    def value(numbers, bias):
        head = LinearHead(jnp.ones((1, 2)), kernel, bias, *numbers)
        logits = head.logits()
        kept = jnp.array([0, 2])
        return jax.nn.logsumexp(logits) + jnp.sin(logits[:, kept]).sum(), logits

    run = jax.jit(jax.grad(value, (0, 1), has_aux=True))
    (by_numbers, by_bias), logits = run((2.0, 0.7), bias)
    # It stays out under the cap, which would have put it at -2.
    np.testing.assert_array_equal(np.isneginf(logits), [[False, True, False]])
    assert np.isfinite(by_numbers).all()
    assert by_bias[1] == 0
    without = LinearHead(jnp.ones((1, 2)), kernel[:, ::2], bias[::2], 2.0, 0.7).logits()
    np.testing.assert_array_equal(logits[:, ::2], without)


def test_targets_are_trees_whose_temperature_is_part_of_their_type():
    ones = jnp.ones((2, 3))
    sparse = SparseTargets(ones, ones, ones[:, 0], 2.0)
    assert len(jax.tree.leaves(sparse)) == 3
    doubled = jax.tree.map(lambda leaf: 2 * leaf, sparse)
    assert (doubled.temperature, float(doubled.tail[0])) == (2.0, 2.0)
    sampled = jax.jit(lambda tree: tree)(SampledTargets(ones, ones, ones, 3.0))
    assert sampled.temperature == 3.0


def test_outputs_give_dense_logits_of_either_kind():
    dense = jnp.arange(6.0).reshape(2, 3)
    assert Outputs(dense).dense_logits() is dense
    head = LinearHead(jnp.eye(2), dense)
    np.testing.assert_array_equal(Outputs(head).dense_logits(), dense)


def test_outputs_pass_through_jit_with_their_features():
    outputs = Outputs(LinearHead(jnp.eye(2), jnp.eye(2)), {"a": jnp.ones(3)})
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(outputs)
    assert isinstance(doubled, Outputs)
    assert doubled.logits.bias is None
    np.testing.assert_array_equal(doubled.logits.logits(), 4 * np.eye(2))
    np.testing.assert_array_equal(doubled.features["a"], [2.0, 2.0, 2.0])
    assert Outputs(None).features == {}


def test_outputs_refuse_logits_that_are_not_there():
    with pytest.raises(ValueError, match="logits: this model gives none"):
        Outputs(None, {"a": jnp.ones(3)}).dense_logits()
