"""NNX modules taken apart: arrays, modes, features; the module itself stays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import models
from kdjax.types import LinearHead, Outputs

WIDTH, CLASSES = 4, 3
BATCH = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}


class Block(nnx.Module):
    """A layer with batch statistics, and a method beside ``__call__``."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def mix(self, x):
        return 3.0 * x

    def __call__(self, x):
        return self.norm(self.dense(self.mix(x)))


class Net(nnx.Module):
    """Two blocks in a list, the first of them called twice, and dropout."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(self.dropout(self.blocks[0](x)))


FEATURES = ("blocks/0", "blocks/0#1", "blocks/1/norm", "blocks/0/mix", "out")


@functools.cache
def adapted(features=()):
    return models.from_nnx(Net(nnx.Rngs(0)), features=features)


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
    """Which of the statistics are not those that the network started with."""
    start = adapted().model_state
    return [
        bool((new != old).any())
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True)
    ]


def plain(tree):
    """Whether a tree consists of dicts and arrays only."""
    if isinstance(tree, dict):
        return type(tree) is dict and all(plain(each) for each in tree.values())
    return isinstance(tree, jax.Array)


def test_arrays_are_split_into_plain_dicts():
    net = adapted()
    dense = {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}
    norm = {"scale": (WIDTH,), "bias": (WIDTH,)}
    statistics = {"mean": (WIDTH,), "var": (WIDTH,)}
    assert jax.tree.map(jnp.shape, net.params) == {
        "blocks": {i: {"dense": dense, "norm": norm} for i in range(2)},
        "out": {"kernel": (WIDTH, CLASSES), "bias": (CLASSES,)},
    }
    # No random streams: they are neither trained nor kept.
    assert jax.tree.map(jnp.shape, net.model_state) == {
        "blocks": {i: {"norm": statistics} for i in range(2)}
    }
    assert plain(net.params)
    assert plain(net.model_state)
    _, state = run(train=True)(BATCH)
    assert plain(state)
    assert jax.tree.structure(state) == jax.tree.structure(net.model_state)


@pytest.mark.parametrize("features", [(), FEATURES])
def test_statistics_move_in_training_only(features):
    _, state = run(True, features)(BATCH)
    assert moved(state) == [True] * 4
    _, state = run(False, features)(BATCH)
    assert moved(state) == [False] * 4


def test_statistics_are_those_of_the_batch():
    # Means start at 0, with momentum 0.99; the first block is called a second time.
    net, x = adapted(), 3.0 * BATCH["x"]
    dense = net.params["blocks"][0]["dense"]
    hidden = x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    expected = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    outputs, _ = run(True, FEATURES)(BATCH)
    np.testing.assert_allclose(outputs.features["blocks/0"], expected, atol=1e-5)
    outputs, _ = run(False, FEATURES)(BATCH)
    running = hidden / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(outputs.features["blocks/0"], running, atol=1e-5)


def test_dropout_is_off_in_evaluation():
    first, second = run(True)(BATCH)[0].logits, run(True)(BATCH, seed=1)[0].logits
    assert (first != second).any()
    np.testing.assert_array_equal(first, run(True)(BATCH)[0].logits)
    outputs, _ = run(False, FEATURES)(BATCH)
    out = adapted().params["out"]
    expected = outputs.features["blocks/0#1"] @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-6)


def test_the_module_stays_as_it_is():
    module = Net(nnx.Rngs(0))
    module.train()

    def seen():
        state = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))
        return jax.tree.map(np.array, state), str(nnx.graphdef(module))

    arrays, graph = seen()
    net = models.from_nnx(module, features=("blocks/1",))
    for train in (True, False):
        net.model.apply(
            net.params, net.model_state, BATCH, rng=jax.random.key(0), train=train
        )
    after, graph_after = seen()
    chex.assert_trees_all_equal(after, arrays)
    assert graph_after == graph
    assert not module.dropout.deterministic
    assert not module.blocks[0].norm.use_running_average


def test_the_mode_of_the_module_does_not_matter():
    module = Net(nnx.Rngs(0))
    module.eval()
    net = models.from_nnx(module)
    _, state = net.model.apply(
        net.params, net.model_state, BATCH, rng=jax.random.key(0), train=True
    )
    assert moved(state) == [True] * 4


def test_features_are_picked_by_path():
    outputs, _ = run(False, FEATURES)(BATCH)
    features = outputs.features
    assert set(features) == set(FEATURES)
    np.testing.assert_allclose(features["blocks/0/mix"], 3 * BATCH["x"], rtol=1e-6)
    np.testing.assert_array_equal(features["out"], outputs.logits)
    # The second call of the first block takes what the second block gave.
    first = adapted().params["blocks"][0]["dense"]
    hidden = 3 * features["blocks/1/norm"] @ first["kernel"] + first["bias"]
    second = hidden / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(features["blocks/0#1"], second, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs.logits, run(False)(BATCH)[0].logits)


def test_features_carry_gradients():
    net = adapted(("blocks/0",))

    @jax.jit
    @jax.grad
    def slope(params):
        outputs, _ = net.model.apply(
            params, net.model_state, BATCH, rng=None, train=False
        )
        return outputs.features["blocks/0"].sum()

    gradients = slope(net.params)
    # d sum(scale * y + bias) / d bias is the number of examples; later layers get 0.
    np.testing.assert_allclose(gradients["blocks"][0]["norm"]["bias"], [8.0] * WIDTH)
    assert not gradients["out"]["kernel"].any()


def program(features, show):
    net = adapted(features)

    def shown(params, batch):
        outputs, _ = net.model.apply(
            params, net.model_state, batch, rng=None, train=False
        )
        return show(outputs)

    return jax.jit(shown).lower(net.params, BATCH)


def test_nothing_is_captured_that_is_not_asked_for():
    module = Net(nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def direct(params, x):
        network = nnx.merge(graph, params, rest)
        network.eval()
        return network(x)

    net = adapted()

    def through(params, x):
        outputs, _ = net.model.apply(
            params, net.model_state, {"x": x}, rng=None, train=False
        )
        return outputs.logits

    traced = jax.make_jaxpr(through)(nnx.to_pure_dict(params), BATCH["x"])
    expected = jax.make_jaxpr(direct)(nnx.to_pure_dict(params), BATCH["x"])
    assert str(traced) == str(expected)


def test_what_was_captured_and_is_not_used_costs_nothing():
    without = program((), lambda outputs: outputs.logits).as_text()
    assert program(FEATURES, lambda outputs: outputs.logits).as_text() == without
    used = program(FEATURES, lambda outputs: (outputs.logits, outputs.features))
    assert used.as_text() != without


class Pair(nnx.Module):
    """Takes two inputs and gives a head and a feature of its own making."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.kernel = nnx.Param(jnp.ones((WIDTH, CLASSES)))

    def __call__(self, x, scale):
        hidden = self.dense(x) * scale
        return Outputs(LinearHead(hidden, self.kernel[...]), {"hidden": hidden})


