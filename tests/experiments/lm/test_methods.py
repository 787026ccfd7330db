"""A step by every method of the job on language models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lm.config import Config
from experiments.lm.generation import generate
from experiments.lm.methods import ALONE, METHODS, Setup, Unfit
from experiments.lm.model import from_layers
from experiments.lm.networks import network
from experiments.lm.rollouts import SCORED, Continuation, as_data
from experiments.lm.rotary import RopeScaling
from experiments.lm.tokens import make
from experiments.lm.windows import packed, paired
from kdjax import make_train_step, teachers
from kdjax.train import init_state
from tests.marks import rest_slow

TEXT = "".join("abcdefg"[i % 7] + " " * (i % 3 == 0) for i in range(900))
TOKENS = make("characters", [TEXT], TEXT, 0)
PAIRS = make("bpe", [TEXT], "", 280)
CONFIG = Config(
    layers=1,
    width=16,
    teacher_layers=2,
    teacher_width=16,
    heads=2,
    context=16,
    prompt=4,
)
CONTINUATION = Continuation(CONFIG.prompt, TOKENS.start)


def setup_of(**changed):
    options = {
        "student": CONFIG.student_decoder(TOKENS.size),
        "teacher": CONFIG.teacher_decoder(TOKENS.size),
        "temperature": 1.0,
        "own_share": 1.0,
        "go_on": CONTINUATION,
        "byte_pairs": 280,
    }
    return Setup(**options | changed)


@functools.cache
def teacher_network():
    return network(setup_of().teacher, seed=1)


def prepared(recipe):
    """The student, the teacher with its arrays, and a batch of 8 rows."""
    setup, teacher = setup_of(), teacher_network()
    decoder = CONFIG.student_decoder(PAIRS.size) if recipe.byte_pairs else setup.student
    student = network(decoder, features=recipe.student_features)
    if recipe.layers:
        _, params = from_layers(setup.teacher, teacher.params, recipe.layers)
        student = student._replace(params=params)
    rows = packed([TOKENS.encode(TEXT)], TOKENS.start, CONFIG.context)
    if recipe.byte_pairs:
        rows = paired([TEXT], PAIRS, TOKENS, CONFIG.context)
    if recipe.rows is not None:
        rows = recipe.rows(teacher.params, rows, 0)
    shown = network(
        setup.teacher, features=recipe.teacher_features, inputs=recipe.teacher_inputs
    )
    batch = {name: values[:8] for name, values in rows.items()}
    return student, teachers.frozen(shown._replace(params=teacher.params)), batch


def one_step(recipe):
    """Metrics of a step, and how far the student's parameters moved."""
    student, (teacher, frozen), batch = prepared(recipe)
    parts = teacher, recipe.objective, optax.sgd(0.1)
    state = init_state(
        student, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0)
    )
    step = make_train_step(student.model, *parts)

    @jax.jit
    def whole(state, frozen, batch):
        if recipe.rollout is not None:
            batch = recipe.rollout(state, frozen, batch)
        return step(state, frozen, batch)

    state, metrics = whole(state, frozen, batch)
    moved = jax.tree.map(
        lambda new, old: float(jnp.abs(new - old).max()),
        state.params["student"],
        student.params,
    )
    return {key: float(mean.value()) for key, mean in metrics.items()}, moved


FAST = {"forward_kl"}


@pytest.mark.parametrize("name", rest_slow(METHODS, lambda name: name in FAST))
def test_a_step_by_every_method(name):
    metrics, moved = one_step(METHODS[name](setup_of()))
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["skipped"] == 0
    assert metrics["grad_norm"] > 0
    assert len(set(metrics) - {"loss", "grad_norm", "skipped"}) >= 1
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_all_classes_kept_are_the_whole_distribution():
    # 8 classes of 9 that there are, and a tail of one.
    whole, _ = one_step(METHODS["forward_kl"](setup_of()))
    for name in ("top_k", "cached"):
        kept, _ = one_step(METHODS[name](setup_of()))
        np.testing.assert_allclose(kept["soft"], whole["soft"], rtol=1e-5)


@pytest.mark.slow
def test_a_student_with_the_teachers_layers_starts_closer():
    setup = setup_of()
    random, _ = one_step(METHODS["forward_kl"](setup))
    started, _ = one_step(METHODS["from_layers"](setup))
    assert started["soft"] < 0.9 * random["soft"]


def test_methods_that_do_not_fit_are_refused():
    student = CONFIG.student_decoder(TOKENS.size)
    wider = dataclasses.replace(student, width=32)
    with pytest.raises(Unfit, match=r"; width is 16, the teacher's 32\. Options"):
        METHODS["from_layers"](setup_of(teacher=wider))
    scaled = RopeScaling(32.0, 1.0, 4.0, 8192)
    other = dataclasses.replace(student, tied=True, rope_scaling=scaled)
    told = (
        r"rope_scaling is None, .* RopeScaling\(.*; tied is False, the teacher's True"
    )
    with pytest.raises(Unfit, match=told):
        METHODS["from_layers"](setup_of(teacher=other))
    deeper = Config(layers=3, width=16, heads=2).student_decoder(TOKENS.size)
    with pytest.raises(Unfit, match="hidden needs a teacher with as many layers"):
        METHODS["hidden"](setup_of(student=deeper))
    more = Config(width=16, heads=4).student_decoder(TOKENS.size)
    with pytest.raises(Unfit, match="as many heads"):
        METHODS["attention"](setup_of(student=more))


