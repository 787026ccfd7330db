"""Sparse targets: exact over k + 1 outcomes, the tail included."""

import functools
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import losses
from kdjax.types import SparseTargets
from tests.losses import oracles
from tests.losses.cases import sample
from tests.losses.running import mesh_of

INPUTS = sample((4, 12))
STUDENT, TEACHER = INPUTS["student_logits"], INPUTS["teacher_logits"]
BOTH = ["sparse_forward_kl", "sparse_reverse_kl"]

both = pytest.mark.parametrize("name", BOTH)


def close(got, expected, tolerance=1e-6):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@functools.cache
def _compiled(name):
    @jax.jit
    def run(student, targets):
        def total(student):
            values = getattr(losses, name)(student, targets)
            return values.sum(), values

        return jax.value_and_grad(total, has_aux=True)(student)

    return run


def with_gradient(name, student, targets):
    (_, values), gradient = _compiled(name)(student, targets)
    return np.array(values), np.array(gradient)


@both
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (5, 2.0), (11, 4.0)])
def test_the_tail_is_exact_at_any_temperature(name, k, temperature):
    """Lesson: DistillKit's tail at temperature 2 gives 0.280 for 0."""
    targets = losses.top_k_targets(TEACHER, k, temperature=temperature)
    hyper = {"k": k, "temperature": temperature}
    expected = getattr(oracles, name)(STUDENT, TEACHER, **hyper)
    values, gradient = with_gradient(name, STUDENT, targets)
    close(values, expected, 2e-6)
    # The gradient too: the classes of the tail share the tail's in proportion to q.
    p, q = oracles.top_k_buckets(STUDENT, TEACHER, **hyper)
    slopes = q - p
    if name == "sparse_reverse_kl":
        score = np.log(q / p)
        slopes = q * (score - (q * score).sum(-1, keepdims=True))
    order = np.argsort(-np.asarray(TEACHER), -1)
    own = np.take_along_axis(oracles.softmax(STUDENT, temperature), order, -1)
    shares = own[:, k:] / own[:, k:].sum(-1, keepdims=True)
    slopes = np.concatenate([slopes[:, :k], slopes[:, k:] * shares], -1)
    close(np.take_along_axis(gradient, order, -1), temperature * slopes, 2e-6)


@both
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_all_classes_are_the_dense_loss(name, temperature):
    """Lesson: at k = V DistillKit is NaN, axolotl off by a factor of k."""
    dense = getattr(losses, name.removeprefix("sparse_"))
    run = jax.value_and_grad(lambda s: dense(s, TEACHER, temperature=temperature).sum())
    value, gradient = run(STUDENT)
    targets = losses.top_k_targets(TEACHER, 12, temperature=temperature)
    assert np.isneginf(targets.tail).all()
    values, slopes = with_gradient(name, STUDENT, targets)
    close(values.sum(), value)
    close(slopes, gradient)


def test_a_student_elsewhere_is_far_off():
    """Lesson: both sides renormalised to the top k give 0, and no gradient outside."""
    teacher = jnp.array([4.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    student = jnp.array([4.0, 3.0, 12.0, 12.0, 0.0, 0.0])
    targets = losses.top_k_targets(teacher, 2)
    value, gradient = with_gradient("sparse_forward_kl", student, targets)
    p, q = oracles.top_k_buckets(student, teacher, k=2)
    close(value, (p * np.log(p / q)).sum())
    assert value > 7
    assert gradient[2] > 0.4


@both
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_agreement_is_zero_without_gradient(name, temperature):
    targets = losses.top_k_targets(TEACHER, 4, temperature=temperature)
    values, gradient = with_gradient(name, TEACHER, targets)
    # Log-probabilities are float32: known to 1e-7.
    assert np.all(values >= 0)
    assert np.all(values < 1e-13 * temperature**2)
    assert np.abs(gradient).max() < 1e-7 * temperature
    # What differs in the tail alone is no difference.
    order = jnp.argsort(TEACHER)[..., ::-1]
    ranked = jnp.take_along_axis(TEACHER, order, -1)
    swapped = jnp.concatenate([ranked[..., :4], ranked[..., :3:-1]], -1)
    same = losses.top_k_targets(ranked, 4, temperature=temperature)
    assert np.all(getattr(losses, name)(swapped, same) < 1e-13 * temperature**2)


def exactly(name, student, teacher, k, temperature):
    """The formula in decimals of 60 digits."""
    with localcontext() as context:
        context.prec = 60

        def outcomes(logits, order):
            powers = [(Decimal(float(z)) / Decimal(temperature)).exp() for z in logits]
            parts = [powers[i] for i in order[:k]]
            parts.append(sum(powers[i] for i in order[k:]))
            return [part / sum(powers) for part in parts]

        order = np.argsort(-np.asarray(teacher), kind="stable")
        p, q = outcomes(teacher, order), outcomes(student, order)
        if name == "sparse_reverse_kl":
            p, q = q, p
        value = sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))
        return float(Decimal(temperature) ** 2 * value)