def test_several_inputs_and_outputs_of_its_own():
    net = models.from_nnx(Pair(nnx.Rngs(0)), inputs=("x", "scale"), features=("dense",))
    batch = BATCH | {"scale": np.full((8, 1), 2.0, np.float32)}
    outputs, _ = net.model.apply(net.params, {}, batch, rng=None, train=False)
    assert isinstance(outputs.logits, LinearHead)
    assert set(outputs.features) == {"hidden", "dense"}
    expected = 2 * outputs.features["dense"]
    np.testing.assert_allclose(outputs.features["hidden"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        outputs.dense_logits(), expected.sum(-1, keepdims=True) * np.ones(3), rtol=1e-5
    )


def refused(error, match, module, batch=BATCH, *, train=False, **options):
    net = models.from_nnx(module, **options)
    with pytest.raises(error, match=match):
        jax.eval_shape(
            lambda: net.model.apply(
                net.params, net.model_state, batch, rng=None, train=train
            )
        )


def test_refuses_a_path_that_matches_nothing_and_lists_the_paths():
    known = "blocks/0, blocks/0#1, blocks/0/dense, .*, blocks/1/norm, dropout, out"
    match = rf"features: got \['blocks/2'\], which match nothing.*captured: {known}"
    refused(ValueError, match, Net(nnx.Rngs(0)), features=("blocks/2", "out"))


def test_refuses_a_batch_without_its_input():
    match = r"inputs: .*takes \['image'\], but the batch has \['x'\]; pass inputs="
    refused(ValueError, match, Net(nnx.Rngs(0)), inputs="image")


def test_refuses_what_is_no_output():
    class Tuple(nnx.Module):
        def __call__(self, x):
            return x, x

    refused(TypeError, r"returned tuple; expected logits.*LinearHead", Tuple())


def test_refuses_to_train_without_a_key():
    refused(ValueError, "rng: got None", Net(nnx.Rngs(0)), train=True)
