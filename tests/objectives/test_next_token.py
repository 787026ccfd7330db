"""Objectives whose logits meet the tokens that they predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import LinearHead, Mean, Objective, Outputs, Term, losses, teachers
from kdjax.objectives import (
    combine,
    hard_labels,
    next_token,
    relations,
    soft_labels,
)

B, T, D, V = 2, 6, 3, 5


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)

    def head():
        hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
        return LinearHead(
            jnp.array(hidden, jnp.float32), jnp.array(kernel, jnp.float32)
        )

    return head(), head(), jnp.array(rng.integers(0, V, (B, T)), jnp.int32)


def apply(objective, student, teacher, batch):
    terms, _ = objective.apply(
        {}, {}, Outputs(student), Outputs(teacher), batch, jnp.array(0)
    )
    return {
        name: (float(t.mean.value()), int(t.mean.count)) for name, t in terms.items()
    }


BOTH = combine(hard_labels(), soft_labels())


def test_each_position_meets_the_token_behind_it(data):
    student, teacher, tokens = data
    logits, targets = student.logits(), teacher.logits()
    hard = losses.cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()
    soft = losses.forward_kl(logits[:, :-1], targets[:, :-1]).mean()
    objective = next_token(BOTH)
    for sides in ((student, teacher), (logits, targets), (student, targets)):
        found = apply(objective, *sides, {"tokens": tokens})
        np.testing.assert_allclose(found["hard"][0], hard, rtol=1e-5)
        np.testing.assert_allclose(found["soft"][0], soft, rtol=1e-5)
        assert found["hard"][1] == found["soft"][1] == B * (T - 1)


def test_only_what_is_asked_for_is_predicted(data):
    student, teacher, tokens = data
    where = jnp.zeros((B, T), bool).at[0, 0].set(True).at[0, 3].set(True)
    segments = jnp.array([[1, 1, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0]])
    found = apply(
        next_token(BOTH, tokens="read", where="made"),
        student,
        teacher,
        {"read": tokens, "made": where},
    )
    # The first token of a row has nothing before it; the fourth has the third.
    expected = losses.cross_entropy(student.logits()[0, 2], tokens[0, 3])
    assert found["hard"] == (pytest.approx(float(expected), rel=1e-5), 1)
    assert found["soft"][1] == 1
    found = apply(
        next_token(BOTH, segments="texts"),
        student,
        teacher,
        {"tokens": tokens, "texts": segments},
    )
    assert found["hard"][1] == found["soft"][1] == 2 * (T - 1) - 2


def test_batch_gets_labels_and_a_mask_of_what_is_predicted(data):
    student, _, tokens = data
    seen = {}

    def look(params, state, student, teacher, batch, step):
        seen.update(batch)
        return {"none": Term(1.0, Mean.of(jnp.zeros(1)))}, state

    looking = Objective(lambda rng, student, teacher: {}, dict, look)
    batch = {"tokens": tokens, "index": jnp.arange(B)}
    next_token(looking).apply(
        {}, {}, Outputs(student), Outputs(None), batch, jnp.array(0)
    )
    np.testing.assert_array_equal(seen["label"], tokens[:, 1:])
    assert seen["mask"].all()
    assert seen["index"].shape == (B,)


@pytest.mark.parametrize("multiplied", [True, False])
def test_cached_targets_stand_for_the_teacher(data, multiplied):
    student, teacher, tokens = data
    targets = losses.top_k_targets(teacher.logits(), V, temperature=2.0)
    source, frozen = teachers.cached(lambda batch: batch["targets"])
    batch = {"tokens": tokens, "targets": targets}
    given = source.outputs(frozen, source.init({}, {}), batch)
    objective = next_token(soft_labels(losses.sparse_forward_kl))
    shown = student.logits() if multiplied else student
    found = apply(objective, shown, given.logits, batch)
    # All classes were kept.
    dense = next_token(soft_labels(temperature=2.0))
    expected = apply(dense, student, teacher, {"tokens": tokens})
    assert found["soft"] == (pytest.approx(expected["soft"][0], rel=1e-5), B * (T - 1))
    with pytest.raises(ValueError, match=r"gives SparseTargets.*sparse_forward_kl"):
        relations(losses.intra_class_relation).apply(
            {}, {}, Outputs(shown), given, batch, jnp.array(0)
        )


def test_gradients_reach_no_last_position(data):
    student, teacher, tokens = data

    def loss(hidden):
        terms, _ = next_token(BOTH).apply(
            {},
            {},
            Outputs(student._replace(hidden=hidden)),
            Outputs(teacher),
            {"tokens": tokens},
            jnp.array(0),
        )
        return sum(term.mean.value() for term in terms.values())

    gradient = jax.grad(loss)(student.hidden)
    assert (gradient[:, -1] == 0).all()
    assert (jnp.abs(gradient[:, :-1]).sum(-1) > 0).all()


def test_what_the_batch_leaves_out_is_not_predicted(data):
    student, teacher, tokens = data
    rows, places = jnp.array([True, False]), jnp.arange(B * T).reshape(B, T) < T + 3
    for mask, count in ((rows, T - 1), (places, T - 1 + 2)):
        found = apply(
            next_token(BOTH), student, teacher, {"tokens": tokens, "mask": mask}
        )
        assert found["hard"][1] == found["soft"][1] == count
    expected = losses.cross_entropy(student.logits()[0, :-1], tokens[0, 1:]).mean()
    found = apply(next_token(BOTH), student, teacher, {"tokens": tokens, "mask": rows})
    assert found["hard"][0] == pytest.approx(float(expected), rel=1e-5)


def test_missing_or_misshapen_entries_are_refused_by_name(data):
    student, teacher, tokens = data
    with pytest.raises(ValueError, match="tokens: got 'tokens'"):
        apply(next_token(BOTH), student, teacher, {"x": tokens})
    for made in (jnp.ones((T,), bool), jnp.ones((B, T), jnp.int32)):
        batch = {"tokens": tokens, "made": made}
        with pytest.raises((ValueError, TypeError), match="where: 'made' of the batch"):
            apply(next_token(BOTH, where="made"), student, teacher, batch)
    with pytest.raises(ValueError, match="where: got 'made', which the batch does not"):
        apply(next_token(BOTH, where="made"), student, teacher, {"tokens": tokens})
    with pytest.raises(ValueError, match="gives none, only features"):
        apply(next_token(BOTH), None, teacher, {"tokens": tokens})
