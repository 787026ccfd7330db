"""Objectives that train parts of their own: VID, ReviewKD, MGD, FT."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kdjax import losses, objectives
from kdjax.objectives import split_over
from kdjax.train import make_mesh
from tests.marks import rest_slow
from tests.objectives import tiny

BATCH = tiny.batch()
LEVEL = dict(student="second", teacher="second")


def maps(level):
    nets = (tiny.STUDENT, tiny.TEACHER)
    return [np.float64(tiny.outputs(net, BATCH).features[level]) for net in nets]


def gradients(objective, term, step=0):
    """Of one term, with respect to its own parts, the student and the teacher."""
    own, state = tiny.started(objective, BATCH)

    def loss(own, ours, theirs, batch):
        shown = tiny.STUDENT.model.apply(ours, {}, batch, rng=None, train=True)[0]
        target = tiny.TEACHER.model.apply(theirs, {}, batch, rng=None, train=True)[0]
        target = jax.lax.stop_gradient(target)
        terms, _ = objective.apply(own, state, shown, target, batch, jnp.array(step))
        return terms[term].mean.value()

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    return run(own, tiny.STUDENT.params, tiny.TEACHER.params, BATCH)


def moves(tree):
    return [bool(np.any(leaf)) for leaf in jax.tree.leaves(tree)]


def test_vid_is_its_formula_with_a_regressor_before():
    objective = objectives.variational_information(**LEVEL)
    params, _ = tiny.started(objective, BATCH)
    mean, target = maps("second")
    layers = [params["regressor"][str(i)]["kernel"] for i in range(3)]
    for index, kernel in enumerate(layers):
        mean = (np.maximum(mean, 0) if index else mean) @ np.float64(kernel)
    # The variance starts at 5.
    values = 0.5 * ((mean - target) ** 2 / 5 + np.log(5))
    got, _ = tiny.values_of(objective, BATCH)
    expected = values[BATCH["mask"]].mean()
    np.testing.assert_allclose(got["vid"].value(), expected, rtol=1e-5)


def test_vid_learns_the_variance_that_is_left():
    """Lesson: MDistiller leaves VID's variances out of the optimizer."""
    objective = objectives.variational_information(**LEVEL)
    params, _ = tiny.started(objective, BATCH)
    outputs = [tiny.outputs(net, BATCH) for net in (tiny.STUDENT, tiny.TEACHER)]

    @jax.jit
    def update(scale):
        def loss(scale):
            own = params | {"log_scale": scale}
            terms, _ = objective.apply(own, {}, *outputs, BATCH, jnp.array(0))
            return terms["vid"].mean.value()

        return scale - 5.0 * jax.grad(loss)(scale)

    scale = params["log_scale"]
    for _ in range(3000):
        scale = update(scale)
    mean, target = maps("second")
    for index in range(3):
        kernel = np.float64(params["regressor"][str(index)]["kernel"])
        mean = (np.maximum(mean, 0) if index else mean) @ kernel
    left = ((mean - target) ** 2)[BATCH["mask"]].mean((0, 1, 2))
    np.testing.assert_allclose(jax.nn.softplus(scale) + 1e-5, left, rtol=1e-3)


TRAINED = {
    "vid": objectives.variational_information(**LEVEL),
    "mgd": objectives.masked_generation(**LEVEL),
    "review": objectives.review(
        pairs=[("first", "first"), ("second", "second"), ("pooled", "pooled")]
    ),
}


@pytest.mark.parametrize("term", rest_slow(TRAINED, lambda term: term == "review"))
def test_every_part_and_the_student_learn_and_the_teacher_does_not(term):
    objective = TRAINED[term]
    own, ours, theirs = gradients(objective, term)
    assert all(moves(own))
    assert moves(ours["first"]) == [True]
    assert not any(moves(theirs))


def test_factor_transfer_keeps_its_two_trainings_apart():
    objective = objectives.factor_transfer(**LEVEL)
    own, ours, theirs = gradients(objective, "ft")
    assert all(moves(own["translator"]))
    assert moves(ours["first"]) == [True]
    assert not any(moves((own["encoder"], own["decoder"], theirs)))
    own, ours, theirs = gradients(objective, "ft/paraphraser")
    assert all(moves((own["encoder"], own["decoder"])))
    assert not any(moves((own["translator"], ours, theirs)))


