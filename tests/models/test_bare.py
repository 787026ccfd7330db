"""Plain functions as models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.types import LinearHead, Outputs

BATCH = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "scale": np.float32([2, 3])}


def linear(params, batch):
    return batch["x"] @ params["w"] * batch["scale"][:, None]


def apply(net, *, rng=None, train=False, batch=BATCH):
    return net.model.apply(net.params, net.model_state, batch, rng=rng, train=train)


def test_a_function_gets_its_parameters_and_the_whole_batch():
    params = {"w": jnp.ones((4, 3))}
    net = models.from_apply(linear, params)
    assert net.params is params
    assert net.model_state == {}
    outputs, state = apply(net, train=True, rng=jax.random.key(0))
    # 0 + 1 + 2 + 3 times 2, and 4 + 5 + 6 + 7 times 3.
    np.testing.assert_array_equal(outputs.logits, [[12.0] * 3, [66.0] * 3])
    assert outputs.features == {}
    assert state == {}


def test_the_program_is_that_of_the_function():
    params = {"w": jnp.ones((4, 3))}
    net = models.from_apply(linear, params)

    def through(params, batch):
        return net.model.apply(params, {}, batch, rng=None, train=False)[0].logits

    expected = jax.make_jaxpr(linear)(params, BATCH)
    assert str(jax.make_jaxpr(through)(params, BATCH)) == str(expected)


def test_keywords_are_given_to_those_who_take_them():
    seen = []

    def both(params, batch, *, rng, train):
        seen.append((rng, train))
        return params

    def only_train(params, batch, train=None):
        seen.append(train)
        return params

    def only_rng(params, batch, rng):
        seen.append(rng)
        return params

    key = jax.random.key(0)
    for function in (both, only_train, only_rng, functools.partial(both, train=5)):
        net = models.from_apply(function, jnp.ones((2, 3)))
        apply(net, rng=key, train=True)
        apply(net)
    expected = [(key, True), (None, False), True, False, key, None]
    assert seen == [*expected, (key, True), (None, False)]


def test_dropout_of_a_function_follows_the_key():
    def noisy(params, batch, *, rng, train):
        return params * (jax.random.normal(rng, (4, 3)) if train else 1.0)

    net = models.from_apply(noisy, jnp.ones((4, 3)))
    one, _ = apply(net, rng=jax.random.key(0), train=True)
    other, _ = apply(net, rng=jax.random.key(1), train=True)
    assert (one.logits != other.logits).all()
    np.testing.assert_array_equal(apply(net)[0].logits, np.ones((4, 3)))


def test_heads_and_features_pass():
    def head(params, batch):
        return LinearHead(batch["x"], params)

    def shown(params, batch):
        return Outputs(batch["x"] @ params, {"x": batch["x"]})

    outputs, _ = apply(models.from_apply(head, jnp.ones((4, 3))))
    assert isinstance(outputs.logits, LinearHead)
    with_features, _ = apply(models.from_apply(shown, jnp.ones((4, 3))))
    np.testing.assert_array_equal(with_features.features["x"], BATCH["x"])
    np.testing.assert_array_equal(with_features.logits, outputs.dense_logits())


def test_logits_from_the_batch_pass_eagerly_and_under_jit():
    net = models.from_apply(lambda params, batch: batch["x"], {})
    eager, _ = apply(net)
    jitted, _ = jax.jit(lambda batch: apply(net, batch=batch))(BATCH)
    assert isinstance(eager.logits, jax.Array)
    np.testing.assert_array_equal(eager.logits, jitted.logits)


@pytest.mark.parametrize(
    ("returned", "named"), [((1, 2), "tuple"), ({"a": 1}, "dict"), (None, "NoneType")]
)
def test_refuses_what_is_no_output(returned, named):
    net = models.from_apply(lambda params, batch: returned, jnp.ones(3))
    with pytest.raises(TypeError, match=rf"returned {named}; expected logits, a kdjax"):
        apply(net)
