"""Methods that keep a few classes of the teacher's distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from experiments.lm.methods.setup import Method, Recipe, Setup, of_data, with_given
from experiments.lm.model import DecoderConfig, with_params
from experiments.lm.rollouts import in_groups, step_key
from kdjax import (
    LinearHead,
    Objective,
    SampledTargets,
    SparseTargets,
    fused,
    losses,
    objectives,
    teachers,
)
from kdjax.io.input import HostBatch
from kdjax.train import DistillState
from kdjax.types import Batch, PyTree

KEPT = 8
"""Classes of sparse targets."""

DRAWN = 12
"""Classes that sampled targets draw, as published."""


def _from_top(student: Array, teacher: Array, *, temperature: float) -> Array:
    targets = _top(teacher, temperature=temperature)
    return losses.sparse_forward_kl(student, targets)


def _top(teacher: Array, *, temperature: float) -> SparseTargets:
    kept = min(KEPT, teacher.shape[-1])
    return losses.top_k_targets(teacher, kept, temperature=temperature)


def _top_k(setup: Setup) -> Recipe:
    term = objectives.soft_labels(_from_top, temperature=setup.temperature)
    return Recipe(of_data(term))


def _cached(setup: Setup) -> Recipe:
    """The same targets, made once: the teacher is not in the step."""
    keep = functools.partial(_top, temperature=setup.temperature)

    @jax.jit
    def kept(params: PyTree, tokens: Array, segments: Array) -> dict[str, Array]:
        targets = fused.token_map(keep, _head(setup.teacher, params, tokens, segments))
        return {name: getattr(targets, name) for name in _SPARSE}

    def rows(params: PyTree, given: HostBatch, seed: int) -> HostBatch:
        groups = [
            jax.device_get(kept(params, *texts))
            for texts in in_groups(given["tokens"], given["segments"])
        ]
        joined = {
            name: np.concatenate([each[name] for each in groups]) for name in _SPARSE
        }
        return {**given, **joined}

    def targets(batch: Batch) -> SparseTargets:
        kept = {name: batch[name] for name in _SPARSE}
        return SparseTargets(**kept, temperature=setup.temperature)

    return Recipe(_against(targets, losses.sparse_forward_kl), rows=rows)


def _sampled(setup: Setup) -> Recipe:
    """Anshumann et al., 2025, arXiv:2503.16870: drawn anew in every step."""

    def draw(teacher: Array, key: Array) -> SampledTargets:
        return losses.sampled_targets(
            key, teacher, DRAWN, temperature=setup.temperature
        )

    def rollout(state: DistillState, frozen: PyTree, batch: Batch) -> Batch:
        texts = batch["tokens"], batch["segments"]
        head = _head(setup.teacher, frozen["params"], *texts)
        keys = jax.random.split(step_key(state.rng, state.step), texts[0].shape)
        targets = fused.token_map(draw, head, keys)
        return {**batch, **{name: getattr(targets, name) for name in _SAMPLED}}

    def targets(batch: Batch) -> SampledTargets:
        drawn = {name: batch[name] for name in _SAMPLED}
        return SampledTargets(**drawn, temperature=setup.temperature)

    return Recipe(_against(targets, losses.sampled_forward_kl), rollout=rollout)


# Entries of a batch, and fields of the targets.
_SPARSE = ("indices", "log_probs", "tail")
_SAMPLED = ("indices", "weights", "log_probs")


def _head(
    config: DecoderConfig, params: PyTree, tokens: Array, segments: Array
) -> LinearHead:
    return with_params(config, params)(tokens, segments)


def _against(
    targets: Callable[[Batch], SparseTargets | SampledTargets],
    loss: Callable[..., Array],
) -> Objective:
    """A loss against targets of the batch, in place of the teacher's outputs."""
    source, _ = teachers.cached(targets)
    term = of_data(objectives.soft_labels(loss))
    return with_given(term, lambda _, batch: (source.outputs({}, (), batch), batch))


TARGETS: dict[str, Method] = {"top_k": _top_k, "cached": _cached, "sampled": _sampled}
"""By name."""
