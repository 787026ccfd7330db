"""Losses over tokens that the student has drawn: what they are in the mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses.cases import sample

INPUTS = sample((4, 8))
STUDENT, TEACHER = INPUTS["student_logits"], INPUTS["teacher_logits"]
ESTIMATORS = [losses.k1, losses.k2, losses.k3]

every_estimator = pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=lambda estimator: estimator.__name__
)


def close(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def mean_over_draws(loss, policy):
    """Value and gradient in the mean over tokens drawn from a policy, exactly.

    Every class is drawn once, and its loss weighed by how often it would have been.
    """
    log_p, often = jax.nn.log_softmax(TEACHER), jax.nn.softmax(policy)

    def total(student):
        values = often * loss(jax.nn.log_softmax(student), log_p)
        return values.sum(), values.sum(-1)

    gradient, values = jax.jit(jax.grad(total, has_aux=True))(STUDENT)
    return values, gradient


def dense(loss):
    run = jax.grad(lambda s: (loss(s, TEACHER).sum(), loss(s, TEACHER)), has_aux=True)
    gradient, values = jax.jit(run)(STUDENT)
    return values, gradient


def test_the_mean_of_values():
    expected, _ = dense(losses.reverse_kl)
    for estimator, unbiased in zip(ESTIMATORS, (True, False, True), strict=True):
        loss = functools.partial(losses.sampled_reverse_kl, estimator=estimator)
        got, _ = mean_over_draws(loss, STUDENT)
        assert np.allclose(got, expected, rtol=1e-5) == unbiased


def test_the_mean_of_gradients():
    """Of k1 it is nothing, of k2 the reverse KL's, of k3 the forward KL's."""
    reverse, forward = (
        dense(each)[1] for each in (losses.reverse_kl, losses.forward_kl)
    )
    for estimator, expected in zip(
        ESTIMATORS, (0 * reverse, reverse, forward), strict=True
    ):
        loss = functools.partial(losses.sampled_reverse_kl, estimator=estimator)
        close(mean_over_draws(loss, STUDENT)[1], expected)


@pytest.mark.parametrize("behaves", [False, True])
def test_policy_distillation_is_the_reverse_kl_in_the_mean(behaves):
    policy = INPUTS["targets"] if behaves else STUDENT
    behaviour = jax.nn.log_softmax(policy) if behaves else None
    loss = functools.partial(
        losses.policy_distillation, behaviour_log_probs=behaviour, coefficient=0.3
    )
    values, gradient = mean_over_draws(loss, policy)
    expected, slopes = dense(losses.reverse_kl)
    close(gradient, 0.3 * slopes)
    close(values, 0.3 * expected)


def test_advantage_and_ratio_by_hand():
    student, teacher, behaviour = jnp.log(jnp.array([0.5, 0.2, 0.4])[:, None])
    run = jax.value_and_grad(
        lambda q: losses.policy_distillation(
            q, teacher, behaviour_log_probs=behaviour, coefficient=2.0
        )[0]
    )
    value, slope = run(student)
    advantage = -2.0 * np.log(0.5 / 0.2)
    close(value, -1.25 * advantage)
    close(slope, [-1.25 * advantage])  # no gradient through the advantage


@pytest.mark.parametrize(
    ("q", "b", "p", "clipped"),
    [
        (0.6, 0.4, 0.9, True),  # the teacher likes it, and it has come far enough
        (0.6, 0.4, 0.1, False),  # the teacher does not, and it has to come back
        (0.2, 0.4, 0.1, True),
        (0.2, 0.4, 0.9, False),
        (0.41, 0.4, 0.9, False),
    ],
)
def test_a_ratio_is_clipped_on_the_side_it_gains_from(q, b, p, clipped):
    q, b, p = jnp.log(jnp.array([q, b, p]))

    def loss(q, clip):
        return losses.policy_distillation(q, p, behaviour_log_probs=b, clip=clip)

    slope, free = (jax.grad(loss)(q, clip) for clip in (0.2, None))
    close(slope, 0.0 if clipped else free)
    assert (float(loss(q, 0.2)) > float(loss(q, None)) + 1e-3) == clipped


@every_estimator
def test_equal_probabilities_give_zero(estimator):
    log_q = jax.nn.log_softmax(STUDENT)

    def total(log_q):
        return losses.sampled_reverse_kl(log_q, log_q, estimator=estimator).sum()

    close(total(log_q), 0.0)
    close(jax.grad(total)(log_q), 0.0)


def test_k3_keeps_its_digits_near_equality():
    """Schulman's form as it is written gives 0 for ratios of 1e-4, or less than 0."""
    ratios = np.float32([1e-1, 1e-3, -1e-3, 1e-5, -1e-6, 3.0, -3.0])
    exact = np.float64(ratios) ** 2 / 2
    exact = np.where(
        np.abs(ratios) < 1e-4, exact, np.expm1(-np.float64(ratios)) + ratios
    )
    np.testing.assert_allclose(losses.k3(jnp.asarray(ratios)), exact, rtol=1e-5)
    slopes = jax.vmap(jax.grad(losses.k3))(jnp.asarray(ratios))
    np.testing.assert_allclose(slopes, -np.expm1(-np.float64(ratios)), rtol=1e-5)


