"""The table of losses that the battery runs over: one row for each."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import losses
from kdjax.types import SampledTargets
from tests.losses import oracles
from tests.marks import rest_slow

LOGITS = ("student_logits", "teacher_logits")


class Case(NamedTuple):
    """What the battery has to know about one loss.

    Attributes:
      name: of the row and of the loss.
      loss: the function, and ``oracle`` its float64 formula.
      hyper: keyword arguments, away from their defaults where that tells more.
      arguments: names of the positional arguments, in order.
      gives: what there is one value of: "position", "slot", "class" or "scalar".
      zero: the loss and its gradient are 0 at student == teacher.
      signed: the loss may be negative, at no fault.
      masks: what ``where`` masks: "slots", "examples" or nothing.
      excludes: what a slot at -inf on both sides does: as if it was "deleted", or
        merely "finite".
      frozen: the gradient stops at a weight in it, so that differences of the value
        do not show it.
      sorts: needs all the classes of a row in one place.
      targets: takes targets for the teacher's logits, which are made of them here and
        have refusals of their own.
    """

    name: str
    loss: Callable[..., Any]
    oracle: Callable[..., Any]
    hyper: Mapping[str, Any]
    arguments: tuple[str, ...] = LOGITS
    gives: str = "position"
    zero: bool = False
    signed: bool = False
    masks: str | None = None
    excludes: str = "deleted"
    frozen: bool = False
    sorts: bool = False
    targets: bool = False

    @property
    def labelled(self) -> bool:
        return "labels" in self.arguments

    def __call__(self, inputs, **extra):
        arrays = [inputs[name] for name in self.arguments]
        return self.loss(*arrays, **{**self.hyper, **extra})

    def exact(self, inputs, **extra):
        """The oracle's value for the same inputs."""
        arrays = [np.asarray(inputs[name]) for name in self.arguments]
        arrays = [a if a.dtype.kind == "i" else a.astype(float) for a in arrays]
        return self.oracle(*arrays, **{**self.hyper, **extra})


def _divergence(name, hyper=None, *, zero=True, **facts):
    return Case(
        name,
        getattr(losses, name),
        getattr(oracles, name),
        {"temperature": 1.7, **(hyper or {})},
        zero=zero,
        masks="slots",
        **facts,
    )


def _classification(name, hyper, **facts):
    return Case(name, getattr(losses, name), getattr(oracles, name), hyper, **facts)


DIVERGENCES = [
    _divergence("forward_kl"),
    _divergence("reverse_kl"),
    _divergence("symmetric_kl", {"reverse_weight": 0.3}),
    _divergence("jensen_shannon", {"beta": 0.3}),
    _divergence("skew_kl", {"skew": 0.2}),
    _divergence("skew_reverse_kl", {"skew": 0.2}),
    _divergence("total_variation"),
    _divergence("alpha_beta", {"alpha": 0.3, "beta": 0.6}),
    _divergence("renyi", {"order": 0.6}),
    _divergence("adaptive_kl", {"head_mass": 0.6}, frozen=True, sorts=True),
    _divergence("interpolated_teacher_kl", {"progress": 0.4}, frozen=True),
    _divergence("soft_cross_entropy", zero=False),
]

LABELLED = (*LOGITS, "labels")

