"""Bad input is refused when it is traced, by the name of the argument.

Every test says "refuse" in its name, so that kdjax' own checks are what it sees.
"""

import jax
import jax.numpy as jnp
import pytest

from kdjax import LinearHead, losses
from tests.losses.cases import LOGITS, sample, select

STUDENT, TEACHER = jnp.zeros((2, 3)), jnp.ones((2, 3))
LABELS = jnp.array([0, 2])


@pytest.mark.parametrize("case", select(lambda case: not case.targets))
def test_refuses_integer_logits(case):
    inputs = sample()
    name = "teacher_logits" if "teacher_logits" in case.arguments else "student_logits"
    inputs[name] = jnp.ones((4, 8), jnp.int32)
    with pytest.raises(TypeError, match="got dtype int32, expected floating"):
        case(inputs)


@pytest.mark.parametrize("case", select(lambda case: not case.targets))
def test_refuses_scalars(case):
    inputs = {**sample(), **dict.fromkeys([*LOGITS, "targets"], jnp.zeros(()))}
    with pytest.raises(
        ValueError, match=r"got (a scalar|shape \(\)), expected .*\[\.\.\., [VD]\]"
    ):
        case(inputs)


def test_refuses_a_smaller_vocabulary():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\).*never pads"):
        losses.forward_kl(STUDENT, TEACHER[:, :2])


def test_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\).*Nothing is broadcast"):
        losses.knowledge_distillation(STUDENT, TEACHER[0], LABELS)


@pytest.mark.parametrize("case", select(lambda case: case.labelled))
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (jnp.ones((4, 8)), TypeError, "labels: got dtype float32.*one-hot"),
        (jnp.ones((4, 8), jnp.int32), ValueError, "labels: got shape.*one-hot"),
        (jnp.ones((4,)), TypeError, "labels: got dtype float32.*Cast them"),
        (jnp.ones((3,), jnp.int32), ValueError, r"labels: got shape \(3,\)"),
        (jnp.array([0, 1, 8, 2]), ValueError, "labels: got 8, expected less than.*8"),
    ],
)
def test_refuses_labels(case, labels, error, message):
    with pytest.raises(error, match=message):
        case({**sample(), "labels": labels})


def test_refuses_float_labels_under_jit_too():
    with pytest.raises(TypeError, match="labels: got dtype float32"):
        jax.jit(losses.cross_entropy)(STUDENT, jnp.zeros(2))


@pytest.mark.parametrize(
    "case", select(lambda case: {"temperature", "temperatures"} & {*case.hyper})
)
@pytest.mark.parametrize("temperature", [0.0, -1.0, 0, float("nan"), float("inf")])
def test_refuses_temperatures(case, temperature):
    many = "temperatures" in case.hyper
    number = (
        {"temperatures": (2.0, temperature)} if many else {"temperature": temperature}
    )
    with pytest.raises(ValueError, match=r"temperatures?: got .*, expected a positive"):
        case(sample(), **number)


@pytest.mark.parametrize("case", select(lambda case: "temperature" in case.hyper))
def test_refuses_a_temperature_per_class(case):
    with pytest.raises(ValueError, match=r"temperature: got shape \(8,\)"):
        case(sample(), temperature=jnp.ones(8))


