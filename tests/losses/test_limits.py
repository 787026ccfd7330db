"""What is known of the losses at the ends of their numbers, and from their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses import oracles
from tests.losses.cases import sample
from tests.marks import rest_slow

INPUTS = sample()
STUDENT, TEACHER = INPUTS["student_logits"], INPUTS["teacher_logits"]
LABELS = INPUTS["labels"]


def close(got, expected, tolerance=5e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def gradient(loss, *rest):
    return jax.grad(lambda z: loss(z, *rest).sum())(STUDENT)


# f''(1) of those that are f-divergences, and smooth.
CURVATURES = [
    ("forward_kl", {}, 1.0),
    ("reverse_kl", {}, 1.0),
    ("symmetric_kl", {}, 1.0),
    ("jensen_shannon", {"beta": 0.3}, 0.21),
    ("skew_kl", {"skew": 0.1}, 0.81),
    ("skew_reverse_kl", {"skew": 0.1}, 0.81),
    ("alpha_beta", {"alpha": 0.3, "beta": 0.7}, 1.0),
    ("renyi", {"order": 0.7}, 0.7),
]
# Not differentiable twice, for the gradients that stop in them.
STOPPED = [
    ("adaptive_kl", {}, 1.0),
    ("interpolated_teacher_kl", {"progress": 0.5}, 0.25),
]


@pytest.mark.parametrize(("name", "hyper", "curvature"), CURVATURES + STOPPED)
def test_temperature_to_infinity(name, hyper, curvature):
    """They tend to half the variance of the logits' difference, over the classes.

    Lesson: temperature² on both sides, once. Curvature is f''(1) of an f-divergence.
    """
    difference = np.asarray(TEACHER - STUDENT)
    got = getattr(losses, name)(STUDENT, TEACHER, temperature=1e4, **hyper)
    # The next term is smaller by the logits' size over the temperature, 1e-3.
    close(got, curvature * difference.var(-1) / 2, 2e-3)


@pytest.mark.parametrize(
    "row", rest_slow(CURVATURES, lambda row: row is CURVATURES[0], lambda row: row[0])
)
def test_second_derivative_at_equality(row):
    """Fisher's information times f''(1): diag(p) - p p'."""
    name, hyper, curvature = row
    teacher = TEACHER[0]
    got = jax.hessian(lambda z: getattr(losses, name)(z, teacher, **hyper))(teacher)
    p = oracles.softmax(teacher)
    close(got, curvature * (np.diag(p) - np.outer(p, p)))


def test_second_derivative_of_binary_distillation_at_equality():
    teacher = TEACHER[0]
    got = jax.hessian(lambda z: losses.binary_distillation(z, teacher).sum())(teacher)
    p = 1 / (1 + np.exp(-np.asarray(teacher, float)))
    close(got, np.diag(p * (1 - p)))


def test_directions():
    """Lesson: forward is under the teacher, reverse under the student."""
    # The teacher has two modes, the student one of them: covering costs more.
    student, teacher = jnp.log(jnp.array([[0.98, 0.02], [0.5, 0.5]]))
    # 0.5 log(0.5 / 0.98) + 0.5 log(0.5 / 0.02), and 0.98 log(...) + 0.02 log(...)
    close(losses.forward_kl(student, teacher), 1.272965)
    close(losses.reverse_kl(student, teacher), 0.595109)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (("symmetric_kl", {"reverse_weight": 0.0}), "forward_kl"),
        (("symmetric_kl", {"reverse_weight": 1.0}), "reverse_kl"),
        (("skew_kl", {"skew": 0.0}), "forward_kl"),
        (("skew_reverse_kl", {"skew": 0.0}), "reverse_kl"),
        (("alpha_beta", {"alpha": 1.0, "beta": 0.0}), "forward_kl"),
        (("alpha_beta", {"alpha": 0.0, "beta": 1.0}), "reverse_kl"),
        (("renyi", {"order": 1.0}), "forward_kl"),
        (("adaptive_kl", {"head_mass": 1.0}), "forward_kl"),
        (("interpolated_teacher_kl", {"progress": 1.0}), "forward_kl"),
    ],
)
def test_special_cases_are_a_kl(limit, expected):
    name, hyper = limit
    settings = {"temperature": 1.5}
    got = getattr(losses, name)(STUDENT, TEACHER, **hyper, **settings)
    close(got, getattr(losses, expected)(STUDENT, TEACHER, **settings))
    got = gradient(lambda s: getattr(losses, name)(s, TEACHER, **hyper, **settings))
    close(
        got, gradient(lambda s: getattr(losses, expected)(s, TEACHER, **settings)), 2e-5
    )


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("alpha_beta", {"alpha": 1.4, "beta": -0.3}),
        ("alpha_beta", {"alpha": -0.3, "beta": 1.4}),
        ("renyi", {"order": 1.8}),
    ],
)
def test_numbers_beyond_those_of_the_battery(name, hyper):
    got = getattr(losses, name)(STUDENT, TEACHER, temperature=2.0, **hyper)
    expected = getattr(oracles, name)(STUDENT, TEACHER, temperature=2.0, **hyper)
    close(got, expected, 1e-5)


@pytest.mark.parametrize("at", [(0.0, 0.6), (0.6, 0.0), (0.4, -0.4), (0.0, 0.0)])
def test_special_cases_of_alpha_beta_are_limits(at):
    """Lesson: ABKD's differ by up to 4 times from their own limits."""
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(z, jnp.float64) for z in (STUDENT, TEACHER))

        def loss(alpha, beta):
            return losses.alpha_beta(student, teacher, alpha=alpha, beta=beta)

        # Around the limit, by steps in which the formula still has seven digits.
        near = [
            oracles.alpha_beta(student, teacher, alpha=at[0] + a, beta=at[1] + b)
            for a, b in ((1e-4, 2e-4), (-1e-4, -2e-4))
        ]
        # The mean of both sides differs by the square of the step.
        close(loss(*at), np.mean(near, 0), 1e-5)
        # And the code goes through it without a jump.
        for size in (1e-4, 1e-6, 1e-8, 1e-10):
            close(loss(at[0] + size, at[1] + 2 * size), loss(*at), 20 * size + 1e-8)


