"""Bare networks that show a map, a vector and tokens, and what the tests do to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.types import Outputs

EXAMPLES, CLASSES, SIZE = 8, 3, 4


def net(seed, channels, size=SIZE):
    """Two levels of maps and a pooled vector over images ``[B, 4, 4, 2]``."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "first": jax.random.normal(keys[0], (2, channels)),
        "second": jax.random.normal(keys[1], (channels, channels)),
        "head": jax.random.normal(keys[2], (channels, CLASSES)),
    }

    def apply(params, batch):
        first = jnp.tanh(batch["x"] @ params["first"])
        half = first.reshape(len(first), 2, 2, 2, 2, -1).mean((2, 4))
        second = jnp.tanh(half @ params["second"])
        pooled = second.mean((1, 2))
        shown = {"first": first, "second": second, "pooled": pooled}
        return Outputs(pooled @ params["head"], shown)

    return models.from_apply(apply, params)


STUDENT, TEACHER = net(0, 4), net(1, 6)


def batch(seed=0, examples=EXAMPLES, dataset=40):
    """Images of a data set of 40, each with its index; a quarter does not count."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(examples, SIZE, SIZE, 2)).astype(np.float32),
        "label": rng.integers(0, CLASSES, examples).astype(np.int32),
        "index": rng.permutation(dataset)[:examples].astype(np.int32),
        "mask": np.arange(examples) % 4 != 3,
    }


def outputs(net, batch):
    return _run(net.model, net.params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, batch):
    return model.apply(params, {}, batch, rng=None, train=False)[0]


def started(objective, batch, seed=5):
    """Parameters and state of an objective between the two networks."""
    ours, theirs = outputs(STUDENT, batch), outputs(TEACHER, batch)
    spec = jax.eval_shape(lambda: (ours, theirs))

    @jax.jit
    def init(key):
        return objective.init(key, *spec), objective.init_state()

    return init(jax.random.key(seed))


def values_of(objective, batch, params=None, state=None, step=0):
    """The means of an objective's terms by name, and its new state."""
    if params is None:
        params, state = started(objective, batch)
    state = objective.init_state() if state is None else state
    ours, theirs = outputs(STUDENT, batch), outputs(TEACHER, batch)

    @jax.jit
    def run(*arrays):
        terms, changed = objective.apply(*arrays)
        return {name: term.mean for name, term in terms.items()}, changed

    return run(params, state, ours, theirs, batch, jnp.asarray(step))