CLASSIFICATION = [
    _classification(
        "cross_entropy",
        {"label_smoothing": 0.1},
        arguments=("student_logits", "labels"),
        masks="slots",
    ),
    _classification(
        "knowledge_distillation",
        {"temperature": 3.0, "alpha": 0.3},
        arguments=LABELLED,
    ),
    _classification("hard_distillation", {}, masks="slots", sorts=True),
    _classification(
        "decoupled_kd",
        {"alpha": 1.5, "beta": 4.0, "temperature": 3.0},
        arguments=LABELLED,
        zero=True,
    ),
    _classification(
        "normalized_kd", {"gamma": 1.2, "temperature": 1.4}, arguments=LABELLED
    ),
    _classification(
        "weighted_soft_labels", {"temperature": 2.5}, arguments=LABELLED, frozen=True
    ),
    _classification(
        "inter_class_relation",
        {"temperature": 1.7},
        zero=True,
        masks="slots",
        excludes="finite",
    ),
    _classification(
        "intra_class_relation",
        {"temperature": 1.7},
        gives="class",
        zero=True,
        masks="examples",
        excludes="finite",
    ),
    _classification(
        "multi_level_relation",
        {"temperatures": (1.5, 3.0), "batch_weight": 5.0, "class_weight": 7.0},
        gives="scalar",
        zero=True,
        masks="examples",
        excludes="finite",
    ),
    _classification(
        "binary_distillation",
        {"temperature": 1.7},
        gives="slot",
        zero=True,
        excludes="finite",
    ),
    _classification("logit_mse", {}, zero=True, masks="slots"),
    _classification(
        "standardize_logits",
        {},
        arguments=("student_logits",),
        gives="slot",
        signed=True,
        excludes="finite",
    ),
    _classification(
        "bounded_regression",
        {"margin": 0.5},
        arguments=(*LOGITS, "targets"),
        excludes="finite",
    ),
    _classification("pairwise_hinge", {}, zero=True, masks="slots", sorts=True),
    _classification("logistic_ranking", {}, masks="slots", sorts=True),
]


def top_three(teacher):
    k = min(3, teacher.shape[-1])
    return losses.top_k_targets(teacher, k, temperature=1.7)


def every_class_once(teacher):
    """What is drawn where every class comes up as often as it should."""
    wide = teacher.astype(jnp.promote_types(teacher.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(wide / 1.7)
    indices = jnp.broadcast_to(jnp.arange(teacher.shape[-1]), teacher.shape)
    return SampledTargets(indices, jnp.exp(log_probs), log_probs, 1.7)


def _over_targets(loss, targets_of, oracle, **facts):
    """A loss over targets, from both sides' logits."""

    @functools.wraps(loss)
    def over_logits(student, teacher):
        return loss(student, targets_of(teacher))

    # A top k needs all classes; so does an index that may be any of them.
    facts = {"sorts": True, "targets": True, **facts}
    return Case(loss.__name__, over_logits, oracle, {}, **facts)


LANGUAGE = [
    _over_targets(
        losses.sparse_forward_kl, top_three, oracles.sparse_forward_kl, zero=True
    ),
    _over_targets(
        losses.sparse_reverse_kl, top_three, oracles.sparse_reverse_kl, zero=True
    ),
    _over_targets(
        losses.sampled_forward_kl,
        every_class_once,
        functools.partial(oracles.forward_kl, temperature=1.7),
        signed=True,
    ),
    Case(
        "universal_logit",
        losses.universal_logit,
        oracles.universal_logit,
        {"temperature": 1.7},
        zero=True,
        sorts=True,
    ),
]

CASES = DIVERGENCES + CLASSIFICATION + LANGUAGE

# What is no loss between the logits of two models, and where it is tested.
APART = {
    "top_k_targets": "test_sparse.py",
    "sampled_targets": "test_sampled.py",
    **dict.fromkeys(
        ["k1", "k2", "k3", "sampled_reverse_kl", "policy_distillation"],
        "test_rollouts.py",
    ),
    "next_token": "test_tokens.py",
    "chunk_likelihood": "test_tokens.py",
    "align_vocabulary": "test_vocabularies.py",
}


def select(condition=lambda case: True, fast=None):
    """Parameters for ``pytest.mark.parametrize("case", ...)``, named.

    Of a test that compiles much for each, ``fast`` are the names in the fast suite.
    """
    return rest_slow(
        filter(condition, CASES),
        lambda case: fast is None or case.name in fast,
        name=lambda case: case.name,
    )


def sample(shape=(4, 8), seed=0, dtype=jnp.float32):
    """Inputs of ordinary size for every loss: ``[*batch, V]`` and ``[*batch]``."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 1.5, shape), rng.normal(0, 2.0, shape)
    # The truth lies near the teacher in every other row, near the student in the rest.
    nearer = np.where(np.arange(shape[0]) % 2 == 0, teacher.T, student.T).T
    return {
        "student_logits": jnp.asarray(student, dtype),
        "teacher_logits": jnp.asarray(teacher, dtype),
        "targets": jnp.asarray(nearer + rng.normal(0, 0.5, shape), dtype),
        "labels": jnp.asarray(rng.integers(0, shape[-1], shape[:-1]), jnp.int32),
    }
