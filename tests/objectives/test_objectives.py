"""Objectives: weights, schedules, what counts, and what they ask of the models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, objectives
from kdjax.types import Mean, Objective, Outputs, Term

EXAMPLES, TOKENS, CLASSES = 4, 3, 5


def logits(seed, *shape):
    shape = shape or (EXAMPLES, CLASSES)
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


STUDENT, TEACHER = Outputs(logits(0)), Outputs(logits(1))
LABELS = jnp.array([3, -100, 0, 1])
MASK = jnp.array([True, True, False, True])


def terms_of(objective, student=STUDENT, teacher=TEACHER, batch=None, step=0):
    """The terms at a step, computed inside jit; a Python weight stays one."""
    weights = {}

    @jax.jit
    def run(student, teacher, batch, step):
        terms, _ = objective.apply({}, {}, student, teacher, batch, step)
        weights.update({n: t.weight for n, t in terms.items()})
        return {n: (jnp.asarray(t.weight), t.mean) for n, t in terms.items()}

    got = run(student, teacher, {} if batch is None else batch, jnp.int32(step))
    return {
        name: Term(
            weights[name] if isinstance(weights[name], (int, float)) else weight, mean
        )
        for name, (weight, mean) in got.items()
    }


def cross_entropy(logits, labels):
    """-log softmax(logits)[label] in float64, by rows."""
    logits = np.float64(logits)
    top = np.log(np.exp(logits).sum(-1))
    return top - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def test_hard_labels_average_over_what_is_labelled_and_not_masked():
    rows = [0, 3]  # 1 has no label, 2 is masked
    got = terms_of(
        objectives.hard_labels(weight=0.25), batch={"label": LABELS, "mask": MASK}
    )["hard"]
    expected = cross_entropy(STUDENT.logits, np.maximum(LABELS, 0))[rows].mean()
    assert (got.weight, int(got.mean.count)) == (0.25, 2)
    np.testing.assert_allclose(got.mean.value(), expected, rtol=1e-6)


def test_hard_labels_smooth_by_schedule():
    # Smoothing all of it leaves the mean of -log softmax over the classes.
    smoothing = optax.linear_schedule(0.0, 1.0, 10)
    objective = objectives.hard_labels(
        name="task", labels="y", label_smoothing=smoothing
    )
    labels = jnp.array([0, 1, 2, 3])
    ends = {
        0: cross_entropy(STUDENT.logits, np.asarray(labels)).mean(),
        10: np.mean(
            [
                cross_entropy(STUDENT.logits, np.full(EXAMPLES, index))
                for index in range(CLASSES)
            ]
        ),
    }
    for step, expected in (ends | {5: (ends[0] + ends[10]) / 2}).items():
        got = terms_of(objective, batch={"y": labels}, step=step)["task"]
        np.testing.assert_allclose(got.mean.value(), expected, rtol=1e-5)


def test_soft_labels_take_any_loss_with_its_settings():
    objective = objectives.soft_labels(losses.reverse_kl, temperature=3.0)
    got = terms_of(objective)["soft"]
    expected = losses.reverse_kl(STUDENT.logits, TEACHER.logits, temperature=3.0).mean()
    assert (got.weight, int(got.mean.count)) == (1.0, EXAMPLES)
    np.testing.assert_allclose(got.mean.value(), expected, rtol=1e-6)


def test_soft_labels_hand_labels_to_losses_that_take_them():
    objective = objectives.soft_labels(
        losses.knowledge_distillation,
        labels="label",
        name="kd",
        alpha=0.25,
        temperature=2.0,
    )
    got = terms_of(objective, batch={"label": LABELS})["kd"]
    kd = functools.partial(losses.knowledge_distillation, alpha=0.25, temperature=2.0)
    labelled = np.asarray(LABELS) >= 0
    expected = kd(STUDENT.logits, TEACHER.logits, LABELS)[labelled].mean()
    assert int(got.mean.count) == 3
    np.testing.assert_allclose(got.mean.value(), expected, rtol=1e-6)


def test_weights_and_temperatures_follow_the_step():
    objective = objectives.soft_labels(
        losses.forward_kl,
        weight=optax.linear_schedule(0.0, 1.0, 4),
        temperature=optax.piecewise_constant_schedule(2.0, {3: 4.0}),
    )
    for step, weight, temperature in ((0, 0.0, 2.0), (2, 0.5, 2.0), (5, 1.0, 8.0)):
        got = terms_of(objective, step=step)["soft"]
        expected = losses.forward_kl(
            STUDENT.logits, TEACHER.logits, temperature=temperature
        )
        assert float(got.weight) == weight
        np.testing.assert_allclose(got.mean.value(), expected.mean(), rtol=1e-5)


MASKS = {
    "example": np.array([1, 0, 1, 1], bool),
    "token": np.random.default_rng(0).random((EXAMPLES, TOKENS)) < 0.5,
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_per_example_or_per_token(kind):
    shape = EXAMPLES, TOKENS, CLASSES
    student, teacher = logits(2, *shape), logits(3, *shape)
    labels = np.arange(EXAMPLES * TOKENS).reshape(EXAMPLES, TOKENS) % CLASSES
    mask = MASKS[kind]
    both = objectives.combine(
        objectives.hard_labels(where="valid"), objectives.soft_labels(where="valid")
    )
    batch = {"valid": jnp.array(mask), "label": jnp.array(labels)}
    got = terms_of(both, Outputs(student), Outputs(teacher), batch)
    hard = cross_entropy(student, labels)[mask]
    soft = np.asarray(losses.forward_kl(student, teacher))[mask]
    for name, values in (("hard", hard), ("soft", soft)):
        assert int(got[name].mean.count) == values.size > 0
        np.testing.assert_allclose(got[name].mean.value(), values.mean(), rtol=1e-5)


def test_mask_is_found_by_its_usual_name_and_can_be_turned_off():
    usual = terms_of(objectives.soft_labels(), batch={"mask": MASK})["soft"]
    other = terms_of(
        objectives.soft_labels(where="valid"),
        batch={"valid": MASK, "mask": jnp.zeros(EXAMPLES, bool)},
    )["soft"]
    everything = terms_of(objectives.soft_labels(where=None), batch={"mask": MASK})
    assert int(usual.mean.count) == int(other.mean.count) == 3
    assert float(usual.mean.total) == float(other.mean.total)
    assert int(everything["soft"].mean.count) == EXAMPLES


@pytest.mark.parametrize(
    "loss", [losses.intra_class_relation, losses.multi_level_relation]
)
def test_masking_a_relation_deletes_the_example(loss):
    keep = np.asarray(MASK)
    student = Outputs(jnp.where(MASK[:, None], STUDENT.logits, jnp.nan))
    masked = terms_of(objectives.relations(loss), student, batch={"mask": MASK})
    deleted = terms_of(
        objectives.relations(loss),
        Outputs(STUDENT.logits[keep]),
        Outputs(TEACHER.logits[keep]),
    )
    value = float(deleted["relations"].mean.value())
    assert value > 0
    assert float(masked["relations"].mean.value()) == pytest.approx(value, rel=1e-5)


def squared_error(student, teacher, *, scale=1.0):
    return scale * ((student - teacher) ** 2).mean(-1)


def test_features_go_by_path_on_either_side():
    small, large = logits(4, EXAMPLES, 6), logits(5, EXAMPLES, 6)
    objective = objectives.features(
        squared_error,
        student="blocks/1",
        teacher="layer/3",
        weight=2.0,
        scale=lambda step: 1.0 + step,
    )
    got = terms_of(
        objective,
        Outputs(None, {"blocks/1": small, "other": large}),
        Outputs(None, {"layer/3": large, "other": small}),
        {"mask": MASK},
        step=1,
    )["features"]
    keep = np.asarray(MASK)
    expected = 2 * ((np.asarray(small) - np.asarray(large))[keep] ** 2).mean()
    assert (got.weight, int(got.mean.count)) == (2.0, 3)
    np.testing.assert_allclose(got.mean.value(), expected, rtol=1e-5)


def test_monitor_is_reported_and_never_differentiated():
    # At 0 the root has the value 0 and the gradient infinity, times 0: NaN.
    def distance(student, teacher, *, where):
        gap = jnp.sqrt(((student - teacher) ** 2).sum(-1))
        return Mean.of(gap, where)

    goal = objectives.combine(
        objectives.soft_labels(),
        objectives.monitor(distance, name="distance"),
    )

    def loss(logits, with_monitor):
        terms, _ = goal.apply({}, {}, Outputs(logits), STUDENT, {}, jnp.int32(0))
        assert terms["distance"].weight == 0
        total = sum(
            term.weight * term.mean.value()
            for term in terms.values()
            if with_monitor or term.weight != 0
        )
        return total, terms["distance"].mean.value()

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    slope, seen = gradient(STUDENT.logits, False)
    np.testing.assert_allclose(slope, np.zeros_like(slope), atol=1e-7)
    assert float(seen) == 0.0
    assert np.isnan(gradient(STUDENT.logits, True)[0]).all()


def trained(params):
    """An objective with parameters and a state that counts its calls."""

    def apply(own, state, student, teacher, batch, step):
        total = jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, own))
        mean = Mean(jnp.float32(total), jnp.int32(1))
        return {f"trained{len(jax.tree.leaves(params))}": Term(1.0, mean)}, state + 1

    def init(rng, student, teacher):
        return jax.tree.map(lambda x: jax.random.normal(rng, x.shape), params)

    return Objective(init, lambda: jnp.zeros(2), apply)


def test_combine_keeps_parameters_and_states_apart():
    # Parameters and state may be arrays as well as dicts.
    one = trained(jnp.zeros(3))
    two = trained({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    goal = objectives.combine(objectives.soft_labels(), one, two)
    params = goal.init(jax.random.key(0), STUDENT, TEACHER)
    assert jax.tree.map(jnp.shape, params) == {"1": (3,), "2": {"a": (2,), "b": (2,)}}
    # Each draws with a key of its own.
    assert params["1"][0] != params["2"]["a"][0]
    state = goal.init_state()
    assert sorted(state) == ["1", "2"]
    terms, changed = goal.apply(params, state, STUDENT, TEACHER, {}, jnp.int32(0))
    assert sorted(terms) == ["soft", "trained1", "trained2"]
    sums = {"1": params["1"].sum(), "2": sum(map(jnp.sum, params["2"].values()))}
    for key, total in sums.items():
        got = terms[f"trained{key}"].mean.value()
        np.testing.assert_allclose(got, total, rtol=1e-5)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    np.testing.assert_array_equal(changed["2"], np.ones(2))


def test_combine_of_plain_terms_holds_nothing():
    goal = objectives.combine(objectives.combine(objectives.soft_labels()))
    assert goal.init(jax.random.key(0), STUDENT, TEACHER) == {}
    assert goal.init_state() == {}
    terms, state = goal.apply({}, {}, STUDENT, TEACHER, {}, jnp.int32(0))
    assert (list(terms), state) == (["soft"], {})


def refused(objective, match, error=ValueError, batch=None, **outputs):
    with pytest.raises(error, match=match):
        terms_of(objective, batch=batch, **outputs)


def test_refuses_names_that_clash():
    twice = objectives.combine(objectives.soft_labels(), objectives.soft_labels())
    refused(twice, r"name: \['soft'\] is the name of several terms")
    with pytest.raises(ValueError, match="objectives: got none"):
        objectives.combine()


def test_refuses_a_feature_that_a_model_does_not_give():
    objective = objectives.features(
        squared_error, student="embed", teacher="blocks/3", name="hint"
    )
    given = Outputs(None, {"embed": jnp.ones((2, 3))})
    refused(
        objective,
        r"term 'hint': the teacher gives no feature 'blocks/3'.*\['embed'\].*features=",
        student=given,
        teacher=given,
    )
    refused(objective, r"term 'hint': the student gives no feature 'embed'.*\[\]")


def test_refuses_what_the_batch_does_not_have():
    refused(
        objectives.hard_labels(),
        r"labels: got 'label', which the batch does not have; it has \['x', 'y'\]",
        batch={"x": MASK, "y": LABELS},
    )
    kd = objectives.soft_labels(losses.decoupled_kd, labels="class")
    refused(kd, "labels: got 'class'", batch={"label": LABELS})
    refused(
        objectives.soft_labels(where="valid"),
        r"where: got 'valid', which the batch does not have; it has \['mask'\]",
        batch={"mask": MASK},
    )


def test_refuses_masks_that_would_broadcast():
    soft = objectives.soft_labels()
    for shape in ((EXAMPLES - 1,), (1,), (), (EXAMPLES, 1)):
        refused(
            soft, r"where: 'mask' of the batch", batch={"mask": jnp.ones(shape, bool)}
        )
    for dtype in (jnp.int32, jnp.float32):
        refused(
            objectives.combine(objectives.hard_labels(), soft),
            r"where: 'mask' of the batch has dtype .*expected bool",
            TypeError,
            batch={"mask": jnp.ones(EXAMPLES, dtype), "label": LABELS},
        )


def test_refuses_labels_that_are_none():
    hard = objectives.hard_labels()
    floats = {"label": LABELS.astype(jnp.float32)}
    refused(hard, "labels: got dtype float32", TypeError, batch=floats)
    one_hot = {"label": jnp.eye(EXAMPLES, CLASSES, dtype=jnp.int32)}
    refused(hard, r"labels: got shape \(4, 5\).*one-hot", batch=one_hot)


def test_refuses_settings_out_of_range():
    for weight in (np.nan, np.inf):
        with pytest.raises(ValueError, match="weight of 'soft': got"):
            objectives.soft_labels(weight=weight)
    refused(objectives.soft_labels(temperature=0.0), "temperature: got 0.0")
    refused(
        objectives.hard_labels(label_smoothing=1.5),
        "label_smoothing: got 1.5",
        batch={"label": LABELS},
    )
    kd = objectives.soft_labels(
        losses.knowledge_distillation, labels="label", alpha=-0.1, temperature=2.0
    )
    refused(kd, "alpha: got -0.1", batch={"label": LABELS})


def test_refuses_models_without_logits_or_of_another_vocabulary():
    refused(objectives.soft_labels(), "logits: this model", teacher=Outputs(None))
    refused(
        objectives.soft_labels(),
        r"student_logits \(4, 5\) and teacher_logits \(4, 6\)",
        teacher=Outputs(logits(1, EXAMPLES, 6)),
    )
