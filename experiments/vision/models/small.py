"""Convolutional and dense networks that train on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from flax import nnx
from jax import Array

from experiments.vision.models.features import outputs
from kdjax import Outputs


class ConvNorm(nnx.Module):
    """A 3x3 convolution and batch normalisation."""

    def __init__(self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels,
            width,
            (3, 3),
            strides=stride,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))


class Cnn(nnx.Module):
    """Stages of convolutions with ReLU, the first of each with stride 2.

    Args:
      widths: channels of the convolutions of each stage.
      shape: height, width and channels of an image.
      classes: how many there are.
      rngs: of the initial weights.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        shape: tuple[int, int, int],
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        channels, stages = shape[-1], []
        for stage in widths:
            layers = []
            for index, width in enumerate(stage):
                stride = 2 if index == 0 else 1
                layers.append(ConvNorm(channels, width, stride, rngs=rngs))
                channels = width
            stages.append(nnx.List(layers))
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: Array) -> Outputs:
        before = []
        for stage in self.stages:
            for layer in stage:
                last = layer(x)
                x = nnx.relu(last)
            before.append(last)
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