PLACES = {
    "masked on both sides": (-jnp.inf, -jnp.inf, 0.0, 0.0),
    "not the student's": (-jnp.inf, -1.0, 0.0, 0.0),
    "not the teacher's": (-1.0, -jnp.inf, jnp.inf, 0.0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loss", [*ESTIMATORS, losses.policy_distillation])
def test_tokens_without_a_probability(loss, place):
    student, teacher, value, slope = PLACES[place]
    if loss in ESTIMATORS:
        loss = functools.partial(losses.sampled_reverse_kl, estimator=loss)
    student, teacher = jnp.array([student, -1.0]), jnp.array([teacher, -2.0])
    got, pull = jax.vjp(lambda q: loss(q, teacher), student)
    (slopes,) = pull(jnp.ones(2))
    np.testing.assert_array_equal((got[0], slopes[0]), (value, slope))
    assert np.isfinite(got[1])
    assert slopes[1] != 0


def test_a_token_that_the_sampler_has_at_minus_infinity():
    behaviour = jnp.array([-jnp.inf, -1.0])
    both = jnp.array([-1.0, -1.0]), jnp.array([-2.0, -2.0])

    def total(q):
        return losses.policy_distillation(
            q, both[1], behaviour_log_probs=behaviour
        ).sum()

    value, slopes = jax.value_and_grad(total)(both[0])
    close(value, 1.0)
    close(slopes, [0.0, 1.0])


def test_a_nan_is_never_hidden():
    ok, bad = jnp.array([-1.0]), jnp.array([jnp.nan])
    for one, other in (ok, bad), (bad, ok):
        assert np.isnan(losses.sampled_reverse_kl(one, other))
        assert np.isnan(losses.policy_distillation(one, other))
    got = losses.policy_distillation(ok, ok - 1, behaviour_log_probs=bad, clip=0.2)
    assert np.isnan(got)


def test_half_precision_is_widened():
    narrow = (
        jnp.array([-1.0, -2.0], jnp.bfloat16),
        jnp.array([-2.0, -2.5], jnp.bfloat16),
    )
    wide = [each.astype(jnp.float32) for each in narrow]
    for loss in losses.sampled_reverse_kl, losses.policy_distillation:
        assert loss(*narrow).dtype == jnp.float32
        close(loss(*narrow), loss(*wide))


def test_refuses_rollouts():
    ones = jnp.ones(3)
    with pytest.raises(
        ValueError, match=r"student_log_probs \(3,\) and teacher.* \(2,"
    ):
        losses.sampled_reverse_kl(ones, ones[:2])
    with pytest.raises(TypeError, match="teacher_log_probs: got dtype int32"):
        losses.policy_distillation(ones, jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"behaviour_log_probs \(2,\)"):
        losses.policy_distillation(ones, ones, behaviour_log_probs=ones[:2])
    with pytest.raises(ValueError, match=r"clip: got a bound .* behaviour_log_probs"):
        losses.policy_distillation(ones, ones, clip=0.2)
    with pytest.raises(ValueError, match=r"clip: got 0\.0"):
        losses.policy_distillation(ones, ones, behaviour_log_probs=ones, clip=0.0)
    with pytest.raises(ValueError, match=r"coefficient: got -1\.0"):
        losses.policy_distillation(ones, ones, coefficient=-1.0)
