"""Attention terms: scores of captured queries and keys, and MiniLM's relations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import losses, models, objectives
from kdjax.types import Outputs

EXAMPLES, TOKENS, HEADS, WIDTH = 2, 5, 2, 8
X = np.random.default_rng(0).normal(size=(EXAMPLES, TOKENS, WIDTH)).astype(np.float32)
MASK = np.array([[True] * TOKENS, [True, True, True, False, False]])


class Layer(nnx.Module):
    """One attention layer over tokens that are embedded already."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x, sow_weights=True)


def shown(seed, x=X):
    kinds = ("query", "key", "value", "attention_weights")
    net = models.from_nnx(Layer(seed), features=[f"attention/{kind}" for kind in kinds])
    run = jax.jit(lambda x: net.model.apply(net.params, {}, x, rng=None, train=False))
    return run({"x": x})[0]


STUDENT, TEACHER = shown(0), shown(1)


def mean_of(objective, batch, student=STUDENT, teacher=TEACHER):
    run = jax.jit(lambda *args: objective.apply({}, {}, *args, jnp.array(0))[0])
    terms = run(student, teacher, batch)
    return {name: term.mean for name, term in terms.items()}


def probabilities(outputs, causal=False, mask=None):
    query, key = (outputs.features[f"attention/{kind}"] for kind in ("query", "key"))
    scores = np.einsum("bqhd,bkhd->bhqk", np.float64(query), np.float64(key)) / 2
    if causal:
        scores = np.where(np.tril(np.ones((TOKENS, TOKENS), bool)), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_scores_are_those_of_the_attention_module():
    for outputs in (STUDENT, TEACHER):
        weights = outputs.features["attention/attention_weights"]
        np.testing.assert_allclose(probabilities(outputs), weights, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_attention_is_the_kl_of_what_each_token_attends_to(causal, mask):
    p, q = (probabilities(each, causal, mask) for each in (TEACHER, STUDENT))
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = np.where(p > 0, p * np.log(p / q), 0).sum(-1)
    counts = np.ones((EXAMPLES, TOKENS), bool) if mask is None else mask
    counts = np.broadcast_to(counts[:, None], rows.shape)
    objective = objectives.attention(
        student="attention", teacher="attention", causal=causal
    )
    got = mean_of(objective, {} if mask is None else {"mask": mask})["attention"]
    assert int(got.count) == counts.sum()
    np.testing.assert_allclose(got.value(), rows[counts].mean(), rtol=1e-4)


def test_attention_takes_scores_that_a_model_shows():
    scores = np.random.default_rng(1).normal(size=(2, EXAMPLES, HEADS, TOKENS, TOKENS))
    ours, theirs = (Outputs(None, {"scores": jnp.float32(each)}) for each in scores)
    objective = objectives.attention(
        losses.attention_mse, student="scores", teacher="scores", name="tinybert"
    )
    got = mean_of(objective, {"mask": MASK}, ours, theirs)["tinybert"]
    square = (scores[0] - scores[1]) ** 2
    rows = np.stack(
        [square[i][..., kept].mean(-1) for i, kept in enumerate(MASK)]
    )  # [B, heads, T]
    counts = np.broadcast_to(MASK[:, None], rows.shape)
    np.testing.assert_allclose(got.value(), rows[counts].mean(), rtol=1e-5)


def test_minilm_adds_the_relations_of_queries_keys_and_values():
    objective = objectives.self_attention_relation(
        student="attention", teacher="attention", heads=4, weight=0.5
    )
    got = mean_of(objective, {"mask": MASK})
    assert sorted(got) == ["minilm/key", "minilm/query", "minilm/value"]
    for kind in ("query", "key", "value"):
        ours, theirs = (
            each.features[f"attention/{kind}"].reshape(EXAMPLES, TOKENS, WIDTH)
            for each in (STUDENT, TEACHER)
        )
        values = losses.self_attention_relation(
            ours, theirs, heads=4, where=jnp.asarray(MASK)
        )
        counts = np.broadcast_to(MASK[:, None], values.shape)
        expected = np.asarray(values)[counts].mean()
        np.testing.assert_allclose(got[f"minilm/{kind}"].value(), expected, rtol=1e-5)


def test_padding_changes_nothing():
    """Lesson: Tunix averages over padding, and padding would be attended to."""
    wild = np.where(MASK[..., None], X, 50.0).astype(np.float32)
    both = objectives.combine(
        objectives.attention(student="attention", teacher="attention"),
        objectives.self_attention_relation(
            student="attention", teacher="attention", heads=2
        ),
    )
    expected = mean_of(both, {"mask": MASK})
    got = mean_of(both, {"mask": MASK}, shown(0, wild), shown(1, wild))
    for name in expected:
        np.testing.assert_allclose(got[name].value(), expected[name].value(), rtol=1e-5)


def test_what_is_missing_is_named():
    objective = objectives.attention(student="attention", teacher="layers/1")
    with pytest.raises(ValueError, match="the teacher gives no feature 'layers/1/qu"):
        mean_of(objective, {})
    with pytest.raises(ValueError, match="of: got none"):
        objectives.self_attention_relation(student="a", teacher="b", heads=2, of=())