def test_renyi_goes_through_order_1():
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(z, jnp.float64) for z in (STUDENT, TEACHER))
        exact = losses.forward_kl(student, teacher)
        for size in (1e-3, 1e-5, 1e-7, 1e-9, -1e-9, -1e-6):
            got = losses.renyi(student, teacher, order=1 + size)
            close(got, exact, 10 * abs(size) + 1e-8)


def test_jensen_shannon_has_its_limits():
    """Lesson: TRL falls from 0.5585 at beta = 0 to 5.4e-7 at 1e-6; divide by beta."""
    for beta in (1e-3, 1e-6):
        got = losses.jensen_shannon(STUDENT, TEACHER, beta=beta) / beta
        close(got, losses.forward_kl(STUDENT, TEACHER), 20 * beta + 2e-5)
    got = losses.jensen_shannon(STUDENT, TEACHER, beta=1 - 2.0**-20) * 2**20
    close(got, losses.reverse_kl(STUDENT, TEACHER), 1e-4)


def test_jensen_shannon_weighs_the_teacher_by_beta():
    """Lesson: EasyDeL swaps the mixture's weights."""
    student, teacher = jnp.log(jnp.array([[0.9, 0.1], [0.2, 0.8]]))
    # m = 0.1 (0.2, 0.8) + 0.9 (0.9, 0.1) = (0.83, 0.17):
    # 0.1 (0.2 log(0.2/0.83) + 0.8 log(0.8/0.17))
    # + 0.9 (0.9 log(0.9/0.83) + 0.1 log(0.1/0.17)) = 0.0954346 + 0.0178346
    close(losses.jensen_shannon(student, teacher, beta=0.1), 0.1132692)
    swapped = losses.jensen_shannon(teacher, student, beta=0.9)
    close(losses.jensen_shannon(student, teacher, beta=0.1), swapped)


def test_skew_of_1_is_0():
    close(losses.skew_kl(STUDENT, TEACHER, skew=1.0), np.zeros(4))
    close(losses.skew_reverse_kl(STUDENT, TEACHER, skew=1.0), np.zeros(4))


def test_interpolated_teacher_starts_without_pull():
    def loss(student):
        return losses.interpolated_teacher_kl(student, TEACHER, progress=0.0)

    close(loss(STUDENT), np.zeros(4), 1e-9)
    close(gradient(loss), np.zeros((4, 8)), 1e-6)


def test_interpolated_teacher_stops_the_gradient_of_its_target():
    between = 0.7 * STUDENT + 0.3 * TEACHER
    got = gradient(
        lambda s: losses.interpolated_teacher_kl(
            s, TEACHER, progress=0.3, temperature=2.0
        )
    )
    p, q = oracles.softmax(between, 2.0), oracles.softmax(STUDENT, 2.0)
    close(got, 2.0 * (q - p))


def test_adaptive_kl_stops_the_gradient_of_its_weights():
    share = oracles.head_share(STUDENT, TEACHER)[:, None]
    forward = gradient(losses.forward_kl, TEACHER)
    reverse = gradient(losses.reverse_kl, TEACHER)
    got = gradient(losses.adaptive_kl, TEACHER)
    close(got, share * forward + (1 - share) * reverse, 2e-5)