def test_factor_transfer_restores_the_teacher_and_compares_factors():
    objective = objectives.factor_transfer(**LEVEL, ratio=0.34)
    params, _ = tiny.started(objective, BATCH)
    assert params["encoder"]["1"]["kernel"].shape == (3, 3, 6, 2)
    ours, theirs = maps("second")

    def stack(params, x):
        for index in range(3):
            layer = params[str(index)]
            x = convolved(x, np.float64(layer["kernel"]))
            if "scale" in layer:
                x = standardized(x)
            x = np.where(x > 0, x, 0.1 * x)
        return x

    factor = stack(params["encoder"], theirs)
    translated = stack(params["translator"], ours)
    restored = stack(params["decoder"], factor)
    got, _ = tiny.values_of(objective, BATCH)
    expected = ((restored - theirs) ** 2)[BATCH["mask"]].mean()
    np.testing.assert_allclose(got["ft/paraphraser"].value(), expected, rtol=1e-5)
    values = losses.factor_transfer(jnp.float32(translated), jnp.float32(factor))
    expected = np.asarray(values)[BATCH["mask"]].mean()
    np.testing.assert_allclose(got["ft"].value(), expected, rtol=1e-4)


def convolved(x, kernel):
    """A convolution with zeros around, in NumPy."""
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    total = 0.0
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            window = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
            total = total + window @ kernel[i, j]
    return total


def standardized(x):
    """By channel, by the statistics of the examples that count."""
    counting = x[BATCH["mask"]]
    mean, variance = counting.mean((0, 1, 2)), counting.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-5)


def normalized(params, x):
    x = convolved(x, np.float64(params["kernel"]))
    return standardized(x) * np.float64(params["scale"]) + np.float64(params["bias"])


def test_review_fuses_from_the_last_level_to_the_first():
    pairs = [("first", "first"), ("second", "second"), ("pooled", "pooled")]
    objective = objectives.review(pairs=pairs, width=5)
    params, _ = tiny.started(objective, BATCH)
    total, deeper = 0.0, None
    for index in (2, 1, 0):
        own, (ours, theirs) = params[str(index)], maps(pairs[index][0])
        if ours.ndim == 2:
            ours, theirs = ours[:, None, None], theirs[:, None, None]
        x = normalized(own["enter"], ours)
        if deeper is not None:
            factor = x.shape[1] // deeper.shape[1]
            deeper = deeper.repeat(factor, 1).repeat(factor, 2)
            scores = convolved(
                np.concatenate([x, deeper], -1),
                np.float64(own["attention"]["kernel"]),
            ) + np.float64(own["attention"]["bias"])
            shares = 1 / (1 + np.exp(-scores))
            x = x * shares[..., :1] + deeper * shares[..., 1:]
        deeper = x
        level = normalized(own["leave"], x)
        total = total + losses.hierarchical_context(
            jnp.float32(level), jnp.float32(theirs)
        )
    got, _ = tiny.values_of(objective, BATCH)
    expected = np.asarray(total)[BATCH["mask"]].mean()
    np.testing.assert_allclose(got["review"].value(), expected, rtol=1e-4)


def test_review_takes_the_size_of_the_teachers_maps():
    objective = objectives.review(pairs=[("first", "second"), ("second", "first")])
    means, _ = tiny.values_of(objective, BATCH)
    assert np.isfinite(means["review"].value())


NORMALISED = {
    "ft": objectives.factor_transfer(**LEVEL),
    "review": objectives.review(pairs=[("second", "second"), ("pooled", "pooled")]),
}


@pytest.mark.parametrize("term", NORMALISED)
def test_an_example_that_does_not_count_moves_no_statistic(term):
    mean, _ = tiny.values_of(NORMALISED[term], BATCH)
    counting = BATCH["mask"][:, None, None, None]
    for wild in (100.0, np.nan):
        changed = BATCH | {"x": np.where(counting, BATCH["x"], np.float32(wild))}
        same, _ = tiny.values_of(NORMALISED[term], changed)
        np.testing.assert_allclose(same[term].value(), mean[term].value(), rtol=1e-6)


