"""Vocabularies that differ: what is lost is told, and nothing is made up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses import oracles
from tests.losses.cases import sample

LOGITS = sample((4, 8))["student_logits"]
OTHER = sample((4, 8), seed=1)["student_logits"]


def close(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_one_size_is_left_alone():
    aligned = losses.align_vocabulary(LOGITS, policy="error", size=8)
    np.testing.assert_array_equal(aligned.logits, LOGITS)
    np.testing.assert_array_equal(aligned.lost_mass, np.zeros(4))


def test_truncation_tells_what_it_lost():
    aligned = losses.align_vocabulary(LOGITS, policy="truncate", size=5)
    np.testing.assert_array_equal(aligned.logits, LOGITS[:, :5])
    close(aligned.lost_mass, oracles.softmax(LOGITS)[:, 5:].sum(-1))
    # As little as it may be: one less the rest would be 0.
    logits = jnp.array([0.0, -1.0, -60.0])
    lost = losses.align_vocabulary(logits, policy="truncate", size=2).lost_mass
    np.testing.assert_allclose(lost, oracles.softmax(logits)[2], rtol=1e-5)


def test_padding_has_no_probability():
    """Lesson: Liger pads the student with logits of 0.0, which are probability."""
    aligned = losses.align_vocabulary(LOGITS - 20, policy="pad", size=11)
    assert np.isneginf(aligned.logits[:, 8:]).all()
    np.testing.assert_array_equal(aligned.lost_mass, np.zeros(4))
    teacher = losses.align_vocabulary(OTHER, policy="pad", size=11).logits

    def run(student, teacher):
        total = lambda s: losses.forward_kl(s, teacher).sum()  # noqa: E731
        return jax.value_and_grad(total)(student)

    value, slopes = run(aligned.logits, teacher)
    expected, gradient = run(LOGITS - 20, OTHER)
    close(value, expected)
    close(slopes[:, :8], gradient)
    np.testing.assert_array_equal(slopes[:, 8:], 0)
    zeros = jnp.pad(LOGITS - 20, ((0, 0), (0, 3)))
    assert losses.forward_kl(zeros, teacher).sum() > expected + 10


def test_a_map_moves_classes():
    sources = np.array([3, -1, 0, 7, -5])
    aligned = losses.align_vocabulary(LOGITS, policy=jnp.asarray(sources))
    np.testing.assert_array_equal(aligned.logits[:, [0, 2, 3]], LOGITS[:, [3, 0, 7]])
    assert np.isneginf(aligned.logits[:, [1, 4]]).all()
    p = oracles.softmax(LOGITS)
    close(aligned.lost_mass, p[:, [1, 2, 4, 5, 6]].sum(-1))
    # Under jit too, where nobody can look whether a class is there.
    again = jax.jit(lambda z, at: losses.align_vocabulary(z, policy=at))
    jax.tree.map(close, again(LOGITS, sources), aligned)
    beyond = again(LOGITS, np.array([0, 8]))
    np.testing.assert_array_equal(np.isnan(beyond.logits), [[False, True]] * 4)


def test_mass_and_logits_have_gradients():
    def lost(logits):
        return losses.align_vocabulary(logits, policy="truncate", size=5).lost_mass[0]

    p = oracles.softmax(LOGITS)[0]
    mass = p[5:].sum()
    expected = p * (np.where(np.arange(8) >= 5, 1, 0) - mass)
    close(jax.grad(lost)(LOGITS)[0], expected)


def test_classes_that_are_out_lose_nothing():
    logits = jnp.where(jnp.arange(8) < 5, LOGITS, -jnp.inf).at[1].set(-jnp.inf)
    aligned = losses.align_vocabulary(logits, policy="truncate", size=5)
    np.testing.assert_array_equal(aligned.lost_mass, np.zeros(4))
    narrow = losses.align_vocabulary(
        LOGITS.astype(jnp.bfloat16), policy="truncate", size=5
    )
    assert narrow.logits.dtype == jnp.bfloat16
    assert narrow.lost_mass.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"policy": "error", "size": 7}, ValueError, "size: got 7 for the 8.*'error'"),
        ({"policy": "truncate", "size": 9}, ValueError, "'truncate' does not allow"),
        ({"policy": "pad", "size": 7}, ValueError, "'pad' does not allow"),
        ({"policy": "pad"}, ValueError, "size: got none, expected one"),
        (
            {"policy": "cut", "size": 7},
            ValueError,
            "policy: got 'cut', expected one of",
        ),
        ({"policy": "pad", "size": 9.0}, TypeError, "size: got float"),
        ({"policy": jnp.array([1, 8])}, ValueError, "policy: got class 8"),
        ({"policy": jnp.array([1, 1])}, ValueError, "policy: got class 1 twice"),
        ({"policy": jnp.array([1.0])}, TypeError, "policy: got dtype float32"),
        ({"policy": jnp.array([[1]])}, ValueError, r"policy: got shape \(1, 1\)"),
        ({"policy": jnp.array([1]), "size": 3}, ValueError, "size: got 3 beside"),
    ],
)
def test_refuses_to_align(options, error, match):
    with pytest.raises(error, match=match):
        losses.align_vocabulary(LOGITS, **options)


@pytest.mark.parametrize(("student", "teacher"), [(5, 8), (8, 5)])
def test_universal_logit_over_vocabularies_of_different_size(student, teacher):
    both = LOGITS[:, :student], OTHER[:, :teacher]
    got = losses.universal_logit(*both, temperature=1.5)
    close(got, oracles.universal_logit(*both, temperature=1.5))
    # A class that is not there is one of probability 0.
    padded = [losses.align_vocabulary(z, policy="pad", size=8).logits for z in both]
    close(losses.universal_logit(*padded, temperature=1.5), got)
    gradient = jax.grad(lambda s: losses.universal_logit(s, both[1]).sum())(both[0])
    assert np.isfinite(gradient).all()


def test_universal_logit_does_not_know_classes():
    close(losses.universal_logit(LOGITS[:, ::-1], LOGITS), 0.0)
    # No two distributions are further apart than 2.
    sure = jnp.array([100.0, 0.0]), jnp.zeros(4000)
    close(losses.universal_logit(*sure), 2 - 2 / 4000)


def test_refuses_other_positions():
    with pytest.raises(ValueError, match=r"student_logits \(4, 8\) and .* \(3, 8\)"):
        losses.universal_logit(LOGITS, OTHER[:3])