@both
@pytest.mark.parametrize(
    ("size", "temperature", "tolerance"),
    [(1e-1, 1, 1e-5), (1e-3, 1, 1e-3), (1.5, 100, 1e-4), (0.1, 100, 2e-3)],
)
def test_close_to_equality(name, size, temperature, tolerance):
    """As far as float32 knows the teacher's log-probabilities."""
    rng = np.random.default_rng(0)
    teacher = np.float32(rng.normal(0, 2, (3, 9)))
    student = np.float32(teacher + size * rng.normal(0, 1, (3, 9)))
    targets = losses.top_k_targets(
        jnp.asarray(teacher), 4, temperature=float(temperature)
    )
    got = getattr(losses, name)(jnp.asarray(student), targets)
    rows = zip(student, teacher, strict=True)
    expected = [exactly(name, *row, 4, temperature) for row in rows]
    np.testing.assert_allclose(got, expected, rtol=tolerance)


def test_a_tiny_tail_keeps_its_digits():
    """1 - sum(p) would be 0, and its logarithm -inf."""
    logits = jnp.array([40.0, 39.0, 0.0, -1.0])
    targets = losses.top_k_targets(logits, 2)
    expected = np.log(np.exp([0.0, -1.0]).sum() / np.exp([40.0, 39.0]).sum())
    close(targets.tail, expected)
    # And the student's likewise: log(q_R / p_R) is about -1.
    student = logits + jnp.array([1.0, 1.0, 0.0, 0.0])
    got = losses.sparse_reverse_kl(student, targets)
    assert 0 < got < 1e-15


def test_targets_are_the_likeliest_first():
    targets = losses.top_k_targets(TEACHER, 3, temperature=2.0)
    log_p = oracles.log_softmax(TEACHER, 2.0)
    np.testing.assert_array_equal(targets.indices, np.argsort(-log_p, -1)[:, :3])
    close(targets.log_probs, -np.sort(-log_p, -1)[:, :3])
    close(targets.tail, np.log(np.exp(np.sort(log_p, -1)[:, :-3]).sum(-1)))
    assert targets.temperature == 2.0


def test_masked_classes_are_no_targets():
    keep = jnp.arange(12) < 9
    masked = losses.top_k_targets(
        jnp.where(keep, TEACHER, jnp.nan), 4, where=jnp.broadcast_to(keep, (4, 12))
    )
    expected = losses.top_k_targets(TEACHER[:, :9], 4)
    jax.tree.map(close, masked, expected)


@both
def test_slots_without_use_change_nothing(name):
    targets = losses.top_k_targets(TEACHER, 3)
    # As a cache pads them: of one class, of none, and beyond the last one.
    filling = jnp.broadcast_to(jnp.array([0, 0, -1, 99]), (4, 4))
    padded = SparseTargets(
        jnp.concatenate([filling, targets.indices], -1),
        jnp.concatenate([jnp.full((4, 4), -jnp.inf), targets.log_probs], -1),
        targets.tail,
    )
    for got, expected in zip(
        with_gradient(name, STUDENT, padded),
        with_gradient(name, STUDENT, targets),
        strict=True,
    ):
        close(got, expected)
    assert np.all(getattr(losses, name)(STUDENT, padded) > 0)


@both
def test_a_position_without_targets_is_zero(name):
    targets = losses.top_k_targets(TEACHER.at[1].set(-jnp.inf), 3)
    assert np.isneginf(targets.log_probs[1]).all()
    values, gradient = with_gradient(name, STUDENT, targets)
    assert values[1] == 0
    assert np.all(values[[0, 2, 3]] > 0)
    np.testing.assert_array_equal(gradient[1], 0)


def test_more_slots_than_the_teacher_has_classes():
    """An empty tail: the student's mass there is wrong, and one way infinitely so."""
    teacher = jnp.where(jnp.arange(12) < 4, TEACHER, -jnp.inf)
    targets = losses.top_k_targets(teacher, 6)
    assert np.isneginf(targets.tail).all()
    values, gradient = with_gradient("sparse_forward_kl", STUDENT, targets)
    close(values, losses.forward_kl(STUDENT, teacher))
    expected = jax.grad(lambda s: losses.forward_kl(s, teacher).sum())(STUDENT)
    close(gradient, expected)
    values, gradient = with_gradient("sparse_reverse_kl", STUDENT, targets)
    assert np.isposinf(values).all()
    assert np.isfinite(gradient).all()
    # A student without these classes agrees on the empty tail.
    student = jnp.where(jnp.arange(12) < 4, STUDENT, -jnp.inf)
    values, gradient = with_gradient("sparse_reverse_kl", student, targets)
    close(values, losses.reverse_kl(student, teacher))
    assert np.isfinite(gradient).all()


