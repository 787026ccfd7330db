"""Sampled targets: means over many draws are those of the dense loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.types import SampledTargets
from tests.losses import oracles
from tests.losses.cases import sample

INPUTS = sample((3, 20))
# No class is so rare that it is never drawn: a standard error of 0 tells nothing.
STUDENT, TEACHER = INPUTS["student_logits"], INPUTS["teacher_logits"] / 2
KEY = jax.random.key(0)


def close(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@functools.cache
def drawn(draws, temperature, proposal_temperature):
    """Values and gradients of many draws of 12 samples."""

    @jax.jit
    @jax.vmap
    def run(key):
        targets = losses.sampled_targets(
            key,
            TEACHER,
            12,
            temperature=temperature,
            proposal_temperature=proposal_temperature,
        )

        def total(student):
            values = losses.sampled_forward_kl(student, targets)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(STUDENT)
        return values, gradient, targets.weights.sum(-1)

    return jax.tree.map(np.asarray, run(jax.random.split(KEY, draws)))


@pytest.mark.parametrize(
    ("temperature", "proposal_temperature"), [(1.0, 1.0), (1.0, 1.6), (2.0, 0.6)]
)
def test_a_dozen_samples_are_unbiased(temperature, proposal_temperature):
    values, gradients, weights = drawn(4000, temperature, proposal_temperature)

    def dense(student):
        rows = losses.forward_kl(student, TEACHER, temperature=temperature)
        return rows.sum(), rows

    gradient, value = jax.grad(dense, has_aux=True)(STUDENT)
    for got, expected in (values, value), (gradients, gradient), (weights, 1.0):
        assert is_mean(got, expected)
    # So many draws that a bias of some percent would have shown.
    assert np.all(values.std(0) / np.sqrt(len(values)) < 0.02 * np.abs(value) + 0.02)


def is_mean(draws, expected):
    """All numbers together are within 3 standard errors, and none is beyond 4.5."""
    errors = draws.mean(0) - np.asarray(expected)
    errors /= draws.std(0, ddof=1) / np.sqrt(len(draws)) + 1e-6
    together = np.mean(errors**2) < 1 + 3 * np.sqrt(2 / errors.size)
    return together and np.abs(errors).max() < 4.5


def test_weights_divided_by_their_sum_would_be_biased():
    """What the test above can tell apart."""
    values, _, weights = drawn(4000, 2.0, 0.6)
    dense = losses.forward_kl(STUDENT, TEACHER, temperature=2.0)
    assert not is_mean(values / weights, dense)


def test_one_draw_may_be_negative():
    values, _, _ = drawn(4000, 1.0, 1.0)
    assert values.min() < 0
    # And where both agree, single gradients are not 0.
    targets = losses.sampled_targets(KEY, TEACHER, 3)
    close(losses.sampled_forward_kl(TEACHER, targets), 0.0)
    run = jax.grad(lambda s: losses.sampled_forward_kl(s, targets).sum())
    assert np.abs(run(TEACHER)).max() > 0.01


def test_a_proposal_weighs_by_the_ratio():
    targets = losses.sampled_targets(
        KEY, TEACHER, 8, temperature=2.0, proposal_temperature=1.5
    )
    assert targets.temperature == 2.0
    assert targets.indices.shape == targets.weights.shape == (3, 8)
    p = oracles.softmax(TEACHER, 2.0)
    proposal = oracles.softmax(TEACHER, 3.0)
    indices = np.asarray(targets.indices)
    ratio = np.take_along_axis(p / proposal, indices, -1)
    close(targets.weights, ratio / 8)
    close(targets.log_probs, np.take_along_axis(np.log(p), indices, -1))


def test_classes_without_probability_are_never_drawn():
    teacher = jnp.where(jnp.arange(20) % 3 == 1, TEACHER, -jnp.inf)
    targets = losses.sampled_targets(KEY, teacher, 50, proposal_temperature=5.0)
    assert set(np.unique(targets.indices % 3)) == {1}
    assert np.isfinite(targets.log_probs).all()


def test_a_position_without_classes_has_no_targets():
    targets = losses.sampled_targets(KEY, TEACHER.at[1].set(-jnp.inf), 5)
    np.testing.assert_array_equal(targets.weights[1], 0)
    run = jax.value_and_grad(
        lambda s: losses.sampled_forward_kl(s, targets)[1]  # of that position
    )
    value, gradient = run(STUDENT)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_slots_without_use_and_indices_out_of_range():
    targets = losses.sampled_targets(KEY, TEACHER, 4)
    expected = losses.sampled_forward_kl(STUDENT, targets)
    padded = SampledTargets(
        jnp.pad(targets.indices, ((0, 0), (0, 2)), constant_values=-1),
        jnp.pad(targets.weights, ((0, 0), (0, 2)), constant_values=7.0),
        jnp.pad(targets.log_probs, ((0, 0), (0, 2)), constant_values=-jnp.inf),
    )
    close(losses.sampled_forward_kl(STUDENT, padded), expected)
    for bad in (20, -1):
        spoilt = SampledTargets(
            targets.indices.at[1, 0].set(bad), targets.weights, targets.log_probs
        )
        values = jax.jit(losses.sampled_forward_kl)(STUDENT, spoilt)
        np.testing.assert_array_equal(np.isnan(values), [False, True, False])


def test_keys_may_be_given_by_position():
    keys = jax.random.split(KEY, (3,))
    some = losses.sampled_targets(KEY, TEACHER, 6)
    other = losses.sampled_targets(keys, TEACHER, 6)
    jax.tree.map(np.testing.assert_array_equal, some, other)
    # So a position is drawn alike whatever stands beside it.
    alone = losses.sampled_targets(keys[2], TEACHER[2], 6)
    np.testing.assert_array_equal(alone.indices, some.indices[2])


def test_refuses_to_sample():
    def refused(error, match, *given, **options):
        with pytest.raises(error, match=match):
            losses.sampled_targets(*given, **options)

    refused(ValueError, "samples: got 0", KEY, TEACHER, 0)
    refused(TypeError, "rng: got dtype uint32", jax.random.key_data(KEY), TEACHER, 2)
    keys = jax.random.split(KEY, 2)
    refused(ValueError, r"rng: got \(2,\) keys, .*\(3,\)", keys, TEACHER, 2)
    refused(ValueError, "temperature: got -1.0", KEY, TEACHER, 2, temperature=-1.0)
    refused(
        ValueError,
        "proposal_temp.*: got 0.0",
        KEY,
        TEACHER,
        2,
        proposal_temperature=0.0,
    )
    targets = losses.sampled_targets(KEY, TEACHER, 2)
    with pytest.raises(TypeError, match=r"targets: got SparseTargets.*SampledTargets"):
        losses.sampled_forward_kl(STUDENT, losses.top_k_targets(TEACHER, 2))
    wrong = SampledTargets(targets.indices, targets.weights[:, 0], targets.log_probs)
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\), expected \(3, 2"):
        losses.sampled_forward_kl(STUDENT, wrong)
    with pytest.raises(ValueError, match="less than the 2 classes"):
        losses.sampled_forward_kl(STUDENT[:, :2] * 0, targets)
