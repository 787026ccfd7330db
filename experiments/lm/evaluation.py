"""Language models on held-out text, beside a teacher that ran once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from experiments.lm.tokens import Tokens
from experiments.lm.windows import overlapping
from kdjax import LinearHead, Mean, Model, Teacher, losses
from kdjax.fused import token_means
from kdjax.io.input import padded_batches
from kdjax.train import DistillState, evaluate, make_mesh, place, place_batch
from kdjax.types import Batch, PyTree

Sampler = Callable[[PyTree, Array, Array], Array]
"""``(params, prompts [B, P], key)`` to rows of tokens ``[B, T]``, prompts included."""


class Part(NamedTuple):
    """Held-out text in rows.

    Attributes:
      batches: on the devices, with the teacher's hidden states if there is one.
      tokens: how many are scored.
      characters: which they stand for.
    """

    batches: list[dict[str, Array]]
    tokens: int
    characters: int


class Evaluator:
    """Measures trainings of one network.

    Every token of a part is scored once, so that the sum of their surprisals by the
    number of characters compares students of whatever tokenizers:

        bits per character = Σ -log2 p(token) / characters

    Args:
      model: the network; it shows a :class:`~kdjax.LinearHead`.
      tokens: its tokenizer.
      texts: the validation and the test part.
      context: tokens of a row.
      rows: per batch, over all devices.
      teacher: from ``teachers.frozen``, whom the network is compared with, of the same
        tokens; ``None`` if there is none.
      sampler: how the network goes on with a text.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        texts: tuple[Sequence[str], Sequence[str]],
        *,
        context: int,
        rows: int,
        teacher: tuple[Teacher, PyTree] | None,
        sampler: Sampler,
    ):
        self._tokens = tokens
        self._mesh = make_mesh()
        same = NamedSharding(self._mesh, PartitionSpec())
        self._eval_step = jax.jit(_eval_step(model), out_shardings=same)
        self._sample = jax.jit(sampler, out_shardings=same)
        self._head: LinearHead | None = None
        validation, test = (self._part(part, context, rows) for part in texts)
        prompts = test.batches[0]["tokens"][:, : context // 4]
        self._prompts = np.asarray(place(prompts, self._mesh))
        if teacher is not None:
            self._head = self._ask(*teacher, [*validation.batches, *test.batches])
        self._validation, self._test = validation, test

    def along_the_way(self, state: DistillState) -> dict[str, float]:
        """What a training records of itself."""
        return self._scores(state, self._validation)

    def test(self, state: DistillState) -> dict[str, float]:
        """All scores on the test part, and the diversity of samples."""
        diversity = distinct(self._samples(state), 2)
        return {**self._scores(state, self._test), "distinct_2": diversity}

    def files(self, state: DistillState) -> dict[str, bytes]:
        """Samples, which go on with texts of the test part."""
        prompts = [self._tokens.decode(prompt) for prompt in self._prompts]
        pairs = zip(prompts, self._samples(state), strict=True)
        samples = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        return {"samples.json": json.dumps(samples, indent=1).encode()}

    def _samples(self, state: DistillState) -> list[str]:
        """What the network goes on with, by the same draws for every network."""
        rows = self._sample(state.params["student"], self._prompts, jax.random.key(0))
        continued = np.asarray(rows)[:, self._prompts.shape[1] :]
        return [self._tokens.decode(row) for row in continued]

    def _scores(self, state: DistillState, part: Part) -> dict[str, float]:
        scores = evaluate(self._eval_step, state, self._head, part.batches)
        nats = scores.pop("surprisal")
        bits = nats * part.tokens / math.log(2) / part.characters
        return {"bits": bits, "perplexity": math.exp(nats), **scores}

    def _part(self, texts: Sequence[str], context: int, rows: int) -> Part:
        encoded = [self._tokens.encode(text) for text in texts]
        arrays = overlapping(encoded, self._tokens.start, context)
        batches = []
        for batch in padded_batches(arrays, batch_size=rows):
            scored = batch["scored"] & batch["mask"][:, None]
            batches.append(dict(place_batch({**batch, "scored": scored}, self._mesh)))
        return Part(batches, sum(map(len, encoded)), sum(map(len, texts)))

    def _ask(
        self, teacher: Teacher, frozen: PyTree, batches: Sequence[dict[str, Array]]
    ) -> LinearHead:
        """Puts the teacher's hidden states into the batches; returns its head."""
        frozen = place(frozen, self._mesh)

        @jax.jit
        def head(frozen: PyTree, batch: Batch) -> LinearHead:
            shown = teacher.outputs(frozen, (), batch).logits
            assert isinstance(shown, LinearHead)
            return shown

        for batch in batches:
            shown = head(frozen, batch)
            batch["teacher"] = shown.hidden
        return shown._replace(hidden=None)


def _eval_step(
    model: Model,
) -> Callable[[DistillState, LinearHead | None, Batch], dict[str, Mean]]:
    """Sums over the scored tokens of a batch, without whole logits.

    The teacher's head stands in the place of its arrays, its hidden states in the
    batch.
    """

    def measured(*given: Array) -> tuple[Array, dict[str, Array]]:
        student, *teachers, labels = given
        others = {"entropy": losses.soft_cross_entropy(student, student)}
        for teacher in teachers:
            others |= {
                "forward_kl": losses.forward_kl(student, teacher),
                "reverse_kl": losses.reverse_kl(student, teacher),
                "agreement": student.argmax(-1) == teacher.argmax(-1),
            }
        return losses.cross_entropy(student, labels), others

    def step(
        state: DistillState, head: LinearHead | None, batch: Batch
    ) -> dict[str, Mean]:
        arrays = state.params["student"], state.model_state
        shown, _ = model.apply(*arrays, batch, rng=None, train=False)
        assert isinstance(shown.logits, LinearHead)

        read = jnp.where(batch["scored"], batch["tokens"], losses.UNSCORED)
        student, labels = losses.next_token(shown.logits, read)
        assert isinstance(student, LinearHead)
        teacher = None
        if head is not None:
            whole = head._replace(hidden=batch["teacher"])
            teacher, _ = losses.next_token(whole, read)
        surprisal, others = token_means(
            measured, student, teacher, labels, where=labels >= 0
        )
        return {"surprisal": surprisal, **others}

    return step


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of ``n`` words.

    Reference:
      Li et al., A Diversity-Promoting Objective Function for Neural Conversation
      Models, 2015, section 5.2. arXiv:1510.03055
    """
    words = [text.split() for text in texts]
    runs = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(runs)) / max(1, len(runs))
