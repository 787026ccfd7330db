"""Relative accuracy in float32 where naive formulas have none, to exact arithmetic.

The reference is the formula itself in decimals of 60 digits, so that nothing has to
be rearranged to be trusted.
"""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

SIZES = [1e-2, 1e-3, 1e-4, 1e-5]
LABEL = 2


def probabilities(logits, temperature):
    powers = [(Decimal(float(z)) / Decimal(temperature)).exp() for z in logits]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def skewed(p, q, share):
    return kl(p, mix(p, q, share))


def jensen_shannon(p, q, beta):
    m = mix(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(p, q, alpha, beta):
    both = alpha + beta
    inner = sum(
        a**alpha * b**beta - alpha / both * a**both - beta / both * b**both
        for a, b in zip(p, q, strict=True)
    )
    return -inner / (alpha * beta)


def renyi(p, q, order):
    inner = sum(a**order * b ** (1 - order) for a, b in zip(p, q, strict=True))
    return inner.ln() / (order - 1)


def decoupled(p, q, alpha, beta):
    a, b = p[LABEL], q[LABEL]
    target = kl([a, 1 - a], [b, 1 - b])
    p = [value / (1 - a) for i, value in enumerate(p) if i != LABEL]
    q = [value / (1 - b) for i, value in enumerate(q) if i != LABEL]
    return alpha * target + beta * kl(p, q)


def pearson_distance(p, q):
    a, b = ([value - sum(r) / len(r) for value in r] for r in (p, q))
    along = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - along / (sum(x * x for x in a) * sum(y * y for y in b)).sqrt()


# Exact forms of (p, q); their numbers by keyword, as in kdjax.
EXACT = {
    "forward_kl": (kl, {}),
    "reverse_kl": (lambda p, q: kl(q, p), {}),
    "symmetric_kl": (
        lambda p, q, reverse_weight: (
            (1 - reverse_weight) * kl(p, q) + reverse_weight * kl(q, p)
        ),
        {"reverse_weight": 0.3},
    ),
    "jensen_shannon": (jensen_shannon, {"beta": 0.3}),
    "skew_kl": (lambda p, q, skew: skewed(p, q, skew), {"skew": 0.1}),
    "skew_reverse_kl": (lambda p, q, skew: skewed(q, p, skew), {"skew": 0.1}),
    "total_variation": (
        lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        {},
    ),
    "alpha_beta": (alpha_beta, {"alpha": 0.3, "beta": 0.5}),
    "renyi": (renyi, {"order": 0.7}),
    "decoupled_kd": (decoupled, {"alpha": 1.0, "beta": 8.0}),
    "inter_class_relation": (pearson_distance, {}),
}
RELATIONS = {"inter_class_relation"}  # without the factor temperature²


def pair(size, seed=0):
    rng = np.random.default_rng(seed)
    teacher = np.float32(rng.normal(0, 2, (3, 6)))
    return np.float32(teacher + size * rng.normal(0, 1, (3, 6))), teacher


def exactly(name, student, teacher, temperature):
    form, hyper = EXACT[name]
    with localcontext() as context:
        context.prec = 60
        # A float32 temperature or weight is what the loss works with.
        number = {k: Decimal(float(np.float32(v))) for k, v in hyper.items()}
        values = [
            form(probabilities(t, temperature), probabilities(s, temperature), **number)
            for s, t in zip(student, teacher, strict=True)
        ]
        factor = 1 if name in RELATIONS else Decimal(temperature) ** 2
        return np.array([float(factor * value) for value in values])


def call(name, student, teacher, **extra):
    labels = [jnp.full(len(student), LABEL)] if name == "decoupled_kd" else []
    arrays = jnp.asarray(student), jnp.asarray(teacher)
    return getattr(losses, name)(*arrays, *labels, **EXACT[name][1], **extra)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("name", EXACT)
def test_close_to_equality(name, temperature):
    """Lesson: bf16 and float32 KLs of 1e-3 come out as 0, or below it."""
    # A correlation compares unit vectors, rounded to 2e-7, whose distance is the root
    # of twice the loss: 1e-4 at the smaller size, which leaves three digits.
    sizes, tolerance = (SIZES[:2], 2e-3) if name in RELATIONS else (SIZES, 1e-4)
    for size in sizes:
        student, teacher = pair(size)
        got = call(name, student, teacher, temperature=temperature)
        assert np.all(got > 0)
        expected = exactly(name, student, teacher, temperature)
        np.testing.assert_allclose(got, expected, rtol=tolerance)


@pytest.mark.parametrize("name", EXACT)
def test_temperature_100_far_from_equality(name):
    """Lesson: the factor 1e4 times a cancelling sum loses three digits."""
    student, teacher = pair(1.5)
    got = call(name, student, teacher, temperature=100.0)
    expected = exactly(name, student, teacher, 100)
    np.testing.assert_allclose(got, expected, rtol=5e-6)


@pytest.mark.parametrize("name", EXACT)
def test_half_precision_differences_survive(name):
    """Lesson: EasyDeL reports a KL of 0.0 for 1.24e-3."""
    student, teacher = pair(0.05)
    student, teacher = (jnp.asarray(z, jnp.bfloat16) for z in (student, teacher))
    got = call(name, student, teacher, temperature=1.0)
    expected = exactly(
        name, *(np.asarray(z, np.float32) for z in (student, teacher)), 1
    )
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_cross_entropy_of_a_sure_row():
    # log(1 + 2 exp(-50)); float32's log of softmax gives 0.
    got = losses.cross_entropy(jnp.array([[50.0, 0.0, 0.0]]), jnp.array([0]))
    # Half a unit in the last place of the exponent 49 is 2e-6 of the power.
    np.testing.assert_allclose(got, [2 * np.exp(-50.0)], rtol=5e-6)
    slope = jax.grad(lambda z: losses.cross_entropy(z, jnp.array(0)))
    small = np.exp(-50.0)
    np.testing.assert_allclose(
        slope(jnp.array([50.0, 0.0, 0.0])), [-2 * small, small, small], rtol=1e-6
    )


def test_cross_entropy_keeps_its_accuracy_far_from_zero():
    # log(1 + exp(-1)), with logits between which float32 has 2^-10 of room.
    got = losses.cross_entropy(jnp.array([10001.0, 10000.0]), jnp.array(0))
    np.testing.assert_allclose(got, np.log1p(np.exp(-1.0)), rtol=1e-6)


@pytest.mark.parametrize("gap", [1e-5, 1e-3, 0.1, 1.0, 3.0, -1e-4, -2.0])
@pytest.mark.parametrize("level", [-40.0, -3.0, 0.0, 2.5, 30.0])
def test_binary_distillation_everywhere(level, gap):
    teacher = np.float32(level)
    student = np.float32(teacher + np.float32(gap))
    with localcontext() as context:
        context.prec = 60
        p, q = (probabilities([z, 0.0], 1) for z in (teacher, student))
        expected = float(kl(p, q))
        slope = float(q[0] - p[0])
    loss = jax.value_and_grad(lambda z: losses.binary_distillation(z, one(teacher))[0])
    got, gradient = loss(one(student))
    # At a level of 30 the gap itself is a float32 to 1e-6 of 1e-5 or 0.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[0], slope, rtol=1e-5)


def one(value):
    return jnp.asarray([value])


def test_knowledge_distillation_gradient_at_temperature_100():
    """alpha (softmax - onehot) + (1 - alpha) temperature (q - p), to float32."""
    student, teacher = pair(1.5)
    labels = jnp.array([0, 3, 5])
    got = jax.grad(
        lambda z: losses.knowledge_distillation(
            z, jnp.asarray(teacher), labels, temperature=100.0, alpha=0.25
        ).sum()
    )(jnp.asarray(student))
    with localcontext() as context:
        context.prec = 60
        rows = [
            (probabilities(s, 1), probabilities(s, 100), probabilities(t, 100))
            for s, t in zip(student, teacher, strict=True)
        ]
        soft = [
            [float(100 * (b - c)) for b, c in zip(q, p, strict=True)]
            for _, q, p in rows
        ]
        hard = [[float(a) for a in r] for r, _, _ in rows]
    expected = 0.25 * (np.array(hard) - np.eye(6)[labels]) + 0.75 * np.array(soft)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-7)