@pytest.mark.parametrize("term", NORMALISED)
def test_statistics_are_those_of_all_devices(term):
    objective = NORMALISED[term]
    own, _ = tiny.started(objective, BATCH)
    shown = [tiny.outputs(net, BATCH) for net in (tiny.STUDENT, tiny.TEACHER)]
    total_count = int(BATCH["mask"].sum())

    def loss(own, batch, shown):
        terms, _ = objective.apply(own, {}, *shown, batch, jnp.array(0))
        return sum(term.mean.total for term in terms.values()) / total_count

    def on_device(own, batch, shown):
        with split_over("data"):
            found = jax.value_and_grad(loss)(own, batch, shown)
        return jax.lax.psum(found, "data")

    whole, split = PartitionSpec(), PartitionSpec("data")
    spread = jax.shard_map(
        on_device,
        mesh=make_mesh({"data": 8}),
        in_specs=(whole, split, split),
        out_specs=whole,
        check_vma=False,
    )
    expected = jax.jit(jax.value_and_grad(loss))(own, BATCH, shown)
    found = jax.jit(spread)(own, BATCH, shown)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masked_generation_without_a_mask_is_its_generator():
    objective = objectives.masked_generation(**LEVEL, masked=0.0)
    params, _ = tiny.started(objective, BATCH)
    ours, theirs = maps("second")
    x = ours @ np.float64(params["align"]["kernel"][0, 0])
    x = np.maximum(convolved(x, np.float64(params["first"]["kernel"])), 0)
    x = convolved(x, np.float64(params["second"]["kernel"]))
    got, _ = tiny.values_of(objective, BATCH)
    expected = ((x - theirs) ** 2).sum((1, 2, 3))[BATCH["mask"]].mean()
    np.testing.assert_allclose(got["mgd"].value(), expected, rtol=1e-5)


def test_masked_generation_hides_the_share_that_is_asked_for():
    def gradient_of_first(masked):
        """Positions of the first level that reach the loss."""
        objective = objectives.masked_generation(
            student="first", teacher="first", masked=masked
        )
        own, state = tiny.started(objective, BATCH)
        shown = tiny.outputs(tiny.STUDENT, BATCH)
        target = tiny.outputs(tiny.TEACHER, BATCH)

        def loss(first):
            seen = type(shown)(shown.logits, shown.features | {"first": first})
            terms, _ = objective.apply(own, state, seen, target, BATCH, jnp.array(0))
            return terms["mgd"].mean.total

        return np.asarray(jax.grad(loss)(shown.features["first"])).any(-1)

    counted = BATCH["mask"]
    assert not gradient_of_first(1.0).any()
    seen = gradient_of_first(0.65)[counted]
    assert abs(seen.mean() - 0.35) < 4 * np.sqrt(0.65 * 0.35 / seen.size)


@pytest.mark.parametrize("step", [0, 7])
def test_what_is_hidden_depends_on_the_example_alone(step):
    objective = objectives.masked_generation(**LEVEL, where=None)
    params, _ = tiny.started(objective, BATCH)
    whole, _ = tiny.values_of(objective, BATCH, params, {}, step)
    turned = {name: array[::-1] for name, array in BATCH.items()}
    halves = [
        tiny.values_of(
            objective, {n: a[part] for n, a in turned.items()}, params, {}, step
        )[0]["mgd"]
        for part in (slice(0, 3), slice(3, None))
    ]
    np.testing.assert_allclose(
        (halves[0] + halves[1]).value(), whole["mgd"].value(), rtol=1e-5
    )
    other, _ = tiny.values_of(objective, BATCH, params, {}, step + 1)
    assert other["mgd"].value() != whole["mgd"].value()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: objectives.review(pairs=[]), "pairs: got none"),
        (lambda: objectives.review(pairs=[("a", "b")], width=0), "width: got 0"),
        (
            lambda: objectives.masked_generation(**LEVEL, masked=1.2),
            "masked: got 1.2",
        ),
        (
            lambda: objectives.factor_transfer(**LEVEL, ratio=0.0),
            r"ratio: got 0.0, expected a number in \(0, 1\]",
        ),
        (
            lambda: objectives.factor_transfer(**LEVEL, weight=float("inf")),
            "weight of 'ft': got inf",
        ),
    ],
)
def test_refuses_what_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "make",
    [
        objectives.variational_information,
        objectives.masked_generation,
        objectives.factor_transfer,
    ],
)
def test_a_missing_feature_is_named(make):
    objective = make(student="thrid", teacher="second")
    with pytest.raises(ValueError, match="the student gives no feature 'thrid'"):
        tiny.started(objective, BATCH)