def test_texts_go_on_from_the_data_and_end_in_padding():
    setup = setup_of()
    rows = packed([TOKENS.encode(TEXT)], TOKENS.start, CONFIG.context)
    tokens, segments = rows["tokens"], rows["segments"]
    params, key = teacher_network().params, jax.random.key(0)
    go_on = jax.jit(functools.partial(CONTINUATION, setup.teacher))
    made = go_on(params, tokens, segments, key)
    prompt = CONFIG.prompt
    np.testing.assert_array_equal(made["tokens"][:, :prompt], tokens[:, :prompt])
    assert not made[SCORED][:, :prompt].any()
    ended = (made["tokens"][:, prompt:] == TOKENS.start) & made[SCORED][:, prompt:]
    assert ended.any()  # nearly untrained, it stops as often as it writes a letter
    assert (ended.sum(1) <= 1).all()
    inside = np.asarray(made["segments"]) == 1
    np.testing.assert_array_equal(inside[:, prompt:], made[SCORED][:, prompt:])
    assert (np.diff(inside.astype(int), axis=1) <= 0).all()


def test_texts_go_on_from_one_text_alone():
    teacher, params = setup_of().teacher, teacher_network().params
    likeliest = CONTINUATION._replace(temperature=0.0, stop=TOKENS.size - 1)
    go_on = jax.jit(functools.partial(likeliest, teacher))
    text = TOKENS.encode("abcdefg")
    tokens = np.tile(np.arange(CONFIG.context, dtype=np.int32) % 7, (3, 1))
    segments = np.ones_like(tokens)
    # The second and the third row's prompts have the end of a text before this one.
    for row, before in ((0, 0), (1, 2), (2, CONFIG.prompt - 1)):
        tokens[row, before] = TOKENS.start
        tokens[row, before + 1 : CONFIG.prompt] = text[: CONFIG.prompt - before - 1]
        segments[row, before:] = 2
    made = go_on(params, tokens, segments, jax.random.key(0))
    for row, length in enumerate((CONFIG.prompt, CONFIG.prompt - 2, 1)):
        prompt = np.append(TOKENS.start, text)[:length]
        alone = generate(
            teacher, params, prompt[None], np.array([length]), rng=jax.random.key(0),
            new_tokens=CONFIG.context - CONFIG.prompt, temperature=0.0,
            stop_tokens=(TOKENS.size - 1,),
        )  # fmt: skip
        inside = np.asarray(made["segments"][row]) == 1
        written = np.append(np.ones(length, bool), np.asarray(alone.mask[0, length:]))
        np.testing.assert_array_equal(
            made["tokens"][row][inside], alone.tokens[0][written]
        )
        assert not made[SCORED][row, :length].any()


def test_teachers_and_students_rows_take_turns_in_odd_batches_too():
    recipe = METHODS["distillm2"](setup_of())
    student, (teacher, frozen), batch = prepared(recipe)
    odd = {name: values[:7] for name, values in batch.items()}
    state = init_state(
        student, teacher, recipe.objective, optax.sgd(0.1),
        frozen=frozen, batch=odd, rng=jax.random.key(0),
    )  # fmt: skip
    mixed = jax.jit(recipe.rollout)(state, frozen, odd)
    assert mixed["tokens"].shape == odd["tokens"].shape
    np.testing.assert_array_equal(mixed["tokens"][::2], odd["teachers_tokens"][::2])
    assert mixed["of_teacher"].any(1).tolist() == [True, False] * 3 + [True]
    assert mixed["of_student"].any(1).tolist() == [False, True] * 3 + [False]


def test_data_has_the_same_entries_as_texts():
    batch = {"tokens": jnp.ones((2, 5), int), "segments": jnp.ones((2, 5), int)}
    own = jax.eval_shape(
        functools.partial(CONTINUATION, setup_of().teacher),
        teacher_network().params,
        batch["tokens"],
        batch["segments"],
        jax.random.key(0),
    )
    data = jax.eval_shape(as_data, batch)
    assert {name: each.shape for name, each in own.items()} == {
        name: each.shape for name, each in data.items()
    }


@pytest.mark.slow
def test_own_texts_come_with_their_share():
    counts = []
    for share in (0.5, 1.0):
        setup = setup_of(own_share=share)
        recipe = METHODS["gkd"](setup)
        student, (teacher, frozen), batch = prepared(recipe)
        parts = teacher, recipe.objective, optax.sgd(0.1)
        state = init_state(
            student, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0)
        )
        rollout = jax.jit(recipe.rollout)
        own = 0
        for step in range(40):
            at = dataclasses.replace(state, step=jnp.array(step))
            own += not rollout(at, frozen, batch)[SCORED].all()
        counts.append(own)
    assert 10 <= counts[0] <= 30  # 20 are expected, with a deviation of 3.2
    assert counts[1] == 40


def test_the_baseline_reads_labels_alone():
    recipe = METHODS[ALONE](setup_of())
    assert recipe.rollout is None
    assert recipe.rows is None
