"""What is inside attention, and what networks sow: seen by path, without a change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kdjax import models

TOKENS, HEADS, WIDTH, CLASSES = 3, 2, 4, 2
BATCH = {
    "x": np.random.default_rng(0).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
}


class Attends(nnx.Module):
    """Flax' own attention, called twice, and two things sown beside it."""

    def __init__(self, *, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
        self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.attention(x, sow_weights=True)
        self.sow(nnx.Intermediate, "halfway", x)
        total = {"init_fn": lambda: 0.0, "reduce_fn": lambda a, b: a + b}
        self.sow(nnx.Intermediate, "total", x, **total)
        x = self.attention(x, sow_weights=True)
        self.sow(nnx.Intermediate, "total", x, **total)
        return self.out(x)


class LinenAttends(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, x):
        attention = linen.MultiHeadDotProductAttention(HEADS, name="attention")
        x = attention(x, sow_weights=True)
        self.sow("intermediates", "halfway", x)
        total = {"init_fn": lambda: 0.0, "reduce_fn": lambda a, b: a + b}
        self.sow("intermediates", "total", x, **total)
        x = attention(x, sow_weights=True)
        self.sow("intermediates", "total", x, **total)
        return linen.Dense(CLASSES, name="out")(x)


@functools.cache
def modules():
    module = LinenAttends()
    variables = jax.jit(module.init)(jax.random.key(0), BATCH["x"])
    return Attends(rngs=nnx.Rngs(0)), module, variables


def nnx_net(features=()):
    return models.from_nnx(modules()[0], features=features)


def linen_net(features=()):
    return models.from_linen(*modules()[1:], features=features)


EITHER = pytest.mark.parametrize("make", [nnx_net, linen_net])
PER_HEAD = (2, TOKENS, HEADS, WIDTH // HEADS)
OUTPUT = (2, TOKENS, WIDTH)
INSIDE = {
    "attention": OUTPUT,
    "attention/query": PER_HEAD,
    "attention/key": PER_HEAD,
    "attention/value": PER_HEAD,
    "attention/attention_weights": (2, HEADS, TOKENS, TOKENS),
    "attention/out": OUTPUT,
}
SHAPES = {
    **INSIDE,
    **{f"{path}#1": shape for path, shape in INSIDE.items()},
    "halfway": OUTPUT,
    "total": OUTPUT,
    "out": (2, TOKENS, CLASSES),
}


@EITHER
def test_all_of_it_is_listed_with_its_shape(make):
    found = models.paths(make(), BATCH)
    assert {path: each.shape for path, each in found.items()} == SHAPES


@EITHER
def test_values_are_those_computed_by_hand(make):
    net = make(tuple(SHAPES))
    outputs, state = net.model.apply(net.params, {}, BATCH, rng=None, train=True)
    assert state == net.model_state == {}
    got = {path: np.asarray(each) for path, each in outputs.features.items()}
    weights, x = net.params["attention"], BATCH["x"]

    def close(path, expected):
        np.testing.assert_allclose(got[path], expected, rtol=1e-4, atol=1e-5)

    for repeat in ("", "#1"):
        for part in ("query", "key", "value"):
            kernel = np.asarray(weights[part]["kernel"]).reshape(
                WIDTH, HEADS, WIDTH // HEADS
            )
            expected = np.einsum("btd,dhk->bthk", x, kernel)
            close(f"attention/{part}{repeat}", expected)
        query, key, value = (
            got[f"attention/{part}{repeat}"] for part in ("query", "key", "value")
        )
        scores = np.einsum("bqhk,bshk->bhqs", query, key) / np.sqrt(WIDTH // HEADS)
        chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        close(f"attention/attention_weights{repeat}", chances)
        mixed = np.einsum("bhqs,bshk->bqhk", chances, value)
        kernel = np.asarray(weights["out"]["kernel"]).reshape(
            HEADS, WIDTH // HEADS, WIDTH
        )
        close(f"attention{repeat}", np.einsum("bqhk,hkd->bqd", mixed, kernel))
        x = got[f"attention{repeat}"]
    close("halfway", got["attention"])
    close("total", got["attention"] + got["attention#1"])
    np.testing.assert_array_equal(got["out"], outputs.logits)


@EITHER
def test_what_no_one_asked_for_goes_nowhere(make):
    net = make()
    # Sown outside of a capture, NNX would warn and make it part of the network.
    outputs, state = net.model.apply(net.params, {}, BATCH, rng=None, train=True)
    assert outputs.features == state == {}
    assert not [name for name in vars(modules()[0]) if name in ("halfway", "total")]
    net = make(("attention/query#1",))
    outputs, state = net.model.apply(net.params, {}, BATCH, rng=None, train=True)
    assert list(outputs.features) == ["attention/query#1"]
    assert state == {}


@EITHER
def test_an_index_picks_along_the_first_axis(make):
    wanted = "attention", "attention[1]", "attention/key#1[-2]"
    net = make((*wanted, "attention/key#1"))
    outputs, _ = net.model.apply(net.params, {}, BATCH, rng=None, train=False)
    features = outputs.features
    np.testing.assert_array_equal(features["attention[1]"], features["attention"][1])
    np.testing.assert_array_equal(
        features["attention/key#1[-2]"], features["attention/key#1"][0]
    )


@EITHER
@pytest.mark.parametrize("index", [2, -3])
def test_refuses_an_index_out_of_range(make, index):
    path = f"halfway[{index}]"
    net = make((path,))
    match = (
        rf"got '{re.escape(path)}', whose index {index} is out of range: .* length 2"
    )
    with pytest.raises(ValueError, match=match):
        net.model.apply(net.params, {}, BATCH, rng=None, train=False)


@EITHER
@pytest.mark.parametrize("path", ["nowhere[0]", "halfway[first]", "halfway[0][0]"])
def test_refuses_to_index_what_is_not_there(make, path):
    net = make((path, "halfway"))
    match = rf"got \['{re.escape(path)}'\], which match nothing.*attention/query#1"
    with pytest.raises(ValueError, match=match):
        net.model.apply(net.params, {}, BATCH, rng=None, train=False)


def test_refuses_to_index_a_number():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            self.sow("intermediates", "norm", jnp.sum(x**2))
            return x

    net = models.from_linen(Net(), {"params": {}}, features=("norm[0]",))
    with pytest.raises(ValueError, match=r"'norm\[0\]'.*captured there, \(\), has"):
        net.model.apply({}, {}, BATCH, rng=None, train=False)
