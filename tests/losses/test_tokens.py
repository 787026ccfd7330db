"""The next token, and chunks of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import fused, losses
from kdjax.io.alignment import align_chunks
from kdjax.types import LinearHead, Mean
from tests.losses import oracles

TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 0, 0]])
REAL = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)


def close(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_every_position_is_scored_against_the_next_token():
    """Lesson: EasyDeL scores logits against the current token.

    A model that knows the next token has no loss; one that repeats its input has.
    """
    ahead = 50 * jax.nn.one_hot(jnp.roll(TOKENS, -1, -1), 10)
    logits, labels = losses.next_token(ahead, TOKENS, REAL)
    assert (logits.shape, labels.shape) == ((2, 5, 10), (2, 5))
    close(losses.cross_entropy(logits, labels), 0.0)
    logits, labels = losses.next_token(50 * jax.nn.one_hot(TOKENS, 10), TOKENS, REAL)
    assert losses.cross_entropy(logits, labels).max() > 49


def test_padding_is_neither_scored_nor_predicted():
    """Lesson: EasyDeL masks off by one; padding on the left shows it as well."""
    logits = jnp.zeros((2, 6, 10))
    _, labels = losses.next_token(logits, TOKENS, REAL)
    np.testing.assert_array_equal(labels, [[1, 4, 1, 5, 9], [6, 5, 3, -100, -100]])
    left = REAL[:, ::-1]
    _, labels = losses.next_token(logits, TOKENS, left)
    np.testing.assert_array_equal(labels[1], [-100, -100, 3, 0, 0])
    # So what stands in padding changes no loss.
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 6, 10)), jnp.float32)

    def mean(logits, tokens):
        logits, labels = losses.next_token(logits, tokens, REAL)
        return Mean.of(losses.cross_entropy(logits, labels), labels >= 0)

    spoilt = jnp.where(REAL[..., None], logits, jnp.nan), jnp.where(REAL, TOKENS, 7)
    got, expected = mean(*spoilt), mean(logits, TOKENS)
    assert int(got.count) == 8
    close(got.value(), expected.value())


def test_a_text_does_not_predict_the_next_one():
    segments = jnp.array([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 0, 0]])
    _, labels = losses.next_token(jnp.zeros((2, 6, 10)), TOKENS, segments=segments)
    np.testing.assert_array_equal(labels[0], [1, -100, 1, 5, -100])
    _, labels = losses.next_token(
        jnp.zeros((2, 6, 10)), TOKENS, REAL, segments=segments
    )
    np.testing.assert_array_equal(labels[1], [6, 5, 3, -100, -100])


def test_heads_are_cut_as_logits_are():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 6, 4)), rng.normal(size=(4, 10))
    head = LinearHead(jnp.float32(hidden), jnp.float32(kernel), soft_cap=5.0)
    cut, labels = losses.next_token(head, TOKENS, REAL)
    logits, same = losses.next_token(head.logits(), TOKENS, REAL)
    np.testing.assert_array_equal(labels, same)
    mean = fused.token_mean(losses.cross_entropy, cut, None, labels, where=labels >= 0)
    dense = Mean.of(losses.cross_entropy(logits, labels), labels >= 0)
    close(mean.value(), dense.value())


def test_refuses_sequences():
    logits = jnp.zeros((2, 6, 10))
    with pytest.raises(
        ValueError, match=r"tokens: got shape \(2, 5\), expected \(2, 6"
    ):
        losses.next_token(logits, TOKENS[:, 1:])
    with pytest.raises(TypeError, match="tokens: got dtype float32"):
        losses.next_token(logits, TOKENS * 1.0)
    with pytest.raises(TypeError, match="where: got dtype int32"):
        losses.next_token(logits, TOKENS, REAL.astype(int))
    with pytest.raises(ValueError, match=r"segments: got shape \(6,\)"):
        losses.next_token(logits, TOKENS, segments=TOKENS[0])
    with pytest.raises(ValueError, match="logits: got no axis of positions"):
        losses.next_token(jnp.zeros(3), jnp.array(1))


# Two texts of two tokenizers, cut short and with special tokens.
STUDENT_IDS, TEACHER_IDS = (
    jnp.array(ids)
    for ids in (
        [[-1, 0, 0, 1, 2, 2], [0, 1, 1, -1, -1, -1]],
        [[0, 1, 1, 1, 2], [0, 0, 0, 1, 2]],
    )
)
CHUNKS = 4


@functools.cache
def log_probs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sides = (-rng.exponential(1.5, ids.shape) for ids in (STUDENT_IDS, TEACHER_IDS))
    return [jnp.asarray(side, dtype) for side in sides]


def likelihood(student, teacher, **options):
    return losses.chunk_likelihood(
        student, teacher, STUDENT_IDS, TEACHER_IDS, chunks=CHUNKS, **options
    )


def chunk_gradient(student, teacher, **options):
    run = jax.grad(lambda *given: likelihood(*given, **options).sum(), (0, 1))
    return run(student, teacher)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_chunk_likelihood_equals_the_formula(temperature):
    student, teacher = log_probs()
    got = likelihood(student, teacher, temperature=temperature)
    assert got.shape == (2, CHUNKS)
    for row in range(2):
        given = [
            np.asarray(side[row], np.float64)
            for side in (student, teacher, STUDENT_IDS, TEACHER_IDS)
        ]
        expected = oracles.chunk_likelihood(
            *given, chunks=CHUNKS, temperature=temperature
        )
        np.testing.assert_allclose(got[row], expected, rtol=2e-5, atol=1e-7)
    # The last chunk of the second text is the teacher's alone; nobody has a fourth.
    np.testing.assert_array_equal(got == 0, [[0, 0, 0, 1], [0, 0, 1, 1]])


def test_chunk_likelihood_has_the_derivatives_of_its_value():
    with jax.enable_x64(True):
        given = log_probs(jnp.float64)
        slopes = chunk_gradient(*given, temperature=3.0)
        step = [jnp.cos(jnp.arange(side.size)).reshape(side.shape) for side in given]

        def at(size):
            moved = [
                side + size * along for side, along in zip(given, step, strict=True)
            ]
            return likelihood(*moved, temperature=3.0).sum()

        expected = (at(1e-7) - at(-1e-7)) / 2e-7
        got = sum(jnp.vdot(a, b) for a, b in zip(slopes, step, strict=True))
        close(got, expected, 1e-7)
        np.testing.assert_array_equal(slopes[0][STUDENT_IDS < 0], 0)


def test_chunk_likelihood_at_high_temperatures():
    """It tends to a log(a/b) - a + b of the chunks' surprisals."""
    student, teacher = log_probs()
    got = likelihood(student, teacher, temperature=1e4)
    a = -np.array([teacher[0, :1].sum(), teacher[0, 1:4].sum(), teacher[0, 4:].sum()])
    b = -np.array([student[0, 1:3].sum(), student[0, 3], student[0, 4:].sum()])
    np.testing.assert_allclose(got[0, :3], a * np.log(a / b) - a + b, rtol=2e-3)


