"""Residual networks for small images, as RepDistiller has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jax import Array

from experiments.vision.models.features import outputs
from kdjax import Outputs

_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
    channels: int, width: int, size: int, stride: int, rngs: nnx.Rngs
) -> nnx.Conv:
    sides = ((size // 2, size // 2),) * 2
    return nnx.Conv(
        channels,
        width,
        (size, size),
        strides=stride,
        padding=sides,
        use_bias=False,
        kernel_init=_HE,
        rngs=rngs,
    )


def _stages(
    block: Callable[..., nnx.Module], blocks: int, widths: Sequence[int], rngs: nnx.Rngs
) -> nnx.List:
    """Three stages of blocks; the second and the third start with stride 2.

    Args:
      block: made as ``block(channels, width, stride, rngs=rngs)``.
      blocks: in each stage.
      widths: channels before the first stage, and of each.
      rngs: of the initial weights.
    """
    return nnx.List(
        nnx.List(
            block(
                channels if index == 0 else width,
                width,
                stride if index == 0 else 1,
                rngs=rngs,
            )
            for index in range(blocks)
        )
        for channels, width, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
    )


class BasicBlock(nnx.Module):
    """Two convolutions and a shortcut, added up before the last ReLU."""

    def __init__(self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(channels, width, 3, stride, rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.reshapes = stride != 1 or channels != width
        if self.reshapes:
            self.shortcut = _conv(channels, width, 1, stride, rngs)
            self.shortcut_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """What comes before the last ReLU."""
        across = self.shortcut_norm(self.shortcut(x)) if self.reshapes else x
        x = nnx.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x)) + across


class ResNet(nnx.Module):
    """A stem and three stages of basic blocks.

    Args:
      blocks: in each stage; the depth is six times that plus two.
      widths: channels of the stem and of the stages.
      shape: height, width and channels of an image.
      classes: how many there are.
      rngs: of the initial weights.

    Reference:
      He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2.
      arXiv:1512.03385
    """

    def __init__(
        self,
        blocks: int,
        widths: Sequence[int],
        shape: tuple[int, int, int],
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(shape[-1], widths[0], 3, 1, rngs)
        self.norm = nnx.BatchNorm(widths[0], momentum=0.9, rngs=rngs)
        self.stages = _stages(BasicBlock, blocks, widths, rngs)
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: Array) -> Outputs:
        x = nnx.relu(self.norm(self.stem(x)))
        before = []
        for stage in self.stages:
            for block in stage:
                last = block(x)
                x = nnx.relu(last)
            before.append(last)
        embedding = x.mean((1, 2))
        return outputs(self.head(embedding), embedding, before)


class WideBlock(nnx.Module):
    """Normalisation and ReLU before each of two convolutions, then the shortcut."""

    def __init__(self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.conv1 = _conv(channels, width, 3, stride, rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.reshapes = channels != width
        if self.reshapes:
            self.shortcut = _conv(channels, width, 1, stride, rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """The output, and what the first ReLU read."""
        before = self.norm1(x)
        active = nnx.relu(before)
        across = self.shortcut(active) if self.reshapes else x
        y = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
        return y + across, before


class WideResNet(nnx.Module):
    """Three stages of wide blocks; a map is what the next ReLU makes of a stage.

    RepDistiller's features of these networks are the sums before normalisation.

    Args:
      blocks: in each stage; the depth is six times that plus four.
      widening: factor on the widths 16, 32 and 64.
      shape: height, width and channels of an image.
      classes: how many there are.
      rngs: of the initial weights.

    Reference:
      Zagoruyko and Komodakis, Wide Residual Networks, 2016. arXiv:1605.07146
    """

    def __init__(
        self,
        blocks: int,
        widening: int,
        shape: tuple[int, int, int],
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        self.stem = _conv(shape[-1], widths[0], 3, 1, rngs)
        self.stages = _stages(WideBlock, blocks, widths, rngs)
        self.norm = nnx.BatchNorm(widths[-1], momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: Array) -> Outputs:
        x = self.stem(x)
        before = []
        for number, stage in enumerate(self.stages):
            for index, block in enumerate(stage):
                x, read = block(x)
                if number and index == 0:  # the first of the next stage
                    before.append(read)
        before.append(self.norm(x))
        embedding = jax.nn.relu(before[-1]).mean((1, 2))
        return outputs(self.head(embedding), embedding, before)
