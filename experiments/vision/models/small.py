"""Convolutional and dense networks that train on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from flax import nnx
from jax import Array

from experiments.vision.models.features import outputs
from kdjax import Outputs


class Cnn(nnx.Module):
    """Three stages of a 3x3 convolution with stride 2, batch normalisation and ReLU.

    Args:
      widths: channels after each stage.
      shape: height, width and channels of an image.
      classes: how many there are.
      rngs: of the initial weights.
    """

    def __init__(
        self,
        widths: Sequence[int],
        shape: tuple[int, int, int],
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        channels = (shape[-1], *widths)
        he = nnx.initializers.he_normal()
        self.convs = nnx.List(
            nnx.Conv(
                *pair, (3, 3), strides=2, use_bias=False, kernel_init=he, rngs=rngs
            )
            for pair in zip(channels, widths, strict=False)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: Array) -> Outputs:
        before = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            before.append(norm(conv(x)))
            x = nnx.relu(before[-1])
        embedding = x.mean((1, 2))
        return outputs(self.head(embedding), embedding, before)


class Mlp(nnx.Module):
    """Two dense layers with ReLU; their maps have one position.

    Args:
      width: of both.
      shape: height, width and channels of an image.
      classes: how many there are.
      rngs: of the initial weights.
    """

    def __init__(
        self, width: int, shape: tuple[int, int, int], classes: int, *, rngs: nnx.Rngs
    ):
        height, across, channels = shape
        sizes = (height * across * channels, width, width)
        he = nnx.initializers.he_normal()
        self.layers = nnx.List(
            nnx.Linear(*pair, kernel_init=he, rngs=rngs)
            for pair in itertools.pairwise(sizes)
        )
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: Array) -> Outputs:
        x = x.reshape(len(x), -1)
        before = []
        for layer in self.layers:
            before.append(layer(x)[:, None, None])
            x = nnx.relu(before[-1])[:, 0, 0]
        return outputs(self.head(x), x, before)
