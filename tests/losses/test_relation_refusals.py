"""Bad input of relations, attention and scores is refused by name, while traced."""

import jax
import jax.numpy as jnp
import pytest

from kdjax import losses
from tests.losses.relation_cases import sample, select

ROWS = jnp.ones((4, 3))


@pytest.mark.parametrize("case", select())
def test_refuses_integers(case):
    for name in case.shapes:
        inputs = sample(case)
        inputs[name] = inputs[name].astype(jnp.int32)
        with pytest.raises(TypeError, match=f"{name}: got dtype int32, expected float"):
            jax.eval_shape(case, inputs)


@pytest.mark.parametrize("case", select())
def test_refuses_scalars(case):
    for name in case.shapes:
        inputs = {**sample(case), name: jnp.zeros(())}
        with pytest.raises(ValueError, match=rf"{name}: got shape \(\), expected \["):
            case(inputs)


@pytest.mark.parametrize("case", select())
def test_refuses_other_examples(case):
    inputs = sample(case)
    inputs[case.teacher] = inputs[case.teacher][:3]
    with pytest.raises(ValueError, match=rf"{case.student} \(.*{case.teacher} \(3, "):
        case(inputs)


@pytest.mark.parametrize(
    "case", select(lambda case: case.name not in ("similarity_preserving",))
)
def test_refuses_more_axes(case):
    inputs = jax.tree.map(lambda a: a[None], sample(case))
    if case.name in ("margin_mse", "score_kl"):
        assert case(inputs).shape == (1, 4)
        return
    with pytest.raises(ValueError, match=rf"{case.student}: got shape \(1, .*expected"):
        case(inputs)


@pytest.mark.parametrize("case", select())
def test_refuses_masks(case):
    with pytest.raises(TypeError, match="where: got dtype float32, expected bool"):
        case(sample(case), where=jnp.ones(case.mask))
    with pytest.raises(ValueError, match=r"where: got shape \(3,\), expected"):
        case(sample(case), where=jnp.ones(3, bool))


@pytest.mark.parametrize("case", select(lambda case: case.traced))
@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_numbers(case, number):
    for name in case.traced:
        with pytest.raises(ValueError, match=f"{name}: got .*, expected a positive"):
            case(sample(case), **{name: number})
        with pytest.raises(ValueError, match=rf"{name}: got shape \(2,\)"):
            case(sample(case), **{name: jnp.ones(2)})


def test_refuses_widths_that_have_to_agree():
    for loss in (losses.contrastive, losses.margin_mse, losses.score_kl):
        with pytest.raises(ValueError, match=r"student.* \(4, 3\) and .*\(4, 2\): exp"):
            loss(ROWS, ROWS[:, :2])


@pytest.mark.parametrize("shape", [(4, 2, 2), (3, 2, 3), (4, 0, 3)])
def test_refuses_negatives(shape):
    with pytest.raises(ValueError, match=r"negatives: got shape .*\(4, K, 3\)"):
        losses.contrastive_representation(ROWS, ROWS, jnp.ones(shape), dataset_size=9)


def test_refuses_other_heads_and_says_what_takes_them():
    one, two = jnp.ones((1, 1, 3, 3)), jnp.ones((1, 2, 3, 3))
    for loss in (losses.attention_mse, losses.attention_kl):
        with pytest.raises(ValueError, match="self_attention_relation"):
            loss(one, two)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (3, ValueError, "heads: got 3, which does not divide 4, the width of student"),
        (4, ValueError, "heads: got 4, which does not divide 6, the width of teacher"),
        (0, ValueError, "heads: got 0, expected at least 1"),
        (2.0, TypeError, "heads: got float, expected a Python integer"),
    ],
)
def test_refuses_heads(heads, error, message):
    student, teacher = jnp.ones((1, 3, 4)), jnp.ones((1, 3, 6))
    with pytest.raises(error, match=message):
        losses.self_attention_relation(student, teacher, heads=heads)


def test_refuses_orders():
    with pytest.raises(ValueError, match="order: got 0, expected at least 1"):
        losses.correlation_congruence(ROWS, ROWS, order=0)
    with pytest.raises(TypeError, match="order: got float"):
        losses.correlation_congruence(ROWS, ROWS, order=2.0)
