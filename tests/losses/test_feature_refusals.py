"""Bad features are refused when they are traced, by the name of the argument.

Every test says "refuse" in its name, so that kdjax' own checks are what it sees.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses.feature_cases import CHANNELS, MAP, mask_of, sample, select

PAIRED = select(lambda case: case.student == MAP)


@pytest.mark.parametrize("case", PAIRED)
def test_refuses_integers_by_name(case):
    student, teacher = sample(case)
    with pytest.raises(
        TypeError, match=r": got dtype int32, expected floating-point f"
    ):
        case(student.astype(jnp.int32), teacher)


@pytest.mark.parametrize("case", PAIRED)
def test_refuses_another_batch_by_name(case):
    student, teacher = sample(case)
    with pytest.raises(ValueError, match=r"\(3, 4, 4, 3\) and \w+ \(4, .* expected"):
        case(student[:3], teacher)


@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_refuses_masks(case):
    features = sample(case)
    with pytest.raises(TypeError, match="where: got dtype float32, expected bool"):
        case(*features, where=mask_of(case).astype(jnp.float32))
    with pytest.raises(ValueError, match=r"where: got shape \(3,\), expected"):
        case(*features, where=jnp.ones(3, bool))


FEATURES = jnp.ones(MAP)
WIDER = jnp.ones((4, 4, 4, 5))
SMALLER = jnp.ones((4, 2, 2, 3))


@pytest.mark.parametrize(
    ("name", "arguments", "hyper", "message"),
    [
        ("feature_mse", (FEATURES, WIDER), {}, "one shape.*Nothing is broadcast"),
        ("feature_cosine", (FEATURES, FEATURES[0]), {}, "one shape.*broadcast"),
        ("feature_mse", (jnp.ones(()), FEATURES), {}, r"student_features: got shape"),
        ("attention_transfer", (FEATURES[0], FEATURES), {}, "student_features: got"),
        ("factor_transfer", (FEATURES, SMALLER[0]), {}, "teacher_features: got shape"),
        ("attention_transfer", (FEATURES, WIDER), {"power": 0.0}, "power: got 0.0"),
        ("factor_transfer", (FEATURES, WIDER), {"power": -1.0}, "power: got -1.0"),
        (
            "attention_transfer",
            (FEATURES, SMALLER),
            {"where": jnp.ones(MAP[:3], bool)},
            "equal batch, height and width",
        ),
        ("channel_similarity", (FEATURES, WIDER), {}, "equal batch, channels"),
        ("channel_distribution", (FEATURES, SMALLER), {}, "equal batch, height"),
        ("feature_correlation", (FEATURES, WIDER), {}, "equal batch, height"),
        ("hierarchical_context", (FEATURES, SMALLER), {}, "equal batch, height"),
        ("hierarchical_context", (FEATURES,) * 2, {"sizes": (0,)}, "sizes: got 0"),
        (
            "channel_distribution",
            (FEATURES, FEATURES),
            {"temperature": 0.0},
            "temperature: got 0.0",
        ),
        ("activation_boundary", (FEATURES,) * 2, {"margin": -1.0}, "margin: got -1.0"),
        (
            "margin_relu_mse",
            (FEATURES, FEATURES),
            {"margin": jnp.ones(2)},
            r"margin: got shape \(2,\), expected one number per channel",
        ),
        (
            "variational_information",
            (FEATURES, jnp.ones(2), FEATURES),
            {},
            r"log_scale: got shape \(2,\), expected one number per channel",
        ),
        (
            "variational_information",
            (FEATURES, jnp.ones(3), SMALLER),
            {},
            r"mean \(4, 4, 4, 3\) and target \(4, 2, 2, 3\)",
        ),
        ("masked_generation", (FEATURES, WIDER), {}, "generated_features .*teacher"),
        (
            "solution_flow",
            (FEATURES, FEATURES),
            {},
            "student_features: got one, expected the maps of two layers",
        ),
        (
            "solution_flow",
            ((FEATURES, FEATURES), (FEATURES,)),
            {},
            "teacher_features: got 1 of them",
        ),
        (
            "solution_flow",
            ((FEATURES, FEATURES), (FEATURES, WIDER)),
            {},
            r"student_features\[1\].*teacher_features\[1\].*channels",
        ),
        ("linear_cka", (FEATURES, FEATURES), {}, r"student: got.*\[B, D\]"),
        ("linear_cka", (jnp.ones((3, 2)), jnp.ones((4, 2))), {}, "the same examples B"),
    ],
)
def test_refuses_by_name(name, arguments, hyper, message):
    with pytest.raises(ValueError, match=message):
        getattr(losses, name)(*arguments, **hyper)


def test_refuses_sizes_that_are_no_integers():
    with pytest.raises(TypeError, match=r"sizes: got 2\.0, expected integers"):
        losses.hierarchical_context(FEATURES, FEATURES, sizes=(2.0,))


def test_refuses_integer_margins():
    with pytest.raises(TypeError, match="margin: got dtype int32"):
        losses.margin_relu_mse(FEATURES, FEATURES, margin=CHANNELS.astype(np.int32))
