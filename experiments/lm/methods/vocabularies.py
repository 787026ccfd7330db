"""Methods for students of byte pairs, whose teacher reads other tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from experiments.lm.methods.setup import (
    Given,
    Method,
    Recipe,
    Setup,
    Unfit,
    of_data,
    of_made,
    with_given,
)
from kdjax import LinearHead, Mean, Objective, Outputs, Term, losses
from kdjax.objectives import combine, hard_labels, soft_labels
from kdjax.types import Batch, PyTree

_TEACHER = ("teacher_tokens", "teacher_segments")


def _check(setup: Setup, name: str) -> None:
    if setup.byte_pairs is None:
        raise Unfit(f"{name} needs a teacher of characters or bytes; --tokenizer.")


def _labels() -> Objective:
    """Cross-entropy, without a look at a teacher whose tokens are others."""
    term = of_data(hard_labels())
    return with_given(term, lambda _, batch: (Outputs(None), batch))


def _alone(setup: Setup) -> Recipe:
    _check(setup, "alone_bpe")
    return Recipe(_labels(), teacher_inputs=_TEACHER, byte_pairs=True)


def _universal(setup: Setup) -> Recipe:
    """ULD, Boizard et al., 2024, arXiv:2402.12030, equation 2, at its weight of 1.5.

    Where both have read the same text, rather than at equal positions.
    """
    _check(setup, "uld")
    term = of_made(
        soft_labels(
            losses.universal_logit,
            name="uld",
            weight=1.5,
            temperature=setup.temperature,
        ),
        "follows_aligned",
    )

    def there(teacher: Outputs, batch: Batch) -> Given:
        assert isinstance(teacher.logits, LinearHead)
        places = batch["read"][..., None]
        hidden = jnp.take_along_axis(teacher.logits.hidden, places, axis=1)
        # A token may be judged if both have read the same text before it.
        follows = jnp.roll(batch["aligned"], 1, axis=1)
        read = Outputs(teacher.logits._replace(hidden=hidden))
        return read, {**batch, "follows_aligned": follows}

    return Recipe(
        combine(_labels(), with_given(term, there)),
        teacher_inputs=_TEACHER,
        byte_pairs=True,
    )


def _chunks(setup: Setup) -> Recipe:
    """ALM, Minixhofer et al., 2025, arXiv:2503.20083, at its temperature of 100."""
    _check(setup, "chunk_likelihood")

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        ours = _log_probs(student, batch["tokens"], batch["segments"])
        theirs = _log_probs(teacher, *(batch[name] for name in _TEACHER))
        chunks, others = batch["chunks"][:, 1:], batch["teacher_chunks"][:, 1:]
        count = batch["tokens"].shape[1]
        values = losses.chunk_likelihood(ours, theirs, chunks, others, chunks=count)
        exists = (chunks[:, :, None] == jnp.arange(count)).any(1)
        return {"chunks": Term(1.0, Mean.of(values, exists))}, state

    term = Objective(lambda rng, student, teacher: {}, dict, apply)
    return Recipe(combine(_labels(), term), teacher_inputs=_TEACHER, byte_pairs=True)


def _log_probs(outputs: Outputs, tokens: Array, segments: Array) -> Array:
    """Of each token but the first, given those before, ``[B, T - 1]``."""
    logits = outputs.dense_logits()
    short, labels = losses.next_token(logits, tokens, segments=segments)
    assert not isinstance(short, LinearHead)
    return -losses.cross_entropy(short, labels)


VOCABULARIES: dict[str, Method] = {
    "alone_bpe": _alone,
    "uld": _universal,
    "chunk_likelihood": _chunks,
}
"""By name."""
