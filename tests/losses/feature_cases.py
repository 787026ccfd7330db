"""The table of losses over features: one row for each, and for each kind of input."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses import feature_oracles

MAP = (4, 4, 4, 3)
# Per-channel numbers, such as a margin or a scale; exact in bfloat16 too.
CHANNELS = np.array([-0.75, -0.5, -0.125])


class Case(NamedTuple):
    """What the tests have to know about one loss.

    Attributes:
      name: of the row; its first word is the name of the loss.
      loss: the function of (student, teacher), and ``oracle`` its float64 formula.
      hyper: keyword arguments, away from their defaults where that tells more.
      student: the shape of its features, or those of its layers; and ``teacher``.
      gives: the shape of the value.
      zero: the loss and its gradient are 0 at student == teacher.
      signed: the loss may be negative, at no fault.
      masks: what ``where`` masks: "positions", "examples" or nothing.
      relates: one example reaches another.
    """

    name: str
    loss: Callable[..., Any]
    oracle: Callable[..., Any]
    hyper: Mapping[str, Any]
    student: Any = MAP
    teacher: Any = MAP
    gives: tuple[int, ...] = (4,)
    zero: bool = True
    signed: bool = False
    masks: str | None = None
    relates: bool = False

    def __call__(self, student, teacher, **extra):
        dtype = jax.tree.leaves(student)[0].dtype
        hyper = {
            name: jnp.asarray(number, dtype) if np.ndim(number) else number
            for name, number in self.hyper.items()
        }
        return self.loss(student, teacher, **{**hyper, **extra})

    def exact(self, student, teacher, **extra):
        """The oracle's value for the same inputs."""
        student, teacher = jax.tree.map(
            lambda each: np.asarray(each).astype(np.float64), (student, teacher)
        )
        return self.oracle(student, teacher, **{**self.hyper, **extra})

    @property
    def alike(self):
        """Student and teacher may be equal."""
        return self.student == self.teacher


def _case(name, hyper=None, **facts):
    loss, oracle = (
        getattr(module, name.split()[0]) for module in (losses, feature_oracles)
    )
    return Case(name, loss, oracle, hyper or {}, **facts)


def _information(mean, target, *, log_scale, **extra):
    return losses.variational_information(mean, log_scale, target, **extra)


POSITIONS = {"masks": "positions"}
LAYERS = ((4, 4, 4, 3), (4, 2, 2, 5))

CASES = [
    _case("feature_mse", gives=MAP[:-1]),
    _case("feature_cosine", gives=MAP[:-1]),
    _case("variational_information", {"log_scale": CHANNELS}, zero=False, signed=True),
    _case("masked_generation", **POSITIONS),
    _case("attention_transfer", {"power": 2.0}, **POSITIONS),
    _case("attention_transfer cubed", {"power": 3.0}, teacher=(4, 4, 4, 5)),
    _case("attention_transfer resized", student=(4, 5, 4, 3), teacher=(4, 3, 4, 2)),
    _case("factor_transfer", {"power": 2.0}, **POSITIONS),
    _case("factor_transfer resized", student=(4, 3, 4, 3), teacher=(4, 5, 5, 2)),
    _case("neuron_selectivity", **POSITIONS),
    _case("neuron_selectivity wider", teacher=(4, 4, 4, 5), **POSITIONS),
    _case("neuron_selectivity resized", teacher=(4, 2, 2, 3)),
    _case("channel_distribution", {"temperature": 1.7}, **POSITIONS),
    _case("activation_boundary", {"margin": 0.7}, zero=False, **POSITIONS),
    _case("margin_relu_mse", {"margin": CHANNELS}, **POSITIONS),
    _case("hierarchical_context", student=(4, 5, 5, 3), teacher=(4, 5, 5, 3)),
    _case("solution_flow", student=LAYERS, teacher=LAYERS),
    _case("channel_similarity", **POSITIONS),
    _case("channel_similarity resized", teacher=(4, 2, 3, 3)),
    _case("feature_correlation", masks="examples", relates=True),
    _case(
        "linear_cka",
        student=(4, 5),
        teacher=(4, 5),
        gives=(),
        masks="examples",
        relates=True,
    ),
    _case("linear_cka wider", student=(4, 3), teacher=(4, 5), gives=(), relates=True),
]
CASES[2] = CASES[2]._replace(loss=_information, masks="positions")

NAMES = {case.name.split()[0] for case in CASES}


def select(condition=lambda case: True):
    """Parameters for ``pytest.mark.parametrize("case", ...)``, named."""
    return [pytest.param(case, id=case.name) for case in CASES if condition(case)]


def is_shape(shape):
    return isinstance(shape, tuple) and isinstance(shape[0], int)


def sample(case, seed=0, dtype=jnp.float32, batch=None):
    """Features of ordinary size: of the student, and of the teacher."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        shape = (batch or shape[0], *shape[1:])
        return jnp.asarray(rng.normal(0.2, 1.3, shape), dtype)

    return tuple(
        jax.tree.map(draw, shape, is_leaf=is_shape)
        for shape in (case.student, case.teacher)
    )


# Columns of the maps, or examples, that count.
KEEP = np.array([1, 0, 1, 1], bool)


def mask_of(case, value=KEEP):
    shape = MAP[:3] if case.masks == "positions" else MAP[:1]
    return jnp.broadcast_to(jnp.asarray(value), shape)
