"""What every loss must do: one battery over the table of cases.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import losses
from tests.losses import relation_cases
from tests.losses.cases import APART, CASES, LOGITS, sample, select
from tests.losses.feature_cases import NAMES as FEATURES
from tests.losses.running import COMPILED, mesh_of

SHAPES = {"position": (4,), "slot": (4, 8), "class": (8,), "scalar": ()}
# Slots that exist in tests of masks, and labels among them.
KEEP = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
KEPT_LABELS = jnp.array([0, 3, 6, 5])


def logits_of(case):
    """The arguments of the loss that are logits."""
    return [name for name in case.arguments if name in LOGITS]


@functools.cache
def _compiled(name):
    case = next(case for case in CASES if case.name == name)

    @jax.jit
    def run(inputs, extra):
        def total(logits):
            values = case({**inputs, **logits}, **extra)
            return jnp.sum(values), values

        logits = {name: inputs[name] for name in logits_of(case)}
        return jax.grad(total, has_aux=True)(logits)

    return run


def value_and_gradients(case, inputs, **extra):
    """The values, and the gradients of their sum with respect to the logits.

    Compiled once per loss and shape: most tests share the program.
    """
    inputs = {name: inputs[name] for name in case.arguments}
    gradients, values = _compiled(case.name)(inputs, extra)
    return np.array(values), {n: np.array(g) for n, g in gradients.items()}


def delete(inputs, keep):
    """The inputs without the slots (``[V]``) that are not kept."""
    kept = {
        name: array if name == "labels" else array[..., keep]
        for name, array in inputs.items()
    }
    return {**kept, "labels": jnp.cumsum(keep)[inputs["labels"]] - 1}


def assert_close(got, expected, tolerance=2e-6):
    chex.assert_trees_all_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", select())
def test_equals_the_formula(case):
    inputs = sample()
    assert_close(case(inputs), np.float32(case.exact(inputs)), 1e-5)


@pytest.mark.parametrize("case", select(lambda case: case.gives == "position"))
def test_one_value_per_position_unreduced(case):
    inputs = sample((2, 3, 8))
    values = case(inputs)
    assert values.shape == (2, 3)
    assert_close(values, np.float32(case.exact(inputs)), 1e-5)


@pytest.mark.parametrize("case", select())
def test_shape_jit_and_grad(case):
    inputs = sample()
    values = case(inputs)
    assert values.shape == SHAPES[case.gives]
    assert values.dtype == jnp.float32
    jitted, gradients = value_and_gradients(case, inputs)
    assert_close(jitted, np.asarray(values))
    for name in logits_of(case):
        assert gradients[name].shape == inputs[name].shape
        assert np.isfinite(gradients[name]).all()
    assert np.any(gradients["student_logits"] != 0)


# Fifty programs, which `pytest -m slow` compiles.
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", select(lambda case: case.gives in ("position", "slot"))
)
def test_one_example_never_reaches_another_under_vmap(case):
    inputs = {name: sample()[name] for name in case.arguments}
    values, gradients = value_and_gradients(case, inputs)
    assert_close(jax.vmap(case)(inputs), values)
    other = {name: sample(seed=1)[name] for name in case.arguments}
    other = {name: other[name].at[0].set(inputs[name][0]) for name in inputs}
    other_values, other_gradients = value_and_gradients(case, other)
    assert np.any(other_values[1:] != values[1:])
    assert np.all(other_values[0] == values[0])
    for name, gradient in gradients.items():
        assert np.all(other_gradients[name][0] == gradient[0])


@pytest.mark.parametrize("case", select())
def test_bfloat16_in_is_float32_inside(case):
    inputs = sample(dtype=jnp.bfloat16)
    values, gradients = value_and_gradients(case, inputs)
    assert values.dtype == np.float32
    # Exact for the rounded inputs: nothing is added up in bfloat16.
    assert_close(values, np.float32(case.exact(inputs)), 1e-5)
    for gradient in gradients.values():
        assert gradient.dtype == jnp.bfloat16
        assert np.isfinite(gradient.astype(np.float32)).all()


@pytest.mark.parametrize("case", select(lambda case: case.zero))
def test_zero_with_zero_gradient_at_equality(case):
    inputs = sample()
    inputs["student_logits"] = inputs["teacher_logits"]
    values, gradients = value_and_gradients(case, inputs)
    # float32's resolution is 1.2e-7; a forgotten entropy or a half of a tie is 0.01
    # and more.
    assert_close(values, np.zeros_like(values), 1e-9)
    assert_close(
        gradients["student_logits"],
        np.zeros((4, 8), np.float32),
        2e-7 * np.abs(inputs["teacher_logits"]).max(),
    )


@pytest.mark.parametrize("case", select(lambda case: not case.signed))
def test_never_negative(case):
    for seed in range(3):
        assert np.all(case(sample(seed=seed)) >= 0)


# One of each way to be written, for what compiles a large program for each.
FAST = {
    *("forward_kl", "jensen_shannon", "alpha_beta", "knowledge_distillation"),
    *("decoupled_kd", "inter_class_relation", "sparse_forward_kl", "logit_mse"),
}


@pytest.mark.parametrize("case", select(lambda case: not case.frozen, fast=FAST))
def test_derivatives_are_those_of_the_value(case):
    """What ``jax.test_util.check_grads`` does, in one program instead of six."""
    names = logits_of(case)
    with jax.enable_x64(True):
        inputs = sample((2, 5), dtype=jnp.float64)
        logits = {name: inputs[name] for name in names}
        along = sample((2, 5), seed=1, dtype=jnp.float64)
        along = {name: along[name] for name in names}

        @jax.jit
        def derive(logits, along):
            def total(logits):
                # Other weights than ones: a sum of divergences may hide a row.
                values = case({**inputs, **logits})
                weights = jnp.cos(jnp.arange(values.size)).reshape(values.shape)
                return jnp.sum(values * weights)

            _, forward = jax.jvp(total, (logits,), (along,))
            (value, reverse), (_, second) = jax.jvp(
                jax.value_and_grad(total), (logits,), (along,)
            )
            return value, forward, reverse, second

        def step(size):
            moved = jax.tree.map(lambda z, v: z + size * v, logits, along)
            return derive(moved, along)

        # Central differences: the error is about step² and 1e-16 / step.
        (up, _, up_slope, _), (down, _, down_slope, _) = step(1e-5), step(-1e-5)
        _, forward, reverse, second = derive(logits, along)
        expected = (up - down) / 2e-5
        assert_close(forward, expected, 1e-7)
        assert_close(sum(jnp.vdot(reverse[n], along[n]) for n in names), expected, 1e-7)
        expected = jax.tree.map(lambda u, d: (u - d) / 2e-5, up_slope, down_slope)
        assert_close(second, expected, 1e-6)


@pytest.mark.parametrize("case", select(lambda case: case.masks == "slots"))
def test_masked_slots_are_as_if_deleted(case):
    inputs = {**sample(), "labels": KEPT_LABELS}
    fill = jnp.array([0, 0, jnp.nan, 0, -jnp.inf, 0, 0, 1e4])
    masked = {name: jnp.where(KEEP, inputs[name], fill) for name in LOGITS}
    where = jnp.broadcast_to(KEEP, (4, 8))
    values, gradients = value_and_gradients(case, {**inputs, **masked}, where=where)
    expected, slopes = value_and_gradients(case, delete(inputs, KEEP))
    assert_close(values, expected, 5e-6)
    for name, gradient in gradients.items():
        assert_close(gradient[:, KEEP], slopes[name], 5e-6)
        assert np.all(gradient[:, ~KEEP] == 0)


@pytest.mark.parametrize("case", select(lambda case: case.masks == "examples"))
def test_masked_examples_are_as_if_deleted(case):
    keep = np.array([1, 0, 1, 1], bool)
    inputs = sample()
    masked = {name: jnp.where(keep[:, None], inputs[name], jnp.nan) for name in LOGITS}
    values, gradients = value_and_gradients(case, masked, where=jnp.asarray(keep))
    deleted = {name: inputs[name][keep] for name in LOGITS}
    expected, slopes = value_and_gradients(case, deleted)
    assert_close(values, expected, 5e-6)
    for name, gradient in gradients.items():
        assert_close(gradient[keep], slopes[name], 5e-6)
        assert np.all(gradient[~keep] == 0)


def everything(case, value):
    return jnp.full((4, 8) if case.masks == "slots" else (4,), value)


@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_all_ones_mask_is_no_mask(case):
    inputs = sample()
    assert_close(case(inputs, where=everything(case, True)), case(inputs))


@pytest.mark.parametrize("case", select(lambda case: case.masks))
def test_all_masked_is_zero_with_zero_gradients(case):
    inputs = sample()
    values, gradients = value_and_gradients(case, inputs, where=everything(case, False))
    assert np.all(values == 0)
    assert all(np.all(gradient == 0) for gradient in gradients.values())


@pytest.mark.parametrize("case", select(lambda case: case.name != "bounded_regression"))
def test_slot_at_minus_infinity_on_both_sides_is_out(case):
    inputs = {**sample(), "labels": KEPT_LABELS}
    for name in LOGITS:
        inputs[name] = jnp.where(KEEP, inputs[name], -jnp.inf)
    values, gradients = value_and_gradients(case, inputs)
    if case.name == "standardize_logits":  # out of it stays out of it
        assert np.all(np.isneginf(values[:, ~KEEP]))
        values = values[:, KEEP]
    assert np.isfinite(values).all()
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()
        assert np.all(gradient[:, ~KEEP] == 0)
    if case.excludes == "deleted":
        expected, _ = value_and_gradients(case, delete(inputs, KEEP))
        assert_close(values, expected, 5e-6)


@pytest.mark.parametrize("side", LOGITS)
@pytest.mark.parametrize("case", select(lambda case: case.name != "bounded_regression"))
def test_minus_infinity_on_one_side_is_never_nan(case, side):
    inputs = {**sample(), "labels": KEPT_LABELS}
    inputs[side] = inputs[side].at[:, 2].set(-jnp.inf)
    values, gradients = value_and_gradients(case, inputs)
    assert not np.isnan(values).any()
    assert not np.isnan(gradients["student_logits"]).any()
    if np.isfinite(values).all():
        assert np.isfinite(gradients["student_logits"]).all()


@pytest.mark.parametrize("case", select())
def test_a_nan_is_never_hidden(case):
    """A loss of 0 for logits that are NaN would let a broken run go on."""
    for name in (name for name in case.arguments if name != "labels"):
        inputs = sample()
        inputs[name] = inputs[name].at[0, 3].set(jnp.nan)
        values, _ = value_and_gradients(case, inputs)
        assert np.isnan(values).any(), name


@pytest.mark.parametrize("case", select())
def test_huge_logits_stay_finite(case):
    inputs = sample()
    for name in LOGITS:
        inputs[name] = 1e4 * jnp.sign(inputs[name]) + inputs[name]
    values, gradients = value_and_gradients(case, inputs)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("case", select(lambda case: case.name != "bounded_regression"))
def test_one_class_is_finite(case):
    inputs = sample((4, 1))
    values, gradients = value_and_gradients(case, inputs)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    if case.gives != "slot" and case.name != "logit_mse":
        assert np.all(values == 0)  # with one class there is nothing to choose


@pytest.mark.parametrize("case", select(lambda case: case.labelled))
def test_a_position_without_label_is_not_scored(case):
    inputs = sample()
    expected, slopes = value_and_gradients(case, inputs)
    inputs["labels"] = inputs["labels"].at[1].set(-100)
    for name in LOGITS:
        inputs[name] = inputs[name].at[1].set(jnp.nan)
    values, gradients = value_and_gradients(case, inputs)
    expected[1] = 0
    assert_close(values, expected)
    for name, gradient in gradients.items():
        slopes[name][1] = 0
        assert_close(gradient, slopes[name])


@pytest.mark.parametrize("case", select(lambda case: case.labelled))
def test_a_label_beyond_the_classes_is_nan_under_jit(case):
    inputs = {name: sample()[name] for name in case.arguments}
    inputs["labels"] = inputs["labels"].at[1].set(8)
    values = jax.jit(lambda inputs: case(inputs))(inputs)
    assert np.array_equal(np.isnan(values), [False, True, False, False])


@pytest.mark.parametrize(
    "case",
    select(
        lambda case: (
            len(logits_of(case)) == 2
            and not case.targets
            and case.name != "universal_logit"  # takes any number of classes
        )
    ),
)
@pytest.mark.parametrize("shape", [(4, 6), (1, 8), (4, 8, 1)])
def test_refuses_other_shapes_by_name(case, shape):
    inputs = sample()
    inputs["teacher_logits"] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=r"student\w* \(4, 8\),? (and )?teacher"):
        case(inputs)


def scaled(hyper, factor):
    def times(value):
        return value * factor if isinstance(value, float) else value

    return jax.tree.map(times, dict(hyper))


@pytest.mark.parametrize("case", select(lambda case: case.hyper))
def test_one_compilation_for_many_temperatures(case):
    inputs = sample()
    case(inputs, **scaled(case.hyper, 0.99))
    before = len(COMPILED)
    values = [case(inputs, **scaled(case.hyper, f)) for f in (0.98, 0.97, 0.96)]
    assert len(COMPILED) == before
    if case.name != "bounded_regression":  # its margin only moves a threshold
        assert np.any(values[0] != values[1])


@pytest.mark.parametrize("case", select(fast=FAST))
def test_same_on_a_mesh(case):
    # Batch and classes are both sharded.
    mesh = mesh_of(data=2, model=2)
    inputs = {name: sample()[name] for name in case.arguments}
    placed = {
        name: jax.device_put(
            array, NamedSharding(mesh, P("data", "model") if array.ndim > 1 else P())
        )
        for name, array in inputs.items()
    }
    run = _compiled(case.name)
    compiled = run.lower(placed, {}).compile()
    assert_close(compiled(placed, {}), run(inputs, {}))
    if not case.sorts and case.gives in ("position", "slot"):
        assert "all-gather" not in compiled.as_text()


def test_every_exported_loss_is_in_the_table():
    tables = CASES + relation_cases.CASES
    names = {case.loss.__name__ for case in tables}
    assert set(losses.__all__) - {"UNSCORED"} == names | FEATURES | set(APART)
