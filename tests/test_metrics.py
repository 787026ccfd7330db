"""Metrics against plain NumPy in float64, and exact over uneven batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import metrics

EXAMPLES, CLASSES, BINS = 64, 5, 15


def data(seed=0):
    """Logits of both models, labels of which some are not scored, and a mask."""
    rng = np.random.default_rng(seed)
    # Two decimals, so that no two logits of a row are nearly equal.
    student = np.round(rng.normal(size=(EXAMPLES, CLASSES)) * 2, 2)
    teacher = np.round(student + rng.normal(size=student.shape), 2)
    labels = rng.integers(0, CLASSES, EXAMPLES)
    labels[::7] = -100
    return student, teacher, labels, rng.random(EXAMPLES) < 0.7


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def calibration_error(logits, labels, bins):
    """Equation 3 of Guo et al., bin by bin: sum of |B| / n * |acc(B) - conf(B)|."""
    confidence = np.exp(log_softmax(logits)).max(-1)
    right = logits.argmax(-1) == labels
    error = 0.0
    for bin_ in range(bins):
        lower, upper = bin_ / bins, (bin_ + 1) / bins
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    return error


def oracle(student, teacher, labels, where):
    """All of ``side_by_side`` in float64."""
    student, teacher, labels = student[where], teacher[where], labels[where]
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    expected = {
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).mean(),
        "forward_kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "reverse_kl": (np.exp(log_q) * (log_q - log_p)).sum(-1).mean(),
    }
    scored = labels >= 0
    for who, logits in (("student", student), ("teacher", teacher)):
        log = log_softmax(logits)
        right = logits[scored].argmax(-1) == labels[scored]
        expected |= {
            f"{who}_entropy": -(np.exp(log) * log).sum(-1).mean(),
            f"{who}_accuracy": right.mean(),
            f"{who}_calibration_error": calibration_error(
                logits[scored], labels[scored], BINS
            ),
        }
    return expected


@functools.cache
def jitted():
    def measure(student, teacher, labels, where):
        return metrics.side_by_side(student, teacher, labels, where=where)

    return jax.jit(measure)


def as_arrays(student, teacher, labels, where):
    return jnp.float32(student), jnp.float32(teacher), jnp.int32(labels), where


@pytest.mark.parametrize("seed", [0, 1])
def test_all_equal_their_formulas(seed):
    student, teacher, labels, where = data(seed)
    sums = jitted()(*as_arrays(student, teacher, labels, where))
    expected = oracle(student, teacher, labels, where)
    assert set(sums) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            sums[name].value(), value, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_agreement_counts_what_has_no_label():
    student, teacher, labels, where = data()
    sums = jitted()(*as_arrays(student, teacher, labels, where))
    assert int(sums["agreement"].count) == where.sum()
    scored = (where & (labels >= 0)).sum()
    assert int(sums["student_accuracy"].count) == scored < where.sum()
    assert int(sums["student_calibration_error"].count.sum()) == scored


def test_everything_is_exact_over_uneven_batches():
    arrays = as_arrays(*data())
    whole = jitted()(*arrays)
    total = None
    for rows in (slice(0, 3), slice(3, None)):
        part = jitted()(*(each[rows] for each in arrays))
        total = part if total is None else {n: total[n] + part[n] for n in part}
    for name, sums in whole.items():
        assert float(total[name].value()) == pytest.approx(
            float(sums.value()), rel=1e-6
        ), name
        np.testing.assert_array_equal(total[name].count, sums.count)


def test_masked_positions_may_hold_anything():
    student, teacher, labels, where = data()
    clean = jitted()(*as_arrays(student, teacher, labels, where))
    for junk in (np.nan, np.inf, -np.inf):
        dirty = jitted()(
            *as_arrays(
                np.where(where[:, None], student, junk),
                np.where(where[:, None], teacher, junk),
                np.where(where, labels, 3),
                where,
            )
        )
        for name, sums in clean.items():
            assert float(dirty[name].value()) == float(sums.value()), (name, junk)


def test_nothing_that_counts_gives_zeros():
    student, teacher, labels, _ = data()
    none = jitted()(*as_arrays(student, teacher, labels, np.zeros(EXAMPLES, bool)))
    assert all(float(sums.value()) == 0.0 for sums in none.values())


def test_without_labels_there_is_nothing_about_labels():
    student, teacher, _, _ = data()
    sums = jax.eval_shape(
        metrics.side_by_side, jnp.float32(student), jnp.float32(teacher)
    )
    assert set(sums) == {
        "agreement",
        "forward_kl",
        "reverse_kl",
        "student_entropy",
        "teacher_entropy",
    }


def test_bfloat16_logits_are_summed_in_float32():
    # 4096 rows of equal logits: entropy log 5 of each, confidence 1/5, all right.
    logits = jnp.zeros((4096, CLASSES), jnp.bfloat16)
    labels = jnp.zeros(4096, jnp.int32)
    sums = jitted()(logits, logits, labels, labels == 0)
    entropy = sums["student_entropy"]
    assert entropy.total.dtype == jnp.float32
    np.testing.assert_allclose(entropy.value(), np.log(CLASSES), rtol=1e-5)
    assert float(sums["student_accuracy"].total) == 4096.0
    assert float(sums["agreement"].total) == 4096.0
    calibration = sums["student_calibration_error"]
    assert calibration.confidence.dtype == jnp.float32
    np.testing.assert_allclose(calibration.value(), 0.8, rtol=1e-5)


@pytest.mark.parametrize("bins", [1, 2, 10, 100])
def test_calibration_for_any_number_of_bins(bins):
    student, _, labels, _ = data()
    scored = labels >= 0
    error = metrics.calibration(jnp.float32(student), jnp.int32(labels), bins=bins)
    expected = calibration_error(student[scored], labels[scored], bins)
    np.testing.assert_allclose(error.value(), expected, rtol=1e-5, atol=1e-6)


def test_calibration_bins_are_closed_above():
    # Two classes, equal logits: a confidence of exactly 1/2 belongs into the first of
    # two bins, one of 1 into the second.
    logits = jnp.array([[0.0, 0.0], [0.0, -np.inf]])
    sums = metrics.calibration(logits, jnp.array([0, 1]), bins=2)
    np.testing.assert_array_equal(sums.count, [1, 1])
    np.testing.assert_array_equal(sums.confidence, [0.5, 1.0])
    np.testing.assert_array_equal(sums.correct, [1.0, 0.0])
    assert float(sums.value()) == 0.75


def test_calibration_adds_up_on_the_host_in_float64():
    # evaluate() turns sums to float64: float32 would lose the one beside 2**24.
    one = metrics.calibration(jnp.zeros((1, 2)), jnp.array([0]), bins=1)
    hosted = jax.tree.map(np.float64, jax.device_get(one))
    many = jax.tree.map(lambda leaf: leaf * 2.0**24, hosted)
    assert float((many + hosted).count[0]) == 2**24 + 1


def test_tokens_are_measured_like_examples():
    student, teacher, labels, where = data()
    flat = jitted()(*as_arrays(student, teacher, labels, where))
    shape = (8, EXAMPLES // 8)
    arrays = as_arrays(student, teacher, labels, where)
    tokens = jitted()(*(each.reshape(shape + each.shape[1:]) for each in arrays))
    for name, sums in flat.items():
        assert float(tokens[name].value()) == pytest.approx(float(sums.value())), name


def test_refuses_what_would_broadcast():
    logits, labels = jnp.zeros((4, 4)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"student_logits \(4, 4\).*\(1, 4\)"):
        metrics.agreement(logits, logits[:1])
    with pytest.raises(ValueError, match=r"student_logits \(4, 4\).*\(4, 3\)"):
        metrics.agreement(logits, logits[:, :3])
    for measure in (metrics.accuracy, metrics.calibration):
        with pytest.raises(ValueError, match=r"labels: got shape \(4, 1\)"):
            measure(logits, labels[:, None])
        tokens = jnp.zeros((4, 4, 2))
        with pytest.raises(ValueError, match=r"where: got shape \(4,\).*\(4, 4\)"):
            measure(tokens, jnp.zeros((4, 4), jnp.int32), where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"where: got shape \(3,\)"):
        metrics.entropy(logits, where=jnp.ones(3, bool))


def test_refuses_what_is_no_label_mask_or_logit():
    logits, labels = jnp.zeros((4, 4)), jnp.zeros(4, jnp.int32)
    for measure in (metrics.accuracy, metrics.calibration):
        with pytest.raises(TypeError, match="labels: got dtype float32"):
            measure(logits, labels.astype(jnp.float32))
        with pytest.raises(ValueError, match=r"labels: got shape.*one-hot"):
            measure(logits, jnp.eye(4, dtype=jnp.int32))
        with pytest.raises(ValueError, match=r"labels: got 4.*4 classes"):
            measure(logits, labels + 4)
        with pytest.raises(TypeError, match="where: got dtype int32"):
            measure(logits, labels, where=labels)
        with pytest.raises(TypeError, match="logits: got dtype int32"):
            measure(logits.astype(jnp.int32), labels)
    with pytest.raises(ValueError, match="bins: got 0"):
        metrics.calibration(logits, labels, bins=0)