def test_weighted_soft_labels_stop_the_gradient_of_their_weights():
    weight = oracles.soft_label_weight(*map(np.asarray, (STUDENT, TEACHER, LABELS)))
    got = gradient(losses.weighted_soft_labels, TEACHER, LABELS)
    p, q = oracles.softmax(TEACHER, 2.0), oracles.softmax(STUDENT, 2.0)
    close(got, weight[:, None] * 2.0 * (q - p), 2e-5)


def test_alpha_weighs_the_hard_labels():
    """Lesson: alpha at an extreme, also where the other part is infinite."""
    student = STUDENT.at[:, 3].set(-jnp.inf)  # which the teacher believes in
    labels = jnp.zeros(4, jnp.int32)

    def loss(student, alpha):
        return losses.knowledge_distillation(student, TEACHER, labels, alpha=alpha)

    close(loss(student, 1.0), losses.cross_entropy(student, labels))
    assert np.all(np.isfinite(gradient(lambda _: loss(student, 1.0))))
    soft = losses.forward_kl(STUDENT, TEACHER, temperature=4.0)
    close(loss(STUDENT, 0.0), soft)
    mixed = 0.3 * losses.cross_entropy(STUDENT, labels) + 0.7 * soft
    close(loss(STUDENT, 0.3), mixed)


def test_numbers_per_position():
    temperatures, alphas = jnp.array([1.0, 2, 4, 8]), jnp.array([0.0, 0.2, 0.5, 1.0])
    got = losses.knowledge_distillation(
        STUDENT, TEACHER, LABELS, temperature=temperatures, alpha=alphas
    )
    for i in range(4):
        alone = losses.knowledge_distillation(
            STUDENT[i],
            TEACHER[i],
            LABELS[i],
            temperature=temperatures[i],
            alpha=alphas[i],
        )
        close(got[i], alone)


def test_plain_distillation_is_a_special_case_of_the_decoupled():
    """Equation 6 of 2203.08679: alpha = 1 and beta = 1 - p(label)."""
    p_label = oracles.softmax(TEACHER, 3.0)[np.arange(4), LABELS]
    got = losses.decoupled_kd(
        STUDENT,
        TEACHER,
        LABELS,
        alpha=1.0,
        beta=jnp.asarray(1 - p_label, jnp.float32),
        temperature=3.0,
    )
    close(got, losses.forward_kl(STUDENT, TEACHER, temperature=3.0), 2e-5)


def test_decoupled_in_log_space():
    """Lesson: MDistiller's DKD takes log(softmax) and masks with -1000."""
    # All are sure of the label; the others' odds are 1:e for one, e:1 for the other.
    student, teacher = jnp.array([[300.0, 0, 1], [200.0, 1, 0]])[:, None]
    got = losses.decoupled_kd(
        student, teacher, jnp.array([0]), beta=1.0, temperature=1.0
    )
    # KL of (0.731, 0.269) to (0.269, 0.731) is tanh(1/2); the label's part is
    # exp(-200), far below float32.
    close(got, [np.tanh(0.5)])


def test_normalized_kd_without_its_second_part():
    got = losses.normalized_kd(STUDENT, TEACHER, LABELS, gamma=0.0, temperature=7.0)
    p_label = oracles.softmax(TEACHER)[np.arange(4), LABELS]
    close(got, p_label * losses.cross_entropy(STUDENT, LABELS))


def test_label_smoothing():
    uniform = losses.cross_entropy(STUDENT, LABELS, label_smoothing=1.0)
    close(uniform, -oracles.log_softmax(STUDENT).mean(-1))
    none = losses.cross_entropy(STUDENT, LABELS, label_smoothing=jnp.zeros(()))
    close(none, losses.cross_entropy(STUDENT, LABELS))


def test_cross_entropy_of_an_impossible_label():
    logits = jnp.array([[0.0, -jnp.inf], [-jnp.inf, -jnp.inf]])
    for smoothing in (0.0, 0.2):
        got = losses.cross_entropy(logits, jnp.array([1, 1]), label_smoothing=smoothing)
        assert np.array_equal(got, [np.inf, 0.0])


def test_hard_distillation_is_cross_entropy_with_the_argmax():
    close(
        losses.hard_distillation(STUDENT, TEACHER),
        losses.cross_entropy(STUDENT, TEACHER.argmax(-1)),
    )
    assert np.all(
        jax.grad(lambda t: losses.hard_distillation(STUDENT, t).sum())(TEACHER) == 0
    )


def test_relations_see_preferences_not_sureness():
    """Pearson's correlation is blind to scale; two classes have but one."""
    sure, unsure = jnp.array([[4.0, 0.0]]), jnp.array([[0.1, 0.0]])
    close(losses.inter_class_relation(sure, unsure), [0.0], 1e-6)
    close(losses.inter_class_relation(sure, -unsure), [2.0])


