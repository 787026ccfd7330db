"""Linen modules as pure functions: arrays, switches, features."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from kdjax import models
from kdjax.types import LinearHead, Outputs

WIDTH, CLASSES = 4, 3
BATCH = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}


class Block(linen.Module):
    """A layer with batch statistics and dropout."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(WIDTH)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dropout(0.5, deterministic=not train)(x)


class Net(linen.Module):
    """Two blocks in a list, the first of them called twice."""

    def setup(self):
        self.blocks = [Block(), Block()]
        self.out = linen.Dense(CLASSES)

    def __call__(self, x, *, train):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, train)
        return self.out(x)


FEATURES = ("blocks_0", "blocks_0#1", "blocks_1/Dense_0", "out")


@functools.cache
def variables():
    return Net().init(jax.random.key(0), BATCH["x"], train=False)


@functools.cache
def adapted(features=()):
    return models.from_linen(Net(), variables(), features=features)


@functools.cache
def run(train, features=()):
    """The network compiled in one mode, on its first arrays."""
    net = adapted(features)

    @jax.jit
    def apply(params, state, batch, rng):
        return net.model.apply(
            params, state, batch, rng=rng if train else None, train=train
        )

    return lambda batch, seed=0: apply(
        net.params, net.model_state, batch, jax.random.key(seed)
    )


def moved(state):
    start = adapted().model_state
    return [
        bool((new != old).any())
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True)
    ]


@pytest.mark.parametrize("frozen", [False, True])
def test_arrays_are_split_into_plain_dicts(frozen):
    given = flax.core.freeze(variables()) if frozen else variables()
    net = models.from_linen(Net(), given)
    assert sorted(net.params) == ["blocks_0", "blocks_1", "out"]
    assert sorted(net.model_state) == ["batch_stats"]
    assert type(net.params) is type(net.params["out"]) is dict
    assert type(net.model_state["batch_stats"]) is dict
    _, state = jax.eval_shape(
        lambda rng: net.model.apply(
            net.params, net.model_state, BATCH, rng=rng, train=True
        ),
        jax.random.key(0),
    )
    # Equal in structure, or a step would be compiled twice.
    assert jax.tree.structure(state) == jax.tree.structure(net.model_state)


@pytest.mark.parametrize("features", [(), FEATURES])
def test_statistics_move_in_training_only(features):
    _, state = run(True, features)(BATCH)
    assert sorted(state) == ["batch_stats"]
    assert moved(state) == [True] * 4
    _, state = run(False, features)(BATCH)
    assert moved(state) == [False] * 4


def test_dropout_is_off_in_evaluation():
    first, second = run(True)(BATCH)[0].logits, run(True)(BATCH, seed=1)[0].logits
    assert (first != second).any()
    np.testing.assert_array_equal(first, run(True)(BATCH)[0].logits)
    plain = Net().apply(variables(), BATCH["x"], train=False)
    np.testing.assert_allclose(run(False)(BATCH)[0].logits, plain, rtol=1e-5, atol=1e-6)


def test_the_variables_stay_as_they_are():
    before = jax.tree.map(np.array, variables())
    run(True)(BATCH)
    jax.tree.map(np.testing.assert_array_equal, variables(), before)


