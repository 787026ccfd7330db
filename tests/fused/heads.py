"""Heads over a few tokens, and a loss of them: chunk by chunk and multiplied out."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import fused
from kdjax.types import LinearHead, Mean

BATCH, WIDTH, CLASSES = (2, 5), 4, 8


def head(seed, width=WIDTH, batch=BATCH, dtype=jnp.float32, bias=True, **numbers):
    """A head with logits of ordinary size."""
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (*batch, width), "kernel": (width, CLASSES)}
    shapes |= {"bias": (CLASSES,)} if bias else {}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays = {name: jnp.asarray(array, dtype) for name, array in drawn.items()}
    return LinearHead(**arrays, **numbers)


def labels(seed=0, batch=BATCH):
    """A class for each token, but for one that has none."""
    drawn = np.random.default_rng(seed).integers(0, CLASSES, batch)
    drawn[..., 1] = -100
    return jnp.asarray(drawn, jnp.int32)


def mask(batch=BATCH):
    """About two thirds of the tokens."""
    return jnp.asarray(np.random.default_rng(3).random(batch) < 0.65)


def others_of(case, teacher, labels, batch=BATCH):
    """What a loss takes besides the student's logits; a teacher if only by name."""
    targets = head(2, bias=False, batch=batch).logits()
    given = {"teacher_logits": teacher, "labels": labels, "targets": targets}
    taken = tuple(given[name] for name in case.arguments if name in given)
    return taken if "teacher_logits" in case.arguments else (None, *taken)


def tolerance(case):
    """To which a loss is itself in any order of its sums."""
    # Little is left of these for a gradient, by scale and cap above all: beside
    # float64, the plain ones are off as much.
    cancelling = {"inter_class_relation", "hard_distillation", "universal_logit"}
    return 4e-6 if case.name in cancelling else 1e-6


def plain(loss, student, others, where=None):
    """What ``fused.token_mean`` is to give, from all logits."""
    others = [other for other in others if other is not None]
    dense = [o.logits() if isinstance(o, LinearHead) else o for o in others]
    return Mean.of(loss(student.logits(), *dense), where)


def chunked(loss, student, others, where=None, chunk_size=4):
    """The same chunk by chunk; by default the last one reaches back."""
    return fused.token_mean(loss, student, *others, where=where, chunk_size=chunk_size)


def with_gradient(mean, loss, **options):
    """``(student, others, where)`` to the mean and its gradient by the student."""

    def value(student, others, where):
        found = mean(loss, student, others, where, **options)
        return found.value(), found

    return jax.grad(value, has_aux=True)


def exact(loss, *given):
    """The plain mean and its gradient in float64."""

    def widened(leaf):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, jnp.float64) if floating else leaf

    with jax.enable_x64(True):
        run = jax.jit(with_gradient(plain, loss))
        return jax.tree.map(np.asarray, run(*jax.tree.map(widened, given)))


def assert_close(got, expected, tolerance=1e-6):
    """Every array to so much of its largest entry."""
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        one, other = np.asarray(one, float), np.asarray(other, float)
        assert np.isfinite(one).all()
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()
