"""Feature terms by path, pairs and tuples, and relations of features."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, objectives
from kdjax.objectives import projectors
from kdjax.types import Outputs
from tests.objectives import tiny

BATCH = tiny.batch()
OURS, THEIRS = (tiny.outputs(net, BATCH) for net in (tiny.STUDENT, tiny.TEACHER))
COUNTED = BATCH["mask"]


def test_pairs_are_terms_with_projectors_of_their_own():
    objective = objectives.feature_pairs(
        losses.feature_mse,
        [("first", "first"), ("second", "second")],
        name="hint",
        projector=projectors.linear(),
        weight=100.0,
    )
    params, _ = tiny.started(objective, BATCH)
    kernels = [params[str(i)]["projector"]["0"]["0"]["kernel"] for i in range(2)]
    assert not np.array_equal(*kernels)
    got, _ = tiny.values_of(objective, BATCH)
    for index, level in enumerate(("first", "second")):
        mapped = OURS.features[level] @ kernels[index]
        expected = losses.feature_mse(mapped, THEIRS.features[level])[COUNTED].mean()
        np.testing.assert_allclose(got[f"hint/{index}"].value(), expected, rtol=1e-5)


def test_several_features_go_to_a_loss_as_tuples():
    objective = objectives.features(
        losses.solution_flow,
        student=("first", "second"),
        teacher=("first", "second"),
        projector=projectors.linear(),
        name="fsp",
    )
    params, _ = tiny.started(objective, BATCH)
    mapped = tuple(
        OURS.features[level] @ params["projector"][key]["0"]["kernel"]
        for key, level in (("0", "first"), ("1", "second"))
    )
    target = THEIRS.features["first"], THEIRS.features["second"]
    expected = losses.solution_flow(mapped, target)[COUNTED].mean()
    got, _ = tiny.values_of(objective, BATCH)
    np.testing.assert_allclose(got["fsp"].value(), expected, rtol=1e-5)


def test_positions_are_the_losses_own_mask():
    seen = np.random.default_rng(0).random((tiny.EXAMPLES, 4, 4)) < 0.6
    objective = objectives.features(
        losses.attention_transfer,
        student="first",
        teacher="first",
        positions="seen",
    )
    got, _ = tiny.values_of(objective, BATCH | {"seen": seen})
    values = losses.attention_transfer(
        OURS.features["first"], THEIRS.features["first"], where=jnp.asarray(seen)
    )
    expected = values[COUNTED].mean()
    np.testing.assert_allclose(got["features"].value(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"), [("a", ("b",)), (("a", "b"), ("a",)), (("a",), "b")]
)
def test_paths_must_pair_up(student, teacher):
    with pytest.raises(ValueError, match="expected a path each, or tuples of as many"):
        objectives.features(losses.feature_mse, student=student, teacher=teacher)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs: got none"):
        objectives.feature_pairs(losses.feature_mse, [])


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (losses.relational_distance, dict(student="pooled", teacher="pooled")),
        (losses.relational_angle, dict(student="first", teacher="second", pool=True)),
        (losses.similarity_preserving, dict(student="first", teacher="second")),
        (losses.linear_cka, dict(student="pooled", teacher=None)),
    ],
)
def test_relations_of_features_leave_out_what_does_not_count(loss, options):
    objective = objectives.relations(loss, **options)
    got, _ = tiny.values_of(objective, BATCH)

    def picked(outputs, path):
        found = np.asarray(outputs.logits if path is None else outputs.features[path])
        found = found[COUNTED]
        pooled = options.get("pool") and found.ndim == 4
        return jnp.asarray(found.mean((1, 2)) if pooled else found)

    expected = loss(
        picked(OURS, options["student"]), picked(THEIRS, options["teacher"])
    )
    np.testing.assert_allclose(got["relations"].value(), expected, rtol=1e-5)


def test_relations_project_the_students_feature():
    objective = objectives.relations(
        losses.contrastive,
        student="pooled",
        teacher="pooled",
        projector=projectors.mlp(5),
        where=None,
    )
    params, _ = tiny.started(objective, BATCH)
    mapped = projectors.mlp(5).apply(params["projector"], OURS.features["pooled"])
    expected = losses.contrastive(mapped, THEIRS.features["pooled"])
    got, _ = tiny.values_of(objective, BATCH)
    np.testing.assert_allclose(got["relations"].value(), expected, rtol=1e-5)


def test_a_distillation_token_has_its_own_logits():
    """DeiT: the second head follows the teacher's choice, the first the labels."""
    logits = np.random.default_rng(1).normal(size=(2, tiny.EXAMPLES, tiny.CLASSES))
    student = Outputs(jnp.float32(logits[0]), {"distillation": jnp.float32(logits[1])})
    objective = objectives.combine(
        objectives.hard_labels(weight=0.5),
        objectives.soft_labels(
            losses.hard_distillation, student="distillation", weight=0.5, name="deit"
        ),
    )
    batch = {name: jnp.asarray(array) for name, array in BATCH.items()}
    terms, _ = objective.apply({}, {}, student, THEIRS, batch, jnp.array(0))
    rows = losses.hard_distillation(jnp.float32(logits[1]), THEIRS.logits)
    np.testing.assert_allclose(
        terms["deit"].mean.value(), rows[COUNTED].mean(), rtol=1e-6
    )
    rows = losses.cross_entropy(jnp.float32(logits[0]), jnp.asarray(BATCH["label"]))
    np.testing.assert_allclose(
        terms["hard"].mean.value(), rows[COUNTED].mean(), rtol=1e-6
    )
    bad = objectives.soft_labels(losses.forward_kl, student="token")
    with pytest.raises(ValueError, match="the student gives no feature 'token'"):
        bad.apply({}, {}, student, THEIRS, batch, jnp.array(0))
