"""What every relation, attention and score loss must do, over relation_cases.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import losses
from tests.losses import relation_oracles
from tests.losses.relation_cases import CASES, sample, select
from tests.losses.running import mesh_of


@functools.cache
def _compiled(name):
    case = next(case for case in CASES if case.name == name)

    @jax.jit
    def run(inputs, extra):
        def total(inputs):
            values = case(inputs, **extra)
            return jnp.sum(values), values

        return jax.grad(total, has_aux=True)(inputs)

    return run


def value_and_gradients(case, inputs, **extra):
    """The values, and the gradients of their sum with respect to every argument."""
    gradients, values = _compiled(case.name)(inputs, extra)
    return np.array(values), {n: np.array(g) for n, g in gradients.items()}


def assert_close(got, expected, tolerance=2e-6):
    chex.assert_trees_all_close(got, expected, rtol=tolerance, atol=tolerance)


def keep_of(case):
    keep = np.ones(case.count(), bool)
    keep[[2, case.count() - 1]] = False
    return keep


@pytest.mark.parametrize("case", select())
def test_equals_the_formula(case):
    inputs = sample(case)
    values = case(inputs)
    assert values.shape == case.gives
    assert values.dtype == jnp.float32
    assert np.all(values >= 0)
    assert_close(values, np.float32(case.exact(inputs)), 1e-5)
    _, gradients = value_and_gradients(case, inputs)
    assert np.any(gradients[case.student] != 0)


@pytest.mark.parametrize("case", select())
def test_bfloat16_in_is_float32_inside(case):
    inputs = sample(case, dtype=jnp.bfloat16)
    values, gradients = value_and_gradients(case, inputs)
    assert values.dtype == np.float32
    # Exact for the rounded inputs: nothing is added up in bfloat16.
    assert_close(values, np.float32(case.exact(inputs)), 1e-5)
    for gradient in gradients.values():
        assert gradient.dtype == jnp.bfloat16
        assert np.isfinite(gradient.astype(np.float32)).all()


@pytest.mark.parametrize("case", select(lambda case: case.zero))
def test_zero_with_zero_gradient_at_equality(case):
    inputs = sample(case)
    inputs[case.student] = inputs[case.teacher]
    values, gradients = value_and_gradients(case, inputs)
    assert_close(values, np.zeros_like(values), 1e-9)
    # probabilistic_transfer's published epsilon moves it by 1e-8.
    flat = np.zeros_like(gradients[case.student])
    assert_close(gradients[case.student], flat, 5e-7)


@pytest.mark.parametrize("case", select())
def test_value_and_derivatives_in_float64(case):
    """What ``jax.test_util.check_grads`` does, in one program instead of six."""
    with jax.enable_x64(True):
        inputs = sample(case, dtype=jnp.float64)
        student = inputs[case.student]
        along = sample(case, seed=1, dtype=jnp.float64)[case.student]

        @jax.jit
        def derive(student):
            def total(student):
                values = case({**inputs, case.student: student})
                weights = jnp.cos(jnp.arange(values.size)).reshape(values.shape)
                return jnp.sum(values * weights), values

            _, forward, values = jax.jvp(total, (student,), (along,), has_aux=True)
            slope = jax.value_and_grad(total, has_aux=True)
            ((value, _), reverse), (_, second) = jax.jvp(slope, (student,), (along,))
            return value, forward, reverse, second, values

        # Central differences: the error is about step² and 1e-16 / step.
        up, _, up_slope, *_ = derive(student + 1e-5 * along)
        down, _, down_slope, *_ = derive(student - 1e-5 * along)
        _, forward, reverse, second, values = derive(student)
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, case.exact(inputs), rtol=1e-9)
        assert_close(forward, (up - down) / 2e-5, 1e-7)
        assert_close(jnp.vdot(reverse, along), (up - down) / 2e-5, 1e-7)
        assert_close(second, (up_slope - down_slope) / 2e-5, 1e-6)


@pytest.mark.parametrize("case", select())
def test_masked_is_as_if_deleted(case):
    keep = keep_of(case)
    inputs = sample(case)
    masked = {
        name: jnp.where(case.along(keep, array), array, jnp.nan)
        for name, array in inputs.items()
    }
    values, gradients = value_and_gradients(case, masked, where=case.where(keep))
    deleted = {name: case.delete(keep, array) for name, array in inputs.items()}
    expected, slopes = value_and_gradients(case, deleted)
    assert_close(values[..., keep] if case.keeps else values, expected)
    for name, gradient in gradients.items():
        assert_close(np.array(case.delete(keep, gradient)), slopes[name])
        assert np.all(np.array(case.delete(~keep, gradient)) == 0)


@pytest.mark.parametrize("case", select())
def test_all_ones_mask_is_no_mask(case):
    inputs = sample(case)
    where = case.where(np.ones(case.count(), bool))
    assert_close(
        value_and_gradients(case, inputs, where=where),
        value_and_gradients(case, inputs),
    )


@pytest.mark.parametrize("case", select())
def test_all_masked_is_zero_with_zero_gradients(case):
    where = case.where(np.zeros(case.count(), bool))
    inputs = {name: jnp.full_like(a, jnp.nan) for name, a in sample(case).items()}
    values, gradients = value_and_gradients(case, inputs, where=where)
    assert np.all(values == 0)
    assert all(np.all(gradient == 0) for gradient in gradients.values())


DEGENERATE = ["zeros", "zero_student", "constant", "equal_examples", "opposite"]
DEGENERATE += ["large", "tiny"]


def degenerate(case, how):
    inputs = sample(case)
    if how == "zeros":
        return jax.tree.map(jnp.zeros_like, inputs)
    if how == "zero_student":
        return {**inputs, case.student: jnp.zeros_like(inputs[case.student])}
    if how == "constant":
        return jax.tree.map(jnp.ones_like, inputs)
    if how == "equal_examples":
        return jax.tree.map(lambda a: a.at[1:].set(a[:1]), inputs)
    if how == "opposite":
        return {**inputs, case.student: -inputs[case.student].at[1].set(0.0)}
    return jax.tree.map(lambda a: {"large": 1e4, "tiny": 1e-25}[how] * a, inputs)


@pytest.mark.parametrize("case", select())
def test_a_nan_is_never_hidden(case):
    """A loss of 0 for embeddings that are NaN would let a broken run go on."""
    for name in case.shapes:
        inputs = sample(case)
        place = (1,) * inputs[name].ndim
        inputs[name] = inputs[name].at[place].set(jnp.nan)
        assert np.isnan(value_and_gradients(case, inputs)[0]).any(), name


@pytest.mark.parametrize("case", select())
@pytest.mark.parametrize("how", DEGENERATE)
def test_degenerate_inputs_are_finite(case, how):
    inputs = degenerate(case, how)
    values, gradients = value_and_gradients(case, inputs)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    if case.zero and how in ("zeros", "constant"):
        assert_close(values, np.zeros_like(values), 1e-9)


@pytest.mark.parametrize("case", select(lambda case: case.axis == 0))
def test_one_example_has_no_relations(case):
    inputs = {name: array[:1] for name, array in sample(case).items()}
    values, gradients = value_and_gradients(case, inputs)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    if case.relates:
        assert_close(values, np.zeros_like(values), 1e-9)


@pytest.mark.parametrize("case", select(lambda case: case.axis != 0))
def test_one_key_or_candidate_leaves_nothing_to_choose(case):
    inputs = {
        n: a[:, :1] if a.ndim < 4 else a[..., :1] for n, a in sample(case).items()
    }
    values, gradients = value_and_gradients(case, inputs)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.isfinite(values).all()
    if case.name != "attention_mse":
        assert np.all(values == 0)


@pytest.mark.parametrize("case", select())
def test_vmap(case):
    first, second = sample(case), sample(case, seed=1)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    expected = [value_and_gradients(case, each)[0] for each in (first, second)]
    run = jax.jit(jax.vmap(case))
    assert_close(np.array(run(both)), np.stack(expected))


# Scores are classes to forward KL, which is tested for it with the other divergences.
@pytest.mark.parametrize(
    "case", select(lambda case: case.traced and case.name != "score_kl")
)
def test_one_trace_for_many_numbers(case):
    inputs = sample(case)
    private = f"_{case.name}"
    compiled = next(
        getattr(module, private)
        for module in (losses._similarities, losses._contrast)
        if hasattr(module, private)
    )
    case(inputs)
    before = compiled._cache_size()
    values = [
        case(inputs, **{name: case.hyper[name] * f for name in case.traced})
        for f in (0.9, 0.8, 0.7)
    ]
    assert compiled._cache_size() == before
    assert np.any(values[0] != values[1])


@pytest.mark.parametrize("case", select(lambda case: not case.relates))
def test_same_on_a_mesh(case):
    """Losses that relate examples are in test_sharding.py."""
    sharding = NamedSharding(mesh_of(data=4), P("data"))
    inputs = sample(case)
    extra = {"where": case.where(keep_of(case))}
    placed, placed_extra = jax.device_put((inputs, extra), sharding)
    got = _compiled(case.name)(placed, placed_extra)
    chex.assert_trees_all_close(
        jax.device_get(got),
        jax.device_get(_compiled(case.name)(inputs, extra)),
        rtol=2e-6,
        atol=2e-6,
    )


def test_angles_are_never_held_all_at_once():
    rows = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    loss = jax.value_and_grad(losses.relational_angle)
    derive = jax.jit(loss)
    memory = derive.lower(rows, rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512**3 / 4


def test_angles_in_chunks(monkeypatch):
    case = next(case for case in CASES if case.name == "relational_angle")
    inputs = sample(case)
    monkeypatch.setattr(losses._relations, "_CHUNK", 3 * 8 * 8)
    loss = losses._relations._relational_angle.__wrapped__
    derive = jax.jit(jax.value_and_grad(loss))
    value, slope = derive(inputs["student"], inputs["teacher"], None)
    expected, slopes = value_and_gradients(case, inputs)
    assert_close(value, expected)
    assert_close(slope, slopes["student"])


def test_distances_keep_digits_far_from_the_origin():
    case = next(case for case in CASES if case.name == "relational_distance")
    inputs = jax.tree.map(lambda a: jnp.round(a * 64) / 64 + 4096, sample(case))
    values, gradients = value_and_gradients(case, inputs)
    np.testing.assert_allclose(values, case.exact(inputs), rtol=1e-5)
    moved = jax.tree.map(lambda a: a - 4096, inputs)
    assert_close(gradients["student"], value_and_gradients(case, moved)[1]["student"])


def test_the_normalizer_of_the_batch():
    case = next(case for case in CASES if case.name == "contrastive_representation")
    inputs = sample(case)
    values, gradients = value_and_gradients(case, inputs, normalizer=None)
    assert_close(values, np.float32(case.exact(inputs, normalizer=None)), 1e-5)
    contrast = jnp.concatenate([inputs["teacher"][:, None], inputs["negatives"]], 1)
    scores = jnp.einsum("bd,bkd->bk", inputs["student"], contrast) / 2.0
    fixed = jnp.exp(scores).mean() * 20.0
    _, expected = value_and_gradients(case, inputs, normalizer=fixed)
    assert_close(gradients, expected)


def test_scores_of_queries_against_documents_are_features():
    scores = sample(CASES[0])["student"]
    value = losses.similarity_preserving(scores, jnp.sin(scores))
    expected = relation_oracles.similarity_preserving(
        np.float64(scores), np.float64(jnp.sin(scores))
    )
    assert_close(value, np.float32(expected), 1e-5)


def test_attention_takes_a_mask_over_scores_too():
    case = next(case for case in CASES if case.name == "attention_kl")
    inputs = sample(case)
    causal = jnp.tril(jnp.ones((6, 6), bool))
    hidden = jax.tree.map(lambda a: jnp.where(causal, a, -jnp.inf), inputs)
    where = jnp.broadcast_to(causal, (4, 2, 6, 6))
    for loss in (losses.attention_kl, losses.attention_mse):
        values = loss(*inputs.values(), where=where)
        assert_close(values, loss(*hidden.values()))
        assert np.any(values != loss(*inputs.values()))


def test_margins_do_not_see_a_level():
    student, teacher = sample(CASES[-1]).values()
    value = losses.margin_mse(student + 3, teacher - 2)
    assert_close(value, losses.margin_mse(student, teacher), 1e-5)
