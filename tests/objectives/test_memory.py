"""CRD's objective: what it draws, what it computes, what it remembers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses, objectives
from kdjax.objectives._keys import by_example
from kdjax.objectives._memory import _others
from tests.objectives import tiny

DATA, WIDTH, NEGATIVES = 40, 5, 7
SETTINGS = dict(
    student="pooled",
    teacher="pooled",
    dataset_size=DATA,
    width=WIDTH,
    negatives=NEGATIVES,
)


def memory(**options):
    return objectives.contrastive_memory(**(SETTINGS | options))


@functools.partial(jax.jit, static_argnums=2)
def others(index, step, number, state, seed=0):
    return _others(index, by_example(index, step, seed), number, state)


def embedded(params, feature):
    vectors = np.float64(feature) @ np.float64(params["0"]["kernel"])
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def expected_step(params, state, batch, step, momentum=0.5, normalizers=None):
    """The published step in NumPy: value, new memories, normalisers."""
    keep = np.flatnonzero(batch["mask"])
    own = batch["index"]
    drawn = np.asarray(others(own, step, NEGATIVES, state))[keep]
    own = own[keep]
    seen, memories, used, total = {}, {}, {}, 0.0
    for side, net in (("student", tiny.STUDENT), ("teacher", tiny.TEACHER)):
        feature = tiny.outputs(net, batch).features["pooled"]
        seen[side] = embedded(params[side], feature)[keep]
    for side, other in (("student", "teacher"), ("teacher", "student")):
        bank = np.float64(state[other]["memory"])
        picked = np.concatenate([bank[own][:, None], bank[drawn]], 1)
        powers = np.exp(np.einsum("bkd,bd->bk", picked, seen[side]) / 0.07)
        used[side] = normalizers[side] if normalizers else powers.mean() * DATA
        total += float(
            losses.contrastive_representation(
                jnp.float32(seen[side]),
                jnp.float32(bank[own]),
                jnp.float32(bank[drawn]),
                dataset_size=DATA,
                normalizer=used[side],
            )
        )
        mixed = np.float64(state[side]["memory"]).copy()
        rows = momentum * mixed[own] + (1 - momentum) * seen[side]
        mixed[own] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        memories[side] = mixed
    return total, memories, used


def test_two_steps_are_those_of_the_published_code():
    objective = memory()
    first, second = tiny.batch(0), tiny.batch(1)
    params, state = tiny.started(objective, first)
    value, memories, used = expected_step(params, state, first, 0)
    means, moved = tiny.values_of(objective, first, params, state, 0)
    assert int(means["crd"].count) == first["mask"].sum()
    np.testing.assert_allclose(means["crd"].value(), value, rtol=1e-5)
    for side in memories:
        np.testing.assert_allclose(
            moved[side]["memory"], memories[side], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            moved[side]["log_normalizer"], np.log(used[side]), rtol=1e-5
        )
    # The first batch sets the normalisers once and for all.
    value, memories, _ = expected_step(
        params, moved, second, 1, momentum=0.5, normalizers=used
    )
    means, last = tiny.values_of(objective, second, params, moved, 1)
    np.testing.assert_allclose(means["crd"].value(), value, rtol=1e-5)
    for side in memories:
        np.testing.assert_allclose(
            last[side]["memory"], memories[side], rtol=1e-5, atol=1e-6
        )
        assert last[side]["log_normalizer"] == moved[side]["log_normalizer"]


def test_remembers_what_counts_and_nothing_else():
    objective, batch = memory(), tiny.batch()
    params, state = tiny.started(objective, batch)
    _, moved = tiny.values_of(objective, batch, params, state)
    before, after = (np.asarray(s["teacher"]["memory"]) for s in (state, moved))
    changed = np.flatnonzero((before != after).any(-1))
    assert set(changed) == set(batch["index"][batch["mask"]])


def test_an_example_that_does_not_count_may_be_anything():
    objective, batch = memory(), tiny.batch()
    params, state = tiny.started(objective, batch)
    means, moved = tiny.values_of(objective, batch, params, state)
    wild = batch | {"index": np.where(batch["mask"], batch["index"], -1)}
    wild["x"] = np.where(batch["mask"][:, None, None, None], batch["x"], 1e4)
    same, also = tiny.values_of(objective, np_batch(wild), params, state)
    np.testing.assert_allclose(same["crd"].value(), means["crd"].value(), rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), also, moved
    )
    # Where none counts, nothing happens, and the normalisers stay to be set.
    none = batch | {"mask": np.zeros(len(batch["mask"]), bool)}
    empty, kept = tiny.values_of(objective, none, params, state)
    assert (int(empty["crd"].count), float(empty["crd"].value())) == (0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def np_batch(batch):
    return {name: np.asarray(array) for name, array in batch.items()}


def test_an_index_beyond_the_data_is_not_silent():
    objective, batch = memory(), tiny.batch()
    batch["index"] = batch["index"] + np.int32(DATA)
    means, _ = tiny.values_of(objective, batch)
    assert np.isnan(means["crd"].value())


def test_draws_others_evenly():
    index = jnp.array([0, 17, DATA - 1])
    drawn = np.asarray(others(index, 3, 8000, memory().init_state()))
    for own, row in zip(index, drawn, strict=True):
        counts = np.bincount(row, minlength=DATA)
        assert len(counts) == DATA
        assert counts[own] == 0
        # 205 expected of each, with a deviation of 14.
        rest = np.delete(counts, own)
        assert rest.min() > 205 - 5 * 14
        assert rest.max() < 205 + 5 * 14


def test_draws_from_other_classes():
    classes = np.random.default_rng(0).choice([3, 7, 900], DATA)
    state = memory(classes=classes).init_state()
    index = jnp.arange(DATA)
    drawn = np.asarray(others(index, 0, 500, state))
    for own, row in enumerate(drawn):
        assert set(row) == set(np.flatnonzero(classes != classes[own]))
    # The groups are arrays of the state, and stay as they are.
    objective, batch = memory(classes=classes), tiny.batch()
    params, state = tiny.started(objective, batch)
    _, moved = tiny.values_of(objective, batch, params, state)
    jax.tree.map(np.testing.assert_array_equal, moved["classes"], state["classes"])


def test_what_is_drawn_depends_on_the_example_and_the_step_alone():
    state = memory().init_state()

    def draw(index, step, seed=0):
        return np.asarray(others(jnp.array(index), step, 20, state, seed))

    whole = draw([4, 9, 30], 2)
    np.testing.assert_array_equal(draw([30, 4, 1], 2)[:2], whole[[2, 0]])
    assert (draw([4, 9, 30], 3) != whole).any()
    assert (draw([4, 9, 30], 2, seed=1) != whole).any()


def test_both_embeddings_learn_and_the_teacher_does_not():
    objective, batch = memory(), tiny.batch()
    params, state = tiny.started(objective, batch)

    def loss(params, ours, theirs, batch):
        shown = tiny.STUDENT.model.apply(ours, {}, batch, rng=None, train=True)[0]
        target = tiny.TEACHER.model.apply(theirs, {}, batch, rng=None, train=False)[0]
        target = jax.lax.stop_gradient(target)
        terms, _ = objective.apply(params, state, shown, target, batch, jnp.array(0))
        return terms["crd"].mean.value()

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    own, ours, theirs = run(params, tiny.STUDENT.params, tiny.TEACHER.params, batch)
    for side in ("student", "teacher"):
        assert np.abs(own[side]["0"]["kernel"]).max() > 1e-4
    assert np.abs(ours["first"]).max() > 1e-4
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(theirs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dataset_size=1), "dataset_size: got 1; expected others"),
        (dict(negatives=0), "negatives: got 0"),
        (dict(width=0), "width: got 0"),
        (dict(temperature=0.0), "temperature: got 0.0"),
        (dict(momentum=1.5), "momentum: got 1.5"),
        (dict(weight=float("nan")), "weight of 'crd': got nan"),
        (dict(classes=[0] * DATA), "classes: got a single class"),
        (dict(classes=[0, 1]), r"classes: got shape \(2,\); .* dataset_size=40"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        memory(**options)


def test_asks_for_the_index_of_each_example():
    batch = tiny.batch()
    del batch["index"]
    with pytest.raises(ValueError, match="index: got 'index', which the batch does"):
        tiny.values_of(memory(), batch)
    batch["index"] = np.zeros(tiny.EXAMPLES, np.float32)
    with pytest.raises(TypeError, match="index: the batch's entry has dtype float32"):
        tiny.values_of(memory(), batch)
