"""Methods that learn from texts which the teacher, or the student itself, has made."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.jobs.trainings import Rollout
from experiments.lm.methods.setup import Method, Recipe, Setup, of_made
from experiments.lm.networks import INPUTS
from experiments.lm.rollouts import SCORED, as_data, in_groups, step_key
from kdjax import Objective, losses
from kdjax.io.input import HostBatch
from kdjax.objectives import combine, hard_labels, soft_labels
from kdjax.train import DistillState
from kdjax.types import Batch, PyTree


def _own_texts(setup: Setup, share: float) -> Rollout:
    """Puts the student's own texts in place of a share of the batches."""

    def rollout(state: DistillState, frozen: PyTree, batch: Batch) -> Batch:
        choose, draw = jax.random.split(step_key(state.rng, state.step))

        def own() -> dict[str, Array]:
            params, tokens = state.params["student"], batch["tokens"]
            return setup.go_on(setup.student, params, tokens, batch["segments"], draw)

        if share == 1:
            return {**batch, **own()}
        chosen = jax.random.uniform(choose) < share
        return {**batch, **jax.lax.cond(chosen, own, lambda: as_data(batch))}

    return rollout


def _teachers_texts(setup: Setup, prefix: str) -> Callable[..., HostBatch]:
    """Adds how the teacher goes on with every row, made once."""

    @jax.jit
    def made(
        params: PyTree, tokens: Array, segments: Array, rng: Array
    ) -> dict[str, Array]:
        return setup.go_on(setup.teacher, params, tokens, segments, rng)

    def rows(params: PyTree, given: HostBatch, seed: int) -> HostBatch:
        key = jax.random.key(seed)
        groups = [
            jax.device_get(made(params, *texts, jax.random.fold_in(key, index)))
            for index, texts in enumerate(in_groups(*(given[name] for name in INPUTS)))
        ]
        texts = {
            prefix + name: np.concatenate([each[name] for each in groups])
            for name in groups[0]
        }
        return {**given, **texts}

    return rows


def _sequence_level(setup: Setup) -> Recipe:
    """Kim and Rush, 2016, arXiv:1606.07947: the teacher's texts in the data's place."""
    return Recipe(of_made(hard_labels()), rows=_teachers_texts(setup, ""))


def _gkd(setup: Setup) -> Recipe:
    """Agarwal et al., 2023, arXiv:2306.13649, algorithm 1."""
    loss = soft_labels(losses.jensen_shannon, beta=0.5, temperature=setup.temperature)
    return Recipe(of_made(loss), rollout=_own_texts(setup, setup.own_share))


def _distillm2(setup: Setup) -> Recipe:
    """Ko et al., 2025, arXiv:2503.07067, equation 7, at the same weight for both.

    Every other row is one that the teacher has made, the others the student makes.
    """
    theirs, ours = "of_teacher", "of_student"

    def rollout(state: DistillState, frozen: PyTree, batch: Batch) -> Batch:
        key, params = step_key(state.rng, state.step), state.params["student"]
        tokens, segments = (batch[name][1::2] for name in INPUTS)
        own = setup.go_on(setup.student, params, tokens, segments, key)
        mixed = {
            name: batch[_TEACHERS + name].at[1::2].set(made)
            for name, made in own.items()
        }
        of_teacher = (jnp.arange(len(mixed["tokens"])) % 2 == 0)[:, None]
        return {
            **batch,
            **mixed,
            theirs: mixed[SCORED] & of_teacher,
            ours: mixed[SCORED] & ~of_teacher,
        }

    def term(loss: Callable[..., Array], name: str) -> Objective:
        temperature = setup.temperature
        return soft_labels(
            loss, name=name, weight=0.5, skew=0.1, temperature=temperature
        )

    objective = combine(
        of_made(term(losses.skew_kl, "attraction"), theirs),
        of_made(term(losses.skew_reverse_kl, "repulsion"), ours),
    )
    return Recipe(objective, rows=_teachers_texts(setup, _TEACHERS), rollout=rollout)


_TEACHERS = "teachers_"


def _policy(loss: Callable[[Array, Array], Array]) -> Method:
    """A loss between the log-probabilities of the tokens that the student has drawn."""

    def of_drawn(student: Array, teacher: Array, labels: Array) -> Array:
        sides = (-losses.cross_entropy(side, labels) for side in (student, teacher))
        return loss(*sides)

    def method(setup: Setup) -> Recipe:
        term = soft_labels(of_drawn, labels="label", name="policy")
        return Recipe(of_made(term), rollout=_own_texts(setup, 1.0))

    return method


def _squared(student: Array, teacher: Array) -> Array:
    return losses.sampled_reverse_kl(student, teacher, estimator=losses.k2)


TEXTS: dict[str, Method] = {
    "sequence_level": _sequence_level,
    "gkd": _gkd,
    "distillm2": _distillm2,
    "policy": _policy(losses.policy_distillation),
    "policy_k2": _policy(_squared),
    "policy_k3": _policy(losses.sampled_reverse_kl),
}
"""By name."""
