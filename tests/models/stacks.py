"""Layers with statistics, dropout and something sown: scanned, rematerialized, both.

And the same by hand, with what dropout keeps given.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from kdjax import models

LAYERS, WIDTH, CLASSES = 2, 4, 2
BATCH = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}


class Layer(nnx.Module):
    def __init__(self, rate, *, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x))
        self.sow(nnx.Intermediate, "square", x**2)
        return self.drop(jnp.tanh(x))


class Stack(nnx.Module):
    """Layers in NNX."""

    def __init__(self, kind, rate, *, rngs):
        self.kind = kind
        if "scan" in kind:
            made = nnx.vmap(lambda rngs: Layer(rate, rngs=rngs))
            self.blocks = nnx.split_rngs(splits=LAYERS)(made)(rngs)
        else:
            self.blocks = nnx.List(Layer(rate, rngs=rngs) for _ in range(LAYERS))
        self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        def run(x, layer):
            return layer(x)

        if "remat" in self.kind:
            run = nnx.remat(run)
        if "scan" in self.kind:
            scanned = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.out(scanned(x, self.blocks))
        for layer in self.blocks:
            x = run(x, layer)
        return self.out(x)


class LinenLayer(linen.Module):
    rate: float
    train: bool
    pair: bool

    @linen.compact
    def __call__(self, x, _=None):
        x = linen.Dense(WIDTH, name="dense")(x)
        x = linen.BatchNorm(not self.train, name="norm")(x)
        self.sow("intermediates", "square", x**2)
        x = linen.Dropout(self.rate, deterministic=not self.train)(jnp.tanh(x))
        # What linen.scan wants of a body: the carry, and an output of each layer.
        return (x, None) if self.pair else x


class LinenStack(linen.Module):
    """Layers in Linen."""

    kind: str
    rate: float

    @linen.compact
    def __call__(self, x, train):
        layer = linen.remat(LinenLayer) if "remat" in self.kind else LinenLayer
        settings = self.rate, train, "scan" in self.kind
        if "scan" in self.kind:
            scanned = linen.scan(
                layer,
                variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=LAYERS,
            )
            x, _ = scanned(*settings, name="blocks")(x, None)
        else:
            for index in range(LAYERS):
                x = layer(*settings, name=f"blocks_{index}")(x)
        return linen.Dense(CLASSES, name="out")(x)


class Kind(NamedTuple):
    """One of the networks, and where its layers are."""

    framework: str
    kind: str

    @functools.cache  # noqa: B019
    def module(self, rate, seed):
        """The network, and the variables of one in Linen."""
        if self.framework == "nnx":
            return Stack(self.kind, rate, rngs=nnx.Rngs(seed)), None
        module = LinenStack(self.kind, rate)
        init = jax.jit(functools.partial(module.init, train=False))
        return module, init(jax.random.key(seed), BATCH["x"])

    def net(self, features=(), rate=0.5, seed=0):
        module, variables = self.module(rate, seed)
        if variables is None:
            return models.from_nnx(module, features=features)
        return models.from_linen(module, variables, features=features)

    def path(self, layer, part=""):
        """What to ask for to see a part of a layer."""
        part = f"/{part}" if part else ""
        if "scan" in self.kind:
            # The layer may be named where it is or at the end.
            if self.framework == "nnx":
                return f"blocks[{layer}]{part}"
            return f"blocks{part}[{layer}]"
        return f"blocks{'/' if self.framework == 'nnx' else '_'}{layer}{part}"

    def layers(self, tree) -> list[Any]:
        """The parameters, or the statistics, of each layer."""
        tree = tree.get("batch_stats", tree)
        if "scan" in self.kind:
            entries = map(operator.itemgetter, range(LAYERS))
            return [jax.tree.map(entry, tree["blocks"]) for entry in entries]
        if self.framework == "nnx":
            return [tree["blocks"][i] for i in range(LAYERS)]
        return [tree[f"blocks_{i}"] for i in range(LAYERS)]


KINDS = [
    Kind(framework, kind)
    for framework in ("nnx", "linen")
    for kind in ("scan", "remat", "scan of remat")
]


def by_hand(layers, statistics, x, kept=None):
    """What each layer gives, and what its statistics become.

    Args:
      layers: parameters of each.
      statistics: running ones of each.
      x: input ``[B, WIDTH]``.
      kept: what dropout multiplies the output of each by, ``[LAYERS, B, WIDTH]``;
        None in evaluation.
    """
    given, moved = [], []
    for index, (layer, running) in enumerate(zip(layers, statistics, strict=True)):
        hidden = x @ layer["dense"]["kernel"] + layer["dense"]["bias"]
        used = running["norm"]
        if kept is not None:
            used = {"mean": hidden.mean(0), "var": hidden.var(0)}
        unit = (hidden - used["mean"]) / jnp.sqrt(used["var"] + 1e-5)
        normed = unit * layer["norm"]["scale"] + layer["norm"]["bias"]
        x = jnp.tanh(normed) * (1.0 if kept is None else kept[index])
        given.append({"dense": hidden, "norm": normed, "square": normed**2, "": x})
        moved.append(
            jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b, running["norm"], used)
        )
    return given, moved
