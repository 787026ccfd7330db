"""The networks by name, for images of any size and any number of classes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.jobs.networks import seeded_key
from experiments.vision.models.features import DISTILLATION, Net, map_path
from experiments.vision.models.resnet import ResNet, WideResNet
from experiments.vision.models.small import Cnn, Mlp
from experiments.vision.models.vit import VisionTransformer
from kdjax import Adapted, Outputs
from kdjax.models import from_nnx, paths
from kdjax.types import Batch, Model, PyTree

Make = Callable[..., nnx.Module]
"""``(shape, classes, *, rngs)`` to the network."""

FAMILIES = (
    "cnn",
    "cnn_large",
    "mlp",
    "vit",
    "resnet{6n+2}",
    "resnet{6n+2}x4",
    "wrn_{6n+4}_{width}",
)
"""What networks are called."""

_FIXED: Mapping[str, Make] = {
    "cnn": functools.partial(Cnn, ((8,), (24,), (32,))),
    "cnn_large": functools.partial(Cnn, ((32,), (48, 48), (96, 96))),
    "mlp": functools.partial(Mlp, 128),
    "vit": functools.partial(VisionTransformer, 64, 6, 4, 4),
}


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel over the training images, of 255."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> Statistics:
        """Of images, uint8 ``[N, H, W, C]``."""
        values = images.reshape(-1, images.shape[-1])
        counts = [np.bincount(channel, minlength=256) for channel in values.T]
        grey = np.arange(256.0)
        mean = np.array([count @ grey / count.sum() for count in counts])
        square = np.array([count @ grey**2 / count.sum() for count in counts])
        # A channel of one value has no scale.
        deviation = np.sqrt(np.maximum(square - mean**2, 1.0))
        return cls(mean.astype(np.float32), deviation.astype(np.float32))


def network(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    statistics: Statistics,
    *,
    seed: int,
) -> Net:
    """A network with the initial weights of a seed.

    Args:
      name: one of :data:`FAMILIES`, such as ``"resnet8x4"`` or ``"wrn_16_2"``.
      shape: height, width and channels of an image.
      classes: how many there are.
      statistics: by which the network normalises its images, 0 to 255, itself.
      seed: of the initial weights.

    Raises:
      ValueError: no network is called so.
    """
    module = _initialiser(name, shape, classes)(seeded_key(seed))
    adapted = _normalising(from_nnx(module), statistics)
    batch = {"x": jax.ShapeDtypeStruct((1, *shape), jnp.uint8)}
    shown = paths(adapted, batch)
    maps = [shown[map_path(n)] for n in range(len(shown)) if map_path(n) in shown]
    positions = [each.shape[1] * each.shape[2] for each in maps]
    return Net(name, adapted, positions, DISTILLATION in shown)


def maker(name: str) -> Make:
    """The constructor of a network; refuses other names."""
    if name in _FIXED:
        return _FIXED[name]
    if found := re.fullmatch(r"resnet(\d+)(x4)?", name):
        blocks, rest = divmod(int(found[1]) - 2, 6)
        widths = (32, 64, 128, 256) if found[2] else (16, 16, 32, 64)
        if blocks > 0 and not rest:
            return functools.partial(ResNet, blocks, widths)
    if found := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        blocks, rest = divmod(int(found[1]) - 4, 6)
        if blocks > 0 and not rest and int(found[2]) > 0:
            return functools.partial(WideResNet, blocks, int(found[2]))
    raise ValueError(
        f"got {name!r}; expected one of {', '.join(FAMILIES)}, with whole numbers n of "
        "at least 1, such as resnet20, resnet8x4 or wrn_16_2."
    )


# Compiled as a whole: drawing weights one array at a time compiles a program for
# each shape, which takes longer than a small training.
@functools.lru_cache
def _initialiser(
    name: str, shape: tuple[int, int, int], classes: int
) -> Callable[[jax.Array], nnx.Module]:
    make = maker(name)
    return nnx.jit(lambda key: make(shape, classes, rngs=nnx.Rngs(key)))


def _normalising(net: Adapted, statistics: Statistics) -> Adapted:
    """The network on images from 0 to 255, as they lie in memory."""

    def apply(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        rng: jax.Array | None,
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        x = (batch["x"].astype(jnp.float32) - statistics.mean) / statistics.deviation
        seen = {**batch, "x": x}
        return net.model.apply(params, model_state, seen, rng=rng, train=train)

    return net._replace(model=Model(apply))
