"""The decoder: what reaches what, its features by path, and students of its layers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.lm.model import (
    Cache,
    Decoder,
    DecoderConfig,
    from_layers,
    with_params,
)
from experiments.lm.rotary import RopeScaling, frequencies
from kdjax import LinearHead, models, objectives
from kdjax.types import Outputs

CONFIG = DecoderConfig(
    vocabulary=11,
    layers=3,
    width=16,
    heads=4,
    key_value_heads=2,
    head_width=4,
    mlp_width=24,
)
QWEN = dataclasses.replace(CONFIG, tied=True, query_key_norm=True, attention_bias=True)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (2, 8))


@functools.cache
def params_of(config):
    """Random ones, also of norms and biases."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    draw = functools.partial(np.random.default_rng(1).normal, 0, 0.5)
    # Kept for later, they must be arrays also where they are asked for in a trace.
    with jax.ensure_compile_time_eval():
        return jax.tree.map(
            lambda leaf: jnp.asarray(draw(leaf.shape), leaf.dtype), shapes
        )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, tokens, segments=None, positions=None):
    decoder = with_params(config, params_of(config))
    return decoder(tokens, segments, positions).logits()


def assert_close(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def by_hand(config, params, tokens):
    """The logits of one text in NumPy, float64, token by token and head by head."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale["scale"]

    def turned(vector, position):
        # Complex numbers: the first half of a vector is real, the second imaginary.
        half = config.head_width // 2
        speed = config.rope_theta ** -(np.arange(half) / half)
        pair = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * speed)
        return np.concatenate([pair.real, pair.imag])

    def projected(x, part):
        return np.einsum("td,dhk->thk", x, part["kernel"]) + part.get("bias", 0)

    x = params["embedding"]["embedding"][tokens]
    for layer in range(config.layers):
        block = jax.tree.map(lambda stack: stack[layer], params["blocks"])  # noqa: B023
        read, parts = norm(x, block["attention_norm"]), block["attention"]
        query, key, value = (
            projected(read, parts[name]) for name in ("query", "key", "value")
        )
        if config.query_key_norm:
            query = norm(query, parts["query_norm"])
            key = norm(key, parts["key_norm"])
        mixed = np.zeros_like(query)
        for head in range(config.heads):
            shared = head // (config.heads // config.key_value_heads)
            for i in range(len(tokens)):
                ours = turned(query[i, head], i)
                scores = [ours @ turned(key[j, shared], j) for j in range(i + 1)]
                weights = np.exp(np.array(scores) / np.sqrt(config.head_width))
                mixed[i, head] = weights / weights.sum() @ value[: i + 1, shared]
        x = x + np.einsum("thk,hkd->td", mixed, parts["out"]["kernel"])
        read, mlp = norm(x, block["mlp_norm"]), block["mlp"]
        gate = read @ mlp["gate"]["kernel"]
        wide = gate / (1 + np.exp(-gate)) * (read @ mlp["up"]["kernel"])
        x = x + wide @ mlp["down"]["kernel"]
    tied = params["embedding"]["embedding"].T
    return norm(x, params["norm"]) @ (tied if config.tied else params["head"])


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen"])
def test_logits_are_those_computed_by_hand(config):
    expected = [by_hand(config, params_of(config), row) for row in TOKENS]
    assert_close(logits_of(config, TOKENS), np.stack(expected))


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen"])
def test_logits_are_a_head_not_multiplied_out(config):
    head = jax.eval_shape(lambda: with_params(config, params_of(config))(TOKENS))
    assert isinstance(head, LinearHead)
    assert head.hidden.shape == (2, 8, 16)
    assert head.kernel.shape == (16, 11)
    assert ("head" in params_of(config)) != config.tied


def test_no_token_sees_a_later_one():
    changed = TOKENS.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % CONFIG.vocabulary
    got, expected = logits_of(CONFIG, changed), logits_of(CONFIG, TOKENS)
    np.testing.assert_array_equal(got[:, :5], expected[:, :5])
    assert (got[:, 5:] != expected[:, 5:]).any(-1).all()


def test_packed_texts_do_not_see_each_other():
    """A row of two texts and padding between, against each text alone."""
    first, second = TOKENS[0, :3], TOKENS[1, :4]
    packed = np.concatenate([first, [7], second])[None]
    segments = np.array([[1, 1, 1, 0, 2, 2, 2, 2]])
    got = logits_of(CONFIG, packed, segments)[0]
    assert_close(got[:3], logits_of(CONFIG, TOKENS)[0, :3])
    assert_close(got[4:], logits_of(CONFIG, TOKENS)[1, :4])
    assert np.isfinite(got).all()


def test_positions_may_be_given_and_only_their_differences_count():
    positions = np.broadcast_to(np.arange(8) + 5, TOKENS.shape)
    shifted = logits_of(CONFIG, TOKENS, None, positions)
    assert_close(shifted, logits_of(CONFIG, TOKENS))
    spread = logits_of(CONFIG, TOKENS, None, 3 * positions)
    assert np.abs(spread - shifted).max() > 1e-2


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen"])
def test_reading_piece_by_piece_with_caches_is_reading_at_once(config):
    @jax.jit
    def decode(tokens, first, caches):
        decoder = with_params(config, params_of(config))
        head, caches = decoder.decode(tokens, first, caches)
        return head.logits(), caches

    # The second text is two tokens behind the first, with padding in its place.
    expected = logits_of(config, TOKENS)
    caches = Cache.empty(config, batch=2, slots=9)
    start = np.array(TOKENS[:, :4])
    start[1, 2:] = 9
    logits, caches = decode(start, np.zeros(2, int), caches)
    assert_close(logits[0], expected[0, :4])
    assert_close(logits[1, :2], expected[1, :2])
    for step in range(4):
        at = np.array([4, 2]) + step
        logits, caches = decode(TOKENS[np.arange(2), at][:, None], at, caches)
        assert_close(logits[:, 0], expected[np.arange(2), at])


def test_remat_changes_no_gradient():
    def total(params, config):
        return jnp.sum(with_params(config, params)(TOKENS).logits() ** 2)

    @jax.jit
    def both(params):
        again = dataclasses.replace(CONFIG, remat=True)
        return jax.grad(total)(params, CONFIG), jax.grad(total)(params, again)

    params = params_of(CONFIG)
    # The primitive has had several names; its parameter has one.
    assert "prevent_cse" in str(jax.make_jaxpr(both)(params))
    plain, again = both(params)
    chex.assert_trees_all_close(plain, again, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_computed_and_float32_kept():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")

    @jax.jit
    def heads(params):
        return tuple(with_params(each, params)(TOKENS) for each in (config, CONFIG))

    rough, exact = heads(params_of(CONFIG))
    assert rough.hidden.dtype == rough.kernel.dtype == jnp.bfloat16
    assert exact.hidden.dtype == exact.kernel.dtype == jnp.float32
    assert np.abs(rough.hidden.astype(np.float32) - exact.hidden).max() < 0.1


def test_llama_3_slows_down_the_slow_pairs_only():
    # Pairs turn theta^(-i/16) * 64 / 2π times over the first 64 positions: 10.2 for
    # the fastest (kept), 0.001 for the slowest (slowed down); in between a blend.
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    ratio = frequencies(32, 10_000.0, scaling) / frequencies(32, 10_000.0)
    turns = 64 * frequencies(32, 10_000.0) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-6)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) == 3
    assert ((between > 1 / 8) & (between < 1)).all()


FEATURES = (
    "blocks[0]",
    "blocks[-1]",
    "blocks[1]/attention/query",
    "blocks[1]/attention/key",
    "blocks[1]/attention/value",
    "blocks[1]/attention/scores",
    "norm",
)


def shown(config, features, params=None):
    """Features of a decoder in training."""
    decoder = with_params(config, params_of(config))
    net = models.from_nnx(decoder, inputs=("tokens", "segments"), features=features)
    batch = {"tokens": TOKENS, "segments": np.array([[1] * 8, [1] * 5 + [2] * 3])}
    outputs, _ = net.model.apply(
        net.params if params is None else params, {}, batch, rng=None, train=True
    )
    return outputs


@pytest.mark.parametrize("remat", [False, True])
def test_layers_and_attention_are_features_by_path(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    outputs = jax.jit(lambda: shown(config, FEATURES))()
    features = outputs.features
    assert {path: each.shape for path, each in features.items()} == {
        "blocks[0]": (2, 8, 16),
        "blocks[-1]": (2, 8, 16),
        "blocks[1]/attention/query": (2, 8, 4, 4),
        "blocks[1]/attention/key": (2, 8, 2, 4),
        "blocks[1]/attention/value": (2, 8, 2, 4),
        "blocks[1]/attention/scores": (2, 4, 8, 8),
        "norm": (2, 8, 16),
    }
    last = features["blocks[-1]"]
    normed = last / np.sqrt(np.mean(last**2, -1, keepdims=True) + 1e-6)
    assert_close(features["norm"], normed * params_of(CONFIG)["norm"]["scale"])
    assert_close(outputs.logits.hidden, features["norm"])
    # Scores are -inf for later tokens and for those of another text.
    seen = np.isfinite(features["blocks[1]/attention/scores"])
    assert (seen[0] == np.tril(np.ones((8, 8), bool))).all()
    assert not seen[1, :, 5:, :5].any()
    assert seen[1, :, 7, 5:].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        objectives.self_attention_relation(
            student="blocks[1]/attention", teacher="blocks[2]/attention", heads=2
        ),
        objectives.attention(
            student="blocks[1]/attention/scores", teacher="blocks[2]/attention/scores"
        ),
    ],
    ids=["relations", "scores"],
)
def test_attention_terms_reach_the_student(objective):
    def paths(layer):
        return tuple(path.replace("1", str(layer)) for path in FEATURES[2:6])

    @jax.jit
    @jax.grad
    def slope(params):
        student = shown(CONFIG, paths(1), params)
        teacher = shown(CONFIG, paths(2))
        seen = Outputs(None, student.features)
        terms, _ = objective.apply({}, {}, seen, teacher, {}, jnp.array(0))
        return sum(term.mean.value() for term in terms.values())

    layers = slope(params_of(CONFIG))["blocks"]["attention"]["query"]["kernel"]
    moved = np.abs(layers).max((1, 2, 3))
    assert np.isfinite(moved).all()
    assert (moved[:2] > 1e-6).all()
    assert moved[2] == 0


def test_a_student_starts_from_layers_of_its_teacher():
    config, params = from_layers(CONFIG, params_of(CONFIG), [0, -1])
    assert config == dataclasses.replace(CONFIG, layers=2)
    teacher = params_of(CONFIG)
    for part in ("embedding", "norm", "head"):
        chex.assert_trees_all_equal(params[part], teacher[part])
    chex.assert_trees_all_equal(
        params["blocks"], jax.tree.map(lambda leaf: leaf[::2], teacher["blocks"])
    )
    got = jax.jit(lambda: with_params(config, params)(TOKENS[:1]).logits())()
    assert_close(got[0], by_hand(config, params, TOKENS[0]))


def test_all_layers_in_order_are_the_teacher_itself_in_other_buffers():
    teacher = params_of(CONFIG)
    config, params = from_layers(CONFIG, teacher, range(3))
    assert config == CONFIG
    chex.assert_trees_all_equal(params, teacher)
    # A state that holds a buffer of the teacher could not be donated.
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(teacher), strict=True)
    for ours, theirs in pairs:
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "layers: got none"),
        ([0, 3], r"layers: got \[3\], but the teacher has layers 0 to 2"),
        ([-4], r"layers: got \[-4\]"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, match):
    with pytest.raises(ValueError, match=match):
        from_layers(CONFIG, params_of(CONFIG), layers)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"layers": 0}, "layers: got 0; expected more than 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon: got nan"),
        ({"key_value_heads": 3}, "key_value_heads: got 3 for 4 heads; expected a div"),
        ({"head_width": 5}, "head_width: got 5; expected an even number"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changed, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **changed)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"high_frequency_factor": 1.0}, "low_frequency_factor: got 1.0 beside"),
        ({"factor": 0.0}, "factor: got 0.0"),
    ],
)
def test_scalings_that_cannot_be_are_refused(changed, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(RopeScaling(8.0, 1.0, 4.0, 64), **changed)


@pytest.mark.parametrize(
    ("error", "match", "inputs"),
    [
        (TypeError, "tokens: got float32", (TOKENS.astype(np.float32),)),
        (ValueError, r"tokens: got shape \(8,\)", (TOKENS[0],)),
        (ValueError, r"segments: got shape \(8,\)", (TOKENS, TOKENS[0])),
        (ValueError, r"positions: got shape \(1, 8\)", (TOKENS, None, TOKENS[:1])),
    ],
)
def test_tokens_that_do_not_fit_are_refused(error, match, inputs):
    with pytest.raises(error, match=match):
        with_params(CONFIG, params_of(CONFIG))(*inputs)