@pytest.mark.slow
def test_constant_relations_are_0():
    flat = jnp.full((4, 8), 0.1)  # a mean of eight 0.1s is not 0.1 in float32
    for loss in (losses.inter_class_relation, losses.intra_class_relation):
        for pair in ((flat, TEACHER), (TEACHER, flat), (flat, flat)):
            value, slope = jax.value_and_grad(lambda s, t, f=loss: f(s, t).sum())(*pair)
            assert value == 0
            assert np.all(slope == 0)


@pytest.mark.parametrize(("level", "temperature"), [(-50.0, 1.0), (0.0, 300.0)])
def test_relations_of_tiny_and_of_nearly_equal_probabilities(level, temperature):
    """Squares of 1e-22 underflow; 1/V swallows differences of 1e-3 of it."""
    student, teacher = STUDENT.at[:, 3].add(level), TEACHER.at[:, 3].add(level)
    settings = {"temperature": temperature}
    got = losses.intra_class_relation(student, teacher, **settings)
    expected = oracles.intra_class_relation(student, teacher, **settings)
    close(got, expected, 1e-5)


def test_standardized_logits():
    got = losses.standardize_logits(10 * TEACHER + 3)
    close(got.mean(-1), np.zeros(4), 1e-6)
    close(got.std(-1, ddof=1), np.ones(4))
    close(got, losses.standardize_logits(TEACHER), 1e-5)
    flat = jnp.full((7,), 0.1)
    value, pull = jax.vjp(losses.standardize_logits, flat)
    assert np.all(value == 0)
    assert np.all(pull(jnp.arange(7.0))[0] == 0)


def test_levels_of_multi_level_relation():
    off = {"instance_weight": 0.0, "batch_weight": 0.0, "class_weight": 0.0}
    p, q = oracles.softmax(TEACHER, 3.0), oracles.softmax(STUDENT, 3.0)
    levels = {
        # Frobenius norms of the two Gram matrices' differences, over B and V.
        "instance_weight": oracles.forward_kl(STUDENT, TEACHER, temperature=3.0).mean(),
        "batch_weight": np.linalg.norm(q @ q.T - p @ p.T) ** 2 / 4,
        "class_weight": np.linalg.norm(q.T @ q - p.T @ p) ** 2 / 8,
    }
    for level, expected in levels.items():
        weights = {**off, level: 2.0}
        got = losses.multi_level_relation(
            STUDENT, TEACHER, temperatures=(3.0,), **weights
        )
        close(got, 2 * expected)


def test_bounded_regression_stops_once_the_student_is_better():
    targets = jnp.zeros((4, 1))
    student = jnp.array([[0.5], [0.9], [1.0], [2.0]])
    teacher = jnp.ones((4, 1))
    got = losses.bounded_regression(student, teacher, targets, margin=0.5)
    # Squared errors 0.25, 0.81, 1, 4; the teacher's is 1, less the margin 0.5.
    close(got, [0.0, 0.81, 1.0, 4.0])


def test_hinge_and_logistic_of_one_pair():
    student, teacher = jnp.array([0.2, 0.0, 9.0]), jnp.array([3.0, 1.0, -jnp.inf])
    # One ordered pair is left, with gaps 0.2 and 2.
    close(losses.pairwise_hinge(student, teacher), 1.8)
    close(losses.pairwise_hinge(student, teacher, margin=0.5), 0.3)
    close(losses.pairwise_hinge(student, teacher, margin=0.1), 0.0)
    close(losses.logistic_ranking(student, teacher), np.log1p(np.exp(-0.2)))
    assert losses.logistic_ranking(student, jnp.ones(3)) == 0


def test_equal_scores_are_still_pulled_apart():
    student, teacher = jnp.zeros(2), jnp.array([1.0, 0.0])
    for loss in (losses.pairwise_hinge, losses.logistic_ranking):
        slope = jax.grad(lambda s, f=loss: f(s, teacher))(student)
        assert slope[0] < 0 < slope[1]


def test_underflow_keeps_values_and_gradients_finite():
    """Lesson: a finite reverse KL with NaN gradients, where q underflows."""
    student = jnp.array([[0.0, -200.0, -1e4]])
    teacher = jnp.array([[0.0, -1.0, -2.0]])
    for loss in (losses.forward_kl, losses.reverse_kl, losses.jensen_shannon):
        for one, other in ((student, teacher), (teacher, student)):
            value, slope = jax.value_and_grad(lambda s, t, f=loss: f(s, t).sum())(
                one, other
            )
            assert np.isfinite(value)
            assert np.isfinite(slope).all()


def test_a_slot_that_only_the_student_excludes():
    student, teacher = jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])
    assert losses.forward_kl(student, teacher) == np.inf
    # All of the student's mass is on a class of probability one half: log 2.
    close(losses.reverse_kl(student, teacher), np.log(2))
    assert losses.binary_distillation(student, teacher)[1] == np.inf
