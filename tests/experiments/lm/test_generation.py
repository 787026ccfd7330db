"""What a decoder writes: with caches as without, padded as not, filtered, stopped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.lm.generation import generate, keep_top_k, keep_top_p, padded_behind
from experiments.lm.model import with_params
from tests.experiments.lm.test_model import CONFIG, QWEN, params_of
from tests.losses.running import COMPILED, mesh_of

SHALLOW = dataclasses.replace(CONFIG, layers=1)
LAYERS = [dataclasses.replace(config, layers=2) for config in (CONFIG, QWEN)]
VOCABULARY = CONFIG.vocabulary
PROMPTS = np.array([[3, 1, 4, 1], [5, 9, 0, 0], [2, 6, 5, 0]])
LENGTHS = np.array([4, 2, 3])
NEW = 6


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("new_tokens", "top_k", "stop_tokens")
)
def fast(config, params, prompts, lengths, rng, **options):
    return generate(config, params, prompts, lengths, rng=rng, **options)


def written(prompts=PROMPTS, lengths=LENGTHS, config=SHALLOW, seed=0, **options):
    options = {"new_tokens": NEW, "temperature": 0.0} | options
    params, key = params_of(config), jax.random.key(seed)
    return jax.tree.map(
        np.asarray, fast(config, params, prompts, lengths, key, **options)
    )


def continuations(made):
    """The sampled tokens of each text, and their log-probabilities."""
    return [
        (tokens[mask].tolist(), log_probs[mask])
        for tokens, mask, log_probs in zip(*made, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def log_softmax_of(config, tokens):
    """A fresh pass over whole texts, without caches."""
    return jax.nn.log_softmax(with_params(config, params_of(config))(tokens).logits())


def without_cache(config, choose):
    """Each text alone, one token after the other, each by a pass over the whole."""
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        text = np.zeros(PROMPTS.shape[1] + NEW, int)
        text[:length] = prompt[:length]
        log_probs = []
        for step in range(NEW):
            last = length - 1 + step
            # What is behind `last` reaches nothing before it.
            scores = log_softmax_of(config, text[None])[0, last]
            text[last + 1] = choose(scores, step, row)
            log_probs.append(scores[text[last + 1]])
        yield text[length : length + NEW].tolist(), log_probs


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LAYERS[0], id="llama"),
        pytest.param(LAYERS[1], id="qwen", marks=pytest.mark.slow),
    ],
)
def test_greedy_with_a_cache_is_greedy_without(config):
    expected = without_cache(config, lambda scores, step, row: int(scores.argmax()))
    got = continuations(written(config=config))
    for (tokens, log_probs), (others, scores) in zip(got, expected, strict=True):
        assert tokens == others
        np.testing.assert_allclose(log_probs, scores, rtol=1e-4, atol=1e-5)
    assert len({tuple(tokens) for tokens, _ in got}) == 3


def test_samples_with_a_cache_are_samples_without():
    """The same keys draw the same tokens, and log-probabilities have no temperature."""

    def drawn(scores, step, row):
        key = jax.random.fold_in(jax.random.key(7), step)
        noise = jax.random.gumbel(key, (len(PROMPTS), VOCABULARY))
        return int((scores / 0.7 + noise[row]).argmax())

    got = continuations(written(seed=7, temperature=0.7))
    for (tokens, log_probs), (others, scores) in zip(
        got, without_cache(SHALLOW, drawn), strict=True
    ):
        assert tokens == others
        np.testing.assert_allclose(log_probs, scores, rtol=1e-4, atol=1e-5)
    greedy = continuations(written())
    assert [tokens for tokens, _ in got] != [tokens for tokens, _ in greedy]


def test_frequencies_are_those_of_the_model():
    """Both tokens of 4000 continuations of one prompt, at temperature 2."""
    draws, prompt = 4000, np.array([3, 1])
    made = written(
        np.tile(prompt, (draws, 1)), np.full(draws, 2), new_tokens=2, temperature=2.0
    )
    texts = np.concatenate(
        [np.tile(prompt, (VOCABULARY, 1)), np.arange(VOCABULARY)[:, None]], 1
    )
    softened = jax.nn.softmax(log_softmax_of(SHALLOW, texts) / 2.0)
    joint = np.asarray(softened[0, 1][:, None] * softened[:, 2])
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, tuple(made.tokens[:, 2:].T), 1)
    # Pearson's statistic over the pairs that are to come 5 times or more; its mean is
    # their number and its variance twice that.
    often = joint * draws >= 5
    statistic = ((counts - joint * draws) ** 2 / (joint * draws))[often].sum()
    assert often.sum() > 50
    assert abs(statistic - often.sum()) < 4 * np.sqrt(2 * often.sum())
    assert abs(counts[often].sum() / draws - joint[often].sum()) < 0.03


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_changes_nothing(temperature):
    behind = np.pad(PROMPTS, ((0, 0), (0, 2)), constant_values=8)
    behind[1, 2:] = 10
    in_front = np.array([[8, 8, 3, 1, 4, 1], [8, 8, 8, 8, 5, 9], [8, 8, 8, 2, 6, 5]])
    moved, lengths = padded_behind(in_front, in_front != 8)
    expected = continuations(written(temperature=temperature))
    for prompts, counts in [(behind, LENGTHS), (moved, lengths)]:
        got = continuations(written(prompts, counts, temperature=temperature))
        for (tokens, log_probs), (others, scores) in zip(got, expected, strict=True):
            assert tokens == others
            np.testing.assert_allclose(log_probs, scores, rtol=1e-4, atol=1e-5)


def test_padding_is_moved_behind():
    where = np.array([[False, True, True], [True, False, True], [True, True, True]])
    tokens, lengths = padded_behind(np.arange(9).reshape(3, 3), where)
    assert lengths.tolist() == [2, 2, 3]
    assert tokens[0, :2].tolist() == [1, 2]
    assert tokens[1, :2].tolist() == [3, 5]
    assert tokens[2].tolist() == [6, 7, 8]


def test_continuations_stand_right_behind_their_prompts():
    tokens, mask, log_probs = written()
    assert tokens.shape == mask.shape == log_probs.shape == (3, 4 + NEW)
    for row, length in enumerate(LENGTHS):
        assert tokens[row, :length].tolist() == PROMPTS[row, :length].tolist()
        assert mask[row].nonzero()[0].tolist() == list(range(length, length + NEW))
    assert not log_probs[~mask].any()
    assert (log_probs[mask] < 0).all()


def test_texts_end_with_a_stop_token():
    free = [tokens for tokens, _ in continuations(written())]
    stops = free[0][2], free[1][4]
    tokens, mask, log_probs = stopped = written(stop_tokens=stops)
    ended = continuations(stopped)
    for whole, (part, _) in zip(free, ended, strict=True):
        first = next((i for i, token in enumerate(whole) if token in stops), NEW)
        assert part == whole[: first + 1]
    assert len(ended[0][0]) <= 3
    behind = np.arange(4 + NEW) >= (LENGTHS + mask.sum(1))[:, None]
    assert not tokens[behind].any()
    assert not log_probs[behind].any()


def test_the_loop_ends_when_all_texts_have():
    """With every token a stop token, a million more would take hours."""
    made = written(stop_tokens=tuple(range(VOCABULARY)), new_tokens=20_000)
    assert made.mask.sum(1).tolist() == [1, 1, 1]


def test_the_one_likeliest_token_is_the_greedy_one():
    greedy = written()
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        got = written(temperature=1.5, **options)
        np.testing.assert_array_equal(got.tokens, greedy.tokens)
        np.testing.assert_allclose(got.log_probs, greedy.log_probs, rtol=1e-5)


def test_only_the_likeliest_tokens_are_drawn():
    draws = 500
    prompts, lengths = np.tile([3, 1], (draws, 1)), np.full(draws, 2)
    made = written(prompts, lengths, new_tokens=1, temperature=5.0, top_k=3)
    scores = log_softmax_of(SHALLOW, prompts[:1])[0, 1]
    assert set(made.tokens[:, 2]) == set(np.argsort(-scores)[:3].tolist())


def test_top_k_keeps_so_many_and_the_first_of_equal_ones():
    logits = jnp.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    low = -jnp.inf
    kept = [[low, 3.0, low, 3.0], [0.0, 0.0, low, low]]
    np.testing.assert_array_equal(keep_top_k(logits, 2), kept)
    np.testing.assert_array_equal(keep_top_k(logits, 4), logits)
    np.testing.assert_array_equal(keep_top_k(logits, 1).argmax(-1), logits.argmax(-1))


def test_top_p_keeps_the_smallest_set():
    probabilities = np.array([0.1, 0.4, 0.2, 0.3], np.float32)
    logits = jnp.log(probabilities)
    # Sums of the likeliest: 0.4, 0.7, 0.9, 1.
    for top_p, least in [
        (0.01, 0.4),
        (0.39, 0.4),
        (0.41, 0.3),
        (0.69, 0.3),
        (0.71, 0.2),
        (0.91, 0.1),
        (1.0, 0.1),
    ]:
        expected = np.where(probabilities >= np.float32(least), logits, -np.inf)
        np.testing.assert_array_equal(keep_top_p(logits, top_p), expected)


def test_top_p_of_equal_probabilities_keeps_a_part():
    left = keep_top_p(jnp.zeros((2, 8)), jnp.array(0.5))
    assert np.isfinite(left).sum(-1).tolist() == [4, 4]


def test_top_p_passes_over_what_top_k_left_out():
    logits = keep_top_k(jnp.array([2.0, 1.0, 0.0, -1.0]), 2)
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)


@pytest.mark.parametrize("top_p", [1, 1.0, np.float32(1), jnp.array(1.0)])
def test_top_p_of_one_keeps_what_rounding_leaves_nothing_for(top_p):
    # The first has all of the probability, in float32.
    logits = jnp.array([40.0, 1.0, 0.0])
    np.testing.assert_array_equal(keep_top_p(logits, top_p), logits)


def test_one_compilation_for_many_settings():
    def run(seed, temperature, top_p, lengths):
        options = {"new_tokens": 2, "temperature": temperature, "top_p": top_p}
        key = jax.random.key(seed)
        params = params_of(SHALLOW)
        return generate(SHALLOW, params, PROMPTS, lengths, rng=key, **options)

    run(0, 1.0, 0.9, LENGTHS)
    before = len(COMPILED)
    run(1, 0.5, 0.8, LENGTHS)
    run(2, 0.0, 0.3, LENGTHS[::-1])
    assert len(COMPILED) == before


def test_samples_inside_of_a_compiled_step():
    @jax.jit
    def step(params, key):
        made = generate(
            SHALLOW, params, PROMPTS, LENGTHS, rng=key, new_tokens=NEW, temperature=1.0
        )
        return made.tokens

    expected = written(temperature=1.0, seed=5).tokens
    tokens = step(params_of(SHALLOW), jax.random.key(5))
    np.testing.assert_array_equal(tokens, expected)


def test_a_mesh_changes_nothing_and_gathers_no_cache():
    mesh = mesh_of(data=3)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    params, prompts, lengths = params_of(SHALLOW), *map(jnp.asarray, (PROMPTS, LENGTHS))

    @functools.partial(jax.jit, in_shardings=(whole, rows, rows))
    def sharded(params, prompts, lengths):
        key = jax.random.key(0)
        options = {"rng": key, "new_tokens": NEW, "temperature": 1.0}
        return generate(SHALLOW, params, prompts, lengths, **options)

    run = sharded.lower(params, prompts, lengths).compile()
    tokens, mask, log_probs = run(
        *jax.device_put((params, prompts, lengths), (whole, rows, rows))
    )
    expected = written(temperature=1.0)
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_array_equal(mask, expected.mask)
    np.testing.assert_allclose(log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
    # Only whether all texts have ended is told to all.
    assert "all-gather(" not in run.as_text()
    assert run.as_text().count(" all-reduce(") <= 1


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, r"lengths: got shape \(2,\)", {"lengths": LENGTHS[:2]}),
        (TypeError, "lengths: got float", {"lengths": LENGTHS.astype(np.float32)}),
        (ValueError, r"prompts: got shape \(4,\)", {"prompts": PROMPTS[0]}),
        (ValueError, "new_tokens: got 0", {"new_tokens": 0}),
        (ValueError, r"lengths: got \[0.* expected 1 to 4", {"lengths": 0 * LENGTHS}),
        (ValueError, r"lengths: got \[5, 5\]", {"lengths": jnp.array([5, 1, 5])}),
        (ValueError, "temperature: got -0.5", {"temperature": -0.5}),
        (ValueError, "temperature: got -0.5", {"temperature": np.float32(-0.5)}),
        (ValueError, "temperature: got -1", {"temperature": np.int32(-1)}),
        (ValueError, "top_k: got 12; expected 1 to 11", {"top_k": 12}),
        (ValueError, "top_k: got 0", {"top_k": 0}),
        (ValueError, "top_p: got 0.0", {"top_p": 0.0}),
        (ValueError, "top_p: got 1.5", {"top_p": 1.5}),
        (ValueError, "top_p: got 1.5", {"top_p": np.float32(1.5)}),
        (ValueError, r"stop_tokens: got \[11\]", {"stop_tokens": (3, 11)}),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused(error, match, options):
    given = {"prompts": PROMPTS, "lengths": LENGTHS, "new_tokens": NEW} | options
    with pytest.raises(error, match=match):
        generate(SHALLOW, params_of(SHALLOW), rng=jax.random.key(0), **given)
