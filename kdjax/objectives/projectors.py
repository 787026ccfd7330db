"""Trained maps from the student's features to the size of the teacher's.

A projector belongs to a term: its parameters are trained, sharded and saved with the
student's, under ``params["objective"]``, and are gone once the student is deployed.
Features have their channels last, so a linear projector is also the 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.losses import _checks
from kdjax.losses._maps import of_one_size
from kdjax.types import PyTree


class Projector(NamedTuple):
    """Makes the student's feature ``[..., C]`` comparable to the teacher's.

    Attributes:
      init: ``(rng, student_channels, teacher_channels)`` to the parameters.
      apply: ``(params, feature)`` to ``[..., teacher_channels]``.
    """

    init: Callable[[Array, int, int], PyTree]
    apply: Callable[[PyTree, Array], Array]


def identity() -> Projector:
    """Nothing is trained, and the feature stays as it is.

    Example:
      >>> projector = identity()
      >>> projector.apply(projector.init(jax.random.key(0), 3, 3), jnp.ones(3)).shape
      (3,)
    """
    return Projector(lambda rng, student, teacher: {}, lambda params, feature: feature)


def linear(*, bias: bool = True) -> Projector:
    """One matrix on the channels; on feature maps, a 1x1 convolution.

    Args:
      bias: whether a bias is added.

    Returns:
      A projector whose matrix starts with variance 1 / C, its bias with 0.

    Example:
      >>> projector = linear()
      >>> params = projector.init(jax.random.key(0), 3, 5)
      >>> projector.apply(params, jnp.ones((2, 4, 4, 3))).shape
      (2, 4, 4, 5)

    Reference:
      Romero et al., FitNets: Hints for Thin Deep Nets, 2014, section 2.2.
      arXiv:1412.6550
    """
    return mlp(bias=bias)


def mlp(*hidden: int, bias: bool = True) -> Projector:
    """Several matrices on the channels with ReLU between them.

    Args:
      *hidden: widths of the layers between.
      bias: whether biases are added.

    Returns:
      A projector whose matrices start with He's variance, the last with 1 / C.

    Raises:
      ValueError: a width is below 1.

    Example:
      >>> projector = mlp(8)
      >>> params = projector.init(jax.random.key(0), 3, 5)
      >>> jax.tree.map(jnp.shape, params["0"])
      {'bias': (8,), 'kernel': (3, 8)}
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden: got {hidden}; expected widths of at least 1.")

    def init(rng: Array, student: int, teacher: int) -> PyTree:
        widths = [student, *hidden, teacher]
        params = {}
        for index, width in enumerate(widths[:-1]):
            gain = 2.0 if index < len(hidden) else 1.0
            kernel = jax.nn.initializers.variance_scaling(gain, "fan_in", "normal")
            key = jax.random.fold_in(rng, index)
            layer = {"kernel": kernel(key, (width, widths[index + 1]))}
            if bias:
                layer["bias"] = jnp.zeros(widths[index + 1])
            params[str(index)] = layer
        return params

    def apply(params: PyTree, feature: Array) -> Array:
        for index in range(len(hidden) + 1):
            if index:
                feature = jax.nn.relu(feature)
            layer = params[str(index)]
            feature = feature @ layer["kernel"].astype(feature.dtype)
            if bias:
                feature = feature + layer["bias"].astype(feature.dtype)
        return feature

    return Projector(init, apply)


def pooled(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Averages the larger of two maps ``[B, H, W, C]`` down to the size of the smaller.

    Each pixel of the result is the mean over its share of the larger map, as in
    adaptive average pooling; shares overlap where the sizes do not divide.

    Args:
      student: ``[B, H, W, C]``; channels may differ from the teacher's.
      teacher: ``[B, H', W', C']``.

    Returns:
      Both, with equal heights and widths.

    Raises:
      ValueError: one of them is no map, or they are of other batches.
      TypeError: a map is not floating.

    Example:
      >>> a, b = pooled(jnp.ones((1, 8, 8, 3)), jnp.ones((1, 4, 4, 5)))
      >>> a.shape, b.shape
      ((1, 4, 4, 3), (1, 4, 4, 5))
    """
    _checks.maps(channels=False, space=False, student=student, teacher=teacher)
    return of_one_size(student, teacher)