def test_equal_chunks_are_zero_however_they_are_cut():
    student = jnp.array([[0, -1.0, -2.0, -0.5, -1.0, -1.0], [-0.5, -2, -2, 0, 0, 0]])
    teacher = jnp.array([[-3.0, -0.2, -0.2, -0.1, -2], [-0.1, -0.2, -0.2, -4, 0]])
    close(likelihood(student, teacher), 0.0, 1e-12)
    for slopes in chunk_gradient(student, teacher):
        close(slopes, 0.0, 1e-5)


def test_certain_and_impossible_chunks():
    student, teacher = log_probs()
    # Both sure: as float32 rounds a log-probability of -1e-9.
    sure = likelihood(student.at[0, 3].set(0.0), teacher.at[0, 1:4].set(0.0))
    assert sure[0, 1] == 0
    # Only the student is: far off, and finite.
    value = likelihood(student.at[0, 3].set(0.0), teacher)
    assert 1 < value[0, 1] < 1e3
    slopes = chunk_gradient(student.at[0, 3].set(0.0), teacher)
    assert all(np.isfinite(each).all() for each in slopes)
    # The student excludes what the teacher says; what is in no chunk is not looked at.
    gone = student.at[0, 3].set(-jnp.inf).at[0, 0].set(jnp.nan)
    value = likelihood(gone, teacher)
    assert np.isposinf(value[0, 1])
    assert np.isfinite(np.delete(value[0], 1)).all()
    assert np.isfinite(chunk_gradient(gone, teacher)[0]).all()
    assert np.isnan(likelihood(student.at[0, 3].set(jnp.nan), teacher)[0, 1])


def test_chunks_of_two_tokenizations():
    """Characters and words of one text have equal likelihoods by chain rule."""
    text = "a cat sat"
    characters, words = list(range(1, len(text) + 1)), [1, 5, 9]
    ids = [jnp.asarray(each) for each in align_chunks(characters, words)]
    rng = np.random.default_rng(0)
    by_character = jnp.asarray(-rng.exponential(1.0, 9), jnp.float32)
    by_word = jnp.zeros(3).at[ids[0]].add(by_character)
    got = losses.chunk_likelihood(by_character, by_word, *ids, chunks=3)
    close(got, 0.0, 1e-9)


def test_refuses_chunks():
    student, teacher = log_probs()

    def refused(error, match, *given, **options):
        with pytest.raises(error, match=match):
            losses.chunk_likelihood(*given, **{"chunks": CHUNKS, **options})

    ids = STUDENT_IDS, TEACHER_IDS
    match = r"student_log_probs \(2, 6\) and teacher_log_probs \(1, 5\)"
    refused(ValueError, match, student, teacher[:1], *ids)
    match = r"teacher_chunks: got shape \(2, 6\), expected \(2, 5\)"
    refused(ValueError, match, student, teacher, ids[0], ids[0])
    refused(TypeError, "student_chunks: got dtype", student, teacher, student, ids[1])
    refused(ValueError, "chunk 2, expected less", student, teacher, *ids, chunks=2)
    match = r"temperature: got 0\.0"
    refused(ValueError, match, student, teacher, *ids, temperature=0.0)
