"""Means over a linear head: those of the loss over all logits, and their gradients."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import fused, losses
from kdjax.types import LinearHead, Mean
from tests.fused import heads
from tests.losses import cases
from tests.losses.test_golden import ARRAYS, CASES

STUDENT = heads.head(0, scale=0.9, soft_cap=3.0)
TEACHER = heads.head(1, width=6, bias=False, soft_cap=jnp.float32(4.0))
HARD = functools.partial(losses.cross_entropy, label_smoothing=0.1)
MIXED = functools.partial(losses.knowledge_distillation, temperature=2.0, alpha=0.3)


# Classes that stay where some are out.
KEPT = np.arange(heads.CLASSES) % 3 != 1


def without_slots(head):
    return head._replace(bias=jnp.where(KEPT, head.bias, -jnp.inf))


def situations(case):
    """By name: student, others and what counts, all of the same shapes."""
    teacher = heads.head(1, width=6, soft_cap=jnp.float32(4.0))
    everywhere, labels = jnp.ones(heads.BATCH, bool), heads.labels()
    ordinary = STUDENT, heads.others_of(case, teacher, labels)
    kept = jnp.where(labels < 0, labels, jnp.flatnonzero(KEPT)[labels % KEPT.sum()])
    out = without_slots(STUDENT), heads.others_of(case, without_slots(teacher), kept)
    yield "ragged mask", (*ordinary, heads.mask())
    yield "one token", (*ordinary, ~everywhere.at[0, 2].set(False))
    yield "no token", (*ordinary, ~everywhere)
    if case.name != "bounded_regression":  # -inf is no regression target
        yield "classes at -inf", (*out, everywhere)


FAST = {"jensen_shannon", "knowledge_distillation", "sparse_forward_kl"}


@pytest.mark.parametrize(
    "case",
    cases.select(lambda case: case.gives == "position", fast=FAST),
)
def test_every_loss_per_token_equals_itself_over_all_logits(case):
    """The battery's table has every loss, so none is forgotten here.

    With scale, cap and bias, chunks that the tokens do not fill, and each situation.
    """
    loss = functools.partial(case.loss, **case.hyper)

    @jax.jit
    def run(*given):
        both = heads.chunked, heads.plain
        return [heads.with_gradient(mean, loss)(*given) for mean in both]

    for name, given in situations(case):
        got, expected = run(*given)
        if case.name == "logistic_ranking":  # the plain one is off by a millionth
            expected = heads.exact(loss, *given)
        heads.assert_close(got, expected, heads.tolerance(case))
        moved = any(np.any(leaf != 0) for leaf in jax.tree.leaves(got[0]))
        assert moved == (name != "no token"), name


@functools.cache
def mixed_gradient(mean, **options):
    return jax.jit(heads.with_gradient(mean, MIXED, **options))


@pytest.mark.parametrize("chunk_size", [1, 9, 10, None])
def test_chunks_of_any_size_count_every_token_once(chunk_size):
    given = STUDENT, (TEACHER, heads.labels()), heads.mask()
    expected = mixed_gradient(heads.plain)(*given)
    got = mixed_gradient(heads.chunked, chunk_size=chunk_size)(*given)
    heads.assert_close(got, expected)
    chex.assert_trees_all_equal_dtypes(got, expected)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_few_tokens(batch):
    student, teacher = heads.head(0, batch=batch), heads.head(1, batch=batch)
    given = student, (teacher, jnp.full(batch, 2)), None
    expected = mixed_gradient(heads.plain)(*given)
    heads.assert_close(mixed_gradient(heads.chunked)(*given), expected)


TARGETS = {
    "sparse_forward_kl": functools.partial(losses.top_k_targets, k=3, temperature=2.0),
    "sparse_reverse_kl": functools.partial(losses.top_k_targets, k=3, temperature=2.0),
    "sampled_forward_kl": lambda logits: losses.sampled_targets(
        jax.random.key(0), logits, 5, temperature=2.0
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_in_the_place_of_a_teacher(name):
    loss, where = getattr(losses, name), heads.mask()
    targets = TARGETS[name](TEACHER.logits())
    assert targets.temperature == 2.0

    run = jax.jit(heads.with_gradient(heads.chunked, loss))
    expected = heads.exact(loss, STUDENT, (targets,), where)
    heads.assert_close(run(STUDENT, (targets,), where), expected)
    # What a cache has where nothing counts is never looked at.
    nowhere = jnp.where(where[..., None], targets.indices, 999)
    spoilt = dataclasses.replace(targets, indices=nowhere)
    heads.assert_close(run(STUDENT, (spoilt,), where), expected)


def test_dense_teacher():
    given = STUDENT, (TEACHER.logits(), heads.labels()), heads.mask()
    expected = mixed_gradient(heads.plain)(*given)
    heads.assert_close(mixed_gradient(heads.chunked)(*given), expected)


def test_nothing_counts():
    nowhere = jnp.zeros(heads.BATCH, bool)
    given = STUDENT, (TEACHER, heads.labels()), nowhere
    gradient, mean = mixed_gradient(heads.chunked)(*given)
    assert (float(mean.value()), int(mean.count)) == (0.0, 0)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


def test_what_is_masked_may_be_nan():
    where = heads.mask()

    def spoilt(head, by):
        return head._replace(hidden=jnp.where(where[..., None], head.hidden, by))

    given = STUDENT, (TEACHER, heads.labels()), where
    expected = mixed_gradient(heads.chunked)(*given)
    for by in (jnp.nan, jnp.inf):
        others = spoilt(TEACHER, by), jnp.where(where, heads.labels(), 999)
        got = mixed_gradient(heads.chunked)(spoilt(STUDENT, by), others, where)
        heads.assert_close(got, expected, 0)


def test_slots_that_are_out_in_both():
    out = jnp.where(jnp.arange(heads.CLASSES) % 3 == 1, -jnp.inf, 0.0)
    student = heads.head(0)
    student = student._replace(bias=student.bias + out)
    given = student, (heads.head(1)._replace(bias=out), heads.labels() * 0), None
    expected = mixed_gradient(heads.plain)(*given)
    got = mixed_gradient(heads.chunked)(*given)
    heads.assert_close(got, expected)
    np.testing.assert_array_equal(got[0].bias[1::3], 0)


def test_numbers_that_differ_by_token_go_along():
    def loss(student, teacher, settings):
        return losses.forward_kl(student, teacher, temperature=settings["temperature"])

    temperature = 1 + jnp.arange(10.0).reshape(heads.BATCH)
    others = TEACHER, {"temperature": temperature}
    given = STUDENT, others, heads.mask()
    expected = jax.jit(heads.with_gradient(heads.plain, loss))(*given)
    heads.assert_close(
        jax.jit(heads.with_gradient(heads.chunked, loss))(*given), expected
    )


def test_settings_may_be_traced():
    @jax.jit
    def run(step):
        loss = functools.partial(losses.forward_kl, temperature=1.0 + step)
        given = STUDENT, (TEACHER,), None
        both = heads.chunked, heads.plain
        return [heads.with_gradient(mean, loss)(*given) for mean in both]

    heads.assert_close(*run(jnp.int32(2)))


def test_tied_embedding_and_numbers_have_their_gradients():
    embedding, soft_cap = STUDENT.kernel.T, jnp.float32(2.0)

    def value(mean, embedding, soft_cap):
        # The hidden states come from the embedding, too.
        hidden = embedding[heads.labels()]
        head = LinearHead(hidden, embedding.T, soft_cap=soft_cap)
        return mean(losses.reverse_kl, head, (TEACHER,)).value()

    gradient = jax.jit(jax.grad(value, (1, 2)), static_argnums=0)
    expected = gradient(heads.plain, embedding, soft_cap)
    heads.assert_close(gradient(heads.chunked, embedding, soft_cap), expected)


def test_several_means_for_one_pass():
    def mixed(student, teacher, labels):
        hard = losses.cross_entropy(student, labels)
        forward = losses.forward_kl(student, teacher)
        others = {
            "hard": hard,
            "reverse": losses.reverse_kl(student, teacher),
            "entropies": (
                losses.soft_cross_entropy(student, student),
                losses.soft_cross_entropy(teacher, teacher),
            ),
            "agreement": student.argmax(-1) == teacher.argmax(-1),
        }
        return 0.1 * hard + 0.9 * forward, others

    where, labels = heads.mask(), heads.labels()

    def chunked(student):
        mean, others = fused.token_means(
            mixed, student, TEACHER, labels, where=where, chunk_size=3
        )
        # Others have no gradient, so adding one changes none.
        return mean.value() + others["hard"].value(), (mean, others)

    def plain(student):
        values, others = mixed(student.logits(), TEACHER.logits(), labels)
        mean = Mean.of(values, where)
        return mean.value(), (mean, jax.tree.map(lambda x: Mean.of(x, where), others))

    got, expected = jax.jit(
        lambda student: [jax.grad(f, has_aux=True)(student) for f in (chunked, plain)]
    )(STUDENT)
    heads.assert_close(got, expected)


def test_teacher_has_no_gradient():
    def value(teacher, temperature):
        others = teacher, jnp.broadcast_to(temperature, heads.BATCH)
        loss = lambda s, t, by: losses.forward_kl(s, t, temperature=by)  # noqa: E731
        return heads.chunked(loss, STUDENT, others).value()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(value, (0, 1)))(TEACHER, 2.0)):
        np.testing.assert_array_equal(leaf, 0)


def test_second_derivatives():
    def bent(mean, student):
        first = heads.with_gradient(mean, losses.logit_mse)(student, (TEACHER,), None)
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(first[0]))

    run = jax.jit(jax.grad(bent, 1), static_argnums=0)
    heads.assert_close(run(heads.chunked, STUDENT), run(heads.plain, STUDENT), 1e-5)


def test_sums_are_wide_for_narrow_inputs():
    # In bfloat16 a sum of a thousand like terms stands still at 256 of them.
    batch = (1024,)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(1 + 0.1 * rng.normal(size=(*batch, 4)), jnp.bfloat16)
    student = heads.head(0, dtype=jnp.bfloat16)._replace(hidden=hidden)
    teacher = heads.head(1, batch=batch, dtype=jnp.bfloat16)
    run = jax.jit(heads.with_gradient(heads.chunked, losses.forward_kl, chunk_size=2))
    gradient, mean = run(student, (teacher,), None)
    assert mean.total.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("bfloat16")}
    expected = heads.exact(losses.forward_kl, student, (teacher,), None)
    heads.assert_close((gradient, mean), expected, 1e-2)


def test_float64_stays():
    with jax.enable_x64(True):
        widen = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
        given = widen(STUDENT), (widen(TEACHER), heads.labels()), heads.mask()
        expected = jax.jit(heads.with_gradient(heads.plain, MIXED))(*given)
        got = jax.jit(heads.with_gradient(heads.chunked, MIXED))(*given)
        chex.assert_trees_all_equal_dtypes(got, expected)
        heads.assert_close(got, expected, 1e-13)


def published(case):
    """The loss of a published case, and what its mean is to be divided by."""
    hyper = case["hyperparameters"]
    if case["loss"] == "fused_linear_cosine":
        return losses.feature_cosine, 1 / hyper["beta"]
    numbers = {name: hyper[name] for name in ("beta", "temperature")}
    # The published value does not carry temperature².
    loss = functools.partial(losses.jensen_shannon, **numbers)
    return loss, hyper["temperature"] ** 2


FUSED = [name for name, case in CASES.items() if case["loss"].startswith("fused")]


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FUSED)
def test_published_values(name, dtype):
    case, tolerance = CASES[name], 1e-6 if dtype == jnp.float32 else 1e-9
    loss, divisor = published(case)
    with jax.enable_x64(dtype == jnp.float64):
        inputs = {key: ARRAYS[f"{name}/in/{key}"] for key in case["inputs"]}
        labels = inputs.pop("labels", None)
        where = None if labels is None else jnp.asarray(labels >= 0)
        inputs = {key: jnp.asarray(array, dtype) for key, array in inputs.items()}

        @jax.jit
        def run(inputs):
            def value(inputs):
                sides = (
                    LinearHead(
                        inputs[f"{side}_hidden"],
                        inputs[f"{side}_weight"].T,
                        inputs.get(f"{side}_bias"),
                    )
                    for side in ("student", "teacher")
                )
                size = case["hyperparameters"]["chunk_size"]
                mean = fused.token_mean(loss, *sides, where=where, chunk_size=size)
                return mean.value() / divisor

            return jax.value_and_grad(value)(inputs)

        value, gradient = run(inputs)
    np.testing.assert_allclose(value, ARRAYS[f"{name}/out/value"], rtol=tolerance)
    for argument in case["differentiable"]:
        expected = ARRAYS[f"{name}/out/grad/{argument}"]
        error = np.abs(np.asarray(gradient[argument], np.float64) - expected).max()
        assert error <= tolerance * np.abs(expected).max()


def test_whole_numbers_have_no_derivative_and_no_tokens_no_gradient():
    student = heads.head(0)._replace(soft_cap=30, scale=2)
    floating = student._replace(soft_cap=30.0, scale=2.0)

    def gradient(student):
        def value(hidden, kernel):
            head = student._replace(hidden=hidden, kernel=kernel)
            return heads.chunked(losses.forward_kl, head, (heads.head(1),)).value()

        return jax.grad(value, (0, 1))(student.hidden, student.kernel)

    chex.assert_trees_all_equal(gradient(student), gradient(floating))
    empty = student._replace(hidden=student.hidden[:0])

    def of_none(kernel):
        head = empty._replace(kernel=kernel)
        return fused.token_mean(losses.forward_kl, head, empty).value()

    value, by_kernel = jax.value_and_grad(of_none)(student.kernel)
    assert value == 0
    assert not by_kernel.any()
