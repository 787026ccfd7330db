"""The table of relations, attention and scores that test_relations.py runs over."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses import relation_oracles


class Case(NamedTuple):
    """What that battery has to know about one loss.

    Attributes:
      name: of the loss.
      loss: the function, and ``oracle`` its float64 formula.
      shapes: of the positional arguments, by name and in order.
      gives: the shape of the value.
      hyper: keyword arguments, away from their defaults where that tells more.
      traced: which of them are floats that never recompile.
      axis: the axis of the arguments that ``where`` masks.
      mask: the shape of ``where``.
      keeps: the loss has one value for each thing that is masked.
      zero: the loss and its gradient are 0 at student == teacher.
      relates: examples reach each other.
    """

    name: str
    loss: Callable[..., Any]
    oracle: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    gives: tuple[int, ...] = ()
    hyper: Mapping[str, Any] = {}
    traced: tuple[str, ...] = ()
    axis: int = 0
    mask: tuple[int, ...] = (8,)
    keeps: bool = False
    zero: bool = True
    relates: bool = True

    def __call__(self, inputs, **extra):
        arrays = [inputs[name] for name in self.shapes]
        return self.loss(*arrays, **{**self.hyper, **extra})

    def exact(self, inputs, **extra):
        """The oracle's value for the same inputs."""
        arrays = [np.asarray(inputs[name]).astype(float) for name in self.shapes]
        return self.oracle(*arrays, **{**self.hyper, **extra})

    @property
    def student(self):
        return next(iter(self.shapes))

    @property
    def teacher(self):
        return list(self.shapes)[1]

    def count(self):
        """How many things ``where`` tells apart."""
        return self.shapes[self.student][self.axis]

    def where(self, keep):
        """A mask from what is kept along the masked axis."""
        return jnp.broadcast_to(jnp.asarray(keep), self.mask)

    def along(self, keep, array):
        """``keep`` with the axes of an argument."""
        axes = [1] * array.ndim
        axes[self.axis] = -1
        return np.asarray(keep).reshape(axes)

    def delete(self, keep, array):
        return jnp.compress(keep, array, axis=self.axis)


def _case(name, student, teacher, *, names=("student", "teacher"), **facts):
    shapes = dict(zip(names, (student, teacher), strict=True))
    shapes |= facts.pop("more", {})
    loss, oracle = getattr(losses, name), getattr(relation_oracles, name)
    return Case(name, loss, oracle, shapes, **facts)


_ATTENTION = {
    "names": ("student_attention", "teacher_attention"),
    "gives": (4, 2, 6),
    "axis": 3,
    "mask": (4, 6),
    "relates": False,
}
_SCORES = {
    "names": ("student_scores", "teacher_scores"),
    "gives": (4,),
    "axis": 1,
    "mask": (4, 6),
    "relates": False,
}

CASES = [
    _case("relational_distance", (8, 5), (8, 7)),
    _case("relational_angle", (8, 5), (8, 7)),
    _case("similarity_preserving", (8, 2, 3), (8, 7)),
    _case(
        "correlation_congruence",
        (8, 5),
        (8, 7),
        hyper={"gamma": 0.5, "order": 3},
        traced=("gamma",),
    ),
    _case("probabilistic_transfer", (8, 5), (8, 7)),
    _case(
        "contrastive_representation",
        (8, 5),
        (8, 5),
        more={"negatives": (8, 3, 5)},
        hyper={"dataset_size": 20.0, "temperature": 2.0, "normalizer": 30.0},
        traced=("dataset_size", "temperature", "normalizer"),
        zero=False,
        relates=False,
    ),
    _case(
        "contrastive",
        (8, 5),
        (8, 5),
        hyper={"temperature": 0.5},
        traced=("temperature",),
        zero=False,
    ),
    _case("attention_mse", (4, 2, 6, 6), (4, 2, 6, 6), **_ATTENTION),
    _case("attention_kl", (4, 2, 6, 6), (4, 2, 6, 6), **_ATTENTION),
    _case(
        "self_attention_relation",
        (4, 6, 8),
        (4, 6, 4),
        gives=(4, 2, 6),
        hyper={"heads": 2},
        axis=1,
        mask=(4, 6),
        keeps=True,
        relates=False,
    ),
    _case("margin_mse", (4, 6), (4, 6), **_SCORES),
    _case(
        "score_kl",
        (4, 6),
        (4, 6),
        hyper={"temperature": 1.7},
        traced=("temperature",),
        **_SCORES,
    ),
]


def select(condition=lambda case: True):
    """Parameters for ``pytest.mark.parametrize("case", ...)``, named."""
    return [pytest.param(case, id=case.name) for case in CASES if condition(case)]


def sample(case, seed=0, dtype=jnp.float32):
    """Inputs of ordinary size, by the names of the arguments."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(0, 1.5, shape), dtype)
        for name, shape in case.shapes.items()
    }