def test_a_target_that_the_student_excludes_is_infinite():
    targets = losses.top_k_targets(TEACHER, 2)
    student = jnp.where(TEACHER.max(-1, keepdims=True) == TEACHER, -jnp.inf, STUDENT)
    values, gradient = with_gradient("sparse_forward_kl", student, targets)
    assert np.isposinf(values).all()
    assert np.isfinite(gradient).all()


@both
def test_an_index_out_of_range_is_nan_under_jit(name):
    targets = losses.top_k_targets(TEACHER, 2)
    for bad in (12, -1):
        spoilt = SparseTargets(
            targets.indices.at[1, 0].set(bad), targets.log_probs, targets.tail
        )
        values = jax.jit(getattr(losses, name))(STUDENT, spoilt)
        np.testing.assert_array_equal(np.isnan(values), [False, True, False, False])


@both
def test_half_precision_targets(name):
    """bfloat16 log-probabilities are 1 % off and need not sum to 1; nothing breaks."""
    targets = losses.top_k_targets(TEACHER, 4)
    narrow = SparseTargets(
        targets.indices,
        targets.log_probs.astype(jnp.bfloat16),
        targets.tail.astype(jnp.bfloat16),
    )
    got = getattr(losses, name)(STUDENT.astype(jnp.bfloat16), narrow)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, getattr(losses, name)(STUDENT, targets), rtol=0.05)


@both
def test_split_classes_stay_where_they_are(name):
    mesh = mesh_of(data=2, model=2)
    targets = losses.top_k_targets(TEACHER, 3)
    rows = NamedSharding(mesh, P("data"))
    given = (
        jax.device_put(STUDENT, NamedSharding(mesh, P("data", "model"))),
        jax.device_put(targets, rows),
    )
    run = jax.jit(jax.value_and_grad(lambda s, t: getattr(losses, name)(s, t).sum()))
    compiled = run.lower(*given).compile()
    jax.tree.map(close, compiled(*given), run(STUDENT, targets))
    assert "all-gather" not in compiled.as_text()


def test_the_gradient_needs_little_more_than_itself():
    tokens, classes = 256, 8192
    spec = jax.ShapeDtypeStruct((tokens, classes), jnp.float32)
    targets = jax.eval_shape(functools.partial(losses.top_k_targets, k=8), spec)
    run = jax.jit(jax.value_and_grad(lambda s, t: losses.sparse_forward_kl(s, t).sum()))
    memory = run.lower(spec, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.6 * 4 * tokens * classes


def refused(error, match, student=STUDENT, **changes):
    targets = losses.top_k_targets(TEACHER, 3)
    fields = {
        "indices": targets.indices,
        "log_probs": targets.log_probs,
        "tail": targets.tail,
    }
    with pytest.raises(error, match=match):
        losses.sparse_forward_kl(student, SparseTargets(**{**fields, **changes}))


def test_refuses_targets():
    targets = losses.top_k_targets(TEACHER, 3)
    indices, log_probs = targets.indices, targets.log_probs
    with pytest.raises(TypeError, match=r"targets: got .*Array.*top_k_targets makes"):
        losses.sparse_reverse_kl(STUDENT, TEACHER)
    refused(TypeError, "indices: got dtype float32", indices=indices * 1.0)
    refused(ValueError, r"indices: got shape \(2, 3\), .*\(4, k\)", indices=indices[:2])
    refused(ValueError, r"log_probs: got shape \(4, 2\)", log_probs=log_probs[:, :2])
    refused(TypeError, "log_probs: got dtype int32", log_probs=indices)
    refused(ValueError, r"tail: got shape \(\), expected \(4,\)", tail=jnp.zeros(()))
    refused(
        ValueError,
        "indices: got 12, expected less than the 12",
        indices=12 + 0 * indices,
    )
    refused(ValueError, "another vocabulary", student=STUDENT[:, :2])
    refused(
        ValueError,
        "indices: got -1, expected classes",
        indices=indices.at[0, 0].set(-1),
    )
    refused(ValueError, "indices: got 7 twice", indices=7 + 0 * indices)
    refused(ValueError, "temperature: got -1.0", temperature=-1.0)
    refused(TypeError, "temperature: got ArrayImpl", temperature=jnp.ones(()))


def test_refuses_what_top_k_cannot_give():
    with pytest.raises(ValueError, match="k: got 13, expected at most the 12 classes"):
        losses.top_k_targets(TEACHER, 13)
    with pytest.raises(ValueError, match="k: got 0, expected at least 1"):
        losses.top_k_targets(TEACHER, 0)
    with pytest.raises(ValueError, match=r"temperature: got 0\.0"):
        losses.top_k_targets(TEACHER, 2, temperature=0.0)
    with pytest.raises(TypeError, match=r"temperature: got .*Python number"):
        losses.top_k_targets(TEACHER, 2, temperature=jnp.ones(()))
    with pytest.raises(ValueError, match=r"where: got shape \(12,\)"):
        losses.top_k_targets(TEACHER, 2, where=jnp.ones(12, bool))
