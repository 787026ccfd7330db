"""Features through scan and remat, with batch statistics and dropout in the way."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import objectives, teachers
from kdjax.train import init_state, make_train_step
from tests.marks import rest_slow
from tests.models.stacks import BATCH, CLASSES, KINDS, LAYERS, WIDTH, by_hand

ONE_EACH = [each for each in KINDS if each.kind in ("scan", "remat")]
BOTH = [each for each in KINDS if each.kind in ("remat", "scan of remat")]
PARTS = ("dense", "norm", "square", "")


def every(kind):
    return tuple(kind.path(layer, part) for layer in range(LAYERS) for part in PARTS)


def run(net, train):
    """What the network gives in one mode, compiled."""

    @jax.jit
    def apply(params, state, rng):
        return net.model.apply(
            params, state, BATCH, rng=rng if train else None, train=train
        )

    return apply(net.params, net.model_state, jax.random.key(1))


@functools.cache
def captured(kind, train):
    """The network with all of its features, and what it gave."""
    net = kind.net(every(kind))
    return net, *run(net, train)


def kept_by(kind, outputs):
    """What dropout at 0.5 multiplied by, 0 or 2: tanh is 0 nowhere here."""
    layers = np.stack([outputs.features[kind.path(i)] for i in range(LAYERS)])
    return np.where(layers == 0, np.float32(0), np.float32(2))


def assert_close(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ONE_EACH, ids=" ".join)
def test_features_and_statistics_are_those_computed_by_hand(kind, train):
    net, outputs, state = captured(kind, train)
    kept = kept_by(kind, outputs)
    assert kept.all() != train
    layers, statistics = map(kind.layers, (net.params, net.model_state))
    given, moved = by_hand(layers, statistics, BATCH["x"], kept if train else None)
    expected = {
        kind.path(layer, part): given[layer][part]
        for layer in range(LAYERS)
        for part in PARTS
    }
    assert_close(dict(outputs.features), expected)
    assert_close([each["norm"] for each in kind.layers(state)], moved)
    out = net.params["out"]
    assert_close(outputs.logits, given[-1][""] @ out["kernel"] + out["bias"])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ONE_EACH, ids=" ".join)
def test_capture_changes_neither_outputs_nor_state(kind, train):
    _, outputs, state = captured(kind, train)
    net = kind.net()
    alone, alone_state = run(net, train)
    # No feature that was not asked for, and nothing sown in the state.
    assert alone.features == {}
    chex.assert_trees_all_equal_structs(alone_state, state, net.model_state)
    chex.assert_trees_all_equal(alone.logits, outputs.logits)
    chex.assert_trees_all_equal(alone_state, state)


@pytest.mark.parametrize("kind", ONE_EACH, ids=" ".join)
def test_gradients_are_those_computed_by_hand(kind):
    net, outputs, _ = captured(kind, True)
    kept = kept_by(kind, outputs)

    def total(*features):
        return sum(jnp.sum(jnp.sin(i + each)) for i, each in enumerate(features))

    def through(params):
        rng = jax.random.key(1)
        outputs, _ = net.model.apply(
            params, net.model_state, BATCH, rng=rng, train=True
        )
        features = outputs.features
        return total(features[kind.path(1, "square")], features[kind.path(1)])

    def alone(params):
        statistics = kind.layers(net.model_state)
        given, _ = by_hand(kind.layers(params), statistics, BATCH["x"], kept)
        return total(given[1]["square"], given[1][""])

    @jax.jit
    def gradients(params):
        return jax.grad(through)(params), jax.grad(alone)(params)

    got, expected = gradients(net.params)
    assert_close(got, expected)
    assert np.abs(kind.layers(got)[0]["dense"]["kernel"]).max() > 1e-3


def mean_squares(student, teacher):
    return ((student - teacher) ** 2).mean(-1)


HARD, OPTIMIZER = objectives.hard_labels(), optax.sgd(1.0)


@functools.cache
def start(kind):
    """What a step takes: the same whatever is captured. No dropout, for its masks."""
    teacher, frozen = teachers.frozen(kind.net(seed=3))
    batch = {**BATCH, "label": np.arange(8) % CLASSES}
    state = init_state(
        kind.net(rate=0.0), teacher, HARD, OPTIMIZER,
        frozen=frozen, batch=batch, rng=jax.random.key(2),
    )  # fmt: skip
    return state, frozen, batch


def compiled_step(kind, objective, ours, theirs):
    """A step of a student and a teacher who show these features."""
    teacher, _ = teachers.frozen(kind.net(theirs))
    student = kind.net(ours, rate=0.0).model
    step = jax.jit(make_train_step(student, teacher, objective, OPTIMIZER))
    return step.lower(*start(kind)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH, ids=" ".join)
def test_a_step_towards_the_features_of_a_teacher(kind):
    ours, theirs = kind.path(1, "norm"), kind.path(0)
    objective = objectives.features(mean_squares, student=ours, teacher=theirs)
    state, frozen, batch = start(kind)
    params, statistics = map(kind.layers, (frozen["params"], frozen["model_state"]))
    target = by_hand(params, statistics, BATCH["x"])[0][0][""]

    @jax.jit
    @jax.value_and_grad
    def distance(params):
        statistics = kind.layers(state.model_state)
        everything = jnp.ones((LAYERS, 1, WIDTH))
        given, _ = by_hand(kind.layers(params), statistics, BATCH["x"], everything)
        return mean_squares(given[1]["norm"], target).mean()

    value, slope = distance(state.params["student"])
    step = compiled_step(kind, objective, (ours,), (theirs,))
    after, metrics = step(state, frozen, batch)
    assert_close(metrics["features"].value(), value)
    moved = jax.tree.map(jnp.subtract, state.params, after.params)["student"]
    assert_close(moved, slope)


def program(kind, features):
    """A compiled step in text, but for which lines of Python it came from."""
    text = compiled_step(kind, HARD, features, features).as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    return re.sub(r"\n(File|Function|Stack)\w+\n(.+\n)*", "", text)


@pytest.mark.parametrize(
    "kind", rest_slow(BOTH, lambda kind: kind in ONE_EACH, name=" ".join)
)
def test_features_that_no_term_uses_leave_no_trace_in_the_step(kind):
    unused = kind.path(0, "norm"), kind.path(1, "square"), kind.path(0)
    assert program(kind, unused) == program(kind, ())


@pytest.mark.parametrize("kind", BOTH, ids=" ".join)
def test_with_nothing_asked_for_the_program_is_that_of_the_module(kind):
    net, (module, variables) = kind.net(), kind.module(0.5, 0)

    def through(params, x):
        outputs, _ = net.model.apply(
            params, net.model_state, {"x": x}, rng=None, train=False
        )
        return outputs.logits

    def direct(params, x):
        if variables is not None:
            return module.apply({**variables, "params": params}, x, train=False)
        graph, _, rest = nnx.split(module, nnx.Param, ...)
        network = nnx.merge(graph, params, nnx.to_pure_dict(rest))
        network.eval()
        # Flax warns of what is sown elsewhere.
        return nnx.capture(network)(x)

    arrays = net.params, BATCH["x"]
    assert str(jax.make_jaxpr(through)(*arrays)) == str(jax.make_jaxpr(direct)(*arrays))