@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_refuses_masks(case):
    with pytest.raises(TypeError, match="where: got dtype float32, expected bool"):
        case(sample(), where=jnp.ones((4, 8)))
    with pytest.raises(ValueError, match=r"where: got shape \(3,\), expected"):
        case(sample(), where=jnp.ones(3, bool))


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("symmetric_kl", {"reverse_weight": 1.1}, "reverse_weight: got 1.1"),
        ("jensen_shannon", {"beta": -0.1}, "beta: got -0.1"),
        ("jensen_shannon", {"beta": 0.0}, "beta: got 0.0.*forward_kl"),
        ("jensen_shannon", {"beta": 1.0}, "beta: got 1.0.*reverse_kl"),
        ("skew_kl", {"skew": 2.0}, "skew: got 2.0"),
        ("skew_reverse_kl", {"skew": -1.0}, "skew: got -1.0"),
        ("adaptive_kl", {"head_mass": 1.5}, "head_mass: got 1.5"),
        ("interpolated_teacher_kl", {"progress": -0.5}, "progress: got -0.5"),
        ("renyi", {"order": -1.0}, "order: got -1.0"),
        ("alpha_beta", {"alpha": float("nan")}, "alpha: got nan"),
    ],
)
def test_refuses_numbers_of_divergences(name, numbers, message):
    with pytest.raises(ValueError, match=message):
        getattr(losses, name)(STUDENT, TEACHER, **numbers)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_refuses_alpha_outside_0_to_1(alpha):
    with pytest.raises(ValueError, match=r"alpha: got .*, expected a number in \[0, 1"):
        losses.knowledge_distillation(STUDENT, TEACHER, LABELS, alpha=alpha)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("decoupled_kd", {"alpha": -1.0}, "alpha: got -1.0.*at least 0"),
        ("decoupled_kd", {"beta": -1.0}, "beta: got -1.0.*at least 0"),
        ("normalized_kd", {"gamma": -1.0}, "gamma: got -1.0.*at least 0"),
    ],
)
def test_refuses_negative_weights(name, numbers, message):
    with pytest.raises(ValueError, match=message):
        getattr(losses, name)(STUDENT, TEACHER, LABELS, **numbers)


def test_refuses_smoothing_above_1():
    with pytest.raises(ValueError, match=r"label_smoothing: got 1\.5"):
        losses.cross_entropy(STUDENT, LABELS, label_smoothing=1.5)


@pytest.mark.parametrize("name", ["intra_class_relation", "multi_level_relation"])
def test_refuses_more_axes_where_examples_are_related(name):
    with pytest.raises(ValueError, match=r"expected 2 axes \[B, V\]"):
        getattr(losses, name)(STUDENT[None], TEACHER[None])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperatures": ()}, "temperatures: got none"),
        ({"batch_weight": -1.0}, "batch_weight: got -1.0"),
        ({"temperatures": (jnp.ones(2),)}, r"temperatures: got shape \(2,\)"),
    ],
)
def test_refuses_numbers_of_multi_level_relation(numbers, message):
    with pytest.raises(ValueError, match=message):
        losses.multi_level_relation(STUDENT, TEACHER, **numbers)


def test_refuses_margins():
    with pytest.raises(ValueError, match=r"margin: got -1\.0"):
        losses.bounded_regression(STUDENT, TEACHER, TEACHER, margin=-1.0)
    with pytest.raises(ValueError, match="margin: got inf"):
        losses.pairwise_hinge(STUDENT, TEACHER, margin=float("inf"))
    with pytest.raises(ValueError, match=r"margin: got shape \(2,\)"):
        losses.pairwise_hinge(STUDENT, TEACHER, margin=jnp.ones(2))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1.0, 2.0], "got list, expected an array"),
        (None, "got NoneType, expected an array"),
        (LinearHead(STUDENT, STUDENT.T), r"got a LinearHead.*token_mean"),
    ],
)
def test_refuses_what_is_no_array_by_name(given, told):
    with pytest.raises(TypeError, match=f"teacher_logits: {told}"):
        losses.forward_kl(STUDENT, given)
    with pytest.raises(TypeError, match=f"labels: {told}"):
        losses.cross_entropy(STUDENT, given)


def test_refuses_what_bounded_regression_cannot_compare():
    boxes = jnp.zeros((3, 4))
    told = "targets: got dtype int32, expected floating-point numbers"
    with pytest.raises(TypeError, match=told):
        losses.bounded_regression(boxes, boxes, boxes.astype(jnp.int32), margin=0.0)
    told = r"targets \(3, 1\): expected one shape \[\.\.\., D\]"
    with pytest.raises(ValueError, match=told):
        losses.bounded_regression(boxes, boxes, boxes[:, :1], margin=0.0)


def test_refuses_estimators_that_reduce():
    with pytest.raises(ValueError, match=r"estimator: got shape \(\) for log ratios"):
        losses.sampled_reverse_kl(
            STUDENT[0], TEACHER[0], estimator=lambda log_ratio: log_ratio.mean()
        )
