"""What is loaded and checked before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
from etils.epath import Path
from rich.console import Console

from experiments.jobs.interruption import Sigterm
from experiments.jobs.networks import fingerprint
from experiments.jobs.settings import claim, refuse
from experiments.jobs.trainings import Job
from experiments.lm import weights
from experiments.lm.config import Config
from experiments.lm.methods import METHODS, Setup, Unfit, chosen, run_of
from experiments.lm.model import DecoderConfig
from experiments.lm.networks import network
from experiments.lm.rollouts import Continuation
from experiments.lm.sources import CORPORA, files
from experiments.lm.texts import Texts, passage, split
from experiments.lm.tokens import Tokens, make
from experiments.lm.windows import packed, paired
from kdjax import Adapted
from kdjax.io.input import HostBatch

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was checked.

    Attributes:
      config: the command line.
      job: what trainings share.
      texts: the data.
      tokens: the tokenizer of the teacher, and of most students.
      methods: to be compared, the baseline first.
      setup: what they are made for.
      teacher: one that was loaded, ``None`` if it is trained here.
    """

    config: Config
    job: Job
    texts: Texts
    tokens: Tokens
    methods: Sequence[str]
    setup: Setup
    teacher: Adapted | None = None

    @functools.cached_property
    def byte_pairs(self) -> Tokens:
        """The tokenizer of students that read other tokens than the teacher."""
        return make("bpe", self.texts.train, "", self.config.vocabulary)

    def passage(self, seed: int) -> list[str]:
        """The text that the student of a seed learns from."""
        return passage(self.texts.train, self.config.characters, seed)

    def rows(self, texts: Sequence[str], *, byte_pairs: bool = False) -> HostBatch:
        """Texts as rows to learn from; byte pairs have the teacher's tokens beside."""
        if byte_pairs:
            return paired(texts, self.byte_pairs, self.tokens, self.config.context)
        encoded = [self.tokens.encode(text) for text in texts]
        return packed(encoded, self.tokens.start, self.config.context)


def prepare(config: Config, console: Console, sigterm: Sigterm) -> Prepared:
    """Loads the data and refuses what cannot work, before anything is trained."""
    load = CORPORA[config.corpus]
    documents = load(config.data_dir) if config.text is None else files(config.text)
    texts = split(documents)
    devices = jax.device_count()
    if config.batch_size % (2 * devices):
        raise ValueError(
            f"--batch-size: got {config.batch_size}; expected a multiple of "
            f"{2 * devices}, 2 for each of the {devices} device(s)."
        )
    if config.teacher is None:
        tokens = _tokenizer(config, texts)
        decoder, teacher = config.teacher_decoder(tokens.size), None
    else:
        tokens = _loaded_tokenizer(config.teacher)
        decoder, teacher = _loaded(config.teacher)
    _check_vocabulary(config, tokens, decoder)
    origin = "trained here" if teacher is None else fingerprint(teacher)
    settings = config.settings(origin, texts.fingerprint)
    job = Job(
        settings,
        config.batch_size,
        console,
        sigterm,
        tensorboard=config.tensorboard,
        trace_steps=config.trace_steps,
    )
    setup = _setup(config, tokens, decoder)
    prepared = Prepared(config, job, texts, tokens, (), setup, teacher)
    prepared = dataclasses.replace(prepared, methods=_fitting(prepared))
    _check_length(prepared)
    claim(config.out, settings)
    return prepared


def _tokenizer(config: Config, texts: Texts) -> Tokens:
    parts = texts.train, texts.validation, texts.test
    alphabet = "".join(text for part in parts for text in part)
    return make(config.tokenizer, texts.train, alphabet, config.vocabulary)


def _loaded_tokenizer(folder: Path) -> Tokens:
    try:
        return Tokens.read(folder / TOKENIZER)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--teacher: {error}; expected {TOKENIZER} beside the weights."
        ) from error


def _loaded(folder: Path) -> tuple[DecoderConfig, Adapted]:
    """The shape and the network of a teacher in a folder of safetensors."""
    try:
        decoder, params = weights.load(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"--teacher: {error}") from error
    return decoder, network(decoder)._replace(params=params)


def _check_vocabulary(config: Config, tokens: Tokens, teacher: DecoderConfig) -> None:
    # It may have more: some are rounded up.
    if teacher.vocabulary < tokens.size:
        raise ValueError(
            f"--teacher: got a vocabulary of {teacher.vocabulary} for the "
            f"{tokens.size} tokens of its {TOKENIZER}; expected at least as many."
        )
    if config.top_k > teacher.vocabulary:
        expected = f"expected 1 to {teacher.vocabulary}, the vocabulary, or 0 for all"
        refuse(config, "top_k", expected)


def _setup(config: Config, tokens: Tokens, teacher: DecoderConfig) -> Setup:
    return Setup(
        student=config.student_decoder(teacher.vocabulary),
        teacher=teacher,
        temperature=config.temperature,
        own_share=config.own_share,
        go_on=Continuation(
            config.prompt,
            tokens.start,
            config.sampling_temperature,
            config.top_k or None,
            config.top_p if config.top_p < 1 else None,
        ),
        byte_pairs=None if tokens.has_pairs else config.vocabulary,
    )


def _check_length(prepared: Prepared) -> None:
    """The passage of every seed fills at least a row for each device."""
    config, devices = prepared.config, jax.device_count()
    # All of the text is the same for every seed.
    seeds = range(config.seeds if config.characters else 1)
    recipes = [
        METHODS[run_of(name).method](prepared.setup) for name in prepared.methods
    ]
    kinds = {recipe.byte_pairs for recipe in recipes}
    for byte_pairs, seed in itertools.product(kinds, seeds):
        given = prepared.rows(prepared.passage(seed), byte_pairs=byte_pairs)
        rows = len(given["tokens"])
        if rows < devices:
            tokens = "byte pairs" if byte_pairs else f"{config.context} tokens"
            raise ValueError(
                f"--characters: got {config.characters}, which are {rows} row(s) of "
                f"{tokens} for seed {seed}; expected one for each of the {devices} "
                "devices at least."
            )


def _fitting(prepared: Prepared) -> list[str]:
    """The methods asked for; those of ``all`` that don't fit are left out."""
    config, fitting = prepared.config, []
    by_name = {name.strip() for text in config.methods for name in text.split(",")}
    for name in chosen(config.methods):
        try:
            METHODS[run_of(name).method](prepared.setup)
        except Unfit as error:
            if name in by_name:
                raise ValueError(f"--methods: {error}") from error
            prepared.job.console.print(f"Left out: {error}")
            continue
        fitting.append(name)
    return fitting
