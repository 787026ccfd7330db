"""What can be captured is listed as it can be asked for, and costs nothing unasked."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from kdjax import models
from kdjax.types import Outputs


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(8, name="first")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        return linen.Dense(3, name="last")(x)


def linen_net(features=()):
    module = LinenNetwork()
    variables = module.init(jax.random.key(0), jnp.ones((1, 4)), train=False)
    return models.from_linen(module, variables, features=features)


def nnx_net(features=()):
    return models.from_nnx(Network(nnx.Rngs(0)), features=features)


BATCH = {"x": jnp.ones((2, 4))}


@pytest.mark.parametrize(
    ("make", "extra"), [(nnx_net, {"drop": (2, 8)}), (linen_net, {})]
)
def test_every_listed_path_can_be_captured(make, extra):
    found = models.paths(make(), BATCH)
    expected = {"first": (2, 8), "norm": (2, 8), "last": (2, 3), **extra}
    assert {path: each.shape for path, each in found.items()} == expected
    net = make(tuple(found))
    arrays = net.params, net.model_state
    outputs, _ = net.model.apply(*arrays, BATCH, rng=None, train=False)
    assert {path: each.shape for path, each in outputs.features.items()} == expected


@pytest.mark.parametrize("make", [nnx_net, linen_net])
def test_shapes_are_enough(make):
    shapes = {"x": jax.ShapeDtypeStruct((5, 4), jnp.float32)}
    assert models.paths(make(), shapes)["first"].shape == (5, 8)


def test_a_bare_function_shows_what_it_shows():
    def apply(params, batch):
        hidden = batch["x"] @ params
        return Outputs(hidden, {"hidden": hidden})

    found = models.paths(models.from_apply(apply, jnp.ones((4, 3))), BATCH)
    assert {path: each.shape for path, each in found.items()} == {"hidden": (2, 3)}


def test_missing_entries_are_named():
    with pytest.raises(ValueError, match=r"inputs: the network takes \['x'\]"):
        models.paths(nnx_net(), {"image": BATCH["x"]})


@pytest.mark.parametrize("make", [nnx_net, linen_net])
def test_capture_costs_nothing_when_unused(make):
    """The captured features that no one reads leave no trace in the program."""

    def program(features):
        net = make(features)

        def run(params, model_state, x):
            outputs, _ = net.model.apply(
                params, model_state, {"x": x}, rng=jax.random.key(0), train=True
            )
            return outputs.logits

        shapes = net.params, net.model_state, BATCH["x"]
        compiled = jax.jit(run).lower(*shapes).compile()
        return compiled.cost_analysis(), compiled.memory_analysis().temp_size_in_bytes

    assert program(()) == program(("first", "norm"))
