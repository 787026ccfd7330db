"""How teacher and students are trained and measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.jobs.trainings import Length, Trainer
from experiments.lm.config import Config
from experiments.lm.evaluation import Evaluator
from experiments.lm.generation import generate
from experiments.lm.methods import ALONE, METHODS, run_of
from experiments.lm.model import DecoderConfig, from_layers
from experiments.lm.networks import network
from experiments.lm.preparation import Prepared
from experiments.lm.tokens import Tokens
from kdjax import Adapted, teachers
from kdjax.io.input import HostBatch
from kdjax.types import PyTree


class Student(NamedTuple):
    """How students of a method are trained.

    Attributes:
      trainer: trains them.
      initial: the network that the student of a seed starts from.
      rows: what it learns from.
    """

    trainer: Trainer
    initial: Callable[[int], Adapted]
    rows: Callable[[int], HostBatch]

    def stopwatch(self) -> Callable[[], float]:
        """Seconds of a step; see ``Trainer.stopwatch``."""
        return self.trainer.stopwatch(self.initial(0), self.rows(0), _STEPS_TIMED)


_STEPS_TIMED = 2


def trainer_of_teacher(prepared: Prepared) -> Trainer:
    """Trains the teacher on all of the training text, by cross-entropy."""
    config, setup = prepared.config, prepared.setup
    return Trainer(
        prepared.job,
        network(setup.teacher),
        None,
        METHODS[ALONE](setup).objective,
        config.optimizer_for(config.teacher_learning_rate, config.teacher_steps),
        examples=prepared.rows(prepared.passage(0)),
        length=_length(config, config.teacher_steps),
        evaluator=evaluator(prepared, setup.teacher, prepared.tokens, None),
        tokens=config.context,
    )


class Students:
    """Makes what trains the students of each method.

    Args:
      prepared: what was checked.
      teacher: whom they learn from.
    """

    def __init__(self, prepared: Prepared, teacher: Adapted):
        self._prepared = prepared
        self._teacher = teacher
        self._evaluator = functools.cache(self._new_evaluator)

    def of(self, name: str) -> Student:
        """Those of a method, such as ``"gkd"`` or ``"alone:4"``."""
        prepared, teacher = self._prepared, self._teacher
        config, setup = prepared.config, prepared.setup
        method, factor = run_of(name)
        recipe = METHODS[method](setup)
        decoder = self._decoder(recipe.byte_pairs)
        steps = factor * config.steps

        def net(seed: int) -> Adapted:
            new = network(decoder, seed=seed, features=recipe.student_features)
            if not recipe.layers:
                return new
            _, params = from_layers(setup.teacher, teacher.params, recipe.layers)
            return new._replace(params=params)

        @functools.lru_cache(maxsize=1)
        def rows(seed: int) -> HostBatch:
            given = prepared.rows(prepared.passage(seed), byte_pairs=recipe.byte_pairs)
            if recipe.rows is None:
                return given
            return recipe.rows(teacher.params, given, seed)

        shown = network(
            setup.teacher,
            features=recipe.teacher_features,
            inputs=recipe.teacher_inputs,
        )
        trainer = Trainer(
            prepared.job,
            net(0),
            teachers.frozen(shown._replace(params=teacher.params)),
            recipe.objective,
            config.optimizer_for(config.learning_rate, steps),
            examples=rows(0),
            length=_length(config, steps),
            evaluator=self._evaluator(recipe.byte_pairs),
            rollout=recipe.rollout,
            tokens=config.context,
        )
        return Student(trainer, net, rows)

    def _decoder(self, byte_pairs: bool) -> DecoderConfig:
        config, setup = self._prepared.config, self._prepared.setup
        if byte_pairs:
            return config.student_decoder(self._prepared.byte_pairs.size)
        return setup.student

    def _new_evaluator(self, byte_pairs: bool) -> Evaluator:
        prepared, decoder = self._prepared, self._decoder(byte_pairs)
        if byte_pairs:
            return evaluator(prepared, decoder, prepared.byte_pairs, None)
        return evaluator(prepared, decoder, prepared.tokens, self._teacher)


def evaluator(
    prepared: Prepared,
    decoder: DecoderConfig,
    tokens: Tokens,
    teacher: Adapted | None,
) -> Evaluator:
    """Measures networks of a shape, beside a teacher of the same tokens."""
    config, texts = prepared.config, prepared.texts
    length = config.context

    def sample(params: PyTree, prompts: jax.Array, rng: jax.Array) -> jax.Array:
        count, width = prompts.shape
        lengths = jnp.full(count, width)
        made = generate(
            decoder, params, prompts, lengths, rng=rng, new_tokens=length - width
        )
        return made.tokens

    return Evaluator(
        network(decoder).model,
        tokens,
        (texts.validation, texts.test),
        context=length,
        rows=2 * config.batch_size,
        teacher=None if teacher is None else teachers.frozen(teacher),
        sampler=sample,
    )


def _length(config: Config, steps: int) -> Length:
    return Length(
        steps, -(-steps // config.evaluations), -(-steps // config.checkpoints)
    )
