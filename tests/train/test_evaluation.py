"""Evaluation: both models side by side, exact over batches of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import metrics, models, objectives, teachers
from kdjax.io.input import padded_batches
from kdjax.train import evaluate, init_state, make_eval_step
from kdjax.types import Mean, Outputs
from tests.train import setups

EXAMPLES = 37


@functools.cache
def training():
    """A student whose statistics are not those of a batch, and its teacher."""
    net = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))
    state, frozen, _ = setups.training(net)
    return net, state, frozen


@functools.cache
def eval_step():
    net, _, _ = training()
    teacher, _ = teachers.frozen(models.from_nnx(setups.Noisy(rngs=nnx.Rngs(7))))
    return jax.jit(make_eval_step(net.model, teacher))


def examples():
    data = setups.batch(examples=EXAMPLES)
    return {"x": data["x"], "label": data["label"]}


def test_padded_batches_equal_one_big_batch():
    _, state, frozen = training()
    whole = evaluate(eval_step(), state, frozen, [examples()])
    padded = padded_batches(examples(), batch_size=16)
    parts = evaluate(eval_step(), state, frozen, padded)
    assert set(parts) == set(whole)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=2e-6), name
    # Counts are exact: 37 examples, of which the last batch repeats one 11 times.
    assert parts["agreement"] * EXAMPLES == pytest.approx(
        round(whole["agreement"] * EXAMPLES), abs=1e-5
    )


def test_uneven_batches_equal_one_big_batch():
    _, state, frozen = training()
    data = examples()
    whole = evaluate(eval_step(), state, frozen, [data])
    uneven = [
        {name: array[rows] for name, array in data.items()}
        for rows in (slice(0, 5), slice(5, None))
    ]
    parts = evaluate(eval_step(), state, frozen, uneven)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=2e-6), name


def test_student_and_teacher_stand_side_by_side():
    net, state, frozen = training()
    teacher = models.from_nnx(setups.Noisy(rngs=nnx.Rngs(7)))
    data = examples()
    shown = {
        who: model.model.apply(*arrays, data, rng=None, train=False)[0].logits
        for who, model, arrays in (
            ("student", net, (net.params, net.model_state)),
            ("teacher", teacher, (frozen["params"], frozen["model_state"])),
        )
    }
    got = evaluate(eval_step(), state, frozen, [data])
    scored = data["label"] >= 0
    for who, logits in shown.items():
        right = np.asarray(logits.argmax(-1)) == data["label"]
        assert got[f"{who}_accuracy"] == pytest.approx(right[scored].mean(), rel=1e-6)
    same = np.asarray(shown["student"].argmax(-1) == shown["teacher"].argmax(-1))
    assert got["agreement"] == pytest.approx(same.mean(), rel=1e-6)
    assert 0 < got["agreement"] < 1
    # The student alone changes as it trains.
    other = jax.tree.map(jnp.zeros_like, state.params)
    moved = type(state)(**{**vars(state), "params": other})
    after = evaluate(eval_step(), moved, frozen, [data])
    assert after["teacher_entropy"] == got["teacher_entropy"]
    # All logits are 0 then: every class has 1/5.
    assert after["student_entropy"] == pytest.approx(np.log(setups.CLASSES), rel=1e-6)


def test_without_labels_there_is_only_fidelity():
    _, state, frozen = training()
    data = {"x": examples()["x"]}
    got = jax.eval_shape(eval_step(), state, frozen, data)
    assert set(got) == {
        "agreement",
        "forward_kl",
        "reverse_kl",
        "student_entropy",
        "teacher_entropy",
    }


@pytest.mark.parametrize("argument", ["labels", "where"])
def test_an_entry_of_another_name_must_be_there(argument):
    net, state, frozen = training()
    teacher, _ = teachers.frozen(models.from_nnx(setups.Noisy(rngs=nnx.Rngs(7))))
    step = make_eval_step(net.model, teacher, **{argument: "typo"})
    with pytest.raises(ValueError, match=f"{argument}: got 'typo'.*does not have"):
        jax.eval_shape(step, state, frozen, examples())


def tokens(params, batch):
    return Outputs(batch["x"] @ params)


@pytest.mark.parametrize("per_token", [False, True])
def test_masks_are_per_example_or_per_token(per_token):
    rng = np.random.default_rng(0)
    net = models.from_apply(tokens, jnp.float32(rng.normal(size=(4, 3))))
    other = models.from_apply(tokens, jnp.float32(rng.normal(size=(4, 3))))
    teacher, frozen = teachers.frozen(other)
    # As many tokens as examples, so that a wrong axis would not be noticed by shape.
    x = rng.normal(size=(5, 5, 4)).astype(np.float32)
    mask = rng.random((5, 5) if per_token else 5) < 0.6
    state = init_state(
        net,
        teacher,
        objectives.soft_labels(where="valid"),
        optax.sgd(0.1),
        frozen=frozen,
        batch={"x": x, "valid": mask},
        rng=jax.random.key(0),
    )
    step = jax.jit(make_eval_step(net.model, teacher, where="valid"))
    sums = step(state, frozen, {"x": x, "valid": mask})
    same = (x @ np.asarray(net.params)).argmax(-1) == (
        x @ np.asarray(other.params)
    ).argmax(-1)
    assert int(sums["agreement"].count) == same[mask].size
    assert int(sums["agreement"].total) == same[mask].sum()


def test_sums_are_added_in_float64():
    # In float32, adding 1 to 2**24 changes nothing.
    def mean(total, count):
        return {"ones": Mean(jnp.float32(total), jnp.int32(count))}

    batches = [mean(2**24, 2**24), *[mean(1, 0)] * 64, mean(0, 2**24)]
    got = evaluate(lambda state, frozen, batch: batch, None, None, batches)
    # (2**24 + 64) / 2**25
    assert got["ones"] == 0.5 + 2.0**-19


def test_calibration_is_added_in_float64():
    sums = metrics.Calibration(
        confidence=jnp.zeros(1), correct=jnp.ones(1), count=jnp.ones(1, jnp.int32)
    )
    big = jax.tree.map(lambda leaf: leaf * 2**24, sums)
    wrong = metrics.Calibration(jnp.zeros(1), jnp.zeros(1), sums.count * 2**24)
    got = evaluate(
        lambda state, frozen, batch: {"error": batch},
        None,
        None,
        [big, *[sums] * 64, wrong],
    )
    # 2**24 + 64 of 2**25 + 64 are right with a confidence of 0.
    expected = (2**24 + 64) / (2**25 + 64)
    assert got["error"] == pytest.approx(expected, rel=1e-7)
    assert got["error"] > 0.5 + 5e-7


def test_evaluation_refuses_no_batches():
    _, state, frozen = training()
    with pytest.raises(ValueError, match="batches: got none"):
        evaluate(eval_step(), state, frozen, [])


def test_evaluation_refuses_what_each_process_has_for_itself(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    given = {"x": np.zeros((2, 3)), "label": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match=r"batches: got \['x', 'label'\] of this proc"):
        evaluate(eval_step(), None, None, [given])