def test_features_are_picked_by_path():
    outputs, _ = run(False, FEATURES)(BATCH)
    features = outputs.features
    assert set(features) == set(FEATURES)
    np.testing.assert_array_equal(features["out"], outputs.logits)
    # What the output layer takes is what the second call of the first block gave.
    out = adapted().params["out"]
    expected = features["blocks_0#1"] @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-6)
    second = adapted().params["blocks_1"]["Dense_0"]
    expected = features["blocks_0"] @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(
        features["blocks_1/Dense_0"], expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(outputs.logits, run(False)(BATCH)[0].logits)


def test_features_carry_gradients():
    net = adapted(("blocks_0",))

    @jax.jit
    @jax.grad
    def slope(params):
        outputs, _ = net.model.apply(
            params, net.model_state, BATCH, rng=None, train=False
        )
        return outputs.features["blocks_0"].sum()

    gradients = slope(net.params)
    # d sum(scale * y + bias) / d bias is the number of examples; later layers get 0.
    bias = gradients["blocks_0"]["BatchNorm_0"]["bias"]
    np.testing.assert_allclose(bias, [8.0] * WIDTH)
    assert not gradients["out"]["kernel"].any()


def program(features, show):
    net = adapted(features)

    def shown(params, batch):
        outputs, _ = net.model.apply(
            params, net.model_state, batch, rng=None, train=False
        )
        return show(outputs)

    return jax.jit(shown).lower(net.params, BATCH).as_text()


def test_nothing_is_captured_that_is_not_asked_for():
    net, given = adapted(), variables()

    def direct(params, x):
        return Net().apply({**given, "params": params}, x, train=False)

    def through(params, x):
        outputs, _ = net.model.apply(
            params, net.model_state, {"x": x}, rng=None, train=False
        )
        return outputs.logits

    traced = jax.make_jaxpr(through)(net.params, BATCH["x"])
    assert str(traced) == str(jax.make_jaxpr(direct)(net.params, BATCH["x"]))


def test_what_was_captured_and_is_not_used_costs_nothing():
    without = program((), lambda outputs: outputs.logits)
    assert program(FEATURES, lambda outputs: outputs.logits) == without
    assert program(FEATURES, lambda outputs: outputs.features) != without


class Switches(linen.Module):
    """Shows what its switches were set to, one column for each."""

    def __call__(
        self, x, *, train, training, is_training, deterministic, use_running_average
    ):
        on = [train, training, is_training, deterministic, use_running_average]
        return jnp.array([on])


def test_switches_are_set_by_their_name():
    net = models.from_linen(Switches(), {"params": {}})
    for train in (True, False):
        outputs, _ = net.model.apply({}, {}, BATCH, rng=None, train=train)
        expected = [train, train, train, not train, not train]
        assert outputs.logits[0].tolist() == expected


class Streams(linen.Module):
    """Draws from two streams of its own."""

    @linen.compact
    def __call__(self, x, train):
        if not train:
            return x
        draws = [jax.random.normal(self.make_rng(name)) for name in ("drop", "path")]
        return x * 0 + jnp.stack([*draws, *draws])


def test_streams_get_keys_of_their_own():
    net = models.from_linen(Streams(), {"params": {}}, rngs=("drop", "path"))
    apply = functools.partial(net.model.apply, {}, {}, BATCH, train=True)
    one, _ = apply(rng=jax.random.key(0))
    other, _ = apply(rng=jax.random.key(1))
    first, second = one.logits[0, :2]
    assert first != second
    assert (one.logits != other.logits).all()


class Pair(linen.Module):
    """Takes two inputs and gives a head and a feature of its own making."""

    @linen.compact
    def __call__(self, x, scale):
        hidden = linen.Dense(WIDTH)(x) * scale
        return Outputs(LinearHead(hidden, jnp.ones((WIDTH, CLASSES))), {"own": hidden})


def test_several_inputs_and_outputs_of_its_own():
    batch = BATCH | {"scale": np.full((8, 1), 2.0, np.float32)}
    given = Pair().init(jax.random.key(0), **batch)
    net = models.from_linen(Pair(), given, inputs=("x", "scale"), features=("Dense_0",))
    outputs, _ = net.model.apply(net.params, {}, batch, rng=None, train=False)
    assert isinstance(outputs.logits, LinearHead)
    assert set(outputs.features) == {"own", "Dense_0"}
    expected = 2 * outputs.features["Dense_0"]
    np.testing.assert_allclose(outputs.features["own"], expected, rtol=1e-6)


def refused(error, match, module, given, batch=BATCH, **options):
    net = models.from_linen(module, given, **options)
    with pytest.raises(error, match=match):
        jax.eval_shape(
            lambda: net.model.apply(
                net.params, net.model_state, batch, rng=None, train=False
            )
        )


def test_refuses_a_path_that_matches_nothing_and_lists_the_paths():
    known = r"blocks_0, blocks_0#1, blocks_0/BatchNorm_0, .*, blocks_1, .*, out"
    match = rf"features: got \['nowhere'\], which match nothing.*captured: {known}"
    refused(ValueError, match, Net(), variables(), features=("nowhere", "out"))


def test_refuses_a_batch_without_its_inputs():
    match = r"inputs: .*takes \['x', 'y'\], but the batch has \['x'\]; pass inputs="
    refused(ValueError, match, Net(), variables(), inputs=("x", "y"))


def test_refuses_what_is_no_output():
    class Tuple(linen.Module):
        def __call__(self, x):
            return {"logits": x}

    match = r"returned dict; expected logits.*LinearHead"
    refused(TypeError, match, Tuple(), {"params": {}})


def test_refuses_variables_without_params():
    with pytest.raises(ValueError, match=r"variables: got .*\['out'\], expected"):
        models.from_linen(Net(), {"out": {}})
